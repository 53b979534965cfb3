r"""Wrappers of distributions, peeled off."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import gammaln, xlogy

__all__ = ["Unwrapped", "elementwise_transforms", "log_density", "peel", "unwrap"]


class Unwrapped(NamedTuple):
    """A distribution without what expands, masks and joins it.

    Attributes:
        fn: The distribution.
        batch_shape: The shape of its elements: batch and joined axes of what wrapped it.
        mask: Which elements were observed, broadcastable to that.
    """

    fn: dist.Distribution
    batch_shape: tuple[int, ...]
    mask: jax.Array | bool


def unwrap(fn: dist.Distribution) -> Unwrapped:
    """Take off what expands, masks and joins a distribution."""
    match fn:
        case dist.Independent():
            return unwrap(fn.base_dist)
        case dist.ExpandedDistribution():
            base = unwrap(fn.base_dist)
            joined = base.batch_shape[len(fn.base_dist.batch_shape) :]
            return Unwrapped(base.fn, (*fn.batch_shape, *joined), base.mask)
        case dist.MaskedDistribution():
            base = unwrap(fn.base_dist)
            num_joined = len(base.batch_shape) - len(fn.batch_shape)
            mask = fn._mask  # NumPyro has no public name for it
            if not isinstance(mask, bool):
                mask = jnp.asarray(mask).reshape(*jnp.shape(mask), *(1,) * num_joined)
            return base._replace(mask=jnp.logical_and(base.mask, mask))
        case _:
            return Unwrapped(fn, tuple(fn.batch_shape), True)


def log_density(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    """Return NumPyro's log-density, with that of Dirichlet's family as one sum.

    NumPyro's difference of two sums is wrong where jaxlib 0.10.2 makes more than 32,768 at once on
    CPUs.
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


def elementwise_transforms(fn: dist.Distribution) -> list[Any]:
    """Return the transformations that `peel` takes off: of each value for itself."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    if not isinstance(fn, dist.TransformedDistribution) or isinstance(fn, dist.FoldedDistribution):
        return []
    if any(t.domain.event_dim or t.codomain.event_dim for t in fn.transforms):
        return []
    return [*fn.transforms, *elementwise_transforms(fn.base_dist)]


def peel(fn: dist.Distribution, value: jax.Array) -> tuple[dist.Distribution, jax.Array]:
    """Transform values back to those of the base distribution."""
    match fn:
        case dist.Independent():
            base, value = peel(fn.base_dist, value)
            return base.to_event(fn.reinterpreted_batch_ndims), value
        case dist.ExpandedDistribution():
            base, value = peel(fn.base_dist, value)
            return base.expand(fn.batch_shape), value
        case dist.MaskedDistribution():
            base, value = peel(fn.base_dist, value)
            return base.mask(fn._mask), value
        case dist.TransformedDistribution() if elementwise_transforms(fn):
            for transform in reversed(fn.transforms):
                value = transform.inv(value)
            return peel(fn.base_dist.expand(fn.batch_shape), value)
        case _:
            return fn, value
