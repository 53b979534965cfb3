"""The events of a training: their checks, and minibatches of those that are read from a source.

The events of the next few steps are read while the device takes the current ones.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior._compile.lazy import is_lazy, take_rows
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser

__all__ = [
    "Augment",
    "Minibatches",
    "as_context",
    "at_contexts",
    "augment_events",
    "augment_inputs",
    "augment_for_summary",
    "check_augment",
    "check_events",
    "check_shapes",
    "choose_events",
    "count_parts",
    "take_some",
]

# A function (rng_key, x) of one event, or (rng_key, x, context); see `train`.
Augment = Callable[..., Any]

_MAX_READ = 2**24  # elements of the minibatches that are read together
# Events that stand for all: so many, or fewer if they have more elements in all, down to a least
# number, or fewer still if even those have very many.
_MAX_SOME = 2**16
_MAX_ELEMENTS = 2**25
_LEAST_SOME = 4096
_MOST_ELEMENTS = 2**28


def choose_events(rng_key: jax.Array, batch_size: int, num_events: int) -> jax.Array:
    """Return the events of a minibatch, drawn with replacement, with shape ``(batch_size,)``."""
    return jax.random.randint(rng_key, (batch_size,), 0, num_events)


class Minibatches:
    """The minibatches of a training, read in parts of several steps, in order.

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
        self._num_read, self._next = 0, self._indices(0)

    def read(self) -> Any:
        """Return events and contexts of the next part, one step after another."""
        index = np.asarray(self._next).ravel()
        x = take_rows(self._x, index)
        context = None if self._context is None else take_rows(self._context, index)
        # The rest waits for the device, which takes earlier steps.
        self._num_read += self.size
        self._next = self._indices(self._num_read)
        return self._convert(x, context)


@partial(jax.jit, static_argnames=("num_steps", "size", "shape"))
def _indices(
    rng_key: jax.Array, first: jax.Array, *, num_steps: int, size: int, shape: tuple[int, int]
) -> jax.Array:
    """Return the events of each step; beyond the last one, those of the last again."""
    steps = jnp.minimum(first + jnp.arange(size), num_steps - 1)
    keys = jax.random.split(rng_key, num_steps)[steps]
    return jax.vmap(lambda key: choose_events(jax.random.split(key)[0], *shape))(keys)


def take_some(x: Any, context: Any) -> tuple[Any, Any]:
    """Return events that stand for all, evenly spaced, and their contexts; all if they are few."""
    if not is_lazy(x):
        return x, context
    size = prod(x.shape[1:])
    num = min(_MAX_SOME, max(_LEAST_SOME, _MAX_ELEMENTS // size))
    num = max(2, min(len(x), num, _MOST_ELEMENTS // size))
    index = np.unique(np.arange(num) * len(x) // num)
    return take_rows(x, index), None if context is None else take_rows(context, index)


def check_shapes(x: Any, context: Any, denoiser: NetworkDenoiser) -> None:
    """Check the shapes of events and of their contexts, without reading them."""
    shape, found = denoiser.event_shape, jnp.shape(x)
    if len(found) != len(shape) + 1 or found[1:] != shape or found[0] == 0:
        raise ValueError(
            f"Expected events x with shape (n, *event_shape) = (n, {', '.join(map(str, shape))}) "
            f"and n > 0, got {found}."
        )
    context_shape = denoiser.context_shape
    expected = None if context_shape is None else (found[0], *context_shape)
    given = None if context is None else jnp.shape(context)
    if given != expected:
        raise ValueError(
            f"Expected contexts of shape {expected} for these events and their network, got "
            f"{given}."
        )


def check_events(x: Any, denoiser: Denoiser) -> jax.Array:
    """Return events as an array, if they are finite."""
    x = jnp.asarray(x, denoiser.dtype)
    if isinstance(x, jax.core.Tracer):  # which has no values to check
        return x
    with jax.ensure_compile_time_eval():  # known values inside of a traced function, too
        bad = int(jnp.sum(~jnp.isfinite(x.reshape(x.shape[0], -1)).all(axis=1)))
    if bad:
        raise ValueError(
            f"Events to train on must be finite, got NaN or infinity in {bad} of {x.shape[0]}; "
            "remove these events, or treat their values as unobserved (EM)."
        )
    return x


def as_context(context: Any, denoiser: NetworkDenoiser) -> jax.Array | None:
    """Return contexts as an array of the denoiser's type."""
    return None if context is None else jnp.asarray(context, denoiser.dtype)


def count_parts(num_events: int, denoiser: Denoiser) -> int:
    """Return the least number of equal parts of a batch that are computed one after another.

    A batch whose size has no suitable divisor, such as a prime number, stays whole.
    """
    limit = BatchLimit.of("train", None, default=num_events).num_groups(denoiser.event_size)
    least = -(-num_events // limit)
    return next((n for n in range(least, 2 * least + 1) if num_events % n == 0), 1)


def at_contexts(denoiser: NetworkDenoiser, context: jax.Array | None) -> Denoiser:
    """Return the denoiser at contexts, if it takes any."""
    return denoiser if context is None else ConditionedDenoiser(denoiser, context)


def augment_inputs(denoiser: Denoiser) -> list[Any]:
    """Return abstract arguments of an augmentation: a random key, an event and its context."""
    shapes = denoiser.event_shape, denoiser.context_shape
    arrays = [jax.ShapeDtypeStruct(s, denoiser.dtype) for s in shapes if s is not None]
    return [jax.eval_shape(jax.random.key, 0), *arrays]


def check_augment(augment: Augment | None, denoiser: Denoiser) -> None:
    """Raise a `ValueError` unless a function returns an event like the one that it is given.

    With contexts, it returns an event and a context.
    """
    if augment is None:
        return
    if not callable(augment):
        raise ValueError(f"augment: expected a function, got {augment!r}.")
    key, *given = augment_inputs(denoiser)
    expected, found = (
        jax.tree.map(lambda leaf: leaf.shape, returned)
        for returned in (
            given[0] if len(given) == 1 else tuple(given),
            jax.eval_shape(augment, key, *given),
        )
    )
    if found != expected:
        names = "an event" if len(given) == 1 else "an event and its context"
        raise ValueError(
            f"augment: expected a function that returns {names} of shape {expected}, as it is "
            f"given, got {found}."
        )


@partial(jax.jit, static_argnums=1)
def augment_events(
    rng_key: jax.Array, augment: Augment, x: jax.Array, context: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Map each event, in the data's units, and its context, if there are contexts."""
    keys = jax.random.split(rng_key, len(x))
    if context is None:
        return jax.vmap(augment)(keys, x).astype(x.dtype), None
    mapped, at = jax.vmap(augment)(keys, x, context)
    return mapped.astype(x.dtype), at.astype(context.dtype)


def augment_for_summary(
    rng_key: jax.Array, augment: Augment | None, x: jax.Array, context: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return events whose Gaussian is fitted, and their contexts: mapped copies of few events.

    There are up to eight copies of each, of 4,096 events and 2^25 elements in all.
    """
    if augment is None:
        return x, context
    num_copies = min(8, _LEAST_SOME // len(x), _MAX_ELEMENTS // x.size)
    index = jnp.tile(jnp.arange(len(x)), max(1, num_copies))
    context = None if context is None else context[index]
    return augment_events(rng_key, augment, x[index], context)
