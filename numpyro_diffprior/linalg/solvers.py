r"""Solvers for Gaussian updates, which return their residuals or truncations with the solution.

Each event has its own system :math:`(N + A V A^T) x = r`: dense, by a Cholesky factor or, for a
learned :math:`V`, a truncated eigendecomposition; or matrix-free, by conjugate gradients.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712 (conjugate gradients in moment matching posterior sampling).
    Meurant and Tichy, *On computing quadrature-based bounds for the A-norm of the error in
    conjugate gradients*, Numerical Algorithms 62, 2013 (the bound of the error).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.linalg.batched import (
    apply,
    apply_transpose,
    by_matrix,
    cholesky,
    eigh,
    inverse_lower,
    magnitude,
    matmul,
)
from numpyro_diffprior.linalg.covariances import Covariance

__all__ = [
    "TruncatedSolveResult",
    "FactoredSolveResult",
    "ConjugateGradientResult",
    "factored_solve",
    "conjugate_gradient",
    "has_spectrum_above",
    "sandwich",
    "sandwich_square",
    "truncated_solve",
]


class ConjugateGradientResult(NamedTuple):
    r"""The result of conjugate gradients, per event.

    Attributes:
        b: The solution :math:`b`, with shape ``(*batch, size)``.
        shift: The update :math:`\delta = V b`, with shape ``(*batch, size)``.
        residual: :math:`|s - (I + \Lambda V) b| / |s|`, with shape ``(*batch,)``; 0 if s is zero.
            It costs one more product with the precision, which ``jit`` removes if it is unused.
        num_steps: The number of steps taken, with shape ``(*batch,)``.
    """

    b: jax.Array
    shift: jax.Array
    residual: jax.Array
    num_steps: jax.Array


class _State(NamedTuple):
    """The state of conjugate gradients, per event, for the normalized score.

    Attributes:
        b: The solution :math:`b`.
        shift: :math:`V b`.
        rest: What the shift leaves of the score, before the transpose.
        direction: The last direction.
        direction_shift: :math:`V` times the last direction.
        square: The squared norm of the last residual, in the preconditioner's metric.
        radau: A bound of the squared error before the last step, divided by ``square``, the
            squared norm of the residual then.
        length: The length of the last step.
        energy: What all steps took from the squared error.
        active: Whether the event takes further steps.
        num_steps: The number of steps that the event took.
        step: The number of steps of the loop, a scalar.
    """

    b: jax.Array
    shift: jax.Array
    rest: jax.Array
    direction: jax.Array
    direction_shift: jax.Array
    square: jax.Array
    radau: jax.Array
    length: jax.Array
    energy: jax.Array
    active: jax.Array
    num_steps: jax.Array
    step: jax.Array


def conjugate_gradient(
    precision: Callable[[jax.Array], jax.Array],
    solve: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    score: jax.Array,
    *,
    least: jax.Array | float = 1.0,
    transpose: Callable[[jax.Array], jax.Array] | None = None,
    start: tuple[jax.Array, jax.Array] | None = None,
    atol: float,
    max_steps: int | None = None,
) -> ConjugateGradientResult:
    r"""Solve for the Gaussian update of each event by preconditioned conjugate gradients.

    The system is :math:`(V^{-1} + \Lambda) \, \delta = s`. Its solution is :math:`\delta = V b`,
    where :math:`(I + \Lambda V) b = s`. One step takes one product with :math:`\Lambda` and one
    with the preconditioner. This is :math:`V` itself, or :math:`(V^{-1} + \Lambda')^{-1}` with a
    simpler :math:`\Lambda' \le \Lambda`.

    Each event has its own step lengths and stops on its own, so that its result does not depend on
    the other events. The steps minimize the error in the norm of :math:`V^{-1} + \Lambda`, which
    measures it in deviations of the posterior. An event takes one step, and stops when a bound of
    this error is at most ``atol`` (or as large as rounding): that of a Gauss-Radau quadrature
    (Meurant and Tichy), from the lengths of the steps and a lower bound of the eigenvalues of the
    preconditioned system. (From the norm of the residual in the metric of the preconditioner, the
    bound would be much too large where observations are precise.) It is one if neither :math:`V`
    nor :math:`\Lambda` is negative in any direction.

    It also stops before a direction along which :math:`V` or :math:`\Lambda` is negative
    (beyond rounding), because a learned :math:`V` is indefinite or a log-density is not concave.
    If only :math:`\Lambda` is negative along the first direction, the step ignores it,
    :math:`b = s`; a line search should follow. If :math:`V` is not symmetric, as a learned one may
    be, the steps can diverge: an event also stops before a step that would raise the energy
    :math:`\tfrac{1}{2} \delta^T (V^{-1} + \Lambda) \delta - s^T \delta`, which no step does if
    :math:`V` is symmetric. Not differentiable in reverse mode.

    Args:
        precision: The product with :math:`\Lambda`, for each event of ``(*batch, size)``; or, with
            a transpose, that with :math:`R`, where :math:`\Lambda = R^T R`.
        solve: The preconditioner: maps :math:`s` to approximations of :math:`b` and :math:`V b`.
        least: A lower bound of the eigenvalues of the preconditioned system, for all events or
            for each: one for :math:`V` itself, less if :math:`\Lambda'` exceeds :math:`\Lambda`
            in some directions.
        score: :math:`s`, with shape ``(*batch, size)``; or, with a transpose, :math:`u`, where
            :math:`s = R^T u`.
        transpose: The product with :math:`R^T`, or None. With it, residuals are rounded in units
            of the noise; without it, the rounding errors of :math:`s` for precise observations
            also reach directions of which these tell nothing.
        start: Guesses of :math:`b` and :math:`V b`, or None. The steps start from the multiple of
            them that minimizes the error, which takes one product with :math:`\Lambda`. Events
            whose guess is not finite start from zero. For :math:`\Lambda \ge 0` only.
        atol: The error at which an event stops: no linear function of the event is off by more
            than ``atol`` times its posterior deviation, up to rounding.
        max_steps: The maximum number of steps (default: twice the full rank of :math:`\Lambda`).
    """
    s = score if transpose is None else transpose(score)
    if max_steps is None:
        max_steps = 2 * min(s.shape[-1], score.shape[-1])
    # The score is normalized, so that squared norms neither overflow nor underflow.
    norm = _norm(s)
    unit = 1 / jnp.where(norm == 0, 1, norm)[..., None]
    s, score = unit * s, unit * score
    eps = jnp.finfo(s.dtype).eps

    def drop(rest: jax.Array) -> jax.Array:
        return rest if transpose is None else transpose(rest)

    def unfinished(state: _State) -> jax.Array:
        return state.active.any() & (state.step < max_steps)

    def advance(state: _State) -> _State:
        b, shift, rest, p, v_p, square, radau, length, energy, active, num_steps, step = state
        r = drop(rest) - b
        z, v_z = solve(r)
        square_next = _dot(r, v_z)
        momentum = square_next / jnp.where(square == 0, 1, square)
        first = step == 0
        excess = radau - length
        is_known = ~first & (excess > 0)
        divisor = jnp.where(is_known, least * excess + momentum, 1)
        radau = jnp.where(is_known, excess / divisor, 1 / least)
        p = jnp.where(first, z, z + momentum[..., None] * p)
        v_p = jnp.where(first, v_z, v_z + momentum[..., None] * v_p)
        image = precision(v_p)
        # v^T Λ w is the inner product of v and Λ w; or, with a transpose, of R v and R w.
        left, left_shift = (v_p, shift) if transpose is None else (image, score - rest)
        variance = _dot(p, v_p)
        curvature = variance + _dot(left, image)
        tolerance = jnp.maximum(atol / norm, 4 * eps * jnp.sqrt(energy))
        has_variance = active & (variance > 0) & (square_next > 0)
        # The likelihood's part of the curvature may be negative by rounding only.
        is_curved = curvature > variance * (1 - 8 * eps)
        # Zero up to rounding for a symmetric map. The step changes the energy by its length
        # times (skew - square_next / 2).
        skew = (_dot(shift, p) + _dot(left_shift, image) - _dot(s - r, v_p)) / 2
        size = _norm(shift) * _norm(p) + _norm(left_shift) * _norm(image)
        is_left = first | (radau * square_next > tolerance**2)
        falls = skew < square_next / 2 + 8 * eps * size
        advances = has_variance & is_left & (is_curved | first) & falls
        flat = advances & ~is_curved
        length = jnp.where(flat, 1, square_next / jnp.where(advances & ~flat, curvature, 1))
        return _State(
            b=_select(advances, b + length[..., None] * p, b),
            shift=_select(advances, shift + length[..., None] * v_p, shift),
            rest=_select(advances, rest - length[..., None] * image, rest),
            direction=p,
            direction_shift=v_p,
            square=square_next,
            radau=radau,
            length=length,
            energy=energy + jnp.where(advances, length, 0) * square_next,
            active=advances & ~flat,
            num_steps=num_steps + advances,
            step=step + 1,
        )

    zeros, count = jnp.zeros_like(s), jnp.zeros(norm.shape, int)
    b, shift, image, energy = zeros, zeros, jnp.zeros_like(score), jnp.zeros_like(norm)
    if start is not None:
        gradient = s if transpose is None else score
        b, shift, image, energy = _best_multiple(
            precision, gradient, *start, transpose is not None
        )
    first_state = _State(
        b=b,
        shift=shift,
        rest=score - image,
        direction=zeros,
        direction_shift=zeros,
        square=jnp.zeros_like(norm),
        radau=jnp.zeros_like(norm),
        length=jnp.zeros_like(norm),
        energy=energy,
        active=norm > 0,
        num_steps=count,
        step=jnp.zeros((), int),
    )
    last = jax.lax.while_loop(unfinished, advance, first_state)
    error = drop(score - precision(last.shift)) - last.b
    return ConjugateGradientResult(
        b=norm[..., None] * last.b,
        shift=norm[..., None] * last.shift,
        residual=_norm(error),
        num_steps=last.num_steps,
    )


def has_spectrum_above(
    precision: Callable[[jax.Array], jax.Array],
    solve: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    residual: jax.Array,
    bound: float,
    *,
    max_steps: int = 256,
) -> jax.Array:
    r"""Whether the eigenvalues of a preconditioned system are above a bound, per event.

    It is decided by the smallest eigenvalue that so many steps of the Lanczos iteration find: if
    the recurrence of the Gauss-Radau bound breaks down, one of them is below.

    Args:
        precision: See `conjugate_gradient`.
        solve: The preconditioner, see `conjugate_gradient`.
        residual: A vector in general position, with shape ``(*batch, size)``: best is a draw whose
            covariance is the inverse of the preconditioner.
        bound: The bound.
        max_steps: The largest number of steps; they end when the residual is a ten-thousandth.
    """
    zeros, start = jnp.zeros_like(residual), jnp.zeros(residual.shape[:-1], residual.dtype)

    def advance(state: tuple) -> tuple:
        r, p, v_p, square, radau, length, first, is_above, is_active, step = state
        z, v_z = solve(r)
        square_next = _dot(r, v_z)
        momentum = square_next / jnp.where(square > 0, square, 1)
        p, v_p = z + momentum[..., None] * p, v_z + momentum[..., None] * v_p
        image = p + precision(v_p)
        excess = radau - length
        first = jnp.where(step == 0, square_next, first)
        is_active &= square_next > 1e-8 * first
        is_above &= ~is_active | (step == 0) | (excess > 0)
        divisor = jnp.where(step == 0, bound, (bound * excess + momentum) / excess)
        radau = 1 / jnp.where(divisor == 0, 1, divisor)
        curvature = _dot(v_p, image)
        length = square_next / jnp.where(curvature > 0, curvature, 1)
        r = r - length[..., None] * image
        return r, p, v_p, square_next, radau, length, first, is_above, is_active, step + 1

    def unfinished(state: tuple) -> jax.Array:
        *_, is_above, is_active, step = state
        return (is_above & is_active).any() & (step < max_steps)

    true = jnp.ones(start.shape, bool)
    state = residual, zeros, zeros, start, start, start, start, true, true, jnp.zeros((), int)
    *_, is_above, _, _ = jax.lax.while_loop(unfinished, advance, state)
    return is_above


def _best_multiple(
    precision: Callable[[jax.Array], jax.Array],
    score: jax.Array,
    b: jax.Array,
    shift: jax.Array,
    is_factored: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the multiples of ``b`` and ``shift`` that minimize the error, and what they gain.

    Args:
        precision: See `conjugate_gradient`.
        score: See `conjugate_gradient`.
        b: A guess of :math:`b`.
        shift: A guess of :math:`V b`.
        is_factored: Whether ``precision`` is the product with :math:`R`.

    Returns:
        Both multiples, the product of the precision with the latter, and the decrease of the
        squared error; all zero for events whose guess is of no use.
    """
    norm = _norm(b)[..., None]
    b, shift = (v / jnp.where(norm > 0, norm, 1) for v in (b, shift))
    is_finite = (jnp.isfinite(b) & jnp.isfinite(shift)).all(-1)
    b, shift = (_select(is_finite, v, jnp.zeros_like(v)) for v in (b, shift))
    image = precision(shift)
    left = image if is_factored else shift
    gain, variance = _dot(score, left), _dot(b, shift)
    curvature = variance + _dot(left, image)
    is_of_use = (variance > 0) & (curvature > variance * (1 - 8 * jnp.finfo(b.dtype).eps))
    length = jnp.where(is_of_use, gain / jnp.where(is_of_use, curvature, 1), 0)
    b, shift, image = (length[..., None] * v for v in (b, shift, image))
    return b, shift, image, length * gain


