r"""Traces of NumPyro models on chosen elements of their plates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_diffprior.prior import DiffusionPrior

__all__ = [
    "Model",
    "bind",
    "bind_whole_plates",
    "fix_plates",
    "is_unobserved",
    "mask_priors",
    "trace_at_mean",
]


Model = Callable[..., Any]


class fix_plates(Messenger):  # noqa: N801  # a NumPyro handler
    """Run a model on given elements of its plates.

    Args:
        fn: The model.
        indices: The elements by the plate's name. What the model slices with
            `numpyro.subsample` follows.
    """

    def __init__(self, fn: Model | None = None, indices: Mapping[str, jax.Array] | None = None):
        self.indices = indices or {}
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set a plate's elements where they are given."""
        if msg["type"] == "plate" and msg["name"] in self.indices:
            index = self.indices[msg["name"]]
            msg["args"] = (msg["args"][0], index.shape[0])
            msg["value"] = index


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


def bind(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    indices: Mapping[str, jax.Array] | None = None,
) -> Callable[[], Any]:
    """Return the model with its arguments and plates' elements as a function of nothing."""

    def bound() -> Any:
        # The key only serves what the model draws on its own, such as a plate's subsample: the
        # same at every trace, so that all of them see the same data.
        try:
            with fix_plates(indices=indices), handlers.seed(rng_seed=0):
                return model(*args, **kwargs)
        except jax.errors.NonConcreteBooleanIndexError as error:
            raise ValueError(
                "the model picks elements by a boolean array among its arguments, whose number is "
                "not known when it is compiled; hide values with `.mask(mask)` on the observed "
                "site's distribution, or let the model enclose the array."
            ) from error
        except (TypeError, ValueError) as error:
            if not indices:
                raise
            raise ValueError(
                f"the model fails on a part of its plates {sorted(indices)}; what belongs to a "
                "plate's elements must pass through `numpyro.subsample` inside of the plate."
            ) from error

    return bound


def bind_whole_plates(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    indices: Mapping[str, jax.Array] | None = None,
) -> Callable[[], Any]:
    """Bind a model with whole plates, even where on its own it would subsample them.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        indices: Elements of the plates of which not all are asked for, by name.
    """
    trace = trace_at_mean(bind(model, args, kwargs, indices=indices))
    sizes = {name: site["args"][0] for name, site in trace.items() if site["type"] == "plate"}
    whole = {name: jnp.arange(size) for name, size in sizes.items()}
    return bind(model, args, kwargs, indices={**whole, **(indices or {})})


def trace_at_mean(bound: Callable[[], Any]) -> dict[str, Any]:
    """Trace a bound model with diffusion sites at their priors' means: no draw, no sampler."""
    return handlers.trace(handlers.substitute(bound, substitute_fn=prior_mean)).get_trace()


def find_prior(fn: dist.Distribution) -> DiffusionPrior | None:
    """Return the diffusion prior under what plates, masks and `to_event` wrap around it."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, DiffusionPrior) else None


def prior_mean(site: dict[str, Any]) -> jax.Array | None:
    """Put the mean in place of a draw, which would run the sampler."""
    if site["type"] != "sample" or site["is_observed"]:
        return None
    prior = find_prior(site["fn"])
    return None if prior is None else jnp.broadcast_to(prior.mean, site["fn"].shape())


def is_unobserved(name: str, trace: Mapping[str, Any]) -> bool:
    """Whether a latent site stands for the hidden part of an observed one (``obs_mask=``)."""
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in trace
