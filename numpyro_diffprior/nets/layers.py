"""Layers of noise-conditional networks, as flax nnx modules.

Features are modulated by an embedding of the noise level; images have shape
``(batch, height, width, channels)``. Layers with ``zero=True`` are initialized to zero; further
keyword arguments are ``param_dtype`` and ``rngs``, as in flax.

References:
    Dhariwal, Nichol, *Diffusion models beat GANs on image synthesis*, 2021, arXiv 2105.05233
    (normalization modulated by the noise level).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

__all__ = [
    "Embedding",
    "ModulatedNorm",
    "ResidualBlock",
    "conv",
    "upsample",
    "group_norm",
    "linear",
]


class Embedding(nnx.Module):
    """A two-layer embedding of the noise level (its sines and cosines) and the context."""

    def __init__(
        self, features: int, context_shape: tuple[int, ...] | None, **options: Any
    ) -> None:
        self.features = features
        self.context_shape = context_shape
        self.first = linear(features, features, **options)
        self.second = linear(features, features, **options)
        if context_shape is not None:
            self.context = linear(math.prod(context_shape), features, **options)

    def __call__(self, noise: jax.Array, context: jax.Array | None) -> jax.Array:
        # `noise` is log(sigma / s) / 4, which spans a few units. The slowest sine has less than
        # one period over this range, the fastest has several per unit.
        frequencies = jnp.geomspace(0.5, 64.0, self.features // 2, dtype=noise.dtype)
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


class ModulatedNorm(nnx.Module):
    """A normalization whose scale and shift depend on the noise level."""

    def __init__(
        self, norm: nnx.LayerNorm | nnx.GroupNorm, width: int, embedding: int, **options: Any
    ) -> None:
        self.norm = norm
        self.linear = linear(embedding, 2 * width, **options)

    def __call__(self, h: jax.Array, embedded: jax.Array) -> jax.Array:
        modulation = self.linear(embedded)
        modulation = modulation.reshape(len(modulation), *(1,) * (h.ndim - 2), -1)
        scale, shift = jnp.split(modulation, 2, axis=-1)
        return self.norm(h) * (1 + scale) + shift


class ResidualBlock(nnx.Module):
    """A residual block of two convolutions, then self-attention if `num_heads` is positive."""

    def __init__(
        self,
        size: int,
        width: int,
        *,
        embedding: int,
        num_heads: int,
        dropout: float,
        **options: Any,
    ) -> None:
        self.norm = group_norm(size, affine=True, **options)
        self.first = conv(size, width, **options)
        self.modulated = ModulatedNorm(group_norm(width, **options), width, embedding, **options)
        self.drop = nnx.Dropout(dropout)
        # Residual branches are initialized to zero, which helps deep networks most.
        self.second = conv(width, width, zero=True, **options)
        self.shortcut = None if size == width else linear(size, width, **options)
        self.attend = _Attention(width, num_heads, **options) if num_heads else None

    def __call__(self, x: jax.Array, embedded: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        h = self.first(nnx.silu(self.norm(x)))
        h = nnx.silu(self.modulated(h, embedded))
        h = self.second(self.drop(h, deterministic=rngs is None, rngs=rngs))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.attend is None else self.attend(h)


class _Attention(nnx.Module):
    """Residual self-attention over all positions of an image."""

    def __init__(self, width: int, num_heads: int, **options: Any) -> None:
        self.num_heads = num_heads
        self.norm = group_norm(width, affine=True, **options)
        self.qkv = linear(width, 3 * width, **options)
        self.out = linear(width, width, zero=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, features = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, self.num_heads, -1)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        # Written out, because `jax.nn.dot_product_attention` rounds float64 to float32.
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
        h = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits, axis=-1), value)
        return x + self.out(h.reshape(batch, height, width, features))


def group_norm(width: int, *, affine: bool = False, **options: Any) -> nnx.GroupNorm:
    """A group normalization with at most 32 groups, of at least four channels if possible."""
    most = min(32, max(1, width // 4))
    num_groups = max(k for k in range(1, most + 1) if width % k == 0)
    return nnx.GroupNorm(
        width, num_groups=num_groups, use_bias=affine, use_scale=affine, **options
    )


def linear(size: int, width: int, *, zero: bool = False, **options: Any) -> nnx.Linear:
    """An affine map of the last axis."""
    init = jax.nn.initializers.zeros if zero else _lecun_normal
    return nnx.Linear(size, width, kernel_init=init, **options)


def conv(
    size: int, width: int, *, strides: int = 1, zero: bool = False, **options: Any
) -> nnx.Conv:
    """A 3 x 3 convolution that keeps the resolution, or with stride two halves it (rounded up)."""
    return nnx.Conv(
        size,
        width,
        (3, 3),
        strides=strides,
        kernel_init=jax.nn.initializers.zeros if zero else _lecun_normal,
        conv_general_dilated=_convolve,
        **options,
    )


def _lecun_normal(rng_key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """Draw truncated normals with variance 1 / fan-in, as flax's initializer of this name does.

    The draws are flat: XLA compiles every new shape, and takes several times as long for shapes
    of several axes, which adds up to seconds for a small UNet.
    """
    variance = 0.774  # of a standard normal truncated at two deviations
    draws = jax.random.truncated_normal(rng_key, -2, 2, (math.prod(shape),), dtype)
    return (draws / math.sqrt(variance * math.prod(shape[:-1]))).astype(dtype).reshape(shape)


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` on channels-last images, by matrix products on CPU.

    On CPU, XLA runs the gradient of a convolution about thirty times slower inside a loop (such as
    a scan) than outside (JAX issue 12868). Matrix products are equally fast inside and outside.
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

    # The offsets of a row are concatenated, and rows are summed: in measurements this is faster
    # than concatenating all nine offsets (more copies) or summing over all (small products).
    x = jnp.concatenate([shifted(x, j, 2, width) for j in range(columns)], axis=-1)
    kernel = kernel.reshape(rows, -1, features)
    return sum(
        (shifted(x, i, 1, height) @ kernel[i] for i in range(1, rows)),
        start=shifted(x, 0, 1, height) @ kernel[0],
    )


def upsample(x: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbor interpolation by a factor of two, cropped to ``(height, width)``."""
    batch, small_height, small_width, features = x.shape
    # On CPU, a broadcast is ten times as fast as the gather of `jax.image.resize`.
    x = jnp.broadcast_to(
        x[:, :, None, :, None, :], (batch, small_height, 2, small_width, 2, features)
    )
    x = x.reshape(batch, 2 * small_height, 2 * small_width, features)
    return x[:, :height, :width]
