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
    StationaryLowRankSummary,
    StationarySummary,
    empirical_gaussian,
    stationary_gaussian,
    stationary_low_rank_gaussian,
)
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank

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
    "StationaryLowRankSummary",
    "StationaryPlusLowRank",
    "StationarySummary",
    "empirical_gaussian",
    "stationary_gaussian",
    "stationary_low_rank_gaussian",
]
