r"""Gaussian fits to draws, with a structured covariance.

References:
    Halko, Martinsson and Tropp, *Finding structure with randomness*, arXiv 0909.4061 (the
    low-rank fit).
"""

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior.linalg.batched import append_axis, matmul
from numpyro_diffprior.linalg.covariances import Covariance, Dense, DiagonalPlusLowRank

__all__ = ["empirical_gaussian"]


def empirical_gaussian(
    x: jax.Array, *, rank: int | None = None, max_dense: int = 512
) -> tuple[jax.Array, Covariance]:
    r"""Fit a Gaussian to draws: their mean and their (unbiased) covariance :math:`S`.

    Up to ``max_dense`` dimensions the covariance is :class:`Dense`. Beyond, it is
    :class:`DiagonalPlusLowRank`: the Nyström approximation of :math:`S` on its leading subspace,
    found by subspace iteration without forming :math:`S`, plus a diagonal that matches the
    variances of the draws.

    Args:
        x: Draws with shape ``(n, d)``.
        rank: Rank of the low-rank part, beyond ``max_dense`` dimensions (default: 32).
        max_dense: Largest ``d`` that gets a dense covariance; 0 selects the low-rank form.

    Returns:
        The mean, with shape ``(d,)``, and the covariance.

    Raises:
        ValueError: If ``x`` is not ``(n, d)`` with ``n > 1``, or ``rank`` is not positive.
    """
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(
            f"Expected at least two draws of shape (n, d), got an array of shape {x.shape}."
        )
    num, size = x.shape
    rank = min(32 if rank is None else check_count("empirical_gaussian", "rank", rank), size)
    mean = x.mean(0)
    centered = (x - mean) / (num - 1) ** 0.5
    if size <= max_dense:
        return mean, Dense.from_matrix(matmul(centered.T, centered))

    def improve(_: int, basis: jax.Array) -> jax.Array:
        return jnp.linalg.qr(matmul(centered.T, matmul(centered, basis)))[0]

    # The start only has to be in general position, so a constant key suffices.
    start = jax.random.normal(jax.random.key(0), (size, min(rank + 10, size)), x.dtype)
    basis = jax.lax.fori_loop(0, 6, improve, start)
    scores = matmul(centered, basis)
    eigenvalues, rotation = jnp.linalg.eigh(matmul(scores.T, scores))
    eigenvalues, rotation = eigenvalues[-rank:], rotation[:, -rank:]
    eps = jnp.finfo(x.dtype).eps
    positive = eigenvalues > eps * size * eigenvalues[-1]
    roots = jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, eigenvalues, 1)), 0)
    factor = matmul(centered.T, matmul(scores, rotation * roots))

    # A floor keeps every diagonal entry positive, since solves would else be ill-conditioned.
    variances, explained = jnp.square(centered).sum(0), jnp.square(factor).sum(-1)
    diag = jnp.maximum(variances - explained, eps**0.5 * variances)
    shrink = jnp.sqrt((variances - diag) / jnp.where(explained > 0, explained, 1))
    return mean, DiagonalPlusLowRank(diag, append_axis(shrink) * factor)
