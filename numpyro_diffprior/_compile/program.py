"""Programs: traced functions that are hashed and compared by content.

``jax.jit`` caches compiled code by the identity of a function, and freezes all that the function
reads besides its arguments: globals, attributes, arrays in its closure. A `Program` holds the
jaxpr of a function, and is hashed and compared by its content. Code compiled with a program as
static argument therefore serves every function with an equal jaxpr, and no other. Arrays in the
closure of the function are not part of the program: they are its leading inputs.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, Var, jaxpr_as_fun

from numpyro_diffprior._compile.dependence import propagate

__all__ = ["Program", "Traced", "call", "freeze", "name_input", "run", "trace"]


class Program:
    """A traced function of flat inputs, hashed and compared by content.

    Args:
        jaxpr: The jaxpr of the function, without constants.
    """

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.jaxpr = jaxpr
        self._content = _content(jaxpr)
        self._hash = hash(self._content)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        return self is other or (self._hash == other._hash and self._content == other._content)

    def __call__(self, *inputs: Any) -> list[jax.Array]:
        """Evaluate the program; traceable."""
        return _evaluate(self.jaxpr, inputs)

    def depends_on(self, inputs: Sequence[int]) -> list[bool]:
        """Return, for each output, whether it may depend on the inputs at these positions."""
        return list(_depends_on(self, frozenset(inputs)))

    def used(self) -> list[bool]:
        """Return, for each input, whether any output needs it."""
        needed, _ = _needed(self.jaxpr, self.jaxpr.outvars)
        return [var in needed for var in self.jaxpr.invars]

    def reorder(self, order: Sequence[int]) -> "Program":
        """Return the program with reordered inputs: its ``i``-th is this one's ``order[i]``-th."""
        invars = [self.jaxpr.invars[i] for i in order]
        return Program(self.jaxpr.replace(invars=invars))

    def stage(
        self, inputs: Sequence[Any], outputs: Sequence[int], late: Sequence[int]
    ) -> Callable[..., list[jax.Array]]:
        """Evaluate the part that is independent of the late inputs; return the rest.

        Args:
            inputs: The inputs; those at the positions ``late`` are ignored.
            outputs: The positions of the requested outputs; only equations that they need are
                evaluated.
            late: The positions of the inputs that are given later.

        Returns:
            A function of the late inputs that returns the requested outputs.
        """
        early, early_jaxpr, late_jaxpr = _stages(self, tuple(outputs), tuple(late))
        known = _evaluate(early_jaxpr, [inputs[i] for i in early])

        def evaluate(*late_inputs: Any) -> list[jax.Array]:
            return _evaluate(late_jaxpr, (*known, *late_inputs))

        return evaluate


class Traced(NamedTuple):
    """The result of `trace`.

    Attributes:
        program: The program. Its inputs are the data, then the leaves of the arguments, then the
            named inputs.
        data: The arrays in the closure of the function.
        treedef: The tree structure of the function's output.
        names: The names of the named inputs, in order; see `name_input`.
    """

    program: Program
    data: list[jax.Array]
    treedef: Any
    names: tuple[Any, ...]


def trace(f: Callable[..., Any], *args: Any) -> Traced:
    """Trace a function of pytrees of arrays (or of `jax.ShapeDtypeStruct`)."""
    # A new lambda, because JAX caches jaxprs by the identity of functions.
    closed, shapes = jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*args)
    jaxpr = closed.jaxpr
    named = [eqn for eqn in jaxpr.eqns if eqn.primitive is _input_p]
    inputs = [*jaxpr.constvars, *jaxpr.invars, *(eqn.outvars[0] for eqn in named)]
    eqns = [eqn for eqn in jaxpr.eqns if eqn.primitive is not _input_p]
    program = Program(jaxpr.replace(constvars=[], invars=inputs, eqns=eqns))
    names = tuple(eqn.params["name"] for eqn in named)
    return Traced(program, list(closed.consts), jax.tree.structure(shapes), names)


