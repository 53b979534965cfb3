"""The E-step: draws of all events from their posteriors under the current priors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count, set_fields
from numpyro_diffprior._compile.devices import num_devices
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.em.sites import Priors, Sites, module_of
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import PosteriorSamples, block_size, sample_blocks
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.infer.progress import Monitor
from numpyro_diffprior.metrics.transport import sliced_wasserstein
from numpyro_diffprior.particles.system import SamplingOptions
from numpyro_diffprior.reading.latent import LatentGroup
from numpyro_diffprior.reading.model import BoundModel

__all__ = ["EStep", "compare_draws", "draw_events", "no_draws", "put_draws", "take_draws"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class EStep:
    """How `EM` draws events; static.

    Args:
        num_particles: The number of particles per draw.
        num_draws: The number of draws per event.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle, and
            with the Gaussian covariance of the current draws, without look-ahead, for more).
        max_batch_size: The number of particles in memory at once on one device (default: 1,024,
            or fewer with 2^18 elements in all).
        num_events: The number of elements of the largest plate that are drawn in one iteration, in
            turn (default: all), rounded up to whole blocks of ``max_batch_size``. The others keep
            their last draws, and take part in M-steps from their first draw on;
            ``numpyro.param`` sites are learned once all events have been drawn.
        draws_on_host: Whether the draws of all events stay in host memory, as arrays of NumPy.
            The M-step reads its minibatches from there, and estimates mean and covariance from
            evenly spaced draws, with 2^28 elements in all at most. Use it if a device cannot hold
            all draws.

    References:
        Neal and Hinton, *A view of the EM algorithm that justifies incremental, sparse, and other
        variants*, 1998 (E-steps for some of the events).
    """

    num_particles: int = 4
    num_draws: int = 1
    sampler: Sampler | None = None
    guidance: Guidance | None = None
    max_batch_size: int | None = None
    num_events: int | None = None
    draws_on_host: bool = False

    def __post_init__(self) -> None:
        names = ("num_particles", "num_draws")
        set_fields(self, **{n: check_count("EStep", n, getattr(self, n)) for n in names})
        BatchLimit.of("EStep", self.max_batch_size, default=1)  # raises if it is not valid
        if self.num_events is not None:
            set_fields(self, num_events=check_count("EStep", "num_events", self.num_events))

    @property
    def limit(self) -> BatchLimit:
        """The number of particles in memory at once."""
        return BatchLimit.of("EStep", self.max_batch_size, default=1024)

    def block_size(self, mesh: Mesh | None) -> Callable[[LatentGroup], int]:
        """Return the block size, see `numpyro_diffprior.infer.blocks.block_size`.

        If some of the events are drawn, the plate is divided, so that they can be.
        """
        whole = block_size(self.num_particles, self.num_draws, self.limit, mesh)

        def size(group: LatentGroup) -> int:
            plate, most = group.largest_plate, whole(group)
            if self.num_events is None or plate is None or plate.size <= self.num_events:
                return most
            return min(most, -(-self.num_events // num_devices(mesh)))

        return size

    def choose(self, model: BoundModel, iteration: int) -> dict[int, np.ndarray]:
        """Return the elements of divided plates to draw, by group, in order; absent if all.

        All elements are drawn in turn, in an order that changes from one turn to the next.
        """
        chosen: dict[int, np.ndarray] = {}
        for i, group in enumerate(model.reading.groups):
            if self.num_events is None or group.divided is None:
                continue
            plate, size = group.divided
            num = -(-self.num_events // size) * size
            if num >= plate.size:
                continue
            turn, position = divmod(iteration, -(-plate.size // num))
            order = np.random.default_rng(turn).permutation(plate.size)
            start = min(position * num, plate.size - num)
            chosen[i] = np.sort(order[start : start + num])
        return chosen

    def options(self, default: Sampler) -> SamplingOptions:
        """Return the options of sampling, given the prior's sampler.

        Raises:
            ValueError: If particles, sampler and guidance do not fit together.
        """
        guidance = self.guidance
        if guidance is None and self.num_particles > 1:
            # No look-ahead: it approximates the prior by a Gaussian, which fails for a prior on
            # a curve.
            guidance = MMPS(GaussianCovariance())
        return resolve_options(default, self.num_particles, self.sampler, guidance)


def draw_events(
    rng_key: jax.Array,
    model: BoundModel,
    e_step: EStep,
    mesh: Mesh | None,
    monitor: Monitor = Monitor(),
    chosen: Mapping[int, np.ndarray] = MappingProxyType({}),
) -> PosteriorSamples:
    """Draw events of a model that was read with the options of the E-step, by default all."""
    return sample_blocks(
        rng_key,
        model,
        e_step.options(model.reading.sampler),
        num_draws=e_step.num_draws,
        limit=e_step.limit,
        mesh=mesh,
        monitor=monitor,
        chosen=chosen,
        on_host=e_step.draws_on_host,
    )


def take_draws(
    draws: Mapping[str, jax.Array], model: BoundModel, chosen: Mapping[int, np.ndarray]
) -> dict[str, jax.Array]:
    """Return the draws of chosen events, by site; see `EStep.choose`."""
    taken = dict(draws)
    for name, axis, index in _axes(model, chosen):
        x = draws[name]
        taken[name] = module_of(x).take(x, index, axis=axis)
    return taken


def put_draws(
    draws: Mapping[str, jax.Array],
    new: Mapping[str, jax.Array],
    model: BoundModel,
    chosen: Mapping[int, np.ndarray],
) -> dict[str, jax.Array]:
    """Return draws with new ones of chosen events; the inverse of `take_draws`."""
    put = dict(new)
    for name, axis, index in _axes(model, chosen):
        x, at = draws[name], (slice(None),) * axis + (index,)
        if isinstance(x, np.ndarray):
            put[name] = x.copy()
            put[name][at] = new[name]
        else:
            put[name] = x.at[at].set(new[name])
    return put


def _axes(
    model: BoundModel, chosen: Mapping[int, np.ndarray]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield the sites of groups of which some elements are chosen, with the axis of these."""
    for i, index in chosen.items():
        group = model.reading.groups[i]
        assert group.divided is not None
        axis = 1 + len(group.latents.batch_shape) + group.divided[0].dim
        for name in group.latents.names:
            yield name, axis, index


