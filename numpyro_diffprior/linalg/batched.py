"""Batches of small dense matrices: products in full precision, LAPACK in chunks.

Matrices have shape ``(*batch, rows, columns)`` and vectors ``(*batch, size)``; leading axes
broadcast. Products use full precision, because accelerators round the factors of float32 products
by default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "Factor",
    "append_axis",
    "apply",
    "apply_transpose",
    "by_matrix",
    "cholesky",
    "eigh",
    "einsum",
    "gather",
    "inverse_lower",
    "magnitude",
    "matmul",
    "plus_identity",
    "probe",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Factor:
    r"""The Cholesky factor :math:`L` of :math:`\Sigma` and its inverse, ``(*batch, size, size)``.

    Vectors have shape ``(*extra, *batch, size)``: the axes ``extra`` share a factor.
    """

    lower: jax.Array
    inverse: jax.Array

    @classmethod
    def of(cls, matrix: jax.Array) -> "Factor":
        """Factor positive definite matrices, with shape ``(*batch, size, size)``."""
        lower = cholesky(matrix)
        return cls(lower, inverse_lower(lower))

    def solve(self, v: jax.Array) -> jax.Array:
        r"""Return :math:`\Sigma^{-1} v`."""
        return apply_transpose(self.inverse, apply(self.inverse, v))

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        r"""Return :math:`L z`, which has covariance :math:`\Sigma` for standard normal ``z``."""
        return apply(self.lower, z)

    def logdet(self) -> jax.Array:
        r"""Return :math:`\log \det \Sigma`, with shape ``(*batch,)``."""
        return 2 * jnp.log(jnp.diagonal(self.lower, axis1=-2, axis2=-1)).sum(-1)


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """`jax.numpy.einsum` in full precision."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """`jax.numpy.matmul` in full precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def append_axis(c: ArrayLike) -> jax.Array:
    """Append an axis of length one to scalars ``(*batch,)``, so that they multiply vectors."""
    return jnp.asarray(c)[..., None]


