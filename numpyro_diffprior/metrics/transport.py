r"""Optimal transport distances between two clouds of events, to compare their distributions.

Sliced Wasserstein distances and the Sinkhorn divergence are near zero if both clouds have the same
distribution. To see how near for finite clouds, compare two halves of the truth.

Notation: ``x`` with shape ``(n, *event_shape)`` and ``y`` with shape ``(m, *event_shape)`` are
clouds; events are flattened to vectors of size ``d``. The ground cost of entropic transport is
:math:`c(x, y) = \lVert x - y \rVert^2`, without a factor 1/2 or a square root.

References:
    Bonneel et al., *Sliced and Radon Wasserstein barycenters of measures*, 2015.
    Deshpande et al., *Max-sliced Wasserstein distance*, arXiv 1904.05877.
    Feydy et al., *Interpolating between optimal transport and MMD using Sinkhorn divergences*,
    arXiv 1810.08278.
    Chizat et al., *Faster Wasserstein distance estimation with the Sinkhorn divergence*,
    arXiv 2006.08172.
"""

import functools
import importlib.util
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior._compile.checks import check_count, check_number
from numpyro_diffprior.metrics.frechet import check_squares

__all__ = [
    "TransportResult",
    "entropic_transport",
    "entropic_transport_cost",
    "excess_transport_cost",
    "max_sliced_wasserstein",
    "sinkhorn_divergence",
    "sliced_wasserstein",
]


class TransportResult(NamedTuple):
    """Solution of one entropic transport problem between two clouds.

    Attributes:
        cost: Transport cost of the regularized plan, without its entropy, scalar.
        regularized_cost: The objective, cost plus regularization times relative entropy, scalar.
        num_steps: Number of Sinkhorn iterations, scalar integer.
        converged: Whether the plan's marginals are within the tolerance, scalar boolean.
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
        rng_key: Key of the random directions.
        x: Cloud with shape ``(n, *event_shape)``.
        y: Cloud with shape ``(m, *event_shape)``.
        num_projections: Number of directions ``K``.
        p: Order of the distance, at least 1.

    Returns:
        The distance, in the events' units, scalar.

    Raises:
        ValueError: If the events' shapes differ, a cloud is empty or an option is out of range.
    """
    name = "sliced_wasserstein"
    x, y, unit = _in_unit(*_clouds(name, x, y))
    p = check_number(name, "p", p, 1.0, inclusive=True)
    directions = _random_directions(name, rng_key, num_projections, x)
    return unit * jnp.mean(_projected_distances(directions, x, y, p)) ** (1 / p)


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
    the current coupling). The result is the largest distance over all directions tried, a lower
    bound of the maximum. ``num_steps=0`` gives the maximum over the random directions.

    Args:
        rng_key: Key of the random directions.
        x: Cloud with shape ``(n, *event_shape)``.
        y: Cloud with shape ``(m, *event_shape)``.
        num_projections: Number of random directions.
        num_refined: Number of directions that are refined.
        num_steps: Number of refinements of each.
        p: Order of the distance, at least 1.

    Returns:
        The distance, in the events' units, scalar.

    Raises:
        ValueError: If the events' shapes differ, a cloud is empty or an option is out of range.
    """
    name = "max_sliced_wasserstein"
    x, y, unit = _in_unit(*_clouds(name, x, y))
    p = check_number(name, "p", p, 1.0, inclusive=True)
    num_refined = check_count(name, "num_refined", num_refined)
    num_steps = check_count(name, "num_steps", num_steps, least=0)
    directions = _random_directions(name, rng_key, num_projections, x)
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
        # identical clouds have zero gradient: keep the direction
        directions = jnp.where(norm > 0, gradient / jnp.where(norm > 0, norm, 1), directions)
        best = jnp.maximum(best, jnp.max(_projected_distances(directions, x, y, p)))
        return (directions, best), None

    (_, best), _ = jax.lax.scan(refine, (directions[order], values[0]), length=num_steps)
    return unit * best ** (1 / p)


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

    computed by ott-jax's Sinkhorn iterations in the log domain with adaptive over-relaxation
    (Lehmann et al., arXiv 2012.12562). The regularization is absolute, in squared units of the
    events. Single precision resolves the marginals to about ``1e-7 * max(C) / regularization``.
    Memory and the time of an iteration grow with ``n * m``.

    Args:
        x: Cloud with shape ``(n, *event_shape)``.
        y: Cloud with shape ``(m, *event_shape)``.
        regularization: :math:`\varepsilon`, in squared units of the events.
        tolerance: Largest total violation (the sum of absolute values) of the marginals.
        max_steps: Largest number of iterations.

    Returns:
        The costs, and whether and when the iterations converged.

    Raises:
        ImportError: If ott-jax is missing.
        ValueError: If the events' shapes differ, a cloud is empty or an option is out of range.
    """
    options = _check_transport("entropic_transport", regularization, tolerance, max_steps)
    x, y = _clouds("entropic_transport", x, y)
    check_squares("entropic_transport", x, y)
    return _transport(x, y, *options, symmetric=False)


