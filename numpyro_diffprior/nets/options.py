"""Validation of the options and inputs of networks; each check may raise a `ValueError`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from numpyro_diffprior._compile.checks import check_count, check_number

__all__ = [
    "check_context_shape",
    "check_dtype",
    "check_embedding",
    "check_inputs",
    "check_rate",
    "check_rngs",
    "check_sizes",
]


def check_sizes(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return positive integers as a tuple."""
    integers = [isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values]
    if not (integers and all(integers) and min(values) >= 1):
        raise ValueError(f"{name} must hold positive integers, got {tuple(values)}.")
    return tuple(int(value) for value in values)


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
