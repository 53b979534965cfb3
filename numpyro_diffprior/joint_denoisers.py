"""Denoisers of several events as one: independent sources, or the elements of a plate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffprior.denoisers import Denoiser, align, flatten_events, register
from numpyro_diffprior.linalg import Blocks, Covariance, Repeated

__all__ = ["PlateDenoiser", "ProductDenoiser"]


@register
@dataclass(frozen=True, eq=False)
class ProductDenoiser(Denoiser):
    """The denoiser of independent events as one: the sources of a sum, say.

    Its events are vectors: those of the parts one after the other, flattened, each in units of its
    own prior's scale, so that the parts share one sequence of noise levels whatever their units.

    Args:
        parts: The denoisers of the parts.
    """

    parts: tuple[Denoiser, ...]

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        sigma = jnp.asarray(sigma, self.dtype)
        values = zip(self.parts, self.split(x_t), strict=True)
        return self.join([part(x, sigma * part.scale) for part, x in values])

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        """The prior's mean."""
        return self.join([part.mean for part in self.parts])

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        """The prior's covariance, block diagonal."""
        return Blocks(tuple(part.cov.scale(part.scale**-2) for part in self.parts))

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        """Average the parts' ratios over the elements; see `Denoiser.error_ratio`."""
        sigma = jnp.asarray(sigma, self.dtype)
        weighted = [part.event_size * part.error_ratio(sigma * part.scale) for part in self.parts]
        return sum(weighted[1:], start=weighted[0]) / self.event_size

    def location(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the parts' locations, joined."""
        return self.join([part.location(batch_shape) for part in self.parts])

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return the parts of events, each with shape ``(*batch, *event)`` and in its units."""
        ends = np.cumsum([part.event_size for part in self.parts])[:-1]
        return tuple(
            part.scale * value.reshape(*x.shape[:-1], *part.event_shape)
            for part, value in zip(self.parts, jnp.split(x, ends, axis=-1), strict=True)
        )

    def join(self, values: Sequence[jax.Array]) -> jax.Array:
        """Undo `split`."""
        flat = [
            flatten_events(value / part.scale, part.event_shape)
            for part, value in zip(self.parts, values, strict=True)
        ]
        return jnp.concatenate(flat, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PlateDenoiser(Denoiser):
    """The denoiser of a whole plate as one event, where observations couple its elements.

    Args:
        part: The denoiser of an element.
        batch_shape: The shape of the plate.
    """

    part: Denoiser
    batch_shape: tuple[int, ...] = field(metadata={"static": True})

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """Return the conditional mean; see `Denoiser`."""
        sigma = jnp.asarray(sigma, self.dtype)
        return self.part(x_t, align(sigma, self.batch_shape))

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        """The prior's mean."""
        return jnp.broadcast_to(self.part.mean, (*self.batch_shape, *self.part.event_shape))

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        """The prior's covariance, block diagonal."""
        return Repeated(self.part.cov, prod(self.batch_shape))

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        """Return the elements' ratio; see `Denoiser.error_ratio`."""
        return self.part.error_ratio(sigma)

    def location(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the elements' locations."""
        return self.part.location((*batch_shape, *self.batch_shape))
