r"""Split the arguments of a model into arrays, which are traced, and static values."""

from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_diffprior._compile.lazy import LazyArray

__all__ = ["StaticArguments", "merge_arguments", "split_arguments"]


class StaticArguments(NamedTuple):
    """A pytree of arguments without its arrays; hashable if its leaves are."""

    treedef: Any
    leaves: tuple[Any, ...]


def split_arguments(arguments: Any) -> tuple[list[jax.Array], StaticArguments]:
    """Split a pytree into its arrays and its static leaves.

    Python numbers are static, and so are integer and boolean NumPy scalars: they are sizes and
    flags.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    is_array = [
        isinstance(leaf, jax.Array | np.ndarray | np.inexact | LazyArray) for leaf in leaves
    ]
    dynamic = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    rest = tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    return dynamic, StaticArguments(treedef, rest)


def merge_arguments(dynamic: list[jax.Array], static: StaticArguments) -> Any:
    """Undo `split_arguments`."""
    arrays = iter(dynamic)
    leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in static.leaves]
    return jax.tree.unflatten(static.treedef, leaves)


_ARRAY = object()
