"""Adapters for other networks: functions with parameters, and modules of other libraries.

A network is a pytree of arrays that is called with ``(x, noise, *contexts, rngs=None)``. Leaves
that are not arrays (activation functions, sizes) become static.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from numpyro_diffprior._compile.arguments import StaticArguments, merge_arguments, split_arguments
from numpyro_diffprior._compile.checks import set_fields

__all__ = [
    "FunctionNetwork",
    "as_network",
    "context_shape",
    "named_arrays",
    "replace_arrays",
    "split_network",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class FunctionNetwork:
    """A function and its parameters as a network.

    Args:
        function: A function of ``(params, x, noise)``, or of ``(params, x, noise, context)``, that
            returns an array with the shape of ``x``. ``x`` are scaled noisy events, with shape
            ``(batch, *event)``; ``noise`` is ``log(sigma / s) / 4``, with the data's scale ``s``
            and shape ``(batch,)`` or ``(1,)``. Static under ``jit``, and compared by identity.
        params: A pytree of arrays; all floating arrays are trained.
        event_shape: The shape of one event.
        context_shape: The shape of one context, or None.

    Example:
        A linen module, and an equinox module:

        >>> FunctionNetwork(module.apply, params, (28, 28))  # doctest: +SKIP
        >>> arrays, static = eqx.partition(module, eqx.is_array)  # doctest: +SKIP
        >>> FunctionNetwork(
        ...     lambda arrays, x, noise: eqx.combine(arrays, static)(x, noise), arrays, (28, 28)
        ... )  # doctest: +SKIP
    """

    function: Callable[..., jax.Array] = field(metadata={"static": True})
    params: Any
    event_shape: tuple[int, ...] = field(metadata={"static": True})
    context_shape: tuple[int, ...] | None = field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        context_shape = None if self.context_shape is None else tuple(self.context_shape)
        set_fields(self, event_shape=tuple(self.event_shape), context_shape=context_shape)

    def __call__(
        self, x: jax.Array, noise: jax.Array, *contexts: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Call the function."""
        return self.function(self.params, x, noise, *contexts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _Partitioned:
    """A callable pytree whose leaves that are not arrays are static."""

    arrays: list[jax.Array]
    static: StaticArguments = field(metadata={"static": True})
    event_shape: tuple[int, ...] = field(metadata={"static": True})
    context_shape: tuple[int, ...] | None = field(metadata={"static": True})

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return merge_arguments(self.arrays, self.static)(*args, **kwargs)


def as_network(net: Any) -> Any:
    """Check a network, and make its leaves that are not arrays static.

    Raises:
        ValueError: If it is not callable, has no ``event_shape``, or is not a pytree.
    """
    name = type(net).__name__
    if not callable(net):
        raise ValueError(f"expected a network, which is callable, got {name}.")
    try:
        event_shape = tuple(int(size) for size in net.event_shape)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the network {name} has no `event_shape`, the shape of one event; give it one, or "
            "wrap it: FunctionNetwork(function, params, event_shape)."
        ) from error
    leaves = jax.tree.leaves(net)
    if any(leaf is net for leaf in leaves):
        raise ValueError(
            f"the network {name} is not a pytree, so JAX cannot find its weights; make it a flax "
            "nnx module, register it with `jax.tree_util.register_dataclass`, or wrap it: "
            "FunctionNetwork(function, params, event_shape)."
        )
    arrays, static = split_arguments(net)
    if len(arrays) == len(leaves):
        return net
    return _Partitioned(arrays, static, event_shape, context_shape(net))


def context_shape(net: Any) -> tuple[int, ...] | None:
    """Return the shape of one context; None if a network lacks the optional attribute."""
    shape = getattr(net, "context_shape", None)
    return None if shape is None else tuple(shape)


Arrays = dict[str, jax.Array]
Rebuild = Callable[[Arrays, Arrays], Any]


def split_network(net: Any) -> tuple[Arrays, Arrays, Rebuild]:
    """Split a network into trained and untrained arrays, by name.

    In a flax nnx module, each ``nnx.Param`` is trained; other variables (batch statistics, fixed
    frequencies, random streams) are not. In any other pytree, all floating arrays are trained.

    Returns:
        The trained arrays, the untrained ones, and a function that rebuilds the network from both.
    """
    if isinstance(net, nnx.Module):
        graph, state = nnx.split(net)
        arrays = named_arrays(state)
        flat = nnx.to_flat_state(state)
        trained = {_name(path) for path, leaf in flat if isinstance(leaf, nnx.Param)}

        def rebuild(arrays: Arrays) -> Any:
            return nnx.merge(graph, replace_arrays(state, arrays))
    else:
        paths, treedef = jax.tree.flatten_with_path(net)
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        names = list(arrays)
        trained = {name for name in names if jnp.issubdtype(arrays[name].dtype, jnp.inexact)}

        def rebuild(arrays: Arrays) -> Any:
            return jax.tree.unflatten(treedef, [arrays[name] for name in names])

    weights = {name: array for name, array in arrays.items() if name in trained}
    rest = {name: array for name, array in arrays.items() if name not in trained}
    return weights, rest, lambda weights, rest: rebuild(weights | rest)


def named_arrays(state: nnx.State) -> Arrays:
    """Return the arrays in the state of a flax nnx module, by path."""
    return {
        _name(path): leaf[...] if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def replace_arrays(state: nnx.State, arrays: Arrays) -> nnx.State:
    """Return the state of a flax nnx module with other arrays; the inverse of `named_arrays`."""
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        array = arrays[_name(path)]
        leaves.append((path, leaf.replace(array) if isinstance(leaf, nnx.Variable) else array))
    return nnx.from_flat_state(leaves)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
