"""One execution of a NumPyro model: its sites, on chosen elements of its plates.

A model runs under one handler, `Execution`, that decides what is an input of the model's program:

- the elements of divided plates; all other plates are taken whole, also those that the model
  itself would subsample;
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
from numpyro_diffprior.reading.unwrap import from_pairs, is_complex, to_pairs

__all__ = [
    "Execution",
    "Latent",
    "Model",
    "Param",
    "Slice",
    "check_names",
    "complex_noise",
    "find_prior",
    "fix_plates",
    "is_unobserved",
    "mask_priors",
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
    """The name of an input: the value of a ``numpyro.param`` site."""

    name: str


class fix_plates(Messenger):  # noqa: N801  # a NumPyro handler
    """Run a model on given elements of its plates, and on all elements of the others.

    Args:
        fn: The model.
        indices: The elements by the plate's name. What the model slices with
            `numpyro.subsample` follows.
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


class Execution(fix_plates):
    """Run a model, and make inputs of what changes between its blocks and its latent values.

    Args:
        fn: The model.
        indices: The elements of the divided plates, by name.
        arguments: The arrays among the model's arguments, traced.
    """

    def __init__(
        self,
        fn: Model | None = None,
        indices: Mapping[str, jax.Array] | None = None,
        arguments: Sequence[jax.Array] = (),
    ) -> None:
        super().__init__(fn, indices)
        self._arguments = arguments
        self._frames: list[Any] = []
        self._given: set[str] = set()
        self.params: dict[str, jax.Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set elements, slices and latent values."""
        super().process_message(msg)
        if msg["type"] == "sample" and not msg["is_observed"]:
            prior = find_prior(msg["fn"])
            if prior is not None:
                mean = jnp.broadcast_to(prior.mean, msg["fn"].shape())
                msg["value"] = name_input(mean, Latent(msg["name"]))
        elif msg["type"] == "param" and msg["value"] is not None:
            self._given.add(msg["name"])
        elif msg["type"] == "subsample" and self.indices:
            self._slice(msg)
        elif msg["type"] == "deterministic" and msg["name"].endswith(_PROBE):
            self._frames = list(msg["cond_indep_stack"])
            msg["stop"] = True

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Make inputs of the parameters that have no value but their first one."""
        if msg["type"] == "param" and msg["name"] not in self._given:
            first = jnp.asarray(msg["value"], jnp.result_type(float, msg["value"]))
            self.params[msg["name"]] = first
            msg["value"] = name_input(first, Param(msg["name"]))

    def _slice(self, msg: dict[str, Any]) -> None:
        """Make a slice of an argument an input, in place of the plates."""
        found = [i for i, argument in enumerate(self._arguments) if argument is msg["value"]]
        if not found:
            return
        # The message does not say in which plates it is; a message to all of them does.
        self._frames = []
        numpyro.deterministic(_PROBE, 0.0)
        value, axes = msg["value"], []
        for frame in self._frames:
            axis = value.ndim + frame.dim - msg["kwargs"]["event_dim"]
            if axis < 0 or value.shape[axis] == 1:
                continue
            if value.shape[axis] != self.sizes[frame.name]:
                return  # NumPyro says what is wrong
            if frame.name in self.indices:
                axes.append((axis, frame.name))
        if axes:
            shape = list(value.shape)
            for axis, plate in axes:
                shape[axis] = self.indices[plate].shape[0]
            template = jnp.zeros(shape, value.dtype)
            msg["value"] = name_input(template, Slice(found[0], tuple(axes)))
            msg["type"] = "sliced"  # which plates leave alone


_PROBE = "__numpyro_diffprior_plates__"


def run_model(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    indices: Mapping[str, jax.Array] | None = None,
    arguments: Sequence[jax.Array] = (),
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Run a model under `Execution`; return its trace and its parameters' first values.

    What the model draws on its own has the same key at every run.

    Raises:
        ValueError: If the model fails on a part of a plate, or picks elements by a boolean array
            among its arguments. Other errors of the model are its own.
    """
    execution = Execution(model, indices, arguments)
    try:
        trace = handlers.trace(handlers.seed(execution, rng_seed=0)).get_trace(*args, **kwargs)
    except jax.errors.NonConcreteBooleanIndexError as error:
        raise ValueError(
            "the model picks elements by a boolean array among its arguments, whose number is "
            "not known when it is compiled; hide values with `.mask(mask)` on the observed "
            "site's distribution, or let the model enclose the array."
        ) from error
    return trace, execution.params


class mask_priors(Messenger):  # noqa: N801  # a NumPyro handler
    """Leave out the diffusion priors' own densities.

    For `numpyro.infer.Gibbs`, in which a kernel samples other sites while the diffusion site
    stands still: its density is then a constant, but would be solved for anew at every leapfrog
    step. The kernels of this package do not ask for it. Only for that: a kernel that samples the
    diffusion site by its density would find it without a prior.

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
    """Draw complex values with noise in real and imaginary part, as observed ones are read.

    NumPyro draws real noise alone around a complex mean. For `numpyro.infer.Predictive` and the
    like; `calibrate` needs no help.

    Args:
        fn: The model.

    Example:
        >>> Predictive(complex_noise(model), samples)(rng_key, prior)  # doctest: +SKIP
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["value"] is not None or not is_complex(msg["fn"]):
            return
        key, fn = msg["kwargs"]["rng_key"], msg["fn"]
        if key is None:
            key = numpyro.prng_key()  # of the handler that seeds, which is further out
        if key is not None:
            pairs, _ = to_pairs(fn)
            msg["value"] = from_pairs(fn, pairs.sample(key, msg["kwargs"]["sample_shape"]))


def find_prior(fn: dist.Distribution) -> DiffusionPrior | None:
    """Return the diffusion prior inside of what plates, masks and `to_event` wrap around it."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, DiffusionPrior) else None


def check_names(owner: Callable[..., Any], model: Model, num_args: int, **options: Any) -> None:
    """Refuse an option that may have been meant for the model.

    Args:
        owner: The function that takes the options beside the model's keyword arguments.
        model: The model.
        num_args: How many arguments the model gets by position.
        **options: The options that were given.

    Raises:
        ValueError: If the model has an argument of the name of an option that is not its default.
    """
    try:
        names = list(inspect.signature(model).parameters)[num_args:]
    except (TypeError, ValueError):  # a callable without a signature
        return
    defaults = inspect.signature(owner).parameters
    for name in names:
        if name in options and options[name] is not defaults[name].default:
            raise ValueError(
                f"{owner.__name__}: `{name}` is an option of this function and an argument of the "
                "model as well; pass the model's by position, or give it another name."
            )


def is_unobserved(name: str, trace: Mapping[str, Any]) -> bool:
    """Whether a latent site stands for the hidden part of an observed one (``obs_mask=``)."""
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in trace
