r"""Checkpoints of a run of EM, from which it goes on as if it had never stopped.

A checkpoint holds the `Progress` of a run after an iteration, and the *conditions* of the run: the
model, its data, the random key and the settings, as digests, so that a run goes on under the same
conditions only. Beside it are the draws of the E-step in progress, which need not be made again,
and the history of the run in a netCDF file for xarray, which is written but never read.
"""

import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior._compile.named import from_arrays, to_arrays
from numpyro_diffprior.em.conditions import describe_arrays
from numpyro_diffprior.em.state import Best, EMMetrics, EMState, Progress
from numpyro_diffprior.em.store import ArrayFiles, Arrays, Store, specs_of
from numpyro_diffprior.infer.blocks import PosteriorSamples
from numpyro_diffprior.infer.progress import Division

__all__ = ["Checkpoints"]

_NUM_KEPT = 3
_HISTORY = "history.nc"
_DRAWS = "draws"
_DRAWS_SECONDS = 300.0  # from one save of draws to the next


class Checkpoints:
    """The checkpoints of one run, in a folder of its own.

    Args:
        folder: The folder; it is made if it does not exist.
        save_every: The number of iterations from one checkpoint to the next.
        conditions: Descriptions of what must not change, by name; None if all may.
        read_only: Whether nothing in the folder is changed: a run may be writing to it.

    Raises:
        OSError: If the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        save_every: int = 1,
        conditions: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ) -> None:
        path = Path(folder).absolute()
        self._history = path / _HISTORY
        self._has_failed = False
        self._save_every = save_every
        self._conditions = conditions
        self._iterations = Store(path / "iterations", _NUM_KEPT, read_only)
        self._draws = ArrayFiles(path / _name_draws())
        self._last = max(self._iterations.numbers(), default=None)
        self._parts: list[tuple[int, Division, PosteriorSamples]] = []  # not yet saved
        self._num_saved = 0  # parts of the E-step in progress
        self._num_files = 0  # which hold them
        self._draws_of: int | None = None  # the number of iterations before those saved
        self._last_time = time.monotonic()

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
        header = self._iterations.read_header(self._last)
        self._check_form(header, like)
        if self._conditions is not None:
            self._check_conditions(header, self._conditions)
        return _unpack(self._iterations.read_arrays(self._last, header), like)

    def save(self, progress: Progress, *, now: bool = False) -> None:
        """Save a progress in the background, if it is the turn of its iteration or ``now``."""
        number = len(progress.history)
        if number != self._last and (now or number % self._save_every == 0):
            self._iterations.write(number, _pack(progress), conditions=self._conditions)
            self._last = number
            self._last_time = time.monotonic()
            self.save_history(progress)
            self._drop_others()

    def save_history(self, progress: Progress) -> None:
        """Replace the file of the history; if that fails, a warning says why, once."""
        if jax.process_index() > 0:
            return
        partial = self._history.with_name(f"{_HISTORY}.partial")
        try:
            partial.write_bytes(progress.to_dataset().to_netcdf(engine="scipy"))
            os.replace(partial, self._history)
        except Exception as error:  # a run of days must not end here
            if not self._has_failed:
                warnings.warn(
                    f"EM.run: the history could not be written to '{self._history}' "
                    f"({type(error).__name__}: {error}); the run goes on without that file.",
                    stacklevel=4,
                )
            self._has_failed = True

    def load_draws(self, progress: Progress) -> dict[int, tuple[Division, list[PosteriorSamples]]]:
        """Return the parts of the next E-step that were drawn already, by group of sites."""
        parts: dict[int, tuple[Division, list[PosteriorSamples]]] = {}
        origin = self._origin(progress)
        for number in self._draws.numbers():
            try:
                header, arrays = self._draws.read(number)
            except ValueError:
                break  # the others are drawn again, with the same numbers
            if header["origin"] != origin or header["num_before"] != self._num_saved:
                break  # of another E-step, or some before them are lost
            self._draws_of = len(progress.history)
            self._num_saved += len(header["groups"])
            self._num_files += 1
            for i, (group, *numbers) in enumerate(header["groups"]):
                own = _of_group(arrays, str(i))
                kinds = {k: _of_group(own, k) for k in PosteriorSamples._fields}
                part = PosteriorSamples(**jax.tree.map(jnp.asarray, kinds))
                division = Division(*numbers)
                if group not in parts or parts[group][0] != division:
                    parts[group] = (division, [])  # a run on other devices began anew
                parts[group][1].append(part)
        return parts

    def add_draws(
        self, progress: Progress, group: int, part: PosteriorSamples, division: Division
    ) -> None:
        """Take a part of the next E-step; if the last save was long ago, save those since."""
        self._parts.append((group, division, part))
        if time.monotonic() - self._last_time >= _DRAWS_SECONDS:
            self.save_draws(progress)

    def save_draws(self, progress: Progress) -> None:
        """Save the parts of the next E-step that were drawn since the last save.

        Each of several processes saves its own, of an E-step after a checkpoint: they do not make
        another one, which all would have to do at once.
        """
        if jax.process_count() == 1 and self._parts:
            self.save(progress, now=True)
        if not self._parts or self._last != len(progress.history):
            return
        if self._draws_of != len(progress.history):
            self._drop_draws()
        arrays = {
            f"{i}.{kind}.{name}": np.asarray(x)
            for i, (*_, part) in enumerate(self._parts)
            for kind, values in part._asdict().items()
            for name, x in values.items()
        }
        groups = [(group, *division) for group, division, _ in self._parts]
        origin, num_before = self._origin(progress), self._num_saved
        # In place of a file that could not be read, if there is one.
        self._num_files += 1
        header = {"origin": origin, "num_before": num_before, "groups": groups}
        self._draws.write(self._num_files, arrays, **header)
        self._draws_of = len(progress.history)
        self._num_saved += len(groups)
        self.forget_draws()
        self._last_time = time.monotonic()

    def forget_draws(self) -> None:
        """Forget parts that were not saved, since their E-step is done."""
        self._parts = []

    def close(self) -> None:
        """Wait until all is written."""
        self._iterations.close()
        if self._draws_of is not None and self._draws_of != self._last:
            self._drop_draws()

    def _drop_others(self) -> None:
        """Delete draws of other numbers of processes, which were of an E-step before."""
        own = self._draws.folder
        for path in own.parent.glob(f"{_DRAWS}-*.of*"):
            if path.suffix != own.suffix:
                shutil.rmtree(path, ignore_errors=True)

    def _drop_draws(self) -> None:
        """Delete the draws of an E-step that is done, the last ones first."""
        for number in reversed(self._draws.numbers()):
            self._draws.delete(number)
        self._num_saved = self._num_files = 0

    def _origin(self, progress: Progress) -> Any:
        """What the draws of the next E-step depend on."""
        return [describe_arrays(progress.state.rng_key), self._conditions]

    def _check_form(self, header: dict[str, Any], like: EMState) -> None:
        """Compare names, shapes and types of the arrays of priors and optimizers."""

        def chosen(specs: dict[str, Any]) -> dict[str, Any]:
            prefixes = ("state.priors.", "state.training.", "state.initial.")
            return {name: spec for name, spec in specs.items() if name.startswith(prefixes)}

        stored = chosen(header["arrays"])
        expected = chosen(specs_of({f"state.{n}": x for n, x in to_arrays(like).items()}))
        for name in sorted(stored.keys() | expected.keys()):
            then, now = stored.get(name), expected.get(name)
            if then != now:
                raise ValueError(
                    f"EM.run: the checkpoint '{self._path}' is that of another prior or "
                    f"optimizer: '{name.removeprefix('state.')}' is {_say(then)} there, "
                    f"{_say(now)} here. Pass those of its run, or another folder."
                )

    def _check_conditions(self, header: dict[str, Any], conditions: Mapping[str, Any]) -> None:
        """Compare the conditions; an optimizer's program is comparable for one version of JAX."""
        stored = header["conditions"]
        for name in sorted(stored.keys() | conditions.keys()):
            then, now = stored.get(name), conditions.get(name)
            if _agree(then, now) or (name == "the optimizer" and header["jax"] != jax.__version__):
                continue
            if isinstance(then, list) and isinstance(now, list):
                pairs = zip(then, now, strict=True)
                then, now = next((a, b) for a, b in pairs if not _agree([a], [b]))
            raise ValueError(
                f"EM.run: {name} differs from that of the checkpoint '{self._path}': expected "
                f"{then}, got {now}. Pass another folder, or go on under other conditions with "
                "`init_state=em.load_state(folder, ...)`."
            )

    @property
    def _path(self) -> Path:
        return self._iterations.at(self._last or 0)


