"""Dependence analysis: which outputs of a function may depend on which arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

__all__ = ["depends", "propagate"]


def depends(f: Callable[..., Any], *args: Any, on: Sequence[int] | None = None) -> Any:
    """Return a pytree of bools: whether each output of ``f`` may depend on the arguments.

    Args:
        f: A function of pytrees of arrays.
        *args: Its arguments.
        on: The positions of the arguments to consider (default: all).
    """
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    marks = [
        on is None or position in on
        for position, arg in enumerate(args)
        for _ in jax.tree.leaves(arg)
    ]
    marked = propagate(jaxpr.jaxpr, marks)
    return jax.tree.unflatten(jax.tree.structure(shapes), _outputs(jaxpr.jaxpr, marked))


_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "checkpoint",
}


def propagate(jaxpr: Jaxpr, inputs: Sequence[bool]) -> set[Var]:
    """Return the variables of a jaxpr that may depend on the marked inputs.

    The analysis enters calls and scans. If any other equation has a marked input, all of its
    outputs are marked.
    """
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for eqn in jaxpr.eqns:
        marks = [isinstance(var, Var) and var in marked for var in eqn.invars]
        if any(marks):
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            outs = [True] * len(eqn.outvars)
            if isinstance(inner, ClosedJaxpr):
                inner = inner.jaxpr
            if eqn.primitive.name in _CALLS and inner is not None:
                outs = _outputs(inner, propagate(inner, marks))
            elif eqn.primitive.name == "scan" and inner is not None:
                outs = _propagate_scan(inner, marks, _carry(eqn.params))
            marked.update(var for var, mark in zip(eqn.outvars, outs, strict=True) if mark)
    return marked


def _outputs(jaxpr: Jaxpr, marked: set[Var]) -> list[bool]:
    return [isinstance(var, Var) and var in marked for var in jaxpr.outvars]


def _carry(params: dict[str, Any]) -> slice:
    """Return the positions of the carry among the inputs of a scan."""
    if "num_carry" in params:  # JAX before 0.11
        start, size = params["num_consts"], params["num_carry"]
    else:
        start, size, _ = map(len, params["ft_in"].unpack())
    return slice(start, start + size)


def _propagate_scan(body: Jaxpr, inputs: list[bool], carry: slice) -> list[bool]:
    """Propagate the marks of a scan's inputs through its carry until nothing changes."""
    while True:
        outs = _outputs(body, propagate(body, inputs))
        grown = [a or b for a, b in zip(inputs[carry], outs, strict=False)]
        if grown == inputs[carry]:
            return outs
        inputs = [*inputs[: carry.start], *grown, *inputs[carry.stop :]]


def picks_elements(f: Callable[..., Any], x: Any, *args: Any) -> Any:
    """Return a pytree of bools: whether each element of an output depends on one of ``x`` at most.

    This holds for masks, gains, subsampling and functions applied elementwise, and for what moves
    elements: slices, concatenations, changes of shape. It does not hold for sums and products of
    different elements. The analysis enters calls; False may be wrong, True is not.

    Args:
        f: A function of pytrees of arrays.
        x: Its first argument, an array.
        *args: Its other arguments, which do not depend on ``x``.
    """
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(x, *args)
    invars = jaxpr.jaxpr.invars
    outs = _trace_sources(jaxpr.jaxpr, [_X, *[None] * (len(invars) - 1)], invars)
    return jax.tree.unflatten(jax.tree.structure(shapes), [out is not _MIXED for out in outs])


_X, _MIXED = object(), object()

# Primitives whose outputs have the elements of their operands, elsewhere.
_MOVES = {
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "dynamic_update_slice",
    "expand_dims",
    "gather",
    "pad",
    "reshape",
    "rev",
    "slice",
    "split",
    "squeeze",
    "transpose",
}
# Primitives whose elements depend on those at the same place of their operands.
_ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type"),
    *("copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp"),
    *("exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log"),
    *("log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem"),
    *("round", "rsqrt", "scale_by_power", "select_n", "sign", "sin", "sinh", "sqrt", "square"),
    *("stop_gradient", "sub", "tan", "tanh", "xor"),
}


def _trace_sources(jaxpr: Jaxpr, inputs: Sequence[Any], names: Sequence[Any]) -> list[Any]:
    """Return the sources of a jaxpr's outputs.

    A source says which element of ``x`` each element depends on: None for no one, `_X` for that
    at the same place, `_MIXED` for several; else a hashable object, equal for equal maps.

    Args:
        jaxpr: The program.
        inputs: The sources of its inputs.
        names: Hashable names of its inputs, equal for equal values only.
    """
    sources: dict[Var, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    known_names = dict(zip(jaxpr.invars, names, strict=True))
    scope = object()  # two calls of one function share its variables, but not their values

    def of(atom: Any) -> Any:
        return sources.get(atom) if isinstance(atom, Var) else None

    def name_of(atom: Any) -> Any:
        if isinstance(atom, Var):
            return known_names.get(atom, (scope, atom))
        return (str(atom.aval), str(atom.val)) if jnp.ndim(atom.val) == 0 else object()

    for eqn in jaxpr.eqns:
        given = [of(atom) for atom in eqn.invars]
        known = [source for source in given if source is not None]
        name = eqn.primitive.name
        if not known:
            continue
        outs = [_MIXED] * len(eqn.outvars)
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            inner = inner.jaxpr
        if any(source is _MIXED for source in known):
            pass
        elif name in _CALLS and inner is not None:
            outs = _trace_sources(inner, given, [name_of(atom) for atom in eqn.invars])
        elif name in _ELEMENTWISE and all(source == known[0] for source in known):
            outs = [known[0]] * len(eqn.outvars)
        elif name in _MOVES:
            operands = [
                name_of(atom) if source is None else source
                for atom, source in zip(eqn.invars, given, strict=True)
            ]
            same = _is_same_shape(eqn)
            outs = [
                known[0] if same else (name, str(eqn.params), tuple(operands), i)
                for i in range(len(eqn.outvars))
            ]
        sources.update(zip(eqn.outvars, outs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _is_same_shape(eqn: Any) -> bool:
    """Whether a change of shape changes nothing."""
    if eqn.primitive.name == "broadcast_in_dim":
        trivial = eqn.params["broadcast_dimensions"] == tuple(range(eqn.outvars[0].aval.ndim))
    else:
        trivial = eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is None
    return trivial and eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
