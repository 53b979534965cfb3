"""Data-parallel computation over the devices of a mesh, which may belong to several processes.

Each device computes its share of a batch. It holds the events of this share, and a copy of all
arrays that are not divided. Without a mesh, computation stays on the device of the data. All axes
of a mesh are treated as one.

Every process runs the same program on the same arguments. Its arrays are its own, except within a
training, whose arrays all processes share. There, large arrays may be divided, too: each device
has a part of the weights, their average and the optimizer's state, and the compiler gathers a
layer's weights where they are used.

References:
    Rajbhandari, Rasley, Ruwase, He, *ZeRO: memory optimizations toward training trillion parameter
    models*, 2020, arXiv 1910.02054 (weights divided over devices).

    Xu et al., *GSPMD: general and scalable parallelization for ML computation graphs*, 2021, arXiv
    2105.04663 (what the compiler makes of it).
"""

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = [
    "along",
    "barrier",
    "check_batch_size",
    "constrain",
    "divide",
    "exchange",
    "gather",
    "localize",
    "num_devices",
    "num_processes",
    "on_devices",
    "own_array",
    "own_devices",
    "replicate",
    "round_up",
    "shard",
    "spread",
]

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


def num_processes(mesh: Mesh | None) -> int:
    """Return the number of processes that have devices of a mesh, or one without a mesh."""
    return 1 if mesh is None else len({device.process_index for device in mesh.devices.flat})


def own_devices(mesh: Mesh | None) -> Mesh | None:
    """Return the part of a mesh whose devices are those of this process."""
    if mesh is None or num_processes(mesh) == 1:
        return mesh
    return Mesh(np.array(mesh.local_devices), ("devices",))


def replicate(tree: T, mesh: Mesh | None) -> T:
    """Copy all arrays of a tree to every device."""
    return divide(tree, mesh, None)


def divide(tree: T, mesh: Mesh | None, min_size: int | None) -> T:
    """Put the arrays of a tree on the devices: divided if they are large, else copied to each.

    Args:
        tree: The arrays.
        mesh: The devices, or None.
        min_size: The least number of elements of an array that is divided, along its longest axis
            of a multiple of the devices; None to divide none.
    """
    if mesh is None:
        return tree

    def put(leaf: Any) -> jax.Array:
        sharding = _sharding(leaf, mesh, min_size)
        if num_processes(mesh) == 1:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return _on_data(put, tree)


def constrain(tree: T, mesh: Mesh | None, min_size: int | None) -> T:
    """Constrain traced arrays to be on the devices as `divide` puts them."""
    if mesh is None or min_size is None:
        return tree

    def put(leaf: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, _sharding(leaf, mesh, min_size))

    return _on_data(put, tree)


def _sharding(x: Any, mesh: Mesh, min_size: int | None) -> NamedSharding:
    """Return the sharding of an array in a training, see `divide`."""
    shape = np.shape(x)
    lengths = [n if n % num_devices(mesh) == 0 else 0 for n in shape]
    spec = PartitionSpec()
    if min_size is not None and prod(shape) >= min_size and any(lengths):
        spec = along(lengths.index(max(lengths)), mesh)
    return NamedSharding(_automatic(mesh), spec)


def along(axis: int, mesh: Mesh) -> PartitionSpec:
    """Return the division of an array over all devices along one axis."""
    return PartitionSpec(*(None,) * axis, mesh.axis_names)


def shard(x: Any, axis: int, mesh: Mesh | None) -> jax.Array:
    """Divide an array over the devices of this process, along an axis of a multiple of them."""
    if mesh is None:
        return jnp.asarray(x)
    return jax.device_put(x, NamedSharding(_automatic(mesh), along(axis, mesh)))


def localize(tree: T, mesh: Mesh | None) -> T:
    """Return arrays that all processes share or divide as arrays of this process."""
    if num_processes(mesh) == 1:
        return tree

    def take(leaf: jax.Array) -> jax.Array:
        own = leaf.addressable_data(0) if leaf.is_fully_replicated else _collect(leaf)
        return jnp.asarray(own)

    return _on_data(take, tree)


def gather(tree: T, axis: int, mesh: Mesh | None) -> T:
    """Concatenate the arrays of all processes along an axis, in the order of the processes."""
    if num_processes(mesh) == 1:
        return tree
    trees = exchange(tree, mesh)
    joined: T = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves, axis)), *trees)
    return joined


def exchange(tree: T, mesh: Mesh | None) -> list[T]:
    """Return the arrays of each process, in the order of the processes, in host memory."""
    if (number := num_processes(mesh)) == 1:
        return [tree]
    stacked: T = multihost_utils.process_allgather(tree)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(number)]


def barrier(name: str, mesh: Mesh | None) -> None:
    """Wait until all processes have called this, with the same name."""
    if num_processes(mesh) > 1:
        multihost_utils.sync_global_devices(name)


def own_array(x: Any) -> Any:
    """Return an array of this process, in host memory, in place of one of several processes.

    Of an array that is divided, all processes must call this at the same time. Other values are
    returned as they are.
    """
    is_known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    if not is_known or x.is_fully_addressable:
        return x
    if x.is_fully_replicated:
        return np.asarray(x)
    return _collect(x)


def _collect(x: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _on_data(f: Callable[[Any], jax.Array], tree: T) -> T:
    """Map a function over the arrays of a tree, and over the data of its random keys."""

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(leaf)
            return jax.random.wrap_key_data(f(jax.random.key_data(leaf)), impl=impl)
        return f(leaf)

    mapped: T = jax.tree.map(apply, tree)
    return mapped


def spread(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrain a traced array to be sharded over the devices along its leading axis.

    The compiler then shards computations along that axis in the same way.
    """
    if mesh is None:
        return x
    sharding = NamedSharding(_automatic(mesh), along(0, mesh))
    return jax.lax.with_sharding_constraint(x, sharding)


def on_devices(
    f: Callable[[S, P], T],
    shared: S,
    parts: P,
    mesh: Mesh | None,
    specs: Any = PartitionSpec(),
) -> T:
    """Call a function on every device, with the shared arrays and the device's shard of the rest.

    Args:
        f: A traceable function of ``(shared, parts)``. Its outputs are concatenated over devices
            along their leading axes.
        shared: A pytree of arrays, which every device gets as a whole by default.
        parts: A pytree of arrays that are sharded along their leading axes, whose length must be
            a multiple of the number of devices.
        mesh: The devices; without a mesh, ``f`` is called once.
        specs: How ``shared`` is divided, see `along`: a pytree whose structure is a prefix of its.
    """
    if mesh is None:
        return f(shared, parts)
    own = along(0, mesh)
    # The check concerns communication between devices, and there is none.
    spread_f = jax.shard_map(
        f, mesh=_automatic(mesh), in_specs=(specs, own), out_specs=own, check_vma=False
    )
    return spread_f(shared, parts)


def _automatic(mesh: Mesh) -> Mesh:
    """Return a mesh of the same devices whose shardings the compiler chooses."""
    return Mesh(mesh.devices, mesh.axis_names)
