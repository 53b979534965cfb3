"""Fit a denoiser to clean events: its mean and covariance, its network, its error ratios."""

import warnings
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from numpyro_diffprior._compile.bars import make_bar
from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.devices import own_array, own_devices, replicate
from numpyro_diffprior._compile.lazy import is_lazy
from numpyro_diffprior.denoisers.denoiser import choose_unit
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion.minibatches import (
    Augment,
    as_context,
    at_contexts,
    augment_for_summary,
    check_augment,
    check_events,
    check_shapes,
    count_parts,
    take_some,
)
from numpyro_diffprior.diffusion.noise import LogLinear, LogNormal, NoiseDistribution
from numpyro_diffprior.diffusion.training import init_training, train
from numpyro_diffprior.linalg.batched import magnitude
from numpyro_diffprior.linalg.empirical import GaussianSummary, LowRankSummary

__all__ = ["FitResult", "fit_denoiser", "measure_error"]


class FitResult(NamedTuple):
    """The result of `fit_denoiser`.

    Attributes:
        denoiser: The denoiser with averaged weights.
        losses: Loss of every minibatch before its step, with shape ``(num_steps,)``.
    """

    denoiser: NetworkDenoiser
    losses: jax.Array


def measure_error(
    rng_key: jax.Array,
    denoiser: NetworkDenoiser,
    x: jax.Array,
    *,
    context: jax.Array | None = None,
    batch_size: int = 256,
) -> NetworkDenoiser:
    """Measure a denoiser's error over its range of noise levels; see `Denoiser.error_ratio`.

    On the events that the network was trained on, the measured error is too small.

    Args:
        rng_key: Random key.
        denoiser: The denoiser; its mean and covariance should be those of `x`.
        x: Clean events, in the data's units, with shape ``(n, *event_shape)``.
        context: Their contexts, see `train`.
        batch_size: Number of events, drawn from `x`, per noise level.

    Returns:
        The denoiser with the measured ``error_ratios``.

    Raises:
        ValueError: If `x` has the wrong shape, no events or values that are not finite.
    """
    check_shapes(x, context, denoiser)
    x = check_events(x, denoiser)
    context = as_context(context, denoiser)
    batch_size = check_count("measure_error", "batch_size", batch_size)
    num_parts = count_parts(batch_size, denoiser)
    return _measure_error(rng_key, denoiser, x, context, batch_size, num_parts)


