"""The observed sites of a model, and how each is read.

A site is read by the moments of its distribution if its mean depends on the latent, or else by
its log-density; see `ObservedSite`. The dependencies of its parameters, moments and values are
found from the model's program. Therefore `describe` returns both the arrays of a site, which are
outputs of the program, and its static form, from which `decide` chooses how to read it once the
dependencies are known.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_diffprior._compile.arguments import StaticArguments, split_arguments
from numpyro_diffprior.reading.moments import Moments, gaussian_moments
from numpyro_diffprior.reading.units import standardize, standardized_log_density
from numpyro_diffprior.reading.unwrap import (
    elementwise_transforms,
    innermost,
    is_complex,
    peel,
    to_pairs,
    unwrap,
)

__all__ = ["Form", "ObservedSite", "Quantity", "SiteForm", "decide", "describe"]


class Quantity(Enum):
    """The quantity by which a site is read.

    Attributes:
        MOMENTS: The first two moments.
        PARAMETERS: The curvature of the log-density in the parameters that depend on the latent.
        EVENT: Its curvature in the event itself, one matrix per event.
        POTENTIAL: Its gradient and products with its curvature in the event, for large events.
    """

    MOMENTS = auto()
    PARAMETERS = auto()
    EVENT = auto()
    POTENTIAL = auto()


class Rule(NamedTuple):
    """How to read a distribution, given which of its parts depend on the latent.

    Moment matching is sensitive to the mean. It is insensitive to a change of only the covariance
    of a Gaussian family or the dispersion of counts, and nearly so to the shape of a gamma or a
    Weibull distribution.

    Attributes:
        shape: The positions of the shape parameters among the leaves.
        by_shape: The quantity to read if one of these depends on the latent.
        by_cov: The quantity to read if the covariance does; None to ignore the covariance.
        by_mean: The quantity to read if the mean does.
        otherwise: The quantity to read in all other cases.
        is_residual: Whether the density depends only on the difference of value and mean.
    """

    shape: tuple[int, ...] = ()
    by_shape: Quantity = Quantity.PARAMETERS
    by_cov: Quantity | None = None
    by_mean: Quantity = Quantity.MOMENTS
    otherwise: Quantity = Quantity.PARAMETERS
    is_residual: bool = False


class Form(NamedTuple):
    """A readable form of an observed distribution; static.

    Attributes:
        fn: The distribution without its arrays.
        rule: How to read it.
        is_full: Whether its moments have covariance matrices.
        error: The message of the error that its moments raised, or None.
    """

    fn: StaticArguments
    rule: Rule
    is_full: bool
    error: str | None


class SiteForm(NamedTuple):
    """An observed site without its arrays; static.

    Attributes:
        name: Its name.
        family: The name of its distribution's class, unwrapped.
        batch_shape: The batch shape of its distribution.
        plates: Its plates, each with its name and the number of elements that the model ran on.
        forms: The form of its distribution and, if that has elementwise transformations, the
            form for the values transformed back.
    """

    name: str
    family: str
    batch_shape: tuple[int, ...]
    plates: tuple[tuple[str, int], ...]
    forms: tuple[Form, ...]


class ObservedSite(NamedTuple):
    """How an observed site is read; static.

    Attributes:
        position: Its position among the observed sites of the model.
        form_position: The position of the form that is read among those of the site.
        quantity: The quantity that is read.
        depends: Which leaves of its distribution, unwrapped, depend on the latent.
        is_residual: Whether the difference of value and mean is read, since both depend on the
            latent.
    """

    position: int
    form_position: int
    quantity: Quantity
    depends: tuple[bool, ...]
    is_residual: bool


def describe(name: str, site: Mapping[str, Any]) -> tuple[SiteForm, dict[str, Any]]:
    """Describe an observed site of a trace.

    Returns:
        Its form, and its arrays by name: ``log_prob``, zero for masked values; ``scale``; the
        leaves of ``transforms``; and ``forms``. For every form, these are the leaves of the
        unwrapped distribution (``own``) and the values (``value``), and, in units of the noise,
        the leaves of the distribution (``fn``), the values (``quotient``) and the ``moments``.

    Raises:
        ValueError: If the values have another shape than the distribution.
    """
    fn, value = site["fn"], jnp.asarray(site["value"])
    if value.shape != fn.shape() and not isinstance(fn, dist.Unit):
        raise ValueError(
            f"observed site '{name}': expected values of shape {fn.shape()}, got "
            f"{value.shape}; pass arrays with an axis for a plate "
            "through `numpyro.subsample` inside the plate."
        )
    if is_complex(fn, value):
        try:
            fn, value = cast(tuple[dist.Distribution, jax.Array], to_pairs(fn, value))
        except ValueError as error:
            raise ValueError(f"observed site '{name}': {error}") from None
    own, _, mask = unwrap(fn)
    safe = value
    if not isinstance(mask, bool) and jnp.issubdtype(value.dtype, jnp.inexact):
        # Masked values may be NaN, which would make derivatives NaN.
        seen = mask.reshape(*mask.shape, *(1,) * own.event_dim)
        safe = jnp.where(seen | jnp.isfinite(value), value, 0)
    transforms = elementwise_transforms(fn)
    readable = [(fn, value)] + ([peel(fn, value)] if transforms else [])
    forms, arrays = zip(*(_describe_form(f, v) for f, v in readable), strict=True)
    plates = tuple((frame.name, frame.size) for frame in site["cond_indep_stack"])
    form = SiteForm(name, type(own).__name__, tuple(fn.batch_shape), plates, forms)
    return form, {
        "log_prob": standardized_log_density(fn, safe),
        "scale": jnp.ones(()) if site["scale"] is None else jnp.asarray(site["scale"]),
        "transforms": [jnp.asarray(leaf) for leaf in jax.tree.leaves(transforms)],
        "forms": list(arrays),
    }


def _describe_form(fn: dist.Distribution, value: jax.Array) -> tuple[Form, dict[str, Any]]:
    moments, error = None, None
    divided, quotient, _ = standardize(fn, value)
    try:
        moments = gaussian_moments(divided)
    except ValueError as reason:
        error = str(reason)
    leaves, static = split_arguments(divided)
    rule = _rule(innermost(divided), moments)
    form = Form(static, rule, moments is not None and moments.full, error)
    arrays: dict[str, Any] = {
        "own": [jnp.asarray(leaf) for leaf in jax.tree.leaves(innermost(fn))],
        "value": value,
        "fn": leaves,
        "quotient": quotient,
        "moments": {},
    }
    if moments is not None:
        transformed = quotient if moments.transform is None else moments.transform(quotient)
        arrays["moments"] = {
            "mean": moments.mean,
            "cov": moments.cov,
            "mask": jnp.asarray(moments.mask),
            "value": transformed.reshape(moments.mean.shape),
        }
    return form, arrays


def _rule(fn: dist.Distribution, moments: Moments | None) -> Rule:
    """Return the rule for an unwrapped distribution and its moments."""
    leaves = jax.tree.leaves(fn)

    def positions(parameter: Any) -> tuple[int, ...]:
        return tuple(i for i, leaf in enumerate(leaves) if leaf is parameter)

    match fn:
        case dist.Unit():
            return Rule(otherwise=Quantity.EVENT)
        case dist.MultivariateStudentT():
            shape = positions(fn.scale_tril)
            return Rule(shape, by_shape=Quantity.EVENT, by_mean=Quantity.PARAMETERS)
        case _ if moments is None:
            return Rule()
        case dist.Gamma() | dist.Weibull() | dist.GammaPoisson():
            return Rule(positions(fn.concentration))
        case dist.Normal():
            return Rule(by_cov=Quantity.PARAMETERS, otherwise=Quantity.MOMENTS, is_residual=True)
        case _ if moments.full and moments.transform is None:
            is_gaussian = not isinstance(fn, dist.GaussianCopula)
            return Rule(by_cov=Quantity.EVENT, otherwise=Quantity.MOMENTS, is_residual=is_gaussian)
        case _:
            return Rule()


def decide(
    position: int, form: SiteForm, marks: Mapping[str, Any], event_size: int
) -> ObservedSite | None:
    """Decide how a site is read.

    Args:
        position: The site's position among the observed sites.
        form: The site's form.
        marks: Which arrays of `describe` depend on the latent, a tree of the same structure.
        event_size: The number of elements of an event.

    Returns:
        The decision, or None where the site does not depend on the latent.

    Raises:
        ValueError: If the site depends on the latent but cannot be read.
    """
    if not marks["log_prob"]:
        return None
    # Values are transformed back if the transformation does not depend on the latent.
    chosen = len(form.forms) - 1 if not any(marks["transforms"]) else 0
    if marks["forms"][0]["value"]:
        chosen = 0  # the transformation's volume depends on the latent, too
    read, marked = form.forms[chosen], marks["forms"][chosen]
    if read.error is not None:
        raise ValueError(f"observed site '{form.name}': {read.error}")
    own, moments = tuple(marked["own"]), marked["moments"]
    rule = read.rule
    quantity = rule.otherwise
    if any(own[i] for i in rule.shape):
        quantity = rule.by_shape
    elif moments.get("cov") and rule.by_cov is not None:
        quantity = rule.by_cov
    elif moments.get("mean"):
        quantity = rule.by_mean
    is_residual = bool(marked["value"]) and quantity == Quantity.MOMENTS and rule.is_residual
    if marked["value"] and not is_residual:
        quantity = Quantity.EVENT
    if quantity == Quantity.EVENT and event_size > _MAX_MATRIX:
        quantity = Quantity.POTENTIAL
    if quantity == Quantity.PARAMETERS and not any(own):
        raise ValueError(
            f"observed site '{form.name}': {form.family} has no moments, and none of its "
            "parameters depends on the latent; add its log-density with `numpyro.factor` instead."
        )
    return ObservedSite(position, chosen, quantity, own, is_residual)


# The largest size of an event for which its Hessian matrix is computed.
_MAX_MATRIX = 64
