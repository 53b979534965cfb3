r"""Observed values in units of their own noise.

Guidance needs variances, and in float32 the square of a deviation of 1e-26 underflows. Hence a
distribution with a scale is read as that of :math:`y / u`, where :math:`u` is the power of two
next below the scale: an exact division. The log-density is evaluated in the same way,
as :math:`\log p_u(y / u) - \log u`, since its derivatives divide by the square of the scale.
"""

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike

from numpyro_diffprior.linalg.powers import floor_log2, scale_by_power
from numpyro_diffprior.reading.unwrap import innermost, log_density, map_innermost, unwrap

__all__ = ["Standardized", "standardize", "standardized_log_density"]


class Standardized(NamedTuple):
    """Observed values in units of their noise.

    Attributes:
        fn: Their distribution.
        value: The values.
        exponent: The exponent of the power of two that multiplied them, broadcastable to them.
    """

    fn: dist.Distribution
    value: jax.Array
    exponent: jax.Array


def standardize(fn: dist.Distribution, value: jax.Array) -> Standardized:
    """Divide observed values by a unit near the scale of their distribution.

    Returns:
        The divided values and their distribution, of the same structure. The exponent is zero if
        the distribution has no scale, or its type is not supported here.
    """
    scale = _scale(fn)
    if scale is not None:
        exponent = -_exponent(scale)
        divided: Any = _rescale(fn, exponent)
        before: Any = jax.tree.structure(fn)
        # NumPyro may keep the parameters in another form.
        if jax.tree.structure(divided) == before:
            return Standardized(divided, scale_by_power(value, exponent), exponent)
    return Standardized(fn, value, jnp.zeros((), int))


def standardized_log_density(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    """Return the log-density of values, from that of the divided ones; see `log_density`."""
    divided = standardize(fn, value)
    own, batch_shape, mask = unwrap(fn)
    log_factor = divided.exponent * jnp.log(jnp.asarray(2.0))
    volume = jnp.broadcast_to(log_factor, (*batch_shape, *own.event_shape))
    volume = volume.sum(tuple(range(len(batch_shape), volume.ndim)))
    if isinstance(own, dist.LeftCensoredDistribution | dist.RightCensoredDistribution):
        mask = jnp.logical_and(mask, jnp.logical_not(own.censored))  # not for probabilities
    volume = jnp.where(mask, volume, 0).sum(tuple(range(len(fn.batch_shape), len(batch_shape))))
    return log_density(divided.fn, divided.value) + volume


def _exponent(scale: ArrayLike) -> jax.Array:
    """Return the exponent of the power of two next below a scale, zero if it is out of range."""
    scale = jnp.asarray(scale, jnp.result_type(float, scale))
    limits, exponent = jnp.finfo(scale.dtype), floor_log2(scale)
    valid = (scale > 0) & (exponent > limits.minexp) & (exponent < limits.maxexp - 1)
    return jnp.where(valid, exponent, 0)


_LOCATION_SCALE = (
    dist.Cauchy,
    dist.Gumbel,
    dist.Laplace,
    dist.Logistic,
    dist.Normal,
    dist.SoftLaplace,
)
_SCALE = (dist.HalfCauchy, dist.HalfNormal)
_MATRIX = (dist.MultivariateNormal, dist.MultivariateStudentT)
_BOUNDED = (
    dist.LeftCensoredDistribution,
    dist.LeftTruncatedDistribution,
    dist.RightCensoredDistribution,
    dist.RightTruncatedDistribution,
    dist.TwoSidedTruncatedDistribution,
)


def _scale(fn: Any) -> jax.Array | float | None:
    """Return the scale of a distribution, broadcastable to its values; None if it has none."""
    fn = innermost(fn)
    if isinstance(fn, _BOUNDED):
        return _scale(fn.base_dist)
    kind = type(fn)
    if kind in (*_LOCATION_SCALE, *_SCALE, dist.StudentT, dist.Weibull):
        return fn.scale
    if kind in (dist.Exponential, dist.Gamma):
        return 1 / fn.rate
    if kind is dist.Uniform:
        return fn.high - fn.low
    if kind in _MATRIX:
        diagonal = jnp.diagonal(fn.scale_tril, axis1=-2, axis2=-1)
        return diagonal.max(-1, keepdims=True)
    if kind is dist.GaussianRandomWalk:
        return jnp.asarray(fn.scale)[..., None]
    if isinstance(fn, dist.MixtureSameFamily) and not fn.event_shape:
        scale = _scale(fn.component_distribution)
        if scale is None:
            return None
        return jnp.broadcast_to(scale, fn.component_distribution.batch_shape).max(-1)
    if isinstance(fn, dist.MixtureGeneral) and not fn.event_shape:
        scales = [_scale(component) for component in fn.component_distributions]
        known = [scale for scale in scales if scale is not None]
        return reduce(jnp.maximum, known) if len(known) == len(scales) else None
    return None


def _rescale(fn: dist.Distribution, exponent: jax.Array) -> dist.Distribution:
    """Return the distribution of values times a power of two."""
    return map_innermost(lambda own: _rescale_own(own, exponent), fn)


def _rescale_own(fn: Any, exponent: jax.Array) -> dist.Distribution:
    """Return `_rescale` of a distribution without wrappers."""
    kind = type(fn)

    def rescale(parameter: ArrayLike) -> jax.Array:
        return scale_by_power(parameter, exponent)

    match fn:
        case dist.LeftTruncatedDistribution():
            return kind(_rescale(fn.base_dist, exponent), rescale(fn.low))
        case dist.RightTruncatedDistribution():
            return kind(_rescale(fn.base_dist, exponent), rescale(fn.high))
        case dist.TwoSidedTruncatedDistribution():
            return kind(_rescale(fn.base_dist, exponent), rescale(fn.low), rescale(fn.high))
        case dist.LeftCensoredDistribution() | dist.RightCensoredDistribution():
            return kind(_rescale(fn.base_dist, exponent), fn.censored)
        case dist.StudentT():
            return kind(fn.df, rescale(fn.loc), rescale(fn.scale))
        case dist.Weibull():
            return kind(rescale(fn.scale), fn.concentration)
        case dist.Exponential():
            return kind(scale_by_power(fn.rate, -exponent))
        case dist.Gamma():
            return kind(fn.concentration, scale_by_power(fn.rate, -exponent))
        case dist.Uniform():
            return kind(rescale(fn.low), rescale(fn.high))
        case dist.MultivariateNormal():
            scale_tril = scale_by_power(fn.scale_tril, exponent[..., None])
            return kind(rescale(fn.loc), scale_tril=scale_tril)
        case dist.MultivariateStudentT():
            scale_tril = scale_by_power(fn.scale_tril, exponent[..., None])
            return kind(fn.df, rescale(fn.loc), scale_tril)
        case dist.GaussianRandomWalk():
            return kind(scale_by_power(fn.scale, exponent[..., 0]), fn.num_steps)
        case dist.MixtureSameFamily():
            components = _rescale(fn.component_distribution, exponent[..., None])
            return kind(fn.mixing_distribution, components)
        case dist.MixtureGeneral():
            components = [
                _rescale(component, exponent) for component in fn.component_distributions
            ]
            return kind(fn.mixing_distribution, components)
        case _ if kind in _SCALE:
            return kind(rescale(fn.scale))
    return kind(rescale(fn.loc), rescale(fn.scale))
