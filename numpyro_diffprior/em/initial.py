"""The first priors: Gaussians fitted to the observations."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count, check_number, set_fields
from numpyro_diffprior.denoisers.denoiser import Denoiser, choose_unit
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion.samplers import MultistepSDE
from numpyro_diffprior.em.draws import replace_non_finite
from numpyro_diffprior.em.e_step import EStep, draw_events
from numpyro_diffprior.em.gaussian import MAX_DENSE, fit_gaussian
from numpyro_diffprior.em.m_step import summarize
from numpyro_diffprior.em.restoration import block_key, draw_linear_gaussian
from numpyro_diffprior.em.sites import Priors, Sites, pool, with_network
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import block_size
from numpyro_diffprior.linalg.covariances import Covariance
from numpyro_diffprior.linalg.empirical import GaussianSummary, LowRankSummary
from numpyro_diffprior.reading.model import BoundModel, GroupReading, spaced
from numpyro_diffprior.reading.parts import load_elements, load_some
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import Model

__all__ = [
    "Gaussian",
    "GaussianStart",
    "blank_gaussian",
    "choose_units",
    "fit_by_sampling",
    "fit_in_closed_form",
    "has_closed_form",
    "with_gaussians",
]


@jax.tree_util.register_static
@dataclass(frozen=True)
class GaussianStart:
    """How `EM` starts: from the Gaussian of maximum marginal likelihood; static.

    Args:
        num_iterations: The number of EM iterations of its fit.
        summary: The form of the Gaussians, in M-steps too.
        max_events: The number of events, evenly spaced, from which the Gaussians are fitted.
            Events that are in memory together all take part, and so do all events in E-steps.
        shrinkage: The strength, in a number of events, with which dense covariances are shrunk to
            their own variances with stationary correlations. By default, it is zero if there are
            16 events or more per element; of fewer, it and the number of iterations (up to
            ``num_iterations``) are those of the greatest log-evidence of held-out events.
    """

    num_iterations: int = 32
    summary: GaussianSummary = LowRankSummary()
    max_events: int = 4096
    shrinkage: float | None = None

    def __post_init__(self) -> None:
        count = check_count("GaussianStart", "num_iterations", self.num_iterations)
        set_fields(self, num_iterations=count)
        set_fields(self, max_events=check_count("GaussianStart", "max_events", self.max_events))
        if self.shrinkage is not None:
            strength = check_number("GaussianStart", "shrinkage", self.shrinkage, inclusive=True)
            set_fields(self, shrinkage=strength)
        if not isinstance(self.summary, GaussianSummary):
            raise ValueError(
                f"GaussianStart: expected a Gaussian summary, got {self.summary!r}; pass an "
                "object such as LowRankSummary(rank=32)."
            )


Gaussian = tuple[jax.Array, Covariance]


def blank_gaussian(denoiser: Denoiser, summary: GaussianSummary) -> Gaussian:
    """Return a Gaussian of the form of a summary, all of whose numbers are one."""
    events = jax.ShapeDtypeStruct((2, *denoiser.event_shape), denoiser.dtype)
    form = jax.eval_shape(summary, events)
    blank: Gaussian = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), form)
    return blank


def has_closed_form(model: BoundModel, start: GaussianStart) -> bool:
    """Whether the iterations of the Gaussian fit have a closed form that takes no large matrices.

    They do for one site in one plate with linear Gaussian observations, if events are small or
    the likelihood is elementwise, and the covariance is dense or has low rank.
    """
    groups = model.reading.groups
    if len(groups) > 1 or not isinstance(start.summary, LowRankSummary):
        return False
    (group,) = groups
    latents = group.latents
    if not (group.linear and len(latents.names) == 1 and len(latents.plates) == 1):
        return False
    return latents.event_size <= MAX_DENSE or group.elementwise


def fit_in_closed_form(
    model: BoundModel, start: GaussianStart, mesh: Mesh | None = None
) -> Gaussian:
    """Fit a Gaussian to linear Gaussian observations of one site."""
    assert isinstance(start.summary, LowRankSummary)
    (group,) = model.reading.groups
    (plate,) = group.latents.plates

    # The elements of a plate that is not divided are read together.
    num_events = plate.size if group.divided is None else min(plate.size, start.max_events)
    elements = spaced(num_events, plate.size)
    model, chosen = load_elements(model, {plate.name: elements}, mesh), jnp.asarray(elements)

    def read_block(index: jax.Array) -> Likelihood:
        return group.bind(model.data, {plate.name: chosen[index]}).likelihood

    fit = fit_gaussian(
        read_block,
        num_events,
        event_shape=group.latents.sites[0].event_shape,
        batch_size=model.reading.blocks.get(plate.name, num_events),
        num_iterations=start.num_iterations,
        rank=start.summary.rank,
        shrinkage=start.shrinkage,
        dtype=model.reading.dtype,
    )
    return fit.mean, fit.cov


def choose_units(
    model: BoundModel, priors: Priors, sites: Sites, start: GaussianStart, mesh: Mesh | None
) -> Priors:
    """Return the priors with units near the scale of their events, for linear models.

    The scale is that of events whose observations, without noise, would have the size of the
    observed values.
    """
    chosen = dict(priors)
    scales = _scales(load_some(model, start.max_events, mesh), start.max_events)
    for site, key in sites.site_priors:
        if site in scales and key in with_network(priors):
            denoiser: Any = priors[key].denoiser
            unit = choose_unit(scales[site].astype(denoiser.dtype), denoiser.unit)
            if unit != denoiser.unit:
                own = denoiser.with_gaussian(denoiser.mean, denoiser.cov, unit)
                chosen[key] = priors[key].replace_denoiser(own)
    return chosen


@partial(jax.jit, static_argnums=1)
def _scales(model: BoundModel, max_events: int) -> dict[str, jax.Array]:
    """Return the scales of the events of linear models, by site, in the data's units."""
    scales: dict[str, jax.Array] = {}
    for group in model.reading.groups:
        if not group.linear:
            continue

        def sizes(indices: dict[str, jax.Array], group: GroupReading = group) -> Any:
            block, latents = group.bind(model.data, indices), group.latents
            zero = jnp.zeros_like(block.mean)
            local = block.likelihood.linearize(zero)
            deviation = jnp.sqrt(local.noise.diagonal())
            events = latents.split(block.denoiser, zero)
            gains = {}
            for name, x in events.items():
                signs = jax.random.rademacher(jax.random.key(0), x.shape, x.dtype)
                gain = local.matvec(latents.join(block.denoiser, events | {name: signs}))
                gains[name] = _log_size(gain / deviation)
            return _log_size(local.residual / deviation), gains

        (total, count), gains = group.over_blocks(sizes, group.some_blocks(max_events))
        # In logarithms, since squares may over- or underflow.
        observed = total.sum() / count.sum()
        for name, (total, count) in gains.items():
            scales[name] = jnp.exp(observed - total.sum() / count.sum())
    return scales


