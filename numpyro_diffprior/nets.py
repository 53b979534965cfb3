r"""Noise-conditional networks, as flax nnx modules.

A network maps noisy events and their noise levels to arrays of the events' shape,

.. math:: F : (x, c) \mapsto F(x, c), \qquad c = \log(\sigma / s) / 4,

for a batch of events: ``x`` has shape ``(batch, *event_shape)``, ``c`` has shape ``(batch,)``, or
``(1,)`` for a level that all share, as on a sampler's path: what depends on it is computed once.
The output layer starts at zero, so that a denoiser preconditioned by a Gaussian starts as the
Gaussian's. A module is a pytree whose leaves are its weights; all else about it is static and
hashable, so that networks of one architecture share compiled functions. Called with `rngs`, a
network trains (dropout, from the stream ``"dropout"``); without, it is deterministic. With a
`context_shape`, it is called with a context as well, a label or a redshift of each event, which
enters beside the noise level.

References:
    Karras, Aittala, Aila, Laine, *Elucidating the design space of diffusion-based generative
    models* (EDM), 2022, arXiv 2206.00364.

    Dhariwal, Nichol, *Diffusion models beat GANs on image synthesis*, 2021, arXiv 2105.05233
    (normalisation modulated by the noise level).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from numpyro_diffprior.net_layers import (
    Embedding,
    Modulated,
    ResidualBlock,
    conv,
    double,
    group_norm,
    layer_norm,
    linear,
)

__all__ = ["MLP", "NETWORKS", "UNet"]


class MLP(nnx.Module):
    """A multilayer perceptron over the flattened event.

    Every hidden layer is normalised, modulated by the noise level, activated and dropped out;
    hidden layers of equal width are joined by residual connections.

    Args:
        event_shape: Shape of one event, of any rank.
        features: Widths of the hidden layers.
        embedding: Width of the embedding of the noise level, an even number.
        context_shape: Shape of one context, of any rank, or None for a network without; its
            values should be of order one (labels one-hot).
        dropout: Probability that a hidden unit is dropped in training.
        param_dtype: Floating dtype of the weights and of the computation.
        rngs: Random streams that initialise the weights.

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
        """Initialise the weights."""
        self.event_shape = _check_sizes("event_shape", event_shape)
        self.features = _check_sizes("features", features)
        self.embedding = _check_embedding(embedding)
        self.context_shape = _check_context_shape(context_shape)
        self.dropout = _check_rate(dropout)
        self.param_dtype = _check_dtype(param_dtype)
        size = math.prod(self.event_shape)
        options: dict[str, Any] = {"param_dtype": self.param_dtype, "rngs": rngs}
        widths = self.features
        self.embed = Embedding(embedding, self.context_shape, **options)
        self.first = linear(size, widths[0], **options)
        # Added before the first normalisation, which would otherwise hide the magnitude of `x`.
        self.offset = linear(embedding, widths[0], **options)
        self.norms = nnx.List(
            [
                Modulated(layer_norm(width, **options), width, embedding, **options)
                for width in widths
            ]
        )
        self.hidden = nnx.List([linear(a, b, **options) for a, b in pairwise(widths)])
        self.drop = nnx.Dropout(self.dropout)
        self.last = linear(widths[-1], size, zero=True, **options)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments but `rngs`, fit for JSON."""
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
            x: Noisy events, with shape ``(batch, *event_shape)``.
            noise: Transformed noise levels, with shape ``(batch,)`` or ``(1,)``.
            context: Contexts, with shape ``(batch, *context_shape)``, of a network that has them.
            rngs: Random streams, to train with dropout.

        Returns:
            An array with shape ``(batch, *event_shape)``, of the network's dtype.

        Raises:
            ValueError: If a shape is wrong.
        """
        x, noise = _check_inputs(x, noise, self.event_shape, self.param_dtype)
        embedded = self.embed(noise, context)
        h = self.first(x.reshape(x.shape[0], -1)) + self.offset(embedded)
        for i, norm in enumerate(self.norms):
            update = nnx.silu(norm(h, embedded))
            update = self.drop(update, deterministic=rngs is None, rngs=rngs)
            if i == len(self.hidden):
                return self.last(update).reshape(x.shape)
            update = self.hidden[i](update)
            h = h + update if h.shape == update.shape else update
        raise AssertionError("unreachable: there is at least one hidden layer")


