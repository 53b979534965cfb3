"""Parts of a group's events, so that memory-mapped arrays are not read whole.

Arrays of type `numpy.memmap` are read a few blocks at a time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from numpyro_diffprior._compile.devices import replicate, round_up
from numpyro_diffprior.reading.model import BoundModel, ModelReading, block_indices

__all__ = ["Part", "join_parts", "split_into_parts"]

_MAX_BLOCKS = 8


class Part(NamedTuple):
    """Some blocks of a group's events.

    Attributes:
        model: The model; some of its arrays may hold the elements of these blocks alone.
        blocks: The positions of the blocks, with shape ``(num_blocks,)``.
        indices: The elements of the divided plate in each block, with shape
            ``(num_blocks, block_size)``; None if plates are whole.
    """

    model: BoundModel
    blocks: np.ndarray
    indices: np.ndarray | None


def split_into_parts(model: BoundModel, position: int, mesh: Mesh | None = None) -> Iterator[Part]:
    """Yield the blocks of a group with the data that they need, in parts of equal shape.

    All blocks form one part, unless arrays are memory-mapped. The last block is repeated to fill
    the last part. The devices of a mesh get copies of the arrays, and can share a part's blocks.
    """
    divided = model.reading.groups[position].divided
    if divided is None:
        yield Part(model, np.zeros(1, np.int32), None)
        return
    plate, size = divided
    arrays = model.data.arrays
    axes = {
        i: axis
        for i, axis in _axes_of(plate.name, model.reading).items()
        if isinstance(arrays[i], np.ndarray)
    }
    num_blocks = -(-plate.size // size)
    if not any(isinstance(arrays[i], np.memmap) for i in axes):
        count = round_up(num_blocks, mesh)
        blocks = np.minimum(np.arange(count), num_blocks - 1)
        yield Part(model, blocks, block_indices(plate.size, size, count))
        return
    num_parts = -(-num_blocks // _MAX_BLOCKS)
    count = round_up(-(-num_blocks // num_parts), mesh)
    indices = block_indices(plate.size, size, num_parts * count).reshape(num_parts, count, size)
    others = {i: jnp.asarray(array) for i, array in enumerate(arrays) if i not in axes}
    for number in range(num_parts):
        blocks = np.minimum(np.arange(number * count, (number + 1) * count), num_blocks - 1)
        start = max(0, min(number * count * size, plate.size - count * size))
        taken = slice(start, start + count * size)
        own = {
            i: replicate(jnp.asarray(np.array(arrays[i][(slice(None),) * axis + (taken,)])), mesh)
            for i, axis in axes.items()
        }
        data = model.data._replace(
            arrays=[(own | others)[i] for i in range(len(arrays))],
            starts={(i, plate.name): jnp.asarray(start) for i in axes},
        )
        yield Part(replace(model, data=data), blocks, indices[number])


def join_parts(results: Iterable[Any], axis: int, size: int) -> Any:
    """Join the results of parts, trees of arrays, along the axis of the divided plate.

    Several results are collected in host memory, one at a time.
    """
    remaining = iter(results)
    first = next(remaining)
    second = next(remaining, None)
    if second is None:
        return first
    results = chain([first, second], remaining)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((first, second))):
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *results)
        return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, size, axis=axis), joined)

    def allocate(leaf: jax.Array) -> np.ndarray:
        return np.empty((*leaf.shape[:axis], size, *leaf.shape[axis + 1 :]), leaf.dtype)

    whole = jax.tree.map(allocate, first)
    start = 0
    for result in results:
        stop = start + jax.tree.leaves(first)[0].shape[axis]

        def put(target: np.ndarray, leaf: jax.Array, start: int = start, stop: int = stop) -> None:
            to = target[(slice(None),) * axis + (slice(start, stop),)]
            to[...] = leaf[(slice(None),) * axis + (slice(0, to.shape[axis]),)]

        jax.tree.map(put, whole, result)
        start = stop
    return jax.tree.map(jnp.asarray, whole)


def _axes_of(plate: str, reading: ModelReading) -> dict[int, int]:
    """Return the axes of a plate, by position of the arrays of which only slices are used."""
    axes: dict[int, set[int | None]] = {}
    for source in reading.sources:
        if source.position is not None:
            axis = next((axis for axis, name in source.axes if name == plate), None)
            axes.setdefault(source.position, set()).add(axis)
    return {
        i: axis for i, used in axes.items() for axis in used if axis is not None and len(used) == 1
    }
