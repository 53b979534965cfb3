"""Diffusion priors for NumPyro, learned from the observations alone.

A diffusion prior is a distribution over ``x`` (an image, a field, a trajectory, a vector) that is
defined by a denoiser ``D(x_t, sigma) = E[x | x_t]`` with ``x_t = x + sigma * eps``. It stands in
an ordinary NumPyro model like any other distribution.
"""

from numpyro_diffprior import metrics
from numpyro_diffprior.annealing import Piecewise, Tempered
from numpyro_diffprior.baselines import DPS, TMPD, PiGDM
from numpyro_diffprior.calibration import Calibration, calibrate
from numpyro_diffprior.denoisers import Denoiser, GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.distributions import DiffusionPrior
from numpyro_diffprior.em import EM, EMMetrics, EMResult, EMState
from numpyro_diffprior.evidence import LogEvidence, log_evidence
from numpyro_diffprior.introspect import mask_priors
from numpyro_diffprior.kernels import MMPSKernel, MMPSState, ParticleGibbs, ParticleGibbsState
from numpyro_diffprior.linalg import (
    Covariance,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Isotropic,
)
from numpyro_diffprior.mmps import MMPS
from numpyro_diffprior.moments import Moments, gaussian_moments
from numpyro_diffprior.nets import MLP, UNet
from numpyro_diffprior.network_denoiser import NetworkDenoiser
from numpyro_diffprior.posterior import PosteriorSamples, sample_posterior
from numpyro_diffprior.posterior_covariances import (
    CalibratedCovariance,
    GaussianCovariance,
    IsotropicCovariance,
    TweedieCovariance,
    UnitCovariance,
)
from numpyro_diffprior.reparam import DiffusionReparam
from numpyro_diffprior.samplers import (
    DDIM,
    DDPM,
    Heun,
    MultistepODE,
    MultistepSDE,
    PredictorCorrector,
)
from numpyro_diffprior.schedules import Karras, LogBeta, LogLinear, LogNormal, LogUniform
from numpyro_diffprior.training import FitResult, fit_denoiser, measure_error

__version__ = "0.1.0.dev0"

__all__ = [
    "DDIM",
    "DDPM",
    "DPS",
    "EM",
    "MLP",
    "MMPS",
    "TMPD",
    "CalibratedCovariance",
    "Calibration",
    "Covariance",
    "Dense",
    "Denoiser",
    "Diagonal",
    "DiagonalPlusLowRank",
    "DiffusionPrior",
    "DiffusionReparam",
    "EMMetrics",
    "EMResult",
    "EMState",
    "FitResult",
    "GaussianCovariance",
    "GaussianDenoiser",
    "Heun",
    "Isotropic",
    "IsotropicCovariance",
    "Karras",
    "LogBeta",
    "LogEvidence",
    "LogLinear",
    "LogNormal",
    "LogUniform",
    "MMPSKernel",
    "MMPSState",
    "MixtureDenoiser",
    "Moments",
    "MultistepODE",
    "MultistepSDE",
    "NetworkDenoiser",
    "ParticleGibbs",
    "ParticleGibbsState",
    "PiGDM",
    "Piecewise",
    "PosteriorSamples",
    "PredictorCorrector",
    "Tempered",
    "TweedieCovariance",
    "UNet",
    "UnitCovariance",
    "__version__",
    "calibrate",
    "fit_denoiser",
    "gaussian_moments",
    "log_evidence",
    "mask_priors",
    "measure_error",
    "metrics",
    "sample_posterior",
]
