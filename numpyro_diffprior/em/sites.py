"""One prior, or several in a dict: which governs which site, and functions of all of them.

What is made for each prior has the structure of what was passed: one thing, or a dict of things.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.latent import LatentSite

__all__ = [
    "Sites",
    "all_of",
    "map_over",
    "map_priors",
    "map_trained",
    "mend_draws",
    "one_of",
    "pool",
    "read_sites",
]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Sites:
    """The diffusion sites of a model, static.

    Attributes:
        keys: The priors' names in their dict by site (None for a prior that is not in one).
    """

    keys: tuple[tuple[str, str | None], ...]


def read_sites(prior: Any, latent: LatentSite) -> Sites:
    """Find which of the priors that were passed to a model governs which of its sites.

    Raises:
        ValueError: If a site has a prior that is not in the dict, or if one with a network governs
            no site or is in the dict twice.
    """
    if not isinstance(prior, Mapping):
        return Sites(tuple((site, None) for site in latent.names))
    learned = {k: p for k, p in prior.items() if isinstance(p.denoiser, NetworkDenoiser)}
    for value in learned.values():
        same = [k for k, p in learned.items() if p.denoiser is value.denoiser]
        if len(same) > 1:
            raise ValueError(
                f"EM: expected priors with denoisers of their own, got the same one as {same}; "
                "build a NetworkDenoiser and a DiffusionPrior for each. Sites that share a prior "
                "take it from one key."
            )
    keys = []
    for site, part in zip(latent.names, latent.parts, strict=True):
        found = [key for key, value in prior.items() if _is_of(part.denoiser, value)]
        if not found:
            raise ValueError(
                f"EM: latent site '{site}' has a prior that is not among those passed, "
                f"{sorted(prior)}; take it from the dict as it is."
            )
        keys.append((site, found[0]))
    unused = sorted(set(learned) - {key for _, key in keys})
    if unused:
        raise ValueError(
            f"EM: no latent site has the priors {unused} of the dict, which have nothing to learn "
            f"from; leave them out. The sites' priors: {dict(keys)}."
        )
    return Sites(tuple(keys))


def _is_of(denoiser: Denoiser, prior: DiffusionPrior) -> bool:
    """Whether a site's denoiser is a prior's, perhaps at some contexts."""
    return denoiser is prior.denoiser or (
        isinstance(denoiser, ConditionedDenoiser) and denoiser.part is prior.denoiser
    )


def all_of(tree: Any) -> list[Any]:
    """Return what there is for each prior in a list."""
    return list(tree.values()) if isinstance(tree, Mapping) else [tree]


def one_of(tree: Any, key: str | None) -> Any:
    """Return what there is for the prior of a name (None for a prior that is not in a dict)."""
    return tree if key is None else tree[key]


def map_over(f: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to what there is for each prior."""
    return {k: f(v) for k, v in tree.items()} if isinstance(tree, Mapping) else f(tree)


def map_priors(f: Callable[[DiffusionPrior, str | None], Any], prior: Any) -> Any:
    """Apply a function to each prior and its name."""
    if isinstance(prior, Mapping):
        return {key: f(value, key) for key, value in prior.items()}
    return f(prior, None)


def map_trained(f: Callable[[DiffusionPrior, str | None], Any], prior: Any) -> Any:
    """Apply a function to each prior with a network and its name."""
    if isinstance(prior, Mapping):
        chosen = {k: p for k, p in prior.items() if isinstance(p.denoiser, NetworkDenoiser)}
        return map_priors(f, chosen)
    return f(prior, None)


def pool(
    values: dict[str, jax.Array], sites: Sites, key: str | None, shape: tuple[int, ...]
) -> jax.Array:
    """Return what all sites of a prior have, draws or contexts, in one list."""
    chosen = [values[site] for site, name in sites.keys if name == key]
    return jnp.concatenate([x.reshape(-1, *shape) for x in chosen])


def mend_draws(
    draws: dict[str, jax.Array], last: Mapping[str, jax.Array], prior: Any, sites: Sites
) -> tuple[dict[str, jax.Array], int]:
    """Put the last draws (or the prior's mean) where draws are not finite; say how many are not.

    An event that is left out would hide from the M-step what is hard to draw.

    Raises:
        ValueError: If no draw of a site is finite.
    """
    mended, total = dict(draws), 0
    for site, key in sites.keys:
        x, mean = draws[site], one_of(prior, key).mean
        previous = last.get(site, mean)
        finite = _are_finite(x, mean.ndim)
        count = int(jnp.sum(~finite))
        if count == finite.size:
            raise ValueError(
                f"EM: none of the {count} draws of site '{site}' is finite; expected observations "
                "and arguments that are, or take more steps of the sampler, or another guidance."
            )
        if count:
            if previous.shape == x.shape:
                mean = jnp.where(_are_finite(previous, mean.ndim), previous, mean)
            mended[site] = jnp.where(finite, x, mean)
        total += count
    return mended, total


def _are_finite(x: jax.Array, event_dim: int) -> jax.Array:
    """Whether events are finite, with axes of size one in place of theirs."""
    return jnp.isfinite(x).all(axis=tuple(range(-event_dim, 0)), keepdims=True)
