"""Guidance: the posterior's denoiser from the prior's denoiser and a likelihood."""

from numpyro_diffprior.guidance.covariances import (
    CalibratedCovariance,
    FlatPriorCovariance,
    GaussianCovariance,
    IsotropicPriorCovariance,
    PosteriorCovariance,
    TweedieCovariance,
)
from numpyro_diffprior.guidance.guidance import Guidance, Guided, GuidedDenoiser, SolveStats
from numpyro_diffprior.guidance.likelihood import Likelihood, linear_gaussian
from numpyro_diffprior.guidance.literature import DPS, TMPD, PiGDM
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.guidance.scheduled import Piecewise, Tempered

__all__ = [
    "DPS",
    "MMPS",
    "TMPD",
    "CalibratedCovariance",
    "GaussianCovariance",
    "Guidance",
    "Guided",
    "GuidedDenoiser",
    "FlatPriorCovariance",
    "IsotropicPriorCovariance",
    "Likelihood",
    "PiGDM",
    "Piecewise",
    "PosteriorCovariance",
    "SolveStats",
    "Tempered",
    "TweedieCovariance",
    "linear_gaussian",
]
