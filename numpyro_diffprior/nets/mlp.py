r"""A multilayer perceptron over flattened events."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from numpyro_diffprior.nets.layers import Embedding, ModulatedNorm, linear
from numpyro_diffprior.nets.options import (
    check_context_shape,
    check_dtype,
    check_embedding,
    check_inputs,
    check_rate,
    check_rngs,
    check_sizes,
)

__all__ = ["MLP"]


class MLP(nnx.Module):
    """A multilayer perceptron over the flattened event.

    Every hidden layer is normalized, modulated by the noise level, activated and dropped out;
    hidden layers of equal width are joined by residual connections.

    Args:
        event_shape: Shape of one event, of any rank.
        features: Widths of the hidden layers.
        embedding: Width of the embedding of the noise level, an even number.
        context_shape: Shape of one context, of any rank, or None for a network without contexts.
            Context values should be of order one (one-hot labels).
        dropout: Probability that a hidden unit is dropped in training.
        param_dtype: Floating dtype of the weights and of the computation.
        rngs: Random streams that initialize the weights.

    Raises:
        ValueError: If a width, a rate, the event's shape or the dtype is out of range.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        features: Sequence[int] = (256, 256, 256),
        embedding: int = 64,
        context_shape: Sequence[int] | None = None,
        dropout: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_rngs("MLP", rngs)
        self.event_shape = check_sizes("event_shape", event_shape)
        self.features = check_sizes("features", features)
        self.embedding = check_embedding(embedding)
        self.context_shape = check_context_shape(context_shape)
        self.dropout = check_rate(dropout)
        self.param_dtype = check_dtype(param_dtype)
        size = math.prod(self.event_shape)
        options: dict[str, Any] = {"param_dtype": self.param_dtype, "rngs": rngs}
        widths = self.features
        self.embed = Embedding(self.embedding, self.context_shape, **options)
        self.first = linear(size, widths[0], **options)
        # Added before the first normalization, which would otherwise hide the magnitude of `x`.
        self.offset = linear(self.embedding, widths[0], **options)
        # Without scale and shift, which `ModulatedNorm` adds.
        plain = {"use_bias": False, "use_scale": False, **options}
        self.norms = nnx.List(
            [
                ModulatedNorm(nnx.LayerNorm(width, **plain), width, self.embedding, **options)
                for width in widths
            ]
        )
        self.hidden = nnx.List([linear(a, b, **options) for a, b in pairwise(widths)])
        self.drop = nnx.Dropout(self.dropout)
        self.last = linear(widths[-1], size, zero=True, **options)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments except `rngs`, as JSON-serializable values."""
        return {
            "event_shape": list(self.event_shape),
            "features": list(self.features),
            "embedding": self.embedding,
            "context_shape": None if self.context_shape is None else list(self.context_shape),
            "dropout": self.dropout,
            "param_dtype": self.param_dtype.name,
        }

    def __call__(
        self,
        x: jax.Array,
        noise: jax.Array,
        context: jax.Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Evaluate the network.

        Args:
            x: Scaled noisy events, with shape ``(batch, *event_shape)``.
            noise: Noise levels as ``log(sigma / s) / 4``, with shape ``(batch,)`` or ``(1,)``.
            context: Contexts, with shape ``(batch, *context_shape)``, if the network takes them.
            rngs: Random streams for dropout, in training (default: no dropout).

        Returns:
            An array with shape ``(batch, *event_shape)``, of the network's dtype.

        Raises:
            ValueError: If a shape is wrong.
        """
        x, noise = check_inputs(x, noise, self.event_shape, self.param_dtype)
        embedded = self.embed(noise, context)
        h = self.first(x.reshape(x.shape[0], -1)) + self.offset(embedded)

        def activate(norm: ModulatedNorm, h: jax.Array) -> jax.Array:
            h = nnx.silu(norm(h, embedded))
            return self.drop(h, deterministic=rngs is None, rngs=rngs)

        for norm, hidden in zip(self.norms, self.hidden):  # the last norm is that of the output
            update = hidden(activate(norm, h))
            h = h + update if h.shape == update.shape else update
        return self.last(activate(self.norms[-1], h)).reshape(x.shape)
