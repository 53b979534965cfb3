"""Which observed sites of a NumPyro model tell of its latent, and what is to be read of each.

A site goes by the moments of its distribution where these tell all there is to know of the latent,
or else by its log-density; see `ObservedSite`. What depends on what is found by tracing.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers

from numpyro_diffprior._compile.dependence import depends
from numpyro_diffprior.reading.latent import LatentSite
from numpyro_diffprior.reading.moments import Moments, gaussian_moments
from numpyro_diffprior.reading.unwrap import elementwise_transforms, peel, unwrap

__all__ = ["ObservedSite", "find_observed_sites", "trace_at"]


def trace_at(bound: Callable[[], Any], latent: LatentSite, x: jax.Array) -> dict[str, Any]:
    """Return the trace of a bound model with a value of its latent site."""
    return handlers.trace(handlers.substitute(bound, data=latent.values(x))).get_trace()


_By = Literal["moments", "parameters", "event", "gradient"]


class ObservedSite(NamedTuple):
    """How an observed site is read; static.

    Attributes:
        name: Its name.
        is_peeled: Whether its values are transformed back to those of its base distribution.
        by: What is read of it: its moments, the curvature of its log-density in those of its
            parameters that depend on the latent or in the event itself, or its gradient only.
        depends: Which leaves of its distribution, unwrapped, depend on the latent.
    """

    name: str
    is_peeled: bool
    by: _By
    depends: tuple[bool, ...]


# Up to this size of an event, a potential's matrix of second derivatives is made.
_MAX_POTENTIAL = 64


def find_observed_sites(
    bound: Callable[[], Any], latent: LatentSite, template: jax.Array
) -> list[ObservedSite]:
    """Return the observed sites whose density depends on the latent."""

    def observed(x: jax.Array) -> dict[str, Any]:
        trace = trace_at(bound, latent, x)
        sites = {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
        for name, site in sites.items():
            fn, value = site["fn"], site["value"]
            if jnp.shape(value) != fn.shape() and not isinstance(fn, dist.Unit):
                raise ValueError(
                    f"observed site '{name}': expected values of shape {fn.shape()}, got "
                    f"{jnp.shape(value)}; what belongs to a plate's elements must pass "
                    "through `numpyro.subsample` inside of the plate."
                )
        return sites

    def parts(x: jax.Array) -> dict[str, Any]:
        found = {}
        for name, site in observed(x).items():
            fn, value = site["fn"], site["value"]
            readable = fn, peel(fn, value)[0]
            found[name] = {
                "log_prob": fn.log_prob(value),
                "leaves": [
                    list(map(jnp.asarray, jax.tree.leaves(unwrap(f).fn))) for f in readable
                ],
                "moments": [_moments_of(f) for f in readable],
                "transforms": [
                    jnp.asarray(t) for t in jax.tree.leaves(elementwise_transforms(fn))
                ],
            }
        return found

    marks = depends(parts, template)
    sites = []
    for name, site in observed(template).items():
        marked = marks[name]
        if not marked["log_prob"]:
            continue
        fn = site["fn"]
        is_peeled = bool(elementwise_transforms(fn)) and not any(marked["transforms"])
        read_as = peel(fn, site["value"])[0] if is_peeled else fn
        try:
            moments = gaussian_moments(read_as)
        except ValueError as error:
            raise ValueError(f"observed site '{name}': {error}") from None
        own = unwrap(read_as).fn
        leaves = tuple(marked["leaves"][int(is_peeled)])
        tells = marked["moments"][int(is_peeled)]
        by = _read_by(own, moments, leaves, **tells)
        if by == "event" and latent.prior.denoiser.event_size > _MAX_POTENTIAL:
            by = "moments" if tells.get("mean") else "gradient"
        if by == "parameters" and not any(leaves):
            raise ValueError(
                f"observed site '{name}': {type(unwrap(fn).fn).__name__} has no moments, and "
                "none of its parameters depends on the latent; add its log-density by "
                "`numpyro.factor` instead."
            )
        sites.append(ObservedSite(name, is_peeled, by, leaves))
    return sites


def _moments_of(fn: dist.Distribution) -> dict[str, jax.Array]:
    """Return mean and covariance, where there are such."""
    try:
        moments = gaussian_moments(fn)
    except ValueError:
        return {}
    return {} if moments is None else {"mean": moments.mean, "cov": moments.cov}


def _read_by(
    fn: dist.Distribution,
    moments: Moments | None,
    leaves: Sequence[bool],
    mean: bool = False,
    cov: bool = False,
) -> _By:
    """Say what is to be read of a distribution.

    Matched moments find what moves the mean. They do not see what moves only the covariance of a
    Gaussian family or the spread of counts, and little of the shape of a gamma or a Weibull
    distribution.

    Args:
        fn: The distribution, unwrapped.
        moments: Its moments.
        leaves: Which of its leaves depend on the latent.
        mean: Whether the mean of its moments depends on it.
        cov: Whether their covariance does.
    """

    def holds(parameter: jax.Array) -> bool:
        pairs = zip(jax.tree.leaves(fn), leaves, strict=True)
        return any(marked and leaf is parameter for leaf, marked in pairs)

    match fn:
        case dist.Unit():
            return "event"
        case dist.MultivariateStudentT() if holds(fn.scale_tril):
            return "event"
        case _ if moments is None:
            return "parameters"
        case dist.Gamma() | dist.Weibull() | dist.GammaPoisson() if holds(fn.concentration):
            return "parameters"
        case dist.Normal():
            return "parameters" if cov else "moments"
        case _ if moments.full and moments.transform is None:
            return "event" if cov else "moments"
        case _:
            return "moments" if mean else "parameters"
