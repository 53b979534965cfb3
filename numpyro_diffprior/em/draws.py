"""The draws of all events: on the device, in host memory, or in memory-mapped files.

Arrays of NumPy are on the host, in memory or in a file; they are read and mended a few rows at a
time.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior._compile.lazy import as_lazy, chunks_of, lazy_arrays
from numpyro_diffprior.em.sites import Priors, Sites
from numpyro_diffprior.infer.folder import key_of
from numpyro_diffprior.metrics.transport import sliced_wasserstein
from numpyro_diffprior.reading.model import BoundModel

__all__ = [
    "DrawFiles",
    "are_all_finite",
    "compare_draws",
    "no_draws",
    "pool_draws",
    "put_draws",
    "replace_non_finite",
    "take_draws",
]

Draws = Mapping[str, jax.Array]


class DrawFiles:
    """The files of one E-step's draws, in the format of NumPy, mapped to memory.

    Names are never used again, so that a file of this name holds these draws. Those of earlier
    E-steps are unlinked, which leaves their arrays intact.

    Args:
        folder: The folder; it is made if it does not exist.
        iteration: The number of the E-step.

    Attributes:
        samples: The draws that were written, by site.
    """

    def __init__(self, folder: str, iteration: int) -> None:
        self._folder = Path(folder)
        if jax.process_count() > 1:
            self._folder /= str(jax.process_index())
        self._folder.mkdir(parents=True, exist_ok=True)
        self._iteration = iteration
        self.samples: dict[str, Any] = {}

    def write(self, samples: Draws, axis: int, start: int, stop: int, size: int) -> None:
        """Write draws by site to a range of an axis of this size; those beyond are left out."""
        for name, values in samples.items():
            x = np.asarray(values)
            if name not in self.samples:
                shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
                self.samples[name] = self.allocate(name, "drawn", shape, x.dtype)
            before = (slice(None),) * axis
            self.samples[name][(*before, slice(start, stop))] = x[(*before, slice(stop - start))]

    def allocate(self, site: str, kind: str, shape: tuple[int, ...], dtype: Any) -> np.memmap:
        """Return an array in a new file."""
        name = f"{_PREFIX}.{key_of(site)}.{self._iteration}.{kind}.{uuid4().hex}.npy"
        path = self._folder / name
        array: np.memmap = np.lib.format.open_memmap(path, "w+", dtype, shape)
        return array

    def keep(self, draws: Draws) -> None:
        """Unlink all files of draws in the folder but those of these draws."""
        arrays: list[Any] = list(draws.values())
        names = {Path(str(x.filename)).name for x in arrays if isinstance(x, np.memmap)}
        for path in self._folder.glob(f"{_PREFIX}.*.npy"):
            if path.name not in names:
                with contextlib.suppress(PermissionError):  # of Windows, for mapped files
                    path.unlink()


_PREFIX = "draws"


def no_draws(model: BoundModel, num_draws: int, on_host: bool) -> dict[str, Any]:
    """Return the draws before the first E-step, which are NaN, by site."""
    draws: dict[str, Any] = {}
    for group in model.reading.groups:
        for site in group.latents.sites:
            sizes = {plate.dim: plate.size for plate in site.plates}
            batch = [
                sizes.get(i - len(site.batch_shape), n) for i, n in enumerate(site.batch_shape)
            ]
            shape, dtype = (num_draws, *batch, *site.event_shape), model.reading.dtype
            if on_host:  # one number in memory
                draws[site.name] = np.broadcast_to(np.asarray(np.nan, dtype), shape)
            else:
                draws[site.name] = jnp.full(shape, jnp.nan, dtype)
    return draws


def take_draws(
    draws: Draws, model: BoundModel, chosen: Mapping[int, np.ndarray]
) -> dict[str, Any]:
    """Return the draws of chosen events, by site; see `EStep.choose`."""
    taken = dict(draws)
    for name, axis, index in _axes(model, chosen):
        taken[name] = draws[name][(slice(None),) * axis + (index,)]
    return taken


def put_draws(
    draws: Draws,
    new: Draws,
    model: BoundModel,
    chosen: Mapping[int, np.ndarray],
    files: DrawFiles | None = None,
) -> dict[str, Any]:
    """Return draws with new ones of chosen events; the inverse of `take_draws`."""
    put: dict[str, Any] = dict(new)
    for name, axis, index in _axes(model, chosen):
        x, at = draws[name], (slice(None),) * axis + (index,)
        if _is_on_host(x):
            whole: Any = np.empty(x.shape, x.dtype)
            if files is not None:
                whole = files.allocate(name, "all", x.shape, x.dtype)
            for rows in chunks_of(x.shape, axis + 1):
                whole[rows] = x[rows]
            whole[at] = new[name]
            put[name] = whole
        else:
            put[name] = x.at[at].set(new[name])
    return put


def _axes(
    model: BoundModel, chosen: Mapping[int, np.ndarray]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield the sites of groups of which some elements are chosen, with the axis of these."""
    for i, index in chosen.items():
        group = model.reading.groups[i]
        assert group.divided is not None
        axis = 1 + len(group.latents.batch_shape) + group.divided[0].dim
        for name in group.latents.names:
            yield name, axis, index


