"""Validation of the options and inputs of networks; each check may raise a `ValueError`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from numpyro_diffprior._compile.checks import check_count, check_number

__all__ = [
    "PADDINGS",
    "check_axes",
    "check_context_shape",
    "check_dtype",
    "check_embedding",
    "check_event",
    "check_heads",
    "check_inputs",
    "check_padding",
    "check_rate",
    "check_rngs",
    "check_sizes",
]

PADDINGS = {"zeros": "constant", "periodic": "wrap", "reflect": "reflect"}
"""Boundary conditions of convolutions, as modes of `jax.numpy.pad`."""

_LAYOUTS = {1: "length", 2: "height, width", 3: "depth, height, width"}


def check_sizes(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return positive integers as a tuple."""
    integers = [isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values]
    if not (integers and all(integers) and min(values) >= 1):
        raise ValueError(f"{name} must hold positive integers, got {tuple(values)}.")
    return tuple(int(value) for value in values)


def check_event(
    name: str, event_shape: Sequence[int], spatial_dims: int | None
) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of one event, its number of spatial axes, and its number of channels.

    Args:
        name: The network's name, for messages.
        event_shape: The sizes of the spatial axes, and of a last axis of channels if there is one.
        spatial_dims: The number of spatial axes, or None where the shape has only one reading.
    """
    shape = check_sizes("event_shape", event_shape)
    if spatial_dims is None:
        if len(shape) == 3 or (len(shape) == 2 and max(shape) > 4 * min(shape)):
            fewer, all_axes = _LAYOUTS[len(shape) - 1], _LAYOUTS[len(shape)]
            raise ValueError(
                f"{name}: the event_shape {shape} has two readings; pass "
                f"spatial_dims={len(shape) - 1} for ({fewer}, channels), or "
                f"spatial_dims={len(shape)} for ({all_axes})."
            )
        spatial_dims = min(len(shape), 3)
    if isinstance(spatial_dims, bool) or spatial_dims not in _LAYOUTS:
        raise ValueError(f"{name}: spatial_dims must be 1, 2 or 3, got {spatial_dims!r}.")
    spatial_dims = int(spatial_dims)
    if len(shape) not in (spatial_dims, spatial_dims + 1):
        layout = _LAYOUTS[spatial_dims]
        raise ValueError(
            f"{name}: with spatial_dims={spatial_dims}, the event_shape must be ({layout}) or "
            f"({layout}, channels), got {shape}; change spatial_dims (1, 2 or 3), or use MLP or "
            "a network of your own."
        )
    return shape, spatial_dims, shape[-1] if len(shape) > spatial_dims else 1


def check_axes(name: str, values: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """Return one positive integer per spatial axis, from one for all or one for each."""
    sizes = values if isinstance(values, Sequence) else (values,) * spatial_dims
    _check_length(name, sizes, spatial_dims)
    return check_sizes(name, sizes)


def check_padding(padding: str | Sequence[str], spatial_dims: int) -> tuple[str, ...]:
    """Return the boundary condition of every spatial axis, from one for all or one for each."""
    names = (padding,) * spatial_dims if isinstance(padding, str) else tuple(padding)
    _check_length("padding", names, spatial_dims)
    for found in names:
        if found not in PADDINGS:
            known = ", ".join(map(repr, PADDINGS))
            raise ValueError(f"padding must be one of {known}, got {found!r}.")
    return names


def _check_length(name: str, values: Sequence[Any], spatial_dims: int) -> None:
    if len(values) != spatial_dims:
        raise ValueError(
            f"{name} must be one value for all spatial axes, or hold one for each of the "
            f"{spatial_dims}, got {tuple(values)}."
        )


def check_heads(num_heads: int, widths: Sequence[int]) -> int:
    """Return a number of heads that divides the width of every layer with attention."""
    (num_heads,) = check_sizes("num_heads", (num_heads,))
    for width in widths:
        if width % num_heads:
            raise ValueError(
                f"num_heads must divide the width of every layer with attention, got "
                f"num_heads={num_heads} for a width of {width}."
            )
    return num_heads


def check_embedding(embedding: int) -> int:
    """Return the width of an embedding, a positive even number."""
    if check_count("network", "embedding", embedding, least=2) % 2:
        raise ValueError(f"embedding must be a positive even number, got {embedding}.")
    return int(embedding)


def check_context_shape(context_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the shape of a context, or None."""
    if context_shape is None:
        return None
    return check_sizes("context_shape", context_shape) if len(context_shape) else ()  # scalars


def check_rate(dropout: float) -> float:
    """Return a dropout rate in [0, 1)."""
    rate = check_number("network", "dropout", dropout, inclusive=True)
    if rate >= 1:
        raise ValueError(f"dropout must be a probability below one, got {dropout}.")
    return rate


def check_rngs(name: str, rngs: nnx.Rngs) -> None:
    """Raise unless these are random streams."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"{name}: expected rngs such as nnx.Rngs(0), got rngs={rngs!r}.")


def check_dtype(param_dtype: DTypeLike) -> np.dtype:
    """Return a floating dtype that JAX supports in its current configuration."""
    dtype = jnp.dtype(param_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating dtype, got {dtype.name}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"param_dtype {dtype.name} needs 64-bit JAX: set the environment variable "
            "JAX_ENABLE_X64=1, or use float32."
        )
    return dtype


def check_inputs(
    x: jax.Array, noise: jax.Array, event_shape: tuple[int, ...], dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """Check the shapes of events and noise levels, and cast both to the network's dtype."""
    if x.ndim == 0 or x.shape[1:] != event_shape:
        raise ValueError(
            f"Expected x with one batch axis before the event_shape {event_shape}, got shape "
            f"{x.shape}; flatten several batch axes, and give a single event a batch axis."
        )
    if noise.shape not in ((1,), x.shape[:1]):
        raise ValueError(f"Expected noise with shape {x.shape[:1]} or (1,), got {noise.shape}.")
    return x.astype(dtype), noise.astype(dtype)
