r"""Judge samples: distances between point clouds, and calibration of posterior draws.

Two questions are asked of samples. Are two clouds of events drawn from the same distribution? The
distances of `numpyro_diffprior.transport`, which are found here too, and the Fréchet distance say
so. Are posterior draws calibrated against the truth that generated the data? Coverage and the
ranks of simulation-based calibration say so.

References:
    Heusel et al., *GANs trained by a two time-scale update rule*, arXiv 1706.08500.
    Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
    arXiv 1804.06788.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import chi2

from numpyro_diffprior.transport import (
    TransportResult,
    entropic_transport,
    entropic_transport_cost,
    excess_transport_cost,
    max_sliced_wasserstein,
    sinkhorn_divergence,
    sliced_wasserstein,
)

__all__ = [
    "TransportResult",
    "coverage",
    "entropic_transport",
    "entropic_transport_cost",
    "excess_transport_cost",
    "frechet_distance",
    "max_sliced_wasserstein",
    "sbc_ranks",
    "sbc_uniformity_pvalue",
    "sinkhorn_divergence",
    "sliced_wasserstein",
]


def frechet_distance(features_x: jax.Array, features_y: jax.Array) -> jax.Array:
    r"""Fréchet distance between Gaussians fitted to two sets of features (squared, as FID is).

    .. math::
        \lVert \mu_x - \mu_y \rVert^2 + \mathrm{tr}\left(\Sigma_x + \Sigma_y
        - 2 (\Sigma_x^{1/2} \Sigma_y \Sigma_x^{1/2})^{1/2}\right)

    The trace of the root is the sum of the singular values of :math:`R_x R_y^\top`, where
    :math:`\Sigma = R^\top R` from a QR decomposition of the centred features. The
    eigenvalues of the symmetric product are these values' squares; going around them keeps full
    precision where the covariances are near singular, which the root of a rounded eigenvalue does
    not.

    Args:
        features_x: features with shape ``(n, k)``, ``n >= 2``.
        features_y: features with shape ``(m, k)``, ``m >= 2``.

    Returns:
        The squared distance, scalar.

    Raises:
        ValueError: if the features are not matrices of one width with two rows or more.
    """
    features_x, features_y = jnp.asarray(features_x), jnp.asarray(features_y)
    shapes = features_x.shape, features_y.shape
    if any(len(s) != 2 or s[0] < 2 for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            "expected features with shapes (n, k) and (m, k), n and m at least 2, got "
            f"{shapes[0]} and {shapes[1]}"
        )
    mean_x, root_x = _mean_and_root(features_x)
    mean_y, root_y = _mean_and_root(features_y)
    product = jnp.matmul(root_x, root_y.T, precision="highest")
    overlap = jnp.sum(jnp.linalg.svd(product, compute_uv=False))
    traces = jnp.sum(root_x**2) + jnp.sum(root_y**2)
    return jnp.sum((mean_x - mean_y) ** 2) + traces - 2 * overlap


def coverage(
    samples: jax.Array,
    truth: jax.Array,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Fraction of the truth's elements inside their central credible intervals.

    The bounds at level :math:`\alpha` are the draws' quantiles at :math:`(1 \mp \alpha) / 2`, with
    the ``q``-th quantile at the :math:`q (\mathrm{draws} + 1)`-th smallest draw: unlike with the
    usual position, exact draws then cover with probability :math:`\alpha` however few they are. A
    level above ``(draws - 1) / (draws + 1)`` needs more draws. A draw that is NaN makes a miss.

    Args:
        samples: posterior draws with shape ``(draws, *shape)``.
        truth: what they should cover, with shape ``shape``.
        levels: probabilities of the intervals, between 0 and 1.
        where: elements that count, boolean, broadcastable to ``shape``; by default all.
            NaN results if there are none.

    Returns:
        The empirical coverage per level, with shape ``(len(levels),)``.

    Raises:
        ValueError: if the shapes do not fit, or a level is outside (0, 1) or too high for so few
            draws.
    """
    samples, truth = jnp.asarray(samples), jnp.asarray(truth)
    if samples.ndim == 0 or samples.shape[1:] != truth.shape:
        raise ValueError(
            "expected samples with shape (draws, *shape) and truth with shape shape, got "
            f"{samples.shape} and {truth.shape}"
        )
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"expected levels between 0 and 1, got {tuple(levels)}")
    num_draws = samples.shape[0]
    highest = (num_draws - 1) / (num_draws + 1)
    # the slack is for levels such as 0.9 with 19 draws, which are equal up to rounding
    if any(level > highest + 1e-9 for level in levels):
        raise ValueError(
            f"expected levels up to {highest:.4g} with {num_draws} draws, got {tuple(levels)}: "
            "take more draws or lower levels"
        )
    dtype = jnp.result_type(samples, float)
    level = np.asarray(levels, dtype=np.float64)
    lower, upper = (
        jnp.quantile(
            samples.astype(dtype),
            jnp.asarray(_quantile_position(q, num_draws), dtype=dtype),
            axis=0,
        )
        for q in ((1 - level) / 2, (1 + level) / 2)
    )
    inside = (lower <= truth) & (truth <= upper)
    mask = None if where is None else jnp.broadcast_to(where, truth.shape)
    axes = tuple(range(1, inside.ndim))
    return jnp.mean(inside, axis=axes, where=mask, dtype=dtype)


