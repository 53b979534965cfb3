r"""Gaussian summaries of draws: their mean and a structured covariance.

References:
    Halko, Martinsson and Tropp, *Finding structure with randomness*, arXiv 0909.4061 (the
    low-rank fit).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.checks import check_count, set_fields
from numpyro_diffprior.linalg.batched import append_axis, matmul
from numpyro_diffprior.linalg.covariances import Covariance, Dense, DiagonalPlusLowRank
from numpyro_diffprior.linalg.stationary import Stationary

__all__ = [
    "GaussianSummary",
    "LowRankSummary",
    "StationarySummary",
    "empirical_gaussian",
    "stationary_gaussian",
]


class GaussianSummary(ABC):
    """The form of a Gaussian that is fitted to events; static, and compared by value."""

    @abstractmethod
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Covariance]:
        """Return mean, with shape ``event_shape``, and covariance of ``(n, *event_shape)``."""

    @property
    def rank(self) -> int | None:
        """The rank of a low-rank covariance; None if EM has no closed form for the summary."""
        return None

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
        if len(event_shape) < self.num_axes:
            raise ValueError(
                f"StationarySummary: a grid of {self.num_axes} axes does not fit events of shape "
                f"{event_shape}; pass num_axes={len(event_shape)} or another summary."
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

    def improve(_: int, basis: jax.Array) -> jax.Array:
        return jnp.linalg.qr(matmul(centered.T, matmul(centered, basis)))[0]

    # The start only has to be in general position, so a constant key suffices.
    start = jax.random.normal(jax.random.key(0), (size, min(rank + 10, size)), x.dtype)
    basis = jax.lax.fori_loop(0, 6, improve, start)
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
    grid, channels = x.shape[1 : 1 + num_axes], x.shape[1 + num_axes :]
    if len(x) < 2 or len(grid) < num_axes or num_axes < 1:
        raise ValueError(
            f"stationary_gaussian: expected two draws or more of events with {num_axes} grid axes "
            f"or more, got an array of shape {x.shape}."
        )
    mean = x.mean(0)
    centered = (x - mean).reshape(len(x), *grid, prod(channels)) / (len(x) - 1) ** 0.5
    flat = centered.reshape(-1, prod(channels))
    _, rotation = jnp.linalg.eigh(matmul(flat.T, flat))
    waves = jnp.fft.fftn(matmul(centered, rotation), axes=range(1, 1 + num_axes), norm="ortho")
    power = jnp.square(waves.real).sum(0) + jnp.square(waves.imag).sum(0)
    # Rounding would leave frequencies without power, in which nothing could be drawn.
    power = jnp.maximum(power, jnp.finfo(x.dtype).eps * power.max())
    return mean, Stationary(power.reshape(-1), rotation, grid)
