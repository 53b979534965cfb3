r"""Guidance: from a prior's denoiser and a likelihood to the denoiser of the posterior.

Tweedie's formula for :math:`p(x_t \mid y)` gives the posterior's denoiser

.. math:: E[x \mid x_t, y] = \hat x + \sigma^2 \nabla_{x_t} \log p(y \mid x_t), \quad
    \hat x = D(x_t, \sigma).

A guidance approximates it, from :math:`\hat x` and the likelihood of the observed batch; see
`numpyro_diffprior.guidance.mmps` for the one to use. Its approximation of :math:`p(y \mid x_t)` is
also the *twist* of the particle samplers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.linalg.covariances import Covariance

__all__ = ["Guidance", "Guided", "GuidedDenoiser", "Outlook", "pull_back"]

_Pull = Callable[[jax.Array], jax.Array]


class Guided(NamedTuple):
    r"""What guidance finds at one noise level.

    Attributes:
        x_hat: The prior's mean :math:`E[x \mid x_t]`, with shape ``(*batch, *event)``.
        x_hat_y: The posterior's mean :math:`E[x \mid x_t, y]`, likewise.
        log_twist: The approximate :math:`\log p(y \mid x_t)`, with shape ``(*batch,)``, without
            its log-determinant where the solve is matrix-free. A hidden value (a zero row with
            unit noise) adds the constant of its Gaussian.
        residual: The relative residual of the solve, with shape ``(*batch,)``; zero where
            there was none, or an exact one.
        num_truncated: The number of directions with negative prior variance, likewise; zero
            where the solve is matrix-free.
    """

    x_hat: jax.Array
    x_hat_y: jax.Array
    log_twist: jax.Array
    residual: jax.Array
    num_truncated: jax.Array


class Outlook(NamedTuple):
    r"""What a Gaussian prior would say of the observations from a lower noise level.

    .. math:: y \sim \mathcal{N}\bigl(h(x) + G (x_s - x), S\bigr), \quad
        G = A V / \sigma_s^2, \quad S = \Sigma_y + A V A^T

    Attributes:
        residual: :math:`y - h(x)`, with shape ``(*extra, *batch, m)``.
        matvec: The product with :math:`G`: from ``d`` to ``m`` elements.
        transpose: The product with its transpose: from ``m`` to ``d``.
        cov: :math:`S`, with shape ``(*batch, m, m)``.
        spread: :math:`G G^T`, likewise.
        event_size: The number ``d`` of an event's elements.
    """

    residual: jax.Array
    matvec: Callable[[jax.Array], jax.Array]
    transpose: Callable[[jax.Array], jax.Array]
    cov: jax.Array
    spread: jax.Array
    event_size: int


@dataclass(frozen=True, eq=False)
class GuidedDenoiser(Denoiser):
    """The denoiser of a posterior: any sampler runs it. Made by `Guidance.condition`.

    Args:
        denoiser: The prior.
        likelihood: The likelihood of the observed batch.
        guidance: The approximation.
        operator: The likelihood's operator as matrices, where it is the same at all ``x``.
    """

    denoiser: Denoiser
    likelihood: Likelihood
    guidance: "Guidance"
    operator: jax.Array | None = None

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        """The prior's mean."""
        return self.denoiser.mean

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        """The prior's covariance."""
        return self.denoiser.cov

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the posterior's conditional mean; see `Denoiser`."""
        return self.guide(x_t, sigma).x_hat_y

    def guide(self, x_t: jax.Array, sigma: jax.Array | float) -> Guided:
        """Evaluate prior and posterior at one noise level."""
        return self.guidance.guide(self, x_t, jnp.asarray(sigma, self.dtype))

    @property
    def looks_ahead(self) -> bool:
        """Whether `outlook` has an answer."""
        return self.operator is not None and self.guidance.looks_ahead

    def outlook(self, x: jax.Array, sigma: jax.Array) -> Outlook:
        """Return the outlook on the observations around ``x`` from noise level ``sigma``."""
        return self.guidance.outlook(self, x, sigma)


class Guidance(ABC):
    """An approximation of the posterior's denoiser."""

    def condition(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior.

        Raises:
            ValueError: If prior and likelihood have different event shapes.
        """
        if denoiser.event_shape != likelihood.event_shape:
            raise ValueError(
                f"guidance: the prior's events have shape {denoiser.event_shape}, "
                f"the likelihood's {likelihood.event_shape}."
            )
        return GuidedDenoiser(denoiser, likelihood, self)

    @abstractmethod
    def guide(self, posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array) -> Guided:
        """Evaluate prior and posterior at one noise level; see `GuidedDenoiser.guide`."""

    @property
    def looks_ahead(self) -> bool:
        """Whether particles look ahead, by `outlook`."""
        return False

    def outlook(self, posterior: GuidedDenoiser, x: jax.Array, sigma: jax.Array) -> Outlook:
        """Return an outlook on the observations; see `GuidedDenoiser.outlook`."""
        raise NotImplementedError(f"{type(self).__name__} does not look ahead.")


def pull_back(
    posterior: GuidedDenoiser, x_t: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, _Pull]:
    r"""Return :math:`\hat x` and, on flattened events, :math:`v \mapsto \sigma^2 J^T v`."""
    x_hat, vjp = jax.vjp(lambda x: posterior.denoiser(x, sigma), x_t)
    variance = sigma[..., None] ** 2

    def pull(v: jax.Array) -> jax.Array:
        return variance * vjp(v.reshape(x_hat.shape))[0].reshape(v.shape)

    return x_hat, pull
