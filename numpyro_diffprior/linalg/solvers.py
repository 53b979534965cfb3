r"""Solvers in the space of observations, which report how well they did.

For each event alone, :math:`(N + A V A^T) x = r`: matrix-free by conjugate gradients, or as
matrices, where a learned :math:`V` may have to be truncated and a closed form is factored.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712 (conjugate gradients in moment matching posterior sampling).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.linalg.batched import (
    apply,
    apply_transpose,
    by_matrix,
    eigh,
    inverse_lower,
    matmul,
)
from numpyro_diffprior.linalg.covariances import Covariance

__all__ = [
    "DenseSolveResult",
    "FactoredSolveResult",
    "SolveResult",
    "conjugate_gradient",
    "factored_solve",
    "sandwich",
    "sandwich_square",
    "truncated_solve",
]


class SolveResult(NamedTuple):
    """What an iterative solver found, per event.

    - **solution** - with shape ``(*batch, size)``.
    - **residual** - ``|b - M x| / |b|``, with shape ``(*batch,)``; 0 for ``b = 0``.
      Takes one more product with ``M``, which ``jit`` drops where the residual is not used.
    - **num_steps** - steps taken by each event, with shape ``(*batch,)``.
    - **inner** - the inner map at the solution, where there is one.
    """

    solution: jax.Array
    residual: jax.Array
    num_steps: jax.Array
    inner: jax.Array | None = None


class _State(NamedTuple):
    """The state of conjugate gradients; what ends in ``_square`` is a squared norm per event."""

    x: jax.Array
    inner_x: jax.Array | None
    r: jax.Array
    p: jax.Array
    r_square: jax.Array
    active: jax.Array
    num_steps: jax.Array
    step: jax.Array


def conjugate_gradient(
    matvec: Callable[..., jax.Array],
    b: jax.Array,
    *,
    inner: Callable[[jax.Array], jax.Array] | None = None,
    rtol: float = 1e-5,
    max_steps: int | None = None,
    floor: Callable[[jax.Array], jax.Array] | None = None,
) -> SolveResult:
    r"""Solve :math:`M x = b` for every event of a batch by conjugate gradients, from zero.

    Each event has its own step lengths and stops on its own: it gets what it would get alone. It
    stops when the (recursive) residual falls to ``rtol`` times the norm of ``b``, after
    ``max_steps`` steps, or before a direction :math:`p` with :math:`p^T M p < p^T N p` by more
    than rounding. With :math:`M = N + A V A^T` that is one in which a learned :math:`V` has a
    negative variance.
    Where the map is not symmetric, as a learned :math:`V` may be, steps can lead away without
    bound: an event also stops before one that would raise the energy
    :math:`\tfrac{1}{2} x^T M x - b^T x`, as none does for a symmetric map.
    Not differentiable in reverse mode.

    Args:
        matvec: the symmetric map :math:`M` of ``(*batch, size)``, acting on each event alone.
        b: right-hand sides with shape ``(*batch, size)``.
        inner: a linear map :math:`v \mapsto B v` to ``(*batch, n)``, the costly part of :math:`M`,
            which is then ``matvec(v, inner(v))``. It is applied once per step: at the solution it
            is known from the steps, and so is the residual.
        rtol: relative residual at which an event is done.
        max_steps: budget per event, ``2 * size`` by default.
        floor: the map :math:`N` of the noise covariance; zero by default.
    """
    max_steps = 2 * b.shape[-1] if max_steps is None else max_steps
    # In units in which every squared norm is a number, whatever those of the data.
    b_norm = _norm(b)
    b = b / jnp.where(b_norm == 0, 1, b_norm)[..., None]
    b_square = _dot(b, b)

    def evaluate(v: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if inner is None:
            return matvec(v), None
        inner_v = inner(v)
        return matvec(v, inner_v), inner_v

    def unfinished(state: _State) -> jax.Array:
        return state.active.any() & (state.step < max_steps)

    def advance(state: _State) -> _State:
        x, inner_x, r, p, r_square, active, num_steps, step = state
        m_p, inner_p = evaluate(p)
        curvature = _dot(p, m_p)
        if floor is None:
            active &= curvature > 0
        else:
            least = _dot(p, floor(p))
            active &= curvature > least * (1 - 8 * jnp.finfo(b.dtype).eps)
        # Zero for a symmetric map, but for rounding; the step changes the energy by its length
        # times (skew - r_square / 2).
        skew = (_dot(x, m_p) - _dot(b - r, p)) / 2
        rounding = 8 * jnp.finfo(b.dtype).eps * _norm(x) * _norm(m_p)
        active &= skew < r_square / 2 + rounding
        length = r_square / jnp.where(active, curvature, 1)
        x, inner_x = jax.tree.map(
            lambda x, p: _select(active, x + length[..., None] * p, x), (x, inner_x), (p, inner_p)
        )
        r = _select(active, r - length[..., None] * m_p, r)
        r_square_next = _dot(r, r)
        momentum = r_square_next / jnp.where(active, r_square, 1)
        p = _select(active, r + momentum[..., None] * p, p)
        num_steps += active
        active &= r_square_next > rtol**2 * b_square
        return _State(x, inner_x, r, p, r_square_next, active, num_steps, step + 1)

    active = b_square > rtol**2 * b_square
    num_steps = jnp.zeros(b_square.shape, int)
    zeros = jnp.zeros_like(b)
    inner_zeros = None if inner is None else jnp.zeros_like(jax.eval_shape(inner, b))
    start = _State(zeros, inner_zeros, b, b, b_square, active, num_steps, jnp.zeros((), int))
    last = jax.lax.while_loop(unfinished, advance, start)
    error = b - (matvec(last.x) if inner is None else matvec(last.x, last.inner_x))
    residual = jnp.sqrt(_dot(error, error) / jnp.where(b_square == 0, 1, b_square))
    x, inner_x = jax.tree.map(lambda v: b_norm[..., None] * v, (last.x, last.inner_x))
    return SolveResult(x, residual, last.num_steps, inner_x)


class DenseSolveResult(NamedTuple):
    """What :func:`truncated_solve` found, per event.

    - **solution** - with shape ``(*batch, m)``.
    - **logdet** - of the noise plus the positive part of the gain, with shape ``(*batch,)``.
    - **left_out** - squared residual of the directions without correction, in deviations of the
      noise, with shape ``(*batch,)``: what :math:`r^T x` lacks to be that of the noise plus the
      positive part of the gain.
    - **num_truncated** - number of directions with negative gain, with shape ``(*batch,)``.
    """

    solution: jax.Array
    logdet: jax.Array
    left_out: jax.Array
    num_truncated: jax.Array


def truncated_solve(gain: jax.Array, noise: Covariance, residual: jax.Array) -> DenseSolveResult:
    r"""Solve :math:`(N + G) x = r` where positive, for a learned gain :math:`G = A V A^T`.

    The symmetric part of :math:`L^{-1} G L^{-T}`, with :math:`N = L L^T`, has eigenvectors
    :math:`u_i` with eigenvalues :math:`\lambda_i`. Those that are not positive get no correction:

    .. math:: x = L^{-T} \sum_{\lambda_i > 0} u_i \frac{u_i^T L^{-1} r}{1 + \lambda_i}.

    Args:
        gain: with shape ``(*batch, m, m)``.
        noise: regular covariance of size ``m``.
        residual: with shape ``(*batch, m)``.

    Raises:
        ValueError: if the shapes do not agree.
    """
    m = noise.size
    if gain.shape[-2:] != (m, m) or residual.shape[-1] != m:
        raise ValueError(
            f"Expected a gain of shape (*batch, {m}, {m}) and a residual of shape (*batch, {m}) "
            f"for noise of size {m}, got {gain.shape} and {residual.shape}."
        )
    whiten = inverse_lower(by_matrix(jnp.linalg.cholesky, noise.dense()))
    whitened = matmul(matmul(whiten, (gain + gain.mT) / 2), whiten.mT)
    eigenvalues, eigenvectors = eigh(whitened)
    keep = eigenvalues > 0
    gains = jnp.where(keep, eigenvalues, 0)
    coefficients = apply_transpose(eigenvectors, apply(whiten, residual))
    left_out = jnp.sum(jnp.where(keep, 0, coefficients) ** 2, axis=-1)
    coefficients = jnp.where(keep, coefficients / (1 + gains), 0)
    solution = apply_transpose(whiten, apply(eigenvectors, coefficients))
    logdet = noise.logdet() + jnp.log1p(gains).sum(-1)
    # A hidden value has a gain of zero: nothing is lost with it, and so it does not count.
    rounding = m * jnp.finfo(gains.dtype).eps * jnp.abs(eigenvalues).max(-1, keepdims=True)
    return DenseSolveResult(solution, logdet, left_out, (eigenvalues < -rounding).sum(-1))


class FactoredSolveResult(NamedTuple):
    """What :func:`factored_solve` found, per event.

    - **solution** - with shape ``(*extra, *batch, m)``.
    - **logdet** - of noise plus gain, with shape ``(*extra, *batch)``.
    - **residual** - relative, likewise: what a diagonal that had to be raised has left.
    """

    solution: jax.Array
    logdet: jax.Array
    residual: jax.Array


def factored_solve(gain: jax.Array, noise: Covariance, residual: jax.Array) -> FactoredSolveResult:
    r"""Solve :math:`(N + G) x = r` by one Cholesky factor for each matrix.

    With little noise a smooth prior's matrix is singular to rounding at high noise levels, where
    nothing rests on the digits lost: its diagonal then gets the least that rounding asks for.

    Args:
        gain: with shape ``(*batch, m, m)``.
        noise: regular covariance of size ``m``.
        residual: with shape ``(*extra, *batch, m)``; leading axes share a factor.
    """

    def solve(gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _cholesky_solve(gain + noise.dense(), residual)

    solution, logdet = solve(gain)
    failed = jnp.isnan(logdet)
    trace = jnp.trace(gain, axis1=-2, axis2=-1) + noise.trace()
    jitter = jnp.where(failed, jnp.finfo(gain.dtype).eps * trace, 0)
    identity = jnp.eye(gain.shape[-1], dtype=gain.dtype)
    # The condition is on solutions: where it returned the factors, it would copy them.
    solution, logdet = jax.lax.cond(
        failed.any(),
        lambda: solve(gain + jitter[..., None, None] * identity),
        lambda: (solution, logdet),
    )
    # What the jitter leaves is all there is, but for rounding.
    norm, error = (jnp.linalg.norm(v, axis=-1) for v in (residual, solution))
    left = jitter * error / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    return FactoredSolveResult(solution, jnp.broadcast_to(logdet, left.shape), left)


def sandwich(cov: Covariance, operator: jax.Array) -> jax.Array:
    """Return A V A^T, without matrix products where A is diagonal: a mask, say."""
    if operator.shape[-2] != operator.shape[-1]:
        return cov.sandwich(operator)
    return _where_diagonal(operator, cov.dense(), lambda: cov.sandwich(operator))


def sandwich_square(cov: Covariance, operator: jax.Array) -> jax.Array:
    """Return A V V A^T, without products for each matrix where A is diagonal."""

    def product() -> jax.Array:
        rows = jax.vmap(cov.matvec, in_axes=-2, out_axes=-2)(operator)
        return _gram(rows)

    if operator.shape[-2] != operator.shape[-1]:
        return product()
    return _where_diagonal(operator, _gram(cov.dense()), product)


def _where_diagonal(
    operator: jax.Array, matrix: jax.Array, otherwise: Callable[[], jax.Array]
) -> jax.Array:
    """Return A M A^T for a diagonal A by its diagonal, and what else there is for another."""
    diagonal = jnp.diagonal(operator, axis1=-2, axis2=-1)
    off_diagonal = ~jnp.eye(operator.shape[-1], dtype=bool)
    return jax.lax.cond(
        (operator * off_diagonal).any(),
        otherwise,
        lambda: diagonal[..., :, None] * matrix * diagonal[..., None, :],
    )


def _gram(rows: jax.Array) -> jax.Array:
    return matmul(rows, rows.mT)


def _cholesky_solve(matrix: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solve, and return the log-determinant; leading axes that only ``b`` has share a factor."""

    def solve(matrix: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
        return jax.scipy.linalg.cho_solve((factor, True), columns), logdet

    extra = b.shape[: b.ndim - matrix.ndim + 1]
    columns = jnp.moveaxis(b.reshape(-1, *b.shape[len(extra) :]), 0, -1)
    matrix = jnp.broadcast_to(matrix, (*columns.shape[:-2], *matrix.shape[-2:]))
    solution, logdet = by_matrix(solve, matrix, columns)
    return jnp.moveaxis(solution, -1, 0).reshape(b.shape), logdet


def _select(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(condition[..., None], a, b)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(-1)


def _norm(v: jax.Array) -> jax.Array:
    """Return the norm, also where its square is too large or too small for a number."""
    largest = jnp.abs(v).max(-1)
    scaled = v / jnp.where(largest == 0, 1, largest)[..., None]
    return largest * jnp.sqrt(_dot(scaled, scaled))
