r"""Evidence: how probable a prior makes the observations.

The twisted SMC estimates :math:`p(y)` of every event without bias (`numpyro_diffprior.smc`), under
the prior that the sampler draws. Independent estimates are averaged; their spread gives the error.
The logarithm of an average is too low on average, by half of its squared error.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.distributions import DiffusionPrior
from numpyro_diffprior.guidance import Guidance
from numpyro_diffprior.introspect import Model
from numpyro_diffprior.posterior import sample_posterior
from numpyro_diffprior.samplers import Sampler

__all__ = ["LogEvidence", "log_evidence"]


class LogEvidence(NamedTuple):
    r"""Log-evidences of independent events, which add up.

    Attributes:
        value: The estimates of :math:`\log p(y)`, with the shape of the plates.
        standard_error: Their standard errors, likewise.
    """

    value: jax.Array
    standard_error: jax.Array

    @property
    def total(self) -> jax.Array:
        """The log-evidence of all events."""
        return jnp.sum(self.value)

    @property
    def total_standard_error(self) -> jax.Array:
        """The standard error of `total`."""
        return jnp.sqrt(jnp.sum(self.standard_error**2))


def log_evidence(
    rng_key: jax.Array,
    model: Model,
    prior: DiffusionPrior,
    *args: Any,
    num_estimates: int = 4,
    num_particles: int = 16,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    max_batch_size: int = 256,
    **kwargs: Any,
) -> LogEvidence:
    r"""Estimate :math:`\log p(y)` for every event of the plate of a model's diffusion site.

    Args:
        rng_key: A random key.
        model: A NumPyro model; its observed sites are the likelihood.
        prior: The model's first argument.
        *args: The model's other arguments.
        num_estimates: The number of independent estimates, at least two: their spread is the
            standard error.
        num_particles: Particles per estimate, at least two. The error falls with their number
            faster than with that of the estimates.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS` with the Gaussian covariance).
        max_batch_size: How many estimates are made at once; bounds the memory.
        **kwargs: The model's keyword arguments.

    Returns:
        The estimates and their standard errors. An error that is not small against one is itself
        not to be trusted: take more particles.

    Raises:
        ValueError: If there are fewer than two estimates or particles, or the model cannot be
            read; see `sample_posterior`.
    """
    for name, count in (("num_estimates", num_estimates), ("num_particles", num_particles)):
        if count < 2:
            raise ValueError(f"log_evidence: expected {name} >= 2, got {count}.")
    draws = sample_posterior(
        rng_key,
        model,
        prior,
        *args,
        num_samples=num_estimates,
        num_particles=num_particles,
        sampler=sampler,
        guidance=guidance,
        max_batch_size=max_batch_size,
        **kwargs,
    )
    estimates = draws.stats["log_evidence"]
    value = jax.nn.logsumexp(estimates, axis=0) - jnp.log(num_estimates)
    relative = jnp.exp(estimates - value)
    return LogEvidence(value, jnp.std(relative, axis=0, ddof=1) / jnp.sqrt(num_estimates))
