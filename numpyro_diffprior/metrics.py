r"""Judge samples: distances between point clouds, and calibration of posterior draws.

Two questions are asked of samples. Are two clouds of events drawn from the same distribution?
Sliced Wasserstein distances, the Sinkhorn divergence and the Fréchet distance are near zero if
they are; what finite clouds leave is best measured between two halves of the truth. Are posterior
draws calibrated against the truth that generated the data? Coverage and the ranks of
simulation-based calibration say so.

Notation: ``x`` with shape ``(n, *event_shape)`` and ``y`` with shape ``(m, *event_shape)`` are
clouds; events are flattened to vectors of size ``d``. The ground cost of entropic transport is
:math:`c(x, y) = \lVert x - y \rVert^2`, neither halved nor rooted.

References:
    Bonneel et al., *Sliced and Radon Wasserstein barycenters of measures*, 2015.
    Deshpande et al., *Max-sliced Wasserstein distance*, arXiv 1904.05877.
    Feydy et al., *Interpolating between optimal transport and MMD using Sinkhorn divergences*,
    arXiv 1810.08278.
    Chizat et al., *Faster Wasserstein distance estimation with the Sinkhorn divergence*,
    arXiv 2006.08172.
    Heusel et al., *GANs trained by a two time-scale update rule*, arXiv 1706.08500.
    Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
    arXiv 1804.06788.
"""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import chi2

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


class TransportResult(NamedTuple):
    """Solution of one entropic transport problem between two clouds.

    Attributes:
        cost: transport cost of the regularised plan, without its entropy, scalar.
        regularized_cost: the objective, cost plus the plan's weighted relative entropy, scalar.
        num_steps: Sinkhorn iterations made, scalar integer.
        converged: whether the plan's marginals are within the tolerance, scalar boolean.
    """

    cost: jax.Array
    regularized_cost: jax.Array
    num_steps: jax.Array
    converged: jax.Array


def sliced_wasserstein(
    rng_key: jax.Array, x: jax.Array, y: jax.Array, *, num_projections: int = 256, p: float = 2
) -> jax.Array:
    r"""Sliced Wasserstein distance of order ``p`` between two clouds.

    .. math::
        \left( \frac{1}{K} \sum_{k=1}^K W_p^p(\theta_k^\top x, \theta_k^\top y) \right)^{1/p},
        \qquad \theta_k \sim \mathcal{U}(S^{d-1}).

    The one-dimensional distances are exact, also for clouds of different sizes: the two empirical
    quantile functions are step functions and are compared on the union of their steps.

    Args:
        rng_key: key of the random directions.
        x: cloud with shape ``(n, *event_shape)``.
        y: cloud with shape ``(m, *event_shape)``.
        num_projections: number of directions ``K``.
        p: order of the distance, at least 1.

    Returns:
        The distance, in the events' units, scalar.

    Raises:
        ValueError: if the events' shapes differ, a cloud is empty or an option is out of range.
    """
    x, y = _clouds(x, y)
    _check_order(p)
    directions = _random_directions(rng_key, num_projections, x)
    return jnp.mean(_projected_distances(directions, x, y, p)) ** (1 / p)


