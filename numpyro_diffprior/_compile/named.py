"""Trees as arrays by name, a form that every library can store."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["from_arrays", "to_arrays"]

Tree = TypeVar("Tree")


def to_arrays(tree: Any) -> dict[str, jax.Array]:
    """Return the leaves of a pytree (a prior, an `EMState`) as arrays, by name.

    Libraries that store dicts of arrays (orbax, safetensors, NumPy, equinox, flax) can store the
    result. Keys of `jax.random.key` are returned as integers.

    Raises:
        ValueError: If two leaves have the same name.
    """
    arrays: dict[str, jax.Array] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = _name(path)
        if name in arrays:
            raise ValueError(f"to_arrays: two leaves have the name '{name}'; rename one of them.")
        arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
    return arrays


def from_arrays(like: Tree, arrays: dict[str, Any]) -> Tree:
    """Undo `to_arrays`.

    Args:
        like: A pytree of the same structure, shapes and types, such as the untrained prior, or
            the state from `EM.init`. Its values are ignored.
        arrays: Arrays by name.

    Returns:
        A pytree of the structure of ``like`` with these arrays.

    Raises:
        ValueError: If names, shapes or types differ from those of ``like``.
    """
    paths, treedef = jax.tree.flatten_with_path(like)
    leaves = {_name(path): leaf for path, leaf in paths}
    missing, superfluous = leaves.keys() - arrays.keys(), arrays.keys() - leaves.keys()
    if missing or superfluous:
        raise ValueError(
            f"expected arrays named {_some(missing)} too, got {_some(superfluous)} in excess; "
            "take the arrays of a tree of the same structure."
        )
    return jax.tree.unflatten(treedef, [_fit(n, leaf, arrays[n]) for n, leaf in leaves.items()])


def _fit(name: str, leaf: Any, array: Any) -> Any:
    """Return an array in the form of a leaf."""
    if _is_key(leaf):
        data = jax.random.key_data(leaf)
        return jax.random.wrap_key_data(_fit(name, data, array), impl=jax.random.key_impl(leaf))
    expected, found = np.asarray(leaf) if np.isscalar(leaf) else leaf, np.asarray(array)
    if isinstance(leaf, bool | int | float):
        if found.ndim or found.dtype.kind != expected.dtype.kind:
            raise ValueError(
                f"'{name}': expected a number, got {found.dtype} of shape {found.shape}."
            )
        return type(leaf)(found)
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ValueError(
            f"'{name}': expected {expected.dtype} of shape {expected.shape}, got {found.dtype} of "
            f"shape {found.shape}."
        )
    return found if isinstance(leaf, np.ndarray) else jnp.asarray(array)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _some(names: set[str]) -> list[str]:
    """Return the first few names."""
    return sorted(names)[:4]
