"""Execution of a NumPyro model on chosen elements of its plates.

A model runs under one handler, `Execution`, which chooses the inputs of the model's program:

- the elements of divided plates; all other plates are taken whole, even if the model would
  subsample them;
- the slices that the model takes of its arguments with `numpyro.subsample`;
- the values of its diffusion sites (no sampler runs) and of its ``numpyro.param`` sites.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_diffprior._compile.program import name_input
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.unwrap import from_pairs, innermost, is_complex, to_pairs

__all__ = [
    "Execution",
    "LateParamError",
    "Latent",
    "Model",
    "Param",
    "Slice",
    "check_names",
    "complex_noise",
    "find_prior",
    "first_params",
    "fix_plates",
    "is_unobserved",
    "mask_priors",
    "mean_of_latent",
    "run_model",
]

Model = Callable[..., Any]


class Slice(NamedTuple):
    """The name of an input: a slice of an argument by the elements of divided plates.

    Attributes:
        position: The position of the array among the arrays of the arguments.
        axes: The axes that are sliced, each with the name of its plate.
    """

    position: int
    axes: tuple[tuple[int, str], ...]


class Latent(NamedTuple):
    """The name of an input: the value of a diffusion site."""

    name: str


class Param(NamedTuple):
    """The name of an input: the value of a ``numpyro.param`` site, or a leaf of it."""

    name: str
    leaf: int


class fix_plates(Messenger):  # noqa: N801  # a NumPyro handler
    """Run a model on given elements of its plates, and on all elements of the others.

    Args:
        fn: The model.
        indices: The indices of the elements, by plate; `numpyro.subsample` slices arrays by
            them, too.
    """

    def __init__(self, fn: Model | None = None, indices: Mapping[str, jax.Array] | None = None):
        self.indices = indices or {}
        self.sizes: dict[str, int] = {}
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the elements of a plate."""
        if msg["type"] == "plate":
            size, _ = msg["args"]
            index = self.indices.get(msg["name"])
            msg["value"] = jnp.arange(size) if index is None else index
            msg["args"] = (size, msg["value"].shape[0])
            self.sizes[msg["name"]] = size


class LateParamError(Exception):
    """A model asks for a parameter without an initial value, and gives one later.

    NumPyro's modules do. The model has to be executed again, with the initial value.
    """


class InitialParams(fix_plates):
    """Run a model on given elements, and collect the initial values of its parameters."""

    def __init__(self, fn: Model, indices: Mapping[str, jax.Array]) -> None:
        super().__init__(fn, indices)
        self.params: dict[str, Any] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set elements, and latent values without drawing them."""
        super().process_message(msg)
        mean = mean_of_latent(msg)
        if mean is not None:
            msg["value"] = mean

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Keep the value of a parameter."""
        if msg["type"] == "param" and msg["value"] is not None:
            self.params[msg["name"]] = msg["value"]


