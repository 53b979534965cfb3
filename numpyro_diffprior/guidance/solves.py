r"""Solvers for the mode of a moment-matched posterior, at one noise level.

For :math:`x \sim \mathcal{N}(\hat x, V)` and a likelihood with score :math:`s` and precision
:math:`\Lambda = A^T \Sigma_y^{-1} A + H` at :math:`\hat x`, the posterior's mode is
:math:`\hat x + V b` with

.. math:: (I + \Lambda V) \, b = s, \quad \text{for } H = 0: \;
    b = A^T (\Sigma_y + A V A^T)^{-1} r.

A `Solve` computes :math:`b` from the matrix :math:`\Sigma_y + A V A^T`, by a Cholesky factor or,
for a learned Jacobian, its eigenvectors; or without the matrix: from the diagonal of
:math:`\Lambda`, if the likelihood is elementwise, from its stationary part, if :math:`V` is
stationary, or by conjugate gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.guidance.covariances import PosteriorOperator
from numpyro_diffprior.guidance.guidance import SolveStats
from numpyro_diffprior.guidance.likelihood import Linearization
from numpyro_diffprior.guidance.look_ahead import (
    DenseLookAhead,
    LookAhead,
    PrecisionLookAhead,
)
from numpyro_diffprior.linalg.batched import apply, apply_transpose, by_matrix, einsum
from numpyro_diffprior.linalg.covariances import Covariance, Diagonal, Isotropic
from numpyro_diffprior.linalg.solvers import (
    conjugate_gradient,
    factored_solve,
    has_spectrum_above,
    sandwich,
    truncated_solve,
)
from numpyro_diffprior.linalg.stationary import (
    Stationary,
    StationaryOperator,
    StationaryPart,
    stationary_part,
)
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank

__all__ = [
    "ConjugateGradients",
    "EigenSolve",
    "ElementwiseSolve",
    "FactoredSolve",
    "Reduction",
    "Solution",
    "Solve",
    "StationarySolve",
]


class Solution(NamedTuple):
    r"""The solution of a moment-matched posterior.

    Attributes:
        b: The gradient of the log-likelihood at the mode, with shape ``(*batch, d)``.
        shift: :math:`V b`, with the same shape.
        logdet: :math:`\log \det (I + \Lambda V)`, with shape ``(*batch,)``; zero where the solve
            is matrix-free.
        stats: The statistics of the solve.
    """

    b: jax.Array
    shift: jax.Array
    logdet: jax.Array
    stats: SolveStats


class Solve(ABC):
    """A method that solves for the mode."""

    @abstractmethod
    def __call__(
        self,
        local: Linearization,
        cov: PosteriorOperator,
        operator: Callable[[], jax.Array],
        guess: jax.Array | None = None,
    ) -> Solution:
        """Solve for the mode.

        Args:
            local: The linearized likelihood.
            cov: The covariance :math:`V`.
            operator: A function that returns :math:`A`, with shape ``(*batch, m, d)``.
            guess: A guess of :math:`V b`, with shape ``(*batch, d)``. Conjugate gradients start
                from it if there is a closed form for :math:`V`, with an inverse, and no potential.
        """

    @property
    def looks_ahead(self) -> bool:
        """Whether `look_ahead` is implemented."""
        return False

    def look_ahead(
        self, local: Linearization, cov: Covariance, sigma: jax.Array, tau: jax.Array
    ) -> LookAhead:
        """Return the distribution of the observations given a step; see `LookAhead`.

        Args:
            local: The likelihood, linear in the events.
            cov: The covariance :math:`V` at the next level.
            sigma: The next level, a scalar.
            tau: The standard deviation of the step, a scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} does not look ahead.")


