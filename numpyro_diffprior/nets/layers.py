"""Layers of noise-conditional networks, as flax nnx modules.

Features are modulated by an embedding of the noise level. Layers with ``zero=True`` are
initialized to zero; further keyword arguments are ``param_dtype`` and ``rngs``, as in flax.

References:
    Dhariwal, Nichol, *Diffusion models beat GANs on image synthesis*, 2021, arXiv 2105.05233
    (normalization modulated by the noise level).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

__all__ = [
    "Embedding",
    "ModulatedNorm",
    "attend",
    "call_blocks",
    "group_norm",
    "lecun_normal",
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


def attend(qkv: jax.Array, num_heads: int) -> jax.Array:
    """Self-attention of queries, keys and values with shape ``(batch, positions, 3 * width)``."""
    batch, positions, features = qkv.shape
    qkv = qkv.reshape(batch, positions, 3, num_heads, -1)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    # Written out, because `jax.nn.dot_product_attention` rounds float64 to float32.
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
    h = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits, axis=-1), value)
    return h.reshape(batch, positions, features // 3)


Block = Callable[[jax.Array, jax.Array, nnx.Rngs | None], jax.Array]


def call_blocks(
    blocks: Iterable[Block],
    h: jax.Array,
    embedded: jax.Array,
    rngs: nnx.Rngs | None,
    *,
    remat: bool,
) -> jax.Array:
    """Call the blocks of a network in sequence; with ``remat``, recompute them in gradients.

    Recomputed blocks of equal structure are one scan over their stacked weights. (On CPU and
    outside of loops, XLA merges a block with its recomputation, and no memory is saved.)
    """
    # Random streams of its own for every block, for their counts are not carried through the scan.
    calls = [(block, None if rngs is None else rngs.fork()) for block in blocks]
    if not remat:
        for block, fork in calls:
            h = block(h, embedded, fork)
        return h

    @jax.checkpoint
    def recomputed(h: jax.Array, call: tuple[Block, nnx.Rngs | None]) -> tuple[jax.Array, None]:
        block, fork = call
        return block(h, embedded, fork), None

    # `nnx.remat` and `nnx.scan` would write weights back, which fails for those closed over.
    for _, group in groupby(calls, _structure):
        first, *others = group
        if others:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, *others)
            h, _ = jax.lax.scan(recomputed, h, stacked)
        else:
            h, _ = recomputed(h, first)
    return h


def _structure(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]


def group_norm(width: int, *, affine: bool = False, **options: Any) -> nnx.GroupNorm:
    """A group normalization with at most 32 groups, of at least four channels if possible."""
    most = min(32, max(1, width // 4))
    num_groups = max(k for k in range(1, most + 1) if width % k == 0)
    return nnx.GroupNorm(
        width, num_groups=num_groups, use_bias=affine, use_scale=affine, **options
    )


def linear(size: int, width: int, *, zero: bool = False, **options: Any) -> nnx.Linear:
    """An affine map of the last axis."""
    init = jax.nn.initializers.zeros if zero else lecun_normal
    return nnx.Linear(size, width, kernel_init=init, **options)


def lecun_normal(rng_key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """Draw truncated normals with variance 1 / fan-in, as flax's initializer of this name does.

    The draws are flat: XLA compiles every new shape, and takes several times as long for shapes
    of several axes, which adds up to seconds for a small UNet.
    """
    variance = 0.774  # of a standard normal truncated at two deviations
    draws = jax.random.truncated_normal(rng_key, -2, 2, (math.prod(shape),), dtype)
    return (draws / math.sqrt(variance * math.prod(shape[:-1]))).astype(dtype).reshape(shape)
