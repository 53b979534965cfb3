"""Particle marginal Metropolis-Hastings: other parameters with the diffusion sites integrated out.

Reference:
    Andrieu, Doucet and Holenstein, *Particle Markov chain Monte Carlo methods*, Journal of the
    Royal Statistical Society B 72, 2010.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import init_to_sample
from numpyro.infer.hmc_util import build_adaptation_schedule
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy
from numpyro.util import is_prng_key

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.program import call
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.infer.kernels import (
    DiffusionKernel,
    bind,
    draw_once,
    merge_infos,
    split_events,
)
from numpyro_diffprior.linalg.batched import magnitude
from numpyro_diffprior.particles.metropolis import (
    FittedProposal,
    Independent,
    adapt,
    propose,
)
from numpyro_diffprior.particles.system import ParticleInfo
from numpyro_diffprior.reading.checks import check_data
from numpyro_diffprior.reading.tracing import (
    Model,
    fix_plates,
    is_unobserved,
    mean_of_latent,
)

__all__ = ["PMMH", "PMMHState"]

_NUM_DRAWS = 32  # whose deviations are those of the first proposals


class PMMHState(NamedTuple):
    """The state of `PMMH`.

    Attributes:
        z: Unconstrained values of the other sites, and events of the diffusion sites, by name.
        rng_key: The random key.
        i: The number of updates.
        log_density: The estimated log-density of the observations and of the other sites'
            unconstrained values, with the diffusion sites integrated out.
        accept_prob: The probability with which the last proposal was accepted.
        mean_accept_prob: Its mean, during or since the warm-up.
        proposal: The proposals.
        info: The statistics of the draw of the diffusion sites; see `ParticleInfo`.
    """

    z: dict[str, jax.Array]
    rng_key: jax.Array
    i: jax.Array
    log_density: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    proposal: FittedProposal
    info: ParticleInfo


_Values = dict[str, jax.Array]


class PMMH(DiffusionKernel):
    """Exact draws of diffusion sites and of all other latent sites together.

    An update proposes values for the other sites; given these, the twisted SMC draws the diffusion
    sites and estimates the evidence without bias, with which the proposal is accepted or refused.
    So the chain leaves the posterior invariant, under the prior that the sampler draws, as if the
    diffusion sites were integrated out. That helps where the other sites are known much better
    given the event than without it, so that `Gibbs` moves slowly. It needs estimates whose
    logarithm varies by about one: compare `log_evidence`, and take more particles or steps, if
    chains stay where they are for long. The estimates of many events add up: use `Gibbs` then.

    Half of the proposals are steps of a random walk, half are drawn from one distribution. Both
    are fitted during the warm-up, see `numpyro_diffprior.particles.metropolis`; some hundred
    updates suffice for a few parameters.

    Args:
        model: A NumPyro model whose first argument is the prior. Its other latent sites must be
            continuous.
        num_particles: Particles per update, at least two.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS` with the Gaussian covariance, looking ahead).
        proposal: A distribution of the other sites' unconstrained values, of all sites in one
            vector, in the order of their names: the posterior of an autoguide, say. With it, only
            the size of steps is adapted (default: fitted during warm-up).

    Raises:
        ValueError: If there are fewer than two particles.

    Example:
        >>> mcmc = MCMC(PMMH(model), num_warmup=200, num_samples=500)  # doctest: +SKIP
        >>> mcmc.run(
        ...     jax.random.key(0), prior, y, extra_fields=("mean_accept_prob",)
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        *,
        num_particles: int = 16,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        proposal: dist.Distribution | None = None,
    ) -> None:
        # One particle has no estimate.
        check_count("PMMH", "num_particles", num_particles, 2)
        super().__init__(model, num_particles=num_particles, sampler=sampler, guidance=guidance)
        self.proposal = proposal
        self._others: tuple[str, ...] = ()
        self._integrated: frozenset[str] = frozenset()
        self._num_warmup = 0
        self._ends: tuple[int, ...] = ()

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: _Values | None,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> PMMHState:
        """Read the model and return the first state.

        Args:
            rng_key: A random key, or one for each chain.
            num_warmup: The number of updates that adapt the proposals.
            init_params: Unconstrained values of the other sites, by name (default: draws of
                their priors).
            model_args: The model's arguments.
            model_kwargs: Its keyword arguments.

        Raises:
            ValueError: If the model cannot be read, particles and sampler do not fit, the model
                has no other latent sites or discrete ones, or proposal or first values do not
                fit these.
        """
        kwargs = model_kwargs or {}
        self._others, self._integrated = self._find_sites(model_args, kwargs)
        self._num_warmup, self._sample_fn = num_warmup, self._draw
        # Without the first and the last one, in which only the scale of steps is adapted.
        windows = build_adaptation_schedule(num_warmup)[1:-1] if num_warmup else []
        self._ends = tuple(window.end for window in windows)

        is_one = is_prng_key(rng_key)
        keys = rng_key[None] if is_one else rng_key
        key_prior, key_start = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        prior = self._draw_prior(key_prior, model_args, kwargs)
        first = jax.tree.map(lambda draws: draws[:, 0], prior)
        self._check_proposal(sum(values[0].size for values in first.values()))
        if unknown := sorted(set(init_params or {}) - set(first)):
            raise ValueError(
                f"PMMH: expected init_params of the sites {list(self._others)}, got {unknown}; "
                "diffusion sites are drawn given the others."
            )
        for name, value in (init_params or {}).items():
            first[name] = jnp.broadcast_to(value, first[name].shape)

        def start(keys: jax.Array, first: _Values, prior: _Values) -> PMMHState:
            def start_chain(key: jax.Array, values: _Values, prior: _Values) -> PMMHState:
                return self._start(key, values, prior, model_args, kwargs)

            return jax.vmap(start_chain)(keys, first, prior)

        state: PMMHState = call(start, key_start, first, prior)
        return jax.tree.map(lambda leaf: leaf[0], state) if is_one else state

    def get_diagnostics_str(self, state: PMMHState) -> str:
        """Return the mean probability of acceptance, for the progress bar."""
        return f"acc. prob={state.mean_accept_prob:.2f}"

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> Self:
        """Raise an error: all latent sites are drawn together.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "PMMH draws all latent sites of a model together, with the diffusion sites integrated "
            "out, and cannot be a block of Gibbs; use ParticleGibbs there."
        )

    def get_constrain_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[[_Values], _Values]:
        """Return a function from a state's values to values of the sites."""
        rest = _integrate(self.model, self._integrated)

        def constrain(z: _Values) -> _Values:
            values = {name: z[name] for name in self._others}
            return {**z, **constrain_fn(rest, model_args, model_kwargs or {}, values)}

        return constrain

    def postprocess_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[[_Values], _Values]:
        """Return a function that constrains values, and adds the model's deterministic sites."""
        add_deterministic = super().postprocess_fn(model_args, model_kwargs)
        constrain = self.get_constrain_fn(model_args, model_kwargs)
        return lambda z: add_deterministic(constrain(z))

    def _find_sites(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the names of other latent sites, and of those that the evidence replaces."""
        trace = handlers.trace(_integrate(self.model)).get_trace(*args, **kwargs)
        latent = {
            name: site
            for name, site in trace.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        hidden = {name for name in latent if is_unobserved(name, trace)}
        others = {name: site for name, site in latent.items() if name not in hidden}
        if not others:
            raise ValueError(
                "PMMH: the model has no latent site but those with diffusion priors; expected "
                "other parameters. Use ParticleGibbs or MMPSKernel."
            )
        if discrete := [name for name, site in others.items() if site["fn"].support.is_discrete]:
            raise ValueError(
                f"PMMH: expected continuous latent sites, got the discrete ones {discrete}; sum "
                "over them in the model."
            )
        values = {name: site["value"] for name, site in others.items()}
        bound, options = self._prepare(handlers.condition(self.model, values), args, kwargs)
        check_data(bound, options.sampler)
        observed = bound.reading.form.observed
        seen = {
            observed[s.position].name for group in bound.reading.groups for s in group.observed
        }
        return tuple(sorted(others)), frozenset(seen | hidden)

    def _check_proposal(self, size: int) -> None:
        if self.proposal is None:
            return
        if not isinstance(self.proposal, dist.Distribution):
            raise ValueError(f"PMMH: expected a distribution as proposal, got {self.proposal!r}.")
        if (shape := self.proposal.shape()) != (size,):
            raise ValueError(
                f"PMMH: expected a proposal of shape ({size},), got shape {shape}; it is a "
                f"distribution of the unconstrained values of {list(self._others)} in one vector."
            )

    def _draw_prior(
        self, keys: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Values:
        """Draw unconstrained values, with shapes ``(num_chains, num_draws, ...)``."""
        split = jax.vmap(lambda key: jax.random.split(key, _NUM_DRAWS))(keys)
        values: _Values = initialize_model(
            split.reshape(-1),
            _Integrated(self.model, self._integrated),
            init_strategy=init_to_sample,
            model_args=args,
            model_kwargs=kwargs,
            validate_grad=False,
        ).param_info.z
        return {name: v.reshape(*split.shape[:2], *v.shape[1:]) for name, v in values.items()}

    def _start(
        self,
        rng_key: jax.Array,
        values: _Values,
        prior: _Values,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> PMMHState:
        """Return the first state of one chain."""
        rng_key, key = jax.random.split(rng_key)
        if self.proposal is None:
            draws = jax.vmap(lambda v: ravel_pytree(v)[0])(prior)
        else:
            # Not its moments, which many distributions do not know.
            rng_key, key_proposal = jax.random.split(rng_key)
            draws = self.proposal.sample(key_proposal, (_NUM_DRAWS,))
        root = getattr(self.proposal, "scale_tril", _diagonal_root(draws))
        first = self._estimate(key, values, args, kwargs)
        zero = jnp.zeros_like(first.log_density)
        return PMMHState(
            z={**values, **first.events},
            rng_key=rng_key,
            i=jnp.zeros((), int),
            log_density=first.log_density,
            accept_prob=zero,
            mean_accept_prob=zero,
            proposal=FittedProposal.start(draws.mean(0), root),
            info=first.info,
        )

    def _draw(
        self, state: PMMHState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> PMMHState:
        """Return the next state of one chain."""
        rng_key, key_proposal, key_events, key_accept = jax.random.split(state.rng_key, 4)
        x, unravel = ravel_pytree({name: state.z[name] for name in self._others})
        given = self.proposal and Independent(self.proposal.sample, self.proposal.log_prob)
        proposed = propose(key_proposal, state.proposal, x, given)
        values = unravel(proposed.x)
        new = self._estimate(key_events, values, model_args, model_kwargs or {})
        log_ratio = new.log_density - state.log_density + proposed.log_ratio
        accept_prob = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0))
        moved = jax.random.uniform(key_accept, dtype=accept_prob.dtype) < accept_prob
        z, log_density, info = jax.tree.map(
            lambda a, b: jnp.where(moved, a, b),
            ({**values, **new.events}, new.log_density, new.info),
            (state.z, state.log_density, state.info),
        )
        adapted = adapt(
            state.proposal,
            ravel_pytree({name: z[name] for name in self._others})[0],
            accept_prob,
            is_step=proposed.is_step,
            moved=moved,
            is_last=jnp.isin(state.i, jnp.array(self._ends, int)) & (given is None),
        )
        is_warmup = state.i < self._num_warmup
        num = jnp.where(is_warmup, state.i, state.i - self._num_warmup)
        mean = state.mean_accept_prob
        return PMMHState(
            z=z,
            rng_key=rng_key,
            i=state.i + 1,
            log_density=log_density,
            accept_prob=accept_prob,
            mean_accept_prob=(num * mean + accept_prob) / (num + 1),
            proposal=jax.tree.map(partial(jnp.where, is_warmup), adapted, state.proposal),
            info=info,
        )

    def _estimate(
        self, rng_key: jax.Array, values: _Values, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "_Estimate":
        """Draw the diffusion sites given unconstrained values of the others."""
        rest = _integrate(self.model, self._integrated)
        given = constrain_fn(rest, args, kwargs, values)
        bound, options = self._prepare(handlers.condition(self.model, given), args, kwargs)
        blocks = bind(bound)
        draws = draw_once(rng_key, blocks, options)
        evidence = sum(jnp.sum(draw.info.log_evidence) for draw in draws)
        log_density = evidence - potential_energy(rest, args, kwargs, values)
        return _Estimate(
            log_density=jnp.where(jnp.isnan(log_density), -jnp.inf, log_density),
            events=split_events(blocks, [draw.x for draw in draws]),
            info=merge_infos([draw.info for draw in draws]),
        )


class _Estimate(NamedTuple):
    log_density: jax.Array
    events: _Values
    info: ParticleInfo


class _Integrated(fix_plates):
    """Fix diffusion sites at their means, and leave out the densities that evidence replaces.

    Args:
        fn: The model.
        names: The names of the sites that depend on the diffusion sites.
    """

    def __init__(self, fn: Model, names: frozenset[str]) -> None:
        super().__init__(fn)
        self.names = names

    def process_message(self, msg: dict[str, Any]) -> None:
        super().process_message(msg)
        if msg["type"] != "sample":
            return
        mean = mean_of_latent(msg)
        if mean is None and msg["name"] not in self.names:
            return
        if not msg["is_observed"]:
            # The hidden part of an observed site has no value that matters.
            msg["value"] = jnp.zeros(msg["fn"].shape()) if mean is None else mean
            msg["is_observed"] = True
        msg["fn"] = msg["fn"].mask(False)


def _integrate(model: Model, names: frozenset[str] = frozenset()) -> Model:
    return handlers.seed(_Integrated(model, names), rng_seed=0)


def _diagonal_root(draws: jax.Array) -> jax.Array:
    """Return the deviations of draws, one where these are equal, as a diagonal matrix."""
    spread = draws - draws[0]
    largest = magnitude(spread, axis=0)
    deviation = largest[0] * jnp.std(spread / largest, axis=0)
    return jnp.diag(jnp.where(deviation > 0, deviation, 1))
