"""Dicts of priors, and the sites that each prior governs and learns from.

`EM` works on a dict of priors, whatever the user passed; a lone prior has the key ``"prior"``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.arguments import split_arguments
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.model import (
    BoundModel,
    GroupReading,
    ModelData,
    ModelReading,
)
from numpyro_diffprior.reading.parts import Part, join_parts, split_into_parts

__all__ = [
    "Priors",
    "Sites",
    "as_dict",
    "pool",
    "read_contexts",
    "read_sites",
    "with_network",
]

ALONE = "prior"  # the key of a prior that was passed alone

Priors = dict[str, DiffusionPrior]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Sites:
    """Which prior governs which diffusion site; static.

    Attributes:
        site_priors: The names of the sites, each with the key of its prior.
        is_alone: Whether the user passed a single prior instead of a dict.
    """

    site_priors: tuple[tuple[str, str], ...]
    is_alone: bool = False

    def as_passed(self, priors: Priors) -> Any:
        """Return priors as the user passed them: one, or a dict."""
        return priors[ALONE] if self.is_alone else dict(priors)


def as_dict(prior: Any) -> Priors:
    """Return one prior or several as a dict.

    Raises:
        ValueError: If a value is not a prior, no prior has a network, or two priors share a
            denoiser with a network.
    """
    priors = dict(prior) if isinstance(prior, Mapping) else {ALONE: prior}
    if not priors or not all(isinstance(p, DiffusionPrior) for p in priors.values()):
        kinds = ", ".join(type(p).__name__ for p in priors.values()) or "an empty one"
        raise ValueError(f"EM: expected a DiffusionPrior, or a dict of them, got {kinds}.")
    networks = with_network(priors)
    if not networks:
        kinds = " and ".join(sorted({type(p.denoiser).__name__ for p in priors.values()}))
        raise ValueError(
            f"EM: expected a prior with a NetworkDenoiser to train, got {kinds}; analytic "
            "priors have nothing to learn, and of a WindowDenoiser the denoiser of windows is "
            "trained, by fit_denoiser."
        )
    for value in networks.values():
        same = [k for k, p in networks.items() if p.denoiser is value.denoiser]
        if len(same) > 1:
            raise ValueError(
                f"EM: expected priors with denoisers of their own, got the same one as {same}; "
                "build a NetworkDenoiser and a DiffusionPrior for each. Sites that share a prior "
                "take it from one key."
            )
    return priors


def with_network(priors: Mapping[str, DiffusionPrior]) -> Priors:
    """Return the priors that have a network."""
    return {k: p for k, p in priors.items() if isinstance(p.denoiser, NetworkDenoiser)}


def read_sites(prior: Any, reading: ModelReading) -> Sites:
    """Match the sites of a model to the priors in its first argument.

    A site has the prior whose arrays it uses, possibly given contexts.

    Raises:
        ValueError: If a site has a prior that was not passed, or if one with a network governs no
            site.
    """
    priors, is_alone = as_dict(prior), not isinstance(prior, Mapping)
    first = 0
    arguments: dict[str, tuple[int, ...]] = {}
    # The order of the leaves of a dict is that of its sorted keys.
    for key in sorted(priors):
        count = len(split_arguments(priors[key])[0])
        arguments[key] = tuple(range(first, first + count))
        first += count
    site_priors = []
    for site, origin in zip(reading.form.latents, reading.form.origins, strict=True):
        matches = [k for k, own in arguments.items() if own and origin[: len(own)] == own]
        if not matches:
            passed = "the one" if is_alone else f"among those {sorted(priors)}"
            raise ValueError(
                f"EM: latent site '{site.name}' has a prior that is not {passed} passed; take it "
                "from the model's first argument as it is."
            )
        site_priors.append((site.name, matches[0]))
    unused = sorted(set(with_network(priors)) - {key for _, key in site_priors})
    if unused:
        raise ValueError(
            f"EM: no latent site has the priors {unused} of the dict, which have nothing to learn "
            f"from; leave them out. The sites' priors: {dict(site_priors)}."
        )
    return Sites(tuple(site_priors), is_alone)


def pool(
    values: Mapping[str, jax.Array], sites: Sites, key: str, shape: tuple[int, ...]
) -> jax.Array:
    """Return the values (draws, contexts) of all sites of a prior, with shape ``(n, *shape)``."""
    chosen = [values[site] for site, name in sites.site_priors if name == key]
    flat = [x.reshape(-1, *shape) for x in chosen]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat)


def read_contexts(model: BoundModel, num_draws: int) -> dict[str, jax.Array]:
    """Return the contexts of all draws, by site, of sites with a conditional prior."""
    contexts: dict[str, jax.Array] = {}
    for i, group in enumerate(model.reading.groups):
        if not jax.eval_shape(partial(_contexts, group), model.data, {}):
            continue
        parts = split_into_parts(model, i)
        found = (_contexts_of_part(part, i) for part in parts)
        if group.divided is None:
            contexts |= next(found)
        else:
            plate, _ = group.divided
            axis = len(group.latents.batch_shape) + plate.dim
            contexts |= join_parts(found, axis, plate.size)
    return {
        site: jnp.broadcast_to(context, (num_draws, *context.shape))
        for site, context in contexts.items()
    }


@partial(jax.jit, static_argnums=1)
def _contexts_of_part(part: Part, position: int) -> dict[str, jax.Array]:
    """Return the contexts of some blocks."""
    group = part.model.reading.groups[position]
    return group.over_blocks(partial(_contexts, group, part.model.data), part.indices)


def _contexts(
    group: GroupReading, data: ModelData, indices: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return the contexts of a block, by site."""
    values, denoisers = {}, group.prior_denoisers(data, indices)
    for site, denoiser in zip(group.latents.sites, denoisers, strict=True):
        context = denoiser.contexts(site.batch_shape)
        if context is not None:
            values[site.name] = context.reshape(*site.batch_shape, *context.shape[1:])
    return values
