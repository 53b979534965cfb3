r"""Posterior draws as arrays: guided sampling, and the twisted SMC that corrects it.

One particle is plain guided sampling: a sampler walks on the posterior's denoiser (MMPS of arXiv
2405.13712). With :math:`K > 1` particles per draw, the guided walk is the proposal of a sequential
Monte Carlo sampler whose target at each noise level is the prior's chain times a *twist*, the
moment-matched :math:`\psi_t = \mathcal{N}(y; h(\hat x), S)`. Prior chain and proposal share their
deviation :math:`\tau` and noise :math:`\varepsilon`, so that a step weighs in closed form,

.. math:: \log w_s = \log \frac{\psi_s(x_s)}{\psi_t(x_t)}
    - \varepsilon \cdot \delta - \tfrac{1}{2} \lVert \delta \rVert^2, \quad
    \delta = (\mu^{guided}_s - \mu^{prior}_s) / \tau,

and the last weight is the exact likelihood of the user's sites. Any positive twist leaves the
limit of many particles exact; the product of mean weights is an unbiased estimate of the evidence
:math:`p(y)` under the prior that the chain samples. Each element of a plate, and each draw of it,
is a particle system of its own.

References:
    | Wu et al., *Practical and asymptotically exact conditional sampling in diffusion models*
      (TDS), NeurIPS 2023, arXiv 2306.17775.
    | Rozet et al., NeurIPS 2024, arXiv 2405.13712.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers import Denoiser
from numpyro_diffprior.guidance import Guidance, Guided, GuidedDenoiser
from numpyro_diffprior.likelihoods import Likelihood
from numpyro_diffprior.samplers import Levels, Sampler

__all__ = [
    "Cloud",
    "Draws",
    "Progress",
    "Proposal",
    "Settings",
    "ancestors",
    "assess",
    "begin",
    "draw_posterior",
    "finish",
    "propose",
    "take",
    "watch",
]


class Draws(NamedTuple):
    """Independent draws of a batch of events, with what is known of their quality.

    Attributes:
        x: Events, with shape ``(*batch, *event)``.
        residual: The largest relative residual of guidance's solves along the path, ``(*batch,)``.
        num_truncated: The largest number of directions that guidance left out, likewise.
        ess: The lowest effective number of particles along the path, likewise.
        num_resamplings: How often the particles were resampled, likewise.
        log_evidence: The estimate of the log-density of the event's observations, likewise.
    """

    x: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array

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
    """

    num_particles: int
    sampler: Sampler
    guidance: Guidance


def draw_posterior(
    rng_key: jax.Array,
    denoiser: Denoiser,
    likelihood: Likelihood,
    settings: Settings,
    num_draws: int = 1,
) -> Draws:
    """Make independent draws for every event of a likelihood; NumPyro-free and traceable.

    Args:
        rng_key: A random key.
        denoiser: The prior.
        likelihood: What was observed.
        settings: How the draws are made.
        num_draws: The number of draws per event, made at once.

    Returns:
        Draws whose arrays have the leading shape ``(num_draws, *batch)``.
    """
    posterior = settings.guidance.condition(denoiser, likelihood)
    batch_shape = (num_draws, *likelihood.batch_shape)
    key_init, key_run = jax.random.split(rng_key)
    x_t = settings.sampler.initial(key_init, denoiser, (settings.num_particles, *batch_shape))
    if settings.sampler.eta == 0:
        x_t = x_t + _initial_shift(posterior, settings.sampler)
    if settings.sampler.is_single:
        return _twisted_smc(key_run, posterior, settings.sampler, x_t)
    x = settings.sampler.run(key_run, posterior, x_t[0])
    last = posterior.guide(x, settings.sampler.sigmas(denoiser)[-1])
    ones = jnp.ones(batch_shape, x.dtype)
    return Draws(
        x, last.residual, last.num_truncated, ones, jnp.zeros(batch_shape, int), ones * jnp.nan
    )


def _initial_shift(posterior: GuidedDenoiser, sampler: Sampler) -> jax.Array:
    """Return how far observations move the mean, with shape ``(*batch, *event)``.

    A deterministic sampler never forgets where it started: from the prior's mean, it would end off
    the posterior's by the shift times deviation over ``sigma_max``, however many steps it takes.
    """
    shape = (*posterior.likelihood.batch_shape, *posterior.event_shape)
    mean = jnp.broadcast_to(posterior.mean, shape)
    return posterior(mean, sampler.sigmas(posterior)[0]) - mean


