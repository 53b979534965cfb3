r"""Products with powers of two, which XLA must not move.

XLA collects constants: it turns :math:`(a c) (b c)` into :math:`a b c^2`, which overflows in
float32 where :math:`c` is 1e26. `scale_by_power` adds to the exponents of numbers instead. It is a
linear primitive of JAX: its derivatives are products of the same kind, and do not depend on the
point at which they are taken. (`jax.lax.optimization_barrier` also keeps constants apart, but
compiled loops that contain it gave wrong numbers on CPUs with jaxlib 0.10.2.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

__all__ = ["near_exponent", "scale_by_power"]


def near_exponent(x: jax.Array) -> jax.Array:
    """Return the exponent of the power of two next below a positive number, an integer."""
    # Whatever moves the number, its exponent is a constant.
    return jnp.frexp(jax.lax.stop_gradient(x))[1] - 1


def scale_by_power(x: ArrayLike, exponent: ArrayLike) -> jax.Array:
    """Return ``x`` times two to the power of an integer, which rounds nothing.

    Args:
        x: Numbers.
        exponent: Integers; the shapes are broadcast.
    """
    x = jnp.asarray(x, jnp.result_type(float, x))
    x, exponent = jnp.broadcast_arrays(x, jnp.asarray(exponent, jnp.int32))
    product: jax.Array = _scale_p.bind(x, exponent)
    return product


_scale_p = Primitive("scale_by_power")
_scale_p.def_impl(jax.jit(jnp.ldexp))
_scale_p.def_abstract_eval(lambda x, exponent: jax.core.ShapedArray(x.shape, x.dtype))
ad.defjvp(_scale_p, lambda tangent, x, exponent: _scale_p.bind(tangent, exponent), None)
batching.defbroadcasting(_scale_p)
mlir.register_lowering(_scale_p, mlir.lower_fun(jnp.ldexp, multiple_results=False))


def _transpose(cotangent: Any, x: Any, exponent: jax.Array) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval), None]
    return [_scale_p.bind(cotangent, exponent), None]


ad.primitive_transposes[_scale_p] = _transpose
