r"""Train the network of a denoiser, by denoising score matching.

.. math:: \min_\theta E_{x, \sigma, \varepsilon} \left[ \left( \frac{1}{\sigma^2} + \frac{1}{s^2}
    \right) \frac{1}{d} \lVert D_\theta(x + \sigma \varepsilon, \sigma) - x \rVert^2 \right]

with :math:`s` the data's scale, so that the loss does not depend on the data's units. Only the
network's weights are trained: the ``nnx.Param`` of a flax nnx module, or all floating arrays of
another pytree (`numpyro_diffprior.nets.adapters`). The module itself updates its other variables,
such as batch statistics.

References:
    Rozet, Andry, Lanusse, Louppe, *Learning diffusion priors from observations by expectation
    maximization*, 2024, arXiv 2405.13712 (the loss and its weight).

    Karras, Aittala, Aila, Laine, *Elucidating the design space of diffusion-based generative
    models* (EDM), 2022, arXiv 2206.00364.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count, check_number
from numpyro_diffprior._compile.devices import (
    check_batch_size,
    constrain,
    divide,
    localize,
    num_devices,
    num_processes,
    own_array,
    replicate,
    spread,
)
from numpyro_diffprior._compile.lazy import is_lazy
from numpyro_diffprior._compile.memory import advise, check_memory
from numpyro_diffprior.denoisers.denoiser import Denoiser, align
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion.minibatches import (
    Augment,
    Minibatches,
    as_context,
    at_contexts,
    augment_events,
    check_augment,
    check_events,
    check_shapes,
    choose_events,
    count_parts,
)
from numpyro_diffprior.diffusion.noise import LogNormal, NoiseDistribution
from numpyro_diffprior.nets.adapters import split_network

__all__ = [
    "TrainState",
    "denoising_loss",
    "init_training",
    "train",
]


class TrainState(NamedTuple):
    """State of `train`, to stop and resume.

    Attributes:
        denoiser: The denoiser with the current weights.
        averaged: The denoiser with the exponential moving average of the weights, the one to use.
        opt_state: State of the optimizer.
        num_steps: Number of steps taken so far, a scalar integer.
    """

    denoiser: NetworkDenoiser
    averaged: NetworkDenoiser
    opt_state: optax.OptState
    num_steps: jax.Array


def denoising_loss(
    denoiser: Denoiser,
    x: jax.Array,
    sigma: jax.Array,
    rng_key: jax.Array,
    *,
    rngs: nnx.Rngs | None = None,
) -> jax.Array:
    r"""Weighted mean squared error of a denoiser on freshly noised events.

    .. math:: \frac{1}{d} \left( \frac{1}{\sigma^2} + \frac{1}{s^2} \right)
        \lVert D(x + \sigma \varepsilon, \sigma) - x \rVert^2

    averaged over the batch. For data of scale :math:`s`, the best prediction that is a multiple of
    :math:`x_t` has loss one at every noise level.

    Args:
        denoiser: Any denoiser.
        x: Clean events, with shape ``(*batch, *event_shape)``, in the denoiser's unit.
        sigma: Noise levels, broadcastable to ``(*batch,)``, in the denoiser's unit.
        rng_key: Random key for the noise.
        rngs: Random streams for dropout, for a denoiser that takes them (default: no dropout).

    Returns:
        The loss, a scalar.
    """
    sigma = jnp.asarray(sigma, x.dtype)
    level = align(sigma, denoiser.event_shape)
    x_t = x + level * jax.random.normal(rng_key, x.shape, x.dtype)
    options: dict[str, Any] = {} if rngs is None else {"rngs": rngs}
    x_hat = denoiser(x_t, sigma, **options)
    # The square of 1 / c_out in `NetworkDenoiser`, if its base has the data's scale. In EM, the
    # base is fixed while the scale follows the draws.
    weight = 1 / level**2 + 1 / denoiser.scale**2
    return jnp.mean(weight * (x_hat - x) ** 2)


def init_training(
    denoiser: NetworkDenoiser, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the initial state of training.

    Args:
        denoiser: The denoiser to start from; its mean, covariance and base stay as they are.
        optimizer: Any optax transformation, such as ``optax.chain(clip_by_global_norm(1.0),
            optax.adam(schedule))``.

    Returns:
        The state that `train` takes.
    """
    weights = _widen(split_network(denoiser.net)[0])
    return TrainState(
        denoiser=denoiser,
        averaged=denoiser,
        opt_state=optimizer.init(weights),
        num_steps=jnp.zeros((), int),
    )


