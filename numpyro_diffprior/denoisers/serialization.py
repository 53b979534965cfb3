"""Save denoisers to safetensors files, which hold data and never code.

Arrays are stored as tensors. The structure of the denoiser is a tree, stored as JSON in the file's
header, with these nodes:

- ``{"type": name, "fields": {...}}``: a denoiser or covariance of this package;
- ``{"network": name, "config": {...}}``: a network, rebuilt as ``name(**config, rngs=...)``, whose
  weights are the tensors under the node's path;
- ``{"array": name}``: a tensor;
- ``{"items": [...]}``: a tuple;
- ``{"value": ...}``: a number or a string.

A file can only name types of this package and networks that the caller passes, so that loading an
untrusted file runs no untrusted code. A digest in the header detects a damaged file; it does not
authenticate the author.

References:
    The safetensors format, https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.denoisers.windows import WindowDenoiser
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.linalg.covariances import (
    Blocks,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Isotropic,
    Repeated,
)
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank
from numpyro_diffprior.nets import NETWORKS
from numpyro_diffprior.nets.adapters import named_arrays, replace_arrays

__all__ = ["load_denoiser", "read_metadata", "save_denoiser"]

_FORMAT = "numpyro_diffprior.denoiser"
_VERSION = "5"
_TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        GaussianDenoiser,
        MixtureDenoiser,
        NetworkDenoiser,
        ConditionedDenoiser,
        WindowDenoiser,
        Isotropic,
        Diagonal,
        DiagonalPlusLowRank,
        Dense,
        Blocks,
        Repeated,
        Stationary,
        StationaryPlusLowRank,
    )
}

_NEEDS_NUMBERS = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)

_Path = str | os.PathLike[str]
_Tensors = dict[str, np.ndarray]
_Networks = Mapping[str, Callable[..., nnx.Module]]


def save_denoiser(
    path: _Path, denoiser: Denoiser, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a denoiser to a file, atomically.

    A temporary file in the same folder is written first and then moved to ``path``, so that a
    reader sees either the old file or the complete new one.

    Args:
        path: The file, by convention ending in ``.safetensors``. An existing file is replaced; its
            permissions are kept.
        denoiser: A denoiser of this package. A custom network needs an attribute ``config``, the
            keyword arguments of its constructor except ``rngs``, JSON-serializable. The state of
            its random streams is not stored.
        metadata: JSON-serializable metadata, which `read_metadata` returns.

    Raises:
        ValueError: If a part of the denoiser has a type that cannot be stored, or if a network
            has no ``config`` or one that is not JSON-serializable.
        FileExistsError: If ``path`` exists and is not a regular file, such as a link or a device.
        PermissionError: If the file at ``path`` belongs to another user.
    """
    path = Path(path)
    mode = _mode_to_keep(path)
    tensors: _Tensors = {}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "tree": json.dumps(_encode(denoiser, "", tensors)),
        "metadata": _to_json(dict(metadata or {}), "metadata"),
    }
    header["digest"] = _digest(header, tensors)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(save(tensors, header))
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_denoiser(path: _Path, *, networks: _Networks | None = None) -> Denoiser:
    """Read a denoiser from a file written by `save_denoiser`; arrays keep their dtypes.

    Args:
        path: The file.
        networks: Custom network classes by name, ``{"MyNet": MyNet}``; they are called with the
            stored ``config`` and ``rngs``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by `save_denoiser`, is damaged or has another
            version, holds a network that is unknown or does not fit the class given for it, or
            holds 64-bit arrays while JAX is limited to 32 bits.
    """
    header, tensors = _read(path)
    tree, known = _from_json(header, "tree", path), {**NETWORKS, **(networks or {})}
    try:
        denoiser = _decode(tree, "", tensors, known)
    except RecursionError as error:
        raise ValueError(f"'{path}': the header is nested too deeply to be a denoiser.") from error
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"'{path}': expected a denoiser, got {type(denoiser).__name__}; the file is damaged."
        )
    return denoiser


