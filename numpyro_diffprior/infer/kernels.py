"""Kernels for `numpyro.infer.MCMC`: thin shims over `numpyro_diffprior.particles`."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import identity, is_prng_key

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.program import call
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.infer.blocks import merge_stats
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.particles.conditional_smc import diffuse_path, update_path
from numpyro_diffprior.particles.smc import draw_posterior
from numpyro_diffprior.particles.system import Draws, ParticleInfo, SamplingOptions
from numpyro_diffprior.reading.checks import check_data
from numpyro_diffprior.reading.latent import LatentGroup
from numpyro_diffprior.reading.model import Block, BoundModel
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import Model, fix_plates

__all__ = [
    "DiffusionKernel",
    "MMPSKernel",
    "MMPSState",
    "ParticleGibbs",
    "ParticleGibbsState",
    "bind",
    "draw_once",
    "merge_infos",
    "split_events",
]


class MMPSState(NamedTuple):
    """The state of `MMPSKernel`.

    Attributes:
        z: The diffusion sites' values by name.
        rng_key: The random key.
        info: The statistics of the last draw, see `ParticleInfo` (``extra_fields=("info.ess",)``).
    """

    z: dict[str, jax.Array]
    rng_key: jax.Array
    info: ParticleInfo


class ParticleGibbsState(NamedTuple):
    """The state of `ParticleGibbs`.

    Attributes:
        z: The diffusion sites' values by name.
        rng_key: The random key.
        path: The retained paths, each with shape ``(num_steps, *batch, *event)``: one for each
            group of sites that share observations.
        updated: The fraction of noise levels at which the path moved in the last update, with the
            sites' batch shape.
        info: The statistics of the last update; see `ParticleInfo`.
        num_evaluations: The number of network evaluations of an update.
    """

    z: dict[str, jax.Array]
    rng_key: jax.Array
    path: tuple[jax.Array, ...]
    updated: jax.Array
    info: ParticleInfo
    num_evaluations: jax.Array


_State = Any  # `MMPSState` or `ParticleGibbsState`
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any] | None
_Values = dict[str, jax.Array]
_Blocks = list[tuple[LatentGroup, Block]]
_Events = list[jax.Array]


class DiffusionKernel(MCMCKernel):
    """The base class of the kernels that draw diffusion sites."""

    def __init__(
        self,
        model: Model,
        *,
        num_particles: int = 1,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.model = model
        self.num_particles = check_count(type(self).__name__, "num_particles", num_particles)
        self.sampler = sampler
        self.guidance = guidance
        self._sample_fn: Callable[..., _State] | None = None

    @property
    def sample_field(self) -> str:
        """The field of the state that holds the draw."""
        return "z"

    @abstractmethod
    def _draw(self, state: _State, model_args: _Args, model_kwargs: _Kwargs) -> _State:
        """Return the next state of one chain."""

    def sample(self, state: _State, model_args: _Args, model_kwargs: _Kwargs) -> _State:
        """Return the next state (of every chain, if the state has several)."""
        if self._sample_fn is None:
            raise RuntimeError(f"{type(self).__name__}: `init` must be called before `sample`.")
        if is_prng_key(state.rng_key):
            return self._sample_fn(state, model_args, model_kwargs)
        in_axes = (0, None, None)
        return jax.vmap(self._sample_fn, in_axes=in_axes)(state, model_args, model_kwargs)

    def refresh(self, state: _State, model_args: _Args, model_kwargs: _Kwargs) -> _State:
        """Return the state: nothing in it depends on the model's arguments."""
        return state

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> Self:
        """Return a copy of this kernel with a wrapped model."""
        kernel = copy.copy(self)
        kernel.model = wrapper(self.model)
        kernel._sample_fn = None
        return kernel

    def get_constrain_fn(
        self, model_args: _Args, model_kwargs: _Kwargs
    ) -> Callable[[_Values], _Values]:
        """Return the identity: draws are values of the site."""
        return identity

    def postprocess_fn(
        self, model_args: _Args, model_kwargs: _Kwargs
    ) -> Callable[[_Values], _Values]:
        """Return a function that adds the model's deterministic sites to a draw.

        Observed sites completed under ``obs_mask=`` are left out, since their hidden values are
        not drawn; for these use `numpyro.infer.Predictive`.
        """
        whole = handlers.seed(fix_plates(self.model), rng_seed=0)

        def postprocess(z: _Values) -> _Values:
            substituted = handlers.trace(handlers.substitute(whole, data=z))
            trace = substituted.get_trace(*model_args, **(model_kwargs or {}))
            deterministic = {
                name: site["value"]
                for name, site in trace.items()
                if site["type"] == "deterministic" and f"{name}_unobserved" not in trace
            }
            return {**z, **deterministic}

        return postprocess

    def _prepare(
        self, model: Model, model_args: _Args, model_kwargs: _Kwargs
    ) -> tuple[BoundModel, SamplingOptions]:
        bound = read(model, model_args, model_kwargs or {})
        default = bound.reading.sampler
        options = resolve_options(default, self.num_particles, self.sampler, self.guidance)
        return bound, options