def train(
    rng_key: jax.Array,
    state: TrainState,
    x: jax.Array,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int,
    context: jax.Array | None = None,
    noise: NoiseDistribution = LogNormal(),
    ema_decay: float = 0.999,
    augment: Augment | None = None,
    mesh: Mesh | None = None,
    min_shard_size: int | None = None,
    on_steps: Callable[[int], None] | None = None,
) -> tuple[TrainState, jax.Array]:
    r"""Take steps of stochastic gradient descent in a compiled loop.

    Every step draws a minibatch of `x` with replacement and a noise level for each of its events.
    The average of the weights has decay :math:`\min(\gamma, (1 + t) / (10 + t))` at step
    :math:`t`, counted over all calls, so that it forgets the initial weights in a short run too.

    The function compiles once per optimizer and `augment` (compared by identity), shape of `x`,
    `num_steps` and `batch_size`. New weights, data or values of `ema_decay` do not recompile it.

    Gradients of a minibatch with more than 2^18 elements (on one device) are accumulated over
    equal parts of fewer elements, which bounds the memory. Batch statistics of a network are then
    those of the parts.

    Args:
        rng_key: Random key.
        state: The current state, from `init_training` or from a previous call.
        x: Clean events to fit, in the data's units, with shape ``(n, *event_shape)``. Memory maps
            and `lazy_arrays` stay where they are; minibatches are read while the device takes
            earlier steps, with the same numbers.
        optimizer: The optax transformation that `state` was initialized with.
        num_steps: Number of steps.
        batch_size: Number of events per step; it may exceed ``n``.
        context: The events' contexts, with shape ``(n, *context_shape)``, if the denoiser takes
            contexts.
        noise: Distribution of the noise levels between the denoiser's `sigma_min` and
            `sigma_max`; the default is `LogNormal`, that of EDM.
        ema_decay: Largest decay :math:`\gamma` of the average, from 0 (no averaging) to 1.
        augment: A function ``(rng_key, x)`` that maps one event, in the data's units, to another
            one that is as probable, such as a random rotation or shift; or ``(rng_key, x,
            context)``, which returns both, if the denoiser takes contexts. Each event of a
            minibatch is mapped anew. With few events, this keeps a network from memorizing them.
        mesh: Devices over which every minibatch is sharded (`jax.make_mesh`); the events and the
            weights are copied to each.
        min_shard_size: The least number of elements of weights that are sharded over the devices
            rather than copied, with their average and the optimizer's state: for networks that
            do not fit on one device four times (default: none are). They stay so in the state,
            if the devices are those of one process.
        on_steps: A function of the number of steps taken, called about once a second. With one,
            the loop runs in parts, between which the call can be interrupted; the numbers are the
            same. It is not called inside ``jax.jit``, nor by one of several processes.

    Returns:
        The next state, and the loss of every minibatch before its step with shape
        ``(num_steps,)``.

    Raises:
        ValueError: If `x` has the wrong shape, no events or values that are not finite, or if
            `num_steps`, `batch_size` or `ema_decay` is out of its range, `augment` does not return
            what it is given, or `batch_size` is not a multiple of the number of devices.
    """
    num_steps = check_count("train", "num_steps", num_steps)
    batch_size = check_count("train", "batch_size", batch_size)
    if min_shard_size is not None:
        min_shard_size = check_count("train", "min_shard_size", min_shard_size)
    ema_decay = check_number("train", "ema_decay", ema_decay, 0, 1, inclusive=True)
    check_batch_size(batch_size, mesh)
    x, context = own_array(x), own_array(context)
    check_shapes(x, context, state.denoiser)
    check_augment(augment, state.denoiser)
    num_parts = count_parts(batch_size // num_devices(mesh), state.denoiser)
    original = state.denoiser

    def convert(x: Any, context: Any) -> Any:
        """Put events and contexts on the devices, in the denoiser's unit."""
        x = original.from_data(check_events(x, original))
        return replicate((x, as_context(context, original)), mesh)

    key_steps = replicate(rng_key, mesh)
    state, run = divide((state, _Run.start(state, num_steps)), mesh, min_shard_size)

    def take(events: Any, run: _Run, end: int) -> _Run:
        """Take the steps before ``end``."""
        arrays = key_steps, state.denoiser, *events, noise, ema_decay, run, end
        static = (
            *(optimizer, augment, num_steps, batch_size, num_parts),
            *(is_lazy(x), mesh, min_shard_size),
        )
        return _take_steps(*arrays, *static)

    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((x, run)))
    if is_traced or num_processes(mesh) > 1:
        on_steps = None
    if is_lazy(x):
        minibatches = Minibatches(rng_key, x, context, num_steps, batch_size, convert)
        run = _train_in_parts(take, run, minibatches, num_steps, on_steps)
    elif on_steps is None:
        run = take(convert(x, context), run, num_steps)
    else:
        run = _train_by_seconds(partial(take, convert(x, context)), run, num_steps, on_steps)
    state, run = localize((state, run), mesh)
    return run.finish(state)


