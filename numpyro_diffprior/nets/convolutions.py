"""Convolutional layers in any number of spatial dimensions, as flax nnx modules.

Fields have shape ``(batch, *spatial, channels)``; ``padding`` holds the boundary condition of each
spatial axis, one of `PADDINGS`. Keyword arguments are those of `layers`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from numpyro_diffprior.nets.layers import (
    ModulatedNorm,
    attend,
    group_norm,
    lecun_normal,
    linear,
)
from numpyro_diffprior.nets.options import PADDINGS

__all__ = ["ResidualBlock", "conv", "upsample"]


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
        padding: tuple[str, ...],
        **options: Any,
    ) -> None:
        self.norm = group_norm(size, affine=True, **options)
        self.first = conv(size, width, padding, **options)
        self.modulated = ModulatedNorm(group_norm(width, **options), width, embedding, **options)
        self.drop = nnx.Dropout(dropout)
        # Residual branches are initialized to zero, which helps deep networks most.
        self.second = conv(width, width, padding, zero=True, **options)
        self.shortcut = None if size == width else linear(size, width, **options)
        self.attend = _Attention(width, num_heads, **options) if num_heads else None

    def __call__(self, x: jax.Array, embedded: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        h = self.first(nnx.silu(self.norm(x)))
        h = nnx.silu(self.modulated(h, embedded))
        h = self.second(self.drop(h, deterministic=rngs is None, rngs=rngs))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.attend is None else self.attend(h)


class _Attention(nnx.Module):
    """Residual self-attention over all positions of a field."""

    def __init__(self, width: int, num_heads: int, **options: Any) -> None:
        self.num_heads = num_heads
        self.norm = group_norm(width, affine=True, **options)
        self.qkv = linear(width, 3 * width, **options)
        self.out = linear(width, width, zero=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, *_, features = x.shape
        h = self.norm(x).reshape(batch, -1, features)
        return x + self.out(attend(self.qkv(h), self.num_heads)).reshape(x.shape)


def conv(
    size: int,
    width: int,
    padding: tuple[str, ...],
    *,
    strides: tuple[int, ...] | None = None,
    zero: bool = False,
    **options: Any,
) -> nnx.Conv:
    """A convolution, three wide or as wide as its strides, that divides the sizes (rounded up)."""
    strides = (1,) * len(padding) if strides is None else strides
    return nnx.Conv(
        size,
        width,
        tuple(max(3, stride) for stride in strides),
        strides=strides,
        kernel_init=jax.nn.initializers.zeros if zero else lecun_normal,
        conv_general_dilated=_Convolve(padding),
        **options,
    )


def upsample(x: jax.Array, strides: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """Nearest-neighbor interpolation by factors, cropped to ``(batch, *sizes, features)``."""
    batch, *small, features = x.shape
    # On CPU, a broadcast is ten times as fast as the gather of `jax.image.resize`.
    pairs = itertools.chain(*zip(small, strides))
    x = x.reshape(batch, *itertools.chain(*((n, 1) for n in small)), features)
    x = jnp.broadcast_to(x, (batch, *pairs, features))
    x = x.reshape(batch, *(n * stride for n, stride in zip(small, strides)), features)
    return x[:, *(slice(size) for size in sizes)]


@dataclass(frozen=True)
class _Convolve:
    """`jax.lax.conv_general_dilated` on channels-last fields, with a padding for each axis.

    On CPU, XLA runs the gradient of a convolution about thirty times slower inside a loop (such as
    a scan) than outside (JAX issue 12868). Matrix products are equally fast inside and outside.
    """

    padding: tuple[str, ...]

    def __call__(
        self, x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str, **options: Any
    ) -> jax.Array:
        by_products = jax.default_backend() == "cpu"
        pads = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
        rest = list(pads)
        for mode in dict.fromkeys(self.padding):
            if mode != "zeros" or by_products:
                chosen = [name == mode for name in self.padding]
                widths = [pad if here else (0, 0) for pad, here in zip(pads, chosen)]
                rest = [(0, 0) if here else pad for pad, here in zip(rest, chosen)]
                x = jnp.pad(x, ((0, 0), *widths, (0, 0)), mode=PADDINGS[mode])
        if by_products:
            return _convolve_by_products(x, kernel, strides)
        return jax.lax.conv_general_dilated(x, kernel, strides, rest, **options)


def _convolve_by_products(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> jax.Array:
    """A convolution without padding, by matrix products."""
    *lengths, _, features = kernel.shape
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], lengths, strides)]

    def shifted(x: jax.Array, offset: int, axis: int) -> jax.Array:
        step = strides[axis]
        stop = offset + (sizes[axis] - 1) * step + 1
        return jax.lax.slice_in_dim(x, offset, stop, step, axis=axis + 1)

    # The offsets along the last axis are concatenated, and the others summed: in measurements this
    # is faster than concatenating all offsets (more copies) or summing over all (small products).
    *others, last = range(len(lengths))
    x = jnp.concatenate([shifted(x, i, last) for i in range(lengths[last])], axis=-1)
    kernel = kernel.reshape(*lengths[:-1], -1, features)
    products = []
    for offsets in itertools.product(*(range(lengths[axis]) for axis in others)):
        window = x
        for axis, offset in zip(others, offsets):
            window = shifted(window, offset, axis)
        products.append(window @ kernel[offsets])
    return sum(products[1:], start=products[0])
