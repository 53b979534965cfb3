"""Minibatches of events that do not fit into the memory of a device.

The events of the next few steps of training are read while the device takes the current ones.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior._compile.lazy import is_lazy, take_rows

__all__ = ["Minibatches", "choose_events", "take_some"]

_MAX_READ = 2**24  # elements of the minibatches that are read together
_MAX_SOME = 2**28  # elements of events that stand for all


def choose_events(rng_key: jax.Array, batch_size: int, num_events: int) -> jax.Array:
    """Return the events of a minibatch, drawn with replacement, with shape ``(batch_size,)``."""
    return jax.random.randint(rng_key, (batch_size,), 0, num_events)


class Minibatches:
    """The minibatches of a training, read in parts of several steps.

    Args:
        rng_key: The random key of the training.
        x: Events of which rows are read, with shape ``(n, *event_shape)``.
        context: Their contexts, or None.
        num_steps: The number of steps of the training.
        batch_size: The number of events per step.
        convert: A function of what is read, events and contexts.

    Attributes:
        size: The number of steps in a part.
    """

    def __init__(
        self,
        rng_key: jax.Array,
        x: Any,
        context: Any,
        num_steps: int,
        batch_size: int,
        convert: Callable[[Any, Any], Any],
    ) -> None:
        self.size = max(1, min(num_steps, _MAX_READ // (batch_size * prod(x.shape[1:]))))
        self._x, self._context, self._convert = x, context, convert
        self._indices = partial(
            _indices, rng_key, num_steps=num_steps, size=self.size, shape=(batch_size, len(x))
        )

    def read(self, first: int) -> Any:
        """Return events and contexts of a part that begins at a step, one step after another."""
        index = np.asarray(self._indices(first)).ravel()
        context = None if self._context is None else _take(self._context, index)
        return self._convert(_take(self._x, index), context)


@partial(jax.jit, static_argnames=("num_steps", "size", "shape"))
def _indices(
    rng_key: jax.Array, first: jax.Array, *, num_steps: int, size: int, shape: tuple[int, int]
) -> jax.Array:
    """Return the events of each step; beyond the last one, those of the last again."""
    steps = jnp.minimum(first + jnp.arange(size), num_steps - 1)
    keys = jax.random.split(rng_key, num_steps)[steps]
    return jax.vmap(lambda key: choose_events(jax.random.split(key)[0], *shape))(keys)


def _take(x: Any, index: np.ndarray) -> np.ndarray:
    """Read rows in any order, of which some may be the same."""
    rows, inverse = np.unique(index, return_inverse=True)
    return np.take(take_rows(x, rows), inverse, axis=0)


def take_some(x: Any, context: Any) -> tuple[Any, Any]:
    """Return events that stand for all, evenly spaced, and their contexts; all if they are few."""
    if not is_lazy(x):
        return x, context
    num = max(2, min(len(x), _MAX_SOME // prod(x.shape[1:])))
    index = np.unique(np.arange(num) * len(x) // num)
    return take_rows(x, index), None if context is None else _take(context, index)
