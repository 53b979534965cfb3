"""The reader traces a NumPyro model; all later work uses the traced program.

`read` runs a model on the shapes of its arguments, never on their values. It returns a
`ModelReading`, which is static and hashable, and the arrays that the model uses: its arguments and
the arrays that it closes over. Functions are compiled for the reading, with the arrays as
arguments. A changed number gives another program, which is compiled anew; a changed array or an
unchanged model compiles nothing.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpyro.distributions import constraints

from numpyro_diffprior._compile.arguments import (
    StaticArguments,
    merge_arguments,
    split_arguments,
)
from numpyro_diffprior._compile.devices import num_devices, own_array, own_devices, replicate
from numpyro_diffprior._compile.lazy import LazyArray, as_lazy, is_lazy
from numpyro_diffprior._compile.program import trace
from numpyro_diffprior.reading.latent import (
    LatentGroup,
    couples,
    read_latent_site,
)
from numpyro_diffprior.reading.model import BoundModel, ModelData, ModelForm, ModelReading, Source
from numpyro_diffprior.reading.observed import describe
from numpyro_diffprior.reading.parts import axes_of
from numpyro_diffprior.reading.tracing import (
    Latent,
    LateParamError,
    Model,
    Param,
    Slice,
    find_prior,
    first_params,
    is_unobserved,
    run_model,
)

__all__ = ["read"]


def read(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    block_size: Callable[[LatentGroup], int] | None = None,
    mesh: Mesh | None = None,
    params: Mapping[str, Any] | None = None,
    purpose: str = "",
) -> BoundModel:
    """Read a model.

    Args:
        model: A NumPyro model.
        args: Its positional arguments; tracing uses only the shapes of arrays.
        kwargs: Its keyword arguments.
        block_size: Maps a group of latent sites to the number of elements of its largest plate
            in a block (default: plates are not divided).
        mesh: Devices to copy the arrays to, but for those that are sliced by divided plates if
            there are several devices: these stay in host memory and are divided by
            `numpyro_diffprior.reading.parts`.
        params: The values of ``numpyro.param`` sites, by name (default: their initial values).
        purpose: The use of the reading; the last division of plates is cached for each purpose.

    Raises:
        ValueError: If the model has no diffusion site, or latent sites that have no sampler; if
            the samplers of its priors differ; or if the model fails on a part of a plate. Errors
            of the model on whole plates propagate.
    """
    arrays, static = split_arguments((tuple(args), dict(kwargs)))
    specs = [_spec(array) for array in arrays]
    shapes = tuple((spec.shape, str(spec.dtype)) for spec in specs)
    signature = purpose, _name(model), static.treedef, shapes
    blocks = _LAST_DIVISIONS.get(signature, {}) if block_size is not None else {}
    traced = None
    if blocks:
        try:
            traced = _execute(model, specs, static, blocks)
        except Exception:  # an error of the model itself is raised again on whole plates
            blocks = {}
    if traced is None:
        traced = _execute(model, specs, static, {})
    if block_size is not None:
        wanted = _divide(traced.reading, block_size)
        if wanted != blocks:
            traced = _execute_on_part(model, specs, static, wanted)
        _LAST_DIVISIONS[signature] = wanted
        while len(_LAST_DIVISIONS) > _MAX_DIVISIONS:
            _LAST_DIVISIONS.pop(next(iter(_LAST_DIVISIONS)))
    data = [own_array(arrays[k] if isinstance(k, int) else k) for k in traced.kept]
    kept_at = {kept: i for i, kept in enumerate(traced.kept) if isinstance(kept, int)}
    positions = tuple(kept_at.get(i) for i in range(len(arrays)))
    blocks = traced.reading.blocks
    if num_devices(mesh) > 1:
        for i in {i for plate in blocks for i in axes_of(plate, traced.reading)}:
            data[i] = as_lazy(data[i])
    data = [
        # In parts, if plates are divided.
        x if is_lazy(x) and blocks else replicate(_load(x), own_devices(mesh))
        for x in data
    ]
    return BoundModel(traced.reading, ModelData(data, dict(params or {})), positions)


# The last division of plates into blocks, by model, purpose and shapes of arguments. It is the
# guess at the next one; a right guess saves a second execution of the model.
_LAST_DIVISIONS: dict[Any, dict[str, int]] = {}
_MAX_DIVISIONS = 64


def _name(model: Model) -> tuple[str, str]:
    return getattr(model, "__module__", ""), getattr(model, "__qualname__", type(model).__name__)


def _spec(array: Any) -> jax.ShapeDtypeStruct:
    dtype = array.dtype
    if isinstance(array, np.ndarray | np.generic | LazyArray):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(array), dtype)


def _load(array: Any) -> Any:
    return np.asarray(array) if is_lazy(array) else array


def _divide(reading: ModelReading, block_size: Callable[[LatentGroup], int]) -> dict[str, int]:
    """Return the number of elements in a block, by divided plate."""
    whole = {plate.name for g in reading.groups for plate in g.latents.joined_plates}
    blocks: dict[str, int] = {}
    for group in reading.groups:
        plate = group.latents.largest_plate
        if plate is None or plate.name in whole:
            continue
        size = max(1, block_size(group.latents))
        if size < plate.size:
            blocks[plate.name] = min(size, blocks.get(plate.name, size))
    return blocks


class _Executed(NamedTuple):
    reading: ModelReading
    kept: list[Any]  # positions of the arguments' arrays, and arrays that the model closes over


def _execute_on_part(
    model: Model, specs: list[Any], static: StaticArguments, blocks: Mapping[str, int]
) -> _Executed:
    if not blocks:
        return _execute(model, specs, static, {})
    try:
        return _execute(model, specs, static, blocks)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the model fails on a part of its plates {sorted(blocks)}, but not on all of them: "
            "pass arrays with an axis for a plate through `numpyro.subsample` inside "
            f"the plate. ({error})"
        ) from error


def _execute(
    model: Model, specs: list[Any], static: StaticArguments, blocks: Mapping[str, int]
) -> _Executed:
    """Execute a model once, on shapes."""
    forms: list[ModelForm] = []

    def run(
        arrays: list[jax.Array], indices: dict[str, jax.Array], *, is_late: bool = False
    ) -> Any:
        args, kwargs = merge_arguments(arrays, static)
        first = None
        if is_late:

            @jax.jit  # so that it is one equation of the program
            def find(arrays: list[jax.Array], indices: dict[str, jax.Array]) -> dict[str, Any]:
                args, kwargs = merge_arguments(arrays, static)
                return first_params(model, args, kwargs, indices)

            first = find(arrays, indices)
        sites, params = run_model(
            model, args, kwargs, indices=indices, arguments=arrays, first=first
        )
        form, outputs = _describe(sites, params, blocks)
        forms.append(form)
        return outputs

    indices = {name: jax.ShapeDtypeStruct((size,), int) for name, size in blocks.items()}
    try:
        traced = trace(run, specs, indices)
    except LateParamError:
        traced = trace(partial(run, is_late=True), specs, indices)
    form = forms[0]
    missing = [site.name for site in form.latents if Latent(site.name) not in traced.names]
    if missing:
        raise ValueError(
            f"the latent sites {missing} are sampled inside a compiled function or a loop; sample "
            "them in the model itself."
        )
    # The inputs in the program's order: closed-over arrays, arguments, elements, named inputs.
    kept: list[Any] = list(traced.data)
    positions: dict[int, int] = {}

    def keep(argument: int) -> int:
        if argument not in positions:
            positions[argument] = len(kept)
            kept.append(argument)
        return positions[argument]

    used = traced.program.used()
    sources: list[tuple[int, Source]] = [(i, Source(i)) for i in range(len(kept))]
    after = len(kept)
    sources += [(after + i, Source(keep(i))) for i in range(len(specs)) if used[after + i]]
    after += len(specs)
    sources += [(after + i, Source(plate=name)) for i, name in enumerate(sorted(blocks))]
    after += len(blocks)
    latents: dict[str, int] = {}
    for i, name in enumerate(traced.names):
        match name:
            case Slice():
                sources.append((after + i, Source(keep(name.position), name.axes)))
            case Param():
                sources.append((after + i, Source(param=name.name, leaf=name.leaf)))
            case Latent():
                latents[name.name] = after + i
    sources += [(latents[site.name], Source()) for site in form.latents]
    # An array of a prior that is an unchanged argument has the argument's variable.
    variables = {id(v): i for i, v in enumerate(traced.program.jaxpr.invars[len(traced.data) :])}
    outvars = jax.tree.unflatten(traced.treedef, traced.program.jaxpr.outvars)
    origins = tuple(
        tuple(variables.get(id(var)) for var in outvars["priors"][site.name])
        for site in form.latents
    )
    form = form._replace(origins=origins)
    program = traced.program.reorder([position for position, _ in sources])
    reading = ModelReading(program, form, traced.treedef, tuple(source for _, source in sources))
    return _Executed(reading, kept)


def _describe(
    sites: Mapping[str, Any], params: dict[str, Any], blocks: Mapping[str, int]
) -> tuple[ModelForm, Any]:
    """Describe a trace by its static form and its arrays."""
    samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
    sizes = {name: site["args"][0] for name, site in sites.items() if site["type"] == "plate"}
    latents = {
        name: site
        for name, site in samples.items()
        if not site["is_observed"] and not is_unobserved(name, sites)
    }
    priors = {
        name: prior
        for name, site in latents.items()
        if (prior := find_prior(site["fn"])) is not None
    }
    if not priors:
        raise ValueError(
            "no latent site with a DiffusionPrior was found in the model; expected one, such as "
            f'`numpyro.sample("x", prior)`. Its latent sites: {sorted(latents)}. (A prior inside '
            "another distribution is not found: transform its draw, not the prior.)"
        )
    if others := sorted(set(latents) - set(priors)):
        raise ValueError(
            f"the latent sites {others} have no sampler: pass their values if they are "
            "observed, give them values with `numpyro.handlers.condition`, or sample them by "
            "another kernel in `numpyro.infer.Gibbs`."
        )
    samplers = {prior.sampler for prior in priors.values()}
    if len(samplers) > 1:
        raise ValueError(
            f"the priors of the latent sites {list(priors)} have different samplers; expected "
            f"one, got {sorted(map(str, samplers))}."
        )
    sites_read = tuple(
        read_latent_site(name, latents[name], prior, sizes) for name, prior in priors.items()
    )
    parts = {name: split_arguments(prior.denoiser) for name, prior in priors.items()}
    seen = {name: site for name, site in samples.items() if site["is_observed"]}
    described = [describe(name, site) for name, site in seen.items()]
    form = ModelForm(
        latents=sites_read,
        priors=tuple(static for _, static in parts.values()),
        observed=tuple(site for site, _ in described),
        params=tuple(
            (name, sites[name]["kwargs"].get("constraint", constraints.real)) for name in params
        ),
        origins=(),
        couplings=tuple(
            frozenset(latent.name for latent in sites_read if couples(site, latent))
            for site in seen.values()
        ),
        blocks=tuple(sorted(blocks.items())),
    )
    outputs = {
        "priors": {name: arrays for name, (arrays, _) in parts.items()},
        "observed": [arrays for _, arrays in described],
        "params": params,
    }
    return form, outputs
