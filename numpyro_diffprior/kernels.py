"""Kernels for `numpyro.infer.MCMC`: thin shims over `numpyro_diffprior.posterior`."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import identity, is_prng_key

from numpyro_diffprior.guidance import Guidance
from numpyro_diffprior.introspect import LatentSite, Model, bind, read_latent, read_likelihood
from numpyro_diffprior.posterior import resolve_settings
from numpyro_diffprior.samplers import Sampler
from numpyro_diffprior.smc import Settings, draw_posterior

__all__ = ["MMPSKernel", "MMPSState"]


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
    """

    z: dict[str, jax.Array]
    rng_key: jax.Array
    residual: jax.Array
    num_truncated: jax.Array
    ess: jax.Array
    num_resamplings: jax.Array
    log_evidence: jax.Array


class MMPSKernel(MCMCKernel):
    """Independent draws of a diffusion site by moment matching posterior sampling.

    Every draw starts anew from noise, so a chain needs no warm-up and its draws are not
    correlated. One particle is MMPS, whose approximation is biased where the posterior has several
    modes; more particles correct it (see `numpyro_diffprior.posterior`).

    Args:
        model: A NumPyro model whose first argument is the prior.
        num_particles: Particles per draw.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle and
            the Gaussian one for more).

    Example:
        >>> mcmc = MCMC(MMPSKernel(model), num_warmup=0, num_samples=250)  # doctest: +SKIP
        >>> mcmc.run(jax.random.key(0), prior, mask, y, extra_fields=("ess",))  # doctest: +SKIP
    """

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
        self._sample_fn: Callable[..., MMPSState] | None = None

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
    ) -> MMPSState:
        """Read the model, and start at the prior's mean or at ``init_params``.

        Raises:
            ValueError: If the model cannot be read, or particles and sampler do not fit.
        """
        latent = self._read(model_args, model_kwargs)[0]
        self._resolve(latent)
        value = jnp.broadcast_to(latent.prior.mean, latent.shape)
        value = (init_params or {}).get(latent.name, value)
        zeros = jnp.zeros(latent.batch_shape, value.dtype)
        count = zeros.astype(int)
        self._sample_fn = self._draw

        def start(key: jax.Array) -> MMPSState:
            return MMPSState({latent.name: value}, key, zeros, count, zeros, count, zeros)

        return start(rng_key) if is_prng_key(rng_key) else jax.vmap(start)(rng_key)

    def sample(
        self, state: MMPSState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> MMPSState:
        """Make an independent draw (of each chain, where the state has several)."""
        if self._sample_fn is None:
            raise RuntimeError("MMPSKernel: `init` must be called before `sample`.")
        if is_prng_key(state.rng_key):
            return self._sample_fn(state, model_args, model_kwargs)
        in_axes = (0, None, None)
        return jax.vmap(self._sample_fn, in_axes=in_axes)(state, model_args, model_kwargs)

    def refresh(
        self, state: MMPSState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> MMPSState:
        """Return the state: nothing in it depends on the model's arguments."""
        return state

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "MMPSKernel":
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
        """Return a function that adds the model's deterministic sites to a draw."""
        bound = bind(self.model, model_args, model_kwargs or {})

        def postprocess(z: dict[str, jax.Array]) -> dict[str, jax.Array]:
            trace = handlers.trace(handlers.substitute(bound, data=z)).get_trace()
            deterministic = {
                name: site["value"]
                for name, site in trace.items()
                if site["type"] == "deterministic"
            }
            return {**z, **deterministic}

        return postprocess

    def _read(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> tuple[LatentSite, Any]:
        bound = bind(self.model, model_args, model_kwargs or {})
        latent = read_latent(bound)
        return latent, read_likelihood(bound, latent)

    def _resolve(self, latent: LatentSite) -> Settings:
        return resolve_settings(latent.prior, self.num_particles, self.sampler, self.guidance)

    def _draw(
        self, state: MMPSState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> MMPSState:
        latent, likelihood = self._read(model_args, model_kwargs)
        settings = self._resolve(latent)
        rng_key, key = jax.random.split(state.rng_key)
        draws = draw_posterior(key, latent.prior.denoiser, likelihood, settings)
        stats = {name: value[0] for name, value in draws.stats.items()}
        return MMPSState({latent.name: draws.x[0]}, rng_key, **stats)
