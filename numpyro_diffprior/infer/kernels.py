"""Kernels for `numpyro.infer.MCMC`: thin shims over `smc` and `conditional_smc`."""

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import identity, is_prng_key

from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.infer.posterior import resolve_settings
from numpyro_diffprior.particles.conditional_smc import diffuse_path, update_path
from numpyro_diffprior.particles.smc import draw_posterior
from numpyro_diffprior.particles.system import Settings
from numpyro_diffprior.reading.latent import LatentSite, read_latent
from numpyro_diffprior.reading.likelihood import read_likelihood
from numpyro_diffprior.reading.tracing import Model, bind_whole_plates

__all__ = ["MMPSKernel", "MMPSState", "ParticleGibbs", "ParticleGibbsState"]


class MMPSState(NamedTuple):
    """The state of `MMPSKernel`; all but ``z`` and ``rng_key`` are statistics of the last draw.

    Attributes:
        z: The diffusion site's value by its name.
        rng_key: The random key.
        residual: The largest relative residual of guidance's solves, with the site's batch shape.
        num_truncated: The largest number of directions that guidance left out, likewise.
        ess: The lowest effective number of particles along the path, likewise.
        num_resamplings: How often the particles were resampled, likewise.
        log_evidence: The estimate of the log-density of the event's observations, likewise.
        chi_square: The draw's mean squared residual in deviations of the noise, likewise.
        ess_path: The effective number of particles at every noise level, with shape
            ``(*batch, num_steps)``.
    """

    z: dict[str, jax.Array]
    rng_key: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array
    chi_square: jax.Array
    ess_path: jax.Array


class ParticleGibbsState(NamedTuple):
    """The state of `ParticleGibbs`; all behind ``path`` are statistics of the last update.

    Attributes:
        z: The diffusion site's value by its name.
        rng_key: The random key.
        path: The retained path, with shape ``(num_steps, *batch, *event)``.
        updated: The fraction of noise levels at which the path moved, with the site's batch shape.
        residual: The largest relative residual of guidance's solves, likewise.
        num_truncated: The largest number of directions that guidance left out, likewise.
        ess: The lowest effective number of particles along the path, likewise.
        num_resamplings: How often the particles were resampled, likewise.
        log_evidence: An estimate of the log-density of the event's observations, likewise; with a
            retained path among the particles it is not unbiased.
        chi_square: The draw's mean squared residual in deviations of the noise, likewise.
        ess_path: The effective number of particles at every noise level, with shape
            ``(*batch, num_steps)``.
        num_evaluations: The number of network evaluations of the update.
    """

    z: dict[str, jax.Array]
    rng_key: jax.Array
    path: jax.Array
    updated: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array
    chi_square: jax.Array
    ess_path: jax.Array
    num_evaluations: jax.Array


_State = Any  # of the concrete kernel


