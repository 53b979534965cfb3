r"""Structured covariances.

A :class:`Covariance` acts on the last axis of its vectors, which have shape ``(*batch, size)``.
Its parameters may have leading axes, which broadcast against ``batch``; so may the scalar
arguments (``variance``, ``c``), with shape ``()`` or ``(*batch,)``. Each class is closed under
the two operations that involve a noise variance :math:`v`:

.. math:: \mathrm{noisy}: \Sigma + v I, \qquad
    \mathrm{conditional}: (\Sigma^{-1} + I / v)^{-1}.

For a singular covariance, ``solve`` and ``logdet`` return infinities or NaN; ``noisy``,
``conditional`` and ``sqrt_matvec`` remain valid.
"""

# ruff: noqa: D102 - the methods are documented where they are declared, in Covariance

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
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

__all__ = [
    "Blocks",
    "Covariance",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Isotropic",
    "Repeated",
    "Update",
    "parallel",
]


class Update(NamedTuple):
    r"""The Gaussian update of a covariance by a diagonal precision, see `Covariance.update`.

    Attributes:
        solve: Maps :math:`s`, zero where the precision is, with shape ``(*extra, *batch, size)``,
            to the solution of :math:`(I + \Lambda \Sigma) b = s` and to :math:`\Sigma b`.
        logdet: :math:`\log \det (I + \Lambda \Sigma)`, with shape ``(*batch,)``.
    """

    solve: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    logdet: jax.Array


