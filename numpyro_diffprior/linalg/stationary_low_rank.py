r"""Stationary covariances plus factors: fields of full rank that also have preferred places.

References:
    Woodbury, *Inverting modified matrices*, Princeton University, 1950.
"""

# ruff: noqa: D102 - the methods are documented where they are declared, in Covariance

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffprior.linalg.batched import (
    Factor,
    append_axis,
    apply,
    apply_transpose,
    by_matrix,
    cholesky,
    inverse_lower,
    matmul,
    plus_identity,
)
from numpyro_diffprior.linalg.covariances import Covariance, Update
from numpyro_diffprior.linalg.stationary import Stationary, StationaryOperator

__all__ = ["StationaryPlusLowRank"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class StationaryPlusLowRank(Covariance):
    r""":math:`S + F F^T`, with a stationary :math:`S` and ``factor`` ``(*batch, size, rank)``.

    The factors tell what depends on the place (a bright center, a dark border), :math:`S` the
    detail everywhere. Operations take Fourier transforms of the factors, and one small Cholesky
    factor, :math:`C C^T = I + F^T S^{-1} F` (Woodbury). With :math:`G = S^{-1/2} F` the square
    root is :math:`L = S^{1/2} (I + G (I + C)^{-1} G^T)`.
    """

    stationary: Stationary
    factor: jax.Array

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self.stationary.size

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the grid."""
        return self.stationary.grid

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return self.stationary.num_channels

    def check(self, name: str) -> None:
        self.stationary.check(name)
        if self.factor.shape[-2] != self.size:
            raise ValueError(
                f"{name}: expected factors of {self.size} elements, got an array of shape "
                f"{self.factor.shape}."
            )

    def matvec(self, v: jax.Array) -> jax.Array:
        return self.stationary.matvec(v) + apply(self.factor, apply_transpose(self.factor, v))

    def solve(self, v: jax.Array) -> jax.Array:
        columns = _map(self.stationary.solve, self.factor)  # S^{-1} F
        inverse = inverse_lower(_capacitance(matmul(self.factor.mT, columns)))
        inner = apply(inverse, apply_transpose(columns, v))
        inner = apply_transpose(inverse, inner)
        return self.stationary.solve(v) - apply(columns, inner)

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        # G divides by S: a floor of its power relative to the factors' keeps the digits of C.
        info = jnp.finfo(self.factor.dtype)
        waves = _map(self.stationary.waves, self.factor)
        smallest = info.eps**0.5 * jnp.square(jnp.abs(waves)).sum(-1) + info.tiny
        power = jnp.maximum(self.stationary.eigenvalues, smallest)
        floored = Stationary(power, self.stationary.rotation, self.grid)
        white = _map(lambda v: floored.filter(jax.lax.rsqrt(power), v), self.factor)  # G
        chol = _capacitance(matmul(white.mT, white))
        inverse = inverse_lower(chol + jnp.eye(chol.shape[-1], dtype=chol.dtype))
        return floored.sqrt_matvec(z) + apply(
            self.factor, apply(inverse, apply_transpose(white, z))
        )

    def logdet(self) -> jax.Array:
        columns = _map(self.stationary.solve, self.factor)
        chol = _capacitance(matmul(self.factor.mT, columns))
        small = 2 * jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)).sum(-1)
        return self.stationary.logdet() + small

    def diagonal(self) -> jax.Array:
        return self.stationary.diagonal() + jnp.square(self.factor).sum(-1)

    def max_eigenvalue(self) -> jax.Array:
        """Return the sum of the largest eigenvalues of both parts, an upper bound."""
        gram = matmul(self.factor.mT, self.factor)
        largest = by_matrix(jnp.linalg.eigvalsh, gram).max(-1)
        return self.stationary.max_eigenvalue() + largest

    def scale(self, c: ArrayLike) -> "StationaryPlusLowRank":
        root = jnp.sqrt(append_axis(append_axis(c)))
        return StationaryPlusLowRank(self.stationary.scale(c), root * self.factor)

    def noisy(self, variance: ArrayLike) -> "StationaryPlusLowRank":
        return StationaryPlusLowRank(self.stationary.noisy(variance), self.factor)

    def conditional(self, variance: ArrayLike) -> "StationaryPlusLowRank":
        # v (S + v I)^{-1} F, with the Cholesky factor of I + F^T (S + v I)^{-1} F.
        noisy = self.stationary.noisy(variance)
        columns = _map(noisy.solve, self.factor)
        inverse = inverse_lower(_capacitance(matmul(self.factor.mT, columns)))
        factor = append_axis(append_axis(variance)) * matmul(columns, inverse.mT)
        return StationaryPlusLowRank(self.stationary.conditional(variance), factor)

    def update_stationary(self, precision: StationaryOperator) -> Update:
        r"""Return the Gaussian update by a stationary precision; see `Covariance.update`.

        With :math:`P = (I + \Lambda S)^{-1}`, the solution is
        :math:`b = P (s - \Lambda F y)`, where :math:`y = F^T b` solves
        :math:`(I + F^T P \Lambda F) y = F^T P s`.

        Args:
            precision: :math:`\Lambda`.
        """
        update = self.stationary.update_stationary(precision)
        images = jnp.moveaxis(_map(precision.matvec, self.factor), -1, 0)
        columns, shifts = (jnp.moveaxis(a, 0, -1) for a in update.solve(images))
        system = Factor.of(plus_identity(matmul(self.factor.mT, columns), raised=True))

        def solve(s: jax.Array) -> tuple[jax.Array, jax.Array]:
            b, shift = update.solve(s)
            y = system.solve(apply_transpose(self.factor, b))
            return (
                b - apply(columns, y),
                shift - apply(shifts, y) + apply(self.factor, y),
            )

        return Update(solve, update.logdet + system.logdet())


def _map(function: Callable[[jax.Array], jax.Array], factor: jax.Array) -> jax.Array:
    """Apply a function of vectors to the columns of a factor."""
    return jax.vmap(function, in_axes=-1, out_axes=-1)(factor)


def _capacitance(gram: jax.Array) -> jax.Array:
    """Return the Cholesky factor of the identity plus a Gram matrix."""
    return cholesky(plus_identity(gram, raised=True))
