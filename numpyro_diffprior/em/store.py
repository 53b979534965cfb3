"""Arrays by name with a header: in numbered folders, by orbax, or in numbered files.

A folder or file is written under another name and moved to its place when it is complete. The
header has a digest of the arrays, so that damage is found. No code is stored and none is executed.

Arrays that are mapped from files of their own are not copied, but get another name (a hard link):
nobody writes to such a file again.

References:
    Orbax, https://orbax.readthedocs.io.
    The safetensors format, https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from numpyro_diffprior._compile.lazy import chunks_of

__all__ = ["ArrayFiles", "Arrays", "Store", "specs_of"]

_FORMAT = "numpyro_diffprior.checkpoint"
_VERSION = 2

Arrays = dict[str, np.ndarray]


class Store:
    """Numbered entries in a folder, each of arrays by name and a header, written by orbax.

    They are written in the background; several processes write the same ones at the same time.

    Args:
        folder: The folder; it is made if it does not exist.
        num_kept: The number of entries to keep, the last ones.
        read_only: Whether entries are only read, while another process may write some.

    Raises:
        OSError: If the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, num_kept: int, read_only: bool = False) -> None:
        import orbax.checkpoint as ocp  # slow to import

        folder.mkdir(parents=True, exist_ok=True)
        if not (read_only or os.access(folder, os.W_OK)):
            raise PermissionError(
                f"EM.run: the folder of checkpoints '{folder}' cannot be written to; choose "
                "another one."
            )
        self.folder = folder
        self._orbax = ocp
        self._mapped = folder.with_name(_MAPPED)
        options = ocp.CheckpointManagerOptions(max_to_keep=num_kept, read_only=read_only)
        self._manager = ocp.CheckpointManager(folder, options=options)
        self._try = _Attempts(folder)

    def numbers(self) -> list[int]:
        """Return the numbers of the complete entries, in order."""
        return sorted(self._manager.all_steps())

    def at(self, number: int) -> Path:
        """Return the folder of an entry."""
        return self.folder / str(number)

    def write(self, number: int, arrays: Arrays, **header: Any) -> None:
        """Write an entry; if that fails, now or later, a warning says why, once."""
        header |= {
            "format": _FORMAT,
            "version": _VERSION,
            "jax": jax.__version__,
            "arrays": specs_of(arrays),
            "mapped": [name for name, array in arrays.items() if _is_mapped(array)],
            "digest": _digest(arrays),
        }
        self._try(lambda: self._link(number, arrays))
        # Orbax refuses arrays without elements.
        filled = {
            name: _unrepeated(array)
            for name, array in arrays.items()
            if array.size and not _is_mapped(array)
        }
        ocp = self._orbax
        items = ocp.args.Composite(
            header=ocp.args.JsonSave(header), arrays=ocp.args.PyTreeSave(filled)
        )
        self._try(lambda: self._manager.save(number, args=items, force=True))

    def read_header(self, number: int) -> dict[str, Any]:
        """Return the header of an entry.

        Raises:
            ValueError: If there is none, or one of another format or version.
        """
        items = self._orbax.args.Composite(header=self._orbax.args.JsonRestore())
        try:
            header = self._manager.restore(number, args=items).header
        except Exception as error:  # orbax and tensorstore raise many types
            raise self._damaged(number, f"it has no header ({type(error).__name__})") from error
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise self._damaged(number, "it was not written by EM")
        if header.get("version") != _VERSION:
            raise ValueError(
                f"EM.run: the checkpoint '{self.at(number)}' has version {header.get('version')} "
                f"of the format, expected {_VERSION}; use the release of numpyro_diffprior that "
                "wrote it, or upgrade this one."
            )
        return header

    def read_arrays(self, number: int, header: Mapping[str, Any]) -> Arrays:
        """Return the arrays of an entry with this header.

        Raises:
            ValueError: If they are damaged.
        """
        ocp, specs, mapped = self._orbax, header["arrays"], header.get("mapped", [])
        filled = [
            name
            for name, (_, shape) in specs.items()
            if np.prod(shape, dtype=int) and name not in mapped
        ]
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in filled}
        items = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=how))
        try:
            arrays = dict(self._manager.restore(number, args=items).arrays)
            for i, name in enumerate(mapped):
                arrays[name] = np.load(self._file(number, i), mmap_mode="r")
            for name, (dtype, shape) in specs.items():
                found = arrays.setdefault(name, np.empty(shape, jnp.dtype(dtype)))
                if found.shape != tuple(shape):  # one element stands for all
                    arrays[name] = np.broadcast_to(found, shape)
        except Exception as error:
            why = f"its arrays are damaged ({type(error).__name__})"
            raise self._damaged(number, why) from error
        if _digest(arrays) != header["digest"]:
            raise self._damaged(number, "its arrays do not match their digest")
        return arrays

    def close(self) -> None:
        """Wait until all is written."""
        self._try(self._manager.wait_until_finished)
        self._try(self._manager.close)

    def _link(self, number: int, arrays: Arrays) -> None:
        """Give mapped arrays names among the entries, and forget those of earlier entries."""
        mapped: list[Any] = [array for array in arrays.values() if _is_mapped(array)]
        if jax.process_index() > 0 or not (mapped or self._mapped.exists()):
            return
        self._mapped.mkdir(exist_ok=True)
        for i, array in enumerate(mapped):
            path = self._file(number, i)
            path.unlink(missing_ok=True)
            try:
                os.link(array.filename, path)
            except OSError:  # another file system, or one without links
                shutil.copyfile(array.filename, path)
        kept = {str(n) for n in (number, *self.numbers())}
        for path in self._mapped.glob("*.npy"):
            if path.name.split(".")[0] not in kept:
                path.unlink()

    def _file(self, number: int, i: int) -> Path:
        """Return the file of the i-th mapped array of an entry."""
        return self._mapped / f"{number}.{i}.npy"

    def _damaged(self, number: int, why: str) -> ValueError:
        """Return the error of a damaged entry, which names the one before."""
        others = [other for other in self.numbers() if other < number]
        remedy = f"To go on from '{self.at(max(others))}', r" if others else "R"
        return ValueError(
            f"EM.run: the checkpoint '{self.at(number)}' cannot be read: {why}. {remedy}emove the "
            f"folder '{self.at(number)}'."
        )


