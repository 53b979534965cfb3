"""Windows along an axis, and the elements that are read from each of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["WindowedAxis", "outer"]


class WindowedAxis(NamedTuple):
    """The windows along one axis.

    Attributes:
        length: The length of the axis.
        window: The length of the windows.
        starts: Where each window starts; negative beyond the start of a periodic axis.
        firsts: The first element that is read from each window.
        ends: The element after the last one that is read from each window.
    """

    length: int
    window: int
    starts: np.ndarray
    firsts: np.ndarray
    ends: np.ndarray

    @classmethod
    def cut(cls, length: int, window: int, stride: int, periodic: bool) -> "WindowedAxis":
        """Return the windows of a length that start every ``stride`` elements."""
        before = (window - stride) // 2
        if length == window:
            starts = firsts = np.zeros(1, int)
        elif periodic:
            firsts = np.arange(0, length, stride)
            starts = firsts - before
        else:
            aligned = np.arange(0, length - window + stride, stride)
            starts = np.minimum(aligned, length - window)
            firsts = np.concatenate([[0], aligned[1:] + before])
        return cls(length, window, starts, firsts, np.append(firsts[1:], length))

    def offsets(self) -> np.ndarray:
        """Return the place in its window where each element is read."""
        elements = np.arange(self.length)
        return elements - self.starts[np.searchsorted(self.firsts, elements, side="right") - 1]

    def places(self, index: jax.Array) -> jax.Array:
        """Return the elements of windows, with shape ``(n, window)``."""
        return self._unwrapped(index) % self.length

    def targets(self, index: jax.Array) -> jax.Array:
        """Return the elements that are read from windows, and ``length`` for the others."""
        places = self._unwrapped(index)
        firsts, ends = jnp.asarray(self.firsts)[index], jnp.asarray(self.ends)[index]
        is_read = (firsts[:, None] <= places) & (places < ends[:, None])
        return jnp.where(is_read, places, self.length)

    def _unwrapped(self, index: jax.Array) -> jax.Array:
        return jnp.asarray(self.starts)[index, None] + jnp.arange(self.window)


def outer(indices: list[jax.Array]) -> list[jax.Array]:
    """Align indices ``(n, window)`` of each axis, so that they index all axes at once."""
    return [
        index.reshape(len(index), *np.where(np.arange(len(indices)) == i, index.shape[1], 1))
        for i, index in enumerate(indices)
    ]