def _train_in_parts(
    take: Callable[[Any, "_Run", int], "_Run"],
    run: "_Run",
    minibatches: Minibatches,
    num_steps: int,
    on_steps: Callable[[int], None] | None,
) -> "_Run":
    """Take steps whose minibatches are read while earlier steps are taken."""
    events, done = minibatches.read(), 0
    while done < num_steps:
        done = min(done + minibatches.size, num_steps)
        run = take(events, run, done)
        if done < num_steps:
            events = minibatches.read()
        if on_steps is not None:
            jax.block_until_ready(run)
            on_steps(done)
    return run


def _train_by_seconds(
    take: Callable[["_Run", int], "_Run"],
    run: "_Run",
    num_steps: int,
    on_steps: Callable[[int], None],
) -> "_Run":
    """Take steps in parts that take about a second each."""
    done, size = 0, 1
    while done < num_steps:
        began = time.perf_counter()
        done = min(done + size, num_steps)
        run = jax.block_until_ready(take(run, done))
        seconds = max(time.perf_counter() - began, 1e-9)
        size = max(1, min(2 * size, int(size / seconds)))
        on_steps(done)
    return run


class _Run(NamedTuple):
    """The part of a `TrainState` that changes from step to step; a pytree.

    Attributes:
        weights: The network's weights, at least float32: in a dtype such as bfloat16, small
            updates of weights and of their average would round to zero, and so would the
            optimizer's averages of squared gradients.
        rest: Its other variables, such as batch statistics.
        averaged: The average of the weights, at least float32.
        opt_state: See `TrainState`.
        num_steps: The number of steps of all calls.
        done: The number of steps of this call.
        diverged: Whether a loss, gradient or weight was not finite.
        losses: The losses of this call's steps, zero for those to come.
    """

    weights: Any
    rest: Any
    averaged: Any
    opt_state: optax.OptState
    num_steps: jax.Array
    done: jax.Array
    diverged: jax.Array
    losses: jax.Array

    @classmethod
    def start(cls, state: TrainState, num_steps: int) -> "_Run":
        """Return the beginning of a call of `train`."""
        weights, rest, _ = split_network(state.denoiser.net)
        return cls(
            weights=_widen(weights),
            rest=rest,
            averaged=_widen(split_network(state.averaged.net)[0]),
            opt_state=state.opt_state,
            num_steps=state.num_steps,
            done=jnp.zeros((), int),
            diverged=jnp.zeros((), bool),
            losses=jnp.zeros(num_steps, state.denoiser.dtype),
        )

    def finish(self, state: TrainState) -> tuple[TrainState, jax.Array]:
        """Return the result of `train`, given the state at its start."""
        weights, _, rebuild = split_network(state.denoiser.net)
        averaged, _, rebuild_averaged = split_network(state.averaged.net)
        net = rebuild(_like(self.weights, weights), self.rest)
        mean = rebuild_averaged(_like(self.averaged, averaged), self.rest)
        return TrainState(
            denoiser=replace(state.denoiser, net=net),
            averaged=replace(state.averaged, net=mean),
            opt_state=self.opt_state,
            num_steps=self.num_steps,
        ), self.losses


