r"""Gaussian summaries of draws: their mean and a structured covariance.

References:
    Halko, Martinsson and Tropp, *Finding structure with randomness*, arXiv 0909.4061 (the
    low-rank fit).
    Donoho, Gavish and Johnstone, *Optimal shrinkage of eigenvalues in the spiked covariance
    model*, Annals of Statistics 46, 2018 (the factors beside a stationary covariance).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from numpyro_diffprior._compile.checks import check_count, set_fields
from numpyro_diffprior.linalg.batched import append_axis, matmul
from numpyro_diffprior.linalg.covariances import Covariance, Dense, DiagonalPlusLowRank
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank

__all__ = [
    "GaussianSummary",
    "LowRankSummary",
    "StationaryLowRankSummary",
    "StationarySummary",
    "empirical_gaussian",
    "stationary_gaussian",
    "stationary_low_rank_gaussian",
]


class GaussianSummary(ABC):
    """The form of a Gaussian that is fitted to events; static, and compared by value."""

    @abstractmethod
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Covariance]:
        """Return mean, with shape ``event_shape``, and covariance of ``(n, *event_shape)``."""

    def check(self, event_shape: tuple[int, ...]) -> None:  # noqa: B027 - by default all fit
        """Raise a `ValueError` if events of a shape do not fit."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class LowRankSummary(GaussianSummary):
    """A dense covariance up to 512 elements, diagonal plus low rank beyond.

    Args:
        rank: The rank beyond 512 elements.
    """

    rank: int = 32

    def __post_init__(self) -> None:
        set_fields(self, rank=check_count("LowRankSummary", "rank", self.rank))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Covariance]:
        mean, cov = empirical_gaussian(x.reshape(len(x), -1), rank=self.rank)
        return mean.reshape(x.shape[1:]), cov


@jax.tree_util.register_static
@dataclass(frozen=True)
class StationarySummary(GaussianSummary):
    """A covariance of full rank that depends on the difference of two grid points only.

    It suits fields and textures, such as turbulence, that have no preferred place; boundaries are
    periodic. See `Stationary`.

    Args:
        num_axes: The number of leading axes of events that form the grid; the remaining ones are
            channels.
    """

    num_axes: int = 2

    def __post_init__(self) -> None:
        set_fields(self, num_axes=check_count("StationarySummary", "num_axes", self.num_axes))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Covariance]:
        return stationary_gaussian(x, num_axes=self.num_axes)

    def check(self, event_shape: tuple[int, ...]) -> None:
        _check_grid("StationarySummary", self.num_axes, event_shape)


@jax.tree_util.register_static
@dataclass(frozen=True)
class StationaryLowRankSummary(GaussianSummary):
    """A stationary covariance plus factors, which depend on the place.

    It suits images, with objects in the center and detail everywhere. See
    `stationary_low_rank_gaussian`.

    Args:
        rank: The number of factors.
        num_axes: The number of leading axes of events that form the grid; the remaining ones are
            channels.
    """

    rank: int = 32
    num_axes: int = 2

    def __post_init__(self) -> None:
        set_fields(
            self,
            rank=check_count("StationaryLowRankSummary", "rank", self.rank),
            num_axes=check_count("StationaryLowRankSummary", "num_axes", self.num_axes),
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Covariance]:
        return stationary_low_rank_gaussian(x, rank=self.rank, num_axes=self.num_axes)

    def check(self, event_shape: tuple[int, ...]) -> None:
        _check_grid("StationaryLowRankSummary", self.num_axes, event_shape)


def _check_grid(name: str, num_axes: int, event_shape: tuple[int, ...]) -> None:
    if len(event_shape) < num_axes:
        raise ValueError(
            f"{name}: a grid of {num_axes} axes does not fit events of shape {event_shape}; pass "
            f"num_axes={len(event_shape)} or another summary."
        )