class Execution(fix_plates):
    """Run a model with plates, slices, latent values and parameters as inputs.

    Args:
        fn: The model.
        indices: The elements of the divided plates, by name.
        arguments: The arrays among the model's arguments, traced.
        first: First values of parameters, for models that ask for them before they give them.
    """

    def __init__(
        self,
        fn: Model | None = None,
        indices: Mapping[str, jax.Array] | None = None,
        arguments: Sequence[jax.Array] = (),
        first: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(fn, indices)
        self._arguments = arguments
        self._first = first
        self._asked: set[str] = set()
        self._frames: list[Any] = []
        self._given: set[str] = set()
        self.params: dict[str, Any] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set elements, slices and latent values."""
        super().process_message(msg)
        mean = mean_of_latent(msg)
        if mean is not None:
            msg["value"] = name_input(mean, Latent(msg["name"]))
        elif msg["type"] == "param":
            name = msg["name"]
            if msg["value"] is not None:
                self._given.add(name)
            elif self._first is not None and name in self._first:
                msg["value"] = self._first[name]
        elif msg["type"] == "subsample" and self.indices:
            self._slice(msg)
        elif msg["type"] == "deterministic" and msg["name"].endswith(_PROBE):
            self._frames = list(msg["cond_indep_stack"])
            msg["stop"] = True

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Turn parameters that only have an initial value into inputs."""
        if msg["type"] != "param":
            return
        name, value = msg["name"], msg["value"]
        if value is None:
            self._asked.add(name)
        elif name not in self._given:
            if name in self._asked and self._first is None:
                raise LateParamError(name)
            leaves, treedef = jax.tree.flatten(value)
            first = [jnp.asarray(leaf, jnp.result_type(float, leaf)) for leaf in leaves]
            self.params[name] = jax.tree.unflatten(treedef, first)
            inputs = [name_input(leaf, Param(name, i)) for i, leaf in enumerate(first)]
            msg["value"] = jax.tree.unflatten(treedef, inputs)

    def _slice(self, msg: dict[str, Any]) -> None:
        """Turn a slice of an argument into an input, so that the plates do not slice it."""
        positions = [i for i, argument in enumerate(self._arguments) if argument is msg["value"]]
        if not positions:
            return
        # The message does not list its plates; that of a deterministic site does.
        self._frames = []
        numpyro.deterministic(_PROBE, 0.0)
        value, axes = msg["value"], []
        for frame in self._frames:
            axis = value.ndim + frame.dim - msg["kwargs"]["event_dim"]
            if axis < 0 or value.shape[axis] == 1:
                continue
            if value.shape[axis] != self.sizes[frame.name]:
                return  # NumPyro raises the error
            if frame.name in self.indices:
                axes.append((axis, frame.name))
        if axes:
            shape = list(value.shape)
            for axis, plate in axes:
                shape[axis] = self.indices[plate].shape[0]
            template = jnp.zeros(shape, value.dtype)
            msg["value"] = name_input(template, Slice(positions[0], tuple(axes)))
            msg["type"] = "sliced"  # which plates ignore


def mean_of_latent(msg: dict[str, Any]) -> jax.Array | None:
    """Return the prior's mean in the shape of a latent diffusion site, None for other messages."""
    if msg["type"] != "sample" or msg["is_observed"]:
        return None
    prior = find_prior(msg["fn"])
    return None if prior is None else jnp.broadcast_to(prior.mean, msg["fn"].shape())


_PROBE = "__numpyro_diffprior_plates__"


def run_model(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    indices: Mapping[str, jax.Array] | None = None,
    arguments: Sequence[jax.Array] = (),
    first: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a model under `Execution`; return its trace and its parameters' initial values.

    Random draws of the model itself use the same key in every run.

    Raises:
        ValueError: If the model indexes with a boolean array among its arguments. Other errors
            of the model propagate.
        LateParamError: If the model asks for a parameter before it gives an initial value, and
            there is no ``first`` value.
    """
    execution = Execution(model, indices, arguments, first)
    try:
        trace = handlers.trace(handlers.seed(execution, rng_seed=0)).get_trace(*args, **kwargs)
    except jax.errors.NonConcreteBooleanIndexError as error:
        raise ValueError(
            "the model indexes with a boolean array among its arguments, so that shapes are not "
            "known at compile time; hide values with `.mask(mask)` on the observed site's "
            "distribution instead, or let the model close over the array."
        ) from error
    return trace, execution.params


def first_params(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: Mapping[str, jax.Array],
) -> dict[str, Any]:
    """Return the initial values of a model's parameters."""
    execution = InitialParams(model, indices)
    handlers.seed(execution, rng_seed=0)(*args, **kwargs)
    return execution.params


class mask_priors(Messenger):  # noqa: N801  # a NumPyro handler
    """Mask the log-densities of diffusion priors.

    For kernels in `numpyro.infer.Gibbs` that sample other sites with the diffusion site fixed:
    the prior's density is then constant, but NUTS would integrate the probability flow at every
    leapfrog step. The kernels of this package do not use the density. Do not mask priors for a
    kernel that samples the diffusion site by its density: the site would have no prior.

    Args:
        fn: The model. Its priors must not depend on the sites that are sampled.

    Example:
        >>> masked = mask_priors(model)  # doctest: +SKIP
        >>> kernel = Gibbs([(MMPSKernel(masked), ["x"]), (NUTS(masked), None)])  # doctest: +SKIP
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and find_prior(msg["fn"]) is not None:
            msg["fn"] = msg["fn"].mask(False)


class complex_noise(Messenger):  # noqa: N801  # a NumPyro handler
    """Sample and score complex observations with noise in the real and in the imaginary part.

    NumPyro samples real noise only around a complex mean, and its log-density is complex. Wrap
    the model in this handler for `numpyro.infer.Predictive` and for NUTS; `calibrate` does so
    itself. Observed values become pairs of real and imaginary parts.

    Args:
        fn: The model.

    Example:
        >>> Predictive(complex_noise(model), samples)(rng_key, prior)  # doctest: +SKIP
        >>> NUTS(mask_priors(complex_noise(model)))  # doctest: +SKIP
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not is_complex(msg["fn"], msg["value"]):
            return
        if msg["value"] is not None:
            msg["fn"], msg["value"] = to_pairs(msg["fn"], msg["value"])
            return
        key, fn = msg["kwargs"]["rng_key"], msg["fn"]
        if key is None:
            key = numpyro.prng_key()  # of the enclosing seed handler
        if key is not None:
            pairs, _ = to_pairs(fn)
            msg["value"] = from_pairs(fn, pairs.sample(key, msg["kwargs"]["sample_shape"]))


def find_prior(fn: dist.Distribution) -> DiffusionPrior | None:
    """Return the diffusion prior inside the wrappers of plates, masks and `to_event`, or None."""
    fn = innermost(fn)
    return fn if isinstance(fn, DiffusionPrior) else None


def check_names(
    owner: Callable[..., Any], model: Model, num_args: int, options: Mapping[str, Any]
) -> None:
    """Reject an option that may have been meant for the model.

    Args:
        owner: The function that takes the options and the model's keyword arguments.
        model: The model.
        num_args: The number of the model's positional arguments.
        options: The values of the owner's parameters, as given by ``locals()``.

    Raises:
        ValueError: If an option that differs from its default has the name of a model argument.
    """
    try:
        names = list(inspect.signature(model).parameters)[num_args:]
    except (TypeError, ValueError):  # a callable without a signature
        return
    for name, option in inspect.signature(owner).parameters.items():
        is_given = option.kind is option.KEYWORD_ONLY and options[name] is not option.default
        if is_given and name in names:
            raise ValueError(
                f"{owner.__name__}: `{name}` is an option of this function and an argument of the "
                "model as well; pass the model's by position, or give it another name."
            )


def is_unobserved(name: str, trace: Mapping[str, Any]) -> bool:
    """Whether a latent site is the unobserved part of an observed one (``obs_mask=``)."""
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in trace