def read_metadata(path: _Path) -> dict[str, Any]:
    """Return the metadata in a file written by `save_denoiser`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by `save_denoiser`, or has another version.
    """
    header, _ = _read(path, with_tensors=False)
    return _from_json(header, "metadata", path)


def _mode_to_keep(path: Path) -> int | None:
    """Return the permissions of the file to be replaced, or None if there is no file."""
    try:
        old = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise FileExistsError(
            f"'{path}': expected a regular file or no file to replace, got a link, a directory or "
            "a device; give another path, or remove it first."
        )
    if hasattr(os, "geteuid") and old.st_uid != os.geteuid():
        raise PermissionError(f"'{path}': the file to be replaced belongs to another user.")
    return stat.S_IMODE(old.st_mode)


def _digest(header: Mapping[str, str], tensors: _Tensors) -> str:
    """Return the SHA-256 of the content of a file."""
    digest = hashlib.sha256(json.dumps([header["tree"], header["metadata"]]).encode())
    for name, array in sorted(tensors.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(path: _Path, *, with_tensors: bool = True) -> tuple[dict[str, str], _Tensors]:
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            names = file.keys() if with_tensors else []
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"'{path}': expected a file written by save_denoiser, got one that is not a complete "
            f"safetensors file ({error}); check the path, or write it again."
        ) from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"'{path}': expected a file written by save_denoiser (format '{_FORMAT}'), got a "
            f"safetensors file of format {header.get('format')!r}; check the path."
        )
    if header.get("version") != _VERSION:
        raise ValueError(
            f"'{path}': expected version {_VERSION} of the format, got {header.get('version')}; "
            "load it with the release of numpyro_diffprior that wrote it, or upgrade this one."
        )
    if with_tensors and header.get("digest") != _digest(header, tensors):
        raise ValueError(
            f"'{path}': the content does not match the digest stored with it; the file is damaged."
        )
    return header, tensors


def _to_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The {what} must be JSON-serializable (dicts with string keys, lists, strings, "
            f"numbers), got {value!r}: {error}."
        ) from error


def _from_json(header: dict[str, str], key: str, path: _Path) -> Any:
    try:
        return json.loads(header.get(key, ""))
    except RecursionError as error:
        raise ValueError(f"'{path}': the '{key}' in the header is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"'{path}': expected JSON as '{key}' in the header, got {header.get(key)!r}; the file "
            "is damaged."
        ) from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _encode(value: Any, path: str, tensors: _Tensors) -> dict[str, Any]:
    name = type(value).__name__
    if _TYPES.get(name) is type(value):
        return {
            "type": name,
            "fields": {
                spec.name: _encode(getattr(value, spec.name), _join(path, spec.name), tensors)
                for spec in fields(value)
            },
        }
    match value:
        case nnx.Module():
            config = _config(value)
            for key, array in _weights(value).items():
                tensors[_join(path, key)] = np.asarray(array, order="C")
            return {"network": name, "config": config}
        case jax.Array() | np.ndarray() | np.generic():
            tensors[path] = np.asarray(value, order="C")
            return {"array": path}
        case tuple():
            items = [_encode(item, _join(path, str(i)), tensors) for i, item in enumerate(value)]
            return {"items": items}
        case bool() | int() | float() | str() | None:
            return {"value": value}
    where = f"The denoiser's '{path}'" if path else "The denoiser"
    raise ValueError(
        f"{where} is a {name}, which cannot be stored: expected one of {', '.join(_TYPES)}, or a "
        "flax nnx module as network."
    )


def _config(net: nnx.Module) -> dict[str, Any]:
    name = type(net).__name__
    try:
        config: Any = cast(Any, net).config
    except AttributeError as error:
        raise ValueError(
            f"The network {name} has no `config`: give it an attribute or property with the "
            "keyword arguments of its constructor except `rngs`, as a JSON-serializable dict."
        ) from error
    if not isinstance(config, Mapping):
        raise ValueError(f"Expected a dict as config of the network {name}, got {config!r}.")
    return json.loads(_to_json(dict(config), f"config of the network {name}"))


