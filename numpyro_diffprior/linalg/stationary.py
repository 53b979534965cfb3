r"""Stationary covariances of fields on a periodic grid, diagonal in the Fourier basis.

References:
    Chan, *An optimal circulant preconditioner for Toeplitz systems*, SIAM J. Sci. Stat. Comput. 9,
    1988 (the stationary part of an operator).
"""

# ruff: noqa: D102 - the methods are documented where they are declared, in Covariance

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from numpyro_diffprior.linalg.batched import (
    append_axis,
    apply,
    by_matrix,
    einsum,
    magnitude,
    matmul,
    probe,
)
from numpyro_diffprior.linalg.covariances import Covariance, Update, parallel

__all__ = [
    "Stationary",
    "StationaryOperator",
    "StationaryPart",
    "extend_stationary",
    "stationary_part",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Stationary(Covariance):
    r"""A field with channels on a periodic grid: :math:`(F \otimes Q)^* \Lambda (F \otimes Q)`.

    The covariance of two grid points depends on their difference only, so that the unitary
    discrete Fourier transform :math:`F` over the axes of the grid diagonalizes it. One rotation
    :math:`Q` of the channels is shared by all frequencies. An operation takes
    :math:`O(d \log d)`, at full rank.

    Args:
        eigenvalues: The power of each frequency, in the order of `jax.numpy.fft.fftn`, and rotated
            channel, with shape ``(*batch, size)``. Opposite frequencies have the same power.
        rotation: :math:`Q`, orthogonal, with shape ``(*batch, channels, channels)``.
        grid: The shape of the grid: vectors are flattened arrays ``(*grid, channels)``.
    """

    eigenvalues: jax.Array
    rotation: jax.Array
    grid: tuple[int, ...] = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return self.eigenvalues.shape[-1]

    def matvec(self, v: jax.Array) -> jax.Array:
        return self.filter(self.eigenvalues, v)

    def solve(self, v: jax.Array) -> jax.Array:
        return self.filter(1 / self.eigenvalues, v)

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        return self.filter(jnp.sqrt(self.eigenvalues), z)

    def logdet(self) -> jax.Array:
        return jnp.log(self.eigenvalues).sum(-1)

    def diagonal(self) -> jax.Array:
        power = self.eigenvalues.reshape(*self.eigenvalues.shape[:-1], -1, self.num_channels)
        variances = apply(jnp.square(self.rotation), power.mean(-2))
        variances = jnp.broadcast_to(variances[..., None, :], power.shape)
        return variances.reshape(self.eigenvalues.shape)

    def max_eigenvalue(self) -> jax.Array:
        return self.eigenvalues.max(-1)

    def scale(self, c: ArrayLike) -> "Stationary":
        return self._with(append_axis(c) * self.eigenvalues)

    def noisy(self, variance: ArrayLike) -> "Stationary":
        return self._with(self.eigenvalues + append_axis(variance))

    def conditional(self, variance: ArrayLike) -> "Stationary":
        return self._with(parallel(self.eigenvalues, append_axis(variance)))

    def check(self, name: str) -> None:
        if prod(self.grid) * self.num_channels != self.size:
            raise ValueError(
                f"{name}: expected a power for each frequency of the grid {self.grid} and each of "
                f"{self.num_channels} channels, got {self.size} eigenvalues."
            )
        power = np.asarray(self.eigenvalues, np.float64)
        if (power < 0).any():
            raise ValueError(
                f"{name}: expected power >= 0 of a stationary covariance, got {power.min():.3g}."
            )
        power = power.reshape(*power.shape[:-1], *self.grid, self.num_channels)
        axes = tuple(range(-1 - len(self.grid), -1))
        opposite = np.roll(np.flip(power, axes), 1, axes)
        if not np.allclose(power, opposite, rtol=1e-3, atol=1e-6 * power.max(), equal_nan=True):
            raise ValueError(
                f"{name}: expected equal power of opposite frequencies, since fields are real, "
                f"got powers that differ by {np.abs(power - opposite).max():.3g}; take their mean."
            )

    def __add__(self, other: Covariance) -> Covariance:
        # More channels may have other rotations, which are unknown while a program is compiled.
        if isinstance(other, Stationary) and self.grid == other.grid and self.num_channels == 1:
            return self._with(self.eigenvalues + other.eigenvalues)
        return super().__add__(other)

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return self.rotation.shape[-1]

    def waves(self, v: jax.Array) -> jax.Array:
        """Return the coefficients of fields in the eigenbasis, with shape ``(*batch, size)``."""
        waves = jnp.fft.fftn(self._rotate(v), axes=self._axes, norm="ortho")
        return waves.reshape(*waves.shape[: self._axes[0]], self.size)

    def equalize(self, z: jax.Array) -> jax.Array:
        """Return fields of the same phases, all of whose coefficients have a modulus of one."""
        return self.filter(1 / jnp.maximum(jnp.abs(self.waves(z)), 1e-6), z)

    def filter(self, gain: jax.Array, v: jax.Array) -> jax.Array:
        """Multiply by the matrix of the same eigenvectors with other eigenvalues, ``gain``.

        Opposite frequencies must have the same gain.
        """
        gain = gain.reshape(*gain.shape[:-1], *self.grid, self.num_channels)[..., self._half, :]
        return self._from_waves(gain * self._to_waves(v.astype(jnp.result_type(v, gain))))

    def update_stationary(
        self, precision: "StationaryOperator", square: ArrayLike | None = None
    ) -> Update:
        r"""Return the Gaussian update by a stationary precision; see `Covariance.update`.

        Args:
            precision: :math:`\Lambda`.
            square: If given, :math:`c`: the update is that of :math:`\Sigma + c \Sigma^2`.
        """
        power = self.eigenvalues
        if square is not None:
            power = power * (1 + append_axis(square) * power)
        root = jnp.sqrt(power)
        root = root.reshape(*root.shape[:-1], *self.grid, self.num_channels)[..., self._half, :]
        rotation = self.rotation
        blocks = einsum("...ai,...ab,...bj->...ij", rotation, precision.blocks, rotation)
        system = root[..., :, None] * blocks * root[..., None, :]
        inverse, logdet = _inverse(system + jnp.eye(self.num_channels, dtype=system.dtype))

        def solve(s: jax.Array) -> tuple[jax.Array, jax.Array]:
            waves = self._to_waves(s)
            white = _apply(inverse, root * waves)
            b = jnp.where(root > 0, white / jnp.where(root > 0, root, 1), waves)
            return self._from_waves(b), self._from_waves(root * white)

        # Most frequencies of the half stand for two.
        column = np.arange(self.grid[-1] // 2 + 1)
        twice = np.where((column == 0) | (2 * column == self.grid[-1]), 1, 2)
        axes = tuple(range(-len(self.grid), 0))
        return Update(solve, (logdet * twice).sum(axes))

    @property
    def _half(self) -> slice:
        """The part of the last axis of the grid that tells the spectrum of real fields."""
        return slice(self.grid[-1] // 2 + 1)

    def _with(self, eigenvalues: jax.Array) -> "Stationary":
        return Stationary(eigenvalues, self.rotation, self.grid)

    def _to_waves(self, v: jax.Array) -> jax.Array:
        """Return the rotated channels of real fields in the Fourier basis."""
        return jnp.fft.rfftn(self._rotate(v), axes=self._axes)

    def _from_waves(self, waves: jax.Array) -> jax.Array:
        """Undo `_to_waves`."""
        fields = jnp.fft.irfftn(waves, s=self.grid, axes=self._axes)
        rotated = fields.reshape(*fields.shape[: self._axes[0]], -1, self.num_channels)
        product = matmul(rotated, self.rotation.mT)
        return product.reshape(*product.shape[:-2], self.size)

    @property
    def _axes(self) -> tuple[int, ...]:
        """The axes of the grid in arrays ``(*batch, *grid, channels)``."""
        return tuple(range(-1 - len(self.grid), -1))

    def _rotate(self, v: jax.Array) -> jax.Array:
        """Return fields with rotated channels, with shape ``(*batch, *grid, channels)``."""
        rotated = matmul(v.reshape(*v.shape[:-1], -1, self.num_channels), self.rotation)
        return rotated.reshape(*rotated.shape[:-2], *self.grid, self.num_channels)


def extend_stationary(
    cov: Covariance, window: tuple[int, ...], grid: tuple[int, ...]
) -> Stationary:
    r"""Return a covariance of fields on a periodic grid, from that of smaller windows of them.

    The channels are rotated to those of their covariance, and the autocovariance is that of the
    window :math:`W`, summed over pairs of its :math:`n` points and tapered by their number:

    .. math:: S(f) = \frac{1}{n} \sum_{p, q \in W} \Sigma_{pq} \, e^{-2 \pi i f (p - q)} \ge 0

    The power is not negative, nor larger than the largest eigenvalue of the window's covariance;
    the mean variance of each channel is kept.

    Args:
        cov: The covariance of windows, flattened arrays ``(*window, channels)``.
        window: The shape of the windows.
        grid: The shape of the grid, at least that of the windows.
    """
    num_points, num_axes = prod(window), len(window)
    channels = cov.size // num_points
    dtype = cov.diagonal().dtype
    points = tuple(range(1, 1 + num_axes))
    padded = tuple(2 * width for width in window)  # so that no two lags coincide

    def columns(index: jax.Array) -> jax.Array:
        """Return columns of the root of the covariance, zero beyond the last one."""
        basis = index[:, None] == jnp.arange(cov.size)
        return cov.sqrt_matvec(basis.astype(dtype)).reshape(len(index), num_points, channels)

    def total(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Sum a function of some columns over all of them."""
        size = min(cov.size, _NUM_COLUMNS)
        index = jnp.arange(-(-cov.size // size) * size).reshape(-1, size)
        zero = jnp.zeros_like(function(columns(index[0])))
        step = lambda carry, some: (carry + function(columns(some)), None)  # noqa: E731
        return jax.lax.scan(step, zero, index)[0]

    _, rotation = jnp.linalg.eigh(total(lambda x: einsum("jpa,jpb->ab", x, x)))

    def spectrum(x: jax.Array) -> jax.Array:
        rotated = matmul(x, rotation).reshape(len(x), *window, channels)
        waves = jnp.fft.fftn(rotated, s=padded, axes=points)
        return (jnp.square(waves.real) + jnp.square(waves.imag)).sum(0)

    axes = tuple(range(num_axes))
    lags = jnp.fft.ifftn(total(spectrum), axes=axes).real / num_points
    places = [
        np.fft.fftfreq(width, 1 / width).astype(int) % size
        for width, size in zip(padded, grid, strict=True)
    ]
    autocovariance = jnp.zeros((*grid, channels), dtype).at[np.ix_(*places)].add(lags)
    power = jnp.fft.fftn(autocovariance, axes=axes).real
    # Rounding would leave frequencies without power, in which nothing could be drawn.
    power = jnp.maximum(power, jnp.finfo(dtype).eps * power.max())
    return Stationary(power.reshape(-1), rotation, grid)


_NUM_COLUMNS = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class StationaryOperator:
    r"""A symmetric operator :math:`L \ge 0` on fields that is diagonal in the Fourier basis.

    It may couple the channels at a frequency, unlike `Stationary`, which has one rotation of them.

    Args:
        blocks: Hermitian matrices at the frequencies of `jax.numpy.fft.rfftn`, with shape
            ``(*batch, *frequencies, channels, channels)``.
        grid: The shape of the grid: vectors are flattened arrays ``(*grid, channels)``.
    """

    blocks: jax.Array
    grid: tuple[int, ...] = field(metadata={"static": True})

    def matvec(self, v: jax.Array) -> jax.Array:
        """Return the product with a vector, with shape ``(*batch, size)``."""
        return self._multiply(self.blocks, v)

    def sqrt_matvec(self, z: jax.Array) -> jax.Array:
        r"""Return :math:`M z`, where :math:`M` is square and :math:`M M^T = L`."""
        return self._multiply(_cholesky(self.blocks), z)

    def _multiply(self, blocks: jax.Array, v: jax.Array) -> jax.Array:
        axes = tuple(range(-1 - len(self.grid), -1))
        fields = v.reshape(*v.shape[:-1], *self.grid, self.blocks.shape[-1])
        waves = _apply(blocks, jnp.fft.rfftn(fields, axes=axes))
        product = jnp.fft.irfftn(waves, s=self.grid, axes=axes)
        return product.reshape(*product.shape[: axes[0]], v.shape[-1])


class StationaryPart(NamedTuple):
    r"""The stationary part of a symmetric operator :math:`L \ge 0`.

    Attributes:
        mean: The blocks of :math:`L` in the Fourier basis that couple the channels at one
            frequency. It can exceed :math:`L` by far in some directions.
        lower: ``mean`` minus twice the norm of the rows that couple a frequency to all others.
            It hardly exceeds :math:`L` in any direction (measured, not proved).
    """

    mean: StationaryOperator
    lower: StationaryOperator


def stationary_part(
    matvec: Callable[[jax.Array], jax.Array],
    grid: tuple[int, ...],
    num_channels: int,
    dtype: DTypeLike,
    num_probes: int = 8,
) -> StationaryPart:
    r"""Return the stationary part of symmetric operators :math:`L \ge 0` on fields with channels.

    It is estimated from fields with random phases, exactly if :math:`L` is stationary. The
    standard deviation of the estimates from single fields is the norm of the coupling to other
    frequencies.

    Args:
        matvec: The product with :math:`L`, of a vector ``(size,)``, with shape ``(*batch, size)``.
        grid: The shape of the grid: vectors are flattened arrays ``(*grid, channels)``.
        num_channels: The number of channels.
        dtype: The floating type of vectors.
        num_probes: The number of fields for each channel.
    """
    axes = tuple(range(-1 - len(grid), -1))
    # The size of the products, so that squares neither overflow nor underflow.
    unit = magnitude(matvec(probe(prod(grid) * num_channels, dtype)), axis=-1)

    def block_columns(channel: jax.Array, rng_key: jax.Array) -> jax.Array:
        """Return an estimate of the blocks' column of a channel."""
        noise = jnp.fft.rfftn(jax.random.normal(rng_key, grid, dtype))
        phases = noise / jnp.maximum(jnp.abs(noise), jnp.finfo(dtype).tiny)
        field = jnp.fft.irfftn(phases, s=grid)
        basis = (jnp.arange(num_channels) == channel).astype(dtype)
        image = matvec((field[..., None] * basis).ravel()) / unit
        image = image.reshape(*image.shape[:-1], *grid, num_channels)
        return jnp.fft.rfftn(image, axes=axes) * phases.conj()[..., None]

    def estimate(rng_key: jax.Array) -> jax.Array:
        columns = jax.lax.map(lambda i: block_columns(i, rng_key), jnp.arange(num_channels))
        return jnp.moveaxis(columns, 0, -1)

    def add(moments: tuple, inputs: tuple) -> tuple[tuple, None]:
        """Add an estimate to the mean and to the sum of squares around it (Welford)."""
        mean, squares = moments
        count, rng_key = inputs
        new = estimate(rng_key)
        step = (new - mean) / count
        squares += (1 - 1 / count) * jnp.abs(new - mean) ** 2
        return (mean + step, squares), None

    # The phases only have to be in general position, so that a constant key suffices.
    keys = jax.random.split(jax.random.key(0), num_probes)
    shape = jax.eval_shape(estimate, keys[0])
    start = jnp.zeros(shape.shape, shape.dtype), jnp.zeros(shape.shape, dtype)
    counts = jnp.arange(1, num_probes + 1, dtype=dtype)
    (blocks, squares), _ = jax.lax.scan(add, start, (counts, keys))
    blocks = (blocks + blocks.conj().mT) / 2
    unit = unit.reshape(*unit.shape, *(1,) * (blocks.ndim - unit.ndim))
    coupling = jnp.sqrt(squares.sum(-1).max(-1) / (num_probes - 1))
    less = blocks - 2 * coupling[..., None, None] * jnp.eye(num_channels, dtype=dtype)
    return StationaryPart(
        StationaryOperator(unit * _not_negative(blocks), grid),
        StationaryOperator(unit * _not_negative(less), grid),
    )


def _not_negative(blocks: jax.Array) -> jax.Array:
    """Replace the negative eigenvalues of Hermitian matrices by zero."""
    if blocks.shape[-1] == 1:
        return jnp.maximum(blocks.real, 0).astype(blocks.dtype)
    if blocks.shape[-1] > 2:
        eigenvalues, vectors = by_matrix(jnp.linalg.eigh, blocks)
        scaled = vectors * jnp.maximum(eigenvalues, 0)[..., None, :]
        return einsum("...ij,...kj->...ik", scaled, vectors.conj())
    first, second = blocks[..., 0, 0].real, blocks[..., 1, 1].real
    half = jnp.hypot((first - second) / 2, jnp.abs(blocks[..., 0, 1]))
    largest, smallest = (first + second) / 2 + half, (first + second) / 2 - half
    gain = jnp.maximum(largest, 0) / jnp.where(half > 0, 2 * half, 1)
    shifted = blocks - smallest[..., None, None] * jnp.eye(2, dtype=blocks.dtype)
    cut = gain[..., None, None] * shifted
    return jnp.where((smallest < 0)[..., None, None], cut, blocks)


def _apply(blocks: jax.Array, waves: jax.Array) -> jax.Array:
    """Multiply the channels of each frequency by a matrix."""
    if blocks.shape[-1] == 1:
        return blocks[..., 0] * waves
    return einsum("...ij,...j->...i", blocks, waves)


def _inverse(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Invert small positive definite matrices by Gauss-Jordan sweeps, all of them at once.

    Returns:
        The inverses, and the log-determinants of the matrices.
    """
    logdet = jnp.zeros(blocks.shape[:-2], blocks.real.dtype)
    for k in range(blocks.shape[-1]):
        logdet += jnp.log(blocks[..., k, k].real)
        pivot = 1 / blocks[..., k, k]
        column, row = blocks[..., :, k], blocks[..., k, :]
        swept = blocks - pivot[..., None, None] * column[..., :, None] * row[..., None, :]
        swept = swept.at[..., k, :].set(pivot[..., None] * row)
        swept = swept.at[..., :, k].set(-pivot[..., None] * column)
        blocks = swept.at[..., k, k].set(pivot)
    return blocks, logdet


def _cholesky(blocks: jax.Array) -> jax.Array:
    """Factor small positive semi-definite matrices, all of them at once."""
    smallest = jnp.finfo(blocks.dtype).eps * jnp.trace(blocks, axis1=-2, axis2=-1).real
    columns = []
    for k in range(blocks.shape[-1]):
        pivot = blocks[..., k, k].real
        root = jnp.sqrt(jnp.where(pivot > smallest, pivot, 1))
        column = jnp.where((pivot > smallest)[..., None], blocks[..., :, k] / root[..., None], 0)
        columns.append(column)
        blocks = blocks - column[..., :, None] * column[..., None, :].conj()
    return jnp.stack(columns, axis=-1)