@dataclass(frozen=True, eq=False)
class Reduction:
    r"""Statistics that are sufficient for a linear likelihood of more values than elements.

    With :math:`\Sigma_y = L L^T` and the factors :math:`L^{-1} A = Q R`, the :math:`d` values
    :math:`Q^T L^{-1} y` have the operator :math:`R` and unit noise. Their likelihood is that of
    :math:`y` up to a factor that does not depend on :math:`x`.

    Attributes:
        matrix: :math:`R`, with shape ``(*batch, d, d)``.
        basis: :math:`Q`, with shape ``(*batch, m, d)``.
    """

    matrix: jax.Array
    basis: jax.Array

    @classmethod
    def of(cls, matrix: jax.Array, noise: Covariance) -> "Reduction":
        r"""Reduce :math:`A`, with shape ``(*batch, m, d)``, and :math:`\Sigma_y`."""
        white = jax.vmap(noise.whiten, in_axes=-1, out_axes=-1)(matrix)
        basis, factor = by_matrix(jnp.linalg.qr, white)
        # Masked values have a zero row, and whatever residual.
        return cls(factor, jnp.where((white != 0).any(-1, keepdims=True), basis, 0))

    def reduce(self, local: Linearization) -> Linearization:
        """Return the likelihood of the statistics."""
        return Linearization(
            residual=apply_transpose(self.basis, local.noise.whiten(local.residual)),
            matvec=lambda v: apply(self.matrix, v),
            transpose=lambda u: apply_transpose(self.matrix, u),
            noise=Isotropic(jnp.ones((), self.matrix.dtype), self.matrix.shape[-1]),
        )


@dataclass(frozen=True, eq=False)
class FactoredSolve(Solve):
    r"""Solve by a Cholesky factor of :math:`\Sigma_y + A V A^T`, with :math:`V` in closed form.

    Args:
        matrix: The operator :math:`A`, with shape ``(*batch, m, d)``, if it is constant.
        reduction: Sufficient statistics in place of the observed values, or None; ``matrix`` is
            then theirs. The twists of an event's particles lack a common factor.
    """

    matrix: jax.Array | None = None
    reduction: Reduction | None = None

    @classmethod
    def of(cls, matrix: jax.Array, noise: Covariance) -> "FactoredSolve":
        """Return a solve for a constant operator, of as few values as possible."""
        if matrix.shape[-2] <= matrix.shape[-1]:
            return cls(matrix)
        reduction = Reduction.of(matrix, noise)
        return cls(reduction.matrix, reduction)

    def __call__(
        self,
        local: Linearization,
        cov: PosteriorOperator,
        operator: Callable[[], jax.Array],
        guess: jax.Array | None = None,
    ) -> Solution:
        assert cov.closed_form is not None
        if self.reduction is not None:
            local = self.reduction.reduce(local)
        gain = sandwich(cov.closed_form, operator() if self.matrix is None else self.matrix)
        w, logdet, residual = factored_solve(gain, local.noise, local.residual)
        b = local.transpose(w)
        return Solution(
            b=b,
            shift=cov.matvec(b),
            logdet=logdet - local.noise.logdet(),
            stats=SolveStats.of(residual),
        )

    @property
    def looks_ahead(self) -> bool:
        return self.matrix is not None

    def look_ahead(
        self, local: Linearization, cov: Covariance, sigma: jax.Array, tau: jax.Array
    ) -> LookAhead:
        assert self.matrix is not None
        if self.reduction is not None:
            local = self.reduction.reduce(local)
        return DenseLookAhead.of(local, cov, self.matrix, sigma, tau)


