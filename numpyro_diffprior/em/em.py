r"""Empirical Bayes: learn a diffusion prior from incomplete, noisy observations alone.

Expectation maximization on the observations' marginal likelihood (DiEM). The E-step draws events
from their posteriors under the current prior; the M-step fits the denoiser to the draws. The
first prior is the Gaussian of greatest marginal likelihood, in closed form where the model is
linear and Gaussian; an untrained `NetworkDenoiser` is exactly that Gaussian.

A model may have several priors, passed as a dict: of a sum of sources, say. Sites that
observations connect are drawn together, and each prior learns from the draws of its sites; priors
without a network stay as they are. Sites of ``numpyro.param`` (a noise level, a gain) are learned
jointly with the priors: the M-step increases the observed sites' expected log-density.

Draws are renewed often, with few training steps in between: long M-steps on fixed draws
over-sharpen the prior. Particles correct the draws (`numpyro_diffprior.particles`); with one
particle, an E-step is the paper's. The log-evidence of held-out observations selects an iteration
without knowledge of the true events.

References:
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
    NeurIPS 2024, arXiv 2405.13712.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.devices import check_batch_size, own_array
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion.training import init_training
from numpyro_diffprior.em.checkpoints import Checkpoints
from numpyro_diffprior.em.conditions import (
    describe,
    describe_arrays,
    describe_augment,
    describe_model,
    describe_optimizers,
)
from numpyro_diffprior.em.draws import (
    DrawFiles,
    are_all_finite,
    compare_draws,
    no_draws,
    put_draws,
    replace_non_finite,
    take_draws,
)
from numpyro_diffprior.em.e_step import EStep, draw_events
from numpyro_diffprior.em.initial import (
    Gaussian,
    GaussianStart,
    blank_gaussian,
    choose_units,
    fit_by_sampling,
    fit_in_closed_form,
    has_closed_form,
)
from numpyro_diffprior.em.m_step import MStep, fit_priors
from numpyro_diffprior.em.params import fit_params, init_params
from numpyro_diffprior.em.power import fit_stationary, has_power
from numpyro_diffprior.em.sites import (
    Priors,
    Sites,
    as_dict,
    read_contexts,
    read_sites,
    with_network,
)
from numpyro_diffprior.em.state import Best, EMMetrics, EMResult, EMState, Progress
from numpyro_diffprior.em.watch import Watch
from numpyro_diffprior.infer.evidence import LogEvidence, estimate_evidence
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.checks import check_data
from numpyro_diffprior.reading.model import BoundModel
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import Model, check_names

__all__ = ["EM"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class EM:
    """Fit the diffusion prior of a model to the model's observations.

    The interface is that of `numpyro.infer.SVI`: `init`, `update`, `run`. The model takes the
    prior (or a dict of priors) as its first argument and has the prior's site in a plate. It
    passes arrays with an axis for the plate through `numpyro.subsample`.

    Args:
        model: A NumPyro model.
        optimizer: An optimizer of optax, for the networks.
        e_step: How events are drawn.
        m_step: How networks (and ``numpyro.param`` sites) are trained.
        start: How the first, Gaussian prior is fitted.
        mesh: Devices to spread E-steps and minibatches over (`jax.make_mesh`); the batch size of
            the M-step must be a multiple of their number. See `sample_posterior`.

    Raises:
        ValueError: If ``optimizer`` is not optax's, or a batch size is not a multiple of the
            number of devices.

    Example:
        >>> em = EM(model, optax.adam(1e-3), e_step=EStep(num_particles=8))  # doctest: +SKIP
        >>> result = em.run(jax.random.key(0), 32, prior, mask, y)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        optimizer: optax.GradientTransformation,
        *,
        e_step: EStep = EStep(),
        m_step: MStep = MStep(),
        start: GaussianStart = GaussianStart(),
        mesh: Mesh | None = None,
    ) -> None:
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(f"EM: expected an optimizer of optax, got {optimizer!r}.")
        for name, value, kind in (
            ("e_step", e_step, EStep),
            ("m_step", m_step, MStep),
            ("start", start, GaussianStart),
        ):
            if not isinstance(value, kind):
                raise ValueError(f"EM: expected {name} of type {kind.__name__}, got {value!r}.")
        check_batch_size(m_step.batch_size, mesh)
        self.model = model
        self.optimizer = optimizer
        self.e_step = e_step
        self.m_step = m_step
        self.start = start
        self.mesh = mesh

    def init(self, rng_key: jax.Array, prior: Any, *args: Any, **kwargs: Any) -> EMState:
        """Fit the first, Gaussian prior.

        Args:
            rng_key: A random key.
            prior: A prior whose denoiser is a `NetworkDenoiser`, trained or not: training starts
                from its network, and its Gaussian is fitted anew. Or a dict of priors, at least
                one of which has a network.
            *args: The model's arguments after the prior.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If no prior has a network, a latent site is not in a plate, the model
                cannot be read, or a prior with a network governs no site or is in the dict twice.
        """
        priors = as_dict(prior)
        bound = self._read(prior, (args, kwargs))
        reading = bound.reading
        self.e_step.options(reading.sampler, self.e_step.particles(reading))  # raises early
        for group in bound.reading.groups:
            if not (group.latents.plates or group.latents.joined_plates):
                raise ValueError(
                    f"EM: latent site '{group.latents.names[0]}' is not in a plate; a prior is "
                    "learned from many events, so put the site and its observations in a "
                    "`numpyro.plate`."
                )
        sites = read_sites(prior, bound.reading)
        denoisers = {name: own.denoiser for name, own in with_network(priors).items()}
        for denoiser in denoisers.values():
            self.start.summary.check(denoiser.event_shape)
        self.m_step.check_augment(denoisers)
        params, params_opt_state = init_params(bound, self.m_step.params.optimizer)
        bound = bound.with_params(params)
        priors = choose_units(bound, priors, sites, self.start, self.mesh)
        bound = bound.with_first_argument(sites.as_passed(priors))
        check_data(bound, self.e_step.sampler or bound.reading.sampler, self.mesh)
        rng_key, key_fit = jax.random.split(rng_key)
        if has_closed_form(bound, self.start):
            gaussians = {
                key: fit_in_closed_form(bound, self.start, self.mesh)
                for key in with_network(priors)
            }
        else:
            fit = fit_stationary if has_power(bound, self.start) else fit_by_sampling
            given = (self.model, (args, kwargs), priors, sites, self.start)
            gaussians = fit(key_fit, *given, self.e_step, params, self.mesh)
        return self._first_state(
            rng_key, priors, gaussians, params, params_opt_state, bound, sites
        )

    def update(self, state: EMState, *args: Any, **kwargs: Any) -> tuple[EMState, EMMetrics]:
        """Make one iteration: an E-step, then an M-step on its draws.

        An event whose draw is not finite keeps its previous one (in the first iteration, the
        prior's mean), and a warning gives their number. If the training meets a loss, gradient or
        weight that is not finite, the previous weights are kept and `EMMetrics.diverged` is True.

        Args:
            state: The state, from `init` or from this function.
            *args: The model's arguments after the prior.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If no draw of a site is finite.
        """
        return self._iterate(state, (args, kwargs), Watch())

    def _iterate(
        self, state: EMState, arguments: Arguments, watch: Watch
    ) -> tuple[EMState, EMMetrics]:
        """Make one iteration, see `update`."""
        rng_key, *keys = jax.random.split(state.rng_key, 5)
        key_draw, key_compare, key_train, key_params = keys
        started = time.perf_counter()
        bound = self._read(state.prior, arguments, state.params)
        watch.enter("E-step")
        chosen = self.e_step.choose(bound, state.num_iterations)
        files = None
        if self.e_step.folder is not None:
            files = DrawFiles(self.e_step.folder, state.num_iterations + 1)
        draws = draw_events(key_draw, bound, self.e_step, self.mesh, watch, chosen, files)
        # A state may come from a run whose draws were elsewhere.
        to = np.asanyarray if self.e_step.on_host else jnp.asarray
        held: dict[str, Any] = {site: to(x) for site, x in state.draws.items()}
        previous = take_draws(held, bound, chosen)
        samples, num_failed = replace_non_finite(
            draws.samples, previous, state.priors, state.sites
        )
        if num_failed:
            warnings.warn(
                f"EM: {num_failed} draws of iteration {state.num_iterations + 1} are not finite; "
                "their events keep the previous ones. Try more steps of the sampler, or another "
                "guidance.",
                stacklevel=3,
            )
        distance = jax.block_until_ready(
            compare_draws(key_compare, samples, previous, state.priors, state.sites)
        )
        samples = put_draws(held, samples, bound, chosen, files)
        if files is not None:
            files.keep(samples)
        between = time.perf_counter()
        watch.enter("M-step")
        trained = fit_priors(
            key_train,
            state,
            samples,
            read_contexts(bound, self.e_step.num_draws),
            self.optimizer,
            self.m_step,
            summary=self.start.summary,
            mesh=self.mesh,
            on_steps=watch.steps_of(self.m_step.num_steps),
        )
        params, params_opt_state = state.params, state.params_opt_state
        if params and all(are_all_finite(x) for x in samples.values()):
            batch = self._read(state.prior, arguments, params, batch_size=self.m_step.batch_size)
            params, params_opt_state = fit_params(
                key_params,
                batch,
                samples,
                self.m_step.params.optimizer,
                params_opt_state,
                num_steps=self.m_step.params.num_steps,
                mesh=self.mesh,
            )
        losses = jnp.stack([fit.losses.mean() for fit in trained.values()])
        diverged = bool(~jnp.isfinite(losses).all())
        stats = {name: jnp.nanmean(x) for name, x in draws.stats.items() if name != "ess_path"}
        metrics = EMMetrics(
            loss=losses.mean(),
            sliced_wasserstein=distance,
            e_step_seconds=jnp.asarray(between - started),
            m_step_seconds=jnp.asarray(time.perf_counter() - between),
            heldout_log_evidence=jnp.asarray(jnp.nan),
            heldout_standard_error=jnp.asarray(jnp.nan),
            num_failed=jnp.asarray(num_failed),
            diverged=jnp.asarray(diverged),
            **stats,
        )
        priors = dict(state.priors)
        for key, fit in trained.items():
            priors[key] = priors[key].replace_denoiser(fit.denoiser)
        state = state._replace(
            priors=priors,
            training={key: fit.training for key, fit in trained.items()},
            params=params,
            params_opt_state=params_opt_state,
            draws=samples,
            rng_key=rng_key,
            num_iterations=state.num_iterations + 1,
        )
        return state, metrics

    def run(
        self,
        rng_key: jax.Array,
        num_iterations: int,
        prior: Any,
        *args: Any,
        progress_bar: bool = True,
        callback: Callable[[EMState, EMMetrics], bool | None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: int = 1,
        init_state: EMState | None = None,
        heldout: tuple[Any, ...] | Mapping[str, Any] | None = None,
        patience: int | None = None,
        **kwargs: Any,
    ) -> EMResult:
        """Run EM iterations from a prior or from a state.

        A run ends early if the training diverges or the user interrupts it, both with a warning;
        the result is that of the iterations so far. Another exception, raised by ``callback`` for
        example, has the last state as its attribute ``em_state``.

        Args:
            rng_key: A random key, for `init` and for the held-out log-evidence.
            num_iterations: The number of iterations.
            prior: The prior to start from, or several in a dict.
            *args: The model's arguments after the prior.
            progress_bar: Whether to show the iterations, and the phase of the current one, in a
                terminal or a notebook.
            callback: A function of state and metrics, called after every iteration; if it returns
                True, the run ends.
            checkpoint: A folder for checkpoints. If it holds one of this run, the run goes on from
                there and ends with the same numbers as if it had never stopped. The last three are
                kept, with the best priors so far. Beside them, ``history.nc`` has the history as
                `EMMetrics.to_dataset` returns it, for ``xarray.load_dataset``.
            save_every: The number of iterations from one checkpoint to the next. The Gaussian
                start and the end of a run have one in any case. The draws of a long E-step are
                saved every five minutes; by several processes, if there is a checkpoint of the
                iteration before.
            init_state: A state to continue from, in place of ``prior``.
            heldout: The model's arguments for held-out events: a tuple of all of those after the
                prior, or a dict of the keyword arguments that differ. After every iteration,
                `log_evidence` evaluates the prior on them, with the same random numbers and at
                least 16 particles, which need a stochastic sampler. ``init_state`` is evaluated
                as well.
            patience: The number of successive iterations without an increase of the held-out
                log-evidence after which the run ends.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: See `init`; if ``num_iterations`` is not positive; if ``patience`` is
                given without ``heldout``; if ``heldout`` is, but the sampler is deterministic; or
                if a checkpoint is damaged, or is that of a run with another model, data, random
                key or settings.
            OSError: If the folder of checkpoints cannot be written to.
        """
        check_names(EM.run, self.model, 1 + len(args), locals())
        self._check_run(num_iterations, prior, init_state, heldout, patience)
        arguments = args, kwargs = jax.tree.map(own_array, (args, kwargs))
        heldout = jax.tree.map(own_array, heldout)
        # `init` splits the key in two; this is a third one.
        key_heldout = jax.random.fold_in(rng_key, 2)
        progress, checkpoints = None, None
        if checkpoint is not None:
            every = check_count("EM.run", "save_every", save_every)
            template, conditions = self._describe(rng_key, prior, arguments, init_state, heldout)
            checkpoints = Checkpoints(checkpoint, every, conditions)
        with Watch(progress_bar, num_iterations, checkpoints) as watch:
            if checkpoints is not None:
                progress = checkpoints.load(template)
            if progress is None:
                state = init_state
                if state is None:
                    watch.enter("Gaussian start")
                    state = self.init(rng_key, prior, *args, **kwargs)
                progress = Progress(state, Best.of(state), [])
            try:
                if heldout is not None and init_state is not None and not progress.history:
                    first = self._evaluate_heldout(key_heldout, init_state, heldout, arguments)
                    # In this order, `max` ignores NaN.
                    progress = progress._replace(
                        best=Best.of(init_state, max(-math.inf, float(first.total)))
                    )
                watch.start(progress)
                while not progress.is_over(num_iterations, patience):
                    progress = self._advance(progress, arguments, key_heldout, heldout, watch)
                    watch.advance(progress)
                    if progress.has_diverged:
                        warnings.warn(
                            f"EM: the training of iteration {progress.state.num_iterations} "
                            "diverged: its loss is not finite. The run ends with the previous "
                            "weights. Try a smaller learning rate, or clip gradients with "
                            "`optax.clip_by_global_norm`.",
                            stacklevel=2,
                        )
                        break
                    if callback is not None and callback(progress.state, progress.history[-1]):
                        break
            except KeyboardInterrupt:
                warnings.warn(
                    f"EM: interrupted in iteration {progress.state.num_iterations + 1}; the "
                    "result is that of the iterations before.",
                    stacklevel=2,
                )
            except Exception as error:
                error.em_state = progress.state  # type: ignore[attr-defined]
                raise
        return progress.result()

    def _advance(
        self,
        progress: Progress,
        arguments: Arguments,
        key_heldout: jax.Array,
        heldout: tuple[Any, ...] | Mapping[str, Any] | None,
        watch: Watch,
    ) -> Progress:
        """Make one iteration of a run, and evaluate its priors on held-out events."""
        state, metrics = self._iterate(progress.state, arguments, watch)
        evidence = None
        if heldout is not None:
            watch.enter("held out")
            found = self._evaluate_heldout(key_heldout, state, heldout, arguments)
            evidence = float(found.total)
            metrics = metrics._replace(
                heldout_log_evidence=found.total,
                heldout_standard_error=found.total_standard_error,
            )
        best = progress.best.after(state, evidence)
        return Progress(state, best, [*progress.history, metrics])

    def load_state(
        self, folder: str | os.PathLike[str], prior: Any, *args: Any, **kwargs: Any
    ) -> EMState:
        """Return the last state in a folder of checkpoints of `run`.

        To go on under other conditions (more particles, another learning rate), pass it as
        ``init_state`` of a run with a folder of its own.

        Args:
            folder: The folder.
            prior: The prior, of the same structure as that of the run, trained or not.
            *args: The model's arguments after the prior.
            **kwargs: The model's keyword arguments.

        Raises:
            FileNotFoundError: If there is no checkpoint in the folder.
            ValueError: If the checkpoint cannot be read, or has another structure.
        """
        progress = None
        if os.path.isdir(os.path.join(folder, "iterations")):
            template, _ = self._describe(jax.random.key(0), prior, (args, kwargs))
            checkpoints = Checkpoints(folder, read_only=True)
            try:
                progress = checkpoints.load(template)
            finally:
                checkpoints.close()
        if progress is None:
            raise FileNotFoundError(f"EM.load_state: there is no checkpoint in '{folder}'.")
        return progress.state

    def _describe(
        self,
        rng_key: jax.Array,
        prior: Any,
        arguments: Arguments,
        init_state: EMState | None = None,
        heldout: tuple[Any, ...] | Mapping[str, Any] | None = None,
    ) -> tuple[EMState, dict[str, Any]]:
        """Describe a run for its checkpoints.

        Returns:
            A state of the structure of the run's, whose values are ignored, and descriptions of
            all that its numbers depend on, by name.
        """
        args, kwargs = arguments
        # Read as on one device, since a run may go on on others.
        size = self.e_step.block_size(None)
        bound = read(self.model, (prior, *args), kwargs, block_size=size)
        template = init_state
        if template is None:
            sites, priors = read_sites(prior, bound.reading), as_dict(prior)
            gaussians = {
                key: blank_gaussian(own.denoiser, self.start.summary)
                for key, own in with_network(priors).items()
            }
            params = init_params(bound, self.m_step.params.optimizer)
            template = self._first_state(rng_key, priors, gaussians, *params, bound, sites)
        samplers = {key: own.sampler for key, own in as_dict(prior).items()}
        conditions = {
            "the random key": describe_arrays(rng_key),
            "the E-step": describe((replace(self.e_step, draws_in="device"), samplers)),
            "the M-step": describe(replace(self.m_step, min_shard_size=None, augment=None)),
            "the start": describe(self.start) if init_state is None else describe_arrays(template),
            "the held-out data": describe_arrays(heldout),
            "the optimizer": describe_optimizers(self.optimizer, template),
            "the augmentation": describe_augment(self.m_step, template),
            **describe_model(bound, self.model, (prior, *args), kwargs),
        }
        return template, conditions

    def _first_state(
        self,
        rng_key: jax.Array,
        priors: Priors,
        gaussians: Mapping[str, Gaussian],
        params: dict[str, jax.Array],
        params_opt_state: optax.OptState,
        model: BoundModel,
        sites: Sites,
    ) -> EMState:
        """Return the state before the first iteration, given the fitted Gaussians."""
        initial = {
            key: cast(NetworkDenoiser, prior.denoiser).with_gaussian(*gaussians[key])
            for key, prior in with_network(priors).items()
        }
        learned = {key: priors[key].replace_denoiser(own) for key, own in initial.items()}
        return EMState(
            priors=priors | learned,
            training={k: init_training(d, self.optimizer) for k, d in initial.items()},
            initial=initial,
            params=params,
            params_opt_state=params_opt_state,
            draws=no_draws(model, self.e_step.num_draws, self.e_step.on_host),
            rng_key=rng_key,
            num_iterations=0,
            sites=sites,
        )

    def _check_run(
        self,
        num_iterations: int,
        prior: Any,
        init_state: EMState | None,
        heldout: Any,
        patience: int | None,
    ) -> None:
        """Check the arguments of `run` before the first Gaussian fit."""
        if isinstance(num_iterations, DiffusionPrior | Mapping):
            raise ValueError(
                "EM.run: expected num_iterations as second argument, got "
                f"{type(num_iterations).__name__}; the order is run(rng_key, num_iterations, "
                "prior, ...)."
            )
        check_count("EM.run", "num_iterations", num_iterations)
        if patience is not None:
            check_count("EM.run", "patience", patience)
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
            priors = as_dict(prior) if init_state is None else init_state.priors
            first = next(iter(priors.values()))
            resolve_options(first.sampler, self._num_heldout_particles, self.e_step.sampler)

    def _read(
        self,
        prior: Any,
        arguments: Arguments,
        params: dict[str, jax.Array] | None = None,
        batch_size: int | None = None,
    ) -> BoundModel:
        """Read the model, in blocks of the E-step or of a batch size."""
        args, kwargs = arguments
        size = self.e_step.block_size(self.mesh)
        return read(
            self.model,
            (prior, *args),
            kwargs,
            block_size=size if batch_size is None else lambda group: batch_size,
            mesh=self.mesh,
            params=params,
        )

    def _evaluate_heldout(
        self,
        rng_key: jax.Array,
        state: EMState,
        heldout: tuple[Any, ...] | Mapping[str, Any],
        arguments: Arguments,
    ) -> LogEvidence:
        """Return the log-evidence of the held-out events."""
        args, kwargs = arguments
        if isinstance(heldout, Mapping):
            kwargs = kwargs | dict(heldout)
        else:
            args = heldout
        return estimate_evidence(
            rng_key,
            self.model,
            (state.prior, *args),
            kwargs,
            params=state.params,
            num_estimates=4,
            num_particles=self._num_heldout_particles,
            sampler=self.e_step.sampler,
            guidance=None,
            max_batch_size=self.e_step.max_batch_size,
            mesh=self.mesh,
        )

    @property
    def _num_heldout_particles(self) -> int:
        return max(_NUM_HELDOUT_PARTICLES, self.e_step.max_particles)


_NUM_HELDOUT_PARTICLES = 16
