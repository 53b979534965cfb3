"""Posterior draws in a folder, in the format of Zarr, written as they are made."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from numpyro_diffprior._compile.devices import barrier, num_processes
from numpyro_diffprior.reading.latent import LatentSite
from numpyro_diffprior.reading.model import ModelReading

__all__ = ["DrawsFolder", "DrawsWriter", "key_of"]


class DrawsWriter(Protocol):
    """Takes draws, part by part."""

    def write(
        self, samples: Mapping[str, jax.Array], axis: int, start: int, stop: int, size: int
    ) -> None:
        """Write draws by site to a range of an axis of this size; those beyond are left out."""


class DrawsFolder:
    """A folder of draws and their statistics, which ``xarray.open_zarr`` opens.

    Draws have the dimensions ``draw``, the names of their plates, and ``x_dim_0``, ... for a site
    ``x``, as in ArviZ. The statistics are in the group ``stats``. A slash in the name of a site
    becomes a dot. Of several processes, the first one writes.

    Args:
        folder: The folder, which all processes see; it must not exist.
        reading: The reading of the model.
        mesh: The devices, or None.

    Raises:
        ImportError: If zarr is missing.
        FileExistsError: If the folder exists.
    """

    def __init__(
        self, folder: str | os.PathLike[str], reading: ModelReading, mesh: Mesh | None = None
    ) -> None:
        try:
            import zarr  # optional
        except ImportError as error:
            raise ImportError(
                "sample_posterior: draws in a folder need zarr: pip install "
                "'numpyro_diffprior[zarr]'"
            ) from error
        if os.path.exists(folder):
            raise FileExistsError(
                f"sample_posterior: '{os.fspath(folder)}' exists; draws need a new folder."
            )
        barrier("the folder does not exist", mesh)
        self._writes = num_processes(mesh) == 1 or jax.process_index() == 0
        self._folder, self._mesh, self._open = folder, mesh, zarr.open_group
        self._group: Any = self._open(folder, mode="w-") if self._writes else None
        self._sites = {site.name: site for g in reading.groups for site in g.latents.sites}
        self._num_groups = len(reading.groups)

    def finish(self) -> dict[str, Any]:
        """Return the draws by site, as arrays of Zarr, once all are written."""
        barrier("the draws are written", self._mesh)
        if not self._writes:
            self._group = self._open(self._folder, mode="r")
        return {name: self._group[key_of(name)] for name in self._sites}

    def write(
        self, samples: Mapping[str, jax.Array], axis: int, start: int, stop: int, size: int
    ) -> None:
        """Write draws by site to a range of an axis of this size; those beyond are left out."""
        if not self._writes:
            return
        for name, values in samples.items():
            x = np.asarray(values)
            if key_of(name) not in self._group:
                shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
                dims = ("draw", *_dims(self._sites[name]))
                _create(self._group, key_of(name), shape, x, dims)
            before = (slice(None),) * axis
            array: Any = self._group[key_of(name)]
            array[(*before, slice(start, stop))] = x[(*before, slice(stop - start))]

    def write_stats(self, stats: Mapping[str, jax.Array]) -> None:
        """Write the statistics."""
        if not self._writes:
            return
        site, group = next(iter(self._sites.values())), self._group.create_group("stats")
        batch = _dims(site)[: len(site.batch_shape)] if self._num_groups == 1 else ("element",)
        for name, values in stats.items():
            x = np.asarray(values)
            dims = ("draw", *batch, "level")[: x.ndim]
            _create(group, name, x.shape, x, dims)[...] = x


def _create(
    group: Any, name: str, shape: tuple[int, ...], part: np.ndarray, dims: tuple[str, ...]
) -> Any:
    """Create an array whose chunks have the shape of a part."""
    chunks = tuple(max(1, n) for n in part.shape)
    return group.create_array(
        name, shape=shape, chunks=chunks, dtype=part.dtype, dimension_names=dims
    )


def key_of(site: str) -> str:
    """Return the name of a site's array: one with a slash would be in a group of its own."""
    return site.replace("/", ".")


def _dims(site: LatentSite) -> tuple[str, ...]:
    """Return the names of the dimensions of a site's value."""
    plates = {plate.dim: plate.name for plate in site.plates}
    num_batch = len(site.batch_shape)
    names = [plates.get(i - num_batch, "") for i in range(num_batch)]
    names += [""] * len(site.event_shape)
    free = iter(range(len(names)))
    return tuple(name or f"{key_of(site.name)}_dim_{next(free)}" for name in names)
