"""Data-parallel computation over the devices of a mesh.

Arrays are replicated on every device, and each device computes its share of a batch. Without a
mesh, computation stays on the device of the data. All axes of a mesh are treated as one.
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
    """Return the number of devices of a mesh, or one without a mesh."""
    return 1 if mesh is None else int(mesh.size)


def round_up(count: int, mesh: Mesh | None) -> int:
    """Round ``count`` up to a multiple of the number of devices."""
    size = num_devices(mesh)
    return -(-count // size) * size


def check_batch_size(batch_size: int, mesh: Mesh | None) -> None:
    """Raise a `ValueError` unless the batch size is a multiple of the number of devices."""
    if batch_size != round_up(batch_size, mesh):
        raise ValueError(
            f"batch_size must be a multiple of the {num_devices(mesh)} devices of the mesh, got "
            f"{batch_size}; take {round_up(batch_size, mesh)}, for example."
        )


def replicate(tree: T, mesh: Mesh | None) -> T:
    """Copy all arrays of a tree to every device."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(_automatic(mesh), PartitionSpec()))


def spread(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrain a traced array to be sharded over the devices along its leading axis.

    The compiler then shards computations along that axis in the same way.
    """
    if mesh is None:
        return x
    sharding = NamedSharding(_automatic(mesh), _leading(mesh))
    return jax.lax.with_sharding_constraint(x, sharding)


def on_devices(f: Callable[[S, P], T], shared: S, parts: P, mesh: Mesh | None) -> T:
    """Call a function on every device, with the shared arrays and the device's shard of the rest.

    Args:
        f: A traceable function of ``(shared, parts)``. Its outputs are concatenated over devices
            along their leading axes.
        shared: A pytree of arrays, which every device gets as a whole.
        parts: A pytree of arrays that are sharded along their leading axes, whose length must be
            a multiple of the number of devices.
        mesh: The devices; without a mesh, ``f`` is called once.
    """
    if mesh is None:
        return f(shared, parts)
    own = _leading(mesh)
    # The check concerns communication between devices, and there is none.
    spread_f = jax.shard_map(
        f, mesh=_automatic(mesh), in_specs=(PartitionSpec(), own), out_specs=own, check_vma=False
    )
    return spread_f(shared, parts)


def _leading(mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names)


def _automatic(mesh: Mesh) -> Mesh:
    """Return a mesh of the same devices whose shardings the compiler chooses."""
    return Mesh(mesh.devices, mesh.axis_names)
