"""Diffusion priors for NumPyro, learned from the observations alone.

A diffusion prior is a distribution over ``x`` (an image, a field, a trajectory, a vector) that is
defined by a denoiser ``D(x_t, sigma) = E[x | x_t]`` with ``x_t = x + sigma * eps``. It is used in
an ordinary NumPyro model like any other distribution.

The top level has the names of the guide; the namespaces `guidance`, `linalg`, `metrics`, `noise`,
`plot`, `samplers` and `training` have the others.
"""

from numpyro_diffprior import guidance, linalg, metrics, plot
from numpyro_diffprior._compile.lazy import LazyArray, lazy_arrays
from numpyro_diffprior._compile.named import from_arrays, to_arrays
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.function import FunctionDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.denoisers.windows import WindowDenoiser
from numpyro_diffprior.diffusion import noise, samplers, training
from numpyro_diffprior.diffusion.fitting import FitResult, fit_denoiser, measure_error
from numpyro_diffprior.em.e_step import EStep
from numpyro_diffprior.em.em import EM
from numpyro_diffprior.em.initial import GaussianStart
from numpyro_diffprior.em.logger import CSVLogger
from numpyro_diffprior.em.m_step import MStep, ParamStep
from numpyro_diffprior.em.state import EMMetrics, EMResult, EMState
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import PosteriorSamples
from numpyro_diffprior.infer.calibration import Calibration, calibrate
from numpyro_diffprior.infer.evidence import LogEvidence, log_evidence
from numpyro_diffprior.infer.kernels import MMPSKernel, ParticleGibbs
from numpyro_diffprior.infer.pmmh import PMMH
from numpyro_diffprior.infer.posterior import sample_posterior
from numpyro_diffprior.infer.reparam import DiffusionReparam
from numpyro_diffprior.nets.adapters import FunctionNetwork
from numpyro_diffprior.nets.dit import DiT
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.nets.unet import UNet
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.moments import Moments, gaussian_moments
from numpyro_diffprior.reading.tracing import complex_noise, mask_priors

__version__ = "0.1.0.dev0"

__all__ = [
    "EM",
    "EStep",
    "GaussianStart",
    "MStep",
    "ParamStep",
    "MLP",
    "CSVLogger",
    "MMPS",
    "Calibration",
    "Denoiser",
    "DiT",
    "DiffusionPrior",
    "DiffusionReparam",
    "EMMetrics",
    "EMResult",
    "EMState",
    "FitResult",
    "FunctionDenoiser",
    "FunctionNetwork",
    "GaussianDenoiser",
    "LazyArray",
    "LogEvidence",
    "MMPSKernel",
    "MixtureDenoiser",
    "Moments",
    "NetworkDenoiser",
    "PMMH",
    "ParticleGibbs",
    "PosteriorSamples",
    "UNet",
    "WindowDenoiser",
    "__version__",
    "calibrate",
    "complex_noise",
    "fit_denoiser",
    "from_arrays",
    "gaussian_moments",
    "guidance",
    "lazy_arrays",
    "linalg",
    "log_evidence",
    "mask_priors",
    "measure_error",
    "metrics",
    "noise",
    "plot",
    "sample_posterior",
    "samplers",
    "to_arrays",
    "training",
]
