r"""Proposals of the particle samplers, from one noise level to the next.

The prior's chain draws :math:`x_s = \mu + \tau \varepsilon`. A proposal :math:`q` shifts it to the
observations, and gives the log-ratio of the two densities,

.. math:: \log \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)},

in closed form. There are two kinds:

- *Guided* (TDS): a Gaussian with the guided mean :math:`\mu_y` and the standard deviation
  :math:`\tau` of the prior's chain.
- *Looking ahead* (`numpyro_diffprior.guidance.look_ahead`): for a mean linear in :math:`x` and a
  closed form for :math:`V`, :math:`p(y \mid x_s)` is approximated by the Gaussian
  :math:`\mathcal{N}(r; G (x_s - \mu), S)` with

  .. math:: r = y - h(\hat x), \quad G = A V_s / \sigma_s^2, \quad
      S = \Sigma_y + A V_s A^T, \quad M = S + \tau^2 G G^T,

  where :math:`V_s / \sigma_s^2` is the Jacobian of a Gaussian prior's denoiser. The proposal is
  the product of the chain's Gaussian and this one, normalized; the integral of the product,
  :math:`\mathcal{N}(r; 0, M)`, is the twist before the step, and by Bayes' rule

  .. math:: \log \frac{p}{q} = \log \mathcal{N}(r; 0, M) - \log \mathcal{N}(r; G (x_s - \mu), S).

  For a Gaussian prior the weights stay equal up to the discretization error. No vector-Jacobian
  product of the network is needed. Guided proposals keep the chain's standard deviation even
  where observations are more precise, so that each observed value adds variance to the weights.
  But they use the network's own Jacobian, which on a curve is far from a Gaussian's.

References:
    | Wu et al., *Practical and asymptotically exact conditional sampling in diffusion models*
      (TDS), NeurIPS 2023, arXiv 2306.17775.
    | Doucet, Godsill, Andrieu, *On sequential Monte Carlo sampling methods for Bayesian
      filtering*, Statistics and Computing 2000 (the proposal that looks ahead).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from numpyro_diffprior.diffusion.samplers import Levels, Sampler
from numpyro_diffprior.guidance.guidance import Guided, GuidedDenoiser, SolveStats
from numpyro_diffprior.guidance.look_ahead import LookAhead
from numpyro_diffprior.linalg.batched import gather

__all__ = ["Evaluation", "Particles", "Proposal", "propose"]


class Particles(NamedTuple):
    """Particles between two steps, with shape ``(num_particles, *batch, *event)``.

    Attributes:
        x_t: The particles.
        x_hat: The prior's denoised means at the previous level, for multistep samplers.
        x_hat_y: The guided denoised means there.
    """

    x_t: jax.Array
    x_hat: jax.Array
    x_hat_y: jax.Array


@dataclass(frozen=True, eq=False)
class Proposal(ABC):
    r"""A Gaussian proposal for the next level, and the transition of the prior's chain.

    Attributes:
        mean: The chain's mean :math:`\mu`, with shape ``(num_particles, *batch, *event)``.
        tau: Its standard deviation, a scalar.
        log_twist: The approximate :math:`\log p(y \mid x_t)`, with shape
            ``(num_particles, *batch)``.
    """

    mean: jax.Array
    tau: jax.Array
    log_twist: jax.Array

    def take(self, index: jax.Array) -> Self:
        """Return the proposals of the chosen particles, by indices of shape ``(n, *batch)``."""
        mean, log_twist = gather(self.mean, index), gather(self.log_twist, index)
        return replace(self, mean=mean, log_twist=log_twist)

    @abstractmethod
    def draw(self, rng_key: jax.Array) -> jax.Array:
        """Draw the next level's particles, with the shape of ``mean``."""

    @abstractmethod
    def log_ratio(self, x_s: jax.Array) -> jax.Array:
        """Return the chain's minus the proposal's log-density, ``(num_particles, *batch)``."""