_MAPPED = "mapped"


class ArrayFiles:
    """Numbered files in a folder of one process, each of arrays by name and a header.

    Args:
        folder: The folder; it is made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._try = _Attempts(folder)

    def numbers(self) -> list[int]:
        """Return the numbers of the files, in order."""
        names = [path.stem for path in self.folder.glob(f"*{_SUFFIX}")]
        return sorted(int(name) for name in names if name.isdigit())

    def write(self, number: int, arrays: Arrays, **header: Any) -> None:
        """Write a file; if that fails, a warning says why, once."""
        path = self._at(number)
        partial = path.with_suffix(".partial")
        header |= {"digest": _digest(arrays)}

        def write() -> None:
            # Of other orders, safetensors would write the elements as they lie in memory.
            ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
            save_file(ordered, partial, {"header": json.dumps(header)})
            os.replace(partial, path)

        self._try(write)

    def read(self, number: int) -> tuple[dict[str, Any], Arrays]:
        """Return the header and the arrays of a file.

        Raises:
            ValueError: If they are damaged.
        """
        try:
            with safe_open(self._at(number), "np") as file:
                header: dict[str, Any] = json.loads((file.metadata() or {})["header"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}
            is_whole = header["digest"] == _digest(arrays)
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise ValueError(f"'{self._at(number)}' cannot be read: {error}") from error
        if not is_whole:
            raise ValueError(f"the arrays of '{self._at(number)}' do not match their digest")
        return header, arrays

    def delete(self, number: int) -> None:
        """Delete a file."""
        self._try(self._at(number).unlink)

    def _at(self, number: int) -> Path:
        return self.folder / f"{number}{_SUFFIX}"


_SUFFIX = ".safetensors"


class _Attempts:
    """Attempts to write to a folder, the first failure of which is a warning."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._has_failed = False

    def __call__(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            if not self._has_failed:
                warnings.warn(
                    f"EM.run: a checkpoint could not be written to '{self._folder}' "
                    f"({type(error).__name__}: {str(error)[-200:]}); the run goes on in memory. "
                    "Free some space, or interrupt it and save its result.",
                    stacklevel=5,
                )
            self._has_failed = True


def specs_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return types and shapes by name, as JSON has them."""
    return {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}


def _is_mapped(array: Any) -> bool:
    """Whether an array is the whole of a file in the format of NumPy."""
    if not (isinstance(array, np.memmap) and str(array.filename).endswith(".npy")):
        return False
    if not os.path.exists(str(array.filename)):  # another run has unlinked it
        return False
    whole: Any = np.load(str(array.filename), mmap_mode="r")
    return (whole.shape, whole.dtype, whole.offset) == (array.shape, array.dtype, array.offset)


def _unrepeated(array: np.ndarray) -> np.ndarray:
    """Return one element of an array that repeats it."""
    is_repeated = array.ndim > 0 and not any(array.strides)
    return array[(slice(1),) * array.ndim].copy() if is_repeated else array


def _digest(arrays: Arrays) -> str:
    """Return the SHA-256 of arrays with their names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        for rows in chunks_of(array.shape):
            # As bytes, without a copy; NumPy has no buffers of types such as bfloat16.
            digest.update(np.ascontiguousarray(array[rows]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