def _weights(net: nnx.Module) -> dict[str, jax.Array]:
    """Return all arrays of a network by path, except the state of random streams."""
    return named_arrays(nnx.state(net, nnx.Not(nnx.RngState)))


def _decode(node: Any, path: str, tensors: _Tensors, networks: _Networks) -> Any:
    match node:
        case {"type": str(name), "fields": dict(parts)}:
            if name not in _TYPES:
                raise ValueError(
                    f"expected one of the types {', '.join(_TYPES)}, got {name!r}; a later "
                    "release of numpyro_diffprior may know it."
                )
            cls = _TYPES[name]
            expected = [spec.name for spec in fields(cls)]
            if sorted(parts) != sorted(expected):
                raise ValueError(
                    f"expected the fields {expected} of a {name}, got {sorted(parts)}; the file "
                    "is damaged."
                )
            # Without __init__, as JAX rebuilds a pytree: nothing is converted or recomputed.
            instance: Any = object.__new__(cls)
            for key, part in parts.items():
                decoded = _decode(part, _join(path, key), tensors, networks)
                object.__setattr__(instance, key, decoded)
            return instance
        case {"network": str(name), "config": dict(config)}:
            return _build_network(name, config, path, tensors, networks)
        case {"array": str(key)} if key in tensors:
            return _to_jax(tensors[key], key)
        case {"items": list(items)}:
            return tuple(
                _decode(item, _join(path, str(i)), tensors, networks)
                for i, item in enumerate(items)
            )
        case {"value": bool() | int() | float() | str() | None as value}:
            return value
    raise ValueError(f"cannot read {node!r} at '{path}'; the file is damaged.")


def _build_network(
    name: str, config: dict[str, Any], path: str, tensors: _Tensors, networks: _Networks
) -> nnx.Module:
    if name not in networks:
        raise ValueError(
            f"expected one of the networks {', '.join(networks)}, got {name!r}; pass its class: "
            f'networks={{"{name}": {name}}}.'
        )
    prefix = _join(path, "")
    stored = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}

    def build() -> nnx.Module:
        try:
            return networks[name](**config, rngs=nnx.Rngs(0))
        except TypeError as error:
            if isinstance(error, _NEEDS_NUMBERS):
                raise
            raise ValueError(
                f"the network {name} does not take the stored config {config}: {error}; "
                "pass the class that was saved."
            ) from error

    try:  # A small file must not allocate a large network: compare shapes before building it.
        variables = jax.eval_shape(lambda: _weights(build()))
        # Under tracing, nnx does not report arrays that are not variables.
        found = {key: stored[key] for key in variables if key in stored}
        _check_shapes(variables, name, found)
    except _NEEDS_NUMBERS:
        pass  # The constructor needs concrete weights; the network is checked once it is built.
    net = build()
    _check_shapes(_weights(net), name, stored)
    arrays = {key: _to_jax(array, key) for key, array in stored.items()}
    nnx.update(net, replace_arrays(nnx.state(net, nnx.Not(nnx.RngState)), arrays))
    return net


def _check_shapes(weights: Mapping[str, Any], name: str, stored: _Tensors) -> None:
    shapes = {key: array.shape for key, array in stored.items()}
    wanted = {key: leaf.shape for key, leaf in weights.items()}
    if shapes != wanted:
        different = dict(sorted(wanted.items() - shapes.items()))
        superfluous = sorted(shapes.keys() - wanted.keys())
        raise ValueError(
            f"the weights stored for the network {name} do not fit the class given for it: "
            f"expected also {different}, got {[shapes.get(key) for key in different]} there, "
            f"and unexpected {superfluous}; pass the class that was saved."
        )


def _to_jax(array: np.ndarray, name: str) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"the array '{name}' is {array.dtype}, but JAX is limited to 32 bits; set the "
            "environment variable JAX_ENABLE_X64=1 to load it."
        )
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array.astype(float)).all():
        raise ValueError(
            f"the array '{name}' holds NaN or infinities; the run that wrote it diverged, or the "
            "file is damaged."
        )
    return jnp.asarray(array)
