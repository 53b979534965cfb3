r"""The diffusion sites of a NumPyro model, read from its trace.

Events are the elements of the latent's plates, read apart from each other. Where an observed site
couples them (it is not in all of these plates, or the latent sites are in different ones), whole
plates are one event. What the observed sites say of them: `numpyro_diffprior.reading.likelihood`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from numpyro import handlers

from numpyro_diffprior._compile.dependence import depends
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.wrappers import PlateDenoiser, ProductDenoiser
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.tracing import find_prior, is_unobserved, trace_at_mean

__all__ = ["LatentSite", "read_latent"]


class LatentSite(NamedTuple):
    """The latent sites with diffusion priors, as one: in most models there is one anyway.

    Attributes:
        names: The sites' names.
        prior: The distribution of the site, or of several together (see `ProductDenoiser`).
        batch_shape: The shape of the batch of events.
        plates: The names of its plates, outermost first.
        plate_sizes: Their full sizes.
        plate_dims: Their dimensions, counted from the right of the batch shape.
        joined: Names and full sizes of the plates that are part of the event, since observations
            couple their elements.
        parts: The sites' own priors.
    """

    names: tuple[str, ...]
    prior: DiffusionPrior
    batch_shape: tuple[int, ...]
    plates: tuple[str, ...]
    plate_sizes: tuple[int, ...]
    plate_dims: tuple[int, ...]
    joined: tuple[tuple[str, int], ...] = ()
    parts: tuple[DiffusionPrior, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the batch of events."""
        return (*self.batch_shape, *self.prior.event_shape)

    def values(self, x: jax.Array) -> dict[str, jax.Array]:
        """Return events by site; ``x`` may have further axes in front."""
        if len(self.names) == 1:
            return {self.names[0]: x}
        product = cast(ProductDenoiser, self.prior.denoiser)
        return dict(zip(self.names, product.split(x), strict=True))

    def join(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """Undo `values`."""
        if len(self.names) == 1:
            return values[self.names[0]]
        product = cast(ProductDenoiser, self.prior.denoiser)
        return product.join([values[name] for name in self.names])


def read_latent(bound: Callable[[], Any]) -> LatentSite:
    """Find the latent sites with a diffusion prior in a bound model.

    Raises:
        ValueError: If there is none, if there are several with different samplers, if the prior of
            one depends on another, or a latent site that nobody samples.
    """
    trace = trace_at_mean(bound)
    latents = {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and not is_unobserved(name, trace)
    }
    priors = {
        name: prior
        for name, site in latents.items()
        if (prior := find_prior(site["fn"])) is not None
    }
    others = sorted(set(latents) - set(priors))
    if not priors:
        raise ValueError(
            "no latent site with a DiffusionPrior was found in the model; expected one, such as "
            f'`numpyro.sample("x", prior)`. Its latent sites: {sorted(latents)}. (One inside of '
            "another distribution is not found: transform its draw, not the prior.)"
        )
    if others:
        raise ValueError(
            f"nobody samples the latent sites {others}; pass their values if they are "
            "observed, give them values with `numpyro.handlers.condition`, or sample them beside "
            "this one in `numpyro.infer.Gibbs`."
        )
    _check_independent(bound, priors, latents)
    sizes = {name: site["args"][0] for name, site in trace.items() if site["type"] == "plate"}
    sites = [_read_site_of(prior, name, latents[name], sizes) for name, prior in priors.items()]
    samplers = {prior.sampler for prior in priors.values()}
    if len(samplers) > 1:
        raise ValueError(
            f"the priors of the latent sites {list(priors)} have different samplers; expected "
            f"one, got {sorted(map(str, samplers))}."
        )
    apart = len({(site.batch_shape, site.plates) for site in sites}) > 1
    if apart or _are_coupled(bound, sites, trace):
        return _join_plates(sites, sizes)
    if len(sites) == 1:
        return sites[0]
    joint = _join_priors(sites, [site.prior.denoiser for site in sites])
    parts = tuple(priors.values())
    return sites[0]._replace(names=tuple(priors), prior=joint, parts=parts)


def _check_independent(
    bound: Callable[[], Any], priors: Mapping[str, DiffusionPrior], latents: Mapping[str, Any]
) -> None:
    """Refuse priors that depend on other diffusion sites: they are drawn together, as independent.

    Only several can.
    """
    if len(priors) == 1:
        return

    def parameters(values: dict[str, jax.Array]) -> dict[str, list[jax.Array]]:
        trace = handlers.trace(handlers.substitute(bound, data=values)).get_trace()
        found = {name: find_prior(trace[name]["fn"]) for name in priors}
        return {name: jax.tree.leaves(prior.denoiser) for name, prior in found.items() if prior}

    values = {
        name: jnp.broadcast_to(prior.mean, latents[name]["fn"].shape())
        for name, prior in priors.items()
    }
    marks = depends(parameters, values)
    if dependent := sorted(name for name, mark in marks.items() if any(mark)):
        raise ValueError(
            f"the priors of the latent sites {dependent} depend on other sites with a "
            "DiffusionPrior; expected independent priors, which are sampled together. Sample such "
            "sites with `DiffusionReparam` and NUTS."
        )


def _join_priors(sites: list[LatentSite], denoisers: list[Denoiser]) -> DiffusionPrior:
    denoiser = denoisers[0] if len(sites) == 1 else ProductDenoiser(tuple(denoisers))
    return DiffusionPrior(denoiser, sampler=sites[0].prior.sampler)


def _join_plates(sites: list[LatentSite], sizes: Mapping[str, int]) -> LatentSite:
    """Make whole plates one event."""
    names = tuple(name for site in sites for name in site.names)
    joint = _join_priors(
        sites, [PlateDenoiser(site.prior.denoiser, site.batch_shape) for site in sites]
    )
    plates = dict.fromkeys(plate for site in sites for plate in site.plates)
    joined = tuple((plate, sizes[plate]) for plate in plates)
    parts = tuple(site.prior for site in sites)
    return LatentSite(names, joint, (), (), (), (), joined, parts)


def _are_coupled(
    bound: Callable[[], Any], sites: list[LatentSite], trace: Mapping[str, Any]
) -> bool:
    """Whether an observed site depends on several elements of the latent's plates."""
    latent = sites[0]
    suspects = {
        name
        for name, site in trace.items()
        if site["type"] == "sample" and site["is_observed"] and _couples(site, latent)
    }
    if not suspects:
        return False
    values = {
        name: jnp.broadcast_to(site.prior.mean, site.shape)
        for site in sites
        for name in site.names
    }

    def log_probs(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        trace = handlers.trace(handlers.substitute(bound, data=values)).get_trace()
        sites = {name: trace[name] for name in sorted(suspects)}
        return {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()}

    return any(depends(log_probs, values).values())


def _couples(site: Mapping[str, Any], latent: LatentSite) -> bool:
    """Whether an observed site is not in all of the latent's plates, with an element for each."""
    missing = set(latent.plates) - {frame.name for frame in site["cond_indep_stack"]}
    batch_shape = site["fn"].batch_shape
    padded = (1,) * (len(latent.batch_shape) - len(batch_shape)) + tuple(batch_shape)
    sizes = padded[len(padded) - len(latent.batch_shape) :]
    pairs = zip(latent.batch_shape, sizes, strict=True)
    return bool(missing) or any(size not in (1, own) for size, own in pairs)


def _read_site_of(
    prior: DiffusionPrior, name: str, site: Mapping[str, Any], sizes: Mapping[str, int]
) -> LatentSite:
    frames = site["cond_indep_stack"]
    if site["fn"].shape() != (*site["fn"].batch_shape, *prior.event_shape):
        raise ValueError(
            f"latent site '{name}': expected events of shape {prior.event_shape} in plates, got "
            f"events of shape {site['fn'].event_shape}; replace `.to_event` by a plate."
        )
    return LatentSite(
        (name,),
        prior,
        tuple(site["fn"].batch_shape),
        tuple(frame.name for frame in frames),
        tuple(sizes[frame.name] for frame in frames),
        tuple(frame.dim for frame in frames),
        parts=(prior,),
    )
