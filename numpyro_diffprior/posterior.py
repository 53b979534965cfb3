"""Posterior draws of a NumPyro model's diffusion site.

The model's trace gives the likelihood (`numpyro_diffprior.introspect`), guided sampling or the
twisted SMC the draws (`numpyro_diffprior.smc`). Plates are swept in compiled blocks of bounded
size.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaincc
from jax.sharding import Mesh

from numpyro_diffprior.devices import num_devices, on_devices, replicate, round_up
from numpyro_diffprior.distributions import DiffusionPrior
from numpyro_diffprior.guidance import Guidance
from numpyro_diffprior.introspect import LatentSite, Model, bind_whole_plates, read_latent
from numpyro_diffprior.likelihoods import Likelihood
from numpyro_diffprior.mmps import MMPS
from numpyro_diffprior.observations import read_likelihood
from numpyro_diffprior.posterior_covariances import GaussianCovariance
from numpyro_diffprior.samplers import Sampler
from numpyro_diffprior.smc import Draws, Settings, draw_posterior

__all__ = [
    "PosteriorSamples",
    "read_whole_plates",
    "replicate_arguments",
    "resolve_settings",
    "sample_blocks",
    "sample_posterior",
]


class PosteriorSamples(NamedTuple):
    """What `sample_posterior` returns.

    Attributes:
        samples: Draws by site, each of shape ``(num_samples, *batch, *event)``.
        stats: The statistics of `Draws` by name, each of shape ``(num_samples, *batch)``
            (``ess_path`` has an axis more, of noise levels), and ``num_evaluations``, the number
            of network evaluations per draw.
    """

    samples: dict[str, jax.Array]
    stats: dict[str, jax.Array]


def resolve_settings(
    prior: DiffusionPrior,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    independent: bool = True,
) -> Settings:
    """Fill in the defaults: the prior's sampler, and `MMPS`.

    MMPS takes Tweedie's covariance for one particle; more look ahead with the Gaussian one.

    Raises:
        ValueError: If sampler or guidance is none, the number of particles is not positive, or
            there are several and the sampler is deterministic or evaluates the denoiser more than
            once per step.
    """
    if sampler is None:
        sampler = prior.sampler
    if guidance is None:
        guidance = MMPS() if num_particles == 1 else MMPS(GaussianCovariance(), look_ahead=True)
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"expected an instance of Sampler, got {sampler!r}; pass an object such as "
            "MultistepSDE(num_steps=64)."
        )
    if not isinstance(guidance, Guidance):
        raise ValueError(
            f"expected an instance of Guidance, got {guidance!r}; pass an object such as MMPS()."
        )
    if num_particles < 1:
        raise ValueError(f"expected num_particles >= 1, got {num_particles}.")
    if num_particles > 1 and not (sampler.eta > 0 and sampler.is_single):
        raise ValueError(
            f"{num_particles} particles need a stochastic sampler of one evaluation per step, "
            f"such as MultistepSDE() or DDPM(); got {sampler}."
        )
    return Settings(num_particles, sampler, guidance, independent)


def sample_posterior(
    rng_key: jax.Array,
    model: Model,
    prior: DiffusionPrior | Mapping[str, DiffusionPrior],
    *args: Any,
    num_samples: int = 1,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    independent: bool = True,
    max_batch_size: int = 256,
    mesh: Mesh | None = None,
    **kwargs: Any,
) -> PosteriorSamples:
    """Draw from the posterior of a model's diffusion sites, for all events of their plate.

    Args:
        rng_key: A random key.
        model: A NumPyro model; its observed sites are the likelihood.
        prior: The model's first argument: a prior, or several in a dict. Sites in one plate are
            drawn together.
        *args: The model's other arguments.
        num_samples: The number of draws per event.
        num_particles: Particles of a system: one is MMPS, more correct its approximation.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle; more
            look ahead with the Gaussian one).
        independent: Whether every draw is one of a particle system of its own. Otherwise each
            system gives as many draws as it has particles, at a fraction of the cost: a thousand
            draws of one system of a thousand particles, say. They are exact in the limit of many
            particles, but not independent: an event may be drawn more than once.
        max_batch_size: How many draws are made at once on one device; bounds the memory. Only the
            largest of several plates is divided.
        mesh: Devices to spread the work over (`jax.make_mesh`), by the elements of the largest
            plate; where they are fewer than the devices, by the draws. Data and prior are copied
            to each. Other meshes give other draws.
        **kwargs: The model's keyword arguments.

    Returns:
        The draws and their statistics, see `PosteriorSamples`. A warning says where draws do not
        fit what was observed.

    Raises:
        ValueError: If the model cannot be read (see `numpyro_diffprior.introspect`), a number is
            not positive, or particles and sampler do not fit.
    """
    for name, number in (("num_samples", num_samples), ("max_batch_size", max_batch_size)):
        if number < 1:
            raise ValueError(f"sample_posterior: expected {name} >= 1, got {number}.")
    arguments = replicate_arguments(((prior, *args), kwargs), mesh)
    latent, likelihood = read_whole_plates(model, *arguments)
    settings = resolve_settings(latent.prior, num_particles, sampler, guidance, independent)
    samples, stats = sample_blocks(
        rng_key,
        model,
        *arguments,
        settings,
        num_draws=num_samples,
        batch_size=max_batch_size,
        mesh=mesh,
    )
    _warn_of_misfit(stats["chi_square"], likelihood.num_visible)
    per_draw = num_particles if independent else 1
    num_evaluations = jnp.asarray(per_draw * settings.sampler.num_evaluations)
    return PosteriorSamples(samples, stats | {"num_evaluations": num_evaluations})


def read_whole_plates(
    model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[LatentSite, Likelihood]:
    """Read a model, so that its errors come before anything is compiled."""
    bound = bind_whole_plates(model, args, kwargs)
    latent = read_latent(bound)
    return latent, read_likelihood(bound, latent)


def _warn_of_misfit(chi_square: jax.Array, num_visible: jax.Array) -> None:
    """Warn where draws are far from what was observed, by size and by significance."""
    if isinstance(chi_square, jax.core.Tracer):
        return
    pvalue = gammaincc(num_visible / 2, num_visible * chi_square / 2)
    fits = (chi_square < _LARGE_CHI_SQUARE) | (pvalue > _SMALL_PVALUE / chi_square.size)
    count = int(jnp.sum(~fits))
    if count:
        warnings.warn(
            f"{count} of {chi_square.size} posterior draws do not fit what was observed: their "
            f"stats['chi_square'] goes up to {float(jnp.max(chi_square)):.3g} and should be near "
            "1. Either guidance failed (more steps of the sampler, or more particles, may help), "
            "or the model and its prior cannot explain these data. (Rare counts and other values "
            "far from Gaussian may look so in the best of draws.)",
            stacklevel=3,
        )


_LARGE_CHI_SQUARE = 2.0
_SMALL_PVALUE = 1e-6


def sample_blocks(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
    *,
    num_draws: int,
    batch_size: int,
    mesh: Mesh | None = None,
) -> PosteriorSamples:
    """Draw for all elements of the latent's plate, ``batch_size`` draws at a time, compiled.

    Arrays among the arguments (a prior's weights too) may change without compiling anew.

    Args:
        rng_key: A random key.
        model: A NumPyro model.
        args: Its arguments, the prior first.
        kwargs: Its keyword arguments.
        settings: Resolved settings (`resolve_settings`).
        num_draws: The number of draws per event.
        batch_size: How many draws are made at once on one device.
        mesh: Devices to spread the work over, which have all arguments (`replicate_arguments`).

    Returns:
        Draws and their statistics, of the leading shape ``(num_draws, *batch)``.
    """
    dynamic, static = split_arguments((args, dict(kwargs)))
    return _sweep(rng_key, dynamic, model, static, settings, num_draws, max(1, batch_size), mesh)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _sweep(
    rng_key: jax.Array,
    dynamic: list[jax.Array],
    model: Model,
    static: "StaticArguments",
    settings: Settings,
    num_draws: int,
    batch_size: int,
    mesh: Mesh | None,
) -> PosteriorSamples:
    args, kwargs = merge_arguments(dynamic, static)
    latent = read_latent(bind_whole_plates(model, args, kwargs))
    plate = max(range(len(latent.plates)), key=lambda i: latent.plate_sizes[i], default=None)
    largest = 1 if plate is None else latent.plate_sizes[plate]
    if plate is None or (largest <= batch_size and not 1 < num_devices(mesh) <= largest):
        num_events = max(1, prod(latent.plate_sizes))
        keys, chunk_size = _chunk(rng_key, num_draws, batch_size // num_events, settings, mesh)

        def draw(dynamic: list[jax.Array], keys: jax.Array) -> Draws:
            args, kwargs = merge_arguments(dynamic, static)
            return _draw_chunks(keys, bind_whole_plates(model, args, kwargs), settings, chunk_size)

        draws = on_devices(draw, dynamic, keys, mesh)
        draws = jax.tree.map(lambda leaf: leaf[:num_draws], draws)
        return PosteriorSamples(latent.values(draws.x), draws.stats)
    name, size, dim = (
        latent.plates[plate],
        latent.plate_sizes[plate],
        latent.plate_dims[plate],
    )
    # All draws of an event in one block, which share its solves.
    block_size = min(max(1, batch_size // num_draws), -(-size // num_devices(mesh)))
    num_blocks = round_up(-(-size // block_size), mesh)
    indices = jnp.arange(num_blocks * block_size).reshape(num_blocks, block_size) % size

    def draw_blocks(dynamic: list[jax.Array], blocks: tuple[jax.Array, jax.Array]) -> Draws:
        args, kwargs = merge_arguments(dynamic, static)

        def draw(block: tuple[jax.Array, jax.Array]) -> Draws:
            key, index = block
            bound = bind_whole_plates(model, args, kwargs, indices={name: index})
            keys, chunk_size = _chunk(key, num_draws, batch_size // block_size, settings)
            draws = _draw_chunks(keys, bound, settings, chunk_size)
            return jax.tree.map(lambda leaf: leaf[:num_draws], draws)

        return jax.lax.map(draw, blocks)

    blocks = jax.random.split(rng_key, num_blocks), indices
    draws = on_devices(draw_blocks, dynamic, blocks, mesh)
    axis = 1 + len(latent.batch_shape) + dim  # of the plate, behind the draws

    def join(leaf: jax.Array) -> jax.Array:
        leaf = jnp.moveaxis(leaf, 0, axis)
        shape = (*leaf.shape[:axis], num_blocks * block_size, *leaf.shape[axis + 2 :])
        return jax.lax.slice_in_dim(leaf.reshape(shape), 0, size, axis=axis)

    draws = jax.tree.map(join, draws)
    return PosteriorSamples(latent.values(draws.x), draws.stats)


def _chunk(
    rng_key: jax.Array,
    num_draws: int,
    max_size: int,
    settings: Settings,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, int]:
    """Return the keys of chunks of draws, so many for each device, and the chunks' size."""
    chunk_size, share = max(1, max_size), -(-num_draws // num_devices(mesh))
    if not settings.independent:  # whole particle systems
        size = settings.num_particles
        chunk_size, share = max(1, chunk_size // size) * size, -(-share // size) * size
    chunk_size = min(chunk_size, share, num_draws)
    num_chunks = round_up(-(-num_draws // chunk_size), mesh)
    return rng_key[None] if num_chunks == 1 else jax.random.split(rng_key, num_chunks), chunk_size


def _draw_chunks(
    keys: jax.Array, bound: Callable[[], Any], settings: Settings, chunk_size: int
) -> Draws:
    """Draw for one block of events, so many draws of each for every key."""
    latent = read_latent(bound)
    likelihood = read_likelihood(bound, latent)

    def chunk(key: jax.Array) -> Draws:
        return draw_posterior(key, latent.prior.denoiser, likelihood, settings, chunk_size)

    if len(keys) == 1:
        return chunk(keys[0])
    chunks = jax.lax.map(chunk, keys)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), chunks)


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


def replicate_arguments(
    arguments: tuple[tuple[Any, ...], dict[str, Any]], mesh: Mesh | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the arrays among a model's arguments to every device of a mesh."""
    dynamic, static = split_arguments(arguments)
    args, kwargs = merge_arguments(replicate(dynamic, mesh), static)
    return args, kwargs


_ARRAY = object()
