"""Parts of a group's events, so that lazy arrays are read a few blocks at a time."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from numpyro_diffprior._compile.devices import (
    along,
    num_processes,
    own_devices,
    replicate,
    round_up,
    shard,
)
from numpyro_diffprior._compile.lazy import LazyArray, is_lazy, take_rows
from numpyro_diffprior.reading.model import BoundModel, ModelReading, block_indices

__all__ = [
    "Part",
    "axes_of",
    "join_parts",
    "load_elements",
    "load_some",
    "sharding_of_part",
    "split_into_parts",
    "take_share",
]

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
    devices of a mesh share a part's blocks: each gets the elements of its own, see
    `sharding_of_part`, and copies of the other arrays.

    Args:
        model: The model.
        position: The position of the group in the reading.
        mesh: The devices, or None.
        max_parts: The largest number of parts, if no array is lazy.
        chosen: The elements of the divided plate, in order (default: all).
    """
    if model.reading.groups[position].divided is None:
        return [Part(load_elements(model, {}, mesh), np.zeros(1, np.int32), None)]
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
        self._is_lazy = any(is_lazy(x) for x in model.data.arrays)
        chosen = np.arange(self._plate.size) if chosen is None else chosen
        num_blocks = -(-len(chosen) // size)
        num_parts = -(-num_blocks // _MAX_BLOCKS) if self._is_lazy else max_parts
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
        return Part(self._read(number) if self._is_lazy else model, blocks, indices)

    def _read(self, number: int) -> BoundModel:
        """Return the model with the elements of arrays that a part needs."""
        elements = self._indices[number].ravel()
        return _take(self._others, self._plate.name, elements, self._mesh, is_sharded=True)

    @cached_property
    def _others(self) -> BoundModel:
        """The model, of which arrays that are not sliced are on the devices."""
        return _load(self._model, self._plate.name, self._mesh)


def take_share(elements: np.ndarray, size: int, mesh: Mesh | None) -> np.ndarray:
    """Return the elements of the blocks of this size that this process takes.

    All processes have the same number of blocks, and the last ones repeat the last element.
    """
    if (number := num_processes(mesh)) == 1:
        return elements
    length = -(-len(elements) // (size * number)) * size
    index = jax.process_index() * length + np.arange(length)
    return elements[np.minimum(index, len(elements) - 1)]


def sharding_of_part(model: BoundModel, plate: str, mesh: Mesh) -> BoundModel:
    """Return how the arrays of a part's model are divided over devices; traceable.

    Args:
        model: The model of a `Part`.
        plate: The name of the divided plate.
        mesh: The devices.

    Returns:
        The model, with a ``PartitionSpec`` for each array.
    """
    axes, held = axes_of(plate, model.reading), model.data.held
    arrays: list[Any] = [
        along(axes[i], mesh) if (i, plate) in held else PartitionSpec()
        for i in range(len(model.data.arrays))
    ]
    elements: Any = {key: along(0, mesh) if key[1] == plate else PartitionSpec() for key in held}
    params: Any = PartitionSpec()
    data = model.data._replace(arrays=arrays, params=params, held=elements)
    return replace(model, data=data)


def join_parts(results: Iterable[Any], axis: int, size: int, on_host: bool = False) -> Any:
    """Join the results of parts, trees of arrays, along the axis of the divided plate.

    Elements beyond ``size`` are cut off. Several results are collected in host memory, one at a
    time, and stay there if they are to be ``on_host``.
    """
    remaining = iter(results)
    first = next(remaining)
    second = next(remaining, None)
    if second is None:
        cut = jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, size, axis=axis), first)
        return jax.tree.map(np.asarray, cut) if on_host else cut
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
    return whole if on_host else jax.tree.map(jnp.asarray, whole)


def load_some(model: BoundModel, max_elements: int, mesh: Mesh | None = None) -> BoundModel:
    """Return a model whose lazy arrays have been read for `GroupReading.some_blocks` alone."""
    elements: dict[str, np.ndarray] = {}
    for group in model.reading.groups:
        if group.divided is not None:
            plate, _ = group.divided
            some = group.some_blocks(max_elements)
            elements[plate.name] = np.arange(plate.size) if some is None else some.ravel()
    return load_elements(model, elements, mesh)


def load_elements(
    model: BoundModel, elements: Mapping[str, np.ndarray], mesh: Mesh | None = None
) -> BoundModel:
    """Return a model whose lazy arrays have been read for some elements of divided plates alone.

    Args:
        model: The model; without lazy arrays, it is returned as it is.
        elements: Elements of divided plates, increasing, by name (default: those of the first
            block).
        mesh: The devices to copy the arrays to, or None.
    """
    if not any(is_lazy(x) for x in model.data.arrays):
        return model
    mesh = own_devices(mesh)
    for plate, size in model.reading.blocks.items():
        model = _take(model, plate, elements.get(plate, np.arange(size)), mesh)
    return _load(model, None, mesh)


def _take(
    model: BoundModel,
    plate: str,
    elements: np.ndarray,
    mesh: Mesh | None,
    kept: Container[int] = (),
    is_sharded: bool = False,
) -> BoundModel:
    """Return a model whose arrays on the host hold some elements of a plate, on the devices.

    Each device gets all of these elements or, if they are sharded, a part of them.
    """
    arrays, held = list(model.data.arrays), dict(model.data.held)
    for i, axis in axes_of(plate, model.reading).items():
        array: Any = arrays[i]
        if isinstance(array, np.ndarray | LazyArray) and i not in kept:
            rows = take_rows(array, elements, axis)
            if is_sharded:
                arrays[i], held[i, plate] = shard(rows, axis, mesh), shard(elements, 0, mesh)
            else:
                arrays[i] = replicate(jnp.asarray(rows), mesh)
                held[i, plate] = jnp.asarray(elements)
    return replace(model, data=model.data._replace(arrays=arrays, held=held))


def _load(model: BoundModel, plate: str | None, mesh: Mesh | None) -> BoundModel:
    """Return a model of which arrays on the host are on the devices, but for those of a plate.

    Lazy arrays of other divided plates hold the elements of the first block.
    """
    kept = {} if plate is None else axes_of(plate, model.reading)
    for name, size in model.reading.blocks.items():
        if name != plate:
            model = _take(model, name, np.arange(size), mesh, kept)
    arrays = [
        x if i in kept or isinstance(x, jax.Array) else replicate(jnp.asarray(np.asarray(x)), mesh)
        for i, x in enumerate(model.data.arrays)
    ]
    return replace(model, data=model.data._replace(arrays=arrays))


def axes_of(plate: str, reading: ModelReading) -> dict[int, int]:
    """Return the axes of a plate, by position of the arrays of which only slices are used."""
    axes: dict[int, set[int | None]] = {}
    for source in reading.sources:
        if source.position is not None:
            axis = next((axis for axis, name in source.axes if name == plate), None)
            axes.setdefault(source.position, set()).add(axis)
    return {
        i: axis for i, used in axes.items() for axis in used if axis is not None and len(used) == 1
    }