class Cloud(NamedTuple):
    """Particles between two steps, with shape ``(num_particles, *batch, *event)``.

    Attributes:
        x_t: The particles.
        x_hat: The prior's means at the level before, the memory of multistep samplers.
        x_hat_y: The guided means there.
    """

    x_t: jax.Array
    x_hat: jax.Array
    x_hat_y: jax.Array


class Proposal(NamedTuple):
    r"""The next level's Gaussians, of the prior's chain and of the guided one.

    Attributes:
        mean: The prior's mean, with shape ``(num_particles, *batch, *event)``.
        mean_y: The guided mean, likewise.
        tau: The deviation of both, scalar.
    """

    mean: jax.Array
    mean_y: jax.Array
    tau: jax.Array

    @property
    def shift(self) -> jax.Array:
        r"""The means' difference :math:`\delta` in deviations, shaped as they are."""
        return (self.mean_y - self.mean) / self.tau


def propose(sampler: Sampler, guided: Guided, previous: Cloud, levels: Levels) -> Proposal:
    """Return where particles go from ``previous.x_t``, at which guidance found ``guided``."""
    x_tilde = sampler.extrapolate(guided.x_hat, previous.x_hat, levels)
    x_tilde_y = sampler.extrapolate(guided.x_hat_y, previous.x_hat_y, levels)
    mean, _ = sampler.transition(previous.x_t, x_tilde, levels)
    mean_y, tau = sampler.transition(previous.x_t, x_tilde_y, levels)
    return Proposal(mean, mean_y, tau)


class Progress(NamedTuple):
    """What a particle sampler carries from level to level.

    Attributes:
        cloud: The particles.
        log_weight: Their weights, without the twist at the level of ``cloud.x_t``, with shape
            ``(num_particles, *batch)``.
        stats: Draws that lack the event, of shape ``(*batch,)``.
    """

    cloud: Cloud
    log_weight: jax.Array
    stats: Draws


def begin(x_t: jax.Array, event_ndim: int) -> Progress:
    """Return the start of a particle sampler, with ``x_t`` at the first level."""
    log_weight = jnp.zeros(x_t.shape[: x_t.ndim - event_ndim], x_t.dtype)
    zeros, zero = jnp.zeros_like(log_weight[0]), jnp.zeros_like(x_t)
    count = zeros.astype(int)
    stats = Draws(zeros, zeros, count, zeros + len(x_t), count, zeros)
    return Progress(Cloud(x_t, zero, zero), log_weight, stats)


def watch(stats: Draws, guided: Guided) -> Draws:
    """Keep the worst of guidance's solves."""
    return stats._replace(
        residual=jnp.maximum(stats.residual, guided.residual.max(0)),
        num_truncated=jnp.maximum(stats.num_truncated, guided.num_truncated.max(0)),
    )


def assess(stats: Draws, log_weight: jax.Array) -> tuple[jax.Array, Draws]:
    """Return the systems to resample, of which fewer than half of the particles are effective."""
    ess = _effective(log_weight)
    degenerate = ess < len(log_weight) / 2
    return degenerate, stats._replace(
        ess=jnp.minimum(stats.ess, ess),
        num_resamplings=stats.num_resamplings + degenerate,
        log_evidence=stats.log_evidence + jnp.where(degenerate, _log_mean_exp(log_weight), 0),
    )


def finish(stats: Draws, x: jax.Array, log_weight: jax.Array, chosen: jax.Array) -> Draws:
    """Return the draws: of each system's last events, weighed exactly, the chosen one."""
    return stats._replace(
        x=take(x, chosen[None])[0],
        ess=jnp.minimum(stats.ess, _effective(log_weight)),
        log_evidence=stats.log_evidence + _log_mean_exp(log_weight),
    )


