r"""Expanded, masked, independent and transformed distributions, and complex values.

A complex observation is read as a pair of real ones: the real and the imaginary part each have
the distribution and the scale that the model states. (NumPyro's own log-density of complex values
differs: it squares complex residuals.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import gammaln, xlogy

from numpyro_diffprior.reading.moments import is_wrapper

__all__ = [
    "Unwrapped",
    "elementwise_transforms",
    "from_pairs",
    "innermost",
    "is_complex",
    "log_density",
    "map_innermost",
    "peel",
    "to_pairs",
    "unwrap",
]


class Unwrapped(NamedTuple):
    """A distribution without its expanded, masked and independent wrappers.

    Attributes:
        fn: The distribution.
        batch_shape: The batch axes of the outermost wrapper and those that `to_event` took.
        mask: Which elements were observed, broadcastable to ``batch_shape``.
    """

    fn: dist.Distribution
    batch_shape: tuple[int, ...]
    mask: jax.Array | bool


def unwrap(fn: dist.Distribution) -> Unwrapped:
    """Remove the expanded, masked and independent wrappers of a distribution."""
    if not is_wrapper(fn):
        return Unwrapped(fn, tuple(fn.batch_shape), True)
    base = unwrap(fn.base_dist)
    joined = base.batch_shape[len(fn.base_dist.batch_shape) :]
    match fn:
        case dist.ExpandedDistribution():
            return base._replace(batch_shape=(*fn.batch_shape, *joined))
        case dist.MaskedDistribution():
            mask = jnp.asarray(fn._mask)  # NumPyro has no public name for it
            mask = mask.reshape(*mask.shape, *(1,) * len(joined))
            return base._replace(mask=jnp.logical_and(base.mask, mask))
        case _:
            return base


def innermost(fn: dist.Distribution) -> dist.Distribution:
    """Return the distribution inside expanded, masked and independent wrappers."""
    while is_wrapper(fn):
        fn = fn.base_dist
    return fn


def map_innermost(
    f: Callable[[dist.Distribution], dist.Distribution], fn: dist.Distribution
) -> dist.Distribution:
    """Apply a function to the distribution inside the wrappers, and wrap the result."""
    if not is_wrapper(fn):
        return f(fn)
    base = map_innermost(f, fn.base_dist)
    match fn:
        case dist.ExpandedDistribution():
            return base.expand(fn.batch_shape)
        case dist.MaskedDistribution():
            return base.mask(fn._mask)
        case _:
            return base.to_event(fn.reinterpreted_batch_ndims)


def log_density(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    """Return NumPyro's log-density, but that of Beta and Dirichlet as a single sum.

    NumPyro's difference of two sums is wrong for more than 32,768 densities at once with jaxlib
    0.10.2 on CPUs.
    """
    own, batch_shape, mask = unwrap(fn)
    match own:
        case dist.Beta():
            pair = jnp.broadcast_arrays(own.concentration1, own.concentration0)
            concentration, parts = jnp.stack(pair, -1), jnp.stack([value, 1 - value], -1)
        case dist.Dirichlet():
            concentration, parts = own.concentration, value
        case _:
            return fn.log_prob(value)
    terms = xlogy(concentration - 1, parts) - gammaln(concentration)
    density = terms.sum(-1) + gammaln(concentration.sum(-1))
    density = jnp.where(mask, jnp.broadcast_to(density, batch_shape), 0)
    return density.sum(tuple(range(len(fn.batch_shape), len(batch_shape))))


def is_complex(fn: dist.Distribution, value: jax.Array | None = None) -> bool:
    """Whether a distribution has complex parameters, or a value is complex."""
    leaves = jax.tree.leaves(fn) + ([] if value is None else [value])
    return any(jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating) for leaf in leaves)


def to_pairs(
    fn: dist.Distribution, value: jax.Array | None = None
) -> tuple[dist.Distribution, jax.Array | None]:
    """Return the distribution and the value as pairs of real and imaginary parts.

    The pairs are an additional event axis: the last one, or the one before the vectors of a
    multivariate distribution.

    Raises:
        ValueError: If the distribution does not support complex values, its scale is complex, or
            the mean is complex and the value real.
    """
    axis = -1 - len(innermost(fn).event_shape)
    paired = map_innermost(_pair, fn)
    if value is None:
        return paired, None
    if not jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise ValueError(
            "the mean is complex, but the values are real; observe complex values, or take the "
            "mean's real part or modulus."
        )
    return paired, jnp.stack([value.real, value.imag], axis)


def from_pairs(fn: dist.Distribution, pairs: jax.Array) -> jax.Array:
    """Return complex values of a distribution from their pairs; see `to_pairs`."""
    axis = -1 - len(innermost(fn).event_shape)
    real, imaginary = (jnp.take(pairs, i, axis) for i in range(2))
    return jax.lax.complex(real, imaginary)


def _pair(fn: dist.Distribution) -> dist.Distribution:
    match fn:
        case dist.StudentT():
            loc, df, scale = _stack(fn.loc), *(_real(p)[..., None] for p in (fn.df, fn.scale))
            return dist.StudentT(df, loc, scale).to_event(1)
        case dist.Normal() | dist.Cauchy() | dist.Laplace() | dist.Logistic():
            return type(fn)(_stack(fn.loc), _real(fn.scale)[..., None]).to_event(1)
        case dist.MultivariateNormal():
            scale_tril = _real(fn.scale_tril)[..., None, :, :]
            return dist.MultivariateNormal(_stack(fn.loc, -2), scale_tril=scale_tril).to_event(1)
        case dist.LowRankMultivariateNormal():
            factor, diag = _real(fn.cov_factor), _real(fn.cov_diag)
            return dist.LowRankMultivariateNormal(
                _stack(fn.loc, -2), factor[..., None, :, :], diag[..., None, :]
            ).to_event(1)
    raise ValueError(
        f"{type(fn).__name__} is not read with complex values; observe real and imaginary parts "
        "(`jnp.stack([z.real, z.imag], -1)`), or use a Normal."
    )


def _stack(z: jax.Array, axis: int = -1) -> jax.Array:
    z = jnp.asarray(z)
    return jnp.stack([z.real, z.imag], axis)


def _real(parameter: jax.Array) -> jax.Array:
    parameter = jnp.asarray(parameter)
    if jnp.issubdtype(parameter.dtype, jnp.complexfloating):
        raise ValueError(
            "a scale or covariance is complex; expected a real one, that of the real part and of "
            "the imaginary part."
        )
    return parameter


def elementwise_transforms(fn: dist.Distribution) -> list[Any]:
    """Return the elementwise transformations that `peel` inverts, in the order of application."""
    fn = innermost(fn)
    if not isinstance(fn, dist.TransformedDistribution) or isinstance(fn, dist.FoldedDistribution):
        return []
    if any(t.domain.event_dim or t.codomain.event_dim for t in fn.transforms):
        return []
    return [*elementwise_transforms(fn.base_dist), *fn.transforms]


def peel(fn: dist.Distribution, value: jax.Array) -> tuple[dist.Distribution, jax.Array]:
    """Return the base distribution and the values, transformed back elementwise."""
    for transform in reversed(elementwise_transforms(fn)):
        value = transform.inv(value)
    return map_innermost(_base, fn), value


def _base(fn: dist.Distribution) -> dist.Distribution:
    if not elementwise_transforms(fn):
        return fn
    return map_innermost(_base, fn.base_dist.expand(fn.batch_shape))
