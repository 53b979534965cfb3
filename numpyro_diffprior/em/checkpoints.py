r"""Checkpoints of a run of EM, from which it goes on as if it had never stopped.

A checkpoint holds a `Progress` as arrays by name, written by orbax in the background and moved to
its place when it is complete, and a header: the version of the format, shapes and types, a digest
of the arrays, and the *conditions* of the run. These are the model, its data, the random key and
the settings, as digests, so that a run goes on under the same conditions only. No code is stored
and none is executed.

References:
    Orbax, https://orbax.readthedocs.io.
"""

import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from numpyro_diffprior._compile.named import from_arrays, to_arrays
from numpyro_diffprior.em.state import Best, EMMetrics, EMState, Progress
from numpyro_diffprior.nets.adapters import split_network
from numpyro_diffprior.reading.model import BoundModel
from numpyro_diffprior.reading.tracing import Model

__all__ = [
    "Checkpoints",
    "describe",
    "describe_arrays",
    "describe_model",
    "describe_optimizers",
]

_FORMAT = "numpyro_diffprior.checkpoint"
_VERSION = 1
_NUM_KEPT = 3
_PROGRAMS = ("the model", "the optimizer")  # conditions that are digests of programs
_MAX_HASHED = 2**22  # elements of an array

Arrays = dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run, in a folder of its own.

    Args:
        folder: The folder; it is made if it does not exist.
        save_every: The number of iterations from one checkpoint to the next.
        conditions: Descriptions of what must not change, by name; None if all may.

    Raises:
        OSError: If the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        save_every: int = 1,
        conditions: Mapping[str, str] | None = None,
    ) -> None:
        import orbax.checkpoint as ocp  # slow to import

        self.folder = Path(folder).absolute()
        self.save_every = save_every
        self.conditions = conditions
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(
                f"EM.run: the folder of checkpoints '{self.folder}' cannot be written to; choose "
                "another one."
            )
        self._orbax = ocp
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=_NUM_KEPT)
        )
        self._last = self._manager.latest_step()
        self._failed = False

    def load(self, like: EMState) -> Progress | None:
        """Return the last progress that was saved, or None if there is none.

        Args:
            like: A state of the same structure, whose values are ignored.

        Raises:
            ValueError: If the last checkpoint is damaged, was not written by this class or by
                a later version of it, or belongs to a run under other conditions.
        """
        if self._last is None:
            return None
        try:
            header = self._read_header(self._last)
            self._check_form(header, like)
            if self.conditions is not None:
                self._check_conditions(header, self.conditions)
            return _unpack(self._read_arrays(self._last, header), like)
        except ValueError:
            self._manager.close()
            raise

    def save(self, progress: Progress, *, now: bool = False) -> None:
        """Save a progress in the background, if it is the turn of its iteration or ``now``.

        If that fails, a warning says why and the run goes on.
        """
        step = len(progress.history)
        if step == self._last or not (now or step % self.save_every == 0):
            return
        ocp, arrays = self._orbax, _pack(progress)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "jax": jax.__version__,
            "conditions": self.conditions,
            "arrays": _specs(arrays),
            "digest": _digest(arrays),
        }
        filled = {name: array for name, array in arrays.items() if array.size}
        items = ocp.args.Composite(
            header=ocp.args.JsonSave(header), arrays=ocp.args.PyTreeSave(filled)
        )
        self._try(lambda: self._manager.save(step, args=items, force=True))
        self._last = step

    def close(self) -> None:
        """Wait until all is written."""
        self._try(self._manager.wait_until_finished)
        self._try(self._manager.close)

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # orbax and tensorstore raise many types
            if not self._failed:
                warnings.warn(
                    f"EM.run: a checkpoint could not be written to '{self.folder}' "
                    f"({type(error).__name__}: {str(error)[:200]}); the run goes on in memory. "
                    "Free some space, or interrupt it and save its result.",
                    stacklevel=4,
                )
            self._failed = True

    def _at(self, step: int) -> Path:
        return self.folder / str(step)

    def _damaged(self, step: int, why: str) -> ValueError:
        """Return the error of a damaged checkpoint, which names the one before."""
        others = [other for other in self._manager.all_steps() if other < step]
        remedy = f"To go on from '{self._at(max(others))}', r" if others else "R"
        return ValueError(
            f"EM.run: the checkpoint '{self._at(step)}' cannot be read: {why}. {remedy}emove the "
            f"folder '{self._at(step)}'."
        )

    def _read_header(self, step: int) -> dict[str, Any]:
        items = self._orbax.args.Composite(header=self._orbax.args.JsonRestore())
        try:
            header = self._manager.restore(step, args=items).header
        except Exception as error:
            raise self._damaged(step, f"it has no header ({type(error).__name__})") from error
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise self._damaged(step, "it was not written by EM")
        if header.get("version") != _VERSION:
            raise ValueError(
                f"EM.run: the checkpoint '{self._at(step)}' has version {header.get('version')} "
                f"of the format, expected {_VERSION}; use the release of numpyro_diffprior that "
                "wrote it, or upgrade this one."
            )
        return header

    def _check_form(self, header: dict[str, Any], like: EMState) -> None:
        """Compare names, shapes and types of the arrays of priors and optimizers."""

        def chosen(specs: dict[str, Any]) -> dict[str, Any]:
            prefixes = ("state.priors.", "state.training.", "state.initial.")
            return {name: spec for name, spec in specs.items() if name.startswith(prefixes)}

        stored = chosen(header["arrays"])
        expected = chosen(_specs({f"state.{n}": x for n, x in to_arrays(like).items()}))
        for name in sorted(stored.keys() | expected.keys()):
            then, now = stored.get(name), expected.get(name)
            if then != now:
                raise ValueError(
                    f"EM.run: the checkpoint '{self._at(self._last or 0)}' is that of another "
                    f"prior or optimizer: '{name.removeprefix('state.')}' is {_say(then)} there, "
                    f"{_say(now)} here. Pass those of its run, or another folder."
                )

    def _check_conditions(self, header: dict[str, Any], conditions: Mapping[str, str]) -> None:
        """Compare the conditions; programs are comparable for one version of JAX."""
        stored = header["conditions"]
        for name in sorted(stored.keys() | conditions.keys()):
            then, now = stored.get(name), conditions.get(name)
            is_program = name in _PROGRAMS
            if then == now or (is_program and header["jax"] != jax.__version__):
                continue
            raise ValueError(
                f"EM.run: {name} differs from that of the checkpoint '{self._at(self._last or 0)}'"
                f": expected {then}, got {now}. Pass another folder, or go on under other "
                "conditions with `init_state=em.load_state(folder, ...)`."
            )

    def _read_arrays(self, step: int, header: dict[str, Any]) -> Arrays:
        ocp, specs = self._orbax, header["arrays"]
        filled = [name for name, (_, shape) in specs.items() if np.prod(shape, dtype=int)]
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in filled}
        items = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=how))
        try:
            arrays = dict(self._manager.restore(step, args=items).arrays)
        except Exception as error:
            raise self._damaged(
                step, f"its arrays are damaged ({type(error).__name__})"
            ) from error
        for name in specs.keys() - arrays.keys():
            dtype, shape = specs[name]
            arrays[name] = np.empty(shape, jnp.dtype(dtype))
        if _digest(arrays) != header["digest"]:
            raise self._damaged(step, "its arrays do not match their digest")
        return arrays