def max_sliced_wasserstein(
    rng_key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    num_projections: int = 256,
    num_refined: int = 8,
    num_steps: int = 16,
    p: float = 2,
) -> jax.Array:
    r"""Max-sliced Wasserstein distance of order ``p``: the distance along the worst direction.

    The best ``num_refined`` of ``num_projections`` random directions are refined by ``num_steps``
    steps :math:`\theta \leftarrow \nabla W_p^p(\theta) / \lVert \nabla W_p^p(\theta) \rVert`
    (gradient ascent on the sphere with an infinite step; a power iteration on the displacements of
    the current coupling), and the largest distance met on the way is returned: a lower bound of
    the true maximum. ``num_steps=0`` gives the maximum over the random directions.

    Args:
        rng_key: key of the random directions.
        x: cloud with shape ``(n, *event_shape)``.
        y: cloud with shape ``(m, *event_shape)``.
        num_projections: number of random directions.
        num_refined: number of directions that are refined.
        num_steps: number of refinements of each.
        p: order of the distance, at least 1.

    Returns:
        The distance, in the events' units, scalar.

    Raises:
        ValueError: if the events' shapes differ, a cloud is empty or an option is out of range.
    """
    x, y = _clouds(x, y)
    _check_order(p)
    if num_refined < 1 or num_steps < 0:
        raise ValueError(
            f"expected num_refined >= 1 and num_steps >= 0, got {num_refined} and {num_steps}"
        )
    directions = _random_directions(rng_key, num_projections, x)
    values, order = jax.lax.top_k(
        _projected_distances(directions, x, y, p), min(num_refined, num_projections)
    )

    def total(directions: jax.Array) -> tuple[jax.Array, jax.Array]:
        distances = _projected_distances(directions, x, y, p)
        return jnp.sum(distances), distances

    def refine(
        carry: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        directions, best = carry
        gradient, _distances = jax.grad(total, has_aux=True)(directions)
        norm = jnp.linalg.norm(gradient, axis=-1, keepdims=True)
        # identical clouds have no gradient: stay where we are
        directions = jnp.where(norm > 0, gradient / jnp.where(norm > 0, norm, 1), directions)
        best = jnp.maximum(best, jnp.max(_projected_distances(directions, x, y, p)))
        return (directions, best), None

    (_, best), _ = jax.lax.scan(refine, (directions[order], values[0]), length=num_steps)
    return best ** (1 / p)


def entropic_transport(
    x: jax.Array,
    y: jax.Array,
    *,
    regularization: float = 0.01,
    tolerance: float = 1e-3,
    max_steps: int = 10_000,
) -> TransportResult:
    r"""Entropic optimal transport between two clouds with uniform weights.

    .. math::
        P = \arg\min_P \langle P, C \rangle + \varepsilon \mathrm{KL}(P \Vert a b^\top),
        \qquad C_{ij} = \lVert x_i - y_j \rVert^2,

    with ott-jax's Sinkhorn iterations in the logarithmic domain and adaptive over-relaxation
    (Lehmann et al., arXiv 2012.12562). The regularisation is absolute, in squared units of the
    events. Single precision resolves the marginals to about ``1e-7 * max(C) / regularization``.
    Memory and the time of an iteration grow with ``n * m``.

    Args:
        x: cloud with shape ``(n, *event_shape)``.
        y: cloud with shape ``(m, *event_shape)``.
        regularization: :math:`\varepsilon`.
        tolerance: largest total violation (the sum of absolute values) of the marginals.
        max_steps: largest number of iterations.

    Returns:
        The costs, and whether and when the iterations converged.

    Raises:
        ImportError: if ott-jax is missing.
        ValueError: if the events' shapes differ, a cloud is empty or an option is out of range.
    """
    x, y = _clouds(x, y)
    _check_transport(regularization, tolerance, max_steps)
    return _transport(x, y, regularization, tolerance, max_steps, symmetric=False)


def entropic_transport_cost(
    x: jax.Array,
    y: jax.Array,
    *,
    regularization: float = 0.01,
    tolerance: float = 1e-3,
    max_steps: int = 10_000,
) -> jax.Array:
    r"""Transport cost :math:`\langle P, C \rangle` of the regularised plan, without its entropy.

    What POT's ``sinkhorn2`` returns for its default squared Euclidean cost. Even between a cloud
    and itself it is not zero: see `excess_transport_cost` and `sinkhorn_divergence`.
    Warns if the iterations did not converge; under ``jit`` it can not, see `entropic_transport`.

    Args:
        x: cloud with shape ``(n, *event_shape)``.
        y: cloud with shape ``(m, *event_shape)``.
        regularization: see `entropic_transport`, as the options that follow.
        tolerance: largest total violation of the marginals.
        max_steps: largest number of iterations.

    Returns:
        The cost, in squared units of the events, scalar.

    Raises:
        ImportError: if ott-jax is missing.
        ValueError: if the events' shapes differ, a cloud is empty or an option is out of range.
    """
    result = entropic_transport(
        x,
        y,
        regularization=regularization,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    _warn_unless_converged(result)
    return result.cost


def excess_transport_cost(
    samples: jax.Array,
    truth: jax.Array,
    other_truth: jax.Array,
    *,
    regularization: float = 0.01,
    tolerance: float = 1e-3,
    max_steps: int = 10_000,
) -> jax.Array:
    r"""Transport cost from the truth to samples, less that from the truth to more of the truth.

    :math:`\langle P, C \rangle(x, \hat x) - \langle P, C \rangle(x, x')`, which is what Rozet et
    al. (arXiv 2405.13712) report as the divergence of the five-dimensional manifold. Their code
    has 16,384 points in each cloud, regularisation 1e-3, at most 1,024 iterations, stops where the
    Euclidean norm of the marginal's violation is below 1e-3, and clips the result below at 1e-6.
    The cost of a plan short of convergence is too low, so compare numbers only at one setting.

    The samples' cost to themselves is not subtracted, so that the difference can be negative:
    samples that stay closer to the truth's points than fresh truth does cost less.

    Args:
        samples: cloud :math:`\hat x` with shape ``(n, *event_shape)``.
        truth: cloud :math:`x` with shape ``(m, *event_shape)``.
        other_truth: cloud :math:`x'`, independent of ``truth``, with shape ``(n, *event_shape)``:
            the same size as ``samples``, for the costs depend on the clouds' sizes.
        regularization: see `entropic_transport`, as the options that follow.
        tolerance: largest total violation of the marginals.
        max_steps: largest number of iterations.

    Returns:
        The difference, in squared units of the events, scalar.

    Raises:
        ImportError: if ott-jax is missing.
        ValueError: if the samples and the other truth differ in shape, a cloud is empty or an
            option is out of range.
    """
    if jnp.shape(samples) != jnp.shape(other_truth):
        raise ValueError(
            "expected samples and other_truth of one shape, got "
            f"{jnp.shape(samples)} and {jnp.shape(other_truth)}: their costs depend on their sizes"
        )
    cost = functools.partial(
        entropic_transport_cost,
        truth,
        regularization=regularization,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return cost(samples) - cost(other_truth)


def sinkhorn_divergence(
    x: jax.Array,
    y: jax.Array,
    *,
    regularization: float = 0.01,
    tolerance: float = 1e-3,
    max_steps: int = 10_000,
) -> jax.Array:
    r"""Debiased Sinkhorn divergence between two clouds.

    :math:`\mathrm{OT}_\varepsilon(x, y) - (\mathrm{OT}_\varepsilon(x, x) +
    \mathrm{OT}_\varepsilon(y, y)) / 2`, where :math:`\mathrm{OT}_\varepsilon` is the
    ``regularized_cost`` of `entropic_transport`. It is zero for identical clouds, positive
    otherwise, and the squared length of the shift for a shifted cloud.
    Warns if the iterations did not converge; under ``jit`` it can not.

    Args:
        x: cloud with shape ``(n, *event_shape)``.
        y: cloud with shape ``(m, *event_shape)``.
        regularization: see `entropic_transport`, as the options that follow.
        tolerance: largest total violation of the marginals.
        max_steps: largest number of iterations.

    Returns:
        The divergence, in squared units of the events, scalar.

    Raises:
        ImportError: if ott-jax is missing.
        ValueError: if the events' shapes differ, a cloud is empty or an option is out of range.
    """
    x, y = _clouds(x, y)
    _check_transport(regularization, tolerance, max_steps)
    options = (regularization, tolerance, max_steps)
    cross = _transport(x, y, *options, symmetric=False)
    within_x = _transport(x, x, *options, symmetric=True)
    within_y = _transport(y, y, *options, symmetric=True)
    _warn_unless_converged(cross, within_x, within_y)
    bias = (within_x.regularized_cost + within_y.regularized_cost) / 2
    return cross.regularized_cost - bias


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


def _clouds(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = jnp.asarray(x), jnp.asarray(y)
    if 0 in (x.ndim, y.ndim) or x.shape[1:] != y.shape[1:] or 0 in (x.size, y.size):
        raise ValueError(
            "expected non-empty clouds with shapes (n, *event_shape) and (m, *event_shape), got "
            f"{x.shape} and {y.shape}"
        )
    dtype = jnp.result_type(x, y, jnp.float32)
    return x.reshape(len(x), -1).astype(dtype), y.reshape(len(y), -1).astype(dtype)


def _check_order(p: float) -> None:
    if p < 1:
        raise ValueError(f"expected an order p of at least 1, got {p}")


def _random_directions(rng_key: jax.Array, num_projections: int, like: jax.Array) -> jax.Array:
    if num_projections < 1:
        raise ValueError(f"expected num_projections >= 1, got {num_projections}")
    z = jax.random.normal(rng_key, (num_projections, like.shape[1]), dtype=like.dtype)
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames="p")
def _projected_distances(directions: jax.Array, x: jax.Array, y: jax.Array, p: float) -> jax.Array:
    """Distances W_p^p of the clouds' projections, with shape ``(num_projections,)``."""
    rows_x, rows_y, widths = _common_steps(len(x), len(y))
    x = jnp.sort(jnp.matmul(directions, x.T, precision="highest"), axis=-1)[:, rows_x]
    y = jnp.sort(jnp.matmul(directions, y.T, precision="highest"), axis=-1)[:, rows_y]
    return jnp.sum(jnp.asarray(widths, dtype=x.dtype) * jnp.abs(x - y) ** p, axis=-1)


def _common_steps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order statistics of n and m points on the union of their quantile steps, and its widths."""
    # in units of 1 / (n m) the steps are integers, so that common ones coincide exactly
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    return (ends - 1) // m, (ends - 1) // n, np.diff(ends, prepend=0) / (n * m)


def _check_transport(regularization: float, tolerance: float, max_steps: int) -> None:
    if importlib.util.find_spec("ott") is None:
        raise ImportError(
            "entropic transport needs ott-jax: pip install 'numpyro_diffprior[metrics]'"
        )
    if not (regularization > 0 and tolerance > 0 and max_steps > 0):
        raise ValueError(
            "expected positive regularization, tolerance and max_steps, got "
            f"{regularization}, {tolerance} and {max_steps}"
        )


@functools.partial(jax.jit, static_argnames=("tolerance", "max_steps", "symmetric"))
def _transport(
    x: jax.Array,
    y: jax.Array,
    regularization: float,
    tolerance: float,
    max_steps: int,
    *,
    symmetric: bool,
) -> TransportResult:
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

    # a weight of the events' dtype: ott's branches must agree on it in single precision under x64.
    # Averaged parallel updates solve symmetric problems in a few steps (Feydy et al., eq. 25)
    solver = sinkhorn.Sinkhorn(
        threshold=tolerance,
        max_iterations=max_steps,
        inner_iterations=10,
        parallel_dual_updates=symmetric,
        momentum=acceleration.Momentum(start=0, value=0.5)
        if symmetric
        else acceleration.Momentum(start=200, value=x.dtype.type(1)),
    )
    # From differences, not from products: costs are divided by the regularisation, which would
    # magnify the products' cancellation. Kept for all iterations: faster than ott's clouds.
    cost_matrix = jnp.sum((x[:, None] - y) ** 2, axis=-1)
    geom = geometry.Geometry(
        cost_matrix=cost_matrix, epsilon=jnp.asarray(regularization, dtype=x.dtype)
    )
    weights = (jnp.full(len(z), 1 / len(z), dtype=z.dtype) for z in (x, y))
    result = solver(linear_problem.LinearProblem(geom, *weights))
    cost, regularized = result.primal_cost, result.reg_ot_cost
    # a diverged iteration ends with an error of minus infinity, which ott takes for convergence
    finite = jnp.isfinite(cost) & jnp.isfinite(regularized)
    return TransportResult(cost, regularized, result.n_iters, result.converged & finite)


def _warn_unless_converged(*results: TransportResult) -> None:
    for result in results:
        if not isinstance(result.converged, jax.core.Tracer) and not result.converged:
            warnings.warn(
                f"Sinkhorn iterations did not converge in {result.num_steps} steps: raise "
                "max_steps, tolerance or regularization, or use double precision",
                RuntimeWarning,
                stacklevel=3,
            )
            return


def _mean_and_root(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean, and a root R with R^T R the covariance."""
    mean = jnp.mean(features, axis=0)
    root = jnp.linalg.qr(features - mean, mode="r")
    return mean, root / (features.shape[0] - 1) ** 0.5


def _quantile_position(q: np.ndarray, num_draws: int) -> np.ndarray:
    """Argument of `jnp.quantile` that gives the ``q (num_draws + 1)``-th smallest draw."""
    return np.clip((q * (num_draws + 1) - 1) / max(num_draws - 1, 1), 0.0, 1.0)
