"""A model as read: a static reading, and the arrays that it uses.

A `ModelReading` consists of a model's program and a static description of its sites. Its groups of
latent sites build the denoiser and the likelihood of a block, in compiled code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior._compile.arguments import (
    StaticArguments,
    merge_arguments,
    split_arguments,
)
from numpyro_diffprior._compile.dependence import depends, picks_elements
from numpyro_diffprior._compile.program import Program, freeze
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.linalg.covariances import Covariance, Diagonal
from numpyro_diffprior.reading.latent import (
    LatentGroup,
    LatentSite,
    Plate,
    group_sites,
)
from numpyro_diffprior.reading.likelihood import LikelihoodReader
from numpyro_diffprior.reading.observed import ObservedSite, Quantity, SiteForm, decide

__all__ = [
    "Block",
    "GroupReading",
    "ModelData",
    "ModelForm",
    "ModelReading",
    "BoundModel",
    "Source",
    "block_indices",
    "join_blocks",
]


class ModelData(NamedTuple):
    """The arrays that a model takes.

    Attributes:
        arrays: Its arguments, and the arrays that it closes over.
        params: The values of its ``numpyro.param`` sites, by name; those that are missing have
            their first values.
        held: The elements that an array holds of a divided plate, in order, by the array's
            position and the plate's name; absent if it holds all.
    """

    arrays: list[jax.Array]
    params: dict[str, Any]
    held: dict[tuple[int, str], jax.Array] = {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class BoundModel:
    """A model as read, bound to its data; a pytree of the data.

    Attributes:
        reading: The model's program and sites; static.
        data: The arrays that it takes.
        positions: The position in the data of each array of the model's arguments, None for those
            that it does not use; static.
    """

    reading: "ModelReading" = field(metadata={"static": True})
    data: ModelData
    positions: tuple[int | None, ...] = field(metadata={"static": True})

    def with_params(self, params: Mapping[str, Any]) -> "BoundModel":
        """Return the model with values of its ``numpyro.param`` sites."""
        return replace(self, data=self.data._replace(params=dict(params)))

    def with_first_argument(self, value: Any) -> "BoundModel":
        """Return the model with the arrays of another first argument, of the same structure."""
        arrays = list(self.data.arrays)
        for position, array in zip(self.positions, split_arguments(value)[0]):
            if position is not None:
                arrays[position] = array
        return replace(self, data=self.data._replace(arrays=arrays))


class Block(NamedTuple):
    """A group of latent sites on some elements of its plates, in compiled code.

    Attributes:
        denoiser: The denoiser of all sites together.
        likelihood: The likelihood of all sites.
    """

    denoiser: Denoiser
    likelihood: Likelihood

    @property
    def mean(self) -> jax.Array:
        """A batch of events at the prior's mean."""
        shape = (*self.likelihood.batch_shape, *self.likelihood.event_shape)
        return jnp.broadcast_to(self.denoiser.mean, shape)


class Source(NamedTuple):
    """Where an input of the program comes from.

    Attributes:
        position: The position of an array in the data, or None.
        axes: The axes in which it is sliced, each with the name of its plate.
        plate: The name of the plate whose elements' indices it holds, or None.
        param: The name of the parameter whose value it holds, or None.
        leaf: The position of its leaf, if that value is a pytree.
    """

    position: int | None = None
    axes: tuple[tuple[int, str], ...] = ()
    plate: str | None = None
    param: str | None = None
    leaf: int = 0

    def take(self, params: Mapping[str, Any]) -> Any:
        """Return the value of the parameter, or None if it is missing."""
        if self.param is None or self.param not in params:
            return None
        return jax.tree.leaves(params[self.param])[self.leaf]


class ModelForm(NamedTuple):
    """The static form of a model's sites, beside its program.

    Attributes:
        latents: The latent sites.
        priors: Their priors' denoisers without arrays.
        observed: The forms of the observed sites.
        params: The names of the ``numpyro.param`` sites, each with its constraint.
        origins: For every latent site, where the arrays of its prior's denoiser come from: the
            positions of arrays of the model's arguments, None for others.
        couplings: For each observed site the latent sites whose plates it couples, if it depends
            on them.
        blocks: The numbers of elements of divided plates in a block, by name.
    """

    latents: tuple[LatentSite, ...]
    priors: tuple[StaticArguments, ...]
    observed: tuple[SiteForm, ...]
    params: tuple[tuple[str, Any], ...]
    origins: tuple[tuple[int | None, ...], ...]
    couplings: tuple[frozenset[str], ...]
    blocks: tuple[tuple[str, int], ...]


