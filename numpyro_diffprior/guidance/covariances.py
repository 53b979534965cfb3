r"""The covariance of :math:`x` given :math:`x_t`, as an operator.

Tweedie's second formula gives it exactly, :math:`V = \sigma^2 J` with the denoiser's Jacobian
:math:`J`; a product with it is one vector-Jacobian product of the network. The closed forms need
no Jacobian: the covariance under a Gaussian prior, optionally scaled to the denoiser's error, and
two heuristics of the paper for comparison.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712, section 4.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.linalg.covariances import Covariance, Isotropic

__all__ = [
    "CalibratedCovariance",
    "FlatPriorCovariance",
    "GaussianCovariance",
    "IsotropicPriorCovariance",
    "PosteriorCovariance",
    "PosteriorOperator",
    "Product",
    "TweedieCovariance",
    "pull_back",
]

Product = Callable[[jax.Array], jax.Array]


class PosteriorOperator(NamedTuple):
    r"""The covariance :math:`V` of :math:`x` given :math:`x_t`, at one noise level.

    Attributes:
        x_hat: The denoiser's mean, with shape ``(*batch, *event)``.
        matvec: The product with :math:`V`, of flattened events.
        pull: The product with :math:`\sigma^2 J^T`, of flattened events; it turns a gradient at
            :math:`\hat x` into a correction of :math:`\hat x`.
        closed_form: :math:`V` itself, or None if it needs products with the Jacobian.
    """

    x_hat: jax.Array
    matvec: Product
    pull: Product
    closed_form: Covariance | None


class PosteriorCovariance(ABC):
    r"""A model of :math:`V`, the covariance of :math:`x` given :math:`x_t`.

    Subclasses are static under `jax.jit`: they must be hashable and compare by value, as frozen
    dataclasses do.
    """

    @abstractmethod
    def closed_form(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance | None:
        r"""Return :math:`V` at a noise level, or None for Tweedie's :math:`\sigma^2 J`."""

    def at(self, denoiser: Denoiser, x_t: jax.Array, sigma: jax.Array) -> PosteriorOperator:
        """Evaluate the denoiser and return the operator at ``x_t``.

        Args:
            denoiser: The prior.
            x_t: Noisy events, with shape ``(*batch, *event)``.
            sigma: Noise levels, broadcastable to shape ``(*batch,)``.
        """
        x_hat, pull = pull_back(denoiser, x_t, sigma)
        cov = self.closed_form(denoiser, sigma)
        return PosteriorOperator(x_hat, pull if cov is None else cov.matvec, pull, cov)


@jax.tree_util.register_static
@dataclass(frozen=True)
class GaussianCovariance(PosteriorCovariance):
    r"""The covariance under a Gaussian prior, :math:`(\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}`."""

    def closed_form(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return denoiser.cov.conditional(sigma**2)


@jax.tree_util.register_static
@dataclass(frozen=True)
class CalibratedCovariance(PosteriorCovariance):
    r"""The covariance under a Gaussian prior, scaled to the denoiser's error.

    .. math:: r(\sigma) \, (\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}, \quad
        r(\sigma) = E \lVert x - D(x_t, \sigma) \rVert^2
        / \mathrm{tr} (\Sigma_x^{-1} + \Sigma_t^{-1})^{-1}

    At medium noise levels, a prior that is not Gaussian has a smaller conditional variance than a
    Gaussian with its covariance: about half, on digits. `Denoiser.error_ratio` gives the ratio;
    it is one if no error was measured, and this is then `GaussianCovariance`.
    """

    def closed_form(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return denoiser.cov.conditional(sigma**2).scale(denoiser.error_ratio(sigma))


@jax.tree_util.register_static
@dataclass(frozen=True)
class FlatPriorCovariance(PosteriorCovariance):
    r"""The heuristic :math:`\Sigma_t = \sigma^2 I`, the covariance under a flat prior."""

    def closed_form(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return Isotropic(sigma**2, denoiser.event_size)


@jax.tree_util.register_static
@dataclass(frozen=True)
class IsotropicPriorCovariance(PosteriorCovariance):
    r"""The heuristic :math:`(I / s^2 + \Sigma_t^{-1})^{-1}`, with the prior's scale :math:`s`."""

    def closed_form(self, denoiser: Denoiser, sigma: jax.Array) -> Covariance:
        return Isotropic(denoiser.scale**2, denoiser.event_size).conditional(sigma**2)


@jax.tree_util.register_static
@dataclass(frozen=True)
class TweedieCovariance(PosteriorCovariance):
    r"""The covariance under the prior itself, :math:`V = \sigma^2 J` (Tweedie's second formula).

    The Jacobian of a learned denoiser is not symmetric positive semi-definite: directions without
    positive variance get no correction.
    """

    def closed_form(self, denoiser: Denoiser, sigma: jax.Array) -> None:
        return None


def pull_back(denoiser: Denoiser, x_t: jax.Array, sigma: jax.Array) -> tuple[jax.Array, Product]:
    r"""Return :math:`\hat x` and, on flattened events, :math:`v \mapsto \sigma^2 J^T v`."""
    x_hat, vjp = jax.vjp(lambda x: denoiser(x, sigma), x_t)
    variance = sigma[..., None] ** 2

    def pull(v: jax.Array) -> jax.Array:
        return variance * vjp(v.reshape(x_hat.shape))[0].reshape(v.shape)

    return x_hat, pull