def fit_denoiser(
    rng_key: jax.Array,
    denoiser: NetworkDenoiser,
    x: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_size: int = 256,
    context: jax.Array | None = None,
    noise: NoiseDistribution = LogNormal(),
    ema_decay: float = 0.999,
    augment: Augment | None = None,
    summary: GaussianSummary = LowRankSummary(),
    mesh: Mesh | None = None,
    min_shard_size: int | None = None,
    progress_bar: bool = True,
) -> FitResult:
    """Fit a denoiser to clean events: first its mean and covariance, then its network.

    If the denoiser's unit is far from the events' scale, the result has another unit.

    Args:
        rng_key: Random key.
        denoiser: A denoiser with an untrained network. (To continue with a trained one, whose
            preconditioning must not change, use `train`.)
        x: Clean events, in the data's units, with shape ``(n, *event_shape)``; see `train`. For
            memory maps and `lazy_arrays`, mean, covariance and error ratios are estimated from
            some events, evenly spaced: 65,536 of them, or as many as have 2^25 elements, or 4,096,
            if these have more.
        optimizer: Any optax transformation.
        num_steps: Number of steps of stochastic gradient descent.
        batch_size: Number of events per step; it may exceed ``n``.
        context: The events' contexts, see `train`.
        noise: Distribution of the noise levels, see `train`.
        ema_decay: Largest decay of the average of the weights, see `train`.
        augment: A function that maps an event to another one that is as probable, see `train`.
            The Gaussian summary is that of mapped events.
        summary: The form of the events' Gaussian summary.
        mesh: Devices to spread minibatches over, see `train`.
        min_shard_size: The least size of weights that are sharded in training, see `train`.
        progress_bar: Whether to show the steps in a terminal or a notebook, after a second.

    Returns:
        The denoiser with averaged weights and measured error ratios, and the losses.

    Raises:
        ValueError: If all events are the same; see also `train`.
    """
    x, context = own_array(x), own_array(context)
    check_shapes(x, context, denoiser)
    some, some_contexts = take_some(x, context)
    some, some_contexts = replicate(
        (check_events(some, denoiser), as_context(some_contexts, denoiser)), own_devices(mesh)
    )
    check_augment(augment, denoiser)
    key_augment = jax.random.fold_in(rng_key, 2)
    mapped, mapped_contexts = augment_for_summary(key_augment, augment, some, some_contexts)
    if augment is not None:
        check_events(mapped, denoiser)
    deviation = _deviation(mapped)
    if not isinstance(deviation, jax.core.Tracer) and not deviation > 0:
        raise ValueError(
            f"fit_denoiser: expected events that differ, got {len(mapped)} that are all the same: "
            "no distribution can be fitted to them."
        )
    unit = choose_unit(deviation, denoiser.unit)
    summary.check(denoiser.event_shape)
    denoiser = denoiser.with_gaussian(*summary(mapped / unit), unit)
    key_train, key_measure = jax.random.split(rng_key)
    with make_bar("fit_denoiser", progress_bar, num_steps, delay=1) as bar:
        state, losses = train(
            key_train,
            init_training(denoiser, optimizer),
            x if is_lazy(x) else some,
            optimizer,
            num_steps=num_steps,
            batch_size=batch_size,
            context=context,
            noise=noise,
            ema_decay=ema_decay,
            augment=augment,
            mesh=mesh,
            min_shard_size=min_shard_size,
            on_steps=None if bar.disable else lambda done: bar.update(done - bar.n),
        )
    _warn_of_divergence(losses)
    averaged = replicate(state.averaged, own_devices(mesh))
    denoiser = measure_error(key_measure, averaged, mapped, context=mapped_contexts)
    return FitResult(denoiser, losses)


@partial(jax.jit, static_argnums=(4, 5))
def _measure_error(
    rng_key: jax.Array,
    denoiser: NetworkDenoiser,
    x: jax.Array,
    context: jax.Array | None,
    batch_size: int,
    num_parts: int,
) -> NetworkDenoiser:
    num_levels = len(denoiser.error_ratios)
    sigmas = LogLinear()(num_levels, denoiser.sigma_min, denoiser.sigma_max)

    def ratio(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        (key, sigma) = inputs
        key_batch, key_noise = jax.random.split(key)
        index = jax.random.randint(key_batch, (batch_size,), 0, len(x))
        noise = jax.random.normal(key_noise, (batch_size, *x.shape[1:]), x.dtype)
        x_t = denoiser.from_data(x[index]) + sigma * noise

        def error(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            index, x_t = part
            x_0 = denoiser.from_data(x[index])
            at = at_contexts(denoiser, None if context is None else context[index])
            return jnp.sum((x_0 - at(x_t, sigma)) ** 2)

        parts = jax.tree.map(lambda a: a.reshape(num_parts, -1, *a.shape[1:]), (index, x_t))
        total = error((index, x_t)) if num_parts == 1 else jax.lax.map(error, parts).sum()
        return total / batch_size / denoiser.cov.conditional(sigma**2).trace()

    ratios = jax.lax.map(ratio, (jax.random.split(rng_key, num_levels), sigmas))
    return replace(denoiser, error_ratios=ratios)


def _deviation(x: jax.Array) -> jax.Array:
    """Return the largest standard deviation of an element, without overflow or underflow."""
    unit = magnitude(x)
    return (unit * jnp.std(x / unit, axis=0)).max()


def _warn_of_divergence(losses: jax.Array) -> None:
    """Warn if training met numbers that are not finite."""
    if isinstance(losses, jax.core.Tracer) or bool(jnp.isfinite(losses).all()):
        return
    step = int(jnp.argmin(jnp.isfinite(losses))) + 1
    warnings.warn(
        f"training diverged at step {step} of {len(losses)}: its loss, gradient or weights are "
        "not finite. The denoiser is the one before that step; a smaller learning rate, or "
        "gradients clipped by `optax.clip_by_global_norm`, may help.",
        stacklevel=3,
    )