class _DiffusionKernel(MCMCKernel):
    """What the kernels of a diffusion site share."""

    def __init__(
        self,
        model: Model,
        *,
        num_particles: int = 1,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.model = model
        self.num_particles = num_particles
        self.sampler = sampler
        self.guidance = guidance
        self._sample_fn: Callable[..., _State] | None = None

    @property
    def sample_field(self) -> str:
        """The field of the state that holds the draw."""
        return "z"

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: dict[str, jax.Array] | None,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> _State:
        """Read the model, and start at ``init_params`` where they name the site.

        Raises:
            ValueError: If the model cannot be read, or particles and sampler do not fit.
        """
        latent, likelihood = self._read(model_args, model_kwargs)
        settings = self._resolve(latent)
        params = init_params or {}
        value = latent.join(params) if set(latent.names) <= set(params) else None
        self._sample_fn = self._draw

        def start(key: jax.Array, value: jax.Array | None) -> _State:
            return self._start(key, latent, likelihood, settings, value)

        if is_prng_key(rng_key):
            return start(rng_key, value)
        return jax.vmap(start, in_axes=(0, None if value is None else 0))(rng_key, value)

    @abstractmethod
    def _start(
        self,
        rng_key: jax.Array,
        latent: LatentSite,
        likelihood: Likelihood,
        settings: Settings,
        value: jax.Array | None,
    ) -> _State:
        """Return the first state of one chain."""

    @abstractmethod
    def _draw(
        self, state: _State, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> _State:
        """Return the next state of one chain."""

    def sample(
        self, state: _State, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> _State:
        """Return the next state (of each chain, where the state has several)."""
        if self._sample_fn is None:
            raise RuntimeError(f"{type(self).__name__}: `init` must be called before `sample`.")
        if is_prng_key(state.rng_key):
            return self._sample_fn(state, model_args, model_kwargs)
        in_axes = (0, None, None)
        return jax.vmap(self._sample_fn, in_axes=in_axes)(state, model_args, model_kwargs)

    def refresh(
        self, state: _State, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> _State:
        """Return the state: nothing in it depends on the model's arguments."""
        return state

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> Self:
        """Return a copy of this kernel with a wrapped model."""
        kernel = copy.copy(self)
        kernel.model = wrapper(self.model)
        kernel._sample_fn = None
        return kernel

    def get_constrain_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
        """Return the identity: draws are values of the site."""
        return identity

    def postprocess_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
        """Return a function that adds the model's deterministic sites to a draw.

        All but observed sites completed under ``obs_mask=``, whose hidden values nobody draws: see
        `numpyro.infer.Predictive`.
        """
        bound = bind_whole_plates(self.model, model_args, model_kwargs or {})

        def postprocess(z: dict[str, jax.Array]) -> dict[str, jax.Array]:
            trace = handlers.trace(handlers.substitute(bound, data=z)).get_trace()
            deterministic = {
                name: site["value"]
                for name, site in trace.items()
                if site["type"] == "deterministic" and f"{name}_unobserved" not in trace
            }
            return {**z, **deterministic}

        return postprocess

    def _read(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> tuple[LatentSite, Any]:
        bound = bind_whole_plates(self.model, model_args, model_kwargs or {})
        latent = read_latent(bound)
        return latent, read_likelihood(bound, latent)

    def _resolve(self, latent: LatentSite) -> Settings:
        return resolve_settings(latent.prior, self.num_particles, self.sampler, self.guidance)


class MMPSKernel(_DiffusionKernel):
    """Independent draws of a diffusion site by moment matching posterior sampling.

    Every draw starts anew from noise, so a chain needs no warm-up and its draws are not
    correlated. One particle is MMPS, whose approximation is biased where the posterior has several
    modes; more particles correct it (see `numpyro_diffprior.infer.posterior`).

    Args:
        model: A NumPyro model whose first argument is the prior.
        num_particles: Particles per draw.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle and
            the Gaussian one for more, which look ahead).

    Example:
        >>> mcmc = MCMC(MMPSKernel(model), num_warmup=0, num_samples=250)  # doctest: +SKIP
        >>> mcmc.run(jax.random.key(0), prior, mask, y, extra_fields=("ess",))  # doctest: +SKIP
    """

    def _start(
        self,
        rng_key: jax.Array,
        latent: LatentSite,
        likelihood: Likelihood,
        settings: Settings,
        value: jax.Array | None,
    ) -> MMPSState:
        """Start at the prior's mean: no draw depends on it."""
        if value is None:
            value = jnp.broadcast_to(latent.prior.mean, latent.shape)
        zeros = jnp.zeros(latent.batch_shape, value.dtype)
        count = zeros.astype(int)
        path = jnp.zeros((*zeros.shape, settings.sampler.num_steps), zeros.dtype)
        stats = zeros, count, zeros, count, zeros, zeros, path
        return MMPSState(latent.values(value), rng_key, *stats)

    def _draw(
        self, state: MMPSState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> MMPSState:
        latent, likelihood = self._read(model_args, model_kwargs)
        settings = self._resolve(latent)
        rng_key, key = jax.random.split(state.rng_key)
        draws = draw_posterior(key, latent.prior.denoiser, likelihood, settings)
        stats = {name: value[0] for name, value in draws.stats.items()}
        return MMPSState(latent.values(draws.x[0]), rng_key, **stats)


class ParticleGibbs(_DiffusionKernel):
    """A chain of exact draws of a diffusion site by conditional SMC with ancestor sampling.

    The posterior under the prior that the sampler draws and the exact likelihood of the observed
    sites stays what it is under an update, for any number of particles from two on. Updates are
    correlated: more particles move more of the path. The chain starts at a draw of the twisted
    SMC, which needs little warm-up. Alone in `MCMC`, or beside other kernels in
    `numpyro.infer.Gibbs`.

    Args:
        model: A NumPyro model whose first argument is the prior.
        num_particles: Particles per update, at least two.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS` with the Gaussian covariance, looking ahead).

    Raises:
        ValueError: If there are fewer than two particles.

    Example:
        >>> mcmc = MCMC(ParticleGibbs(model), num_warmup=20, num_samples=500)  # doctest: +SKIP
        >>> mcmc.run(jax.random.key(0), prior, mask, y, extra_fields=("ess",))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        *,
        num_particles: int = 16,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        if num_particles < 2:
            raise ValueError(
                f"ParticleGibbs: expected num_particles >= 2, got {num_particles}: one of them is "
                "the retained path, which cannot move alone."
            )
        super().__init__(model, num_particles=num_particles, sampler=sampler, guidance=guidance)

    def _start(
        self,
        rng_key: jax.Array,
        latent: LatentSite,
        likelihood: Likelihood,
        settings: Settings,
        value: jax.Array | None,
    ) -> ParticleGibbsState:
        """Start at a draw of the twisted SMC, with a path of added noise."""
        rng_key, key_draw, key_path = jax.random.split(rng_key, 3)
        denoiser = latent.prior.denoiser
        if value is None:
            value = draw_posterior(key_draw, denoiser, likelihood, settings).x[0]
        path = diffuse_path(key_path, denoiser, settings.sampler, value)
        zeros = jnp.zeros(latent.batch_shape, value.dtype)
        count = zeros.astype(int)
        ess_path = jnp.zeros((*zeros.shape, settings.sampler.num_steps), zeros.dtype)
        stats = zeros, zeros, count, zeros, count, zeros, zeros, ess_path
        # The retained path's denoised means are evaluated once more.
        num_evaluations = jnp.asarray((self.num_particles + 1) * settings.sampler.num_steps)
        return ParticleGibbsState(latent.values(value), rng_key, path, *stats, num_evaluations)

    def _draw(
        self,
        state: ParticleGibbsState,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> ParticleGibbsState:
        latent, likelihood = self._read(model_args, model_kwargs)
        rng_key, key = jax.random.split(state.rng_key)
        path, draws, updated = update_path(
            key, latent.prior.denoiser, likelihood, self._resolve(latent), state.path
        )
        return state._replace(
            z=latent.values(draws.x), rng_key=rng_key, path=path, updated=updated, **draws.stats
        )
