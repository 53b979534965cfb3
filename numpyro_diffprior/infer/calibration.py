r"""Simulation-based calibration of posterior draws.

Latents are drawn from the model, data given the latents, and posterior draws given the data. If
the posterior draws are exact, the rank of the truth among them is uniform, for every element of
every latent site. So is the rank of its distance to a point that does not depend on it, which
detects errors of the joint posterior that no single element shows.

References:
    Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
    arXiv 1804.06788.
    Lemos et al., *Sampling-based accuracy testing of posterior estimators for general inference*,
    ICML 2023, arXiv 2302.03026 (TARP; here the point is the truth of another simulation).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffprior._compile.arguments import (
    StaticArguments,
    merge_arguments,
    split_arguments,
)
from numpyro_diffprior._compile.bars import make_bar
from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior._compile.program import call, run, trace
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.infer.blocks import sample_blocks
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.linalg.batched import magnitude
from numpyro_diffprior.metrics.ranks import sbc_ranks, sbc_uniformity_pvalue
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.checks import check_data
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import (
    Model,
    check_names,
    complex_noise,
    fix_plates,
    is_unobserved,
)

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Calibration", "calibrate"]


class Calibration(NamedTuple):
    """Ranks of true values among posterior draws, by site.

    Attributes:
        ranks: The number of draws below the truth, element by element, integers with shape
            ``(num_simulations, *batch, *event)``; ties are broken at random.
        distance_ranks: The number of draws that are closer than the truth to another simulation's
            truth, integers with shape ``(num_simulations, *batch)``.
        num_samples: The number of draws per simulation.
    """

    ranks: dict[str, jax.Array]
    distance_ranks: dict[str, jax.Array]
    num_samples: int

    def pvalues(self, num_bins: int = 10) -> dict[str, jax.Array]:
        """Return chi-square p-values of uniform ranks, by site, with shape ``(*batch, *event)``.

        Elements of one event are not independent; with many of them some p-values are small by
        chance.
        """
        return self._test(self.ranks, num_bins)

    def distance_pvalues(self, num_bins: int = 10) -> dict[str, jax.Array]:
        """Return chi-square p-values of uniform distance ranks, by site, shape ``(*batch,)``."""
        return self._test(self.distance_ranks, num_bins)

    def coverage(self, levels: Sequence[float] = (0.5, 0.8, 0.95)) -> dict[str, jax.Array]:
        """Return the fraction of elements inside their central intervals, one for each level.

        Intervals between draws cannot have every probability: let ``num_samples + 1`` be a
        multiple of 40 for the default levels.
        """
        centered = {name: jnp.abs(2 * u - 1) for name, u in self.pit().items()}
        return {
            name: jnp.stack([jnp.mean(u <= level) for level in np.atleast_1d(levels)])
            for name, u in centered.items()
        }

    def pit(self) -> dict[str, np.ndarray]:
        """Return probability integral transforms of `ranks`, uniform on (0, 1) for exact draws."""
        # NumPy arrays, since ArviZ sorts them in place.
        return {name: np.array(self._transform(rank)) for name, rank in self.ranks.items()}

    def to_datatree(self) -> "xr.DataTree":
        """Return a group ``prior_sbc``, as simuk does, for ArviZ's ``plot_ecdf_pit``.

        It holds `pit` by site, and that of the distance ranks as ``{site}_distance``; its
        dimensions are ``chain`` (one), ``draw`` (the simulations) and a site's own.
        """
        import xarray as xr  # slow to import

        data: dict[str, Any] = {**self.pit()}
        for name, rank in self.distance_ranks.items():
            data[f"{name}_distance"] = self._transform(rank)
        arrays = {}
        for name, value in data.items():
            dims = ("chain", "draw", *(f"{name}_dim_{i}" for i in range(value.ndim - 1)))
            coords = {dim: np.arange(size) for dim, size in zip(dims, (1, *value.shape))}
            arrays[name] = xr.DataArray(np.asarray(value)[None], coords, dims)
        return xr.DataTree.from_dict({"prior_sbc": xr.Dataset(arrays)})

    def _transform(self, rank: jax.Array) -> jax.Array:
        return (rank + 0.5) / (self.num_samples + 1)

    def _test(self, ranks: dict[str, jax.Array], num_bins: int) -> dict[str, jax.Array]:
        test = partial(sbc_uniformity_pvalue, num_draws=self.num_samples, num_bins=num_bins)
        return {name: test(rank) for name, rank in ranks.items()}


def calibrate(
    rng_key: jax.Array,
    model: Model,
    prior: DiffusionPrior | Mapping[str, DiffusionPrior],
    *args: Any,
    num_simulations: int = 200,
    num_samples: int = 79,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    kernel: Callable[[Model], MCMCKernel] | None = None,
    num_warmup: int = 0,
    num_chains: int = 1,
    thinning: int = 1,
    max_batch_size: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Calibrate a sampler on simulations of the model itself.

    Args:
        rng_key: A random key.
        model: A NumPyro model.
        prior: The model's first argument.
        *args: The model's other arguments, as for inference: observed values say which sites are
            observed, and are replaced by simulated ones.
        num_simulations: The number of simulations.
        num_samples: The number of posterior draws per simulation.
        num_particles: Particles per draw, see `sample_posterior`.
        sampler: The sampler, see `sample_posterior`.
        guidance: The guidance, see `sample_posterior`.
        kernel: A function from a model to a kernel, such as ``NUTS``, to calibrate in `MCMC`
            instead of `sample_posterior`. It must sample all latent sites.
        num_warmup: The number of warm-up steps of the kernel's chains.
        num_chains: The number of the kernel's chains, run as a batch; they share the draws.
        thinning: The thinning of the kernel's draws; uniform ranks need independent draws.
        max_batch_size: The number of particles in memory at once, see `sample_posterior`.
        progress_bar: Whether to show the simulations in a terminal or a notebook, after a second.
        **kwargs: The model's keyword arguments.

    Returns:
        The ranks, see `Calibration`.

    Raises:
        ValueError: If nothing is observed, an observed site cannot be simulated,
            ``num_samples`` is not a multiple of ``num_chains``, or ``kernel`` is not a function of
            the model or comes with options of `sample_posterior`; see also `sample_posterior`.
    """
    check_names(calibrate, model, 1 + len(args), locals())
    counts = {
        "num_simulations": (num_simulations, 1),
        "num_samples": (num_samples, 1),
        "num_particles": (num_particles, 1),
        "num_warmup": (num_warmup, 0),
        "num_chains": (num_chains, 1),
        "thinning": (thinning, 1),
    }
    for name, (value, least) in counts.items():
        check_count("calibrate", name, value, least)
    limit = BatchLimit.of("calibrate", max_batch_size, default=256)
    if num_samples % num_chains:
        raise ValueError(
            f"calibrate: expected num_samples to be a multiple of num_chains = {num_chains}, got "
            f"{num_samples}."
        )
    if isinstance(kernel, MCMCKernel):
        raise ValueError(
            "calibrate: expected kernel to be a function of the model, such as "
            f"`lambda model: {type(kernel).__name__}(model, ...)`, got a kernel."
        )
    if kernel is not None and (num_particles, sampler, guidance) != (1, None, None):
        raise ValueError(
            "calibrate: num_particles, sampler and guidance are for `sample_posterior`; give "
            "them to the kernel, in the function that makes it."
        )
    arguments, static = split_arguments(((prior, *args), kwargs))
    sites = _read_sites(model, arguments, static)
    key_simulate, key_draw, key_ties = jax.random.split(rng_key, 3)

    def simulate(rng_keys: jax.Array, arguments: list[Any]) -> Any:
        args, kwargs = merge_arguments(arguments, static)
        return jax.lax.map(lambda key: _simulate(key, model, args, kwargs, sites), rng_keys)

    keys = jax.random.split(key_simulate, num_simulations)
    truth, data = call(simulate, keys, arguments)
    conditioned = _condition(model)
    if kernel is None:
        bound = read(model, (prior, *args), kwargs)
        options = resolve_options(bound.reading.sampler, num_particles, sampler, guidance)
        check_data(bound, options.sampler)

        def draw(key: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = read(conditioned, args, kwargs)  # whole plates
            draws = sample_blocks(key, bound, options, num_draws=num_samples, limit=limit)
            return draws.samples
    else:

        def draw(key: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mcmc = MCMC(
                kernel(conditioned),
                num_warmup=num_warmup,
                num_samples=num_samples // num_chains * thinning,
                num_chains=num_chains,
                chain_method=jax.vmap,  # which Gibbs takes, too
                thinning=thinning,
                progress_bar=False,
            )
            mcmc.run(key, *args, **kwargs)
            draws = mcmc.get_samples()
            return {name: draws[name] for name in truth}

    def draw_all(
        rng_keys: jax.Array, data: dict[str, jax.Array], arguments: list[Any]
    ) -> dict[str, jax.Array]:
        (prior, *args), kwargs = merge_arguments(arguments, static)

        def draw_one(inputs: tuple[jax.Array, dict[str, jax.Array]]) -> dict[str, jax.Array]:
            key, values = inputs
            return draw(key, (prior, values, *args), kwargs)

        return jax.lax.map(draw_one, (rng_keys, data))

    keys = jax.random.split(key_draw, num_simulations)
    with make_bar("calibrate", progress_bar, num_simulations, delay=1) as bar:
        samples = _map_in_parts(draw_all, (keys, data), arguments, bar.update)
    ranks = {
        name: sbc_ranks(samples[name], truth[name], rng_key=key)
        for name, key in zip(truth, jax.random.split(key_ties, len(truth)), strict=True)
    }
    distance_ranks = {
        name: _distance_ranks(samples[name], truth[name], event_dim)
        for name, event_dim in sites.event_dims
    }
    return Calibration(ranks, distance_ranks, num_samples)


_MAX_PARTS = 16


def _map_in_parts(
    f: Callable[..., dict[str, jax.Array]],
    inputs: Any,
    arguments: list[Any],
    on_part: Callable[[int], Any],
) -> dict[str, jax.Array]:
    """Apply a function of inputs and arguments to parts of equal size along the inputs' axis.

    It is traced once; ``on_part`` takes the size of each part. The last part is filled up with
    the last input.
    """
    num_inputs = len(jax.tree.leaves(inputs)[0])
    size = -(-num_inputs // _MAX_PARTS)
    traced, results = None, []
    for start in range(0, num_inputs, size):
        index = np.minimum(np.arange(start, start + size), num_inputs - 1)
        part = jax.tree.map(lambda x, index=index: x[index], inputs)
        if traced is None:
            traced = trace(f, *part, arguments)
        leaves = jax.tree.leaves((part, arguments))
        flat = run(traced.program, *traced.data, *leaves)
        results.append(jax.block_until_ready(jax.tree.unflatten(traced.treedef, flat)))
        on_part(min(size, num_inputs - start))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:num_inputs], *results)


class _Sites(NamedTuple):
    """The observed and the latent sites of a trace; static."""

    observed: tuple[str, ...]
    event_dims: tuple[tuple[str, int], ...]


def _read_sites(model: Model, arguments: list[Any], static: StaticArguments) -> _Sites:
    """Find the sites of a model by running it on shapes."""
    sites: list[_Sites] = []

    def run(arguments: list[Any]) -> None:
        args, kwargs = merge_arguments(arguments, static)
        with fix_plates(), handlers.seed(rng_seed=0):
            sites.append(_find_sites(handlers.trace(model).get_trace(*args, **kwargs)))

    jax.eval_shape(run, arguments)
    return sites[0]


def _find_sites(trace: Mapping[str, Any]) -> _Sites:
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    observed = tuple(name for name, site in sites.items() if site["is_observed"])
    if not observed:
        raise ValueError(
            "calibrate: the model has no observed site; pass its observed values, which simulated "
            "ones replace."
        )
    factors = sorted(name for name in observed if isinstance(sites[name]["fn"], dist.Unit))
    if factors:
        raise ValueError(
            f"calibrate: the sites {factors} are factors, from which no data can be simulated."
        )
    event_dims = tuple(
        (name, site["fn"].event_dim)
        for name, site in sites.items()
        if name not in observed and not is_unobserved(name, trace)
    )
    return _Sites(observed, event_dims)


def _condition(model: Model) -> Model:
    """Return the model with the values of its observed sites as second argument."""

    def conditioned(prior: Any, data: Mapping[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        with handlers.condition(data=dict(data)):
            return model(prior, *args, **kwargs)

    return conditioned


def _simulate(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: _Sites,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Draw latents and data with whole plates."""
    with complex_noise(), fix_plates(), handlers.seed(rng_seed=rng_key):
        trace = handlers.trace(handlers.uncondition(model)).get_trace(*args, **kwargs)
    truth = {name: trace[name]["value"] for name, _ in sites.event_dims}
    return truth, {name: trace[name]["value"] for name in sites.observed}


def _distance_ranks(samples: jax.Array, truth: jax.Array, event_dim: int) -> jax.Array:
    """Count the draws that are closer than the truth to the next simulation's truth."""
    point = jnp.roll(truth, 1, axis=0)
    axes = tuple(range(-event_dim, 0))
    unit = magnitude(truth)
    distances = jnp.square((samples - point[:, None]) / unit).sum(axes)
    return sbc_ranks(distances, jnp.square((truth - point) / unit).sum(axes))