def _pack(progress: Progress) -> Arrays:
    """Return a progress as arrays."""
    state, best, history = progress
    groups: dict[str, Any] = {
        "state": state,
        "best": best if best.priors is not state.priors else best._replace(priors={}),
        "history": progress.columns,
    }
    return {
        f"{group}.{name}": np.asarray(array)
        for group, tree in groups.items()
        for name, array in to_arrays(tree).items()
    }


def _unpack(arrays: Arrays, like: EMState) -> Progress:
    """Undo `_pack`."""

    def group(name: str) -> Arrays:
        prefix = f"{name}."
        return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}

    stored = group("best")
    is_other = any(name.startswith("priors.") for name in stored)
    state: EMState = from_arrays(like, group("state"))
    best: Best = from_arrays(Best(like.priors if is_other else {}, like.params, 0.0, 0), stored)
    columns = group("history")
    rows = zip(*(jnp.asarray(columns[name]) for name in EMMetrics._fields), strict=True)
    if not is_other:
        best = best._replace(priors=state.priors)
    return Progress(state, best, [EMMetrics(*row) for row in rows])


def _specs(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return types and shapes by name, as JSON has them."""
    return {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}


def _say(spec: Any) -> str:
    """Return type and shape in words."""
    return "missing" if spec is None else f"{spec[0]} of shape {tuple(spec[1])}"


def _digest(arrays: Arrays) -> str:
    """Return the SHA-256 of arrays with their names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def describe(value: Any) -> str:
    """Return the representation of a setting, without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def describe_arrays(tree: Any) -> str:
    """Return a digest of a pytree of arrays and other values.

    Of arrays with more than 2^22 elements, evenly spaced ones of the first axis are taken.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array | np.ndarray | np.number | np.bool_):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            some = (slice(None, None, -(-leaf.size // _MAX_HASHED) or 1),) * min(leaf.ndim, 1)
            digest.update(np.asarray(leaf)[some].tobytes())
        else:
            digest.update(describe(leaf).encode())
    return digest.hexdigest()[:16]


def describe_model(
    bound: BoundModel, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Return digests of a model's program and sites, of its arguments and of its closure.

    Its first argument is left out.
    """
    form = bound.reading.form
    text = describe((bound.reading.program.jaxpr, form.latents, form.observed, form.params))
    found = {"the model": _hash(text)}
    try:
        named = dict(inspect.signature(model).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # a callable without a signature
        named = {str(i): value for i, value in enumerate(args)} | dict(kwargs)
    for name, value in list(named.items())[1:]:
        found[f"the argument '{name}'"] = describe_arrays(value)
    passed = set(bound.positions)
    closure = [x for i, x in enumerate(bound.data.arrays) if i not in passed]
    return found | {"the data that the model reads": describe_arrays(closure)}


def describe_optimizers(optimizer: optax.GradientTransformation, state: EMState) -> str:
    """Return a digest of the programs of an optimizer's updates of all networks."""
    text = ""
    for key, training in sorted(state.training.items()):
        weights = split_network(training.denoiser.net)[0]
        closed = jax.make_jaxpr(optimizer.update)(weights, training.opt_state, weights)
        text += key + describe(closed.jaxpr) + describe_arrays(closed.consts)
    return _hash(text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
