"""Particle systems: weights, resampling and the statistics of draws."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.diffusion.samplers import Levels, Sampler
from numpyro_diffprior.guidance.guidance import Guidance, GuidedDenoiser, SolveStats
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.linalg.batched import gather
from numpyro_diffprior.particles.proposals import Evaluation, Particles, Proposal, propose

__all__ = [
    "Draws",
    "ParticleInfo",
    "Policy",
    "SamplingOptions",
    "StepInfo",
    "System",
    "advance",
    "discard_nan",
    "effective_sample_size",
    "finish",
    "log_mean_exp",
    "resample",
    "start",
    "systematic",
]


class ParticleInfo(NamedTuple):
    """Statistics of posterior draws, with the draws' batch shape.

    Attributes:
        residual: The largest relative residual of guidance's solves along the path (that of its
            end alone for samplers with several evaluations per step).
        num_truncated: The largest number of directions that guidance left out.
        num_solver_steps: The number of steps of conjugate gradients along the path (at its end
            alone for samplers with several evaluations per step), the mean over the particles.
        ess: The smallest effective sample size along the path.
        num_resamplings: The number of resamplings of the particles.
        log_evidence: The estimated log-density of the event's observations; NaN with one
            particle. The estimate of the density is biased if a path is retained.
        reduced_chi_square: The mean squared residual of the draw in units of the noise (see
            `Likelihood.reduced_chi_square`); near one if guidance succeeded.
        ess_path: The effective sample size at every noise level before resampling, with shape
            ``(*batch, num_steps)``; the last one is that of the exact weights.
    """

    residual: jax.Array
    num_truncated: jax.Array
    num_solver_steps: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array
    reduced_chi_square: jax.Array
    ess_path: jax.Array

    @classmethod
    def zeros(
        cls, batch_shape: tuple[int, ...], num_steps: int, dtype: jax.typing.DTypeLike
    ) -> "ParticleInfo":
        """Return statistics of zero, for events that were not drawn."""
        zeros, count = jnp.zeros(batch_shape, dtype), jnp.zeros(batch_shape, int)
        path = jnp.zeros((*batch_shape, num_steps), dtype)
        return cls(
            residual=zeros,
            num_truncated=count,
            num_solver_steps=zeros,
            ess=zeros,
            num_resamplings=count,
            log_evidence=zeros,
            reduced_chi_square=zeros,
            ess_path=path,
        )


class Draws(NamedTuple):
    """Draws of a batch of events.

    Attributes:
        x: Events, with shape ``(*batch, *event)``.
        info: Their statistics.
    """

    x: jax.Array
    info: ParticleInfo


class SamplingOptions(NamedTuple):
    """The options of posterior sampling; static under `jax.jit`.

    Attributes:
        num_particles: Particles per draw; one is plain guided sampling.
        sampler: The sampler.
        guidance: The guidance.
        independent: Whether every draw has a particle system of its own; otherwise each system
            yields as many draws as it has particles.
    """

    num_particles: int
    sampler: Sampler
    guidance: Guidance
    independent: bool = True


class System(NamedTuple):
    """The state of particle systems between two steps.

    Attributes:
        particles: The particles.
        log_weight: Their log-weights, without the twist at the level of ``particles.x_t``, with
            shape ``(num_particles, *batch)``.
        stats: The statistics of guidance's solves so far, with shapes ``(*batch,)``.
        num_resamplings: The number of resamplings, ``(*batch,)``.
        log_evidence: The log of the product of mean weights at resamplings, ``(*batch,)``.
    """

    particles: Particles
    log_weight: jax.Array
    stats: SolveStats
    num_resamplings: jax.Array
    log_evidence: jax.Array


class StepInfo(NamedTuple):
    """The result of one step.

    Attributes:
        x_s: The particles at the next level, with shape ``(num_particles, *batch, *event)``.
        ancestor: Their ancestors, with shape ``(num_particles, *batch)``.
        ess: The effective sample size before resampling, with shape ``(*batch,)``.
    """

    x_s: jax.Array
    ancestor: jax.Array
    ess: jax.Array


Policy = Callable[[jax.Array, Evaluation, System, jax.Array], tuple[jax.Array, jax.Array | None]]
"""An ancestor policy. It maps a key, the evaluation, the system and the particles' log-weights to
the ancestors of all particles, with shape ``(num_particles, *batch)``, and to the new position of
the first particle, or None to draw it like the others."""


def start(x_t: jax.Array, event_ndim: int) -> System:
    """Return particle systems at the first noise level."""
    log_weight = jnp.zeros(x_t.shape[: x_t.ndim - event_ndim], x_t.dtype)
    zeros, zero = jnp.zeros_like(log_weight[0]), jnp.zeros_like(x_t)
    count = zeros.astype(int)
    return System(
        particles=Particles(x_t, zero, zero),
        log_weight=log_weight,
        stats=SolveStats.of(zeros),
        num_resamplings=count,
        log_evidence=zeros,
    )


def advance(
    rng_key: jax.Array,
    posterior: GuidedDenoiser,
    sampler: Sampler,
    system: System,
    levels: Levels,
    policy: Policy,
) -> tuple[System, StepInfo]:
    """Move particle systems one noise level down.

    A system is resampled if its effective sample size is below half the number of its particles.

    Args:
        rng_key: A random key.
        posterior: The denoiser of the posterior.
        sampler: The sampler whose chain the particles follow.
        system: The systems.
        levels: The noise levels.
        policy: The choice of ancestors where particles are resampled.
    """
    key_policy, key_move = jax.random.split(rng_key)
    evaluation = propose(posterior, sampler, system.particles, levels)
    log_weight = system.log_weight + evaluation.proposal.log_twist
    ess = effective_sample_size(log_weight)
    degenerate = ess < len(log_weight) / 2
    chosen, retained = policy(key_policy, evaluation, system, log_weight)
    identity = jnp.arange(len(chosen)).reshape(-1, *(1,) * degenerate.ndim)
    index = jnp.where(degenerate, chosen, identity)
    proposal: Proposal = evaluation.proposal.take(index)
    x_s = proposal.draw(key_move)
    if retained is not None:
        x_s = x_s.at[0].set(retained)
    # Resampling makes the weights equal; the evidence keeps their mean.
    remaining = jnp.where(degenerate, 0, log_weight)
    log_mean = jnp.where(degenerate, log_mean_exp(log_weight), 0)
    return System(
        particles=Particles(
            x_s, gather(evaluation.x_hat, index), gather(evaluation.x_hat_y, index)
        ),
        log_weight=discard_nan(remaining + proposal.log_ratio(x_s) - proposal.log_twist),
        stats=system.stats.then(evaluation.stats.over_particles()),
        num_resamplings=system.num_resamplings + degenerate,
        log_evidence=system.log_evidence + log_mean,
    ), StepInfo(x_s, index, ess)


def finish(
    system: System,
    likelihood: Likelihood,
    x: jax.Array,
    log_weight: jax.Array,
    chosen: jax.Array,
    ess: jax.Array,
) -> Draws:
    """Return the chosen event of each system and its statistics.

    Args:
        system: The systems at the last noise level.
        likelihood: The likelihood.
        x: Their events, with shape ``(num_particles, *batch, *event)``.
        log_weight: The exact weights, with shape ``(num_particles, *batch)``.
        chosen: The chosen particles, with shape ``(*batch,)``.
        ess: The effective sample sizes at the earlier levels, ``(num_levels, *batch)``.
    """
    draw = gather(x, chosen[None])[0]
    ess = jnp.concatenate([ess, effective_sample_size(log_weight)[None]])
    log_evidence = system.log_evidence + log_mean_exp(log_weight)
    # If all weights of a system are zero, no particle explains the observations.
    misfit = jnp.where(jnp.isneginf(log_evidence), jnp.inf, likelihood.reduced_chi_square(draw))
    return Draws(
        draw,
        ParticleInfo(
            residual=system.stats.residual,
            num_truncated=system.stats.num_truncated,
            num_solver_steps=system.stats.num_steps,
            ess=ess.min(0),
            num_resamplings=system.num_resamplings,
            log_evidence=log_evidence,
            reduced_chi_square=misfit,
            ess_path=jnp.moveaxis(ess, 0, -1),
        ),
    )


def resample(
    rng_key: jax.Array, evaluation: Evaluation, system: System, log_weight: jax.Array
) -> tuple[jax.Array, None]:
    """Resample systematically: the ancestor policy of the twisted SMC."""
    return systematic(rng_key, log_weight), None


def systematic(rng_key: jax.Array, log_weight: jax.Array) -> jax.Array:
    """Return ancestors by systematic resampling along the first axis, one offset per system."""
    num_particles = log_weight.shape[0]
    cumulative = jnp.cumsum(jax.nn.softmax(log_weight, axis=0), axis=0)
    offset = jax.random.uniform(rng_key, log_weight.shape[1:], log_weight.dtype)
    grid = jnp.arange(num_particles).reshape(-1, *(1,) * offset.ndim)
    positions = (grid + offset) / num_particles
    index = jax.vmap(lambda position: jnp.sum(cumulative < position, axis=0))(positions)
    return jnp.minimum(index, num_particles - 1)


def discard_nan(log_weight: jax.Array) -> jax.Array:
    """Give zero weight to particles whose weight is NaN."""
    return jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)


def effective_sample_size(log_weight: jax.Array) -> jax.Array:
    """Return the effective sample size of each system."""
    return 1 / jnp.sum(jax.nn.softmax(log_weight, axis=0) ** 2, axis=0)


def log_mean_exp(log_weight: jax.Array) -> jax.Array:
    """Return the logarithm of the mean weight of each system."""
    return jax.nn.logsumexp(log_weight, axis=0) - jnp.log(log_weight.shape[0])