def name_input(value: jax.Array, name: Any) -> jax.Array:
    """Turn a value inside a traced function into a named input of its program.

    Args:
        value: An array with the shape and dtype of the input; its elements are ignored.
        name: A hashable name; see `Traced.names`.
    """
    return _input_p.bind(value, name=name)


_input_p = Primitive("input")
_input_p.def_abstract_eval(lambda aval, *, name: aval)


@partial(jax.jit, static_argnums=0)
def run(program: Program, *inputs: Any) -> list[jax.Array]:
    """Evaluate a program, compiled; equal programs share compiled code."""
    return program(*inputs)


def call(
    f: Callable[..., Any],
    *args: Any,
    check: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
) -> Any:
    """Call a function through ``jax.jit``, with compiled code cached by the function's content.

    Args:
        f: A function of pytrees of arrays.
        *args: Its arguments.
        check: A decorator of the compiled function, see `check_memory`.
    """
    traced = trace(f, *args)
    results = check(run)(traced.program, *traced.data, *jax.tree.leaves(args))
    return jax.tree.unflatten(traced.treedef, results)


def _evaluate(jaxpr: Jaxpr, inputs: Sequence[Any]) -> list[jax.Array]:
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, []))(*inputs)


# Equal programs share the entries of these caches: they hold positions or whole jaxprs.


@lru_cache(maxsize=256)
def _depends_on(program: Program, inputs: frozenset[int]) -> tuple[bool, ...]:
    marked = _marked(program.jaxpr, inputs)
    return tuple(isinstance(var, Var) and var in marked for var in program.jaxpr.outvars)


def _marked(jaxpr: Jaxpr, inputs: frozenset[int]) -> set[Var]:
    return propagate(jaxpr, [i in inputs for i in range(len(jaxpr.invars))])


@lru_cache(maxsize=256)
def _stages(program: Program, outputs: tuple[int, ...], late: tuple[int, ...]) -> Any:
    """Split a program: positions of the early inputs, the early jaxpr, the late jaxpr."""
    jaxpr = program.jaxpr
    outvars = [jaxpr.outvars[i] for i in outputs]
    needed, eqns = _needed(jaxpr, outvars)
    # An equation is late as a whole, even if some of its outputs do not depend on late inputs.
    made_late = set(_marked(jaxpr, frozenset(late)))
    before: list[Any] = []
    after: list[Any] = []
    for eqn in eqns:
        is_late = any(v in made_late for v in (*eqn.outvars, *eqn.invars) if isinstance(v, Var))
        (after if is_late else before).append(eqn)
        if is_late:
            made_late.update(eqn.outvars)
    late_inputs = [jaxpr.invars[i] for i in late]
    early = [i for i, var in enumerate(jaxpr.invars) if i not in late and var in needed]
    early_inputs = [jaxpr.invars[i] for i in early]
    used = [var for e in after for var in e.invars] + outvars
    made = {var for e in after for var in e.outvars} | set(late_inputs)
    known = list(dict.fromkeys(v for v in used if isinstance(v, Var) and v not in made))
    return (
        early,
        jaxpr.replace(invars=early_inputs, outvars=known, eqns=before),
        jaxpr.replace(invars=[*known, *late_inputs], outvars=outvars, eqns=after),
    )


