r"""Conditional SMC: a Markov kernel on paths that leaves the posterior invariant.

A *path* is a draw :math:`x_{\sigma_{max}}, \ldots, x_{\sigma_{min}}` of a stochastic sampler's
chain, which ends in the event :math:`x = D(x_{\sigma_{min}}, \sigma_{min})`. The prior's chain and
the exact likelihood of :math:`x` define a posterior of paths. An update runs the twisted SMC
(`numpyro_diffprior.particles.smc`) with the current path retained as one of the particles, which
leaves this posterior invariant for any number of particles from two on. Where particles are
resampled, the retained path gets a new ancestor (ancestor sampling), so that few particles are
enough to move it at all noise levels.

The chain of a multistep sampler also depends on the previous denoised mean, so that two
transitions of the retained path weight its ancestor,

.. math:: w^i \, p(x_s \mid x_t^i, \hat x_{prev}^i) \, p(x_r \mid x_s, \hat x_t^i),
    \quad r < s < t.

References:
    | Andrieu, Doucet, Holenstein, *Particle Markov chain Monte Carlo methods*, JRSS B 72, 2010.
    | Lindsten, Jordan, Schön, *Particle Gibbs with ancestor sampling*, JMLR 15, 2014, arXiv
      1401.0604 (section 4 for chains with a memory).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.diffusion.samplers import Levels, Sampler
from numpyro_diffprior.guidance.guidance import GuidedDenoiser
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.linalg.batched import einsum, gather
from numpyro_diffprior.particles.proposals import Evaluation
from numpyro_diffprior.particles.system import (
    Draws,
    Policy,
    SamplingOptions,
    StepInfo,
    System,
    advance,
    discard_nan,
    finish,
    start,
)

__all__ = ["PathDraw", "diffuse_path", "update_path"]


class PathDraw(NamedTuple):
    """A path, its event and the statistics of the update.

    Attributes:
        path: The events at all noise levels, with shape ``(num_steps, *batch, *event)``.
        draws: The event and the statistics; arrays of shape ``(*batch, ...)``. The evidence is
            not unbiased, since one particle is retained.
        updated: The fraction of the noise levels at which the path changed, with shape
            ``(*batch,)``.
    """

    path: jax.Array
    draws: Draws
    updated: jax.Array


def diffuse_path(
    rng_key: jax.Array, denoiser: Denoiser, sampler: Sampler, x: jax.Array
) -> jax.Array:
    """Return an initial path, ``(num_steps, *batch, *event)``: events with growing noise.

    Args:
        rng_key: A random key.
        denoiser: The denoiser of prior or posterior, which sets the last noise level.
        sampler: The sampler whose noise levels the path has.
        x: Events, with shape ``(*batch, *event)``.
    """
    sigmas = sampler.sigmas(denoiser)
    increments = jnp.sqrt(jnp.diff(sigmas[::-1] ** 2, prepend=0))
    noise = jax.random.normal(rng_key, (sampler.num_steps, *x.shape), x.dtype)
    return x + jnp.cumsum(einsum("t,t...->t...", increments, noise), axis=0)[::-1]


def update_path(
    rng_key: jax.Array,
    denoiser: Denoiser,
    likelihood: Likelihood,
    options: SamplingOptions,
    path: jax.Array,
) -> PathDraw:
    """Update every event's path by conditional SMC; traceable.

    Args:
        rng_key: A random key.
        denoiser: The prior.
        likelihood: The likelihood.
        options: The options of sampling: at least two particles, and a stochastic sampler with
            one evaluation per step.
        path: The retained path, with shape ``(num_steps, *batch, *event)``.
    """
    posterior = options.guidance.condition(denoiser, likelihood)
    sampler, num_particles = options.sampler, options.num_particles
    key_init, key_scan, key_last = jax.random.split(rng_key, 3)
    batch_shape = likelihood.batch_shape
    free = sampler.initial(key_init, denoiser, (num_particles - 1, *batch_shape))
    x_t = jnp.concatenate([path[:1], free])
    levels = sampler.levels(posterior)
    sigmas = sampler.sigmas(posterior)
    x_hats = jax.lax.map(lambda inputs: denoiser(*inputs), (path[1:], sigmas[1:]))
    # There is no transition from the last level, so that its entries are unused padding.
    ahead = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:], leaf[-1:]]), levels)
    futures = _Future(
        x_s=path[1:],
        x_hat_s=x_hats,
        x_r=jnp.concatenate([path[2:], path[-1:]]),
        levels=ahead,
        has_second=jnp.arange(sampler.num_steps - 1) < sampler.num_steps - 2,
    )

    def body(system: System, inputs: tuple[jax.Array, Levels, _Future]) -> tuple[System, StepInfo]:
        key, level, future = inputs
        policy = _ancestor_sampling(posterior, sampler, future)
        return advance(key, posterior, sampler, system, level, policy)

    keys = jax.random.split(key_scan, sampler.num_steps - 1)
    first = start(x_t, len(denoiser.event_shape))
    system, steps = jax.lax.scan(body, first, (keys, levels, futures))
    x = denoiser(system.particles.x_t, sigmas[-1])
    log_weight = discard_nan(system.log_weight + likelihood.log_prob(x))
    chosen = jax.random.categorical(key_last, log_weight, axis=0)

    def trace_back(index: jax.Array, info: StepInfo) -> tuple[jax.Array, jax.Array]:
        return gather(info.ancestor, index[None])[0], gather(info.x_s, index[None])[0]

    origin, rest = jax.lax.scan(trace_back, chosen, steps, reverse=True)
    new_path = jnp.concatenate([gather(x_t, origin[None]), rest])
    event_axes = tuple(range(-len(denoiser.event_shape), 0))
    updated = jnp.mean(jnp.any(new_path != path, axis=event_axes), axis=0)
    draws = finish(system, likelihood, x, log_weight, chosen, steps.ess)
    return PathDraw(new_path, draws, updated.astype(x_t.dtype))


class _Future(NamedTuple):
    """The retained path at the next two levels, s and r.

    Attributes:
        x_s: The path at s, with shape ``(*batch, *event)``.
        x_hat_s: The prior's denoised mean there.
        x_r: The path at r; unused if there is no such level.
        levels: The noise levels of the step from s to r.
        has_second: Whether there is a level r.
    """

    x_s: jax.Array
    x_hat_s: jax.Array
    x_r: jax.Array
    levels: Levels
    has_second: jax.Array


def _ancestor_sampling(posterior: GuidedDenoiser, sampler: Sampler, future: _Future) -> Policy:
    """Return the policy that draws a new ancestor of the retained path (ancestor sampling)."""
    event_axes = tuple(range(-len(posterior.event_shape), 0))

    def log_transition(x: jax.Array, mean: jax.Array, tau: jax.Array) -> jax.Array:
        return -0.5 * jnp.sum(((x - mean) / tau) ** 2, axis=event_axes)

    def policy(
        rng_key: jax.Array, evaluation: Evaluation, system: System, log_weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        key_free, key_past = jax.random.split(rng_key)
        x_tilde = sampler.extrapolate(future.x_hat_s, evaluation.x_hat, future.levels)
        mean_r, tau_r = sampler.transition(future.x_s, x_tilde, future.levels)
        mean, tau = evaluation.proposal.mean, evaluation.proposal.tau
        log_past = system.log_weight + log_transition(future.x_s, mean, tau)
        # Without extrapolation this factor is the same for all ancestors.
        log_past += jnp.where(future.has_second, log_transition(future.x_r, mean_r, tau_r), 0)
        shape = (len(log_weight) - 1, *log_weight.shape[1:])
        free = jax.random.categorical(key_free, log_weight, axis=0, shape=shape)
        past = jax.random.categorical(key_past, discard_nan(log_past), axis=0)
        return jnp.concatenate([past[None], free]), future.x_s

    return policy