def entropic_transport_cost(
    x: jax.Array,
    y: jax.Array,
    *,
    regularization: float = 0.01,
    tolerance: float = 1e-3,
    max_steps: int = 10_000,
) -> jax.Array:
    r"""Transport cost :math:`\langle P, C \rangle` of the regularized plan, without its entropy.

    POT's ``sinkhorn2`` returns the same cost by default. It is not zero even between a cloud and
    itself: see `excess_transport_cost` and `sinkhorn_divergence`.
    Warns if the iterations did not converge, except under ``jit``.

    Args:
        x: Cloud with shape ``(n, *event_shape)``.
        y: Cloud with shape ``(m, *event_shape)``.
        regularization: :math:`\varepsilon`, in squared units; see `entropic_transport`.
        tolerance: Largest total violation of the marginals.
        max_steps: Largest number of iterations.

    Returns:
        The cost, in squared units of the events, scalar.

    Raises:
        ImportError: If ott-jax is missing.
        ValueError: If the events' shapes differ, a cloud is empty or an option is out of range.
    """
    result = entropic_transport(
        x, y, regularization=regularization, tolerance=tolerance, max_steps=max_steps
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
    r"""Transport cost from the truth to samples, minus that from the truth to more of the truth.

    It is :math:`\langle P, C \rangle(x, \hat x) - \langle P, C \rangle(x, x')`, which Rozet et al.
    (arXiv 2405.13712) report as the divergence on their five-dimensional manifold. Their code uses
    16,384 points per cloud, regularization 1e-3 and at most 1,024 iterations, stops when the
    Euclidean norm of the marginal violation is below 1e-3, and clips the result below at 1e-6.
    Before convergence the cost is too low, so compare results only at equal settings.

    The difference can be negative, because the samples' cost to themselves is not subtracted:
    samples that lie closer to the points of ``truth`` than independent draws do cost less.

    Args:
        samples: Cloud :math:`\hat x` with shape ``(n, *event_shape)``.
        truth: Cloud :math:`x` with shape ``(m, *event_shape)``.
        other_truth: Cloud :math:`x'`, independent of ``truth``, with shape ``(n, *event_shape)``,
            the same as that of ``samples``, because costs depend on the number of points.
        regularization: :math:`\varepsilon`, in squared units; see `entropic_transport`.
        tolerance: Largest total violation of the marginals.
        max_steps: Largest number of iterations.

    Returns:
        The difference, in squared units of the events, scalar.

    Raises:
        ImportError: If ott-jax is missing.
        ValueError: If the samples and the other truth differ in shape, a cloud is empty or an
            option is out of range.
    """
    if jnp.shape(samples) != jnp.shape(other_truth):
        raise ValueError(
            "excess_transport_cost: expected samples and other_truth of one shape, since costs "
            f"depend on it, got {jnp.shape(samples)} and {jnp.shape(other_truth)}."
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
    ``regularized_cost`` of `entropic_transport`. It is zero for identical clouds and positive
    otherwise; for a shifted copy of a cloud it is the squared length of the shift.
    Warns if the iterations did not converge, except under ``jit``.

    Args:
        x: Cloud with shape ``(n, *event_shape)``.
        y: Cloud with shape ``(m, *event_shape)``.
        regularization: :math:`\varepsilon`, in squared units; see `entropic_transport`.
        tolerance: Largest total violation of the marginals.
        max_steps: Largest number of iterations.

    Returns:
        The divergence, in squared units of the events, scalar.

    Raises:
        ImportError: If ott-jax is missing.
        ValueError: If the events' shapes differ, a cloud is empty or an option is out of range.
    """
    options = _check_transport("sinkhorn_divergence", regularization, tolerance, max_steps)
    x, y = _clouds("sinkhorn_divergence", x, y)
    check_squares("sinkhorn_divergence", x, y)
    cross = _transport(x, y, *options, symmetric=False)
    within_x = _transport(x, x, *options, symmetric=True)
    within_y = _transport(y, y, *options, symmetric=True)
    _warn_unless_converged(cross, within_x, within_y)
    bias = (within_x.regularized_cost + within_y.regularized_cost) / 2
    return cross.regularized_cost - bias


def _clouds(name: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = jnp.asarray(x), jnp.asarray(y)
    if 0 in (x.ndim, y.ndim) or x.shape[1:] != y.shape[1:] or 0 in (x.size, y.size):
        raise ValueError(
            f"{name}: expected non-empty clouds with shapes (n, *event_shape) and "
            f"(m, *event_shape), got {x.shape} and {y.shape}."
        )
    dtype = jnp.result_type(x, y, jnp.float32)
    return x.reshape(len(x), -1).astype(dtype), y.reshape(len(y), -1).astype(dtype)


def _in_unit(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return clouds divided by a power of two (so that powers do not overflow), and the power."""
    size = jnp.maximum(jnp.abs(x).max(), jnp.abs(y).max())
    unit = jnp.where(size > 0, jnp.ldexp(jnp.ones_like(size), jnp.frexp(size)[1]), 1)
    return x / unit, y / unit, unit


def _random_directions(
    name: str, rng_key: jax.Array, num_projections: int, like: jax.Array
) -> jax.Array:
    num_projections = check_count(name, "num_projections", num_projections)
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
    """Return indices of both order statistics on the union of the quantile steps, and widths."""
    # in units of 1 / (n m) the steps are integers, so that common ones coincide exactly
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    return (ends - 1) // m, (ends - 1) // n, np.diff(ends, prepend=0) / (n * m)


def _check_transport(
    name: str, regularization: float, tolerance: float, max_steps: int
) -> tuple[float, float, int]:
    if importlib.util.find_spec("ott") is None:
        raise ImportError(
            f"{name}: entropic transport needs ott-jax: pip install 'numpyro_diffprior[metrics]'"
        )
    return (
        check_number(name, "regularization", regularization),
        check_number(name, "tolerance", tolerance),
        check_count(name, "max_steps", max_steps),
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

    # The momentum has the events' dtype: ott's branches must agree on it for float32 under x64.
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
    # The cost is computed from differences: the division by the regularization would magnify the
    # cancellation in an expanded square. Storing the matrix is faster than ott's `PointCloud`.
    cost_matrix = jnp.sum((x[:, None] - y) ** 2, axis=-1)
    geom = geometry.Geometry(
        cost_matrix=cost_matrix, epsilon=jnp.asarray(regularization, dtype=x.dtype)
    )
    weights = (jnp.full(len(z), 1 / len(z), dtype=z.dtype) for z in (x, y))
    result = solver(linear_problem.LinearProblem(geom, *weights))
    cost, regularized = result.primal_cost, result.reg_ot_cost
    # a diverged iteration ends with an error of minus infinity, which ott takes for convergence
    finite = jnp.isfinite(cost) & jnp.isfinite(regularized)
    return TransportResult(
        cost=cost,
        regularized_cost=regularized,
        num_steps=result.n_iters,
        converged=result.converged & finite,
    )


def _warn_unless_converged(*results: TransportResult) -> None:
    for result in results:
        if not isinstance(result.converged, jax.core.Tracer) and not result.converged:
            warnings.warn(
                f"Sinkhorn iterations did not converge in {result.num_steps} steps; raise "
                "max_steps, tolerance or regularization, or use double precision.",
                RuntimeWarning,
                stacklevel=3,
            )
            return
