"""Structured covariances, batched dense matrices, and solvers for Gaussian updates."""

from numpyro_diffprior.linalg.covariances import (
    Blocks,
    Covariance,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Isotropic,
    Repeated,
)
from numpyro_diffprior.linalg.empirical import empirical_gaussian

__all__ = [
    "Blocks",
    "Covariance",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Isotropic",
    "Repeated",
    "empirical_gaussian",
]
