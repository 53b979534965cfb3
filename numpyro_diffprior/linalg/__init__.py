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
from numpyro_diffprior.linalg.empirical import (
    GaussianSummary,
    LowRankSummary,
    StationarySummary,
    empirical_gaussian,
    stationary_gaussian,
)
from numpyro_diffprior.linalg.stationary import Stationary

__all__ = [
    "Blocks",
    "Covariance",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "GaussianSummary",
    "Isotropic",
    "LowRankSummary",
    "Repeated",
    "Stationary",
    "StationarySummary",
    "empirical_gaussian",
    "stationary_gaussian",
]
