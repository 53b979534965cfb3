r"""The power of stationary events, from linear observations of the events alone.

Fields :math:`x \sim \mathcal{N}(\mu, \Sigma)` with a :class:`Stationary` covariance have the power
:math:`P_k` in the coefficient :math:`c_k` of their expansion. Observations determine the share
:math:`\gamma_k` of it: posterior means :math:`\hat{c}_k` of fields that follow this Gaussian have
the mean square :math:`\gamma_k P_k`. EM replaces the power by
:math:`(1 - \gamma_k) P_k + |\hat{c}_k|^2`, a step that is too short by the share. Here the new
power is :math:`|\hat{c}_k|^2 / \gamma_k`, MacKay's fixed point, which is EM's too.

Near it the steps do not overshoot. With :math:`0 \le R \le I` the part of white fields that is
observed, they have the Jacobian :math:`I - \gamma^{-1} J` where :math:`J_{kl} = |R_{kl}|^2`. A row
of :math:`J` has the sum :math:`(R^2)_{kk} \le R_{kk} = \gamma_k`, so that the eigenvalues of
:math:`\gamma^{-1} J` are between 0 and 1. The shares are estimated from draws, exactly if each
coefficient is either seen or not; later steps become shorter, to average over their errors.

The mean goes along :math:`\hat{c}_k / \gamma_k` in the same way, to the largest likelihood in this
direction: there a full step can overshoot, where all events hide the same.

References:
    MacKay, *Bayesian interpolation*, Neural Computation 4, 1992, Sec. 4 (the fixed point).
    Robbins and Monro, *A stochastic approximation method*, Annals of Mathematical Statistics 22,
    1951 (steps that become shorter).
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.em.draws import replace_non_finite
from numpyro_diffprior.em.e_step import EStep
from numpyro_diffprior.em.initial import (
    Gaussian,
    GaussianStart,
    fit_by_sampling,
    with_gaussians,
)
from numpyro_diffprior.em.m_step import summarize
from numpyro_diffprior.em.restoration import block_key, restore_linear_gaussian
from numpyro_diffprior.em.sites import Priors, Sites, pool, with_network
from numpyro_diffprior.infer.blocks import block_size
from numpyro_diffprior.linalg.empirical import StationaryLowRankSummary, StationarySummary
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.reading.model import BoundModel, GroupReading
from numpyro_diffprior.reading.parts import load_some
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import Model

__all__ = ["fit_stationary", "has_power"]

_SHARE_OF_POWER = 4  # one of so many iterations is for the power alone
_NUM_FULL = 4  # iterations before steps become shorter
_LEAST_SHARE = 0.01  # that a step is divided by


def has_power(model: BoundModel, start: GaussianStart) -> bool:
    """Whether `fit_stationary` fits: to linear models with stationary summaries."""
    is_stationary = isinstance(start.summary, StationarySummary | StationaryLowRankSummary)
    return is_stationary and model.reading.linear


def fit_stationary(
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
    """Fit stationary Gaussians; with factors, first the power alone and then both, by draws."""
    options = (e_step, params, mesh)
    if isinstance(start.summary, StationarySummary):
        return _fit_power(rng_key, model, arguments, priors, sites, start, *options)
    assert isinstance(start.summary, StationaryLowRankSummary)
    key_power, key_draws = jax.random.split(rng_key)
    num = start.num_iterations // _SHARE_OF_POWER
    if num > 0:
        summary = StationarySummary(start.summary.num_axes)
        only = replace(start, num_iterations=num, summary=summary)
        fitted = _fit_power(key_power, model, arguments, priors, sites, only, *options)
        priors = with_gaussians(priors, fitted)
    rest = replace(start, num_iterations=start.num_iterations - num)
    return fit_by_sampling(key_draws, model, arguments, priors, sites, rest, *options)


def _fit_power(
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
    """Fit stationary Gaussians to a linear model, from power that is the same everywhere.

    Of large plates, some events take part. Priors without a network stay as they are.
    """
    assert isinstance(start.summary, StationarySummary)
    learned = with_network(priors)
    fitted: dict[str, Any] = {
        key: (prior.denoiser.mean, _white(prior.denoiser, start.summary.num_axes))
        for key, prior in learned.items()
    }
    args, kwargs = arguments
    first = sites.as_passed(with_gaussians(priors, fitted))
    size = block_size(e_step.max_particles, 1, e_step.limit, mesh)
    bound = read(model, (first, *args), kwargs, block_size=size, mesh=mesh, params=params)
    bound = load_some(bound, start.max_events, mesh)

    def restore(gaussians: dict[str, Any], rng_key: jax.Array | None) -> dict[str, Any]:
        """Return the parts of restored events by prior, with shape ``(n, *event)``."""
        current = with_gaussians(priors, gaussians)
        rebound = bound.with_first_argument(sites.as_passed(current))
        parts = _restore(rng_key, rebound, start.max_events)
        parts = [replace_non_finite(part, {}, current, sites)[0] for part in parts]
        return {
            name: [
                prior.denoiser.from_data(pool(part, sites, name, prior.event_shape))
                for part in parts
            ]
            for name, prior in learned.items()
        }

    for i, key in enumerate(jax.random.split(rng_key, start.num_iterations)):
        steps = {
            name: _find_step(*fitted[name], *parts) for name, parts in restore(fitted, key).items()
        }
        moved = {name: (mean + steps[name].shift, cov) for name, (mean, cov) in fitted.items()}
        moved_steps = {
            name: (*moved[name], steps[name], observed)
            for name, (observed,) in restore(moved, None).items()
        }
        slopes = [_slopes(*given) for given in moved_steps.values()]
        before, after = (sum(slope) for slope in zip(*slopes, strict=True))
        # Between these points the slope of the log-likelihood is linear.
        fall = jnp.where(before > after, before - after, 1)
        length = jnp.where(before > after, before / fall, 0)
        fraction = jnp.minimum(1, _NUM_FULL / (i + 1))
        fitted = {
            name: summarize(_fields(*given, length, fraction), start.summary)
            for name, given in moved_steps.items()
        }
    return fitted


class _Step(NamedTuple):
    r"""What restored events say of a stationary Gaussian.

    Attributes:
        share: :math:`\gamma`, with shape ``(d,)``.
        shift: The direction of the mean, with shape ``event_shape``.
        observed: The posterior means minus the Gaussian's, with shape ``(n, d)``.
        simulated: Draws of the Gaussian minus their mean, with the same shape.
    """

    share: jax.Array
    shift: jax.Array
    observed: jax.Array
    simulated: jax.Array


@jax.jit
def _find_step(
    mean: jax.Array,
    cov: Stationary,
    observed: jax.Array,
    simulated: jax.Array,
    restored: jax.Array,
) -> _Step:
    observed, simulated, restored = (_flat(x - mean) for x in (observed, simulated, restored))
    waves = cov.waves(simulated)
    seen = (waves.conj() * cov.waves(restored)).real.sum(0)
    share = jnp.clip(seen / jnp.square(jnp.abs(waves)).sum(0), 0, 1)
    shift = cov.filter(1 / jnp.maximum(share, _LEAST_SHARE), observed.mean(0))
    # Centered, so that they add to the power alone.
    return _Step(share, shift.reshape(mean.shape), observed, simulated - simulated.mean(0))


@jax.jit
def _slopes(
    mean: jax.Array, cov: Stationary, step: _Step, observed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the slopes of the log-likelihood before the shift of the mean, and after it."""
    direction = cov.solve(step.shift.ravel())
    before, after = step.observed, _flat(observed - mean)
    return (direction * before).sum(), (direction * after).sum()