class ModelReading:
    """The program and the form of a model, without data; static, and compared by content.

    Args:
        program: The model's program. Its last inputs are the latent values.
        form: The form of the model's sites.
        treedef: The tree structure of the program's outputs.
        sources: Where each input of the program comes from.

    Attributes:
        blocks: The numbers of elements of divided plates in a block, by name.
    """

    def __init__(
        self, program: Program, form: ModelForm, treedef: Any, sources: tuple[Source, ...]
    ) -> None:
        self.program = program
        self.form = form
        self.treedef = treedef
        self.sources = sources
        self.blocks = dict(form.blocks)
        self._key = program, freeze(form), freeze(treedef), sources
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModelReading):
            return NotImplemented
        return self is other or (self._hash == other._hash and self._key == other._key)

    @property
    def sampler(self) -> Sampler:
        """The sampler of the priors."""
        return self.form.latents[0].sampler

    @property
    def event_size(self) -> int:
        """The number of elements of the largest events that are drawn together."""
        return max(group.latents.event_size for group in self.groups)

    @property
    def linear(self) -> bool:
        """Whether all means are affine in the events, and noise and values are constant."""
        return all(group.linear for group in self.groups)

    @property
    def dtype(self) -> jnp.dtype:
        """The floating type of the latent values."""
        position = next(iter(self.latent_inputs.values()))
        aval: Any = self.program.jaxpr.invars[position].aval
        return aval.dtype

    @property
    def groups(self) -> tuple["GroupReading", ...]:
        """The groups of latent sites that are drawn together."""
        return _groups(self)

    def inputs(self, data: ModelData, indices: Mapping[str, jax.Array] | None = None) -> list[Any]:
        """Return the inputs of the program, with None for latent values.

        Divided plates have the elements ``indices``, by name (default: the first ones).
        """
        indices = indices or {}

        def elements(plate: str) -> jax.Array:
            given = indices.get(plate)
            # As when the model was traced: of 64 bits, if they are enabled.
            return jnp.arange(self.blocks[plate]) if given is None else jnp.asarray(given, int)

        def make(source: Source) -> Any:
            if source.plate is not None:
                return elements(source.plate)
            if source.position is None:
                return source.take(data.params)
            array = jnp.asarray(data.arrays[source.position])
            for axis, plate in source.axes:
                index, held = elements(plate), data.held.get((source.position, plate))
                if held is not None:
                    index = jnp.searchsorted(held, index)
                array = jnp.take(array, index, axis)
            return array

        inputs = [make(source) for source in self.sources]
        if any(s.param is not None and inputs[i] is None for i, s in enumerate(self.sources)):
            first = self.evaluate(self.outputs["params"], inputs)()
            for i, source in enumerate(self.sources):
                if source.param is not None and inputs[i] is None:
                    inputs[i] = source.take(first)
        return inputs

    @cached_property
    def latent_inputs(self) -> dict[str, int]:
        """The positions of the latent values among the inputs, by site."""
        first = len(self.sources) - len(self.form.latents)
        return {site.name: first + i for i, site in enumerate(self.form.latents)}

    @cached_property
    def outputs(self) -> Any:
        """The positions of the outputs, as a tree."""
        count = self.treedef.num_leaves
        return jax.tree.unflatten(self.treedef, list(range(count)))

    def evaluate(self, tree: Any, inputs: Sequence[Any], latents: Sequence[str] = ()) -> Any:
        """Stage the evaluation of some outputs.

        Args:
            tree: A part of `outputs`.
            inputs: The inputs of the program, see `inputs`.
            latents: The names of the latent sites whose values are given later.

        Returns:
            A function of the values of these sites that returns the outputs, in the tree's form.
        """
        positions, treedef = jax.tree.flatten(tree)
        late = [self.latent_inputs[name] for name in latents]
        staged = self.program.stage(inputs, positions, late)
        return lambda *values: jax.tree.unflatten(treedef, staged(*values))

    def params(self, data: ModelData) -> dict[str, Any]:
        """Return the first values of the ``numpyro.param`` sites; traceable."""
        return self.evaluate(self.outputs["params"], self.inputs(data))()

    @property
    def constraints(self) -> dict[str, Any]:
        """The constraints of the ``numpyro.param`` sites."""
        return dict(self.form.params)

    def log_density(
        self,
        data: ModelData,
        values: Mapping[str, jax.Array],
        indices: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Return the log-density of all observed sites, scaled to whole plates."""
        names = list(self.latent_inputs)
        tree = [(site["scale"], site["log_prob"]) for site in self.outputs["observed"]]
        terms = self.evaluate(tree, self.inputs(data, indices), names)(
            *(values[name] for name in names)
        )
        return sum((jnp.sum(scale * log_prob) for scale, log_prob in terms), start=jnp.zeros(()))


class GroupReading:
    """A group of latent sites and how its observed sites are read; static.

    Args:
        reading: The reading of the model.
        latents: The latent sites.
        observed: How the observed sites that depend on them are read.

    Attributes:
        reader: The reader of their likelihood.
    """

    def __init__(
        self, reading: ModelReading, latents: LatentGroup, observed: Sequence[ObservedSite]
    ) -> None:
        self.reading = reading
        self.latents = latents
        self.observed = tuple(observed)
        forms = tuple(reading.form.observed[site.position] for site in self.observed)
        self.reader = LikelihoodReader(latents, self.observed, forms)

    @cached_property
    def linear(self) -> bool:
        """Whether means are affine in the events, and noise and values are constant."""
        if any(site.quantity in (Quantity.EVENT, Quantity.POTENTIAL) for site in self.observed):
            return False
        avals: list[Any] = [var.aval for var in self.reading.program.jaxpr.invars]
        specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]

        def derivative(x: jax.Array, v: jax.Array, inputs: list[Any]) -> Any:
            denoiser = self.latents.denoiser(self._prior_denoisers(inputs))
            evaluate = self._evaluate(denoiser, inputs)

            def read(x: jax.Array) -> Any:
                moments = self.reader.read(evaluate, x).moments
                return moments.y_hat, (moments.noise, moments.y)

            _, tangent, rest = jax.jvp(read, (x,), (v,), has_aux=True)
            return tangent, rest

        x = jax.eval_shape(lambda inputs: self._template(inputs)[1], specs)
        return not any(jax.tree.leaves(depends(derivative, x, x, specs, on=[0])))

    @cached_property
    def elementwise(self) -> bool:
        """Whether the likelihood is elementwise, see `Likelihood`."""
        if any(site.quantity in (Quantity.EVENT, Quantity.POTENTIAL) for site in self.observed):
            return False
        avals: list[Any] = [var.aval for var in self.reading.program.jaxpr.invars]
        specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]

        noises: list[Covariance] = []

        def mean(x: jax.Array, inputs: list[Any]) -> jax.Array:
            denoiser = self.latents.denoiser(self._prior_denoisers(inputs))
            moments = self.reader.read(self._evaluate(denoiser, inputs), x).moments
            noises.extend(getattr(moments.noise, "blocks", [moments.noise]))
            return moments.y_hat

        x = jax.eval_shape(lambda inputs: self._template(inputs)[1], specs)
        picks = picks_elements(mean, x, specs)
        return picks and all(isinstance(noise, Diagonal) for noise in noises)

    def bind(self, data: ModelData, indices: Mapping[str, jax.Array] | None = None) -> Block:
        """Return denoiser and likelihood on elements of the plates (default: the first ones)."""
        inputs = self.reading.inputs(data, indices)
        denoiser, template = self._template(inputs)
        evaluate = self._evaluate(denoiser, inputs)
        likelihood = self.reader.likelihood(
            evaluate, template, linear=self.linear, elementwise=self.elementwise
        )
        return Block(denoiser, likelihood)

    def prior_denoisers(
        self, data: ModelData, indices: Mapping[str, jax.Array] | None = None
    ) -> tuple[Denoiser, ...]:
        """Return the denoisers of the sites' priors; see `bind`."""
        return self._prior_denoisers(self.reading.inputs(data, indices))

    @property
    def divided(self) -> tuple[Plate, int] | None:
        """The plate that is divided into blocks, and a block's size; None if plates are whole."""
        plate = self.latents.largest_plate
        if plate is None or plate.name not in self.reading.blocks:
            return None
        return plate, self.reading.blocks[plate.name]

    def some_blocks(self, max_elements: int) -> np.ndarray | None:
        """Return blocks of evenly spaced elements of the divided plate, or None for all elements.

        A plate that is not divided is taken whole.

        Args:
            max_elements: The largest number of elements, if it is that of a block or more.
        """
        if self.divided is None:
            return None
        plate, size = self.divided
        num = max(1, max_elements // size)
        if num * size >= plate.size:
            return None
        return spaced(num * size, plate.size).reshape(num, size)

    def over_blocks(
        self,
        f: Callable[[dict[str, jax.Array]], Any],
        indices: jax.Array | np.ndarray | None = None,
    ) -> Any:
        """Map a function of the elements of a block over events of the plates; traceable.

        Args:
            f: Maps elements of divided plates, by name, to arrays whose first axes are the
                batch's.
            indices: The elements of each block, as those of `Part` (default: of all blocks).

        Returns:
            The results, with the shape of the batch in these axes: of as many events as there are
            indices, or of all events.
        """
        if self.divided is None:
            return f({})
        plate, size = self.divided
        if indices is None:
            indices = jnp.asarray(block_indices(plate.size, size))
        results = jax.lax.map(lambda index: f({plate.name: index}), indices)
        axis = len(self.latents.batch_shape) + plate.dim
        return join_blocks(results, axis, min(indices.size, plate.size))

    def _prior_denoisers(self, inputs: Sequence[Any]) -> tuple[Denoiser, ...]:
        reading = self.reading
        tree = [reading.outputs["priors"][name] for name in self.latents.names]
        arrays = reading.evaluate(tree, inputs)()
        statics = dict(zip(reading.latent_inputs, reading.form.priors, strict=True))
        return tuple(
            merge_arguments(leaves, statics[name])
            for name, leaves in zip(self.latents.names, arrays, strict=True)
        )

    def _template(self, inputs: Sequence[Any]) -> tuple[Denoiser, jax.Array]:
        """Return the denoiser, and a batch of events at the priors' means."""
        denoiser = self.latents.denoiser(self._prior_denoisers(inputs))
        shape = (*self.latents.batch_shape, *denoiser.event_shape)
        return denoiser, jnp.broadcast_to(denoiser.mean, shape)

    def _evaluate(self, denoiser: Denoiser, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return a function from a batch of events to the arrays of the observed sites."""
        reading = self.reading
        tree = [reading.outputs["observed"][site.position] for site in self.observed]
        staged = reading.evaluate(tree, inputs, self.latents.names)

        def evaluate(x: jax.Array) -> Any:
            values = self.latents.split(denoiser, x)
            return staged(*(values[name] for name in self.latents.names))

        return evaluate


def spaced(num: int, size: int) -> np.ndarray:
    """Return ``num`` evenly spaced indices of an axis."""
    return ((2 * np.arange(num) + 1) * size // (2 * num)).astype(np.int32)


def block_indices(size: int, block_size: int, num_blocks: int | None = None) -> np.ndarray:
    """Return the elements of each block of a plate, with shape ``(num_blocks, block_size)``.

    By default there are as few blocks as hold all elements. The last element fills the rest.
    """
    num_blocks = -(-size // block_size) if num_blocks is None else num_blocks
    elements = np.arange(num_blocks * block_size, dtype=np.int32).reshape(num_blocks, block_size)
    return np.minimum(elements, size - 1)


def join_blocks(results: Any, axis: int, size: int) -> Any:
    """Join blocks, which are the leading axis of arrays, along the axis of their elements."""

    def join(leaf: jax.Array) -> jax.Array:
        leaf = jnp.moveaxis(leaf, 0, axis)
        leaf = leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])
        return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)

    return jax.tree.map(join, results)


@lru_cache(maxsize=256)
def _groups(reading: ModelReading) -> tuple[GroupReading, ...]:
    """Group the latent sites by what the observed sites depend on, and decide how to read these.

    Raises:
        ValueError: If the prior of one site depends on another, if no observed site depends on a
            latent one, or if one cannot be read.
    """
    form, outputs = reading.form, reading.outputs
    by_latent = {
        name: jax.tree.unflatten(reading.treedef, reading.program.depends_on([position]))
        for name, position in reading.latent_inputs.items()
    }
    dependent = sorted(
        name
        for name in outputs["priors"]
        if any(any(marks["priors"][name]) for marks in by_latent.values())
    )
    if dependent:
        raise ValueError(
            f"the priors of the latent sites {dependent} depend on other sites with a "
            "DiffusionPrior; expected independent priors, which are sampled together. Sample such "
            "sites with `DiffusionReparam` and NUTS."
        )
    reached = [
        frozenset(n for n, marks in by_latent.items() if marks["observed"][i]["log_prob"])
        for i in range(len(form.observed))
    ]
    if not any(reached):
        names = " and ".join(f"'{site.name}'" for site in form.latents)
        raise ValueError(
            f"no observed site depends on the latent site {names}; pass the data that the model "
            "observes."
        )
    coupled = [
        bool(names & couples) for names, couples in zip(reached, form.couplings, strict=True)
    ]
    groups = group_sites(form.latents, zip(reached, coupled, strict=True))
    readings = []
    for group in groups:
        marks = reading.program.depends_on([reading.latent_inputs[n] for n in group.names])
        tree = jax.tree.unflatten(reading.treedef, marks)
        sites = [
            decide(i, site, tree["observed"][i], group.event_size)
            for i, site in enumerate(form.observed)
        ]
        readings.append(GroupReading(reading, group, [site for site in sites if site is not None]))
    return tuple(readings)
