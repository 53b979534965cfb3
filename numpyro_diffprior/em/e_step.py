"""The E-step: draws of all events from their posteriors under the current priors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count, set_fields
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.em.sites import Priors, Sites
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import PosteriorSamples, sample_blocks
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.infer.progress import Monitor
from numpyro_diffprior.metrics.transport import sliced_wasserstein
from numpyro_diffprior.particles.system import SamplingOptions
from numpyro_diffprior.reading.model import BoundModel

__all__ = ["EStep", "compare_draws", "draw_events", "no_draws"]


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
    """

    num_particles: int = 4
    num_draws: int = 1
    sampler: Sampler | None = None
    guidance: Guidance | None = None
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        names = ("num_particles", "num_draws")
        set_fields(self, **{n: check_count("EStep", n, getattr(self, n)) for n in names})
        BatchLimit.of("EStep", self.max_batch_size, default=1)  # raises if it is not valid

    @property
    def limit(self) -> BatchLimit:
        """The number of particles in memory at once."""
        return BatchLimit.of("EStep", self.max_batch_size, default=1024)

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
) -> PosteriorSamples:
    """Draw all events of a model that was read with the options of the E-step."""
    return sample_blocks(
        rng_key,
        model,
        e_step.options(model.reading.sampler),
        num_draws=e_step.num_draws,
        limit=e_step.limit,
        mesh=mesh,
        monitor=monitor,
    )


def no_draws(model: BoundModel, num_draws: int) -> dict[str, jax.Array]:
    """Return the draws before the first E-step, which are NaN, by site."""
    draws = {}
    for group in model.reading.groups:
        for site in group.latents.sites:
            sizes = {plate.dim: plate.size for plate in site.plates}
            batch = [
                sizes.get(i - len(site.batch_shape), n) for i, n in enumerate(site.batch_shape)
            ]
            shape = (num_draws, *batch, *site.event_shape)
            draws[site.name] = jnp.full(shape, jnp.nan, model.reading.dtype)
    return draws


def compare_draws(
    rng_key: jax.Array,
    draws: Mapping[str, jax.Array],
    previous: Mapping[str, jax.Array],
    priors: Priors,
    sites: Sites,
) -> jax.Array:
    """Return the mean over sites of the sliced Wasserstein distance to the previous draws."""
    distances = [
        _distance(rng_key, draws[site], previous[site], (-1, *priors[key].event_shape))
        for site, key in sites.site_priors
    ]
    return jnp.stack(distances).mean()


_MAX_NUM_COMPARED = 32_768


@partial(jax.jit, static_argnums=3)
def _distance(rng_key: jax.Array, x: jax.Array, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    x, y = x.reshape(shape), y.reshape(shape)
    # All projections are in memory at once.
    x, y = (events[:: -(-len(events) // _MAX_NUM_COMPARED)] for events in (x, y))
    return sliced_wasserstein(rng_key, x, y)