class _ConditionalKernel(DiffusionKernel):
    """The base class of the kernels of diffusion sites given all other sites."""

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: _Values | None,
        model_args: _Args,
        model_kwargs: _Kwargs,
    ) -> _State:
        """Read the model and return the first state, at ``init_params`` if they hold all sites.

        Raises:
            ValueError: If the model cannot be read, or particles and sampler do not fit.
        """
        bound, options = self._prepare(self.model, model_args, model_kwargs)
        check_data(bound, options.sampler)
        self._sample_fn = self._draw

        def start(rng_key: jax.Array, bound: BoundModel, params: _Values) -> _State:
            blocks = bind(bound)
            names = {name for group, _ in blocks for name in group.names}
            values = None
            if names <= set(params):
                values = [group.join(block.denoiser, params) for group, block in blocks]

            def start_chain(key: jax.Array, values: _Events | None) -> _State:
                return self._start(key, blocks, options, values)

            if is_prng_key(rng_key):
                return start_chain(rng_key, values)
            return jax.vmap(start_chain, in_axes=(0, None if values is None else 0))(
                rng_key, values
            )

        # Compiled: eager calls would compile hundreds of small programs.
        return call(start, rng_key, bound, dict(init_params or {}))

    @abstractmethod
    def _start(
        self,
        rng_key: jax.Array,
        blocks: _Blocks,
        options: SamplingOptions,
        values: _Events | None,
    ) -> _State:
        """Return the first state of one chain."""

    @abstractmethod
    def _update(
        self, state: _State, rng_key: jax.Array, blocks: _Blocks, options: SamplingOptions
    ) -> _State:
        """Return the next state of one chain, except for the state's own key."""

    def _draw(self, state: _State, model_args: _Args, model_kwargs: _Kwargs) -> _State:
        """Return the next state of one chain."""
        bound, options = self._prepare(self.model, model_args, model_kwargs)
        rng_key, key = jax.random.split(state.rng_key)
        return self._update(state._replace(rng_key=rng_key), key, bind(bound), options)


def bind(bound: BoundModel) -> _Blocks:
    """Return denoiser and likelihood of each group of sites, on whole plates."""
    return [(group.latents, group.bind(bound.data)) for group in bound.reading.groups]


def split_events(blocks: _Blocks, values: Sequence[jax.Array]) -> _Values:
    """Return events by site."""
    return {
        name: value
        for (group, block), x in zip(blocks, values, strict=True)
        for name, value in group.split(block.denoiser, x).items()
    }


def _keys(rng_key: jax.Array, blocks: _Blocks) -> list[jax.Array]:
    return [rng_key] if len(blocks) == 1 else list(jax.random.split(rng_key, len(blocks)))


def draw_once(rng_key: jax.Array, blocks: _Blocks, options: SamplingOptions) -> list[Draws]:
    """Return one draw of each group."""
    draws = [
        draw_posterior(key, block.denoiser, block.likelihood, options)
        for key, (_, block) in zip(_keys(rng_key, blocks), blocks, strict=True)
    ]
    return jax.tree.map(lambda leaf: leaf[0], draws)


