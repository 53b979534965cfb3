"""The diffusion sites of a model, and the groups in which they are drawn jointly.

Events are the elements of a site's plates, and are drawn independently. Sites on which the same
observed site depends are drawn jointly, as one event. If an observed site couples the elements of
their plates (it is not in all of these plates, or the sites are in different ones), whole plates
are one event.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.wrappers import PlateDenoiser, ProductDenoiser
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.prior import DiffusionPrior

__all__ = ["LatentGroup", "LatentSite", "Plate", "couples", "group_sites", "read_latent_site"]


class Plate(NamedTuple):
    """A plate of a latent site.

    Attributes:
        name: Its name.
        dim: Its dimension, counted from the right of the batch shape.
        size: Its full size.
    """

    name: str
    dim: int
    size: int


class LatentSite(NamedTuple):
    """A latent site with a diffusion prior; static.

    Attributes:
        name: Its name.
        event_shape: The shape of one event.
        batch_shape: Its batch shape; that of a block, if a plate is divided.
        plates: Its plates, outermost first.
        sampler: The prior's sampler.
    """

    name: str
    event_shape: tuple[int, ...]
    batch_shape: tuple[int, ...]
    plates: tuple[Plate, ...]
    sampler: Sampler

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its value."""
        return (*self.batch_shape, *self.event_shape)


@dataclass(frozen=True)
class LatentGroup:
    """Latent sites that are drawn jointly; static. Most models have a single site.

    Attributes:
        sites: The sites.
        is_joined: Whether whole plates are one event, because observations couple their elements.
    """

    sites: tuple[LatentSite, ...]
    is_joined: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names."""
        return tuple(site.name for site in self.sites)

    @property
    def plates(self) -> tuple[Plate, ...]:
        """The plates whose elements are events, outermost first; none if they are joined."""
        return () if self.is_joined else self.sites[0].plates

    @property
    def joined_plates(self) -> tuple[Plate, ...]:
        """The plates that are part of the event."""
        if not self.is_joined:
            return ()
        return tuple(dict.fromkeys(plate for site in self.sites for plate in site.plates))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch of events."""
        return () if self.is_joined else self.sites[0].batch_shape

    @property
    def event_size(self) -> int:
        """The number of elements of an event."""
        return sum(prod(s.shape if self.is_joined else s.event_shape) for s in self.sites)

    @property
    def largest_plate(self) -> Plate | None:
        """The plate that is divided into blocks."""
        return max(self.plates, key=lambda plate: plate.size, default=None)

    @property
    def num_events(self) -> int:
        """The number of events of whole plates."""
        return max(1, prod(plate.size for plate in self.plates))

    def denoiser(self, denoisers: Sequence[Denoiser]) -> Denoiser:
        """Return the joint denoiser of all sites, given those of their priors."""
        if self.is_joined:
            denoisers = [
                PlateDenoiser(denoiser, site.batch_shape)
                for denoiser, site in zip(denoisers, self.sites, strict=True)
            ]
        return denoisers[0] if len(denoisers) == 1 else ProductDenoiser(tuple(denoisers))

    def split(self, denoiser: Denoiser, x: jax.Array) -> dict[str, jax.Array]:
        """Split events of the joint denoiser into those of each site, in the data's units."""
        parts = _parts(denoiser)
        values = [x] if len(parts) == 1 else cast(ProductDenoiser, denoiser).split(x)
        return {
            name: own.to_data(value)
            for name, own, value in zip(self.names, parts, values, strict=True)
        }

    def join(self, denoiser: Denoiser, values: Mapping[str, jax.Array]) -> jax.Array:
        """Undo `split`."""
        parts = _parts(denoiser)
        events = [own.from_data(values[name]) for name, own in zip(self.names, parts, strict=True)]
        return events[0] if len(events) == 1 else cast(ProductDenoiser, denoiser).join(events)

    def __str__(self) -> str:
        """Return the names, for messages."""
        return " and ".join(f"'{name}'" for name in self.names)


def _parts(denoiser: Denoiser) -> tuple[Denoiser, ...]:
    """Return the denoisers of the sites in a joint denoiser."""
    return denoiser.parts if isinstance(denoiser, ProductDenoiser) else (denoiser,)


def read_latent_site(
    name: str, site: Mapping[str, Any], prior: DiffusionPrior, sizes: Mapping[str, int]
) -> LatentSite:
    """Read a diffusion site of a trace, given the full sizes of the model's plates.

    Raises:
        ValueError: If ``to_event`` has made batch axes part of the event, or the log-density of
            the site is scaled.
    """
    fn = site["fn"]
    if fn.shape() != (*fn.batch_shape, *prior.event_shape):
        raise ValueError(
            f"latent site '{name}': expected events of shape {prior.event_shape} in plates, got "
            f"events of shape {fn.event_shape}; replace `.to_event` by a plate."
        )
    frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
    plates = tuple(Plate(frame.name, frame.dim, sizes[frame.name]) for frame in frames)
    own = prod(sizes[frame.name] / frame.size for frame in frames)  # that of the plates
    scale = 1.0 if site["scale"] is None else site["scale"]
    if isinstance(scale, jax.core.Tracer) or not np.allclose(scale, own, rtol=1e-5):
        raise ValueError(
            f"latent site '{name}' is under `numpyro.handlers.scale`, but its prior is drawn from "
            "as it is; scale the observed sites only, whose likelihood is then tempered."
        )
    return LatentSite(name, prior.event_shape, tuple(fn.batch_shape), plates, prior.sampler)


def group_sites(
    sites: Sequence[LatentSite], observed: Iterable[tuple[frozenset[str], bool]]
) -> tuple[LatentGroup, ...]:
    """Group latent sites by the observed sites that depend on them.

    A site on which no observed site depends is a group of its own, drawn from its prior. An
    observed site is given by the names of the latent sites on which it depends, and whether it
    couples the elements of their plates (see `couples`).
    """
    groups = [({site.name}, False) for site in sites]
    for names, is_coupled in observed:
        if not names:
            continue
        touched = [group for group in groups if group[0] & names]
        merged = set().union(*(members for members, _ in touched))
        is_joined = is_coupled or any(mark for _, mark in touched)
        groups = [group for group in groups if group not in touched]
        groups.append((merged, is_joined))
    latent_groups = []
    for members, is_joined in groups:
        chosen = tuple(site for site in sites if site.name in members)
        plates_differ = len({(site.batch_shape, site.plates) for site in chosen}) > 1
        latent_groups.append(LatentGroup(chosen, is_joined or plates_differ))
    return tuple(sorted(latent_groups, key=lambda group: sites.index(group.sites[0])))


def couples(site: Mapping[str, Any], latent: LatentSite) -> bool:
    """Whether an observed site of a trace lacks a latent's plate, or has another size there."""
    missing = {plate.name for plate in latent.plates} - {
        frame.name for frame in site["cond_indep_stack"]
    }
    batch_shape, rank = site["fn"].batch_shape, len(latent.batch_shape)
    padded = (1,) * (rank - len(batch_shape)) + tuple(batch_shape)
    sizes = padded[len(padded) - rank :]
    pairs = zip(latent.batch_shape, sizes, strict=True)
    return bool(missing) or any(size not in (1, own) for size, own in pairs)