def _advise(factor: float, *args: Any) -> str:
    batch_size, num_parts, *_ = args[-5:]
    smaller = advise("batch_size", factor, batch_size // num_parts)
    return f"use a network with remat=True, or {smaller}"


@check_memory("Training steps", _advise)
@partial(jax.jit, static_argnums=(8, 9, 10, 11, 12, 13, 14, 15))
def _take_steps(
    rng_key: jax.Array,
    fixed: NetworkDenoiser,
    x: jax.Array,
    context: jax.Array | None,
    noise: NoiseDistribution,
    ema_decay: jax.Array,
    run: _Run,
    end: jax.Array,
    optimizer: optax.GradientTransformation,
    augment: Augment | None,
    num_steps: int,
    batch_size: int,
    num_parts: int,
    streamed: bool,
    mesh: Mesh | None,
    min_shard_size: int | None,
) -> _Run:
    """Take the steps of a call of `train` that come before the step ``end``.

    The events are all of them or, if they are streamed, those of the minibatches of these steps.
    """
    narrow, _, rebuild = split_network(fixed.net)

    def sample_levels(rng_key: jax.Array) -> jax.Array:
        return noise.sample(
            rng_key,
            batch_size,
            sigma_min=fixed.sigma_min,
            sigma_max=fixed.sigma_max,
            scale=fixed.scale,
        )

    def loss_fn(
        weights: Any,
        rest: Any,
        index: jax.Array,
        sigma: jax.Array,
        key_noise: jax.Array,
        key_dropout: jax.Array,
    ) -> tuple[jax.Array, Any]:
        rngs = nnx.Rngs(dropout=key_dropout)
        net = rebuild(_like(weights, narrow), rest)
        events = x[index], None if context is None else context[index]
        if augment is not None:
            key_noise, key_augment = jax.random.split(key_noise)
            given, at = augment_events(key_augment, augment, fixed.to_data(events[0]), events[1])
            events = fixed.from_data(given), at
        denoiser = at_contexts(replace(fixed, net=net), events[1])
        loss = denoising_loss(denoiser, events[0], sigma, key_noise, rngs=rngs)
        # Batch statistics and the counts of random streams are passed to the next step.
        return loss, split_network(net)[1]

    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(
        weights: Any, rest: Any, index: jax.Array, sigma: jax.Array, keys: list[jax.Array]
    ) -> tuple[jax.Array, Any, Any]:
        """Return the loss and the gradient of a minibatch, part by part, and the next ``rest``."""

        def add(carry: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
            rest, total = carry
            index, sigma, *keys = part
            (loss, rest), gradient = differentiate(
                weights, rest, spread(index, mesh), spread(sigma, mesh), *keys
            )
            return (rest, jax.tree.map(jnp.add, total, (loss, gradient))), None

        zeros = jnp.zeros((), sigma.dtype), jax.tree.map(jnp.zeros_like, weights)
        parts = (
            index.reshape(num_parts, -1),
            sigma.reshape(num_parts, -1),
            *(jax.random.split(key, num_parts) for key in keys),
        )
        (rest, total), _ = jax.lax.scan(add, (rest, zeros), parts)
        loss, gradient = jax.tree.map(lambda leaf: leaf / num_parts, total)
        return loss, gradient, rest

    keys = jax.random.split(rng_key, num_steps)

    def step(i: jax.Array, old: _Run) -> _Run:
        key_batch, key_loss = jax.random.split(keys[i])
        key_sigma, *keys_loss = jax.random.split(key_loss, 3)
        if streamed:
            index = (i - run.done) * batch_size + jnp.arange(batch_size)
        else:
            index = choose_events(key_batch, batch_size, len(x))
        index, sigma = spread(index, mesh), sample_levels(key_sigma)
        if num_parts == 1:
            (loss, rest), gradient = differentiate(old.weights, old.rest, index, sigma, *keys_loss)
        else:
            loss, gradient, rest = accumulate(old.weights, old.rest, index, sigma, keys_loss)
        update, opt_state = optimizer.update(gradient, old.opt_state, old.weights)
        weights = optax.apply_updates(old.weights, update)
        count = old.num_steps + 1
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        averaged = jax.tree.map(
            # In the average's dtype, which may be narrower than that of `decay`.
            lambda new, mean: mean + (1 - decay).astype(mean.dtype) * (new - mean),
            weights,
            old.averaged,
        )
        # A step that is not finite is not taken, nor is any later one; their losses are NaN.
        diverged = old.diverged | ~_are_finite((loss, gradient, weights))
        new = old._replace(
            weights=weights, rest=rest, averaged=averaged, opt_state=opt_state, num_steps=count
        )
        kept = jax.tree.map(lambda a, b: jnp.where(diverged, b, a), new, old)
        losses = old.losses.at[i].set(jnp.where(diverged, jnp.nan, loss).astype(old.losses.dtype))
        new = kept._replace(done=i + 1, diverged=diverged, losses=losses)
        return constrain(new, mesh, min_shard_size)

    return jax.lax.fori_loop(run.done, end, step, run)


def _widen(weights: Any) -> Any:
    """Cast weights to float32, or keep them if they are wider."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), weights
    )


def _like(weights: Any, others: Any) -> Any:
    """Cast weights to the dtypes of others."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), weights, others)


def _are_finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree are finite."""
    flags = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(flags).all()