class UNet(nnx.Module):
    """A convolutional U-Net over images or fields.

    Residual blocks modulated by the noise level at every resolution; a convolution of stride two
    halves the resolution (rounded up), nearest-neighbour interpolation to the size of the skip
    connection and a convolution restore it.

    Args:
        event_shape: ``(height, width)`` or ``(height, width, channels)``, of any sizes.
        channels: Widths of the levels, from the full resolution down.
        num_blocks: Number of residual blocks per level, on the way down and on the way up.
        attention: The levels (0 is the full resolution) whose blocks are followed by
            self-attention over positions.
        num_heads: Number of heads of every self-attention.
        embedding: Width of the embedding of the noise level, an even number.
        context_shape: Shape of one context, of any rank, or None for a network without; its
            values should be of order one (labels one-hot).
        dropout: Probability that a hidden unit is dropped in training.
        param_dtype: Floating dtype of the weights and of the computation.
        rngs: Random streams that initialise the weights.

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
        """Initialise the weights."""
        self.event_shape = _check_sizes("event_shape", event_shape)
        if len(self.event_shape) not in (2, 3):
            raise ValueError(
                "A UNet's event_shape must be (height, width) or (height, width, channels), got "
                f"{self.event_shape}; for other events use MLP or a network of your own."
            )
        self.channels = _check_sizes("channels", channels)
        (self.num_blocks,) = _check_sizes("num_blocks", (num_blocks,))
        self.attention = tuple(sorted({int(level) for level in attention}))
        (self.num_heads,) = _check_sizes("num_heads", (num_heads,))
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
        self.embedding = _check_embedding(embedding)
        self.context_shape = _check_context_shape(context_shape)
        self.dropout = _check_rate(dropout)
        self.param_dtype = _check_dtype(param_dtype)
        options: dict[str, Any] = {"param_dtype": self.param_dtype, "rngs": rngs}

        def blocks(level: int, first: int) -> nnx.List[ResidualBlock]:
            width = self.channels[level]
            heads = self.num_heads if level in self.attention else 0
            shape: dict[str, Any] = {
                "embedding": embedding,
                "num_heads": heads,
                "dropout": self.dropout,
            }
            sizes = [first, *[width] * (self.num_blocks - 1)]
            return nnx.List([ResidualBlock(size, width, **shape, **options) for size in sizes])

        size = self.event_shape[2] if len(self.event_shape) == 3 else 1
        self.embed = Embedding(embedding, self.context_shape, **options)
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
        """The constructor's arguments but `rngs`, fit for JSON."""
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
            x: Noisy events, with shape ``(batch, *event_shape)``.
            noise: Transformed noise levels, with shape ``(batch,)`` or ``(1,)``.
            context: Contexts, with shape ``(batch, *context_shape)``, of a network that has them.
            rngs: Random streams, to train with dropout.

        Returns:
            An array with shape ``(batch, *event_shape)``, of the network's dtype.

        Raises:
            ValueError: If a shape is wrong.
        """
        x, noise = _check_inputs(x, noise, self.event_shape, self.param_dtype)
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
            h = self.grow[i](double(h, skip.shape[1], skip.shape[2]))
            h = jnp.concatenate([h, skip], axis=-1)
            for block in self.up[i]:
                h = block(h, embedded, rngs)
        return self.last(nnx.silu(self.norm(h))).reshape(x.shape)


NETWORKS: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}
"""Networks that a checkpoint can name: ``NETWORKS[name](**net.config, rngs=rngs)``."""


def _check_sizes(name: str, values: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(int(value) for value in values)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name} must hold positive integers, got {tuple(values)}.")
    return sizes


def _check_embedding(embedding: int) -> int:
    if embedding < 2 or embedding % 2:
        raise ValueError(f"embedding must be a positive even number, got {embedding}.")
    return int(embedding)


def _check_context_shape(context_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    if context_shape is None:
        return None
    return _check_sizes("context_shape", context_shape) if len(context_shape) else ()  # scalars


def _check_rate(dropout: float) -> float:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability below one, got {dropout}.")
    return float(dropout)


def _check_dtype(param_dtype: DTypeLike) -> np.dtype:
    dtype = jnp.dtype(param_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating dtype, got {dtype.name}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"param_dtype {dtype.name} needs 64-bit JAX: set the environment variable "
            "JAX_ENABLE_X64=1, or ask for float32."
        )
    return dtype


def _check_inputs(
    x: jax.Array, noise: jax.Array, event_shape: tuple[int, ...], dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    if x.ndim == 0 or x.shape[1:] != event_shape:
        raise ValueError(
            f"Expected x with one batch axis before the event_shape {event_shape}, got shape "
            f"{x.shape}; flatten several batch axes, and give a lone event an axis of length one."
        )
    if noise.shape not in ((1,), x.shape[:1]):
        raise ValueError(f"Expected noise with shape {x.shape[:1]} or (1,), got {noise.shape}.")
    return x.astype(dtype), noise.astype(dtype)