def replace_non_finite(
    draws: Draws, previous: Draws, priors: Priors, sites: Sites
) -> tuple[dict[str, Any], int]:
    """Replace draws that are not finite by the previous ones, or by the prior's mean.

    Dropping such events would bias the M-step towards events that are easy to draw.

    Returns:
        The draws, and how many were replaced.

    Raises:
        ValueError: If no draw of a site is finite.
    """
    mended, total = dict(draws), 0
    for site, key in sites.site_priors:
        x, mean = draws[site], priors[key].mean
        finite = _are_finite(x, mean.ndim)
        count = int(finite.size - finite.sum())
        if count == finite.size:
            raise ValueError(
                f"EM: none of the {count} draws of site '{site}' is finite; check that "
                "observations and arguments are, or use more sampler steps or another guidance."
            )
        if count:
            last = previous.get(site, mean)
            mended[site] = _mend(x, finite, last if last.shape == x.shape else None, mean)
        total += count
    return mended, total


def _mend(x: Any, finite: Any, last: Any, mean: jax.Array) -> Any:
    """Return draws of which those that are not finite have another value."""
    if not _is_on_host(x):
        fill: Any = mean
        if last is not None:
            fill = jnp.where(_expand(_are_finite(last, mean.ndim), mean.ndim), last, mean)
        return jnp.where(_expand(finite, mean.ndim), x, fill)
    mended: Any = x if x.flags.writeable else x.copy()
    bad = np.nonzero(~finite)
    fill = np.broadcast_to(np.asarray(mean), (len(bad[0]), *mean.shape))
    if last is not None:
        before = last[bad]
        fill = np.where(_expand(_are_finite(before, mean.ndim), mean.ndim), before, fill)
    mended[bad] = fill
    return mended


def are_all_finite(x: Any) -> bool:
    """Whether all draws are finite."""
    return bool(_are_finite(x, 1).all())


def _are_finite(x: Any, event_dim: int) -> Any:
    """Whether events are finite, with shape ``(*batch,)``."""
    batch = x.shape[: x.ndim - event_dim]
    if not _is_on_host(x):
        return jnp.isfinite(x).all(axis=tuple(range(-event_dim, 0)))
    finite = np.empty(batch, bool)
    for rows in chunks_of(x.shape, len(batch)):
        finite[rows] = np.isfinite(x[rows]).all(axis=tuple(range(-event_dim, 0)))
    return finite


def _expand(x: Any, event_dim: int) -> Any:
    return x.reshape(*x.shape, *(1,) * event_dim)


def pool_draws(draws: Draws, sites: Sites, key: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the draws of all sites of a prior, with shape ``(n, *shape)``.

    Those on the host are a lazy array. Events that have not been drawn have draws of others in
    their place, again and again.

    Returns:
        The draws; and which event is in each event's place, or None if each is in its own.
    """
    chosen = [draws[site] for site, name in sites.site_priors if name == key]
    parts: list[Any] = [x.reshape(-1, *shape) for x in chosen]
    on_host = _is_on_host(parts[0])
    xp = np if on_host else jnp
    finite = xp.concatenate([_are_finite(x, len(shape)) for x in parts])
    index = None
    if not finite.all():
        first = xp.argsort(~finite, stable=True)
        index = first[xp.arange(len(first)) % finite.sum()]
    if on_host:
        return _lazy_rows(parts, index), index
    x = parts[0] if len(parts) == 1 else xp.concatenate(parts)
    return (x if index is None else x[index]), index


def _lazy_rows(parts: Sequence[np.ndarray], index: np.ndarray | None) -> Any:
    """Return rows of arrays, one array after another, as a lazy array."""
    if len(parts) == 1 and index is None:
        return as_lazy(parts[0])
    ends = np.cumsum([len(x) for x in parts])

    def take(rows: np.ndarray) -> np.ndarray:
        rows = rows if index is None else index[rows]
        taken = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
        number = np.searchsorted(ends, rows, side="right")
        for i, x in enumerate(parts):
            own = number == i
            taken[own] = x[rows[own] - (ends[i] - len(x))]
        return taken

    return lazy_arrays(take, int(ends[-1]))


def _is_on_host(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def compare_draws(
    rng_key: jax.Array, draws: Draws, previous: Draws, priors: Priors, sites: Sites
) -> jax.Array:
    """Return the mean over sites of the sliced Wasserstein distance to the previous draws."""
    distances = []
    for site, key in sites.site_priors:
        shape = (-1, *priors[key].event_shape)
        x, y = (_some(values[site], shape) for values in (draws, previous))
        distances.append(_distance(rng_key, x, y, shape))
    return jnp.stack(distances).mean()


_MAX_NUM_COMPARED = 32_768


def _some(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a regular subset of draws on the host, or all of those on devices."""
    if not _is_on_host(x):
        return x
    events = x.reshape(shape)
    return events[:: -(-len(events) // _MAX_NUM_COMPARED)]


@partial(jax.jit, static_argnums=3)
def _distance(rng_key: jax.Array, x: jax.Array, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    x, y = x.reshape(shape), y.reshape(shape)
    # All projections are in memory at once.
    x, y = (events[:: -(-len(events) // _MAX_NUM_COMPARED)] for events in (x, y))
    return sliced_wasserstein(rng_key, x, y)
