"""Covariances beside their dense matrices, and comparisons at the precision of the run."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffprior.linalg.covariances import (
    Blocks,
    Covariance,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Isotropic,
)
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank

SIZE = 6
DTYPE = jnp.zeros(()).dtype
EPS = float(jnp.finfo(DTYPE).eps)
TOL = 500 * EPS

Pair = tuple[Covariance, np.ndarray]


def assert_close(actual: jax.Array, desired: np.ndarray, tol: float = TOL) -> None:
    """Compare relative to the largest entry: single ones may cancel."""
    assert actual.dtype == DTYPE
    scale = max(1.0, float(np.abs(desired).max()))
    np.testing.assert_allclose(actual, desired, rtol=tol, atol=tol * scale)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(size=shape), DTYPE)


def positive(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).uniform(0.3, 2.0, size=shape), DTYPE)


def diag(variances: np.ndarray) -> np.ndarray:
    return np.asarray(variances, float)[..., None] * np.eye(variances.shape[-1])


def gram(factor: np.ndarray) -> np.ndarray:
    factor = np.asarray(factor, float)
    return factor @ np.swapaxes(factor, -1, -2)


def isotropic(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variance = positive(seed, *batch)
    matrix = np.asarray(variance, float)[..., None, None] * np.eye(size)
    return Isotropic(jnp.asarray(variance), size), matrix


def diagonal(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variances = positive(seed, *batch, size)
    return Diagonal(jnp.asarray(variances)), diag(variances)


def low_rank(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variances, factor = positive(seed, *batch, size), normal(seed + 1, *batch, size, 2)
    cov = DiagonalPlusLowRank(jnp.asarray(variances), jnp.asarray(factor))
    return cov, diag(variances) + gram(factor)


def shared_factor(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    variances, factor = positive(seed, *batch, size), normal(seed + 1, size, 2)
    cov = DiagonalPlusLowRank(jnp.asarray(variances), jnp.asarray(factor))
    return cov, diag(variances) + gram(factor)


def dense(*batch: int, seed: int = 0, size: int = SIZE) -> Pair:
    matrix = gram(normal(seed, *batch, size, size)) + 0.3 * np.eye(size)
    return Dense.from_matrix(jnp.asarray(matrix, DTYPE)), matrix


def blocks(*batch: int, seed: int = 0) -> Pair:
    parts = [
        low_rank(*batch, seed=seed, size=3),
        isotropic(seed=seed + 2, size=1),
        dense(*batch, seed=seed + 3, size=2),
    ]
    matrix, start = np.zeros((*batch, SIZE, SIZE)), 0
    for cov, part in parts:
        end = start + cov.size
        matrix[..., start:end, start:end] = part
        start = end
    return Blocks(tuple(cov for cov, _ in parts)), matrix


def stationary(*batch: int, seed: int = 0) -> Pair:
    """A field of two channels on a ring of three points."""
    power = np.abs(np.fft.fft(normal(seed, *batch, 3, 2), axis=-2)) + 0.3
    rotation, _ = np.linalg.qr(normal(seed + 1, 2, 2))
    ring = np.fft.fft(np.eye(3), norm="ortho")
    basis = np.kron(ring, rotation)
    power = np.asarray(power.reshape(*batch, SIZE), DTYPE)
    matrix = ((basis * power[..., None, :]) @ basis.conj().T).real
    return Stationary(jnp.asarray(power), jnp.asarray(rotation, DTYPE), (3,)), matrix


def stationary_low_rank(*batch: int, seed: int = 0) -> Pair:
    cov, matrix = stationary(*batch, seed=seed)
    factor = normal(seed + 2, *batch, SIZE, 2)
    return StationaryPlusLowRank(cov, jnp.asarray(factor)), matrix + gram(factor)


CASES = [
    isotropic,
    diagonal,
    low_rank,
    shared_factor,
    dense,
    blocks,
    stationary,
    stationary_low_rank,
]
Make = Callable[..., Pair]
over_cases = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
over_batches = pytest.mark.parametrize("batch", [(), (3,)], ids=str)