def no_draws(model: BoundModel, e_step: EStep) -> dict[str, jax.Array]:
    """Return the draws before the first E-step, which are NaN, by site."""
    draws, xp = {}, np if e_step.draws_on_host else jnp
    for group in model.reading.groups:
        for site in group.latents.sites:
            sizes = {plate.dim: plate.size for plate in site.plates}
            batch = [
                sizes.get(i - len(site.batch_shape), n) for i, n in enumerate(site.batch_shape)
            ]
            shape = (e_step.num_draws, *batch, *site.event_shape)
            draws[site.name] = xp.full(shape, jnp.nan, model.reading.dtype)
    return draws


def compare_draws(
    rng_key: jax.Array,
    draws: Mapping[str, jax.Array],
    previous: Mapping[str, jax.Array],
    priors: Priors,
    sites: Sites,
) -> jax.Array:
    """Return the mean over sites of the sliced Wasserstein distance to the previous draws."""
    distances = []
    for site, key in sites.site_priors:
        shape = (-1, *priors[key].event_shape)
        x, y = (_some(values[site], shape) for values in (draws, previous))
        distances.append(_distance(rng_key, x, y, shape))
    return jnp.stack(distances).mean()


_MAX_NUM_COMPARED = 32_768


def _some(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a regular subset of draws in host memory, or all of those on devices."""
    if not isinstance(x, np.ndarray):
        return x
    events = x.reshape(shape)
    return events[:: -(-len(events) // _MAX_NUM_COMPARED)]


@partial(jax.jit, static_argnums=3)
def _distance(rng_key: jax.Array, x: jax.Array, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    x, y = x.reshape(shape), y.reshape(shape)
    # All projections are in memory at once.
    x, y = (events[:: -(-len(events) // _MAX_NUM_COMPARED)] for events in (x, y))
    return sliced_wasserstein(rng_key, x, y)
