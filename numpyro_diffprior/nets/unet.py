r"""A convolutional U-Net over images and fields."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from numpyro_diffprior.nets.layers import Embedding, ResidualBlock, conv, group_norm, upsample
from numpyro_diffprior.nets.options import (
    check_context_shape,
    check_dtype,
    check_embedding,
    check_inputs,
    check_rate,
    check_rngs,
    check_sizes,
)

__all__ = ["UNet"]


class UNet(nnx.Module):
    """A convolutional U-Net over images or fields.

    Each resolution has residual blocks modulated by the noise level. A convolution of stride two
    halves the resolution (rounded up); nearest-neighbor interpolation to the size of the skip
    connection, followed by a convolution, restores it.

    Args:
        event_shape: ``(height, width)`` or ``(height, width, channels)``, of any sizes.
        channels: Widths of the levels, from the full resolution down.
        num_blocks: Number of residual blocks per level, on the way down and on the way up.
        attention: The levels (0 is the full resolution) whose blocks are followed by
            self-attention over positions.
        num_heads: Number of heads of every self-attention.
        embedding: Width of the embedding of the noise level, an even number.
        context_shape: Shape of one context, of any rank, or None for a network without contexts.
            Context values should be of order one (one-hot labels).
        dropout: Probability that a hidden unit is dropped in training.
        param_dtype: Floating dtype of the weights and of the computation.
        rngs: Random streams that initialize the weights.

    Raises:
        ValueError: If a width, a rate, a level, the event's shape or the dtype is out of range.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64),
        num_blocks: int = 2,
        attention: Sequence[int] = (),
        num_heads: int = 4,
        embedding: int = 64,
        context_shape: Sequence[int] | None = None,
        dropout: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_rngs("UNet", rngs)
        self.event_shape = check_sizes("event_shape", event_shape)
        if len(self.event_shape) not in (2, 3):
            raise ValueError(
                "A UNet's event_shape must be (height, width) or (height, width, channels), got "
                f"{self.event_shape}; for other events use MLP or a network of your own."
            )
        self.channels = check_sizes("channels", channels)
        (self.num_blocks,) = check_sizes("num_blocks", (num_blocks,))
        self.attention = tuple(sorted({int(level) for level in attention}))
        (self.num_heads,) = check_sizes("num_heads", (num_heads,))
        for level in self.attention:
            if not 0 <= level < len(self.channels):
                raise ValueError(
                    f"attention must name levels from 0 to {len(self.channels) - 1}, got {level}."
                )
            if self.channels[level] % self.num_heads:
                raise ValueError(
                    f"num_heads must divide the width of every level with attention, got "
                    f"num_heads={self.num_heads} for {self.channels[level]} channels."
                )
        self.embedding = check_embedding(embedding)
        self.context_shape = check_context_shape(context_shape)
        self.dropout = check_rate(dropout)
        self.param_dtype = check_dtype(param_dtype)
        options: dict[str, Any] = {"param_dtype": self.param_dtype, "rngs": rngs}
        shared = {"embedding": self.embedding, "dropout": self.dropout, **options}

        def blocks(level: int, first: int) -> nnx.List[ResidualBlock]:
            width = self.channels[level]
            heads = self.num_heads if level in self.attention else 0
            sizes = [first, *[width] * (self.num_blocks - 1)]
            return nnx.List(
                [ResidualBlock(size, width, num_heads=heads, **shared) for size in sizes]
            )

        size = self.event_shape[2] if len(self.event_shape) == 3 else 1
        self.embed = Embedding(self.embedding, self.context_shape, **options)
        self.first = conv(size, self.channels[0], **options)
        self.down = nnx.List([blocks(i, width) for i, width in enumerate(self.channels)])
        self.shrink = nnx.List(
            [conv(a, b, strides=2, **options) for a, b in pairwise(self.channels)]
        )
        self.grow = nnx.List([conv(b, a, **options) for a, b in pairwise(self.channels)])
        self.up = nnx.List([blocks(i, 2 * width) for i, width in enumerate(self.channels[:-1])])
        self.norm = group_norm(self.channels[0], affine=True, **options)
        self.last = conv(self.channels[0], size, zero=True, **options)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments except `rngs`, as JSON-serializable values."""
        return {
            "event_shape": list(self.event_shape),
            "channels": list(self.channels),
            "num_blocks": self.num_blocks,
            "attention": list(self.attention),
            "num_heads": self.num_heads,
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
        height, width = self.event_shape[:2]
        h = self.first(x.reshape(x.shape[0], height, width, -1))
        skips = []
        for i, blocks in enumerate(self.down):
            if i > 0:
                skips.append(h)
                h = self.shrink[i - 1](h)
            for block in blocks:
                h = block(h, embedded, rngs)
        for i in reversed(range(len(self.up))):
            skip = skips.pop()
            h = self.grow[i](upsample(h, skip.shape[1], skip.shape[2]))
            h = jnp.concatenate([h, skip], axis=-1)
            for block in self.up[i]:
                h = block(h, embedded, rngs)
        return self.last(nnx.silu(self.norm(h))).reshape(x.shape)