@jax.jit
def _fields(
    mean: jax.Array,
    cov: Stationary,
    step: _Step,
    observed: jax.Array,
    length: jax.Array,
    fraction: jax.Array,
) -> jax.Array:
    """Return fields whose stationary Gaussian is the next one, two for each event.

    Simulated power is added to them with both signs, so that it is not correlated with the rest.

    Args:
        mean: The mean after the shift.
        cov: The covariance.
        step: The step.
        observed: The posterior means after the shift, with shape ``(n, *event)``.
        length: How much of the shift is made.
        fraction: How much of the way to the new power is made.
    """
    shift = step.shift.ravel()
    # Posterior means are affine in the Gaussian's.
    before, after = step.observed, _flat(observed - mean)
    deviation = before + length * (after - before)
    average = deviation.mean(0)
    share = jnp.maximum(step.share, _LEAST_SHARE) / fraction
    seen = cov.filter(jax.lax.rsqrt(share), deviation - average)
    added = cov.filter(jnp.sqrt(1 - step.share / share), step.simulated)
    # The summary divides their squares by 2 n - 1 instead of 2 (n - 1).
    num = len(seen)
    pairs = ((num - 0.5) / max(num - 1, 1)) ** 0.5 * jnp.concatenate([seen + added, seen - added])
    pairs += mean.ravel() + (length - 1) * shift + average
    return pairs.reshape(-1, *mean.shape)


def _white(denoiser: Denoiser, num_axes: int) -> Stationary:
    """Return the covariance of the same mean variance in all frequencies and channels."""
    grid = denoiser.event_shape[:num_axes]
    num_channels = prod(denoiser.event_shape[num_axes:])
    power = jnp.full(denoiser.event_size, denoiser.cov.diagonal().mean(), denoiser.dtype)
    return Stationary(power, jnp.eye(num_channels, dtype=denoiser.dtype), grid)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


@partial(jax.jit, static_argnums=2)
def _restore(
    rng_key: jax.Array | None, model: BoundModel, max_events: int
) -> list[dict[str, jax.Array]]:
    """Return the parts of restored events, by site; only the first one without a key."""
    found: list[dict[str, jax.Array]] = [{}, {}, {}]
    for i, group in enumerate(model.reading.groups):

        def restore(indices: dict[str, jax.Array], group: GroupReading = group, i: int = i) -> Any:
            block = group.bind(model.data, indices)
            parts = restore_linear_gaussian(
                None if rng_key is None else block_key(rng_key, i, indices),
                block.denoiser,
                block.likelihood,
            )
            return [group.latents.split(block.denoiser, x) for x in parts if x is not None]

        for part, own in zip(found, group.over_blocks(restore, group.some_blocks(max_events))):
            part.update(own)
    return [part for part in found if part]