class TruncatedSolveResult(NamedTuple):
    """The result of `truncated_solve`, per event.

    Attributes:
        solution: The solution :math:`x`, with shape ``(*batch, m)``.
        logdet: Log-determinant of noise plus positive part of the gain, with shape ``(*batch,)``.
        num_truncated: Number of directions with negative gain, with shape ``(*batch,)``.
    """

    solution: jax.Array
    logdet: jax.Array
    num_truncated: jax.Array


def truncated_solve(
    gain: jax.Array, noise: Covariance, residual: jax.Array
) -> TruncatedSolveResult:
    r"""Solve :math:`(N + G) x = r` in directions of positive gain :math:`G = A V A^T`.

    The symmetric part of :math:`L^{-1} G L^{-T}`, with :math:`N = L L^T`, has eigenvectors
    :math:`u_i` with eigenvalues :math:`\lambda_i`; those with :math:`\lambda_i \le 0` are dropped:

    .. math:: x = L^{-T} \sum_{\lambda_i > 0} u_i \frac{u_i^T L^{-1} r}{1 + \lambda_i}.

    Args:
        gain: :math:`G`, with shape ``(*batch, m, m)``.
        noise: :math:`N`, a nonsingular covariance of size ``m``.
        residual: :math:`r`, with shape ``(*batch, m)``.

    Raises:
        ValueError: If the shapes do not agree.
    """
    m = noise.size
    if gain.shape[-2:] != (m, m) or residual.shape[-1] != m:
        raise ValueError(
            f"Expected a gain of shape (*batch, {m}, {m}) and a residual of shape (*batch, {m}) "
            f"for noise of size {m}, got {gain.shape} and {residual.shape}."
        )
    whiten = inverse_lower(cholesky(noise.dense()))
    whitened = matmul(matmul(whiten, (gain + gain.mT) / 2), whiten.mT)
    eigenvalues, eigenvectors = eigh(whitened)
    keep = eigenvalues > 0
    gains = jnp.where(keep, eigenvalues, 0)
    coefficients = apply_transpose(eigenvectors, apply(whiten, residual))
    coefficients = jnp.where(keep, coefficients / (1 + gains), 0)
    solution = apply_transpose(whiten, apply(eigenvectors, coefficients))
    logdet = noise.logdet() + jnp.log1p(gains).sum(-1)
    # The gain of a masked value is zero up to rounding, which does not count as truncated.
    rounding = m * jnp.finfo(gains.dtype).eps * jnp.abs(eigenvalues).max(-1, keepdims=True)
    return TruncatedSolveResult(solution, logdet, (eigenvalues < -rounding).sum(-1))


