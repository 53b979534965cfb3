"""The E-step: draws of all events from their posteriors under the current priors."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count, set_fields
from numpyro_diffprior._compile.devices import num_devices
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.em.draws import DrawFiles
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import PosteriorSamples, block_size, sample_blocks
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.infer.progress import Monitor
from numpyro_diffprior.particles.system import SamplingOptions
from numpyro_diffprior.reading.latent import LatentGroup
from numpyro_diffprior.reading.model import BoundModel, ModelReading

__all__ = ["EStep", "draw_events"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class EStep:
    """How `EM` draws events; static.

    Args:
        num_particles: The number of particles per draw (default: four; one for events of more than
            256 elements of models that are linear with Gaussian noise, if no guidance is given).
        num_draws: The number of draws per event.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle, and
            with the Gaussian covariance of the current draws, without look-ahead, for more).
        max_batch_size: The number of particles in memory at once on one device (default: 1,024,
            or fewer with 2^18 elements in all).
        num_events: The number of elements of the largest plate that are drawn in one iteration, in
            turn (default: all, or 65,536 if there are more), rounded up to whole blocks of
            ``max_batch_size``. The others keep their last draws, and take part in M-steps from
            their first draw on; ``numpyro.param`` sites are learned once all events have been
            drawn.
        draws_in: Where the draws of all events are kept: on the ``"device"``; in the memory of the
            ``"host"``, as arrays of NumPy; or in a folder, as memory-mapped files, which the next
            iteration replaces (each of several processes has a folder of its own in it). From
            host or folder, the M-step reads its minibatches; mean and covariance are estimated
            from some draws, evenly spaced: 65,536 of them, or as many as have 2^25 elements, or
            4,096, if these have more.

    References:
        Neal and Hinton, *A view of the EM algorithm that justifies incremental, sparse, and other
        variants*, 1998 (E-steps for some of the events).
    """

    num_particles: int | None = None
    num_draws: int = 1
    sampler: Sampler | None = None
    guidance: Guidance | None = None
    max_batch_size: int | None = None
    num_events: int | None = None
    draws_in: str | os.PathLike[str] = "device"

    def __post_init__(self) -> None:
        set_fields(self, num_draws=check_count("EStep", "num_draws", self.num_draws))
        if self.num_particles is not None:
            count = check_count("EStep", "num_particles", self.num_particles)
            set_fields(self, num_particles=count)
        BatchLimit.of("EStep", self.max_batch_size, default=1)  # raises if it is not valid
        if self.num_events is not None:
            set_fields(self, num_events=check_count("EStep", "num_events", self.num_events))
        if not isinstance(self.draws_in, str | os.PathLike):
            raise ValueError(
                'EStep: expected draws_in to be "device", "host" or a folder, got '
                f"{self.draws_in!r}."
            )
        set_fields(self, draws_in=os.fspath(self.draws_in))

    @property
    def limit(self) -> BatchLimit:
        """The number of particles in memory at once."""
        return BatchLimit.of("EStep", self.max_batch_size, default=1024)

    @property
    def _most_events(self) -> int:
        """The number of events in one iteration, at most."""
        return self.num_events or _MAX_EVENTS

    @property
    def on_host(self) -> bool:
        """Whether draws are arrays of NumPy, in memory or in files."""
        return self.draws_in != "device"

    @property
    def folder(self) -> str | None:
        """The folder of draws, or None."""
        return None if self.draws_in in ("device", "host") else os.fspath(self.draws_in)

    def particles(self, reading: ModelReading) -> int:
        """Return the number of particles per draw of the events of a model."""
        is_given = self.num_particles is not None or self.guidance is not None
        is_large = reading.event_size > _MAX_SIZE and reading.linear
        return 1 if is_large and not is_given else self.max_particles

    @property
    def max_particles(self) -> int:
        """The largest number of particles per draw, whatever the model."""
        return self.num_particles or 4

    def block_size(self, mesh: Mesh | None) -> Callable[[LatentGroup], int]:
        """Return the block size, see `numpyro_diffprior.infer.blocks.block_size`.

        If some of the events are drawn, the plate is divided, so that they can be.
        """
        # Whether a model is linear is known once it has been read.
        whole = block_size(self.max_particles, self.num_draws, self.limit, mesh)

        def size(group: LatentGroup) -> int:
            plate, most = group.largest_plate, whole(group)
            if plate is None or plate.size <= self._most_events:
                return most
            return min(most, -(-self._most_events // num_devices(mesh)))

        return size

    def choose(self, model: BoundModel, iteration: int) -> dict[int, np.ndarray]:
        """Return the elements of divided plates to draw, by group, in order; absent if all.

        All elements are drawn in turn, in an order that changes from one turn to the next.
        """
        chosen: dict[int, np.ndarray] = {}
        for i, group in enumerate(model.reading.groups):
            if group.divided is None:
                continue
            plate, size = group.divided
            num = -(-self._most_events // size) * size
            if num >= plate.size:
                continue
            turn, position = divmod(iteration, -(-plate.size // num))
            order = np.random.default_rng(turn).permutation(plate.size)
            start = min(position * num, plate.size - num)
            chosen[i] = np.sort(order[start : start + num])
        return chosen

    def options(self, default: Sampler, num_particles: int | None = None) -> SamplingOptions:
        """Return the options of sampling.

        Args:
            default: The prior's sampler.
            num_particles: The number of particles (default: `max_particles`).

        Raises:
            ValueError: If particles, sampler and guidance do not fit together.
        """
        guidance = self.guidance
        num_particles = self.max_particles if num_particles is None else num_particles
        if guidance is None and num_particles > 1:
            # No look-ahead: it approximates the prior by a Gaussian, which fails for a prior on
            # a curve.
            guidance = MMPS(GaussianCovariance())
        return resolve_options(default, num_particles, self.sampler, guidance)


# The most elements of events of linear models that several particles draw by default. One particle
# with Tweedie's covariance draws images of 28 x 28 in a third of the time, and EM learns at least
# as much from them (`examples/images.py`). Of photon counts, the Gaussian covariance is better
# (`benchmarks/images.py`).
_MAX_SIZE = 256
# Far more than the smaller parts that `benchmarks/partial.py` and `benchmarks/time_to_quality.py`
# measure to be enough.
_MAX_EVENTS = 2**16


def draw_events(
    rng_key: jax.Array,
    model: BoundModel,
    e_step: EStep,
    mesh: Mesh | None,
    monitor: Monitor = Monitor(),
    chosen: Mapping[int, np.ndarray] = MappingProxyType({}),
    files: DrawFiles | None = None,
) -> PosteriorSamples:
    """Draw events of a model that was read with the options of the E-step, by default all."""
    drawn = sample_blocks(
        rng_key,
        model,
        e_step.options(model.reading.sampler, e_step.particles(model.reading)),
        num_draws=e_step.num_draws,
        limit=e_step.limit,
        mesh=mesh,
        monitor=monitor,
        chosen=chosen,
        folder=files,
        on_host=e_step.on_host,
    )
    return drawn if files is None else drawn._replace(samples=files.samples)
