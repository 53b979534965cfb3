"""Adapters for other networks: functions with parameters, and modules of other libraries.

A network is a pytree of arrays that is called with ``(x, noise, *contexts, rngs=None)``. Leaves
that are not arrays (activation functions, sizes) become static.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from numpyro_diffprior._compile.arguments import StaticArguments, merge_arguments, split_arguments
from numpyro_diffprior._compile.checks import set_fields

__all__ = ["FunctionNetwork", "as_network", "untrained", "split_network"]


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
        self,
        x: jax.Array,
        noise: jax.Array,
        *contexts: jax.Array,
        rngs: nnx.Rngs | None = None,
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
    # The attribute is optional.
    shape = getattr(net, "context_shape", None)
    return _Partitioned(arrays, static, event_shape, None if shape is None else tuple(shape))


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
        flat = nnx.to_flat_state(state)
        weights = {_name(path): leaf[...] for path, leaf in flat if isinstance(leaf, nnx.Param)}
        rest = {
            _name(path): leaf[...] if isinstance(leaf, nnx.Variable) else leaf
            for path, leaf in flat
            if not isinstance(leaf, nnx.Param)
        }

        def rebuild(weights: Arrays, rest: Arrays) -> nnx.Module:
            arrays = weights | rest
            leaves = [
                (path, leaf.replace(arrays[_name(path)]))
                if isinstance(leaf, nnx.Variable)
                else (path, arrays[_name(path)])
                for path, leaf in flat
            ]
            return nnx.merge(graph, nnx.from_flat_state(leaves))

        return weights, rest, rebuild
    paths, treedef = jax.tree.flatten_with_path(net)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    arrays = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True)}
    trained = {k: v for k, v in arrays.items() if jax.numpy.issubdtype(v.dtype, jax.numpy.inexact)}
    others = {k: v for k, v in arrays.items() if k not in trained}

    def rebuild_tree(weights: Arrays, rest: Arrays) -> Any:
        both = weights | rest
        return jax.tree.unflatten(treedef, [both[name] for name in names])

    return trained, others, rebuild_tree


def untrained(net: Any) -> Arrays:
    """Return the untrained arrays of a network, which a call may update; see `split_network`."""
    return split_network(net)[1]


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
