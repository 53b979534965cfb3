r"""A diffusion transformer over patches of trajectories, images and volumes.

Every block adds, to a patch :math:`h`, self-attention and a perceptron :math:`f` as

.. math:: h \leftarrow h + g(c) \, f\bigl((1 + a(c)) \, \mathrm{norm}(h) + b(c)\bigr),

where :math:`a, b, g` are affine in the embedding :math:`c` of noise level and context, and are
initialized to zero, so that a new block is the identity (adaLN-Zero).

References:
    Peebles, Xie, *Scalable diffusion models with transformers* (DiT), 2023, arXiv 2212.09748.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from numpyro_diffprior.nets.layers import Embedding, ModulatedNorm, attend, call_blocks, linear
from numpyro_diffprior.nets.options import (
    check_axes,
    check_context_shape,
    check_dtype,
    check_embedding,
    check_event,
    check_heads,
    check_inputs,
    check_rate,
    check_rngs,
    check_sizes,
)

__all__ = ["DiT"]


class DiT(nnx.Module):
    """A diffusion transformer over patches of trajectories, images or volumes, channels last.

    The event is divided into patches (padded by zeros where the patch size does not divide it),
    which are embedded linearly, and get fixed sines and cosines of their positions along each
    axis. Self-attention joins all patches in every block: the cost grows with the square of their
    number, and no boundary condition is built in.

    Args:
        event_shape: The sizes of the spatial axes, and of a last axis of channels if the event has
            one, as in `UNet`.
        spatial_dims: Number of spatial axes: 1, 2 or 3. Required for shapes with two readings, as
            in `UNet`.
        patch_size: Size of a patch, for all spatial axes or for each.
        width: Number of features of a patch, at least two per spatial axis.
        depth: Number of blocks.
        num_heads: Number of heads of every self-attention; it divides `width`.
        embedding: Width of the embedding of the noise level, an even number.
        context_shape: Shape of one context, of any rank, or None for a network without contexts.
            Context values should be of order one (one-hot labels).
        dropout: Probability that a hidden unit is dropped in training.
        remat: Whether gradients recompute the blocks instead of storing their intermediate arrays:
            less memory, for one more evaluation per gradient.
        param_dtype: Floating dtype of the weights and of the computation.
        rngs: Random streams that initialize the weights.

    Raises:
        ValueError: If the event's shape has two readings or does not fit `spatial_dims`, or if a
            width, a rate, a patch size or the dtype is out of range.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        spatial_dims: int | None = None,
        patch_size: int | Sequence[int] = 4,
        width: int = 256,
        depth: int = 6,
        num_heads: int = 4,
        embedding: int = 64,
        context_shape: Sequence[int] | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_rngs("DiT", rngs)
        self.event_shape, self.spatial_dims, size = check_event("DiT", event_shape, spatial_dims)
        self.patch_size = check_axes("patch_size", patch_size, self.spatial_dims)
        (self.width,) = check_sizes("width", (width,))
        (self.depth,) = check_sizes("depth", (depth,))
        if self.width < 2 * self.spatial_dims:
            raise ValueError(
                "width must be at least two per spatial axis, for a sine and a cosine of the "
                f"position; got width={width} for {self.spatial_dims} axes."
            )
        self.num_heads = check_heads(num_heads, [self.width])
        self.embedding = check_embedding(embedding)
        self.context_shape = check_context_shape(context_shape)
        self.dropout = check_rate(dropout)
        self.remat = bool(remat)
        self.param_dtype = check_dtype(param_dtype)
        options: dict[str, Any] = {"param_dtype": self.param_dtype, "rngs": rngs}
        shared = {"embedding": self.embedding, "dropout": self.dropout, **options}
        features = math.prod(self.patch_size) * size
        self.embed = Embedding(self.embedding, self.context_shape, **options)
        self.first = linear(features, self.width, **options)
        self.blocks = nnx.List(
            [_Block(self.width, self.num_heads, **shared) for _ in range(self.depth)]
        )
        self.norm = _modulated_norm(self.width, self.embedding, **options)
        self.last = linear(self.width, features, zero=True, **options)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments except `rngs`, as JSON-serializable values."""
        return {
            "event_shape": list(self.event_shape),
            "spatial_dims": self.spatial_dims,
            "patch_size": list(self.patch_size),
            "width": self.width,
            "depth": self.depth,
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
        sizes = self.event_shape[: self.spatial_dims]
        grid = tuple(-(-n // patch) for n, patch in zip(sizes, self.patch_size))
        h = self.first(_to_patches(x.reshape(len(x), *sizes, -1), grid, self.patch_size))
        h = h + _positions(grid, self.width, self.param_dtype)
        h = call_blocks(self.blocks, h, embedded, rngs, remat=self.remat)
        h = self.last(self.norm(h, embedded))
        return _from_patches(h, grid, self.patch_size, sizes).reshape(x.shape)


class _Block(nnx.Module):
    """Self-attention over patches, then a perceptron, each with a gate that starts at zero."""

    def __init__(
        self, width: int, num_heads: int, *, embedding: int, dropout: float, **options: Any
    ) -> None:
        self.num_heads = num_heads
        self.norms = nnx.List([_modulated_norm(width, embedding, **options) for _ in range(2)])
        self.gates = linear(embedding, 2 * width, zero=True, **options)
        self.qkv = linear(width, 3 * width, **options)
        self.out = linear(width, width, **options)
        self.expand = linear(width, 4 * width, **options)
        self.contract = linear(4 * width, width, **options)
        self.drop = nnx.Dropout(dropout)

    def __call__(self, h: jax.Array, embedded: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        first, second = jnp.split(self.gates(embedded)[:, None], 2, axis=-1)
        h = h + first * self.out(attend(self.qkv(self.norms[0](h, embedded)), self.num_heads))
        hidden = nnx.gelu(self.expand(self.norms[1](h, embedded)))
        hidden = self.drop(hidden, deterministic=rngs is None, rngs=rngs)
        return h + second * self.contract(hidden)


def _modulated_norm(width: int, embedding: int, **options: Any) -> ModulatedNorm:
    norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, **options)
    return ModulatedNorm(norm, width, embedding, zero=True, **options)


def _to_patches(x: jax.Array, grid: Sequence[int], patch_size: Sequence[int]) -> jax.Array:
    """Map ``(batch, *sizes, channels)`` to ``(batch, patches, elements of a patch)``."""
    batch, *sizes, channels = x.shape
    ends = [(0, n * patch - size) for n, patch, size in zip(grid, patch_size, sizes)]
    x = jnp.pad(x, ((0, 0), *ends, (0, 0)))
    pairs = [size for pair in zip(grid, patch_size) for size in pair]
    x = x.reshape(batch, *pairs, channels)
    last = 2 * len(grid) + 1
    x = x.transpose(0, *range(1, last, 2), *range(2, last, 2), last)
    return x.reshape(batch, math.prod(grid), -1)


def _from_patches(
    h: jax.Array, grid: Sequence[int], patch_size: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    """Invert `_to_patches`."""
    num_dims = len(grid)
    h = h.reshape(len(h), *grid, *patch_size, -1)
    order = [axis for i in range(1, num_dims + 1) for axis in (i, i + num_dims)]
    h = h.transpose(0, *order, 2 * num_dims + 1)
    h = h.reshape(len(h), *(n * patch for n, patch in zip(grid, patch_size)), -1)
    return h[:, *(slice(size) for size in sizes)]


def _positions(grid: Sequence[int], width: int, dtype: np.dtype) -> jax.Array:
    """Sines and cosines of the position along each axis, with shape ``(patches, width)``."""
    num_frequencies = width // (2 * len(grid))
    frequencies = 10_000.0 ** (-np.arange(num_frequencies) / num_frequencies)
    parts = []
    for axis, size in enumerate(grid):
        angles = np.arange(size)[:, None] * frequencies
        waves = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), dtype)
        waves = jnp.expand_dims(waves, [i for i in range(len(grid)) if i != axis])
        parts.append(jnp.broadcast_to(waves, (*grid, 2 * num_frequencies)))
    positions = jnp.concatenate(parts, axis=-1).reshape(math.prod(grid), -1)
    return jnp.pad(positions, ((0, 0), (0, width - positions.shape[-1])))
