r"""Systems of particles: weights, resampling, and what is known of the draws."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.particles.proposals import Cloud, Step, take

__all__ = [
    "Draws",
    "Progress",
    "Settings",
    "ancestors",
    "assess",
    "begin",
    "discard_nan",
    "finish",
    "watch",
]


class Draws(NamedTuple):
    """Independent draws of a batch of events, with what is known of their quality.

    Attributes:
        x: Events, with shape ``(*batch, *event)``.
        residual: The largest relative residual of guidance's solves along the path (of samplers of
            several evaluations per step, at its end), ``(*batch,)``.
        num_truncated: The largest number of directions that guidance left out, likewise.
        ess: The lowest effective number of particles along the path, likewise.
        num_resamplings: How often the particles were resampled, likewise.
        log_evidence: The estimate of the log-density of the event's observations, likewise; NaN
            with one particle.
        chi_square: The mean squared residual of the draw in deviations of the noise, likewise
            (see `Likelihood.chi_square`): near one where guidance has worked.
        ess_path: The effective number of particles at every noise level before resampling, the
            exact weights last, with shape ``(*batch, num_steps)``.
    """

    x: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array
    chi_square: jax.Array
    ess_path: jax.Array

    @property
    def stats(self) -> dict[str, jax.Array]:
        """All but the draws themselves, by name."""
        return {name: value for name, value in self._asdict().items() if name != "x"}


class Settings(NamedTuple):
    """How posterior draws are made; static when compiled.

    Attributes:
        num_particles: Particles per draw; one is plain guided sampling.
        sampler: The sampler.
        guidance: The guidance.
        independent: Whether every draw has a particle system of its own; otherwise each system
            gives as many draws as it has particles.
    """

    num_particles: int
    sampler: Sampler
    guidance: Guidance
    independent: bool = True


class Progress(NamedTuple):
    """What a particle sampler carries from level to level.

    Attributes:
        cloud: The particles.
        log_weight: Their weights, without the twist at the level of ``cloud.x_t``, with shape
            ``(num_particles, *batch)``.
        stats: Draws that lack the event and the effective numbers, of shape ``(*batch,)``.
    """

    cloud: Cloud
    log_weight: jax.Array
    stats: Draws


def begin(x_t: jax.Array, event_ndim: int) -> Progress:
    """Return the start of a particle sampler, with ``x_t`` at the first level."""
    log_weight = jnp.zeros(x_t.shape[: x_t.ndim - event_ndim], x_t.dtype)
    zeros, zero = jnp.zeros_like(log_weight[0]), jnp.zeros_like(x_t)
    count = zeros.astype(int)
    stats = Draws(zeros, zeros, count, zeros, count, zeros, zeros, zeros)
    return Progress(Cloud(x_t, zero, zero), log_weight, stats)


def watch(stats: Draws, step: Step) -> Draws:
    """Keep the worst of guidance's solves."""
    return stats._replace(
        residual=jnp.maximum(stats.residual, step.residual.max(0)),
        num_truncated=jnp.maximum(stats.num_truncated, step.num_truncated.max(0)),
    )


def assess(stats: Draws, log_weight: jax.Array) -> tuple[jax.Array, jax.Array, Draws]:
    """Return which systems to resample: those with fewer than half of their particles effective.

    Behind them, the effective number of particles of each system.
    """
    ess = effective_sample_size(log_weight)
    degenerate = ess < len(log_weight) / 2
    return (
        degenerate,
        ess,
        stats._replace(
            num_resamplings=stats.num_resamplings + degenerate,
            log_evidence=stats.log_evidence + jnp.where(degenerate, log_mean_exp(log_weight), 0),
        ),
    )


def finish(
    stats: Draws,
    likelihood: Likelihood,
    x: jax.Array,
    log_weight: jax.Array,
    chosen: jax.Array,
    ess: jax.Array,
) -> Draws:
    """Return the draws: of each system's last events, weighed exactly, the chosen one.

    ``ess`` has the effective numbers of particles at the levels before, ``(num_levels, *batch)``.
    """
    draw = take(x, chosen[None])[0]
    ess = jnp.concatenate([ess, effective_sample_size(log_weight)[None]])
    log_evidence = stats.log_evidence + log_mean_exp(log_weight)
    return stats._replace(
        x=draw,
        # No particle of a system without weight can have made what was observed.
        chi_square=jnp.where(jnp.isneginf(log_evidence), jnp.inf, likelihood.chi_square(draw)),
        ess=ess.min(0),
        ess_path=jnp.moveaxis(ess, 0, -1),
        log_evidence=log_evidence,
    )


def discard_nan(log_weight: jax.Array) -> jax.Array:
    """Give no weight to particles whose weight is not a number."""
    return jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)


def ancestors(degenerate: jax.Array, resampled: jax.Array) -> jax.Array:
    """Return each particle's ancestor: itself, in systems that are not resampled."""
    identity = jnp.arange(len(resampled)).reshape(-1, *(1,) * degenerate.ndim)
    return jnp.where(degenerate, resampled, identity)


def systematic(rng_key: jax.Array, log_weight: jax.Array) -> jax.Array:
    """Return ancestors by systematic resampling along the first axis, one offset per system."""
    num_particles = log_weight.shape[0]
    cumulative = jnp.cumsum(jax.nn.softmax(log_weight, axis=0), axis=0)
    offset = jax.random.uniform(rng_key, log_weight.shape[1:], log_weight.dtype)
    grid = jnp.arange(num_particles).reshape(-1, *(1,) * offset.ndim)
    positions = (grid + offset) / num_particles
    index = jax.vmap(lambda position: jnp.sum(cumulative < position, axis=0))(positions)
    return jnp.minimum(index, num_particles - 1)


def effective_sample_size(log_weight: jax.Array) -> jax.Array:
    """Return the effective number of particles of each system."""
    return 1 / jnp.sum(jax.nn.softmax(log_weight, axis=0) ** 2, axis=0)


def log_mean_exp(log_weight: jax.Array) -> jax.Array:
    """Return the logarithm of the mean weight of each system."""
    return jax.nn.logsumexp(log_weight, axis=0) - jnp.log(log_weight.shape[0])