class Covariance(ABC):
    r"""A symmetric positive semi-definite matrix :math:`\Sigma`."""

    if TYPE_CHECKING:  # read-only: a field of `Isotropic`, a property of the other classes

        @property
        def size(self) -> int:
            """Dimension of the vectors."""

    @property
    def has_dense_update(self) -> bool:
        """Whether `update` takes matrices of the covariance's size."""
        return True

    def check(self, name: str) -> None:
        """Raise a `ValueError` of ``name`` if known parameters are not those of a covariance."""
        with jax.ensure_compile_time_eval():  # known parameters inside of a traced function, too
            variances = np.asarray(self.diagonal())
        if (variances < 0).any():
            raise ValueError(
                f"{name}: expected variances >= 0, got a covariance that has negative variances, "
                f"the smallest {float(variances.min()):.3g}."
            )

    @abstractmethod
    def matvec(self, v: jax.Array) -> jax.Array:
        r"""Return :math:`\Sigma v`, with shape ``(*batch, size)``."""

    @abstractmethod
    def solve(self, v: jax.Array) -> jax.Array:
        r"""Return :math:`\Sigma^{-1} v`, with shape ``(*batch, size)``."""

    @abstractmethod
    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        r"""Return :math:`L z`, where :math:`L` is square and :math:`L L^T = \Sigma`."""

    def whiten(self, v: jax.Array) -> jax.Array:
        r"""Return :math:`L^{-1} v`, for the :math:`L` that `sqrt_matvec` multiplies by."""
        v = v.astype(jnp.result_type(v, self.diagonal()))
        return jax.linear_transpose(self.sqrt_matvec, v)(self.solve(v))[0]

    @abstractmethod
    def logdet(self) -> jax.Array:
        r"""Return :math:`\log \det \Sigma`, with shape ``(*batch,)``."""

    @abstractmethod
    def diagonal(self) -> jax.Array:
        """Return the variances, with shape ``(*batch, size)``."""

    @abstractmethod
    def max_eigenvalue(self) -> jax.Array:
        """Return the largest eigenvalue or an upper bound, with shape ``(*batch,)``."""

    @abstractmethod
    def scale(self, c: ArrayLike) -> Self:
        r"""Return :math:`c \Sigma` for :math:`c \ge 0`."""

    @abstractmethod
    def noisy(self, variance: ArrayLike) -> Self:
        r"""Return :math:`\Sigma + v I`, the covariance of :math:`x_t` at noise variance v."""

    @abstractmethod
    def conditional(self, variance: ArrayLike) -> Self:
        r"""Return :math:`(\Sigma^{-1} + I / v)^{-1}`, the covariance of x given :math:`x_t`."""

    def update(self, precision: jax.Array, square: ArrayLike | None = None) -> Update:
        r"""Factor :math:`I + \Lambda \Sigma` for a diagonal :math:`\Lambda`.

        The posterior of :math:`x \sim \mathcal{N}(0, \Sigma)` given a likelihood with score
        :math:`s` and precision :math:`\Lambda` at zero has mean :math:`\Sigma b`, where
        :math:`(I + \Lambda \Sigma) b = s`.

        Args:
            precision: The diagonal of :math:`\Lambda`, not negative, with shape
                ``(*batch, size)``.
            square: :math:`c \ge 0`, if :math:`\Sigma + c \Sigma^2` takes the place of
                :math:`\Sigma`, with shape ``()`` or ``(*batch,)``.
        """
        # Symmetric: b = R (I + R S R)^{-1} R^{-1} s, with R the square root of the precision.
        root = jnp.sqrt(precision)
        inverse_root = jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
        cov = self.dense()
        if square is not None:
            cov = cov + append_axis(append_axis(square)) * matmul(cov, cov)
        matrix = root[..., :, None] * cov * root[..., None, :]
        factor = Factor.of(plus_identity(matrix, raised=True))

        def solve(score: jax.Array) -> tuple[jax.Array, jax.Array]:
            b = root * factor.solve(inverse_root * score)
            return b, apply(cov, b)

        return Update(solve, factor.logdet())

    def leading(self, size: int) -> "Covariance":
        """Return the covariance of the first ``size`` coordinates."""
        return Dense.from_matrix(self.dense()[..., :size, :size])

    def trace(self) -> jax.Array:
        """Return the total variance, with shape ``(*batch,)``."""
        return self.diagonal().sum(-1)

    def sandwich(self, matrix: jax.Array) -> jax.Array:
        r"""Return :math:`A \Sigma A^T` for ``matrix`` with shape ``(*batch, m, size)``."""
        rows = jax.vmap(self.matvec, in_axes=-2, out_axes=-2)
        return matmul(rows(matrix), matrix.mT)

    def dense(self) -> jax.Array:
        """Return the matrix, with shape ``(*batch, size, size)``."""
        identity = jnp.eye(self.size, dtype=self.diagonal().dtype)
        return jax.vmap(self.matvec, out_axes=-1)(identity)

    def __add__(self, other: "Covariance") -> "Covariance":
        """Return the sum, structured where the structures allow it and :class:`Dense` otherwise.

        Raises:
            ValueError: If the sizes differ.
        """
        if self.size != other.size:
            raise ValueError(
                f"Expected two covariances of one size, got {self.size} and {other.size}."
            )
        return _add(self, other)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Isotropic(Covariance):
    r""":math:`v I`, with ``variance`` of shape ``(*batch,)``."""

    variance: ArrayLike
    size: int = field(metadata={"static": True})

    @property
    def has_dense_update(self) -> bool:
        return False

    def matvec(self, v: jax.Array) -> jax.Array:
        return append_axis(self.variance) * v

    def solve(self, v: jax.Array) -> jax.Array:
        return v / append_axis(self.variance)

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        return jnp.sqrt(append_axis(self.variance)) * z

    def logdet(self) -> jax.Array:
        return self.size * jnp.log(self.variance)

    def diagonal(self) -> jax.Array:
        return jnp.broadcast_to(append_axis(self.variance), (*jnp.shape(self.variance), self.size))

    def max_eigenvalue(self) -> jax.Array:
        return jnp.asarray(self.variance)

    def scale(self, c: ArrayLike) -> "Isotropic":
        return Isotropic(c * jnp.asarray(self.variance), self.size)

    def noisy(self, variance: ArrayLike) -> "Isotropic":
        return Isotropic(jnp.add(self.variance, variance), self.size)

    def conditional(self, variance: ArrayLike) -> "Isotropic":
        return Isotropic(parallel(self.variance, variance), self.size)

    def leading(self, size: int) -> "Isotropic":
        return Isotropic(self.variance, size)

    def update(self, precision: jax.Array, square: ArrayLike | None = None) -> Update:
        return _update_elementwise(append_axis(self.variance), precision, square)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Diagonal(Covariance):
    """Independent coordinates, with ``variances`` of shape ``(*batch, size)``."""

    variances: jax.Array

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self.variances.shape[-1]

    @property
    def has_dense_update(self) -> bool:
        return False

    def matvec(self, v: jax.Array) -> jax.Array:
        return self.variances * v

    def solve(self, v: jax.Array) -> jax.Array:
        return v / self.variances

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        return jnp.sqrt(self.variances) * z

    def logdet(self) -> jax.Array:
        return jnp.log(self.variances).sum(-1)

    def diagonal(self) -> jax.Array:
        return self.variances

    def max_eigenvalue(self) -> jax.Array:
        return self.variances.max(-1)

    def scale(self, c: ArrayLike) -> "Diagonal":
        return Diagonal(append_axis(c) * self.variances)

    def noisy(self, variance: ArrayLike) -> "Diagonal":
        return Diagonal(self.variances + append_axis(variance))

    def conditional(self, variance: ArrayLike) -> "Diagonal":
        return Diagonal(parallel(self.variances, append_axis(variance)))

    def leading(self, size: int) -> "Diagonal":
        return Diagonal(self.variances[..., :size])

    def update(self, precision: jax.Array, square: ArrayLike | None = None) -> Update:
        return _update_elementwise(self.variances, precision, square)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class DiagonalPlusLowRank(Covariance):
    r""":math:`D + F F^T`: ``diag`` ``(*batch, size)`` and ``factor`` ``(*batch, size, rank)``.

    Everything follows from one small Cholesky factor, :math:`C C^T = I + F^T D^{-1} F` (Woodbury).
    With :math:`G = D^{-1/2} F` the square root is :math:`L = D^{1/2} (I + G (I + C)^{-1} G^T)`.
    """

    diag: jax.Array
    factor: jax.Array

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self.diag.shape[-1]

    @property
    def has_dense_update(self) -> bool:
        return False

    def matvec(self, v: jax.Array) -> jax.Array:
        return self.diag * v + apply(self.factor, apply_transpose(self.factor, v))

    def solve(self, v: jax.Array) -> jax.Array:
        inverse = inverse_lower(_capacitance(self.factor, 1 / self.diag))
        inner = apply(inverse, apply_transpose(self.factor, v / self.diag))
        inner = apply_transpose(inverse, inner)
        return (v - apply(self.factor, inner)) / self.diag

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        # G divides by D: a floor of D relative to the variance keeps C from losing its digits.
        info = jnp.finfo(self.factor.dtype)
        smallest = info.eps**0.5 * jnp.square(self.factor).sum(-1) + info.tiny
        diag = jnp.maximum(self.diag, smallest)
        chol = _capacitance(self.factor, 1 / diag)
        inverse = inverse_lower(chol + jnp.eye(chol.shape[-1], dtype=chol.dtype))
        inner = apply(inverse, apply_transpose(self.factor, z / jnp.sqrt(diag)))
        return jnp.sqrt(diag) * z + apply(self.factor, inner)

    def logdet(self) -> jax.Array:
        chol = _capacitance(self.factor, 1 / self.diag)
        small = 2 * jnp.log(jnp.diagonal(chol, axis1=-2, axis2=-1)).sum(-1)
        return jnp.log(self.diag).sum(-1) + small

    def diagonal(self) -> jax.Array:
        return self.diag + jnp.square(self.factor).sum(-1)

    def max_eigenvalue(self) -> jax.Array:
        """Return max D plus the largest eigenvalue of F^T F: exact if ``diag`` is constant."""
        gram = matmul(self.factor.mT, self.factor)
        return self.diag.max(-1) + by_matrix(jnp.linalg.eigvalsh, gram).max(-1)

    def scale(self, c: ArrayLike) -> "DiagonalPlusLowRank":
        root = jnp.sqrt(append_axis(append_axis(c)))
        return DiagonalPlusLowRank(append_axis(c) * self.diag, root * self.factor)

    def noisy(self, variance: ArrayLike) -> "DiagonalPlusLowRank":
        return DiagonalPlusLowRank(self.diag + append_axis(variance), self.factor)

    def conditional(self, variance: ArrayLike) -> "DiagonalPlusLowRank":
        v = append_axis(variance)
        weights = 1 / (self.diag + v)
        inverse = inverse_lower(_capacitance(self.factor, weights))
        factor = matmul(append_axis(v * weights) * self.factor, inverse.mT)
        return DiagonalPlusLowRank(parallel(self.diag, v), factor)

    def leading(self, size: int) -> "DiagonalPlusLowRank":
        return DiagonalPlusLowRank(self.diag[..., :size], self.factor[..., :size, :])

    def update(self, precision: jax.Array, square: ArrayLike | None = None) -> Update:
        # The matrix is D + F F^T, or D + c D^2 + H B H^T with H = (F, c D F), K = I + c F^T F and
        # B = (K, I; I, 0). With E = 1 + L (D + c D^2), Woodbury's formula gives
        # b = (s - L H y) / E, where y = B H^T b solves (T11, I + T12; I + T12, T22 - K) y =
        # H^T (s / E), T = H^T (L / E) H. K - T22 = I + c F^T ((1 + L D) / E) F and its Schur
        # complement are positive definite, without differences of large numbers.
        diag, factor = self.diag, self.factor
        if square is not None:
            weights = append_axis(square) * diag  # c D
            diag = diag + weights * diag
        gains = 1 + precision * diag
        matrix = _weighted_gram(factor, precision / gains)
        logdet = jnp.log(gains).sum(-1)
        if square is not None:
            identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
            cross = identity + _weighted_gram(factor, weights * precision / gains)
            spread = append_axis(square) * (1 + precision * self.diag) / gains
            second = Factor.of(identity + _weighted_gram(factor, spread))
            half = matmul(second.inverse, cross)
            matrix = matrix + matmul(half.mT, half) - identity
            logdet = logdet + second.logdet()
        first = Factor.of(plus_identity(matrix, raised=True))

        def solve(score: jax.Array) -> tuple[jax.Array, jax.Array]:
            white = score / gains
            image = apply_transpose(factor, white)
            if square is None:
                low_rank = apply(factor, first.solve(image))
            else:
                shared = second.solve(apply_transpose(factor, weights * white))
                y = first.solve(image + apply(cross, shared))
                rest = second.solve(apply(cross, y)) - shared
                low_rank = apply(factor, y) + weights * apply(factor, rest)
            b = (score - precision * low_rank) / gains
            return b, diag * b + low_rank

        return Update(solve, logdet + first.logdet())


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Dense(Covariance):
    r""":math:`Q \Lambda Q^T`: ``eigenvalues`` ``(*batch, size)``, ``eigenvectors`` in columns.

    The methods work in the eigenbasis, so that no noise level needs another factorization.
    """

    eigenvalues: jax.Array
    eigenvectors: jax.Array

    @classmethod
    def from_matrix(cls, matrix: jax.Array) -> "Dense":
        """Decompose the symmetric part of ``matrix``; negative eigenvalues are set to zero.

        Raises:
            ValueError: If ``matrix`` is not square in its last two axes.
        """
        shape = jnp.shape(matrix)
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(f"Expected a matrix of shape (*batch, size, size), got {shape}.")
        eigenvalues, eigenvectors = by_matrix(jnp.linalg.eigh, jnp.asarray(matrix))
        return cls(jnp.maximum(eigenvalues, 0), eigenvectors)

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self.eigenvalues.shape[-1]

    def matvec(self, v: jax.Array) -> jax.Array:
        return apply(self.eigenvectors, self.eigenvalues * apply_transpose(self.eigenvectors, v))

    def solve(self, v: jax.Array) -> jax.Array:
        return apply(self.eigenvectors, apply_transpose(self.eigenvectors, v) / self.eigenvalues)

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        return apply(self.eigenvectors, jnp.sqrt(self.eigenvalues) * z)

    def sandwich(self, matrix: jax.Array) -> jax.Array:
        # The first product is the same at all noise levels: a loop over levels computes it once.
        rotated = matmul(matrix, self.eigenvectors)
        return matmul(rotated * self.eigenvalues[..., None, :], rotated.mT)

    def logdet(self) -> jax.Array:
        return jnp.log(self.eigenvalues).sum(-1)

    def diagonal(self) -> jax.Array:
        return apply(jnp.square(self.eigenvectors), self.eigenvalues)

    def max_eigenvalue(self) -> jax.Array:
        return self.eigenvalues.max(-1)

    def scale(self, c: ArrayLike) -> "Dense":
        return Dense(append_axis(c) * self.eigenvalues, self.eigenvectors)

    def noisy(self, variance: ArrayLike) -> "Dense":
        return Dense(self.eigenvalues + append_axis(variance), self.eigenvectors)

    def conditional(self, variance: ArrayLike) -> "Dense":
        return Dense(parallel(self.eigenvalues, append_axis(variance)), self.eigenvectors)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Blocks(Covariance):
    """Block diagonal: independent groups of coordinates, such as one per observed site."""

    blocks: tuple[Covariance, ...]

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return sum(block.size for block in self.blocks)

    @property
    def has_dense_update(self) -> bool:
        return any(block.has_dense_update for block in self.blocks)

    def check(self, name: str) -> None:
        for block in self.blocks:
            block.check(name)

    def matvec(self, v: jax.Array) -> jax.Array:
        return _join([block.matvec(part) for block, part in self._parts(v)])

    def solve(self, v: jax.Array) -> jax.Array:
        return _join([block.solve(part) for block, part in self._parts(v)])

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        return _join([block.sqrt_matvec(part) for block, part in self._parts(z)])

    def logdet(self) -> jax.Array:
        return reduce(jnp.add, [block.logdet() for block in self.blocks])

    def diagonal(self) -> jax.Array:
        return _join([block.diagonal() for block in self.blocks])

    def max_eigenvalue(self) -> jax.Array:
        return reduce(jnp.maximum, [block.max_eigenvalue() for block in self.blocks])

    def scale(self, c: ArrayLike) -> "Blocks":
        return Blocks(tuple(block.scale(c) for block in self.blocks))

    def noisy(self, variance: ArrayLike) -> "Blocks":
        return Blocks(tuple(block.noisy(variance) for block in self.blocks))

    def conditional(self, variance: ArrayLike) -> "Blocks":
        return Blocks(tuple(block.conditional(variance) for block in self.blocks))

    def update(self, precision: jax.Array, square: ArrayLike | None = None) -> Update:
        updates = [block.update(part, square) for block, part in self._parts(precision)]

        def solve(score: jax.Array) -> tuple[jax.Array, jax.Array]:
            parts = zip(updates, self._parts(score), strict=True)
            b, shift = zip(*[update.solve(part) for update, (_, part) in parts], strict=True)
            return _join(b), _join(shift)

        return Update(solve, reduce(jnp.add, [update.logdet for update in updates]))

    def _parts(self, v: jax.Array) -> list[tuple[Covariance, jax.Array]]:
        ends = [sum(block.size for block in self.blocks[:i]) for i in range(1, len(self.blocks))]
        return list(zip(self.blocks, jnp.split(v, ends, axis=-1), strict=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Repeated(Covariance):
    """Block diagonal with ``num`` blocks of one size, such as the elements of a plate.

    The parameters of ``block`` have leading axes ``(*batch, num)``; blocks that are all equal
    have ``(*batch, 1)`` or no leading axes.
    """

    block: Covariance
    num: int = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self.num * self.block.size

    @property
    def has_dense_update(self) -> bool:
        return self.block.has_dense_update

    def check(self, name: str) -> None:
        self.block.check(name)

    def matvec(self, v: jax.Array) -> jax.Array:
        return self._merge(self.block.matvec(self._split(v)))

    def solve(self, v: jax.Array) -> jax.Array:
        return self._merge(self.block.solve(self._split(v)))

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        return self._merge(self.block.sqrt_matvec(self._split(z)))

    def logdet(self) -> jax.Array:
        return self._spread(self.block.logdet()[..., None])[..., 0].sum(-1)

    def diagonal(self) -> jax.Array:
        return self._merge(self._spread(self.block.diagonal()))

    def max_eigenvalue(self) -> jax.Array:
        return self._spread(self.block.max_eigenvalue()[..., None])[..., 0].max(-1)

    def scale(self, c: ArrayLike) -> "Repeated":
        return Repeated(self.block.scale(append_axis(c)), self.num)

    def noisy(self, variance: ArrayLike) -> "Repeated":
        return Repeated(self.block.noisy(append_axis(variance)), self.num)

    def conditional(self, variance: ArrayLike) -> "Repeated":
        return Repeated(self.block.conditional(append_axis(variance)), self.num)

    def update(self, precision: jax.Array, square: ArrayLike | None = None) -> Update:
        square = None if square is None else append_axis(square)
        update = self.block.update(self._split(precision), square)

        def solve(score: jax.Array) -> tuple[jax.Array, jax.Array]:
            b, shift = update.solve(self._split(score))
            return self._merge(b), self._merge(shift)

        return Update(solve, update.logdet.sum(-1))

    def _split(self, v: jax.Array) -> jax.Array:
        return v.reshape(*v.shape[:-1], self.num, self.block.size)

    def _merge(self, parts: jax.Array) -> jax.Array:
        return parts.reshape(*parts.shape[:-2], self.size)

    def _spread(self, parameter: jax.Array) -> jax.Array:
        """Broadcast a parameter over the axis of the blocks."""
        lead = parameter.shape[:-2]
        return jnp.broadcast_to(parameter, (*lead, self.num, parameter.shape[-1]))


def _add(a: Covariance, b: Covariance) -> Covariance:
    match a, b:
        case _, Isotropic():
            return a.noisy(b.variance)
        case Diagonal(), Diagonal():
            return Diagonal(a.variances + b.variances)
        case DiagonalPlusLowRank(), Diagonal():
            return DiagonalPlusLowRank(a.diag + b.variances, a.factor)
        case DiagonalPlusLowRank(), DiagonalPlusLowRank():
            columns = _join([a.factor, b.factor])
            return DiagonalPlusLowRank(a.diag + b.diag, columns)
        case Blocks(), Diagonal():
            return Blocks(tuple(block + Diagonal(part) for block, part in a._parts(b.variances)))
        case Blocks(), Blocks() if [x.size for x in a.blocks] == [x.size for x in b.blocks]:
            return Blocks(tuple(x + y for x, y in zip(a.blocks, b.blocks, strict=True)))
        case Repeated(), Diagonal():
            return Repeated(a.block + Diagonal(a._split(b.variances)), a.num)
        case Repeated(), Repeated() if a.num == b.num:
            return Repeated(a.block + b.block, a.num)
        case (Isotropic(), _) | (Diagonal(), DiagonalPlusLowRank() | Blocks() | Repeated()):
            return _add(b, a)
        case _:
            return Dense.from_matrix(a.dense() + b.dense())


def parallel(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Return a b / (a + b), without the product, which may overflow or underflow."""
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    return low / (1 + low / high)


def _update_elementwise(
    variances: jax.Array, precision: jax.Array, square: ArrayLike | None
) -> Update:
    if square is not None:
        variances = variances + append_axis(square) * jnp.square(variances)
    gains = 1 + precision * variances

    def solve(score: jax.Array) -> tuple[jax.Array, jax.Array]:
        b = score / gains
        return b, variances * b

    return Update(solve, jnp.log(gains).sum(-1))


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    # Parts may have different leading axes: those of their parameters.
    batch = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    parts = [jnp.broadcast_to(part, (*batch, part.shape[-1])) for part in parts]
    return jnp.concatenate(parts, axis=-1)


def _capacitance(factor: jax.Array, weights: jax.Array) -> jax.Array:
    r"""Return the Cholesky factor of :math:`I + F^T W F`."""
    return cholesky(plus_identity(_weighted_gram(factor, weights)))


def _weighted_gram(factor: jax.Array, weights: jax.Array) -> jax.Array:
    """Return F^T W F, with shape ``(*batch, rank, rank)``.

    A factor that all events share is multiplied with all weights at once, by products of pairs of
    its columns: no array has the axes of events, elements and factors.
    """
    if factor.ndim > 2 or weights.ndim == 1:
        return matmul(factor.mT, append_axis(weights) * factor)
    size, rank = factor.shape
    rows, columns = np.tril_indices(rank)
    position = np.zeros((rank, rank), int)
    position[rows, columns] = position[columns, rows] = np.arange(len(rows))

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        factor, weights = part
        return total + matmul(weights, factor[:, rows] * factor[:, columns]), None

    total = jnp.zeros((*weights.shape[:-1], len(rows)), jnp.result_type(factor, weights))
    num = size // _GRAM_SIZE  # in parts, which bounds the array of products
    if num > 1:
        end = num * _GRAM_SIZE
        parts = jnp.moveaxis(weights[..., :end].reshape(*weights.shape[:-1], num, -1), -2, 0)
        total, _ = jax.lax.scan(add, total, (factor[:end].reshape(num, -1, rank), parts))
        factor, weights = factor[end:], weights[..., end:]
    return add(total, (factor, weights))[0][..., position]


_GRAM_SIZE = 4096
