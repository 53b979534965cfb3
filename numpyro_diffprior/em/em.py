r"""Empirical Bayes: learn a diffusion prior from incomplete, noisy observations alone.

Expectation maximisation on the observations' marginal likelihood (DiEM). The E-step draws events
from their posteriors under the current prior; the M-step fits the denoiser to the draws. The
first prior is the Gaussian of greatest marginal likelihood, in closed form where the model is
linear and Gaussian; an untrained `NetworkDenoiser` is exactly that Gaussian.

A model may have several priors, passed as a dict: of a sum of sources, say. All sites are drawn
together, and each prior learns from the draws of its sites; priors without a network stay as they
are. Sites of ``numpyro.param`` (a noise level, a gain) are learned beside the priors: the M-step
raises the observed sites' expected log-density over them too.

Draws are renewed often and the network takes few steps between: long M-steps on fixed draws
over-sharpen the prior. Particles correct the draws (`numpyro_diffprior.infer.posterior`); with one
particle, an E-step is the paper's. The log-evidence of observations that were kept out tells which
iteration to keep, without looking at the truth.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import trange

from numpyro_diffprior._compile.arguments import replicate_arguments
from numpyro_diffprior._compile.devices import check_batch_size
from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion.noise import LogNormal, NoiseDistribution
from numpyro_diffprior.diffusion.samplers import MultistepSDE, Sampler
from numpyro_diffprior.diffusion.training import TrainState, init_training, measure_error, train
from numpyro_diffprior.em.gaussian import fit_gaussian
from numpyro_diffprior.em.params import fit_params, init_params, with_params
from numpyro_diffprior.em.sites import (
    Sites,
    all_of,
    map_over,
    map_priors,
    map_trained,
    mend_draws,
    one_of,
    pool,
    read_sites,
)
from numpyro_diffprior.em.state import EMMetrics, EMResult, EMState
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import PosteriorSamples, sample_blocks
from numpyro_diffprior.infer.evidence import LogEvidence, log_evidence
from numpyro_diffprior.infer.posterior import read_whole_plates, resolve_settings
from numpyro_diffprior.linalg.covariances import Covariance
from numpyro_diffprior.linalg.empirical import empirical_gaussian
from numpyro_diffprior.metrics.transport import sliced_wasserstein
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.latent import LatentSite, read_latent
from numpyro_diffprior.reading.likelihood import read_likelihood
from numpyro_diffprior.reading.tracing import Model, bind, bind_whole_plates

__all__ = ["EM"]


class EM:
    """Fit the diffusion prior of a model to the model's observations.

    The interface is that of `numpyro.infer.SVI`: `init`, `update`, `run`. The model takes the
    prior (or a dict of priors) as its first argument and has the prior's site in a plate; what
    belongs to the plate's elements it passes through `numpyro.subsample`.

    Args:
        model: A NumPyro model.
        optimizer: Any optax optimiser for the network.
        num_sgd_steps: The number of optimiser steps between E-steps.
        batch_size: The number of events of a minibatch, and of a block of the E-step.
        num_particles: Particles per draw of the E-step.
        num_draws: Draws per event of the E-step.
        sampler: The E-step's sampler (default: the prior's).
        guidance: The E-step's guidance (default: `MMPS` with the Gaussian covariance of the
            current draws, guided by the network; with Tweedie's covariance for one particle).
        noise: The training distribution of noise levels.
        ema_decay: The decay of the average of the weights.
        use_average: Whether E-steps (and the result) use averaged weights.
        warm_start: Whether an M-step starts from the last one's weights.
        reset_optimizer: Whether an M-step starts with a new state of the optimiser.
        num_gaussian_iterations: The number of iterations of the first, Gaussian fit.
        rank: The rank of Gaussian covariances of large events.
        params_optimizer: The optimiser of ``numpyro.param`` sites, where they are not constrained.
        num_params_steps: Its steps at each iteration, on minibatches of ``batch_size`` events.
        mesh: Devices to spread E-steps and minibatches over (`jax.make_mesh`), of whose number
            ``batch_size`` is a multiple; see `sample_posterior`.

    Raises:
        ValueError: If ``optimizer`` is not optax's, or ``batch_size`` no multiple of the number of
            devices.
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
        params_optimizer: optax.GradientTransformation = optax.adam(0.03),
        num_params_steps: int = 32,
        mesh: Mesh | None = None,
    ) -> None:
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(f"EM: expected an optimiser of optax, got {optimizer!r}.")
        check_batch_size(batch_size, mesh)
        if guidance is None and num_particles > 1:
            # Not looking ahead: where the prior is a curve, its Jacobian is far from a Gaussian's.
            guidance = MMPS(GaussianCovariance())
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
        self.params_optimizer = params_optimizer
        self.num_params_steps = num_params_steps
        self.mesh = mesh
        self._model = with_params(model)

    def init(self, rng_key: jax.Array, prior: Any, *args: Any, **kwargs: Any) -> EMState:
        """Fit the first, Gaussian prior.

        Args:
            rng_key: A random key.
            prior: A prior whose denoiser is a `NetworkDenoiser`, trained or not: its network is
                the start, its Gaussian is fitted anew. Or several priors in a dict, of which one
                at least has a network.
            *args: The model's arguments after the prior.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If no prior has a network, its site is not in a plate, the model cannot be
                read, or one with a network governs no site or is in the dict twice.
        """
        if not all(isinstance(p, DiffusionPrior) for p in all_of(prior)):
            found = ", ".join(type(p).__name__ for p in all_of(prior))
            raise ValueError(f"EM: expected a DiffusionPrior, or a dict of them, got {found}.")
        if not any(isinstance(p.denoiser, NetworkDenoiser) for p in all_of(prior)):
            found = " and ".join(sorted({type(p.denoiser).__name__ for p in all_of(prior)}))
            raise ValueError(
                f"EM: expected a prior with a NetworkDenoiser to train, got {found}; analytic "
                "priors have nothing to learn."
            )
        args, kwargs = replicate_arguments((args, kwargs), self.mesh)
        resolve_settings(all_of(prior)[0], self.num_particles, self.sampler, self.guidance)
        bound = bind(self.model, (prior, *args), kwargs)
        params, params_opt_state = init_params(bound, self.params_optimizer)
        arguments = (((prior, params), *args), kwargs)
        latent, likelihood = read_whole_plates(self._model, *arguments)
        if not (latent.plates or latent.joined):
            raise ValueError(
                f"EM: latent site '{latent.names[0]}' is not in a plate; a prior is learned from "
                "many events, so put the site and its observations in a `numpyro.plate`."
            )
        sites = read_sites(prior, latent)
        rng_key, key_fit = jax.random.split(rng_key)
        # The fit takes its blocks from one plate.
        if likelihood.linear and len(latent.names) == 1 and len(latent.plates) == 1:
            gaussian = self._fit_in_closed_form(latent, *arguments)
            fitted = map_priors(lambda *_: gaussian, prior)
        else:
            fitted = self._fit_by_sampling(key_fit, prior, params, sites, args, kwargs)

        def fit(prior: DiffusionPrior, key: str | None) -> DiffusionPrior:
            if not isinstance(prior.denoiser, NetworkDenoiser):
                return prior
            gaussian = one_of(fitted, key)
            denoiser = prior.denoiser.fit_gaussian(gaussian.mean, gaussian.cov)
            return prior.replace_denoiser(denoiser)

        prior = map_priors(fit, prior)
        initial = map_trained(lambda p, _: p.denoiser, prior)
        empty = jnp.zeros((self.num_draws, *latent.shape), latent.prior.denoiser.dtype)
        return EMState(
            prior,
            map_over(lambda denoiser: init_training(denoiser, self.optimizer), initial),
            initial,
            params,
            params_opt_state,
            jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), latent.values(empty)),
            rng_key,
            0,
            sites,
        )

    def update(self, state: EMState, *args: Any, **kwargs: Any) -> tuple[EMState, EMMetrics]:
        """Make one iteration: an E-step, then an M-step on its draws.

        An event whose draw is not finite keeps its last one (in the first iteration, the prior's
        mean), and a warning says how many there were.

        Args:
            state: The state, from `init` or from this function.
            *args: The model's arguments after the prior.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If no draw of a site is finite.
        """
        args, kwargs = replicate_arguments((args, kwargs), self.mesh)
        rng_key, *keys = jax.random.split(state.rng_key, 6)
        key_draw, key_compare, key_measure, key_train, key_params = keys
        started = time.perf_counter()
        arguments = (((state.prior, state.params), *args), kwargs)
        draws = self._draw(key_draw, *arguments, self.sampler, self.guidance, self.num_draws)
        samples, num_failed = mend_draws(draws.samples, state.draws, state.prior, state.sites)
        if num_failed:
            warnings.warn(
                f"EM: {num_failed} draws of iteration {state.num_iterations + 1} are not finite, "
                "their events keep the last ones; more steps of the sampler, or another guidance, "
                "may help.",
                stacklevel=2,
            )
        distances = []
        for site, key in state.sites.keys:
            shape = (-1, *one_of(state.prior, key).event_shape)
            x, previous = (values[site].reshape(shape) for values in (samples, state.draws))
            distances.append(_distance(key_compare, x, previous))
        distance = jax.block_until_ready(jnp.stack(distances).mean())
        between = time.perf_counter()
        contexts = self._read_contexts(samples, *arguments)
        names = sorted(state.prior) if isinstance(state.prior, Mapping) else [None]

        def fit(prior: DiffusionPrior, key: str | None) -> _Trained:
            shape = prior.denoiser.context_shape
            return self._train(
                jax.random.fold_in(key_train, names.index(key)),
                jax.random.fold_in(key_measure, names.index(key)),
                one_of(state.training, key),
                one_of(state.initial, key),
                pool(samples, state.sites, key, prior.event_shape),
                None if shape is None else pool(contexts, state.sites, key, shape),
            )

        trained = map_trained(fit, state.prior)
        params, params_opt_state = state.params, state.params_opt_state
        if params:
            params, params_opt_state = fit_params(
                key_params,
                self._model,
                *arguments,
                samples,
                self.params_optimizer,
                params_opt_state,
                num_steps=self.num_params_steps,
                batch_size=self.batch_size,
            )

        def renew(prior: DiffusionPrior, key: str | None) -> DiffusionPrior:
            if not isinstance(prior.denoiser, NetworkDenoiser):
                return prior
            return prior.replace_denoiser(one_of(trained, key).denoiser)

        losses = [fit.losses.mean() for fit in all_of(trained)]
        jax.block_until_ready(losses)
        stats = {name: jnp.nanmean(x) for name, x in draws.stats.items() if name != "ess_path"}
        metrics = EMMetrics(
            loss=jnp.stack(losses).mean(),
            sliced_wasserstein=distance,
            e_step_seconds=jnp.asarray(between - started),
            m_step_seconds=jnp.asarray(time.perf_counter() - between),
            heldout_log_evidence=jnp.asarray(jnp.nan),
            heldout_standard_error=jnp.asarray(jnp.nan),
            num_failed=jnp.asarray(num_failed),
            **stats,
        )
        state = EMState(
            map_priors(renew, state.prior),
            map_over(lambda fit: fit.training, trained),
            state.initial,
            params,
            params_opt_state,
            samples,
            rng_key,
            state.num_iterations + 1,
            state.sites,
        )
        return state, metrics

    def _train(
        self,
        rng_key: jax.Array,
        key_measure: jax.Array,
        training: TrainState,
        initial: NetworkDenoiser,
        x: jax.Array,
        context: jax.Array | None,
    ) -> "_Trained":
        """Fit one prior to events and their contexts."""
        mean, cov = self._summarise(x)
        restarted = self._restart(training, initial)
        restarted = restarted._replace(
            denoiser=restarted.denoiser.summarise(mean, cov),
            averaged=restarted.averaged.summarise(mean, cov),
        )
        # Of the network that has not yet been trained on these draws, which would flatter it.
        current = self._choose(training).summarise(mean, cov)
        current = measure_error(
            key_measure, current, x, context=context, batch_size=self.batch_size
        )
        training, losses = train(
            rng_key,
            restarted,
            x,
            self.optimizer,
            num_steps=self.num_sgd_steps,
            batch_size=self.batch_size,
            context=context,
            noise=self.noise,
            ema_decay=self.ema_decay,
            mesh=self.mesh,
        )
        denoiser = replace(self._choose(training), error_ratios=current.error_ratios)
        return _Trained(denoiser, training, losses)

    def run(
        self,
        rng_key: jax.Array,
        num_iterations: int,
        prior: Any,
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
            prior: The prior to start from, or several in a dict.
            *args: The model's arguments after the prior.
            progress_bar: Whether to show a progress bar.
            callback: A function of state and metrics, called after every iteration; where it
                returns True, the run ends.
            init_state: A state to go on from, in place of ``prior``.
            heldout: The model's arguments for events that were kept out: a tuple of all of those
                after the prior, or a dict of the keyword arguments that differ. After every
                iteration `log_evidence` judges the prior on them, with the same random numbers
                and at least 16 particles, which need a stochastic sampler. A state to go on from
                is judged as well.
            patience: End the run when so many iterations in a row have not raised the held-out
                log-evidence.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: See `init`; if there are no iterations to make; if there is patience but
                nothing held out; or if events are held out, but the sampler is deterministic.
        """
        if num_iterations < 1:
            raise ValueError(f"EM.run: expected num_iterations >= 1, got {num_iterations}.")
        if heldout is None and patience is not None:
            raise ValueError(
                f"EM.run: patience={patience} needs `heldout`, the model's arguments for "
                "observations that EM does not learn from."
            )
        if heldout is not None:
            if not isinstance(heldout, tuple | Mapping):
                raise ValueError(
                    "EM.run: expected `heldout` to be a tuple of the model's arguments after the "
                    f"prior, or a dict of keyword arguments, got {type(heldout).__name__}."
                )
            # Here, not after the first iteration.
            first = all_of(prior if init_state is None else init_state.prior)[0]
            resolve_settings(first, self._num_heldout_particles, self.sampler)
        state = self.init(rng_key, prior, *args, **kwargs) if init_state is None else init_state
        # `init` has split the key in two.
        key_heldout = jax.random.fold_in(rng_key, 2)
        best, best_evidence, waited, history = state, -math.inf, 0, []
        if heldout is not None and init_state is not None:
            judged = self._judge(key_heldout, state, heldout, args, kwargs)
            # In this order, in which NaN is the smaller.
            best_evidence = max(best_evidence, float(judged.total))
        with trange(num_iterations, disable=not progress_bar, desc="EM") as iterations:
            for _ in iterations:
                state, metrics = self.update(state, *args, **kwargs)
                if heldout is not None:
                    judged = self._judge(key_heldout, state, heldout, args, kwargs)
                    metrics = metrics._replace(
                        heldout_log_evidence=judged.total,
                        heldout_standard_error=judged.total_standard_error,
                    )
                history.append(metrics)
                evidence = float(metrics.heldout_log_evidence)
                if heldout is None or evidence > best_evidence:
                    best, best_evidence, waited = state, evidence, 0
                else:
                    waited += 1
                iterations.set_postfix(loss=f"{metrics.loss:.3f}", ess=f"{metrics.ess:.1f}")
                if callback is not None and callback(state, metrics):
                    break
                if patience is not None and waited >= patience:
                    break
        columns = (jnp.stack(column) for column in zip(*history, strict=True))
        metrics = EMMetrics(*columns)
        return EMResult(state.prior, state, metrics, best.prior, state.params, best.params)

    def _judge(
        self,
        rng_key: jax.Array,
        state: EMState,
        heldout: tuple[Any, ...] | Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> LogEvidence:
        """Return the log-evidence of the held-out events."""
        if isinstance(heldout, Mapping):
            kwargs = kwargs | dict(heldout)
        else:
            args = heldout
        prior: Any = state.prior, state.params
        return log_evidence(
            rng_key,
            self._model,
            prior,
            *args,
            num_particles=self._num_heldout_particles,
            sampler=self.sampler,
            max_batch_size=self.batch_size,
            mesh=self.mesh,
            **kwargs,
        )

    @property
    def _num_heldout_particles(self) -> int:
        return max(_NUM_HELDOUT_PARTICLES, self.num_particles)

    def _draw(
        self,
        rng_key: jax.Array,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sampler: Sampler | None,
        guidance: Guidance | None,
        num_draws: int,
    ) -> PosteriorSamples:
        (prior, _), *_ = args
        return sample_blocks(
            rng_key,
            self._model,
            args,
            kwargs,
            resolve_settings(all_of(prior)[0], self.num_particles, sampler, guidance),
            num_draws=num_draws,
            batch_size=self.batch_size,
            mesh=self.mesh,
        )

    def _read_contexts(
        self, draws: dict[str, jax.Array], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the contexts of draws by site (None where the prior has none)."""
        (prior, _), *_ = args
        if all(p.denoiser.context_shape is None for p in all_of(prior)):
            return {}
        latent = read_latent(bind_whole_plates(self._model, args, kwargs))
        return {
            site: part.denoiser.contexts(draws[site].shape[: draws[site].ndim - part.event_dim])
            for site, part in zip(latent.names, latent.parts, strict=True)
        }

    def _summarise(self, x: jax.Array) -> tuple[jax.Array, Covariance]:
        mean, cov = _empirical_gaussian(x.reshape(len(x), -1), self.rank)
        return mean.reshape(x.shape[1:]), cov

    def _choose(self, training: TrainState) -> NetworkDenoiser:
        """Return the denoiser to draw with."""
        return training.averaged if self.use_average else training.denoiser

    def _restart(self, training: TrainState, initial: NetworkDenoiser) -> TrainState:
        """Return where the M-step starts."""
        if not self.warm_start:
            return init_training(initial, self.optimizer)
        if self.reset_optimizer:
            fresh = init_training(training.denoiser, self.optimizer)
            return training._replace(opt_state=fresh.opt_state)
        return training

    def _fit_in_closed_form(
        self, latent: LatentSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> GaussianDenoiser:
        def read_block(index: jax.Array) -> Any:
            indices = {latent.plates[0]: index}
            bound = bind_whole_plates(self._model, args, kwargs, indices=indices)
            return read_likelihood(bound, read_latent(bound))

        fit = fit_gaussian(
            read_block,
            latent.plate_sizes[0],
            event_shape=latent.prior.event_shape,
            batch_size=self.batch_size,
            num_iterations=self.num_gaussian_iterations,
            rank=self.rank,
            dtype=latent.prior.denoiser.dtype,
        )
        return GaussianDenoiser(fit.mean, fit.cov)

    def _fit_by_sampling(
        self,
        rng_key: jax.Array,
        prior: Any,
        params: dict[str, jax.Array],
        sites: Sites,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Refit Gaussians to their own posterior draws, from the priors' own on; denoisers."""

        def gaussian(prior: DiffusionPrior, mean: jax.Array, cov: Covariance) -> DiffusionPrior:
            net = _Nothing(prior.event_shape, prior.denoiser.context_shape)
            return prior.replace_denoiser(NetworkDenoiser(net, mean, cov))

        def start(prior: DiffusionPrior, _: str | None) -> DiffusionPrior:
            if not isinstance(prior.denoiser, NetworkDenoiser):
                return prior
            return gaussian(prior, prior.denoiser.mean, prior.denoiser.cov)

        def refit(
            draws: dict[str, jax.Array], prior: DiffusionPrior, key: str | None
        ) -> DiffusionPrior:
            if not isinstance(prior.denoiser, NetworkDenoiser):
                return prior
            return gaussian(prior, *self._summarise(pool(draws, sites, key, prior.event_shape)))

        # Of second order: a sampler that shrinks its draws would do so at every refit.
        sampler = MultistepSDE((self.sampler or all_of(prior)[0].sampler).num_steps)
        guidance = MMPS(GaussianCovariance())
        prior = map_priors(start, prior)
        for key in jax.random.split(rng_key, self.num_gaussian_iterations):
            arguments = (((prior, params), *args), kwargs)
            draws = self._draw(key, *arguments, sampler, guidance, 1).samples
            draws, _ = mend_draws(draws, {}, prior, sites)
            prior = map_priors(partial(refit, draws), prior)
        return map_priors(lambda p, _: p.denoiser, prior)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Nothing:
    """A network that leaves a denoiser its Gaussian, in every context."""

    event_shape: tuple[int, ...]
    context_shape: tuple[int, ...] | None

    def __call__(
        self,
        x: jax.Array,
        noise: jax.Array,
        context: jax.Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        return jnp.zeros_like(x)


class _Trained(NamedTuple):
    """What an M-step gives of one prior."""

    denoiser: NetworkDenoiser
    training: TrainState
    losses: jax.Array


_NUM_HELDOUT_PARTICLES = 16
_MAX_NUM_COMPARED = 32_768

_empirical_gaussian = jax.jit(lambda x, rank: empirical_gaussian(x, rank=rank), static_argnums=1)


@jax.jit
def _distance(rng_key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    # All projections are in memory at once.
    x, y = (events[:: -(-len(events) // _MAX_NUM_COMPARED)] for events in (x, y))
    return sliced_wasserstein(rng_key, x, y)