def _twisted_smc(
    rng_key: jax.Array, posterior: GuidedDenoiser, sampler: Sampler, x_t: jax.Array
) -> Draws:
    num_particles = x_t.shape[0]
    event_ndim = len(posterior.event_shape)
    event_axes = tuple(range(-event_ndim, 0))

    def body(progress: Progress, inputs: tuple[jax.Array, Levels]) -> tuple[Progress, None]:
        (key, levels), (previous, log_weight, stats) = inputs, progress
        key_resample, key_noise = jax.random.split(key)
        guided = posterior.guide(previous.x_t, levels.current)
        proposal = propose(sampler, guided, previous, levels)
        cloud = Cloud(proposal.mean_y, guided.x_hat, guided.x_hat_y)
        stats = watch(stats, guided)
        if num_particles > 1:
            log_twist, shift = guided.log_twist, proposal.shift
            log_weight = log_weight + log_twist
            (cloud, shift, log_twist), log_weight, stats = _resample(
                key_resample, (cloud, shift, log_twist), log_weight, stats
            )
        if sampler.eta > 0:
            noise = jax.random.normal(key_noise, x_t.shape, x_t.dtype)
            cloud = cloud._replace(x_t=cloud.x_t + proposal.tau * noise)
            if num_particles > 1:
                ratio = -jnp.sum(shift * (noise + shift / 2), axis=event_axes)
                log_weight = log_weight + ratio - log_twist
        return Progress(cloud, log_weight, stats), None

    start = begin(x_t, event_ndim)
    levels = sampler.levels(posterior.denoiser)
    keys = jax.random.split(rng_key, sampler.num_steps)
    (cloud, log_weight, stats), _ = jax.lax.scan(body, start, (keys[1:], levels))
    sigma = levels.following[-1]
    if num_particles == 1:
        last = posterior.guide(cloud.x_t, sigma)
        return stats._replace(
            x=last.x_hat_y[0],
            residual=jnp.maximum(stats.residual, last.residual[0]),
            log_evidence=stats.log_evidence * jnp.nan,
        )
    x = posterior.denoiser(cloud.x_t, sigma)
    log_weight = log_weight + posterior.likelihood.log_prob(x)
    chosen = jax.random.categorical(keys[0], log_weight, axis=0)
    return finish(stats, x, log_weight, chosen)


def _resample(
    rng_key: jax.Array, particles: Any, log_weight: jax.Array, stats: Draws
) -> tuple[Any, jax.Array, Draws]:
    """Resample the systems of which fewer than half of the particles are effective."""
    degenerate, stats = assess(stats, log_weight)
    index = ancestors(degenerate, _systematic(rng_key, log_weight))
    particles = jax.tree.map(lambda leaf: take(leaf, index), particles)
    return particles, jnp.where(degenerate, 0, log_weight), stats


def ancestors(degenerate: jax.Array, resampled: jax.Array) -> jax.Array:
    """Return each particle's ancestor: itself, in systems that are not resampled."""
    identity = jnp.arange(len(resampled)).reshape(-1, *(1,) * degenerate.ndim)
    return jnp.where(degenerate, resampled, identity)


def _systematic(rng_key: jax.Array, log_weight: jax.Array) -> jax.Array:
    """Return ancestors by systematic resampling along the first axis, one offset per system."""
    num_particles = log_weight.shape[0]
    cumulative = jnp.cumsum(jax.nn.softmax(log_weight, axis=0), axis=0)
    offset = jax.random.uniform(rng_key, log_weight.shape[1:], log_weight.dtype)
    grid = jnp.arange(num_particles).reshape(-1, *(1,) * offset.ndim)
    positions = (grid + offset) / num_particles
    index = jax.vmap(lambda position: jnp.sum(cumulative < position, axis=0))(positions)
    return jnp.minimum(index, num_particles - 1)


def take(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """Gather along the first axis, with an index of shape ``(n, *batch)``."""
    index = index.reshape(*index.shape, *(1,) * (leaf.ndim - index.ndim))
    return jnp.take_along_axis(leaf, index, axis=0)


def _effective(log_weight: jax.Array) -> jax.Array:
    """Return the effective number of particles of each system."""
    return 1 / jnp.sum(jax.nn.softmax(log_weight, axis=0) ** 2, axis=0)


def _log_mean_exp(log_weight: jax.Array) -> jax.Array:
    """Return the logarithm of the mean weight of each system."""
    return jax.nn.logsumexp(log_weight, axis=0) - jnp.log(log_weight.shape[0])