class MMPSKernel(_ConditionalKernel):
    """Independent draws of a diffusion site by moment matching posterior sampling.

    Every draw starts anew from noise, so a chain needs no warm-up and its draws are not
    correlated. One particle is MMPS, whose approximation is biased where the posterior has several
    modes; more particles correct it (see `numpyro_diffprior.particles.smc`).

    Args:
        model: A NumPyro model whose first argument is the prior.
        num_particles: Particles per draw.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle, and
            with the Gaussian covariance and look-ahead proposals for more).

    Example:
        >>> mcmc = MCMC(MMPSKernel(model), num_warmup=0, num_samples=250)  # doctest: +SKIP
        >>> mcmc.run(
        ...     jax.random.key(0), prior, mask, y, extra_fields=("info.ess",)
        ... )  # doctest: +SKIP
    """

    def _start(
        self,
        rng_key: jax.Array,
        blocks: _Blocks,
        options: SamplingOptions,
        values: _Events | None,
    ) -> MMPSState:
        """Start at the prior's mean: no draw depends on it."""
        if values is None:
            values = [block.mean for _, block in blocks]
        return MMPSState(split_events(blocks, values), rng_key, _no_info(blocks, options))

    def _update(
        self, state: MMPSState, rng_key: jax.Array, blocks: _Blocks, options: SamplingOptions
    ) -> MMPSState:
        draws = draw_once(rng_key, blocks, options)
        z = split_events(blocks, [draw.x for draw in draws])
        return state._replace(z=z, info=merge_infos([draw.info for draw in draws]))


class ParticleGibbs(_ConditionalKernel):
    """Exact draws of a diffusion site by conditional SMC with ancestor sampling.

    An update leaves the posterior invariant, under the prior that the sampler draws and the exact
    likelihood of the observed sites, for any number of particles from two on. Successive draws
    are correlated; more particles move more of the path. The chain starts at a draw of the
    twisted SMC, so that it needs little warm-up. Use it alone in `MCMC`, or with other kernels in
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
        >>> mcmc.run(
        ...     jax.random.key(0), prior, mask, y, extra_fields=("info.ess",)
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        *,
        num_particles: int = 16,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        # One of them is the retained path, which cannot move alone.
        check_count("ParticleGibbs", "num_particles", num_particles, 2)
        super().__init__(model, num_particles=num_particles, sampler=sampler, guidance=guidance)

    def _start(
        self,
        rng_key: jax.Array,
        blocks: _Blocks,
        options: SamplingOptions,
        values: _Events | None,
    ) -> ParticleGibbsState:
        """Start at a draw of the twisted SMC, and add noise to get a path."""
        rng_key, key_draw, key_path = jax.random.split(rng_key, 3)
        if values is None:
            values = [draw.x for draw in draw_once(key_draw, blocks, options)]
        path = tuple(
            diffuse_path(
                key,
                options.guidance.condition(block.denoiser, block.likelihood),
                options.sampler,
                value,
            )
            for key, (_, block), value in zip(_keys(key_path, blocks), blocks, values, strict=True)
        )
        info = _no_info(blocks, options)
        # The retained path's denoised means are evaluated once more.
        num_evaluations = jnp.asarray((self.num_particles + 1) * options.sampler.num_steps)
        return ParticleGibbsState(
            z=split_events(blocks, values),
            rng_key=rng_key,
            path=path,
            updated=jnp.zeros_like(info.residual),
            info=info,
            num_evaluations=num_evaluations,
        )

    def _update(
        self,
        state: ParticleGibbsState,
        rng_key: jax.Array,
        blocks: _Blocks,
        options: SamplingOptions,
    ) -> ParticleGibbsState:
        updates = [
            update_path(key, block.denoiser, block.likelihood, options, path)
            for key, (_, block), path in zip(_keys(rng_key, blocks), blocks, state.path)
        ]
        return state._replace(
            z=split_events(blocks, [update.draws.x for update in updates]),
            path=tuple(update.path for update in updates),
            updated=merge_stats([{"updated": update.updated} for update in updates])["updated"],
            info=merge_infos([update.draws.info for update in updates]),
        )


def _no_info(blocks: _Blocks, options: SamplingOptions) -> ParticleInfo:
    """Return statistics of zero, for a state that is not a draw."""
    num_steps = options.sampler.num_steps
    return merge_infos(
        [
            ParticleInfo.zeros(block.likelihood.batch_shape, num_steps, block.denoiser.dtype)
            for _, block in blocks
        ]
    )


def merge_infos(infos: Sequence[ParticleInfo]) -> ParticleInfo:
    """Return the statistics of all groups of sites."""
    return ParticleInfo(**merge_stats([info._asdict() for info in infos]))
