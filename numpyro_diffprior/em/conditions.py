r"""Descriptions of all that the numbers of a run depend on, to be compared by a later run."""

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr

from numpyro_diffprior._compile.lazy import LazyArray
from numpyro_diffprior.diffusion.minibatches import augment_inputs
from numpyro_diffprior.em.m_step import MStep
from numpyro_diffprior.em.state import EMState
from numpyro_diffprior.nets.adapters import split_network
from numpyro_diffprior.reading.model import BoundModel, spaced
from numpyro_diffprior.reading.parts import load_elements
from numpyro_diffprior.reading.tracing import Model

__all__ = [
    "describe",
    "describe_arrays",
    "describe_augment",
    "describe_model",
    "describe_optimizers",
]

_NUM_ROWS = 4096  # of a mapped file that are read at once, or of another lazy array at all


def describe(value: Any) -> str:
    """Return the representation of a setting, without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def describe_arrays(tree: Any) -> str:
    """Return a digest of a pytree of arrays and other values.

    Lazy arrays are represented by some of their rows, but memory-mapped files are not.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, LazyArray):
            digest.update(f"{leaf.shape}".encode())
            leaf = leaf[spaced(min(len(leaf), _NUM_ROWS), len(leaf))]
        if isinstance(leaf, jax.Array | np.ndarray | np.number | np.bool_):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            array = leaf if isinstance(leaf, np.memmap) else np.asarray(leaf)
            for start in range(0, len(array) if array.ndim else 1, _NUM_ROWS):
                rows = array[start : start + _NUM_ROWS] if array.ndim else array
                digest.update(rows.tobytes())
        else:
            digest.update(describe(leaf).encode())
    return digest.hexdigest()[:16]


def describe_model(
    bound: BoundModel, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a model: its sites, its density, its arguments but the first, and its closure.

    The text of a program differs between processes that hash differently, so the density stands
    for it: at normal latent values, times powers of ten from 1e-30 to 1e30.
    """
    form = bound.reading.form
    sites = {site.name: site.event_shape for site in form.latents}
    found: dict[str, Any] = {
        "the model": describe((sites, [site.name for site in form.observed], form.params)),
        "the density of the model": [float(x) for x in _densities(load_elements(bound, {}))],
    }
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
        text += key + _program(optimizer.update, weights, training.opt_state, weights)
    return _hash(text)


def describe_augment(m_step: MStep, state: EMState) -> str:
    """Return a digest of the programs of augmentations of the events of all networks."""
    text = ""
    for key, training in sorted(state.training.items()):
        if (augment := m_step.augment_of(key)) is not None:
            text += key + _program(augment, *augment_inputs(training.denoiser))
    return _hash(text)


def _program(function: Callable[..., Any], *args: Any) -> str:
    """Return the text of a function's program, and a digest of its constants."""
    closed = jax.make_jaxpr(function)(*args)
    return describe(closed.jaxpr) + describe_arrays(_constants(closed))


def _constants(closed: ClosedJaxpr) -> list[Any]:
    """Return the constants of a program and of those in it, such as functions under `jit`."""
    found = list(closed.consts)
    for equation in closed.eqns:
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
            if isinstance(leaf, ClosedJaxpr):
                found += _constants(leaf)
    return found


@jax.jit
def _densities(bound: BoundModel) -> jax.Array:
    """Return log-densities of the observed sites, of the first elements of divided plates."""
    reading, keys = bound.reading, iter(jax.random.split(jax.random.key(0), 1000))
    normal = {
        site.name: jax.random.normal(next(keys), site.shape) for site in reading.form.latents
    }

    def at(scale: jax.Array) -> jax.Array:
        values = {name: (scale * z).astype(reading.dtype) for name, z in normal.items()}
        return reading.log_density(bound.data, values)

    return jax.lax.map(at, 10.0 ** jnp.arange(-30, 31, 3))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
