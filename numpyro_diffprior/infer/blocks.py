r"""Posterior draws in compiled blocks of bounded size."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from numpyro_diffprior._compile.devices import (
    exchange,
    gather,
    num_devices,
    num_processes,
    on_devices,
    own_devices,
    round_up,
)
from numpyro_diffprior._compile.memory import BatchLimit, advise, check_memory
from numpyro_diffprior.infer.folder import DrawsWriter
from numpyro_diffprior.infer.progress import Division, Monitor
from numpyro_diffprior.particles.smc import draw_posterior
from numpyro_diffprior.particles.system import Draws, SamplingOptions
from numpyro_diffprior.reading.latent import LatentGroup
from numpyro_diffprior.reading.model import (
    Block,
    BoundModel,
    GroupReading,
    join_blocks,
)
from numpyro_diffprior.reading.parts import (
    join_parts,
    sharding_of_part,
    split_into_parts,
    take_share,
)

__all__ = [
    "PosteriorSamples",
    "block_size",
    "merge_stats",
    "sample_blocks",
    "sample_first_block",
]


class PosteriorSamples(NamedTuple):
    """The result of `sample_posterior`.

    Attributes:
        samples: Draws by site, each of shape ``(num_samples, *batch, *event)``.
        stats: The statistics of `ParticleInfo` by name, each of shape ``(num_samples, *batch)``
            (``ess_path`` has one more axis, that of the noise levels), and ``num_evaluations``,
            the number of network evaluations per draw. If several groups of sites share no
            observations, the statistics of all groups are concatenated along one axis in place of
            ``batch``.
    """

    samples: dict[str, jax.Array]
    stats: dict[str, jax.Array]


def block_size(
    num_particles: int, num_draws: int, limit: BatchLimit, mesh: Mesh | None = None
) -> Callable[[LatentGroup], int]:
    """Return a function from a group to the number of elements of its largest plate in a block.

    All particles of a block are in memory at once.
    """

    def size(group: LatentGroup) -> int:
        plate, num_systems = group.largest_plate, limit.num_groups(group.event_size, num_particles)
        # A plate stays whole, unless its elements are to be spread over several devices.
        if plate is None or (
            plate.size <= num_systems and not 1 < num_devices(mesh) <= plate.size
        ):
            return group.num_events
        # All draws of an event are in one block, because they share its solves.
        return min(max(1, num_systems // num_draws), -(-plate.size // num_devices(mesh)))

    return size


def sample_blocks(
    rng_key: jax.Array,
    model: BoundModel,
    options: SamplingOptions,
    *,
    num_draws: int,
    limit: BatchLimit,
    mesh: Mesh | None = None,
    monitor: Monitor = Monitor(),
    chosen: Mapping[int, np.ndarray] = MappingProxyType({}),
    folder: DrawsWriter | None = None,
    on_host: bool = False,
    only: str | None = None,
) -> PosteriorSamples:
    """Draw for all elements of the latents' plates, block by block, compiled.

    Changed arrays (a prior's weights too) do not recompile. The model must be read with the
    `block_size` for these options, and the devices of the mesh must have all data. A monitor
    follows the draws, which are made in parts of some blocks. Groups of latent sites, by position,
    may be drawn for some elements of their divided plate only, given in order. Draws may be
    written to a folder, part by part, or be collected ``on_host``, as arrays of NumPy. With the
    name of a statistic as ``only``, draws and other statistics are not collected.

    Returns:
        Draws (unless they are in a folder) and their statistics, of the leading shape
        ``(num_draws, *batch)``.
    """
    num_groups = len(model.reading.groups)
    keys = [rng_key] if num_groups == 1 else list(jax.random.split(rng_key, num_groups))
    drawn = [
        _sample_group(
            key,
            model,
            _Plan.of(model, i, options, num_draws, limit, mesh)._replace(only=only),
            monitor,
            chosen.get(i),
            folder,
            on_host,
        )
        for i, key in enumerate(keys)
    ]
    samples = {name: x for group in drawn for name, x in group.samples.items()}
    return PosteriorSamples(samples, merge_stats([group.stats for group in drawn], num_axes=1))


def sample_first_block(
    rng_key: jax.Array, model: BoundModel, options: SamplingOptions, *, num_draws: int
) -> dict[str, jax.Array]:
    """Draw for the first block of the latents' plates, all draws at once, compiled.

    Returns:
        Draws by site, with shape ``(num_draws, *batch, *event)``.
    """
    samples: dict[str, jax.Array] = {}
    keys = jax.random.split(rng_key, len(model.reading.groups))
    for i, (key, group) in enumerate(zip(keys, model.reading.groups, strict=True)):
        latents = group.latents
        num_systems = num_draws * latents.num_events
        plan = _Plan(i, options, num_draws, num_systems, latents.event_size, None)
        part = split_into_parts(model, i)[0]
        if part.indices is None:
            samples |= _draw_whole(key, part.model, plan).samples
        else:
            samples |= _draw_part(key[None], part.indices[:1], part.model, plan).samples
    return samples


def merge_stats(groups: Sequence[dict[str, jax.Array]], num_axes: int = 0) -> dict[str, jax.Array]:
    """Concatenate the statistics of groups, which have shapes ``(*leading, *batch)``.

    With several groups, one axis of all events takes the place of ``batch``; ``ess_path`` keeps
    its last axis, that of the noise levels. The ``num_axes`` leading axes are those that all
    groups share.
    """
    if len(groups) == 1:
        return dict(groups[0])

    def flat(name: str, x: jax.Array) -> jax.Array:
        levels = x.shape[-1:] if name == "ess_path" else ()
        return x.reshape(*x.shape[:num_axes], -1, *levels)

    return {
        name: jnp.concatenate([flat(name, stats[name]) for stats in groups], axis=num_axes)
        for name in groups[0]
    }


class _Plan(NamedTuple):
    """How a group of latent sites is drawn; static.

    Attributes:
        position: The position of the group among those of the reading.
        options: The options of sampling.
        num_draws: The number of draws per event.
        num_systems: The number of particle systems in memory at once on one device.
        num_elements: The number of elements of an event.
        mesh: The devices, or None.
        only: The name of the only result, a statistic; None for draws and all statistics.
    """

    position: int
    options: SamplingOptions
    num_draws: int
    num_systems: int
    num_elements: int
    mesh: Mesh | None
    only: str | None = None

    def max_parts(self, num_events: int) -> int:
        """Return the largest number of parts, which take a few milliseconds each to start."""
        options = self.options
        num_evaluations = options.num_particles * options.sampler.num_evaluations
        work = num_events * self.num_elements * self.num_draws * num_evaluations
        return min(_MAX_PARTS, -(-work // _PART_WORK))

    @classmethod
    def of(
        cls,
        model: BoundModel,
        position: int,
        options: SamplingOptions,
        num_draws: int,
        limit: BatchLimit,
        mesh: Mesh | None,
    ) -> "_Plan":
        """Return the plan of a group, within a limit."""
        group = model.reading.groups[position].latents
        num_systems = limit.num_groups(group.event_size, options.num_particles)
        return cls(position, options, num_draws, num_systems, group.event_size, mesh)


_MAX_PARTS = 64
_PART_WORK = 2**22  # elements of evaluations: for a U-Net, some seconds of a CPU


def _sample_group(
    rng_key: jax.Array,
    model: BoundModel,
    plan: _Plan,
    monitor: Monitor,
    chosen: np.ndarray | None,
    folder: DrawsWriter | None,
    on_host: bool,
) -> PosteriorSamples:
    group, all_devices = model.reading.groups[plan.position], plan.mesh
    mesh = own_devices(all_devices)
    plan = plan._replace(mesh=mesh)
    if group.divided is None:
        division = Division(1, num_devices(mesh))
        known = monitor.drawn(plan.position, division)
        (part,) = split_into_parts(model, plan.position, mesh)
        draws = known[0] if known else _draw_whole(rng_key, part.model, plan)
        if not known:
            monitor.finish(plan.position, draws, division)
        if folder is not None:
            draws = next(_write(folder, [draws], 0, plan.num_draws, plan.num_draws))
        return jax.tree.map(np.asarray, draws) if on_host else draws
    plate, size = group.divided
    elements = np.arange(plate.size) if chosen is None else chosen
    keys = jax.random.split(rng_key, -(-len(elements) // size))
    keys, own = _share(keys, elements, size, all_devices)
    max_parts = 1 if isinstance(rng_key, jax.core.Tracer) else plan.max_parts(len(own))
    parts = split_into_parts(model, plan.position, mesh, max_parts, own)
    division = Division(len(parts), num_devices(mesh))
    known = monitor.drawn(plan.position, division)

    def draw() -> Iterator[PosteriorSamples]:
        yield from known
        remaining = (parts[i] for i in range(len(known), len(parts)))
        part = next(remaining, None)
        while part is not None:
            draws = _draw_part(keys[part.blocks], part.indices, part.model, plan)
            part = next(remaining, None)  # its data are read while these draws are computed
            monitor.finish(plan.position, draws, division)
            yield draws

    axis = 1 + len(group.latents.batch_shape) + plate.dim
    results = draw()
    if folder is not None:
        results = _write(folder, results, axis, len(elements), len(own), all_devices)
    joined = join_parts(results, axis, len(own), on_host)
    drawn: PosteriorSamples = gather(joined, axis, all_devices)
    if next(iter(drawn.stats.values())).shape[axis] > len(elements):
        cut = (slice(None),) * axis + (slice(len(elements)),)
        drawn = jax.tree.map(lambda x: x[cut], drawn)
    return jax.tree.map(np.asarray, drawn) if on_host else drawn


def _write(
    folder: DrawsWriter,
    parts: Iterable[PosteriorSamples],
    axis: int,
    size: int,
    share: int,
    mesh: Mesh | None = None,
) -> Iterator[PosteriorSamples]:
    """Write the draws of parts along an axis of this size; yield the parts without draws.

    Each process of a mesh writes the draws of all of them, each of which has a share of the axis.
    """
    start = 0
    for part in parts:
        count = next(iter(part.samples.values())).shape[axis]
        for i, samples in enumerate(exchange(part.samples, mesh)):
            first, end = i * share + start, min((i + 1) * share, size)
            if first < end:
                folder.write(samples, axis, first, min(first + count, end), size)
        start += count
        yield part._replace(samples={})


def _share(
    keys: jax.Array, elements: np.ndarray, size: int, mesh: Mesh | None
) -> tuple[jax.Array, np.ndarray]:
    """Return the blocks that this process draws: their keys, and their elements."""
    if num_processes(mesh) == 1:
        return keys, elements
    blocks = take_share(np.arange(len(keys)), 1, mesh)
    return keys[blocks], take_share(elements, size, mesh)


def _advise(factor: float, *args: Any) -> str:
    model: BoundModel = args[-2]
    plan: _Plan = args[-1]
    num_drawn = model.reading.groups[plan.position].latents.num_events * plan.num_draws
    num_particles = plan.options.num_particles
    size = min(plan.num_systems, num_drawn) * num_particles
    return advise("max_batch_size", factor, size, num_particles)


@check_memory("Posterior draws", _advise)
@partial(jax.jit, static_argnums=2)
def _draw_whole(rng_key: jax.Array, model: BoundModel, plan: _Plan) -> PosteriorSamples:
    """Draw for whole plates."""
    group = model.reading.groups[plan.position]
    max_draws = plan.num_systems // group.latents.num_events
    keys, chunk_size = _chunk(rng_key, plan.num_draws, max_draws, plan.options, plan.mesh)

    def draw(model: BoundModel, keys: jax.Array) -> Draws:
        return _draw_chunks(keys, group.bind(model.data), plan.options, chunk_size)

    return _by_site(on_devices(draw, model, keys, plan.mesh), group, model, plan)


@check_memory("Posterior draws", _advise)
@partial(jax.jit, static_argnums=3)
def _draw_part(
    rng_keys: jax.Array, indices: jax.Array, model: BoundModel, plan: _Plan
) -> PosteriorSamples:
    """Draw for some blocks of a plate, each with its own key; see `Part`."""
    group, options, num_draws = model.reading.groups[plan.position], plan.options, plan.num_draws
    assert group.divided is not None
    plate, size = group.divided

    def draw_blocks(model: BoundModel, blocks: tuple[jax.Array, jax.Array]) -> PosteriorSamples:
        def draw(inputs: tuple[jax.Array, jax.Array]) -> PosteriorSamples:
            key, index = inputs
            keys, chunk_size = _chunk(key, num_draws, plan.num_systems // size, options)
            block = group.bind(model.data, {plate.name: index})
            draws = _draw_chunks(keys, block, options, chunk_size)
            return _by_site(draws, group, model, plan)

        return jax.lax.map(draw, blocks)

    specs = None if plan.mesh is None else sharding_of_part(model, plate.name, plan.mesh)
    draws = on_devices(draw_blocks, model, (rng_keys, indices), plan.mesh, specs)
    axis = 1 + len(group.latents.batch_shape) + plate.dim  # of the plate, behind the draws
    joined: PosteriorSamples = join_blocks(draws, axis, indices.size)
    return joined


def _by_site(
    draws: Draws, group: GroupReading, model: BoundModel, plan: _Plan
) -> PosteriorSamples:
    """Return the first draws by site, in the data's units, or the only result."""
    draws = jax.tree.map(lambda leaf: leaf[: plan.num_draws], draws)
    if plan.only is not None:
        return PosteriorSamples({}, {plan.only: getattr(draws.info, plan.only)})
    samples = group.latents.split(
        group.latents.denoiser(group.prior_denoisers(model.data)), draws.x
    )
    return PosteriorSamples(samples, draws.info._asdict())


def _chunk(
    rng_key: jax.Array,
    num_draws: int,
    max_size: int,
    options: SamplingOptions,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, int]:
    """Return the keys of the chunks, a multiple of the number of devices, and their size."""
    chunk_size, share = max(1, max_size), -(-num_draws // num_devices(mesh))
    if not options.independent:  # whole particle systems
        size = options.num_particles
        chunk_size, share = chunk_size * size, -(-share // size) * size
    chunk_size = min(chunk_size, share, num_draws)
    num_chunks = round_up(-(-num_draws // chunk_size), mesh)
    return rng_key[None] if num_chunks == 1 else jax.random.split(rng_key, num_chunks), chunk_size


def _draw_chunks(
    keys: jax.Array, block: Block, options: SamplingOptions, chunk_size: int
) -> Draws:
    """Draw ``chunk_size`` events per key for every event of one block."""

    def chunk(key: jax.Array) -> Draws:
        return draw_posterior(key, block.denoiser, block.likelihood, options, chunk_size)

    if len(keys) == 1:
        return chunk(keys[0])
    chunks = jax.lax.map(chunk, keys)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), chunks)
