r"""The covariance of :math:`x` given :math:`x_t`, by which moment matching guides.

The exact one is Tweedie's second formula, :math:`V = \sigma^2 J` with the denoiser's Jacobian
:math:`J`, and takes products with it. Closed forms take none: that of a Gaussian prior, as it is
or scaled to what the denoiser leaves open, and two heuristics of the paper to compare with.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712, section 4.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.linalg.covariances import Covariance, Isotropic

__all__ = [
    "CalibratedCovariance",
    "GaussianCovariance",
    "IsotropicCovariance",
    "PosteriorCovariance",
    "TweedieCovariance",
    "UnitCovariance",
]


class PosteriorCovariance(ABC):
    r"""A closed form for :math:`V`, the covariance of :math:`x` given :math:`x_t`."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        """Return the covariance at noise level ``sigma``."""


@dataclass(frozen=True)
class GaussianCovariance(PosteriorCovariance):
    r"""That of a Gaussian prior, :math:`(\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}`."""

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return denoiser.cov.harmonic(sigma**2)


@dataclass(frozen=True)
class CalibratedCovariance(PosteriorCovariance):
    r"""That of a Gaussian prior, scaled to the error that the denoiser makes.

    .. math:: r(\sigma) \, (\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}, \quad
        r(\sigma) = E \lVert x - D(x_t, \sigma) \rVert^2
        / \mathrm{tr} (\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}

    A prior that is not Gaussian leaves less open at medium noise than a Gaussian of its covariance
    would: half as much, on digits. The ratio is that of `Denoiser.error_ratio`; without a measured
    one, this is `GaussianCovariance`.
    """

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return denoiser.cov.harmonic(sigma**2).scale(denoiser.error_ratio(sigma))


@dataclass(frozen=True)
class IsotropicCovariance(PosteriorCovariance):
    r"""The heuristic :math:`\Sigma_t = \sigma^2 I`, of a flat prior."""

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return Isotropic(sigma**2, denoiser.event_size)


@dataclass(frozen=True)
class UnitCovariance(PosteriorCovariance):
    r"""The heuristic :math:`(I / s^2 + \Sigma_t^{-1})^{-1}`, with the prior's scale :math:`s`."""

    def __call__(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        variance = 1 / (1 / denoiser.scale**2 + 1 / sigma**2)
        return Isotropic(variance, denoiser.event_size)


@dataclass(frozen=True)
class TweedieCovariance:
    r"""The covariance of the prior itself, :math:`V = \sigma^2 J` (Tweedie's second formula).

    The Jacobian of a learned denoiser is not symmetric positive semi-definite: directions of
    observation space without positive variance get no correction.
    """