class FactoredSolveResult(NamedTuple):
    """The result of `factored_solve`, per event.

    Attributes:
        solution: The solution :math:`x`, with shape ``(*extra, *batch, m)``.
        logdet: Log-determinant of noise plus gain, with shape ``(*extra, *batch)``.
        residual: Relative residual due to a raised diagonal, with shape ``(*extra, *batch)``.
    """

    solution: jax.Array
    logdet: jax.Array
    residual: jax.Array


def factored_solve(gain: jax.Array, noise: Covariance, residual: jax.Array) -> FactoredSolveResult:
    r"""Solve :math:`(N + G) x = r` by one Cholesky factorization of each matrix.

    With precise observations, the matrix of a smooth prior is singular to rounding at high noise
    levels. Its diagonal is then raised by machine epsilon times its trace.

    Args:
        gain: :math:`G`, with shape ``(*batch, m, m)``.
        noise: :math:`N`, a nonsingular covariance of size ``m``.
        residual: :math:`r`, with shape ``(*extra, *batch, m)``; the axes ``extra`` share a factor.
    """

    def solve(gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _cholesky_solve(gain + noise.dense(), residual)

    solution, logdet = solve(gain)
    failed = jnp.isnan(logdet)
    trace = jnp.trace(gain, axis1=-2, axis2=-1) + noise.trace()
    jitter = jnp.where(failed, jnp.finfo(gain.dtype).eps * trace, 0)
    identity = jnp.eye(gain.shape[-1], dtype=gain.dtype)
    # `cond` returns the solutions and not the factors, which it would copy.
    solution, logdet = jax.lax.cond(
        failed.any(),
        lambda: solve(gain + jitter[..., None, None] * identity),
        lambda: (solution, logdet),
    )
    # Up to rounding, the residual is the jitter times the solution.
    norm, error = (jnp.linalg.norm(v, axis=-1) for v in (residual, solution))
    left = jitter * error / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    return FactoredSolveResult(solution, jnp.broadcast_to(logdet, left.shape), left)


def sandwich(cov: Covariance, operator: jax.Array) -> jax.Array:
    """Return A V A^T; elementwise if A is diagonal, as for a mask."""
    if operator.shape[-2] != operator.shape[-1]:
        return cov.sandwich(operator)
    return _where_diagonal(operator, cov.dense(), lambda: cov.sandwich(operator))


def sandwich_square(cov: Covariance, operator: jax.Array) -> jax.Array:
    """Return A V V A^T; elementwise if A is diagonal, see `sandwich`."""

    def product() -> jax.Array:
        rows = jax.vmap(cov.matvec, in_axes=-2, out_axes=-2)(operator)
        return matmul(rows, rows.mT)

    if operator.shape[-2] != operator.shape[-1]:
        return product()
    matrix = cov.dense()
    return _where_diagonal(operator, matmul(matrix, matrix.mT), product)


def _where_diagonal(
    operator: jax.Array, matrix: jax.Array, otherwise: Callable[[], jax.Array]
) -> jax.Array:
    """Return A M A^T elementwise if A is diagonal, else the result of ``otherwise``."""
    diagonal = jnp.diagonal(operator, axis1=-2, axis2=-1)
    off_diagonal = ~jnp.eye(operator.shape[-1], dtype=bool)
    return jax.lax.cond(
        (operator * off_diagonal).any(),
        otherwise,
        lambda: diagonal[..., :, None] * matrix * diagonal[..., None, :],
    )


def _cholesky_solve(matrix: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the solution and the log-determinant; axes that only ``b`` has share a factor."""

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
    """Return the norm, without overflow or underflow of its square."""
    unit = magnitude(v, axis=-1)
    return unit[..., 0] * jnp.sqrt(_dot(v / unit, v / unit))
