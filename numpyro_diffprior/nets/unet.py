r"""A convolutional U-Net over trajectories, images and volumes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from numpyro_diffprior.nets.convolutions import ResidualBlock, conv, upsample
from numpyro_diffprior.nets.layers import Embedding, call_blocks, group_norm
from numpyro_diffprior.nets.options import (
    check_axes,
    check_context_shape,
    check_dtype,
    check_embedding,
    check_event,
    check_heads,
    check_inputs,
    check_padding,
    check_rate,
    check_rngs,
    check_sizes,
)

__all__ = ["UNet"]


class UNet(nnx.Module):
    """A convolutional U-Net over trajectories, images or volumes, with channels last.

    Each resolution has residual blocks modulated by the noise level. A strided convolution divides
    the resolution (rounded up); nearest-neighbor interpolation to the size of the skip connection,
    followed by a convolution, restores it. Along a periodic axis whose size is divisible by the
    product of all strides, the network commutes with circular shifts by that product.

    Args:
        event_shape: The sizes of the spatial axes, and of a last axis of channels if the event has
            one: ``(length)``, ``(height, width)`` or ``(depth, height, width)``, each optionally
            with ``channels``, of any sizes.
        spatial_dims: Number of spatial axes: 1, 2 or 3. Required for shapes with two readings:
            those of three axes, such as ``(32, 32, 3)``, and those of two axes of which one is
            more than four times the other, such as ``(128, 4)``. By default, other shapes of two
            axes are images without channels, and those of four axes are volumes with channels.
        channels: Widths of the levels, from the full resolution down.
        num_blocks: Number of residual blocks per level, on the way down and on the way up.
        strides: Factor between the resolutions of successive levels, for all spatial axes or for
            each; 1 keeps the resolution of an axis, such as the depth of a thin volume.
        padding: Boundary condition of the convolutions, for all spatial axes or for each:
            ``"zeros"``, ``"periodic"``, or ``"reflect"`` (about the outermost elements).
        attention: The levels (0 is the full resolution) whose blocks are followed by
            self-attention over positions.
        num_heads: Number of heads of every self-attention.
        embedding: Width of the embedding of the noise level, an even number.
        context_shape: Shape of one context, of any rank, or None for a network without contexts.
            Context values should be of order one (one-hot labels).
        dropout: Probability that a hidden unit is dropped in training.
        remat: Whether gradients recompute the residual blocks instead of storing their
            intermediate arrays: less memory, for one more evaluation per gradient. (On CPU, XLA
            saves memory only at levels with several blocks.)
        param_dtype: Floating dtype of the weights and of the computation.
        rngs: Random streams that initialize the weights.

    Raises:
        ValueError: If the event's shape has two readings or does not fit `spatial_dims`, or if a
            width, a rate, a level, a stride, a padding or the dtype is out of range.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> UNet((28, 28), rngs=rngs)  # doctest: +SKIP
        >>> UNet((32, 32, 3), spatial_dims=2, rngs=rngs)  # doctest: +SKIP
        >>> UNet((128, 4), spatial_dims=1, rngs=rngs)  # doctest: +SKIP
        >>> UNet((8, 64, 64), spatial_dims=3, strides=(1, 2, 2), rngs=rngs)  # doctest: +SKIP
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        spatial_dims: int | None = None,
        channels: Sequence[int] = (32, 64),
        num_blocks: int = 2,
        strides: int | Sequence[int] = 2,
        padding: str | Sequence[str] = "zeros",
        attention: Sequence[int] = (),
        num_heads: int = 4,
        embedding: int = 64,
        context_shape: Sequence[int] | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_rngs("UNet", rngs)
        self.event_shape, self.spatial_dims, size = check_event("UNet", event_shape, spatial_dims)
        self.channels = check_sizes("channels", channels)
        (self.num_blocks,) = check_sizes("num_blocks", (num_blocks,))
        self.strides = check_axes("strides", strides, self.spatial_dims)
        self.padding = check_padding(padding, self.spatial_dims)
        self.attention = tuple(sorted({int(level) for level in attention}))
        for level in self.attention:
            if not 0 <= level < len(self.channels):
                raise ValueError(
                    f"attention must name levels from 0 to {len(self.channels) - 1}, got {level}."
                )
        self.num_heads = check_heads(num_heads, [self.channels[i] for i in self.attention])
        self.embedding = check_embedding(embedding)
        self.context_shape = check_context_shape(context_shape)
        self.dropout = check_rate(dropout)
        self.remat = bool(remat)
        self.param_dtype = check_dtype(param_dtype)
        options: dict[str, Any] = {"param_dtype": self.param_dtype, "rngs": rngs}
        convs = {"padding": self.padding, **options}
        shared = {"embedding": self.embedding, "dropout": self.dropout, **convs}

        def blocks(level: int, first: int) -> nnx.List[ResidualBlock]:
            width = self.channels[level]
            heads = self.num_heads if level in self.attention else 0
            sizes = [first, *[width] * (self.num_blocks - 1)]
            return nnx.List(
                [ResidualBlock(size, width, num_heads=heads, **shared) for size in sizes]
            )

        self.embed = Embedding(self.embedding, self.context_shape, **options)
        self.first = conv(size, self.channels[0], **convs)
        self.down = nnx.List([blocks(i, width) for i, width in enumerate(self.channels)])
        self.shrink = nnx.List(
            [conv(a, b, strides=self.strides, **convs) for a, b in pairwise(self.channels)]
        )
        self.grow = nnx.List([conv(b, a, **convs) for a, b in pairwise(self.channels)])
        self.up = nnx.List([blocks(i, 2 * width) for i, width in enumerate(self.channels[:-1])])
        self.norm = group_norm(self.channels[0], affine=True, **options)
        self.last = conv(self.channels[0], size, zero=True, **convs)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments except `rngs`, as JSON-serializable values."""
        return {
            "event_shape": list(self.event_shape),
            "spatial_dims": self.spatial_dims,
            "channels": list(self.channels),
            "num_blocks": self.num_blocks,
            "strides": list(self.strides),
            "padding": list(self.padding),
            "attention": list(self.attention),
            "num_heads": self.num_heads,
            "embedding": self.embedding,
            "context_shape": None if self.context_shape is None else list(self.context_shape),
            "dropout": self.dropout,
            "remat": self.remat,
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
        h = self.first(x.reshape(len(x), *self.event_shape[: self.spatial_dims], -1))
        skips = []
        for i, blocks in enumerate(self.down):
            if i > 0:
                skips.append(h)
                h = self.shrink[i - 1](h)
            h = call_blocks(blocks, h, embedded, rngs, remat=self.remat)
        for i in reversed(range(len(self.up))):
            skip = skips.pop()
            h = self.grow[i](upsample(h, self.strides, skip.shape[1:-1]))
            h = jnp.concatenate([h, skip], axis=-1)
            h = call_blocks(self.up[i], h, embedded, rngs, remat=self.remat)
        return self.last(nnx.silu(self.norm(h))).reshape(x.shape)