@dataclass(frozen=True, eq=False)
class ElementwiseSolve(Solve):
    r"""Solve with a diagonal :math:`\Lambda`, for likelihoods that are elementwise.

    Diagonal and low-rank covariances take no matrix of the event's size.

    Args:
        precision: The diagonal of :math:`\Lambda`, with shape ``(*batch, d)``, if it is constant.
    """

    precision: jax.Array | None = None

    def __call__(
        self,
        local: Linearization,
        cov: PosteriorOperator,
        operator: Callable[[], jax.Array],
        guess: jax.Array | None = None,
    ) -> Solution:
        assert cov.closed_form is not None
        score, precision = local.score(), self.precision
        if precision is None:
            precision = local.precision(jnp.ones_like(score))
        update = cov.closed_form.update(precision)
        b, shift = update.solve(score)
        left = jnp.abs(score - b - precision * shift).max(-1)
        largest = jnp.abs(score).max(-1)
        return Solution(
            b=b,
            shift=shift,
            logdet=jnp.broadcast_to(update.logdet, left.shape),
            stats=SolveStats.of(left / jnp.where(largest > 0, largest, 1)),
        )

    @property
    def looks_ahead(self) -> bool:
        return self.precision is not None

    def look_ahead(
        self, local: Linearization, cov: Covariance, sigma: jax.Array, tau: jax.Array
    ) -> LookAhead:
        assert self.precision is not None
        update = partial(cov.update, self.precision)
        return PrecisionLookAhead.of(local, cov, Diagonal(self.precision), update, sigma, tau)


@dataclass(frozen=True)
class EigenSolve(Solve):
    r"""Solve in the eigenbasis of :math:`A V A^T` in units of the noise, for a learned Jacobian.

    It takes one product with :math:`V` per observed value. Directions with negative variance get
    no correction.
    """

    def __call__(
        self,
        local: Linearization,
        cov: PosteriorOperator,
        operator: Callable[[], jax.Array],
        guess: jax.Array | None = None,
    ) -> Solution:
        basis = jnp.eye(local.residual.shape[-1], dtype=local.residual.dtype)

        def row(e: jax.Array) -> jax.Array:
            return cov.matvec(local.transpose(jnp.broadcast_to(e, local.residual.shape)))

        rows = jax.vmap(row)(basis)
        gain = jax.vmap(local.matvec, out_axes=-1)(rows)
        solve = truncated_solve(gain, local.noise, local.residual)
        return Solution(
            b=local.transpose(solve.solution),
            shift=einsum("m...d,...m->...d", rows, solve.solution),
            logdet=solve.logdet - local.noise.logdet(),
            stats=SolveStats.of(jnp.zeros_like(solve.logdet), solve.num_truncated),
        )


@dataclass(frozen=True)
class ConjugateGradients(Solve):
    r"""Solve without matrices: one product with :math:`V`, the preconditioner, per step.

    Args:
        atol: The error at which the steps of an event stop; see `conjugate_gradient`.
        max_steps: The largest number of steps (default: twice the full rank of :math:`\Lambda`).
    """

    atol: float = 0.1
    max_steps: int | None = None

    def __call__(
        self,
        local: Linearization,
        cov: PosteriorOperator,
        operator: Callable[[], jax.Array],
        guess: jax.Array | None = None,
    ) -> Solution:
        return self.solve(local, cov, lambda score: (score, cov.matvec(score)), guess)

    def solve(
        self,
        local: Linearization,
        cov: PosteriorOperator,
        precondition: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
        guess: jax.Array | None,
        least: jax.Array | float = 1.0,
    ) -> Solution:
        """Return the solution, without its log-determinant.

        With a closed form for :math:`V` and a linear mean, the determinant is the same for all
        particles of an event and cancels. Otherwise particle samplers stay exact, since any
        positive function is a valid twist.

        Args:
            local: The linearized likelihood.
            cov: The covariance :math:`V`.
            precondition: The preconditioner; see `conjugate_gradient`.
            guess: A guess of :math:`V b`, or None; see `__call__`.
            least: A lower bound of the eigenvalues of the preconditioned system.
        """
        start = None
        if local.gradient is None:
            precision, transpose = local.white_matvec, local.white_transpose
            score = local.noise.whiten(local.residual)
            if guess is not None and cov.closed_form is not None:
                b = cov.closed_form.solve(guess)
                start = b, cov.matvec(b)
        else:  # log-densities that are not concave take a step from zero
            precision, transpose, score = local.precision, None, local.score()
        result = conjugate_gradient(
            precision,
            precondition,
            score,
            transpose=transpose,
            start=start,
            least=least,
            atol=self.atol,
            max_steps=self.max_steps,
        )
        stats = SolveStats.of(result.residual)
        return Solution(
            b=result.b,
            shift=result.shift,
            logdet=jnp.zeros_like(result.residual),
            stats=stats._replace(num_steps=result.num_steps.astype(result.residual.dtype)),
        )