def empirical_gaussian(
    x: jax.Array, *, rank: int | None = None, max_dense: int = 512
) -> tuple[jax.Array, Covariance]:
    r"""Fit a Gaussian to draws: their mean and their (unbiased) covariance :math:`S`.

    Up to ``max_dense`` dimensions the covariance is :class:`Dense`. Beyond, it is
    :class:`DiagonalPlusLowRank`: the Nyström approximation of :math:`S` on its leading subspace,
    found by subspace iteration without forming :math:`S`, plus a diagonal that matches the
    variances of the draws.

    Args:
        x: Draws with shape ``(n, d)``.
        rank: Rank of the low-rank part, beyond ``max_dense`` dimensions (default: 32).
        max_dense: Largest ``d`` that gets a dense covariance; 0 selects the low-rank form.

    Returns:
        The mean, with shape ``(d,)``, and the covariance.

    Raises:
        ValueError: If ``x`` is not ``(n, d)`` with ``n > 1``, or ``rank`` is not positive.
    """
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(
            f"Expected at least two draws of shape (n, d), got an array of shape {x.shape}."
        )
    num, size = x.shape
    rank = min(32 if rank is None else check_count("empirical_gaussian", "rank", rank), size)
    mean = x.mean(0)
    centered = (x - mean) / (num - 1) ** 0.5
    if size <= max_dense:
        return mean, Dense.from_matrix(matmul(centered.T, centered))

    basis = _improve(centered, _start(size, rank, x.dtype), 6)
    scores = matmul(centered, basis)
    eigenvalues, rotation = jnp.linalg.eigh(matmul(scores.T, scores))
    eigenvalues, rotation = eigenvalues[-rank:], rotation[:, -rank:]
    eps = jnp.finfo(x.dtype).eps
    positive = eigenvalues > eps * size * eigenvalues[-1]
    roots = jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, eigenvalues, 1)), 0)
    factor = matmul(centered.T, matmul(scores, rotation * roots))

    # A floor keeps every diagonal entry positive, since solves would else be ill-conditioned.
    variances, explained = jnp.square(centered).sum(0), jnp.square(factor).sum(-1)
    diag = jnp.maximum(variances - explained, eps**0.5 * variances)
    shrink = jnp.sqrt((variances - diag) / jnp.where(explained > 0, explained, 1))
    return mean, DiagonalPlusLowRank(diag, append_axis(shrink) * factor)


def stationary_gaussian(x: jax.Array, *, num_axes: int = 2) -> tuple[jax.Array, Stationary]:
    r"""Fit a stationary Gaussian to draws: their mean and the power of each frequency.

    The channels are rotated to those of their covariance over all grid points. The power is the
    mean square of the Fourier coefficients of the rotated channels, over draws, unbiased.

    Args:
        x: Draws with shape ``(n, *grid, *channels)``.
        num_axes: The number of axes of the grid.

    Returns:
        The mean, with shape ``(*grid, *channels)``, and the covariance.

    Raises:
        ValueError: If there are fewer than two draws, or events have fewer axes than the grid.
    """
    mean, _, cov = _fit_stationary("stationary_gaussian", x, num_axes)
    return mean, cov


def stationary_low_rank_gaussian(
    x: jax.Array, *, rank: int = 32, num_axes: int = 2
) -> tuple[jax.Array, StationaryPlusLowRank]:
    r"""Fit a Gaussian with covariance :math:`S + F F^T` to draws, with :math:`S` stationary.

    In turn, :math:`S` gets the power that the factors leave of the draws, and the factors the
    directions in which the draws, divided by the root of :math:`S`, have the largest variances
    :math:`\lambda > 1`. Those of few draws are too large: of :math:`n` draws of :math:`d`
    elements with unit variance, the largest is :math:`(1 + \sqrt{d / n})^2`. Smaller ones get no
    factor, and larger ones what is optimal in Frobenius norm (Donoho, Gavish and Johnstone, 2018).

    Args:
        x: Draws with shape ``(n, *grid, *channels)``.
        rank: The number of factors.
        num_axes: The number of axes of the grid.

    Returns:
        The mean, with shape ``(*grid, *channels)``, and the covariance.

    Raises:
        ValueError: If there are fewer than two draws, or events have fewer axes than the grid.
    """
    rank = check_count("stationary_low_rank_gaussian", "rank", rank)
    mean, centered, total = _fit_stationary("stationary_low_rank_gaussian", x, num_axes)
    rank = min(rank, total.size)
    ratio = total.size / (len(x) - 1)

    def improve(_: int, state: tuple) -> tuple:
        basis, cov = state
        root = jnp.sqrt(cov.stationary.eigenvalues)
        white = cov.stationary.filter(1 / root, centered)
        basis = _improve(white, basis, 2)
        scores = matmul(white, basis)
        eigenvalues, rotation = jnp.linalg.eigh(matmul(scores.T, scores))
        gains = jnp.sqrt(_shrink_spikes(eigenvalues[-rank:], ratio) - 1)
        directions = matmul(basis, rotation[:, -rank:])
        factor = cov.stationary.sqrt_matvec(gains[:, None] * directions.T).T
        explained = jnp.square(jnp.abs(total.waves(factor.T))).sum(0)
        power = jnp.maximum(total.eigenvalues - explained, _LEAST_POWER * total.eigenvalues)
        rest = Stationary(power, total.rotation, total.grid)
        return basis, StationaryPlusLowRank(rest, factor)

    zero = jnp.zeros((total.size, rank), x.dtype)
    start = _start(total.size, rank, x.dtype), StationaryPlusLowRank(total, zero)
    return mean, jax.lax.fori_loop(0, _NUM_ROUNDS, improve, start)[1]