def _name_draws() -> str:
    """Return the name of the folder of this process's draws."""
    if jax.process_count() == 1:
        return _DRAWS
    return f"{_DRAWS}-{jax.process_index()}.of{jax.process_count()}"


def _pack(progress: Progress) -> Arrays:
    """Return a progress as arrays."""
    state, best, _ = progress
    groups: dict[str, Any] = {
        "state": state._replace(draws={}),
        "best": best if best.priors is not state.priors else best._replace(priors={}),
        "history": progress.columns,
    }
    arrays = {
        f"{group}.{name}": np.asarray(array)
        for group, tree in groups.items()
        for name, array in to_arrays(tree).items()
    }
    # They may be in files.
    return arrays | {f"state.draws.{site}": np.asanyarray(x) for site, x in state.draws.items()}


def _unpack(arrays: Arrays, like: EMState) -> Progress:
    """Undo `_pack`."""
    stored = _of_group(arrays, "best")
    is_other = any(name.startswith("priors.") for name in stored)
    state: EMState = from_arrays(like, _of_group(arrays, "state"))
    best: Best = from_arrays(Best(like.priors if is_other else {}, like.params, 0.0, 0), stored)
    columns = _of_group(arrays, "history")
    rows = zip(*(jnp.asarray(columns[name]) for name in EMMetrics._fields), strict=True)
    if not is_other:
        best = best._replace(priors=state.priors)
    return Progress(state, best, [EMMetrics(*row) for row in rows])


def _of_group(arrays: Arrays, group: str) -> Arrays:
    """Return the arrays whose names start with that of a group, without it."""
    prefix = f"{group}."
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


def _agree(then: Any, now: Any) -> bool:
    """Whether two descriptions are equal; numbers may differ by rounding."""
    if isinstance(then, list) and isinstance(now, list):
        return np.allclose(then, now, rtol=1e-4, equal_nan=True)
    return bool(then == now)


def _say(spec: Any) -> str:
    """Return type and shape in words."""
    return "missing" if spec is None else f"{spec[0]} of shape {tuple(spec[1])}"
