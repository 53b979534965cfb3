"""Denoisers that wrap others: at given contexts, or for several events as one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffprior._compile.checks import set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser, align, flatten_events, register
from numpyro_diffprior.linalg.covariances import Blocks, Covariance, Repeated

__all__ = ["ConditionedDenoiser", "DenoiserWrapper", "PlateDenoiser", "ProductDenoiser"]


@dataclass(frozen=True, eq=False)
class DenoiserWrapper(Denoiser):
    """Base class of denoisers that wrap another one, with its summary and contexts by default.

    Args:
        wrapped: The wrapped denoiser.
    """

    wrapped: Denoiser

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        return self.wrapped.mean

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        return self.wrapped.cov

    @property
    def unit(self) -> jax.Array | float:  # type: ignore[override]
        return self.wrapped.unit

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        return self.wrapped.context_shape

    def contexts(self, batch_shape: tuple[int, ...]) -> jax.Array | None:
        return self.wrapped.contexts(batch_shape)

    def initial_mean(self, batch_shape: tuple[int, ...]) -> jax.Array:
        return self.wrapped.initial_mean(batch_shape)

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        return self.wrapped.error_ratio(sigma)


@register
@dataclass(frozen=True, eq=False, init=False)
class ConditionedDenoiser(DenoiserWrapper):
    """The denoiser of a conditional prior at given contexts, such as labels or redshifts.

    Its mean, covariance and error ratios are those of the prior over all contexts.

    Args:
        wrapped: A denoiser with a ``context_shape``.
        context: Contexts, with shape ``(*batch, *context_shape)``; their batch axes broadcast
            against the last batch axes of the events.

    Raises:
        ValueError: If the denoiser has no ``context_shape``, or the contexts do not have it.
    """

    context: jax.Array

    def __init__(self, wrapped: Denoiser, context: ArrayLike) -> None:
        shape = wrapped.context_shape
        if shape is None:
            raise ValueError(
                f"{type(wrapped).__name__}: expected a denoiser that takes a context; give its "
                "network a `context_shape`, as in MLP((2,), context_shape=(3,), rngs=rngs)."
            )
        context = jnp.asarray(context, wrapped.dtype)
        if context.shape[max(context.ndim - len(shape), 0) :] != shape:
            raise ValueError(
                f"{type(wrapped).__name__}: expected contexts of shape {shape} in the last axes, "
                f"got an array of shape {context.shape}."
            )
        set_fields(self, wrapped=wrapped, context=context)

    def __call__(
        self, x_t: jax.Array, sigma: jax.Array | float, *, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Return the conditional mean; with ``rngs``, in training mode (dropout)."""
        wrapped: Any = self.wrapped
        batch_shape = x_t.shape[: x_t.ndim - len(self.event_shape)]
        return wrapped(x_t, sigma, self.contexts(batch_shape), rngs=rngs)

    @property
    def context_shape(self) -> None:
        """None: the context is given."""
        return None

    def contexts(self, batch_shape: tuple[int, ...]) -> jax.Array:
        shape = self.context.shape[len(self.batch_shape) :]
        return jnp.broadcast_to(self.context, (*batch_shape, *shape)).reshape(-1, *shape)

    def at_contexts(self, contexts: jax.Array | None) -> Denoiser:
        if contexts is None:
            return self
        return ConditionedDenoiser(self.wrapped, contexts)

    def in_unit(self, unit: jax.Array) -> "ConditionedDenoiser":
        return ConditionedDenoiser(self.wrapped.in_unit(unit), self.context)

    def initial_mean(self, batch_shape: tuple[int, ...]) -> jax.Array:
        """Return the denoised mean at `sigma_max`, for each context."""
        means = self(super().initial_mean(self.batch_shape), self.sigma_max)
        return jnp.broadcast_to(means, (*batch_shape, *self.event_shape))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch of contexts."""
        ndim = len(self.wrapped.context_shape or ())
        return self.context.shape[: self.context.ndim - ndim]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PlateDenoiser(DenoiserWrapper):
    """The denoiser of a whole plate as one event, for observations that couple its elements.

    Args:
        wrapped: The denoiser of one element.
        batch_shape: The shape of the plate.
    """

    batch_shape: tuple[int, ...] = field(metadata={"static": True})

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        sigma = jnp.asarray(sigma, self.dtype)
        return self.wrapped(x_t, align(sigma, self.batch_shape))

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        return jnp.broadcast_to(self.wrapped.mean, (*self.batch_shape, *self.wrapped.event_shape))

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        return Repeated(self.wrapped.cov, prod(self.batch_shape))

    def in_unit(self, unit: jax.Array) -> "PlateDenoiser":
        return PlateDenoiser(self.wrapped.in_unit(unit), self.batch_shape)

    def contexts(self, batch_shape: tuple[int, ...]) -> None:
        """None: contexts belong to the elements and are the same for all plates."""
        return None

    def initial_mean(self, batch_shape: tuple[int, ...]) -> jax.Array:
        return self.wrapped.initial_mean((*batch_shape, *self.batch_shape))


@register
@dataclass(frozen=True, eq=False)
class ProductDenoiser(Denoiser):
    """The denoiser of several independent events as one, such as the sources of a sum.

    Its events are vectors: the flattened events of the parts, each divided by the scale of its
    prior and then concatenated, so that all parts share one sequence of noise levels.

    Args:
        parts: The denoisers of the parts.
    """

    parts: tuple[Denoiser, ...]

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        sigma = jnp.asarray(sigma, self.dtype)
        values = zip(self.parts, self.split(x_t), strict=True)
        return self.join([part(x, sigma * part.scale) for part, x in values])

    @property
    def mean(self) -> jax.Array:  # type: ignore[override]
        return self.join([part.mean for part in self.parts])

    @property
    def cov(self) -> Covariance:  # type: ignore[override]
        return Blocks(tuple(part.cov.scale(part.scale**-2) for part in self.parts))

    def error_ratio(self, sigma: jax.Array | float) -> jax.Array:
        """Average the parts' ratios over the elements; see `Denoiser.error_ratio`."""
        sigma = jnp.asarray(sigma, self.dtype)
        weighted = [part.event_size * part.error_ratio(sigma * part.scale) for part in self.parts]
        return sum(weighted[1:], start=weighted[0]) / self.event_size

    def initial_mean(self, batch_shape: tuple[int, ...]) -> jax.Array:
        return self.join([part.initial_mean(batch_shape) for part in self.parts])

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Split vectors into the parts' events in the parts' units, each ``(*batch, *event)``."""
        ends = np.cumsum([part.event_size for part in self.parts])[:-1]
        return tuple(
            part.scale * value.reshape(*x.shape[:-1], *part.event_shape)
            for part, value in zip(self.parts, jnp.split(x, ends, axis=-1), strict=True)
        )

    def join(self, values: Sequence[jax.Array]) -> jax.Array:
        """Concatenate the parts' events; the inverse of `split`."""
        flat = [
            flatten_events(value / part.scale, part.event_shape)
            for part, value in zip(self.parts, values, strict=True)
        ]
        return jnp.concatenate(flat, axis=-1)