def _log_size(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the logarithms of the values that are not zero, and how many there are."""
    size = jnp.abs(values)
    seen = size > 0
    return jnp.where(seen, jnp.log(jnp.where(seen, size, 1)), 0).sum(-1), seen.sum(-1)


def fit_by_sampling(
    rng_key: jax.Array,
    model: Model,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    priors: Priors,
    sites: Sites,
    start: GaussianStart,
    e_step: EStep,
    params: dict[str, jax.Array],
    mesh: Mesh | None,
) -> dict[str, Gaussian]:
    """Fit Gaussians to posterior draws repeatedly, starting from the priors' own.

    Of large plates, some events are drawn. Draws are exact if the model is linear. Otherwise they
    are those of the E-step, of which sampler and guidance are replaced. Priors without a network
    stay as they are.
    """
    # Of second order: the shrinkage of a first-order sampler would build up over the fits.
    own = e_step.sampler or next(iter(priors.values())).sampler
    e_step = replace(
        e_step,
        num_draws=1,
        draws_in="device",
        sampler=MultistepSDE(own.num_steps),
        guidance=MMPS(GaussianCovariance()),
    )
    fitted = {
        key: (prior.denoiser.mean, prior.denoiser.cov)
        for key, prior in with_network(priors).items()
    }
    args, kwargs = arguments
    size = block_size(e_step.max_particles, 1, e_step.limit, mesh)
    bound: BoundModel | None = None
    structure, is_linear = None, False
    for key in jax.random.split(rng_key, start.num_iterations):
        current = with_gaussians(priors, fitted)
        passed = sites.as_passed(current)
        if bound is None or structure != jax.tree.structure(passed):
            # Covariances fitted to draws may have another form than the initial ones.
            bound = read(model, (passed, *args), kwargs, block_size=size, mesh=mesh, params=params)
            structure = jax.tree.structure(passed)
            is_linear = bound.reading.linear
            chosen = {
                i: some.ravel()
                for i, group in enumerate(bound.reading.groups)
                if (some := group.some_blocks(start.max_events)) is not None
            }
            if is_linear:
                bound = load_some(bound, start.max_events, mesh)
        else:
            bound = bound.with_first_argument(passed)
        draws, _ = replace_non_finite(
            _draw_linear(key, bound, start.max_events)
            if is_linear
            else draw_events(key, bound, e_step, mesh, chosen=chosen).samples,
            {},
            current,
            sites,
        )
        fitted = {
            name: summarize(
                prior.denoiser.from_data(pool(draws, sites, name, prior.event_shape)),
                start.summary,
            )
            for name, prior in with_network(priors).items()
        }
    return fitted


@partial(jax.jit, static_argnums=2)
def _draw_linear(rng_key: jax.Array, model: BoundModel, max_events: int) -> dict[str, jax.Array]:
    """Draw events of a linear model with Gaussian priors, by site; some blocks of large plates."""
    samples: dict[str, jax.Array] = {}
    for i, group in enumerate(model.reading.groups):

        def draw(indices: dict[str, jax.Array], group: GroupReading = group, i: int = i) -> Any:
            block = group.bind(model.data, indices)
            key = block_key(rng_key, i, indices)
            x = draw_linear_gaussian(key, block.denoiser, block.likelihood)
            return group.latents.split(block.denoiser, x)

        samples |= group.over_blocks(draw, group.some_blocks(max_events))
    return samples


def with_gaussians(priors: Priors, fitted: dict[str, Gaussian]) -> Priors:
    """Return the priors, with Gaussians in place of those that are learned."""
    current = dict(priors)
    for key, (mean, cov) in fitted.items():
        own = priors[key].denoiser
        net = _ZeroNetwork(own.event_shape, own.context_shape)
        current[key] = priors[key].replace_denoiser(NetworkDenoiser(net, mean, cov, unit=own.unit))
    return current


@jax.tree_util.register_static
@dataclass(frozen=True)
class _ZeroNetwork:
    """A network of zero output, with which a denoiser is its Gaussian in every context."""

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