def _needed(jaxpr: Jaxpr, outvars: Sequence[Any]) -> tuple[set[Var], list[Any]]:
    """Return the variables and the equations on which the given outputs depend."""
    needed = {var for var in outvars if isinstance(var, Var)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if any(var in needed for var in eqn.outvars):
            eqns.append(eqn)
            needed.update(var for var in eqn.invars if isinstance(var, Var))
    return needed, eqns[::-1]


# The content of a jaxpr: nested tuples, with variables numbered in order of appearance.

_CONTENTS: WeakKeyDictionary[Jaxpr, Any] = WeakKeyDictionary()
_CUSTOM = {"custom_jvp_call", "custom_vjp_call"}
# Names do not affect results; `_rule` traces the derivative rules instead.
_IGNORED = {"name", "debug_info", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"}


def _content(jaxpr: Jaxpr, with_rules: bool = True) -> Any:
    """Return the content of a jaxpr, hashable, with or without its custom derivative rules."""
    if with_rules and jaxpr in _CONTENTS:
        return _CONTENTS[jaxpr]
    numbers: dict[Var, int] = {}

    def name(var: Any) -> Any:
        if isinstance(var, Literal):
            return "literal", freeze(np.asarray(var.val)), _type(var.aval)
        if var not in numbers:
            numbers[var] = len(numbers)
            return numbers[var], _type(var.aval)
        return numbers[var]

    inputs = tuple(name(var) for var in (*jaxpr.constvars, *jaxpr.invars))
    eqns = []
    for eqn in jaxpr.eqns:
        read = tuple(name(var) for var in eqn.invars)
        is_custom = eqn.primitive.name in _CUSTOM
        ignored = _IGNORED if is_custom else {"name", "debug_info"}
        params = tuple(
            (key, freeze(value, with_rules))
            for key, value in sorted(eqn.params.items())
            if key not in ignored
        )
        rule = _rule(jaxpr, eqn) if is_custom and with_rules else None
        written = tuple(name(var) for var in eqn.outvars)
        eqns.append((eqn.primitive.name, read, params, rule, written))
    content = inputs, tuple(eqns), tuple(name(var) for var in jaxpr.outvars)
    if with_rules:
        _CONTENTS[jaxpr] = content
    return content


def _rule(jaxpr: Jaxpr, eqn: Any) -> Any:
    """Return the content of the first derivative of an equation with a custom rule."""
    variables = list(dict.fromkeys(var for var in eqn.invars if isinstance(var, Var)))
    outvars = [var for var in eqn.outvars if type(var) is Var]
    alone = jaxpr.replace(constvars=[], invars=variables, outvars=outvars, eqns=[eqn])
    avals: list[Any] = [var.aval for var in variables]
    specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    inexact = [i for i, spec in enumerate(specs) if jnp.issubdtype(spec.dtype, jnp.inexact)]

    def derivative(inputs: list[Any], tangents: list[Any]) -> Any:
        def f(*chosen: Any) -> list[Any]:
            replaced = list(inputs)
            for i, value in zip(inexact, chosen, strict=True):
                replaced[i] = value
            return _evaluate(alone, replaced)

        primals = [inputs[i] for i in inexact]
        if eqn.primitive.name == "custom_jvp_call":
            return jax.jvp(f, primals, tangents)
        out, pull = jax.vjp(f, *primals)
        return pull(jax.tree.map(jnp.ones_like, out))

    closed = jax.make_jaxpr(derivative)(specs, [specs[i] for i in inexact])
    return _content(closed.jaxpr, with_rules=False), tuple(map(freeze, closed.consts))


def _type(aval: Any) -> Any:
    """Return the shape, dtype and weak type of a variable."""
    try:
        return tuple(aval.shape), str(aval.dtype), bool(aval.weak_type)
    except AttributeError:  # a token or a reference
        return str(aval)


def freeze(value: Any, with_rules: bool = True) -> Any:
    """Return the content of a static value, hashable; unhashable objects compare by identity."""
    match value:
        case ClosedJaxpr():
            consts = tuple(freeze(const) for const in value.consts)
            return _content(value.jaxpr, with_rules), consts
        case Jaxpr():
            return _content(value, with_rules)
        case tuple() | list():
            return type(value).__name__, *(freeze(item, with_rules) for item in value)
        case dict():
            return tuple((key, freeze(item, with_rules)) for key, item in value.items())
        case bool() | int() | float() | complex() | str() | None:
            return type(value).__name__, repr(value)
        case jax.core.Tracer():
            return _Identity(value)
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return str(value.dtype), freeze(np.asarray(jax.random.key_data(value)))
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()
        return array.shape, str(array.dtype), digest
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return value


class _Identity:
    """An object that is compared by identity; the reference keeps its id from being reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value
