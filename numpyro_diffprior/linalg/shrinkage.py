"""Shrinkage of covariances that were estimated from few events.

References:
    Schafer and Strimmer, *A shrinkage approach to large-scale covariance matrix estimation and
    implications for functional genomics*, Statistical Applications in Genetics and Molecular
    Biology 4, 2005 (shrinkage of a sample covariance to a structured one).
"""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior.linalg.batched import einsum, magnitude

__all__ = ["shrink_correlations"]


def shrink_correlations(
    root: jax.Array, weight: jax.Array, event_shape: tuple[int, ...]
) -> jax.Array:
    r"""Shrink a covariance to one of its own variances and of stationary correlations.

    .. math:: (1 - w) \Sigma + w T(\Sigma), \quad
        T_{ij} = \sigma_i \sigma_j \frac{\sum \Sigma_{kl}}{\sum \sigma_k \sigma_l}

    The sums are over all pairs :math:`(k, l)` of elements whose places differ, along each axis of
    events, as those of :math:`(i, j)` do. Negative eigenvalues, which averages may bring, become
    zero, up to rounding.

    Args:
        root: A square root :math:`L` of the covariance :math:`L L^T`, with shape ``(d, d)``.
        weight: The weight :math:`w`, from zero to one.
        event_shape: The shape of events of ``d`` elements.

    Returns:
        A square root of the result.
    """
    largest = magnitude(root, axis=-1)  # squares neither over- nor underflow
    norm = jnp.sqrt(jnp.square(root / largest).sum(-1, keepdims=True))
    white = root / largest / jnp.where(norm > 0, norm, 1)
    correlation = einsum("ik,jk->ij", white, white)
    deviation = largest * norm
    relative = deviation / magnitude(deviation)
    distance, count = _distances(event_shape)
    pairs = relative * relative.T
    total, share = (
        jnp.zeros(count, root.dtype).at[distance].add(x) for x in (correlation * pairs, pairs)
    )
    target = (total / jnp.where(share > 0, share, 1))[distance]
    eigenvalues, eigenvectors = jnp.linalg.eigh((1 - weight) * correlation + weight * target)
    # A target of pairs that were averaged may have negative eigenvalues.
    floor = jnp.finfo(root.dtype).eps * len(eigenvalues)
    return deviation * eigenvectors * jnp.sqrt(jnp.maximum(eigenvalues, floor))


def _distances(event_shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Return a number for the distance of each pair of elements, ``(d, d)``, and how many."""
    event_shape = event_shape or (1,)
    places = np.stack(np.unravel_index(np.arange(prod(event_shape)), event_shape))
    lags = places[:, :, None] - places[:, None] + np.array(event_shape)[:, None, None] - 1
    shape = tuple(2 * length - 1 for length in event_shape)
    return np.ravel_multi_index(tuple(lags), shape), prod(shape)
