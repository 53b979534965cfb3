r"""Posterior draws in compiled blocks of bounded size."""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from numpyro_diffprior._compile.arguments import StaticArguments, merge_arguments, split_arguments
from numpyro_diffprior._compile.devices import num_devices, on_devices, round_up
from numpyro_diffprior.particles.smc import draw_posterior
from numpyro_diffprior.particles.system import Draws, Settings
from numpyro_diffprior.reading.latent import read_latent
from numpyro_diffprior.reading.likelihood import read_likelihood
from numpyro_diffprior.reading.tracing import Model, bind_whole_plates

__all__ = ["PosteriorSamples", "sample_blocks"]


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
    static: StaticArguments,
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
