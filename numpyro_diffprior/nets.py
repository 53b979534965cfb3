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

__all__ = ["MLP", "NETWORKS", "UNet"]

_MAX_FREQUENCY = 64.0


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
        self.embed = _Embedding(embedding, self.context_shape, **options)
        self.first = _linear(size, widths[0], **options)
        # Added before the first normalisation, which would otherwise hide the magnitude of `x`.
        self.offset = _linear(embedding, widths[0], **options)
        self.norms = nnx.List(
            [
                _Modulated(_layer_norm(width, **options), width, embedding, **options)
                for width in widths
            ]
        )
        self.hidden = nnx.List([_linear(a, b, **options) for a, b in pairwise(widths)])
        self.drop = nnx.Dropout(self.dropout)
        self.last = _linear(widths[-1], size, zero=True, **options)

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

        def blocks(level: int, first: int) -> nnx.List[_Block]:
            width = self.channels[level]
            heads = self.num_heads if level in self.attention else 0
            shape: dict[str, Any] = {
                "embedding": embedding,
                "num_heads": heads,
                "dropout": self.dropout,
            }
            sizes = [first, *[width] * (self.num_blocks - 1)]
            return nnx.List([_Block(size, width, **shape, **options) for size in sizes])

        size = self.event_shape[2] if len(self.event_shape) == 3 else 1
        self.embed = _Embedding(embedding, self.context_shape, **options)
        self.first = _conv(size, self.channels[0], **options)
        self.down = nnx.List([blocks(i, width) for i, width in enumerate(self.channels)])
        self.shrink = nnx.List(
            [_conv(a, b, strides=2, **options) for a, b in pairwise(self.channels)]
        )
        self.grow = nnx.List([_conv(b, a, **options) for a, b in pairwise(self.channels)])
        self.up = nnx.List([blocks(i, 2 * width) for i, width in enumerate(self.channels[:-1])])
        self.norm = _group_norm(self.channels[0], affine=True, **options)
        self.last = _conv(self.channels[0], size, zero=True, **options)

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
            h = self.grow[i](_double(h, skip.shape[1], skip.shape[2]))
            h = jnp.concatenate([h, skip], axis=-1)
            for block in self.up[i]:
                h = block(h, embedded, rngs)
        return self.last(nnx.silu(self.norm(h))).reshape(x.shape)


NETWORKS: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}
"""Networks that a checkpoint can name: ``NETWORKS[name](**net.config, rngs=rngs)``."""