@dataclass(frozen=True, eq=False)
class StationarySolve(Solve):
    r"""Solve with the stationary part of :math:`\Lambda`, under a stationary :math:`V`.

    If :math:`V` also has factors, particles do not look ahead.

    Conjugate gradients are preconditioned by :math:`(V^{-1} + \Lambda')^{-1}`, where the
    stationary :math:`\Lambda'` hardly exceeds :math:`\Lambda` in any direction
    (`StationaryPart.lower`). If :math:`\Lambda` is stationary, as for masked Fourier transforms
    and periodic convolutions, this is the solution; if little of it is, as for masked pixels, it
    is :math:`V`.

    Where :math:`\Lambda'` exceeds :math:`\Lambda` by more, as for convolutions of which a part
    of the values is hidden, it is zero.

    Args:
        part: The stationary part of :math:`\Lambda`, of a linear likelihood.
        iterations: Conjugate gradients.
        least: A lower bound of the eigenvalues of the preconditioned system, with shape
            ``(*batch,)``.
        looks_ahead: Whether `look_ahead` is implemented.
    """

    part: StationaryPart
    iterations: ConjugateGradients
    least: jax.Array
    looks_ahead: bool = True

    @classmethod
    def of(
        cls,
        local: Linearization,
        cov: Stationary | StationaryPlusLowRank,
        iterations: ConjugateGradients,
    ) -> "StationarySolve":
        """Return the solver for a linear likelihood.

        Args:
            local: The likelihood.
            cov: The largest :math:`V`, that of the highest noise level: there, eigenvalues of the
                preconditioned system are smallest.
            iterations: Conjugate gradients.
        """
        score = local.score()

        def precision(v: jax.Array) -> jax.Array:
            return local.precision(jnp.broadcast_to(v, score.shape))

        part = stationary_part(precision, cov.grid, cov.num_channels, score.dtype)
        lower = part.lower
        # A draw whose covariance is that of the preconditioner's inverse.
        z = jax.random.normal(jax.random.key(0), (2, *score.shape), score.dtype)
        residual = cov.solve(cov.sqrt_matvec(z[0])) + lower.sqrt_matvec(z[1])
        solve = cov.update_stationary(lower).solve
        event_axes = tuple(range(-2 - len(cov.grid), 0))
        is_kept = (lower.blocks != 0).any(event_axes)
        residual = jnp.where(is_kept[..., None], residual, 0)
        is_kept &= has_spectrum_above(precision, solve, residual, _LEAST + 0.1)
        blocks = jnp.where(jnp.expand_dims(is_kept, event_axes), lower.blocks, 0)
        return cls(
            part._replace(lower=StationaryOperator(blocks, lower.grid)),
            iterations,
            jnp.where(is_kept, _LEAST, 1.0),
            looks_ahead=isinstance(cov, Stationary),
        )

    def __call__(
        self,
        local: Linearization,
        cov: PosteriorOperator,
        operator: Callable[[], jax.Array],
        guess: jax.Array | None = None,
    ) -> Solution:
        assert isinstance(cov.closed_form, Stationary | StationaryPlusLowRank)
        update = cov.closed_form.update_stationary(self.part.lower)
        return self.iterations.solve(local, cov, update.solve, guess, self.least)

    def look_ahead(
        self, local: Linearization, cov: Covariance, sigma: jax.Array, tau: jax.Array
    ) -> LookAhead:
        assert isinstance(cov, Stationary)
        update = partial(cov.update_stationary, self.part.mean)
        return PrecisionLookAhead.of(local, cov, self.part.mean, update, sigma, tau)


_LEAST = 0.5  # the least eigenvalue with which a stationary part preconditions
