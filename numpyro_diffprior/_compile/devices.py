"""Spread independent work over the devices of a mesh.

Data are copied to every device, and each does its part of the work. Without a mesh, computation
stays on the device of the data. All axes of a mesh are treated as one.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["check_batch_size", "num_devices", "on_devices", "replicate", "round_up", "spread"]

S = TypeVar("S")
P = TypeVar("P")
T = TypeVar("T")


def num_devices(mesh: Mesh | None) -> int:
    """Return the number of devices, one without a mesh."""
    return 1 if mesh is None else int(mesh.size)


def round_up(count: int, mesh: Mesh | None) -> int:
    """Return the least multiple of the number of devices that is not below a count."""
    size = num_devices(mesh)
    return -(-count // size) * size


def check_batch_size(batch_size: int, mesh: Mesh | None) -> None:
    """Raise a `ValueError` unless every device gets as many events of a minibatch."""
    if batch_size != round_up(batch_size, mesh):
        raise ValueError(
            f"batch_size must be a multiple of the {num_devices(mesh)} devices of the mesh, got "
            f"{batch_size}; take {round_up(batch_size, mesh)}, say."
        )


def replicate(tree: T, mesh: Mesh | None) -> T:
    """Copy all arrays of a tree to every device."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(_automatic(mesh), PartitionSpec()))


def spread(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Ask that the leading axis of a traced array be spread over the devices.

    What is computed from it along that axis is then computed there.
    """
    if mesh is None:
        return x
    sharding = NamedSharding(_automatic(mesh), _leading(mesh))
    return jax.lax.with_sharding_constraint(x, sharding)


def on_devices(f: Callable[[S, P], T], shared: S, parts: P, mesh: Mesh | None) -> T:
    """Call a function on every device with what is shared and the device's own part of the rest.

    Args:
        f: A traceable function. Its results have leading axes of the same kind as those of the
            parts, along which they are put together.
        shared: A tree of arrays.
        parts: A tree of arrays whose leading axes are divided among the devices, of whose number
            their length is a multiple.
        mesh: The devices; without them there is one call.
    """
    if mesh is None:
        return f(shared, parts)
    own = _leading(mesh)
    # Nothing goes from device to device, which is what the check would look after.
    spread_f = jax.shard_map(
        f,
        mesh=_automatic(mesh),
        in_specs=(PartitionSpec(), own),
        out_specs=own,
        check_vma=False,
    )
    return spread_f(shared, parts)


def _leading(mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names)


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices, with the layout of what is computed left to the compiler."""
    return Mesh(mesh.devices, mesh.axis_names)
