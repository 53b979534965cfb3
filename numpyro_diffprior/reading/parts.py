"""Parts of a group's events, so that memory-mapped arrays are not read whole.

Arrays of type `numpy.memmap` are read a few blocks at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, overload

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


def split_into_parts(
    model: BoundModel,
    position: int,
    mesh: Mesh | None = None,
    max_parts: int = 1,
    chosen: np.ndarray | None = None,
) -> Sequence[Part]:
    """Return the blocks of a group with the data that they need, in parts of equal shape.

    Data of a part are read when it is taken. The last block is repeated to fill the last part. The
    devices of a mesh get copies of the arrays, and can share a part's blocks.

    Args:
        model: The model.
        position: The position of the group in the reading.
        mesh: The devices, or None.
        max_parts: The largest number of parts, if no array is memory-mapped.
        chosen: The elements of the divided plate, in order (default: all).
    """
    if model.reading.groups[position].divided is None:
        return [Part(model, np.zeros(1, np.int32), None)]
    return _Parts(model, position, mesh, max_parts, chosen)


class _Parts(Sequence[Part]):
    """The parts of a group with a divided plate."""

    def __init__(
        self,
        model: BoundModel,
        position: int,
        mesh: Mesh | None,
        max_parts: int,
        chosen: np.ndarray | None,
    ) -> None:
        divided = model.reading.groups[position].divided
        assert divided is not None
        self._model, self._mesh = model, mesh
        self._plate, size = divided
        arrays = model.data.arrays
        self._axes = {
            i: axis
            for i, axis in _axes_of(self._plate.name, model.reading).items()
            if isinstance(arrays[i], np.ndarray)
        }
        self._is_mapped = any(isinstance(arrays[i], np.memmap) for i in self._axes)
        chosen = np.arange(self._plate.size) if chosen is None else chosen
        num_blocks = -(-len(chosen) // size)
        num_parts = -(-num_blocks // _MAX_BLOCKS) if self._is_mapped else max_parts
        count = round_up(-(-num_blocks // num_parts), mesh)
        num_parts = -(-num_blocks // count)
        self._blocks = np.minimum(np.arange(num_parts * count), num_blocks - 1)
        self._blocks = self._blocks.reshape(num_parts, count)
        elements = block_indices(len(chosen), size, num_parts * count)
        self._indices = chosen.astype(np.int32)[elements].reshape(num_parts, count, size)

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, number: int) -> Part: ...

    @overload
    def __getitem__(self, number: slice) -> list[Part]: ...

    def __getitem__(self, number: int | slice) -> Part | list[Part]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        blocks, indices, model = self._blocks[number], self._indices[number], self._model
        return Part(self._read(number) if self._is_mapped else model, blocks, indices)

    def _read(self, number: int) -> BoundModel:
        """Return the model with the slices of mapped arrays that a part needs."""
        arrays, plate = self._model.data.arrays, self._plate
        held = self._indices[number].ravel()  # in order; the last one may be repeated
        is_whole = held[-1] - held[0] == len(held) - 1
        taken = slice(held[0], held[-1] + 1) if is_whole else held
        own = {
            i: replicate(
                jnp.asarray(np.array(arrays[i][(slice(None),) * axis + (taken,)])), self._mesh
            )
            for i, axis in self._axes.items()
        }
        data = self._model.data._replace(
            arrays=[own[i] if i in own else x for i, x in enumerate(self._others)],
            held={(i, plate.name): jnp.asarray(held) for i in self._axes},
        )
        return replace(self._model, data=data)

    @cached_property
    def _others(self) -> list[Any]:
        """The arrays, those that are not sliced on the device."""
        arrays = self._model.data.arrays
        return [x if i in self._axes else jnp.asarray(x) for i, x in enumerate(arrays)]


def join_parts(results: Iterable[Any], axis: int, size: int) -> Any:
    """Join the results of parts, trees of arrays, along the axis of the divided plate.

    Elements beyond ``size`` are cut off. Several results are collected in host memory, one at a
    time.
    """
    remaining = iter(results)
    first = next(remaining)
    second = next(remaining, None)
    if second is None:
        return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, size, axis=axis), first)
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