def sbc_ranks(
    samples: jax.Array, truth: jax.Array, *, rng_key: jax.Array | None = None
) -> jax.Array:
    """Ranks of the truth among posterior draws, for simulation-based calibration.

    Where the truth is drawn from the prior, the data from the likelihood and the draws,
    independently, from the exact posterior, every element's ranks over simulations are uniform on
    ``0..draws``. Draws equal to the truth count as above it, or, with a key, a random number of
    them as below: so that ranks of discrete or constant elements are uniform too.

    Args:
        samples: posterior draws with shape ``(simulations, draws, *shape)``.
        truth: what generated the data, with shape ``(simulations, *shape)``.
        rng_key: a random key, to break ties with.

    Returns:
        The numbers of draws below the truth, integers with shape ``(simulations, *shape)``.

    Raises:
        ValueError: if the shapes do not fit.
    """
    samples, truth = jnp.asarray(samples), jnp.asarray(truth)
    if samples.ndim < 2 or samples.shape[:1] + samples.shape[2:] != truth.shape:
        raise ValueError(
            "expected samples with shape (simulations, draws, *shape) and truth with shape "
            f"(simulations, *shape), got {samples.shape} and {truth.shape}"
        )
    ranks = jnp.sum(samples < truth[:, None], axis=1, dtype=jnp.int32)
    if rng_key is None:
        return ranks
    num_ties = jnp.sum(samples == truth[:, None], axis=1, dtype=jnp.int32)
    return ranks + jax.random.randint(rng_key, ranks.shape, 0, num_ties + 1)


def sbc_uniformity_pvalue(ranks: jax.Array, num_draws: int, *, num_bins: int = 10) -> jax.Array:
    """Chi-square p-value of the hypothesis that ranks are uniform on ``0..num_draws``.

    The ranks are counted in ``num_bins`` bins of nearly equal width; expected counts allow for the
    widths. Simulations are independent, elements of one event are not: hence one p-value per
    element.
    The approximation wants five or more simulations per bin.

    Args:
        ranks: integers from 0 to ``num_draws`` with shape ``(simulations, *shape)``, see
            `sbc_ranks`.
        num_draws: number of draws among which the ranks were taken.
        num_bins: number of bins, from 2 to ``num_draws + 1``.

    Returns:
        The p-values, with shape ``shape``.

    Raises:
        ValueError: if the number of bins is out of range, or ranks are not integers or (where
            that can be seen, not under ``jit``) out of range.
    """
    ranks = jnp.asarray(ranks)
    if ranks.ndim == 0 or not jnp.issubdtype(ranks.dtype, jnp.integer):
        raise ValueError(
            "expected integer ranks with shape (simulations, *shape), got "
            f"{ranks.dtype} with shape {ranks.shape}"
        )
    if not 2 <= num_bins <= num_draws + 1:
        raise ValueError(f"expected num_bins from 2 to {num_draws + 1}, got {num_bins}")
    if not isinstance(ranks, jax.core.Tracer) and bool(jnp.any((ranks < 0) | (ranks > num_draws))):
        raise ValueError(
            f"expected ranks from 0 to num_draws = {num_draws}, got {ranks.min()} to {ranks.max()}"
        )
    bin_of_rank = np.arange(num_draws + 1) * num_bins // (num_draws + 1)
    num_simulations = ranks.shape[0]
    widths = jnp.asarray(np.bincount(bin_of_rank, minlength=num_bins), dtype=float)
    expected = num_simulations * widths / (num_draws + 1)
    bins = jnp.asarray(bin_of_rank)[ranks].reshape(num_simulations, -1)
    counts = jax.vmap(functools.partial(jnp.bincount, length=num_bins), in_axes=1)(bins)
    statistic = jnp.sum((counts - expected) ** 2 / expected, axis=-1)
    return chi2.sf(statistic, num_bins - 1).reshape(ranks.shape[1:])


def _mean_and_root(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean, and a root R with R^T R the covariance."""
    mean = jnp.mean(features, axis=0)
    root = jnp.linalg.qr(features - mean, mode="r")
    return mean, root / (features.shape[0] - 1) ** 0.5


def _quantile_position(q: np.ndarray, num_draws: int) -> np.ndarray:
    """Argument of `jnp.quantile` that gives the ``q (num_draws + 1)``-th smallest draw."""
    return np.clip((q * (num_draws + 1) - 1) / max(num_draws - 1, 1), 0.0, 1.0)
