r"""Posterior draws as arrays, by guided sampling or by the twisted SMC that corrects it.

With one particle, a sampler runs on the posterior's denoiser: guided sampling (MMPS of arXiv
2405.13712). With :math:`K > 1` particles per draw, a sequential Monte Carlo sampler is run; its
target at each noise level is the prior's chain times a *twist* :math:`\psi_t`, a moment-matched
:math:`p(y \mid x_t)`. Its proposal :math:`q` (`numpyro_diffprior.particles.proposals`) depends on
the observations, and the weight of a step has a closed form,

.. math:: \log w_s = \log \frac{\psi_s(x_s)}{\psi_t(x_t)}
    + \log \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)},

and the last weight is the exact likelihood of the user's sites. Any positive twist leaves the
limit of many particles exact; the product of mean weights is an unbiased estimate of the evidence
:math:`p(y)` under the prior that the chain samples. Every element of a plate has particle systems
of its own.

References:
    | Wu et al., *Practical and asymptotically exact conditional sampling in diffusion models*
      (TDS), NeurIPS 2023, arXiv 2306.17775.
    | Rozet et al., NeurIPS 2024, arXiv 2405.13712.
"""

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.diffusion.samplers import Levels, Sampler
from numpyro_diffprior.guidance.guidance import GuidedDenoiser, SolveStats
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.particles.system import (
    Draws,
    ParticleInfo,
    SamplingOptions,
    System,
    advance,
    discard_nan,
    finish,
    resample,
    start,
    systematic,
)

__all__ = ["draw_posterior"]


def draw_posterior(
    rng_key: jax.Array,
    denoiser: Denoiser,
    likelihood: Likelihood,
    options: SamplingOptions,
    num_draws: int = 1,
) -> Draws:
    """Draw from the posterior of every event of a likelihood; traceable.

    Args:
        rng_key: A random key.
        denoiser: The prior.
        likelihood: The likelihood.
        options: The options of sampling.
        num_draws: The number of draws per event, made at once.

    Returns:
        Draws whose arrays have the leading shape ``(num_draws, *batch)``.
    """
    posterior = options.guidance.condition(denoiser, likelihood)
    num_systems = num_draws if options.independent else -(-num_draws // options.num_particles)
    batch_shape = (num_systems, *likelihood.batch_shape)
    key_init, key_run = jax.random.split(rng_key)
    sampler, num_particles = options.sampler, options.num_particles
    x_t = sampler.initial(key_init, denoiser, (num_particles, *batch_shape))
    if num_particles > 1:
        return _twisted_smc(key_run, posterior, options, x_t, num_draws)
    x_t = x_t[0]
    if sampler.eta == 0:
        x_t = x_t + _initial_shift(posterior, sampler)
    if sampler.is_single_evaluation:
        return _guided_walk(key_run, posterior, sampler, x_t)
    x = sampler.run(key_run, posterior, x_t)
    last = posterior.guide(x, sampler.sigmas(posterior)[-1])
    return _single_draws(posterior, sampler, x, last.stats)


def _initial_shift(posterior: GuidedDenoiser, sampler: Sampler) -> jax.Array:
    """Return the posterior's minus the prior's mean at ``sigma_max``, ``(*batch, *event)``.

    A deterministic sampler does not forget its start: started at the prior's mean, it would miss
    the posterior's mean by this shift times the posterior's standard deviation over ``sigma_max``.
    """
    location = posterior.prior.initial_mean(posterior.likelihood.batch_shape)
    return posterior(location, sampler.sigmas(posterior)[0]) - location


def _guided_walk(
    rng_key: jax.Array, posterior: GuidedDenoiser, sampler: Sampler, x_t: jax.Array
) -> Draws:
    """Run the sampler once per draw, and record the statistics of guidance's solves.

    The evaluation at the last level is one more step of the scan, whose transition is discarded:
    the network is compiled once.
    """

    def body(
        carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, Levels]
    ) -> tuple[tuple[jax.Array, jax.Array], SolveStats]:
        (x_t, x_hat_prev), (key, levels) = carry, inputs
        guided = posterior.guide(x_t, levels.current, x_hat_prev)
        x_tilde = sampler.extrapolate(guided.x_hat_y, x_hat_prev, levels)
        x_s, tau = sampler.transition(x_t, x_tilde, levels)
        if sampler.eta > 0:
            x_s = x_s + tau * jax.random.normal(key, x_t.shape, x_t.dtype)
        return (x_s, guided.x_hat_y), guided.stats

    levels = sampler.levels_and_last(posterior)
    keys = jax.random.split(rng_key, sampler.num_steps)
    first = x_t, jnp.zeros_like(x_t)
    (_, x), stats = jax.lax.scan(body, first, (keys, levels))
    return _single_draws(posterior, sampler, x, stats.over_path())


def _single_draws(
    posterior: GuidedDenoiser, sampler: Sampler, x: jax.Array, stats: SolveStats
) -> Draws:
    """Return draws of one particle and their statistics."""
    residual = stats.residual
    info = ParticleInfo(
        residual=residual,
        num_truncated=stats.num_truncated,
        num_solver_steps=stats.num_steps,
        ess=jnp.ones_like(residual),
        num_resamplings=jnp.zeros_like(stats.num_truncated),
        log_evidence=jnp.full_like(residual, jnp.nan),
        reduced_chi_square=posterior.likelihood.reduced_chi_square(x),
        ess_path=jnp.ones((*residual.shape, sampler.num_steps), residual.dtype),
    )
    return Draws(x, info)


def _twisted_smc(
    rng_key: jax.Array,
    posterior: GuidedDenoiser,
    options: SamplingOptions,
    x_t: jax.Array,
    num_draws: int,
) -> Draws:
    sampler = options.sampler

    def body(system: System, inputs: tuple[jax.Array, Levels]) -> tuple[System, jax.Array]:
        key, levels = inputs
        system, info = advance(key, posterior, sampler, system, levels, resample)
        return system, info.ess

    levels = sampler.levels(posterior)
    keys = jax.random.split(rng_key, sampler.num_steps)
    first = start(x_t, len(posterior.event_shape))
    system, ess = jax.lax.scan(body, first, (keys[1:], levels))
    x = posterior.prior(system.particles.x_t, levels.following[-1])
    log_weight = discard_nan(system.log_weight + posterior.likelihood.log_prob(x))

    def choose(chosen: jax.Array) -> Draws:
        return finish(system, posterior.likelihood, x, log_weight, chosen, ess)

    if options.independent:
        return choose(jax.random.categorical(keys[0], log_weight, axis=0))
    key_index, key_order = jax.random.split(keys[0])
    index = jax.random.permutation(key_order, systematic(key_index, log_weight))
    draws = jax.vmap(choose)(index)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_draws], draws)
