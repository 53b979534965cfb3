"""Dependence analysis: which outputs of a function may depend on which arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
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