_NUM_ROUNDS = 8  # of power and factors in turn
_LEAST_POWER = 1e-3  # of what a frequency has


def _fit_stationary(
    name: str, x: jax.Array, num_axes: int
) -> tuple[jax.Array, jax.Array, Stationary]:
    """Return the mean, the flattened deviations over the root of their number, and their power."""
    grid, channels = x.shape[1 : 1 + num_axes], x.shape[1 + num_axes :]
    if len(x) < 2 or len(grid) < num_axes or num_axes < 1:
        raise ValueError(
            f"{name}: expected two draws or more of events with {num_axes} grid axes or more, got "
            f"an array of shape {x.shape}."
        )
    mean = x.mean(0)
    centered = (x - mean).reshape(len(x), *grid, prod(channels)) / (len(x) - 1) ** 0.5
    flat = centered.reshape(-1, prod(channels))
    _, rotation = jnp.linalg.eigh(matmul(flat.T, flat))
    waves = jnp.fft.fftn(matmul(centered, rotation), axes=range(1, 1 + num_axes), norm="ortho")
    power = jnp.square(waves.real).sum(0) + jnp.square(waves.imag).sum(0)
    # Rounding would leave frequencies without power, in which nothing could be drawn.
    power = jnp.maximum(power, jnp.finfo(x.dtype).eps * power.max())
    return mean, centered.reshape(len(x), -1), Stationary(power.reshape(-1), rotation, grid)


def _start(size: int, rank: int, dtype: DTypeLike) -> jax.Array:
    """Return where subspace iterations start: in general position, so a constant key suffices."""
    return jax.random.normal(jax.random.key(0), (size, min(rank + 10, size)), dtype)


def _improve(centered: jax.Array, basis: jax.Array, num: int) -> jax.Array:
    """Turn a basis towards the leading subspace of deviations, ``(n, d)``, in some iterations."""

    def improve(_: int, basis: jax.Array) -> jax.Array:
        return jnp.linalg.qr(matmul(centered.T, matmul(centered, basis)))[0]

    return jax.lax.fori_loop(0, num, improve, basis)


def _shrink_spikes(eigenvalues: jax.Array, ratio: float) -> jax.Array:
    r"""Return the variances behind the largest eigenvalues of a sample covariance.

    Of :math:`n` draws of :math:`d = \gamma n` elements, of unit variance in nearly all
    directions, a variance :math:`\ell > 1 + \sqrt{\gamma}` has the eigenvalue
    :math:`\lambda = \ell (1 + \gamma / (\ell - 1))`, in a direction whose squared cosine with
    the true one is :math:`c^2 = (1 - \gamma / (\ell - 1)^2) / (1 + \gamma / (\ell - 1))`. The
    result is :math:`1 + (\ell - 1) c^2`, and one where the variance cannot be told.
    """
    seen = eigenvalues > (1 + ratio**0.5) ** 2
    total = jnp.where(seen, eigenvalues, (2 + ratio**0.5) ** 2) + 1 - ratio
    excess = (total + jnp.sqrt(jnp.square(total) - 4 * (total - 1 + ratio))) / 2 - 1
    cosine = (1 - ratio / jnp.square(excess)) / (1 + ratio / excess)
    return jnp.where(seen, 1 + excess * jnp.maximum(cosine, 0), 1)