class _Embedding(nnx.Module):
    """Sines and cosines of the noise level, and the context, through two layers."""

    def __init__(
        self,
        features: int,
        context_shape: tuple[int, ...] | None,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.features = features
        self.context_shape = context_shape
        self.first = _linear(features, features, **options)
        self.second = _linear(features, features, **options)
        if context_shape is not None:
            self.context = _linear(math.prod(context_shape), features, **options)

    def __call__(self, noise: jax.Array, context: jax.Array | None) -> jax.Array:
        # The noise levels of a prior span a few units (a factor of e is 1/4): from less than one
        # period over the whole range to several per unit.
        frequencies = jnp.geomspace(0.5, _MAX_FREQUENCY, self.features // 2, dtype=noise.dtype)
        angles = noise[:, None] * frequencies
        h = self.first(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        if self.context_shape is not None:
            if context is None or context.shape[1:] != self.context_shape:
                found = None if context is None else f"shape {context.shape}"
                raise ValueError(
                    "Expected contexts with one batch axis before the context_shape "
                    f"{self.context_shape}, got {found}."
                )
            h = h + self.context(context.reshape(len(context), -1).astype(noise.dtype))
        return nnx.silu(self.second(nnx.silu(h)))


class _Modulated(nnx.Module):
    """A normalisation whose scale and shift depend on the noise level."""

    def __init__(
        self,
        norm: nnx.LayerNorm | nnx.GroupNorm,
        width: int,
        embedding: int,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = norm
        self.linear = _linear(embedding, 2 * width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, h: jax.Array, embedded: jax.Array) -> jax.Array:
        modulation = self.linear(embedded)
        modulation = modulation.reshape(len(modulation), *(1,) * (h.ndim - 2), -1)
        scale, shift = jnp.split(modulation, 2, axis=-1)
        return self.norm(h) * (1 + scale) + shift


class _Block(nnx.Module):
    """A residual block of two convolutions, and self-attention where `num_heads` is positive."""

    def __init__(
        self,
        size: int,
        width: int,
        *,
        embedding: int,
        num_heads: int,
        dropout: float,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm = _group_norm(size, affine=True, **options)
        self.first = _conv(size, width, **options)
        self.modulated = _Modulated(_group_norm(width, **options), width, embedding, **options)
        self.drop = nnx.Dropout(dropout)
        # Residual branches start at zero: the deeper the network, the more it helps.
        self.second = _conv(width, width, zero=True, **options)
        self.shortcut = None if size == width else _linear(size, width, **options)
        self.attend = _Attention(width, num_heads, **options) if num_heads else None

    def __call__(self, x: jax.Array, embedded: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        h = self.first(nnx.silu(self.norm(x)))
        h = nnx.silu(self.modulated(h, embedded))
        h = self.second(self.drop(h, deterministic=rngs is None, rngs=rngs))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.attend is None else self.attend(h)


class _Attention(nnx.Module):
    """Residual self-attention over all positions of an image."""

    def __init__(
        self, width: int, num_heads: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.norm = _group_norm(width, affine=True, **options)
        self.qkv = _linear(width, 3 * width, **options)
        self.out = _linear(width, width, zero=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, features = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, self.num_heads, -1)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        # By hand, for `jax.nn.dot_product_attention` rounds float64 to float32.
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
        h = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits, axis=-1), value)
        return x + self.out(h.reshape(batch, height, width, features))


def _layer_norm(width: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A normalisation without scale and shift, for these come from the noise level."""
    return nnx.LayerNorm(
        width, use_bias=False, use_scale=False, param_dtype=param_dtype, rngs=rngs
    )


def _group_norm(
    width: int, *, affine: bool = False, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    """A normalisation over groups of at least four channels where their number allows it."""
    most = min(32, max(1, width // 4))
    num_groups = max(k for k in range(1, most + 1) if width % k == 0)
    return nnx.GroupNorm(
        width,
        num_groups=num_groups,
        use_bias=affine,
        use_scale=affine,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _linear(
    size: int, width: int, *, zero: bool = False, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    init = _zeros if zero else _lecun_normal
    return nnx.Linear(size, width, kernel_init=init, param_dtype=param_dtype, rngs=rngs)


def _conv(
    size: int,
    width: int,
    *,
    strides: int = 1,
    zero: bool = False,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A 3 x 3 convolution, which keeps the resolution or halves it (rounded up)."""
    return nnx.Conv(
        size,
        width,
        (3, 3),
        strides=strides,
        kernel_init=_zeros if zero else _lecun_normal,
        conv_general_dilated=_convolve,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _lecun_normal(rng_key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """Draws of variance one over the number of inputs, as by flax's initializer of this name.

    Flat draws, for every new shape is compiled, and those of several axes take XLA several times
    as long: seconds, for a small UNet.
    """
    variance = 0.774  # of a standard normal truncated at two deviations
    draws = jax.random.truncated_normal(rng_key, -2, 2, (math.prod(shape),), dtype)
    return (draws / math.sqrt(variance * math.prod(shape[:-1]))).astype(dtype).reshape(shape)


def _zeros(rng_key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` on channels-last images, by matrix products on CPU.

    On CPU, XLA runs the gradient of a convolution inside a loop (every scan) some thirty times
    slower than outside of it (JAX issue 12868). Matrix products are as fast there as outside.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    rows, columns, _, features = kernel.shape
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (rows, columns), strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = ((x.shape[i + 1] - kernel.shape[i]) // strides[i] + 1 for i in range(2))

    def shifted(x: jax.Array, offset: int, axis: int, size: int) -> jax.Array:
        step = strides[axis - 1]
        stop = offset + (size - 1) * step + 1
        return jax.lax.slice_in_dim(x, offset, stop, step, axis=axis)

    # Offsets in a row side by side, rows one after the other: measured faster than all nine
    # offsets side by side (more copies) and than one after the other (small products).
    x = jnp.concatenate([shifted(x, j, 2, width) for j in range(columns)], axis=-1)
    kernel = kernel.reshape(rows, -1, features)
    return sum(
        (shifted(x, i, 1, height) @ kernel[i] for i in range(1, rows)),
        start=shifted(x, 0, 1, height) @ kernel[0],
    )


def _double(x: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour interpolation by two, cut to a size (which an odd one needs)."""
    batch, small_height, small_width, features = x.shape
    # A broadcast: on CPU an order faster than the gather of `jax.image.resize`.
    x = jnp.broadcast_to(
        x[:, :, None, :, None, :], (batch, small_height, 2, small_width, 2, features)
    )
    x = x.reshape(batch, 2 * small_height, 2 * small_width, features)
    return x[:, :height, :width]


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
