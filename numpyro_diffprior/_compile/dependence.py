"""Which results of a function may depend on its arguments, by its program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

__all__ = ["depends"]


def depends(f: Callable[..., Any], *args: Any, on: Sequence[int] | None = None) -> Any:
    """Return a tree like that of the results of ``f``: whether each may depend on the arguments.

    Args:
        f: A function of trees of arrays.
        *args: Its arguments.
        on: The positions of the arguments that count (default: all).
    """
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    marks = [
        on is None or position in on
        for position, arg in enumerate(args)
        for _ in jax.tree.leaves(arg)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), _taint(jaxpr.jaxpr, marks))


_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "checkpoint",
}


def _taint(jaxpr: Jaxpr, tainted: list[bool]) -> list[bool]:
    """Return which outputs of a program may depend on the inputs that are marked."""
    marked = {var for var, mark in zip(jaxpr.invars, tainted, strict=True) if mark}
    for eqn in jaxpr.eqns:
        marks = [isinstance(var, Var) and var in marked for var in eqn.invars]
        if any(marks):
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            outs = [True] * len(eqn.outvars)
            if isinstance(inner, ClosedJaxpr):
                inner = inner.jaxpr
            if eqn.primitive.name in _CALLS and inner is not None:
                outs = _taint(inner, marks)
            elif eqn.primitive.name == "scan" and inner is not None:
                outs = _taint_scan(inner, marks, _carry(eqn.params))
            marked.update(var for var, mark in zip(eqn.outvars, outs, strict=True) if mark)
    return [isinstance(var, Var) and var in marked for var in jaxpr.outvars]


def _carry(params: dict[str, Any]) -> slice:
    """Return which inputs of a scan are its carry."""
    if "num_carry" in params:  # JAX before 0.11
        start, size = params["num_consts"], params["num_carry"]
    else:
        start, size, _ = map(len, params["ft_in"].unpack())
    return slice(start, start + size)


def _taint_scan(body: Jaxpr, tainted: list[bool], carry: slice) -> list[bool]:
    """Return the same of a scan, by its body; what one turn marks, the next finds marked."""
    while True:
        outs = _taint(body, tainted)
        grown = [a or b for a, b in zip(tainted[carry], outs, strict=False)]
        if grown == tainted[carry]:
            return outs
        tainted = [*tainted[: carry.start], *grown, *tainted[carry.stop :]]
