"""The M-step: each prior with a network is fitted to the draws of its sites."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count, check_number, set_fields
from numpyro_diffprior._compile.devices import own_devices, replicate
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion.fitting import measure_error
from numpyro_diffprior.diffusion.minibatches import (
    Augment,
    augment_for_summary,
    check_augment,
    take_some,
)
from numpyro_diffprior.diffusion.noise import LogNormal, NoiseDistribution
from numpyro_diffprior.diffusion.training import TrainState, init_training, train
from numpyro_diffprior.em.draws import pool_draws
from numpyro_diffprior.em.sites import pool
from numpyro_diffprior.em.state import EMState
from numpyro_diffprior.linalg.covariances import Covariance
from numpyro_diffprior.linalg.empirical import GaussianSummary

__all__ = ["MStep", "ParamStep", "Trained", "fit_priors", "summarize"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class ParamStep:
    """How `EM` learns ``numpyro.param`` sites; static.

    Args:
        optimizer: An optimizer of optax, in unconstrained coordinates.
        num_steps: The number of its steps per iteration, on minibatches of events.
    """

    optimizer: optax.GradientTransformation = optax.adam(0.03)
    num_steps: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, optax.GradientTransformation):
            raise ValueError(f"ParamStep: expected an optimizer of optax, got {self.optimizer!r}.")
        set_fields(self, num_steps=check_count("ParamStep", "num_steps", self.num_steps))


@jax.tree_util.register_static
@dataclass(frozen=True)
class MStep:
    """How `EM` trains networks; static.

    Args:
        num_steps: The number of optimizer steps per iteration.
        batch_size: The number of events of a minibatch.
        noise: The training distribution of noise levels.
        ema_decay: The decay of the average of the weights.
        augment: A function ``(rng_key, x)`` that maps a draw, in the data's units, to another
            event that is as probable under the prior, such as a random rotation or shift; see
            `numpyro_diffprior.training.train`. Each draw of a minibatch is mapped anew. A mapping
            from the names of priors has a function for each; priors without one stay as they are,
            and so does the Gaussian that EM starts from. Which symmetries a prior has is the
            user's knowledge; with few events it saves a network from memorizing their draws.
        use_average: Whether E-steps (and the result) use averaged weights.
        warm_start: Whether an M-step starts from the weights of the last one.
        reset_optimizer: Whether an M-step starts with a new state of the optimizer.
        min_shard_size: The least number of elements of weights that are sharded over the devices
            of ``mesh`` in training, see `numpyro_diffprior.training.train` (default: none are).
        params: How ``numpyro.param`` sites are learned.
    """

    num_steps: int = 256
    batch_size: int = 256
    noise: NoiseDistribution = field(default=LogNormal())
    ema_decay: float = 0.999
    augment: Augment | Mapping[str, Augment] | tuple[tuple[str, Augment], ...] | None = None
    use_average: bool = True
    warm_start: bool = True
    reset_optimizer: bool = False
    min_shard_size: int | None = None
    params: ParamStep = field(default=ParamStep())

    def __post_init__(self) -> None:
        if not isinstance(self.noise, NoiseDistribution):
            raise ValueError(f"MStep: expected a NoiseDistribution, got {self.noise!r}.")
        if isinstance(self.augment, Mapping):
            set_fields(self, augment=tuple(sorted(self.augment.items())))  # to be hashable
        elif not (self.augment is None or callable(self.augment) or type(self.augment) is tuple):
            raise ValueError(f"MStep: expected augment to be a function, got {self.augment!r}.")
        if not isinstance(self.params, ParamStep):
            raise ValueError(f"MStep: expected params of type ParamStep, got {self.params!r}.")
        set_fields(
            self,
            num_steps=check_count("MStep", "num_steps", self.num_steps),
            batch_size=check_count("MStep", "batch_size", self.batch_size),
            ema_decay=check_number("MStep", "ema_decay", self.ema_decay, 0, 1, inclusive=True),
        )
        if self.min_shard_size is not None:
            size = check_count("MStep", "min_shard_size", self.min_shard_size)
            set_fields(self, min_shard_size=size)

    def augment_of(self, name: str) -> Augment | None:
        """Return the augmentation of the events of a prior."""
        if isinstance(self.augment, tuple):
            return dict(self.augment).get(name)
        assert not isinstance(self.augment, Mapping)
        return self.augment

    def check_augment(self, denoisers: Mapping[str, Denoiser]) -> None:
        """Raise a `ValueError` if augmentations do not fit the events of the priors, by name."""
        names = [name for name, _ in self.augment] if isinstance(self.augment, tuple) else []
        if unknown := sorted(set(names) - set(denoisers)):
            raise ValueError(
                f"MStep: expected augmentations of priors with a network, {sorted(denoisers)}, "
                f"got some of {unknown}."
            )
        for name, denoiser in denoisers.items():
            check_augment(self.augment_of(name), denoiser)

    def choose(self, training: TrainState) -> NetworkDenoiser:
        """Return the denoiser to draw with."""
        return training.averaged if self.use_average else training.denoiser


class Trained(NamedTuple):
    """The result of an M-step for one prior.

    Attributes:
        denoiser: The denoiser to draw with.
        training: The state of the training.
        losses: The loss of every minibatch, with shape ``(num_steps,)``.
    """

    denoiser: NetworkDenoiser
    training: TrainState
    losses: jax.Array


def fit_priors(
    rng_key: jax.Array,
    state: EMState,
    draws: Mapping[str, jax.Array],
    contexts: Mapping[str, jax.Array],
    optimizer: optax.GradientTransformation,
    m_step: MStep,
    *,
    summary: GaussianSummary,
    mesh: Mesh | None,
    on_steps: Callable[[int], None] | None = None,
) -> dict[str, Trained]:
    """Fit each prior with a network to the draws of its sites, and to their contexts.

    ``on_steps`` is that of `train`, for each prior in turn.
    """
    trained = {}
    for i, key in enumerate(sorted(state.priors)):
        if key not in state.training:
            continue
        prior = state.priors[key]
        shape = prior.denoiser.context_shape
        x, index = pool_draws(draws, state.sites, key, prior.event_shape)
        context = None if shape is None else pool(contexts, state.sites, key, shape)
        if context is not None and index is not None:
            context = context[index]
        trained[key] = _fit_prior(
            jax.random.fold_in(rng_key, i),
            state.training[key],
            state.initial[key],
            x,
            context,
            optimizer,
            m_step,
            m_step.augment_of(key),
            summary,
            mesh,
            on_steps,
        )
    return trained


def _fit_prior(
    rng_key: jax.Array,
    training: TrainState,
    initial: NetworkDenoiser,
    x: jax.Array,
    context: jax.Array | None,
    optimizer: optax.GradientTransformation,
    m_step: MStep,
    augment: Augment | None,
    summary: GaussianSummary,
    mesh: Mesh | None,
    on_steps: Callable[[int], None] | None,
) -> Trained:
    """Fit one prior to events, with shape ``(n, *event)``, and their contexts; see `train`."""
    key_train, key_measure = jax.random.split(rng_key)
    some, some_contexts = take_some(x, context)
    some = jnp.asarray(some, training.denoiser.dtype)  # once, for what follows
    mapped, mapped_contexts = augment_for_summary(
        jax.random.fold_in(rng_key, 2), augment, some, some_contexts
    )
    mean, cov = summarize(training.denoiser.from_data(mapped), summary)
    start = training if m_step.warm_start else init_training(initial, optimizer)
    if m_step.reset_optimizer:
        start = start._replace(opt_state=init_training(start.denoiser, optimizer).opt_state)
    start = start._replace(
        denoiser=start.denoiser.with_summary(mean, cov),
        averaged=start.averaged.with_summary(mean, cov),
    )
    # Measured before the network is trained on these draws: on them, its error would be too small.
    current = m_step.choose(training).with_summary(mean, cov)
    current = measure_error(
        key_measure, current, mapped, context=mapped_contexts, batch_size=m_step.batch_size
    )
    training, losses = train(
        key_train,
        start,
        x,
        optimizer,
        num_steps=m_step.num_steps,
        batch_size=m_step.batch_size,
        context=context,
        noise=m_step.noise,
        ema_decay=m_step.ema_decay,
        augment=augment,
        mesh=mesh,
        min_shard_size=m_step.min_shard_size,
        on_steps=on_steps,
    )
    chosen = replicate(m_step.choose(training), own_devices(mesh))
    denoiser = replace(chosen, error_ratios=current.error_ratios)
    return Trained(denoiser, training, losses)


@partial(jax.jit, static_argnums=1)
def summarize(x: jax.Array, summary: GaussianSummary) -> tuple[jax.Array, Covariance]:
    """Return mean and covariance of events, with shape ``(n, *event)``."""
    return summary(x)
