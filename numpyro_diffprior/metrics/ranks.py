r"""Calibration of posterior draws against the truth that generated the data.

References:
    Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
    arXiv 1804.06788.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import chi2

__all__ = ["coverage", "sbc_ranks", "sbc_uniformity_pvalue"]


def coverage(
    samples: jax.Array,
    truth: jax.Array,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Fraction of the truth's elements inside their central credible intervals.

    The bounds at level :math:`\alpha` are the draws' quantiles at :math:`(1 \mp \alpha) / 2`. The
    quantile at :math:`q` is the :math:`q (\mathrm{draws} + 1)`-th smallest draw, so that exact
    draws, however few, cover with probability :math:`\alpha`. A level above
    ``(draws - 1) / (draws + 1)`` needs more draws. Elements with a NaN draw are not covered.

    Args:
        samples: Posterior draws with shape ``(draws, *shape)``.
        truth: The true values, with shape ``shape``.
        levels: Probabilities of the intervals, between 0 and 1.
        where: Boolean mask of the elements to count, broadcastable to ``shape`` (default: all).
            The result is NaN if it selects none.

    Returns:
        The empirical coverage per level, with shape ``(len(levels),)``.

    Raises:
        ValueError: If the shapes do not fit, or a level is outside (0, 1) or too high for so few
            draws.
    """
    samples, truth = jnp.asarray(samples), jnp.asarray(truth)
    if samples.ndim == 0 or samples.shape[1:] != truth.shape:
        raise ValueError(
            "coverage: expected samples with shape (draws, *shape) and truth with shape shape, "
            f"got {samples.shape} and {truth.shape}."
        )
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"coverage: expected levels between 0 and 1, got {tuple(levels)}.")
    num_draws = samples.shape[0]
    highest = (num_draws - 1) / (num_draws + 1)
    # the slack is for levels such as 0.9 with 19 draws, equal to the highest up to rounding
    if any(level > highest + 1e-9 for level in levels):
        raise ValueError(
            f"coverage: expected levels up to {highest:.4g} with {num_draws} draws, got "
            f"{tuple(levels)}; take more draws or lower levels."
        )
    dtype = jnp.result_type(samples, float)
    level = np.asarray(levels, dtype=np.float64)
    # The arguments of `jnp.quantile` that give the ``q (draws + 1)``-th smallest draws.
    q = np.stack([(1 - level) / 2, (1 + level) / 2])
    positions = np.clip((q * (num_draws + 1) - 1) / max(num_draws - 1, 1), 0.0, 1.0)
    lower, upper = (
        jnp.quantile(samples.astype(dtype), jnp.asarray(row, dtype), axis=0) for row in positions
    )
    inside = (lower <= truth) & (truth <= upper)
    mask = None if where is None else jnp.broadcast_to(where, truth.shape)
    axes = tuple(range(1, inside.ndim))
    return jnp.mean(inside, axis=axes, where=mask, dtype=dtype)


def sbc_ranks(
    samples: jax.Array, truth: jax.Array, *, rng_key: jax.Array | None = None
) -> jax.Array:
    """Ranks of the truth among posterior draws, for simulation-based calibration.

    If the truth is drawn from the prior, the data from the likelihood, and the draws independently
    from the exact posterior, then the ranks of each element over simulations are uniform on
    ``0..draws``. Draws equal to the truth count as above it. With a key, a random number of them
    counts as below it, which makes the ranks of discrete or constant elements uniform too.

    Args:
        samples: Posterior draws with shape ``(simulations, draws, *shape)``.
        truth: The values that generated the data, with shape ``(simulations, *shape)``.
        rng_key: Random key to break ties.

    Returns:
        The numbers of draws below the truth, integers with shape ``(simulations, *shape)``.

    Raises:
        ValueError: If the shapes do not fit.
    """
    samples, truth = jnp.asarray(samples), jnp.asarray(truth)
    if samples.ndim < 2 or samples.shape[:1] + samples.shape[2:] != truth.shape:
        raise ValueError(
            "sbc_ranks: expected samples with shape (simulations, draws, *shape) and truth with "
            f"shape (simulations, *shape), got {samples.shape} and {truth.shape}."
        )
    ranks = jnp.sum(samples < truth[:, None], axis=1, dtype=jnp.int32)
    if rng_key is None:
        return ranks
    num_ties = jnp.sum(samples == truth[:, None], axis=1, dtype=jnp.int32)
    return ranks + jax.random.randint(rng_key, ranks.shape, 0, num_ties + 1)


def sbc_uniformity_pvalue(ranks: jax.Array, num_draws: int, *, num_bins: int = 10) -> jax.Array:
    """Chi-square p-value of the hypothesis that ranks are uniform on ``0..num_draws``.

    The ranks are counted in ``num_bins`` bins of nearly equal width, which the expected counts
    take into account. Each element gets its own p-value, because the elements of one event are
    dependent. The approximation needs about five or more simulations per bin.

    Args:
        ranks: Integers from 0 to ``num_draws`` with shape ``(simulations, *shape)``, see
            `sbc_ranks`.
        num_draws: Number of draws among which the ranks were taken.
        num_bins: Number of bins, from 2 to ``num_draws + 1``.

    Returns:
        The p-values, with shape ``shape``.

    Raises:
        ValueError: If the number of bins is out of range, or ranks are not integers or (not
            checked under ``jit``) out of range.
    """
    ranks = jnp.asarray(ranks)
    if ranks.ndim == 0 or not jnp.issubdtype(ranks.dtype, jnp.integer):
        raise ValueError(
            "sbc_uniformity_pvalue: expected integer ranks with shape (simulations, *shape), got "
            f"{ranks.dtype} with shape {ranks.shape}."
        )
    if not 2 <= num_bins <= num_draws + 1:
        raise ValueError(
            f"sbc_uniformity_pvalue: expected num_bins from 2 to {num_draws + 1}, got {num_bins}."
        )
    if not isinstance(ranks, jax.core.Tracer) and np.any(
        (np.asarray(ranks) < 0) | (np.asarray(ranks) > num_draws)
    ):
        raise ValueError(
            f"sbc_uniformity_pvalue: expected ranks from 0 to num_draws = {num_draws}, got "
            f"{ranks.min()} to {ranks.max()}."
        )
    bin_of_rank = np.arange(num_draws + 1) * num_bins // (num_draws + 1)
    num_simulations = ranks.shape[0]
    widths = jnp.asarray(np.bincount(bin_of_rank, minlength=num_bins), dtype=float)
    expected = num_simulations * widths / (num_draws + 1)
    bins = jnp.asarray(bin_of_rank)[ranks].reshape(num_simulations, -1)
    counts = jax.vmap(functools.partial(jnp.bincount, length=num_bins), in_axes=1)(bins)
    statistic = jnp.sum((counts - expected) ** 2 / expected, axis=-1)
    return chi2.sf(statistic, num_bins - 1).reshape(ranks.shape[1:])
