r"""Multiplication by powers of two that XLA does not reorder.

XLA combines constants: it turns :math:`(a c) (b c)` into :math:`a b c^2`, which overflows in
float32 for :math:`c` = 1e26. `scale_by_power` adds to the exponents of numbers instead. It is a
linear JAX primitive, whose derivatives are products of the same kind.
(`jax.lax.optimization_barrier` also keeps constants apart, but compiled loops that contain it gave
wrong numbers on CPU with jaxlib 0.10.2.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

__all__ = ["floor_log2", "scale_by_power"]


def floor_log2(x: jax.Array) -> jax.Array:
    """Return the integer ``floor(log2(x))`` of positive normal numbers."""
    # Derivatives treat the exponent as a constant.
    _, biased = _split(jax.lax.stop_gradient(x))
    return (biased + jnp.finfo(x.dtype).minexp - 1).astype(jnp.int32)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the bits of numbers as integers, and the biased exponent among them."""
    limits = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, f"int{limits.bits}")
    return bits, (bits >> limits.nmant) & (2**limits.nexp - 1)


def scale_by_power(x: ArrayLike, exponent: ArrayLike) -> jax.Array:
    """Return ``x * 2**exponent`` without rounding; zero or infinite outside the normal range.

    Args:
        x: Numbers.
        exponent: Integers, broadcast against ``x``.
    """
    x = jnp.asarray(x, jnp.result_type(float, x))
    x, exponent = jnp.broadcast_arrays(x, jnp.asarray(exponent, jnp.int32))
    product: jax.Array = _scale_p.bind(x, exponent)
    return product


def _add_to_exponent(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return what `jnp.ldexp` does with half of its operations; subnormal numbers become zero."""
    limits = jnp.finfo(x.dtype)
    bits, biased = _split(x)
    exponent = exponent.astype(bits.dtype)
    shifted = biased + exponent
    product = jax.lax.bitcast_convert_type(bits + (exponent << limits.nmant), x.dtype)
    largest = 2**limits.nexp - 1  # of infinities and NaN
    product = jnp.where(shifted > 0, product, 0)
    product = jnp.where(shifted < largest, product, jnp.copysign(jnp.inf, x))
    return jnp.where(biased == 0, 0, jnp.where(biased == largest, x, product))


_scale_p = Primitive("scale_by_power")
_scale_p.def_impl(jax.jit(_add_to_exponent))
_scale_p.def_abstract_eval(lambda x, exponent: jax.core.ShapedArray(x.shape, x.dtype))
ad.defjvp(_scale_p, lambda tangent, x, exponent: _scale_p.bind(tangent, exponent), None)
# Programs hold many of them: each shape is lowered once.
mlir.register_lowering(
    _scale_p, mlir.lower_fun(_add_to_exponent, multiple_results=False), inline=False
)


def _batch(arguments: Any, axes: Any) -> tuple[jax.Array, int]:
    size = next(x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None)
    x, exponent = (batching.bdim_at_front(x, a, size) for x, a in zip(arguments, axes))
    return _scale_p.bind(x, exponent), 0


batching.primitive_batchers[_scale_p] = _batch


def _transpose(cotangent: Any, x: Any, exponent: jax.Array) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval), None]
    return [_scale_p.bind(cotangent, exponent), None]


ad.primitive_transposes[_scale_p] = _transpose
