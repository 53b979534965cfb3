r"""Empirical Bayes: learn a diffusion prior from incomplete, noisy observations alone.

Expectation maximisation on the observations' marginal likelihood (DiEM). The E-step draws events
from their posteriors under the current prior; the M-step fits the denoiser to the draws. The
first prior is the Gaussian of greatest marginal likelihood, in closed form where the model is
linear and Gaussian; an untrained `NetworkDenoiser` is exactly that Gaussian.

Draws are renewed often and the network takes few steps between: long M-steps on fixed draws
over-sharpen the prior. Particles correct the draws (`numpyro_diffprior.posterior`); with one
particle, an E-step is the paper's. The log-evidence of observations that were kept out tells which
iteration to keep, without looking at the truth.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm.auto import trange

from numpyro_diffprior.denoisers import GaussianDenoiser, NetworkDenoiser
from numpyro_diffprior.distributions import DiffusionPrior
from numpyro_diffprior.evidence import log_evidence
from numpyro_diffprior.gaussian_fit import fit_gaussian
from numpyro_diffprior.guidance import MMPS, GaussianCovariance, Guidance
from numpyro_diffprior.introspect import LatentSite, Model, bind, read_latent, read_likelihood
from numpyro_diffprior.linalg import Covariance, empirical_gaussian
from numpyro_diffprior.metrics import sliced_wasserstein
from numpyro_diffprior.posterior import resolve_settings, sample_blocks
from numpyro_diffprior.samplers import Sampler
from numpyro_diffprior.schedules import LogNormal, NoiseDistribution
from numpyro_diffprior.smc import Draws
from numpyro_diffprior.training import TrainState, init_training, measure_error, train

__all__ = ["EM", "EMMetrics", "EMResult", "EMState"]


class EMState(NamedTuple):
    """The state of `EM`, a pytree.

    Attributes:
        prior: The current prior, from which the next E-step draws.
        training: The state of the M-step.
        initial: The untrained denoiser, from which cold M-steps start.
        draws: The last E-step's draws, with shape ``(num_draws, *batch, *event)``.
        rng_key: The random key of the next iteration.
        num_iterations: How many iterations were made.
    """

    prior: DiffusionPrior
    training: TrainState
    initial: NetworkDenoiser
    draws: jax.Array
    rng_key: jax.Array
    num_iterations: int


class EMMetrics(NamedTuple):
    """What iterations report: scalars of one, or arrays of shape ``(num_iterations,)`` of a run.

    Attributes:
        loss: The mean training loss of the M-step.
        sliced_wasserstein: The distance between this E-step's draws and the last one's.
        residual: The mean relative residual of guidance's solves.
        num_truncated: The mean number of directions that guidance left out.
        ess: The mean over the draws of the lowest effective number of particles.
        num_resamplings: The mean number of resamplings per draw.
        log_evidence: The mean log-evidence per event (NaN with one particle).
        e_step_seconds: The time of the E-step.
        m_step_seconds: The time of the M-step.
        heldout_log_evidence: The log-evidence of all held-out events (NaN without any).
        heldout_standard_error: Its standard error.
    """

    loss: jax.Array
    sliced_wasserstein: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array
    e_step_seconds: jax.Array
    m_step_seconds: jax.Array
    heldout_log_evidence: jax.Array
    heldout_standard_error: jax.Array


class EMResult(NamedTuple):
    """What `EM.run` returns.

    Attributes:
        prior: The learned prior, of the last iteration.
        state: The last state, to go on from.
        history: The iterations' metrics.
        best: The prior of the iteration with the largest held-out log-evidence; without held-out
            events the last.
    """

    prior: DiffusionPrior
    state: EMState
    history: EMMetrics
    best: DiffusionPrior


class EM:
    """Fit the diffusion prior of a model to the model's observations.

    The interface is that of `numpyro.infer.SVI`: `init`, `update`, `run`. The model takes the
    prior as its first argument and has the prior's site in a plate; what belongs to the plate's
    elements it passes through `numpyro.subsample`.

    Args:
        model: A NumPyro model.
        optimizer: Any optax optimiser for the network.
        num_sgd_steps: The number of optimiser steps between E-steps.
        batch_size: The number of events of a minibatch, and of a block of the E-step.
        num_particles: Particles per draw of the E-step.
        num_draws: Draws per event of the E-step.
        sampler: The E-step's sampler (default: the prior's).
        guidance: The E-step's guidance (default: `MMPS` with the Gaussian covariance of the
            current draws, with Tweedie's for one particle).
        noise: The training distribution of noise levels.
        ema_decay: The decay of the average of the weights.
        use_average: Whether E-steps (and the result) use averaged weights.
        warm_start: Whether an M-step starts from the last one's weights.
        reset_optimizer: Whether an M-step starts with a new state of the optimiser.
        num_gaussian_iterations: The number of iterations of the first, Gaussian fit.
        rank: The rank of Gaussian covariances of large events.
    """

    def __init__(
        self,
        model: Model,
        optimizer: optax.GradientTransformation,
        *,
        num_sgd_steps: int = 256,
        batch_size: int = 256,
        num_particles: int = 4,
        num_draws: int = 1,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        noise: NoiseDistribution = LogNormal(),
        ema_decay: float = 0.999,
        use_average: bool = True,
        warm_start: bool = True,
        reset_optimizer: bool = False,
        num_gaussian_iterations: int = 32,
        rank: int | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.num_sgd_steps = num_sgd_steps
        self.batch_size = batch_size
        self.num_particles = num_particles
        self.sampler = sampler
        self.guidance = guidance
        self.num_draws = num_draws
        self.noise = noise
        self.ema_decay = ema_decay
        self.use_average = use_average
        self.warm_start = warm_start
        self.reset_optimizer = reset_optimizer
        self.num_gaussian_iterations = num_gaussian_iterations
        self.rank = rank

    def init(
        self, rng_key: jax.Array, prior: DiffusionPrior, *args: Any, **kwargs: Any
    ) -> EMState:
        """Fit the first, Gaussian prior.

        Args:
            rng_key: A random key.
            prior: A prior whose denoiser is a `NetworkDenoiser`, trained or not: its network is
                the start, its Gaussian is fitted anew.
            *args: The model's arguments after the prior.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If the prior has no network, its site is not in a plate, or the model
                cannot be read.
        """
        if not isinstance(prior.denoiser, NetworkDenoiser):
            raise ValueError(
                "EM: expected a prior with a NetworkDenoiser to train, got "
                f"{type(prior.denoiser).__name__}; analytic priors have nothing to learn."
            )
        resolve_settings(prior, self.num_particles, self.sampler, self.guidance)
        bound = bind(self.model, (prior, *args), kwargs)
        latent = read_latent(bound)
        if not latent.plates:
            raise ValueError(
                f"EM: latent site '{latent.name}' is not in a plate; a prior is learned from many "
                "events, so put the site and its observations in a `numpyro.plate`."
            )
        likelihood = read_likelihood(bound, latent)
        rng_key, key_fit = jax.random.split(rng_key)
        if likelihood.linear:
            mean, cov = self._fit_in_closed_form(latent, prior, args, kwargs)
        else:
            mean, cov = self._fit_by_sampling(key_fit, prior, args, kwargs)
        denoiser = prior.denoiser.fit_gaussian(mean, cov)
        shape = (self.num_draws, *_full_batch_shape(latent), *prior.event_shape)
        return EMState(
            _with_denoiser(prior, denoiser),
            init_training(denoiser, self.optimizer),
            denoiser,
            jnp.full(shape, jnp.nan, prior.denoiser.dtype),
            rng_key,
            0,
        )

    def update(self, state: EMState, *args: Any, **kwargs: Any) -> tuple[EMState, EMMetrics]:
        """Make one iteration: an E-step, then an M-step on its draws.

        Args:
            state: The state, from `init` or from this function.
            *args: The model's arguments after the prior.
            **kwargs: The model's keyword arguments.
        """
        rng_key, *keys = jax.random.split(state.rng_key, 5)
        key_draw, key_compare, key_measure, key_train = keys
        started = time.perf_counter()
        draws = self._draw(key_draw, state.prior, args, kwargs, self.guidance, self.num_draws)
        x = draws.x.reshape(-1, *state.prior.event_shape)
        distance = _distance(key_compare, x, state.draws.reshape(x.shape))
        jax.block_until_ready(distance)
        between = time.perf_counter()
        mean, cov = self._summarise(x)
        training = self._restart(state)
        training = training._replace(
            denoiser=training.denoiser.summarise(mean, cov),
            averaged=training.averaged.summarise(mean, cov),
        )
        # Of the network that has not yet been trained on these draws, which would flatter it.
        current = self._choose(state.training).summarise(mean, cov)
        current = measure_error(key_measure, current, x, batch_size=self.batch_size)
        training, losses = train(
            key_train,
            training,
            x,
            self.optimizer,
            num_steps=self.num_sgd_steps,
            batch_size=self.batch_size,
            noise=self.noise,
            ema_decay=self.ema_decay,
        )
        jax.block_until_ready(losses)
        stats = {name: jnp.mean(value) for name, value in draws.stats.items()}
        metrics = EMMetrics(
            loss=losses.mean(),
            sliced_wasserstein=distance,
            e_step_seconds=jnp.asarray(between - started),
            m_step_seconds=jnp.asarray(time.perf_counter() - between),
            heldout_log_evidence=jnp.asarray(jnp.nan),
            heldout_standard_error=jnp.asarray(jnp.nan),
            **stats,
        )
        denoiser = replace(self._choose(training), error_ratios=current.error_ratios)
        prior = _with_denoiser(state.prior, denoiser)
        count = state.num_iterations + 1
        return EMState(prior, training, state.initial, draws.x, rng_key, count), metrics

    def run(
        self,
        rng_key: jax.Array,
        num_iterations: int,
        prior: DiffusionPrior,
        *args: Any,
        progress_bar: bool = True,
        callback: Callable[[EMState, EMMetrics], bool | None] | None = None,
        init_state: EMState | None = None,
        heldout: tuple[Any, ...] | Mapping[str, Any] | None = None,
        patience: int | None = None,
        **kwargs: Any,
    ) -> EMResult:
        """Make iterations from the start or from a state.

        Args:
            rng_key: A random key, of a start and of the held-out log-evidence.
            num_iterations: The number of iterations.
            prior: The prior to start from.
            *args: The model's arguments after the prior.
            progress_bar: Whether to show a progress bar.
            callback: A function of state and metrics, called after every iteration; where it
                returns True, the run ends.
            init_state: A state to go on from, in place of ``prior``.
            heldout: The model's arguments for events that were kept out: a tuple of all of those
                after the prior, or a dict of the keyword arguments that differ. After every
                iteration `log_evidence` judges the prior on them, with the same random numbers.
            patience: End the run when so many iterations in a row have not raised the held-out
                log-evidence.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: See `init`; if there are no iterations to make; or if there is patience
                but nothing held out.
        """
        if num_iterations < 1:
            raise ValueError(f"EM.run: expected num_iterations >= 1, got {num_iterations}.")
        if heldout is None and patience is not None:
            raise ValueError(
                f"EM.run: patience={patience} needs `heldout`, the model's arguments for "
                "observations that EM does not learn from."
            )
        state = self.init(rng_key, prior, *args, **kwargs) if init_state is None else init_state
        # `init` has split the key in two.
        key_heldout = jax.random.fold_in(rng_key, 2)
        best, best_evidence, waited, history = state.prior, -jnp.inf, 0, []
        with trange(num_iterations, disable=not progress_bar, desc="EM") as iterations:
            for _ in iterations:
                state, metrics = self.update(state, *args, **kwargs)
                if heldout is not None:
                    metrics = self._judge(key_heldout, state, metrics, heldout, args, kwargs)
                history.append(metrics)
                evidence = float(metrics.heldout_log_evidence)
                if heldout is None or evidence > best_evidence:
                    best, best_evidence, waited = state.prior, evidence, 0
                else:
                    waited += 1
                iterations.set_postfix(loss=f"{metrics.loss:.3f}", ess=f"{metrics.ess:.1f}")
                if callback is not None and callback(state, metrics):
                    break
                if patience is not None and waited >= patience:
                    break
        columns = (jnp.stack(column) for column in zip(*history, strict=True))
        return EMResult(state.prior, state, EMMetrics(*columns), best)

    def _judge(
        self,
        rng_key: jax.Array,
        state: EMState,
        metrics: EMMetrics,
        heldout: tuple[Any, ...] | Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> EMMetrics:
        """Fill in the log-evidence of the held-out events."""
        if isinstance(heldout, Mapping):
            kwargs = kwargs | dict(heldout)
        else:
            args = heldout
        evidence = log_evidence(
            rng_key,
            self.model,
            state.prior,
            *args,
            num_particles=max(_NUM_HELDOUT_PARTICLES, self.num_particles),
            sampler=self.sampler,
            max_batch_size=self.batch_size,
            **kwargs,
        )
        return metrics._replace(
            heldout_log_evidence=evidence.total,
            heldout_standard_error=evidence.total_standard_error,
        )

    def _draw(
        self,
        rng_key: jax.Array,
        prior: DiffusionPrior,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        guidance: Guidance | None,
        num_draws: int,
    ) -> Draws:
        return sample_blocks(
            rng_key,
            self.model,
            (prior, *args),
            kwargs,
            resolve_settings(prior, self.num_particles, self.sampler, guidance),
            num_draws=num_draws,
            batch_size=self.batch_size,
        )

    def _summarise(self, x: jax.Array) -> tuple[jax.Array, Covariance]:
        mean, cov = _empirical_gaussian(x.reshape(len(x), -1), self.rank)
        return mean.reshape(x.shape[1:]), cov

    def _choose(self, training: TrainState) -> NetworkDenoiser:
        """Return the denoiser to draw with."""
        return training.averaged if self.use_average else training.denoiser

    def _restart(self, state: EMState) -> TrainState:
        """Return where the M-step starts."""
        if not self.warm_start:
            return init_training(state.initial, self.optimizer)
        if self.reset_optimizer:
            opt_state = self.optimizer.init(state.training.denoiser.net)
            return state.training._replace(opt_state=opt_state)
        return state.training

    def _fit_in_closed_form(
        self,
        latent: LatentSite,
        prior: DiffusionPrior,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[jax.Array, Covariance]:
        def read_block(index: jax.Array) -> Any:
            bound = bind(self.model, (prior, *args), kwargs, indices={latent.plates[0]: index})
            return read_likelihood(bound, read_latent(bound))

        fit = fit_gaussian(
            read_block,
            latent.plate_sizes[0],
            event_shape=prior.event_shape,
            batch_size=self.batch_size,
            num_iterations=self.num_gaussian_iterations,
            rank=self.rank,
            dtype=prior.denoiser.dtype,
        )
        return fit.mean, fit.cov

    def _fit_by_sampling(
        self,
        rng_key: jax.Array,
        prior: DiffusionPrior,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[jax.Array, Covariance]:
        """Refit a Gaussian to its own posterior draws, from the prior's own on."""
        mean, cov = prior.denoiser.mean, prior.denoiser.cov
        guidance = MMPS(GaussianCovariance())
        for key in jax.random.split(rng_key, self.num_gaussian_iterations):
            gaussian = _with_denoiser(prior, GaussianDenoiser(mean, cov))
            x = self._draw(key, gaussian, args, kwargs, guidance, 1).x
            mean, cov = self._summarise(x.reshape(-1, *prior.event_shape))
        return mean, cov


_NUM_HELDOUT_PARTICLES = 16

_empirical_gaussian = jax.jit(lambda x, rank: empirical_gaussian(x, rank=rank), static_argnums=1)
_distance = jax.jit(sliced_wasserstein)


def _with_denoiser(prior: DiffusionPrior, denoiser: Any) -> DiffusionPrior:
    """Return the prior with another denoiser, and its sampler and limits as they are."""
    return DiffusionPrior(
        denoiser,
        sampler=prior.sampler,
        num_probes=prior.num_probes,
        max_batch_size=prior.max_batch_size,
    )


def _full_batch_shape(latent: LatentSite) -> tuple[int, ...]:
    """Return the batch shape with whole plates, whatever the model subsamples."""
    shape = list(latent.batch_shape)
    for size, dim in zip(latent.plate_sizes, latent.plate_dims, strict=True):
        shape[dim] = size
    return tuple(shape)
