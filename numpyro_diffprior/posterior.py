r"""Posterior draws: guided sampling, and the twisted SMC that corrects it.

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

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior.denoisers import Denoiser
from numpyro_diffprior.distributions import DiffusionPrior
from numpyro_diffprior.guidance import MMPS, GaussianCovariance, Guidance, GuidedDenoiser
from numpyro_diffprior.introspect import (
    Model,
    bind,
    read_latent,
    read_likelihood,
)
from numpyro_diffprior.likelihoods import Likelihood
from numpyro_diffprior.samplers import Levels, Sampler

__all__ = [
    "Draws",
    "PosteriorSamples",
    "Settings",
    "draw_posterior",
    "resolve_settings",
    "sample_blocks",
    "sample_posterior",
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


class PosteriorSamples(NamedTuple):
    """What `sample_posterior` returns.

    Attributes:
        samples: Draws by site, each of shape ``(num_samples, *batch, *event)``.
        stats: The statistics of `Draws` by name, each of shape ``(num_samples, *batch)``, and
            ``num_evaluations``, the number of network evaluations per draw.
    """

    samples: dict[str, jax.Array]
    stats: dict[str, jax.Array]


class Settings(NamedTuple):
    """How posterior draws are made; static when compiled. Made by `resolve_settings`.

    Attributes:
        num_particles: Particles per draw; one is plain guided sampling.
        sampler: The sampler.
        guidance: The guidance.
    """

    num_particles: int
    sampler: Sampler
    guidance: Guidance


def resolve_settings(
    prior: DiffusionPrior,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
) -> Settings:
    """Fill in the defaults: the prior's sampler, and `MMPS`.

    MMPS takes Tweedie's covariance for one particle and the Gaussian one for more.

    Raises:
        ValueError: If the number of particles is not positive, or there are several and the
            sampler is deterministic or evaluates the denoiser more than once per step.
    """
    if sampler is None:
        sampler = prior.sampler
    if guidance is None:
        guidance = MMPS() if num_particles == 1 else MMPS(GaussianCovariance())
    if num_particles < 1:
        raise ValueError(f"expected num_particles >= 1, got {num_particles}.")
    if num_particles > 1 and not (sampler.eta > 0 and _is_single(sampler)):
        raise ValueError(
            f"{num_particles} particles need a stochastic sampler of one evaluation per step, "
            f"such as MultistepSDE() or DDPM(); got {sampler}."
        )
    return Settings(num_particles, sampler, guidance)


def sample_posterior(
    rng_key: jax.Array,
    model: Model,
    prior: DiffusionPrior,
    *args: Any,
    num_samples: int = 1,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    max_batch_size: int = 256,
    **kwargs: Any,
) -> PosteriorSamples:
    """Draw from the posterior of a model's diffusion site, for all events of its plate.

    Args:
        rng_key: A random key.
        model: A NumPyro model; its observed sites are the likelihood.
        prior: The model's first argument.
        *args: The model's other arguments.
        num_samples: The number of independent draws per event.
        num_particles: Particles per draw: one is MMPS, more correct its approximation.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle and
            the Gaussian one for more).
        max_batch_size: How many draws are made at once; bounds the memory.
        **kwargs: The model's keyword arguments.

    Returns:
        The draws and their statistics, see `PosteriorSamples`.

    Raises:
        ValueError: If the model cannot be read (see `numpyro_diffprior.introspect`), or particles
            and sampler do not fit.
    """
    settings = resolve_settings(prior, num_particles, sampler, guidance)
    arguments = ((prior, *args), kwargs)
    bound = bind(model, *arguments)
    latent = read_latent(bound)
    read_likelihood(bound, latent)  # errors before anything is compiled
    draws = sample_blocks(
        rng_key, model, *arguments, settings, num_draws=num_samples, batch_size=max_batch_size
    )
    stats = dict(draws.stats)
    stats["num_evaluations"] = jnp.asarray(num_particles * settings.sampler.num_evaluations)
    return PosteriorSamples({latent.name: draws.x}, stats)


def sample_blocks(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
    *,
    num_draws: int,
    batch_size: int,
) -> Draws:
    """Draw for all elements of the latent's plate, ``batch_size`` draws at a time, compiled.

    Arrays among the arguments (a prior's weights too) may change without compiling anew.

    Args:
        rng_key: A random key.
        model: A NumPyro model.
        args: Its arguments, the prior first.
        kwargs: Its keyword arguments.
        settings: Resolved settings (`resolve_settings`).
        num_draws: The number of draws per event.
        batch_size: How many draws are made at once.

    Returns:
        Draws whose arrays have the leading shape ``(num_draws, *batch)``.
    """
    dynamic, static = split_arguments((args, dict(kwargs)))
    return _sweep(rng_key, dynamic, model, static, settings, num_draws, max(1, batch_size))


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _sweep(
    rng_key: jax.Array,
    dynamic: list[jax.Array],
    model: Model,
    static: "StaticArguments",
    settings: Settings,
    num_draws: int,
    batch_size: int,
) -> Draws:
    args, kwargs = merge_arguments(dynamic, static)
    latent = read_latent(bind(model, args, kwargs))
    plate = max(range(len(latent.plates)), key=lambda i: latent.plate_sizes[i], default=None)
    if plate is None or latent.plate_sizes[plate] <= batch_size:
        # Whole plates, even where the model on its own would subsample them.
        whole = {
            plate: jnp.arange(size)
            for plate, size in zip(latent.plates, latent.plate_sizes, strict=True)
        }
        bound = bind(model, args, kwargs, indices=whole)
        num_events = max(1, prod(latent.plate_sizes))
        return _draw_chunks(rng_key, bound, settings, num_draws, max(1, batch_size // num_events))
    name, size, dim = (
        latent.plates[plate],
        latent.plate_sizes[plate],
        latent.plate_dims[plate],
    )
    num_blocks = -(-size // batch_size)
    indices = jnp.arange(num_blocks * batch_size).reshape(num_blocks, batch_size) % size

    def block(inputs: tuple[jax.Array, jax.Array]) -> Draws:
        key, index = inputs
        bound = bind(model, args, kwargs, indices={name: index})
        return _draw_chunks(key, bound, settings, num_draws, 1)

    blocks = jax.lax.map(block, (jax.random.split(rng_key, num_blocks), indices))
    axis = 1 + len(latent.batch_shape) + dim  # of the plate, behind the draws

    def join(leaf: jax.Array) -> jax.Array:
        leaf = jnp.moveaxis(leaf, 0, axis)
        shape = (*leaf.shape[:axis], num_blocks * batch_size, *leaf.shape[axis + 2 :])
        return jax.lax.slice_in_dim(leaf.reshape(shape), 0, size, axis=axis)

    return jax.tree.map(join, blocks)


def _draw_chunks(
    rng_key: jax.Array,
    bound: Callable[[], Any],
    settings: Settings,
    num_draws: int,
    chunk_size: int,
) -> Draws:
    """Draw for one block of events, so many draws of each at a time."""
    latent = read_latent(bound)
    likelihood = read_likelihood(bound, latent)
    chunk_size = min(chunk_size, num_draws)
    num_chunks = -(-num_draws // chunk_size)

    def chunk(key: jax.Array) -> Draws:
        return draw_posterior(key, latent.prior.denoiser, likelihood, settings, chunk_size)

    if num_chunks == 1:
        return chunk(rng_key)
    chunks = jax.lax.map(chunk, jax.random.split(rng_key, num_chunks))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_draws], chunks)


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
        settings: Resolved settings (`resolve_settings`).
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
    if _is_single(settings.sampler):
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


class _Cloud(NamedTuple):
    """Particles between two steps, with leading axes ``(num_particles, *batch)``."""

    x_t: jax.Array
    x_hat: jax.Array
    x_hat_y: jax.Array


class _Progress(NamedTuple):
    """The carry of the SMC: ``log_weight`` lacks the twist at the level of ``cloud.x_t``."""

    cloud: _Cloud
    log_weight: jax.Array
    stats: Draws


def _twisted_smc(
    rng_key: jax.Array, posterior: GuidedDenoiser, sampler: Sampler, x_t: jax.Array
) -> Draws:
    num_particles = x_t.shape[0]
    event_ndim = len(posterior.event_shape)
    batch_shape = x_t.shape[1 : x_t.ndim - event_ndim]
    event_axes = tuple(range(-event_ndim, 0))

    def body(progress: _Progress, inputs: tuple[jax.Array, Levels]) -> tuple[_Progress, None]:
        (key, levels), (previous, log_weight, stats) = inputs, progress
        key_resample, key_noise = jax.random.split(key)
        guided = posterior.guide(previous.x_t, levels.current)
        x_tilde, x_tilde_y = (
            sampler.extrapolate(guided.x_hat, previous.x_hat, levels),
            sampler.extrapolate(guided.x_hat_y, previous.x_hat_y, levels),
        )
        mean, _ = sampler.transition(previous.x_t, x_tilde, levels)
        mean_y, tau = sampler.transition(previous.x_t, x_tilde_y, levels)
        cloud = _Cloud(mean_y, guided.x_hat, guided.x_hat_y)
        stats = stats._replace(
            residual=jnp.maximum(stats.residual, guided.residual.max(0)),
            num_truncated=jnp.maximum(stats.num_truncated, guided.num_truncated.max(0)),
        )
        if num_particles > 1:
            log_twist, shift = guided.log_twist, (mean_y - mean) / tau
            log_weight = log_weight + log_twist
            (cloud, shift, log_twist), log_weight, stats = _resample(
                key_resample, (cloud, shift, log_twist), log_weight, stats
            )
        if sampler.eta > 0:
            noise = jax.random.normal(key_noise, x_t.shape, x_t.dtype)
            cloud = cloud._replace(x_t=cloud.x_t + tau * noise)
            if num_particles > 1:
                ratio = -jnp.sum(shift * (noise + shift / 2), axis=event_axes)
                log_weight = log_weight + ratio - log_twist
        return _Progress(cloud, log_weight, stats), None

    zeros = jnp.zeros(batch_shape, x_t.dtype)
    stats = Draws(zeros, zeros, zeros.astype(int), zeros + num_particles, zeros.astype(int), zeros)
    start = _Progress(
        _Cloud(x_t, jnp.zeros_like(x_t), jnp.zeros_like(x_t)),
        jnp.zeros((num_particles, *batch_shape), x_t.dtype),
        stats,
    )
    levels = sampler.levels(posterior.denoiser)
    keys = jax.random.split(rng_key, sampler.num_steps)
    (cloud, log_weight, stats), _ = jax.lax.scan(body, start, (keys[1:], levels))
    sigma = levels.following[-1]
    if num_particles == 1:
        last = posterior.guide(cloud.x_t, sigma)
        return stats._replace(
            x=last.x_hat_y[0],
            residual=jnp.maximum(stats.residual, last.residual[0]),
            log_evidence=zeros * jnp.nan,
        )
    x = posterior.denoiser(cloud.x_t, sigma)
    log_weight = log_weight + posterior.likelihood.log_prob(x)
    chosen = jax.random.categorical(keys[0], log_weight, axis=0)
    return stats._replace(
        x=_take(x, chosen[None])[0],
        ess=jnp.minimum(stats.ess, _effective(log_weight)),
        log_evidence=stats.log_evidence + _log_mean_exp(log_weight),
    )


def _resample(
    rng_key: jax.Array, particles: Any, log_weight: jax.Array, stats: Draws
) -> tuple[Any, jax.Array, Draws]:
    """Resample the systems of which fewer than half of the particles are effective."""
    num_particles, ess = log_weight.shape[0], _effective(log_weight)
    degenerate = ess < num_particles / 2
    identity = jnp.arange(num_particles).reshape(-1, *(1,) * ess.ndim)
    index = jnp.where(degenerate, _systematic(rng_key, log_weight), identity)
    stats = stats._replace(
        ess=jnp.minimum(stats.ess, ess),
        num_resamplings=stats.num_resamplings + degenerate,
        log_evidence=stats.log_evidence + jnp.where(degenerate, _log_mean_exp(log_weight), 0),
    )
    particles = jax.tree.map(lambda leaf: _take(leaf, index), particles)
    return particles, jnp.where(degenerate, 0, log_weight), stats


def _systematic(rng_key: jax.Array, log_weight: jax.Array) -> jax.Array:
    """Return ancestors by systematic resampling along the first axis, one offset per system."""
    num_particles = log_weight.shape[0]
    cumulative = jnp.cumsum(jax.nn.softmax(log_weight, axis=0), axis=0)
    offset = jax.random.uniform(rng_key, log_weight.shape[1:], log_weight.dtype)
    grid = jnp.arange(num_particles).reshape(-1, *(1,) * offset.ndim)
    positions = (grid + offset) / num_particles
    ancestors = jax.vmap(lambda position: jnp.sum(cumulative < position, axis=0))(positions)
    return jnp.minimum(ancestors, num_particles - 1)


def _take(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """Gather along the first axis, one ancestor for each system."""
    index = index.reshape(*index.shape, *(1,) * (leaf.ndim - index.ndim))
    return jnp.take_along_axis(leaf, index, axis=0)


def _effective(log_weight: jax.Array) -> jax.Array:
    return 1 / jnp.sum(jax.nn.softmax(log_weight, axis=0) ** 2, axis=0)


def _log_mean_exp(log_weight: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_weight, axis=0) - jnp.log(log_weight.shape[0])


def _is_single(sampler: Sampler) -> bool:
    """Whether each step is one evaluation followed by the shared Gaussian transition."""
    return sampler.num_evaluations == sampler.num_steps


class StaticArguments(NamedTuple):
    """The part of a model's arguments that is not arrays; hashable."""

    treedef: Any
    leaves: tuple[Any, ...]


def split_arguments(arguments: Any) -> tuple[list[jax.Array], StaticArguments]:
    """Split a tree into its arrays and the rest (sizes, flags), which is static when compiled."""
    leaves, treedef = jax.tree.flatten(arguments)
    is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
    dynamic = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    rest = tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    return dynamic, StaticArguments(treedef, rest)


def merge_arguments(dynamic: list[jax.Array], static: StaticArguments) -> Any:
    """Undo `split_arguments`."""
    arrays = iter(dynamic)
    leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in static.leaves]
    return jax.tree.unflatten(static.treedef, leaves)


_ARRAY = object()