@dataclass(frozen=True, eq=False)
class _GuidedProposal(Proposal):
    r"""The chain's Gaussian, shifted by :math:`(\mu_y - \mu) / \tau` (``shift``)."""

    shift: jax.Array

    def take(self, index: jax.Array) -> Self:
        return replace(super().take(index), shift=gather(self.shift, index))

    def draw(self, rng_key: jax.Array) -> jax.Array:
        noise = jax.random.normal(rng_key, self.mean.shape, self.mean.dtype)
        return self.mean + self.tau * (self.shift + noise)

    def log_ratio(self, x_s: jax.Array) -> jax.Array:
        noise = (x_s - self.mean) / self.tau - self.shift
        axes = tuple(range(self.log_twist.ndim, x_s.ndim))
        return -jnp.sum(self.shift * (noise + self.shift / 2), axis=axes)


@dataclass(frozen=True, eq=False)
class _LookAheadProposal(Proposal):
    """The product of the chain's Gaussian and that of a `LookAhead`."""

    observed: LookAhead

    def take(self, index: jax.Array) -> Self:
        return replace(super().take(index), observed=self.observed.take(index))

    def draw(self, rng_key: jax.Array) -> jax.Array:
        return self.mean + self.observed.draw(rng_key).reshape(self.mean.shape)

    def log_ratio(self, x_s: jax.Array) -> jax.Array:
        step = (x_s - self.mean).reshape(*self.log_twist.shape, -1)
        return self.log_twist - self.observed.log_prob(step)


class Evaluation(NamedTuple):
    """The result of evaluating the denoiser at one noise level.

    Attributes:
        proposal: The proposal for the next level.
        x_hat: The prior's means, with shape ``(num_particles, *batch, *event)``.
        x_hat_y: The guided means, with the same shape; ``x_hat`` if particles look ahead instead.
        stats: The statistics of guidance's solve, with shapes ``(num_particles, *batch)``.
    """

    proposal: Proposal
    x_hat: jax.Array
    x_hat_y: jax.Array
    stats: SolveStats


def propose(
    posterior: GuidedDenoiser, sampler: Sampler, previous: Particles, levels: Levels
) -> Evaluation:
    """Evaluate the denoiser at ``previous.x_t`` and return the proposal from there."""
    if posterior.looks_ahead:
        x_hat = posterior.prior(previous.x_t, levels.current)
        x_tilde = sampler.extrapolate(x_hat, previous.x_hat, levels)
        mean, tau = sampler.transition(previous.x_t, x_tilde, levels)
        observed = posterior.look_ahead(x_hat, levels.following, tau)
        proposal = _LookAheadProposal(mean, tau, observed.log_twist, observed)
        return Evaluation(
            proposal=proposal,
            x_hat=x_hat,
            x_hat_y=x_hat,
            stats=SolveStats.of(jnp.zeros_like(proposal.log_twist)),
        )
    guided = _replace_non_finite(posterior.guide(previous.x_t, levels.current, previous.x_hat_y))
    x_tilde = sampler.extrapolate(guided.x_hat, previous.x_hat, levels)
    x_tilde_y = sampler.extrapolate(guided.x_hat_y, previous.x_hat_y, levels)
    mean, tau = sampler.transition(previous.x_t, x_tilde, levels)
    mean_y, _ = sampler.transition(previous.x_t, x_tilde_y, levels)
    shift = (mean_y - mean) / tau
    return Evaluation(
        proposal=_GuidedProposal(mean, tau, guided.log_twist, shift),
        x_hat=guided.x_hat,
        x_hat_y=guided.x_hat_y,
        stats=guided.stats,
    )


def _replace_non_finite(guided: Guided) -> Guided:
    """Replace guidance that is not finite, so that its particles follow the prior's chain.

    Their log-twist becomes the largest of their system minus `_HANDICAP`. They are kept because
    the log-density of the event may be finite even if that at the denoised mean is not. Any
    positive function of all particles of a system is a valid twist, since the weights of the next
    level are divided by it.
    """
    event_axes = tuple(range(guided.log_twist.ndim, guided.x_hat.ndim))
    works = jnp.isfinite(guided.x_hat_y).all(event_axes) & jnp.isfinite(guided.log_twist)
    largest = jnp.where(works, guided.log_twist, -jnp.inf).max(0)
    low = jnp.where(jnp.isfinite(largest), largest - _HANDICAP, 0)
    return guided._replace(
        x_hat_y=jnp.where(jnp.expand_dims(works, event_axes), guided.x_hat_y, guided.x_hat),
        log_twist=jnp.where(works, guided.log_twist, low),
    )


_HANDICAP = 2.0  # a factor of about seven below the largest twist
