"""Checks of the values of a model's data, block by block."""

import warnings
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from numpyro_diffprior._compile.devices import gather
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.guidance import finest_sigma
from numpyro_diffprior.linalg.batched import probe
from numpyro_diffprior.reading.model import Block, BoundModel
from numpyro_diffprior.reading.parts import Part, join_parts, split_into_parts, take_share

__all__ = ["check_data"]


class _Checks(NamedTuple):
    """The results of the checks of a block.

    Attributes:
        finite: Whether all visible values are finite.
        noisy: Whether all variances are positive.
        independent: Whether the likelihood of every event depends on that event alone.
        levels: Whether the sampler's noise levels are positive and decrease.
        resolved: Whether the noise of the observations exceeds the rounding error of events.
        num_residuals: The number of residuals of every event, with the batch's shape.
    """

    finite: jax.Array
    noisy: jax.Array
    independent: jax.Array
    levels: jax.Array
    resolved: jax.Array
    num_residuals: jax.Array


def check_data(model: BoundModel, sampler: Sampler, mesh: Mesh | None = None) -> list[jax.Array]:
    """Check the observed values and the noise of a model, where they are concrete.

    Each process of a mesh checks its share of the events.

    Returns:
        For each group of latent sites the number of residuals of every event, with the shape
        of the whole batch.

    Raises:
        ValueError: If visible values are not finite, if noise has no variance somewhere, or if an
            observed site in a plate depends on other elements than its own.
    """
    counts = []
    for position, group in enumerate(model.reading.groups):
        result = _inspect(model, position, sampler, mesh)
        counts.append(result.num_residuals)
        names = group.reader.names
        if _is_false(result.finite):
            raise ValueError(
                f"the observed values of {names} hold NaN or infinities where they are not "
                "masked; mask them with `.mask(...)` on the site's distribution."
            )
        if _is_false(result.noisy):
            raise ValueError(
                f"the noise of {names} has no variance somewhere; expected a positive scale."
            )
        if _is_false(result.levels):
            raise ValueError(
                f"expected noise levels that are positive and decrease, got others from {sampler} "
                f"for the prior of {group.latents}; look at its schedule and limits."
            )
        if _is_false(result.resolved):
            warnings.warn(
                f"the noise of {names} is too small against the prior's scale for "
                f"{model.reading.dtype}: draws and evidence of {group.latents} are rounded. Set "
                "the environment variable JAX_ENABLE_X64=1.",
                stacklevel=4,
            )
        if _is_false(result.independent):
            plates = [plate.name for plate in group.latents.plates]
            raise ValueError(
                f"in the plates {plates} an observed site of {names} depends on other elements of "
                f"{group.latents} than its own; take that site out of the plate, so that whole "
                "plates become one event."
            )
    return counts


def _is_false(flag: jax.Array) -> bool:
    """Whether a flag is concrete and false."""
    return not isinstance(flag, jax.core.Tracer) and not flag


def _inspect(model: BoundModel, position: int, sampler: Sampler, mesh: Mesh | None) -> _Checks:
    """Inspect the data of a group, part by part."""
    group = model.reading.groups[position]
    if group.divided is None:
        (part,) = split_into_parts(model, position)
        return _conclude(_inspect_part(part, position, sampler))
    plate, size = group.divided
    own = take_share(np.arange(plate.size), size, mesh)
    parts = split_into_parts(model, position, chosen=own)
    inspected = (_inspect_part(part, position, sampler) for part in parts)
    axis = len(group.latents.batch_shape) + plate.dim
    checks = gather(join_parts(inspected, axis, len(own)), axis, mesh)
    return _conclude(checks, axis, plate.size)


@partial(jax.jit, static_argnums=(1, 2))
def _conclude(checks: _Checks, axis: int = 0, size: int | None = None) -> _Checks:
    """Reduce every flag to whether it is true for all events; cut the others off."""
    num_residuals = checks.num_residuals
    if size is not None:
        num_residuals = jax.lax.slice_in_dim(num_residuals, 0, size, axis=axis)
    return jax.tree.map(jnp.all, checks)._replace(num_residuals=num_residuals)


@partial(jax.jit, static_argnums=(1, 2))
def _inspect_part(part: Part, position: int, sampler: Sampler) -> _Checks:
    """Inspect some blocks; the results have the batch's shape."""
    group = part.model.reading.groups[position]

    def inspect(indices: dict[str, jax.Array]) -> _Checks:
        block = group.bind(part.model.data, indices)
        likelihood = block.likelihood
        _, noise, y, _ = likelihood.read(block.mean)
        precision = likelihood.largest_precision(block.mean)

        def every(flag: jax.Array) -> jax.Array:
            return jnp.broadcast_to(flag.all(), likelihood.batch_shape)

        return _Checks(
            finite=every(jnp.isfinite(y)),
            noisy=every(noise.diagonal() > 0),
            independent=every(_are_independent(block)),
            levels=every(sampler.are_levels_valid(block.denoiser)),
            resolved=every(~(precision * (4 * finest_sigma(block.denoiser)) ** 2 > 1)),
            num_residuals=likelihood.num_residuals,
        )

    return group.over_blocks(inspect, part.indices)


def _are_independent(block: Block) -> jax.Array:
    """Whether the likelihood of every event depends only on that event.

    Half of the events move, then the others; the log-density of those that stay must not change.
    """
    likelihood, template = block.likelihood, block.mean
    batch_shape, event_ndim = likelihood.batch_shape, len(likelihood.event_shape)
    num = prod(batch_shape)
    if num == 1:
        return jnp.ones((), bool)
    # NumPy's draws are constants of the program: it compiles faster without a random number
    # generator.
    rng = np.random.default_rng(0)
    half = (rng.permutation(num) < num // 2).reshape(batch_shape)
    moves = np.stack([half, ~half])
    event_axes = tuple(range(-event_ndim, 0))
    # One direction with random lengths is cheaper than random numbers for all elements.
    length = jnp.asarray(rng.normal(size=batch_shape), template.dtype)
    direction = probe(prod(likelihood.event_shape), template.dtype)
    direction = direction.reshape(likelihood.event_shape)
    step = block.denoiser.scale * jnp.expand_dims(length, event_axes) * direction
    further = jnp.expand_dims(moves, event_axes) * step
    before = likelihood.log_prob(template + step)
    after = likelihood.log_prob(template + step + further)
    tol = jnp.finfo(template.dtype).eps ** 0.5
    same = jnp.isclose(before, after, rtol=tol, atol=tol, equal_nan=True)
    return (same | moves).all()
