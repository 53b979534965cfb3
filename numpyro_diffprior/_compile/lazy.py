r"""Arrays of which rows are read when they are needed, for data that do not fit into memory."""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import jax
import numpy as np

__all__ = ["LazyArray", "as_lazy", "chunks_of", "is_lazy", "lazy_arrays", "take_rows"]


def lazy_arrays(source: Any, num_events: int | None = None, *, by_event: bool = False) -> Any:
    """Return the arrays of a source of events, which are read part by part.

    They take the place of arrays in the arguments of `sample_posterior`, `log_evidence` and `EM`,
    for a model that passes them through `numpyro.subsample`. (Other functions and NumPyro take
    arrays: ``numpy.asarray`` reads a whole one.) The source must give the same values whenever it
    is asked. It is asked for increasing indices, each at most once.

    Args:
        source: Maps an integer array of indices, with shape ``(n,)``, to an array, or a pytree of
            arrays, with shapes ``(n, *shape)``: by ``source[indices]``, as arrays of HDF5, of Zarr
            and memory maps do, or, if it is a function, by ``source(indices)``. Or a tuple or dict
            of such sources.
        num_events: The number of events (default: ``len(source)``).
        by_event: Whether the source takes one index at a time and gives one event, as data sets of
            grain and of PyTorch do.

    Returns:
        A `LazyArray` in place of each array.

    Raises:
        ValueError: If a source has no events or no length; or, when it is read, if an array has
            another shape or type than those of the first event.

    Example:
        >>> y, mask = lazy_arrays((file["y"], file["mask"]))  # doctest: +SKIP
        >>> result = em.run(jax.random.key(0), 32, prior, mask, y)  # doctest: +SKIP
    """
    if isinstance(source, Mapping):
        return {k: lazy_arrays(v, num_events, by_event=by_event) for k, v in source.items()}
    if isinstance(source, tuple):
        return tuple(lazy_arrays(v, num_events, by_event=by_event) for v in source)
    if num_events is None:
        if hasattr(source, "__len__"):
            num_events = len(source)
        elif hasattr(source, "shape"):  # as an array of Zarr
            num_events = source.shape[0]
        else:
            raise ValueError(
                f"lazy_arrays: a source of type {type(source).__name__} has no length; pass "
                "num_events."
            )
    if num_events < 1:
        raise ValueError(f"lazy_arrays: expected a source of events, got {num_events} of them.")
    take = source.__getitem__ if hasattr(source, "__getitem__") else source
    reader = _Reader(take, by_event)
    first, treedef = jax.tree.flatten(reader.read(np.zeros(1, int)))
    lazy = [
        LazyArray(reader, i, (num_events, *array.shape[1:]), array.dtype)
        for i, array in enumerate(first)
    ]
    return jax.tree.unflatten(treedef, lazy)


class LazyArray:
    """An array of a source of events, made by `lazy_arrays`.

    Attributes:
        shape: Its shape, ``(num_events, *shape)``.
        dtype: Its type.
    """

    def __init__(
        self, reader: "_Reader", position: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._reader = reader
        self._position = position
        self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Read rows: a slice, or increasing indices."""
        is_slice = isinstance(rows, slice)
        index = np.arange(*rows.indices(len(self))) if is_slice else np.asarray(rows)
        array: np.ndarray = jax.tree.leaves(self._reader.read(index))[self._position]
        if array.shape != (len(index), *self.shape[1:]) or array.dtype != self.dtype:
            raise ValueError(
                f"a source of events gave an array of shape {array.shape} and type {array.dtype} "
                f"for {len(index)} events, expected {(len(index), *self.shape[1:])} and "
                f"{self.dtype}, as for its first event."
            )
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read all."""
        return np.asarray(self[:], dtype)


class _Reader:
    """Reads events of a source; several arrays of one source share what was read last."""

    def __init__(self, take: Callable[[Any], Any], by_event: bool) -> None:
        self._take = take
        self._by_event = by_event
        self._last: tuple[np.ndarray, Any] | None = None

    def read(self, index: np.ndarray) -> Any:
        if self._last is not None and np.array_equal(self._last[0], index):
            return self._last[1]
        if self._by_event:
            events = [self._take(int(i)) for i in index]
            arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *events)
        else:
            arrays = jax.tree.map(np.asarray, self._take(index))
        self._last = (index, arrays) if len(jax.tree.leaves(arrays)) > 1 else None
        return arrays


def as_lazy(x: Any) -> Any:
    """Return an array in host memory as one of which rows are taken when they are needed."""
    if is_lazy(x) or isinstance(x, jax.core.Tracer):
        return x
    array = np.asarray(x)
    return LazyArray(_Reader(array.__getitem__, by_event=False), 0, array.shape, array.dtype)


def is_lazy(x: Any) -> bool:
    """Whether rows of an array are read when they are needed."""
    return isinstance(x, LazyArray | np.memmap)


def take_rows(x: np.ndarray | LazyArray, index: np.ndarray, axis: int = 0) -> np.ndarray:
    """Read elements of an axis, in any order; each is read once."""
    rows, inverse = np.unique(index, return_inverse=True)
    is_whole = rows[-1] - rows[0] == len(rows) - 1
    taken: Any = slice(int(rows[0]), int(rows[-1]) + 1) if is_whole else rows
    if isinstance(x, LazyArray) and axis:
        x = np.asarray(x)
    found = x[(slice(None),) * axis + (taken,)] if axis else x[taken]
    is_new = found.base is None if isinstance(x, LazyArray) else not is_whole
    found = np.asarray(found) if is_new else np.array(found)  # a view's owner may change it
    return found if np.array_equal(rows, index) else np.take(found, inverse, axis)


def chunks_of(shape: tuple[int, ...], num_axes: int | None = None) -> Iterator[tuple[Any, ...]]:
    """Yield indices that cover an array in the order of its elements, for 2^22 of them at most.

    Only the leading axes (default: all) are divided.
    """
    num_axes = len(shape) if num_axes is None else num_axes
    sizes = [prod(shape[i + 1 :]) for i in range(num_axes)]
    axis = next((i for i, size in enumerate(sizes) if size <= _MAX_CHUNK), num_axes - 1)
    if axis < 0:
        yield ()
        return
    step = max(1, _MAX_CHUNK // max(1, sizes[axis]))
    for index in np.ndindex(shape[:axis]):
        for start in range(0, shape[axis], step):
            yield (*index, slice(start, start + step))


_MAX_CHUNK = 2**22
