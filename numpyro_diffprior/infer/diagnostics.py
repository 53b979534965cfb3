r"""Comparison of draws of one particle with draws of particle systems.

Guidance is exact where prior and observations are Gaussian. Elsewhere, draws :math:`x` of one
particle are compared with draws of particle systems for the same events, which have the mean
:math:`m` and the deviation :math:`s`. If one particle is good enough, the mean square of
:math:`(x - m) / s` over elements and events is that of a further draw of the particle systems.
It is larger if one particle is biased, or if its draws are too wide.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.diffusion.samplers import MultistepSDE
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import sample_first_block
from numpyro_diffprior.linalg.batched import magnitude
from numpyro_diffprior.particles.system import SamplingOptions
from numpyro_diffprior.reading.model import BoundModel, ModelData
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import Model

__all__ = ["warn_of_bias"]

_NUM_PARTICLES, _NUM_DRAWS, _MAX_EVENTS = 8, 16, 4
_LARGE_RATIO, _LARGE_Z = 1.2, 4.0


class _Comparison(NamedTuple):
    """The distance of one particle's draws from those of particle systems, scalars.

    Attributes:
        ratio: The ratio of the root-mean-square distances from the systems' mean.
        z: The difference of the mean squares, in standard errors.
    """

    ratio: jax.Array
    z: jax.Array


# The pairs of model and options whose draws were compared already.
_COMPARED: dict[Any, None] = {}
_MAX_COMPARED = 256


def warn_of_bias(
    rng_key: jax.Array,
    model: Model,
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    bound: BoundModel,
    options: SamplingOptions,
    samples: dict[str, jax.Array],
    mesh: Mesh | None = None,
) -> None:
    """Warn if draws of one particle differ from those of particle systems; once per model.

    The particle systems use no more particles than the call itself, so that calls with few draws
    are not checked.

    Args:
        rng_key: A random key.
        model: The model.
        arguments: Its positional and its keyword arguments.
        bound: The model as read for the draws.
        options: The options of the draws, with one particle.
        samples: The draws by site, with shape ``(num_samples, *batch, *event)``.
        mesh: The devices, or None.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((samples, bound))):
        return
    if (bound.reading, options) in _COMPARED or _is_exact(bound):
        return
    num_samples = next(iter(samples.values())).shape[0]
    num_events = max(group.latents.num_events for group in bound.reading.groups)
    affordable = num_samples * num_events // (_NUM_PARTICLES * _NUM_DRAWS)
    num_compared = min(_MAX_EVENTS, num_events, affordable)
    if num_compared < 1:
        return
    _COMPARED[bound.reading, options] = None
    while len(_COMPARED) > _MAX_COMPARED:
        _COMPARED.pop(next(iter(_COMPARED)))
    args, kwargs = arguments
    reduced = read(
        model, args, kwargs, block_size=lambda _: num_compared, mesh=mesh, purpose="diagnostics"
    )
    sampler = options.sampler
    if not (sampler.eta > 0 and sampler.is_single_evaluation):
        sampler = MultistepSDE(sampler.num_steps)
    guidance = MMPS(GaussianCovariance(), look_ahead=True)
    drawn = sample_first_block(
        rng_key, reduced, SamplingOptions(_NUM_PARTICLES, sampler, guidance), num_draws=_NUM_DRAWS
    )
    for name, particles in drawn.items():
        first = samples[name][(slice(None), *(slice(size) for size in particles.shape[1:]))]
        ratio, z = _compare(jnp.asarray(first), particles)
        if ratio > _LARGE_RATIO and z > _LARGE_Z:
            warnings.warn(
                f"draws of one particle are biased for site '{name}': for {num_compared} of its "
                f"events they lie {float(ratio):.2g} times as far from the posterior's mean as "
                f"draws of {_NUM_PARTICLES} particles. Pass num_particles={2 * _NUM_PARTICLES}, "
                "or more.",
                stacklevel=3,
            )


def _is_exact(bound: BoundModel) -> bool:
    """Whether guidance is exact: the means are linear and the priors Gaussian."""

    def parts(data: ModelData) -> Any:
        return [group.prior_denoisers(data) for group in bound.reading.groups]

    shapes = jax.eval_shape(parts, bound.data)
    priors = [prior for group in shapes for prior in group]
    return bound.reading.linear and all(isinstance(prior, GaussianDenoiser) for prior in priors)


@jax.jit
def _compare(samples: jax.Array, particles: jax.Array) -> _Comparison:
    """Compare draws with those of particle systems; axis 0 is draws."""
    x, reference = (draws.reshape(len(draws), -1) for draws in (samples, particles))
    unit = magnitude(reference, axis=0)
    x, reference = x / unit, reference / unit

    def distance(x: jax.Array, mean: jax.Array, variance: jax.Array, count: int) -> jax.Array:
        known = variance > 0
        square = (x - mean) ** 2 / (jnp.where(known, variance, 1) * (1 + 1 / count))
        return jnp.where(known, square, 0).sum(-1) / jnp.maximum(known.sum(-1), 1)

    num = len(reference)
    actual = distance(x, reference.mean(0), reference.var(0, ddof=1), num)
    # The distance of each reference draw to the others.
    others = jnp.stack([jnp.delete(reference, i, axis=0) for i in range(num)])
    expected = distance(reference, others.mean(1), others.var(1, ddof=1), num - 1)
    error = expected.std(ddof=1) * jnp.sqrt(1 / num + 1 / len(x))
    difference = actual.mean() - expected.mean()
    return _Comparison(jnp.sqrt(actual.mean() / expected.mean()), difference / error)