def magnitude(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Return the largest absolute value, or one where all are zero, and keep the axes.

    Squares of numbers divided by it do not overflow, nor do all of them underflow.
    """
    size = jnp.abs(x).max(axis, keepdims=True)
    return jnp.where(size == 0, 1, size)


def probe(size: int, dtype: DTypeLike) -> jax.Array:
    """Return a fixed vector of standard normal numbers, to probe products with a matrix.

    It is a constant of the program, which compiles faster than with a random number generator.
    """
    return jnp.asarray(np.random.default_rng(0).normal(size=size), dtype)


def gather(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """Gather along the first axis, with an index of shape ``(n, *batch)``."""
    index = index.reshape(*index.shape, *(1,) * (leaf.ndim - index.ndim))
    return jnp.take_along_axis(leaf, index, axis=0)


def apply(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """Return the matrix-vector product, with shape ``(*batch, rows)``."""
    return einsum("...ij,...j->...i", matrix, v)


def apply_transpose(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """Return the product of the transpose with a vector, with shape ``(*batch, columns)``."""
    return einsum("...ji,...j->...i", matrix, v)


def cholesky(matrix: jax.Array) -> jax.Array:
    """Return the lower Cholesky factor of positive definite matrices, NaN where they are not.

    Large matrices are factored by blocks, see `inverse_lower`.
    """
    size = matrix.shape[-1]
    if size <= _MAX_FACTORED:
        return by_matrix(partial(jax.lax.linalg.cholesky, symmetrize_input=False), matrix)
    half = size // 2
    first = cholesky(matrix[..., :half, :half])
    below = matmul(matrix[..., half:, :half], inverse_lower(first).mT)
    second = cholesky(matrix[..., half:, half:] - matmul(below, below.mT))
    return _lower_blocks(first, below, second)


def inverse_lower(chol: jax.Array) -> jax.Array:
    """Return the inverse of a lower triangular matrix.

    Products with the inverse broadcast over batch axes, which triangular solves do not. On CPU,
    the triangular solves of jaxlib's LAPACK start threads from 32 rows on, which compete with
    XLA's own and can take a thousand times as long. So the blocks of the diagonal are inverted,
    and joined by products.
    """
    size = chol.shape[-1]
    if size <= _MAX_SOLVED:
        identity = np.eye(size, dtype=chol.dtype)
        invert = partial(jax.scipy.linalg.solve_triangular, b=identity, lower=True)
        return by_matrix(invert, chol)
    half = -(-size // 2)
    first, below, second = (
        chol[..., :half, :half],
        chol[..., half:, :half],
        chol[..., half:, half:],
    )
    if size % 2:  # both blocks get one size
        second = _lower_blocks(
            second,
            jnp.zeros((*chol.shape[:-2], 1, half - 1), chol.dtype),
            jnp.ones((*chol.shape[:-2], 1, 1), chol.dtype),
        )
    inverses = inverse_lower(jnp.stack([first, second]))
    first, second = inverses[0], inverses[1][..., : size - half, : size - half]
    return _lower_blocks(first, -matmul(second, matmul(below, first)), second)


_MAX_FACTORED, _MAX_SOLVED = 128, 16


def _lower_blocks(first: jax.Array, below: jax.Array, second: jax.Array) -> jax.Array:
    """Return the lower triangular matrix of two blocks on the diagonal and one below."""
    above = jnp.zeros((*below.shape[:-2], below.shape[-1], below.shape[-2]), below.dtype)
    rows = [jnp.concatenate([first, above], axis=-1), jnp.concatenate([below, second], axis=-1)]
    return jnp.concatenate(rows, axis=-2)


def plus_identity(matrix: jax.Array, raised: bool = False) -> jax.Array:
    """Return the identity plus a positive semi-definite matrix.

    If ``raised``, the diagonal is raised by the rounding error of the largest eigenvalues, beside
    which the identity may be lost.
    """
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    diagonal = jnp.ones((), matrix.dtype)
    if raised:
        trace = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
        diagonal = jnp.maximum(diagonal, jnp.finfo(matrix.dtype).eps * trace)
    return matrix + diagonal * identity


def by_matrix(f: Callable[..., Any], *operands: jax.Array) -> Any:
    """Apply ``f``, which calls LAPACK for one matrix, to each matrix of a batch.

    On CPU, jaxlib 0.10 spreads a large batch over XLA's threads and blocks one of them until the
    others are done, so that two simultaneous batches deadlock on two cores. This function passes
    the batch in chunks that are too small to be spread, which is no slower. An axis of `jax.vmap`
    becomes a batch axis.

    Args:
        f: A function of one matrix, with shape ``(rows, columns)``, and of further arrays. It must
            not close over traced arrays.
        operands: The matrices and the further arrays, all with the batch shape of the first.
    """
    # Derivatives bypass the custom batching rule, which reverse mode does not support.
    chunked = jax.custom_jvp(partial(_joining_batches, f))
    chunked.defjvp(lambda primals, tangents: jax.jvp(partial(_in_chunks, f), primals, tangents))
    return chunked(*operands)


def _joining_batches(f: Callable[..., Any], *operands: jax.Array) -> Any:
    """Apply a function in chunks; an axis of `jax.vmap` becomes a batch axis."""
    call = jax.custom_batching.custom_vmap(partial(_in_chunks, f))

    @call.def_vmap
    def _(size: int, is_batched: list[bool], *operands: jax.Array) -> tuple[Any, Any]:
        joined = [
            x if batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, batched in zip(operands, is_batched, strict=True)
        ]
        out = _joining_batches(f, *joined)
        return out, jax.tree.map(lambda _: True, out)

    return call(*operands)


def _in_chunks(f: Callable[..., Any], *operands: jax.Array) -> Any:
    *batch_shape, rows, columns = operands[0].shape
    if not batch_shape:
        return f(*operands)

    # jaxlib spreads 2e5 operations or more; a matrix counts for at most 10 times this product.
    chunk = max(1, 20_000 // max(1, rows * columns * min(rows, columns)))
    num = prod(batch_shape)
    flat = [x.reshape(num, *x.shape[len(batch_shape) :]) for x in operands]
    results = jax.lax.platform_dependent(
        *flat,
        cpu=lambda *flat: jax.lax.map(lambda x: f(*x), flat, batch_size=min(chunk, num)),
        default=jax.vmap(f),
    )
    return jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), results)


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return eigenvalues (unsorted) and eigenvectors (columns) of symmetric matrices.

    Sizes one and two have closed forms.
    """
    if matrix.shape[-1] == 1:
        return matrix[..., 0], jnp.ones_like(matrix)
    if matrix.shape[-1] == 2:
        return _eigh_of_two(matrix)

    return tuple(by_matrix(jnp.linalg.eigh, matrix))


def _eigh_of_two(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Diagonalize symmetric 2 x 2 matrices by one rotation."""
    a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
    angle = jnp.arctan2(2 * b, a - c) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    mean, radius = (a + c) / 2, jnp.hypot((a - c) / 2, b)
    eigenvalues = jnp.stack([mean + radius, mean - radius], axis=-1)
    rows = jnp.stack([cos, -sin], axis=-1), jnp.stack([sin, cos], axis=-1)
    return eigenvalues, jnp.stack(rows, axis=-2)
