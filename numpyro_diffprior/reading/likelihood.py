r"""From the observed sites of a NumPyro model to a likelihood.

Every observed site that depends on the latent is read: mean and covariance of the observed values
for guidance (`gaussian_moments`), or gradient and curvature of the log-density where there are
none (`reading.curvature`); the exact log-density for weights; masks; and the factor of
`numpyro.handlers.scale`. Values that were put through a fixed transformation, as those of a
`LogNormal`, are transformed back. The trace is made anew inside whatever is compiled, so means may
be any JAX function of the latent. A subsampled plate's factor does not touch what is local to the
plate.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers

from numpyro_diffprior._compile.dependence import depends
from numpyro_diffprior.guidance.likelihood import Likelihood, Reading
from numpyro_diffprior.linalg.covariances import Blocks, Covariance, Dense, Diagonal, Repeated
from numpyro_diffprior.reading.curvature import from_log_prob, pseudo_observe
from numpyro_diffprior.reading.latent import LatentSite
from numpyro_diffprior.reading.moments import gaussian_moments
from numpyro_diffprior.reading.observed import ObservedSite, find_observed_sites, trace_at
from numpyro_diffprior.reading.unwrap import log_density, peel, unwrap

__all__ = ["observed_log_density", "read_likelihood"]


def read_likelihood(bound: Callable[[], Any], latent: LatentSite) -> Likelihood:
    """Read what the observed sites of a bound model say about its latent site.

    Raises:
        ValueError: If no observed site depends on the latent, if one cannot be read, if in a plate
            one depends on other elements than its own, or if concrete data hold NaN outside the
            masks or noise without variance.
    """
    template = jnp.broadcast_to(latent.prior.mean, latent.shape)
    sites = find_observed_sites(bound, latent, template)
    if not sites:
        raise ValueError(
            f"no observed site depends on the latent site {_quote(latent)}; pass the data that "
            "the model observes."
        )

    def read_all(x: jax.Array) -> tuple[Reading, jax.Array]:
        trace = trace_at(bound, latent, x)
        parts = []
        for site in sites:
            if site.by == "event":
                parts.append(_read_potential(bound, site.name, latent, x))
            else:
                parts.append(_read_site(site, trace, latent))
        means, noises, values, masks = zip(*parts, strict=True)
        noise = noises[0] if len(noises) == 1 else Blocks(noises)
        mean, value, visible = (jnp.concatenate(p, axis=-1) for p in (means, values, masks))
        # All in the events' floating type, whatever type the model's constants bring in.
        mean, noise, value = jax.tree.map(lambda a: a.astype(x.dtype), (mean, noise, value))
        return Reading(mean, noise, value), visible

    def log_prob(x: jax.Array) -> jax.Array:
        trace = trace_at(bound, latent, x)
        parts = [_log_prob_by_event(site.name, trace, latent) for site in sites]
        return jnp.stack(parts).sum(0).astype(x.dtype)

    (_, noise, y), visible = read_all(template)
    names = [site.name for site in sites]
    _check_data(names, y, noise)
    if not isinstance(y, jax.core.Tracer):
        _check_uncoupled(names, log_prob, template, latent)
    linear = _is_linear(lambda x: read_all(x)[0], template)

    def read(x: jax.Array) -> Reading:
        reading = _over_extra_axes(lambda v: read_all(v)[0], x, latent)
        return Reading(reading.y_hat, noise, y) if linear else reading

    return Likelihood(
        y,
        read,
        lambda x: _over_extra_axes(log_prob, x, latent),
        latent.prior.event_shape,
        linear,
        visible,
    )


def observed_log_density(bound: Callable[[], Any], values: Mapping[str, jax.Array]) -> jax.Array:
    """Return the log-density of all observed sites of a bound model, scaled to whole plates."""
    trace = handlers.trace(handlers.substitute(bound, data=dict(values))).get_trace()
    total = jnp.zeros(())
    for site in trace.values():
        if site["type"] == "sample" and site["is_observed"]:
            scale = 1.0 if site["scale"] is None else site["scale"]
            total = total + jnp.sum(scale * log_density(site["fn"], site["value"]))
    return total


def _quote(latent: LatentSite) -> str:
    return " and ".join(f"'{name}'" for name in latent.names)


_SiteReading = tuple[jax.Array, Covariance, jax.Array, jax.Array]


def _read_site(
    observed: ObservedSite, trace: Mapping[str, Any], latent: LatentSite
) -> _SiteReading:
    """Return a site's mean, noise and value without hidden entries, and which are visible."""
    site = trace[observed.name]
    fn, value = site["fn"], jnp.asarray(site["value"])
    if observed.is_peeled:
        fn, value = peel(fn, value)
    scale = _local_scale(site, trace, latent)
    directions = None
    if observed.by == "moments":
        moments = gaussian_moments(fn)
        assert moments is not None
        mean, cov, mask = moments.mean, moments.cov, moments.mask
        if moments.full:
            directions = cov
        if moments.transform is not None:
            value = moments.transform(value)
        value = value.reshape(mean.shape)
    else:
        base = unwrap(fn)
        if observed.by == "gradient":
            log_prob = jnp.broadcast_to(base.fn.log_prob(value), base.batch_shape)[..., None]
            mean, value, cov = log_prob, log_prob + 1, jnp.ones_like(log_prob)
        else:
            mean, value, cov, directions = pseudo_observe(
                base.fn, base.batch_shape, value, observed.depends
            )
        mask = base.mask if isinstance(base.mask, bool) else base.mask[..., None]
        if mean.shape[-1] == 1:
            directions = None
    mask = jnp.broadcast_to(mask, mean.shape)

    def by_event(array: jax.Array) -> jax.Array:
        return _by_event(array, fn.batch_shape, latent)

    def flat(array: jax.Array) -> jax.Array:
        return by_event(array).reshape(*latent.batch_shape, -1)

    def scaled(array: jax.Array) -> jax.Array:
        if isinstance(scale, float):
            return array / scale
        own = jnp.broadcast_to(scale, fn.batch_shape)
        return array / own.reshape(*fn.batch_shape, *(1,) * (array.ndim - len(fn.batch_shape)))

    seen = flat(jnp.where(mask, mean, 0)), flat(jnp.where(mask, value, 0)), flat(mask)
    if directions is None:
        return seen[0], Diagonal(flat(jnp.where(mask, scaled(cov), 1))), seen[1], seen[2]
    size = mean.shape[-1]
    identity = jnp.eye(size, dtype=mean.dtype)
    if observed.by == "moments":
        pairs = mask[..., :, None] & mask[..., None, :]
        matrix = by_event(jnp.where(pairs, scaled(cov), identity))
        block = Dense.from_matrix(matrix.reshape(*latent.batch_shape, -1, size, size))
    else:
        variances = by_event(jnp.where(mask, scaled(cov), 1))
        directions = by_event(jnp.where(mask[..., None], directions, identity))
        block = Dense(
            variances.reshape(*latent.batch_shape, -1, size),
            directions.reshape(*latent.batch_shape, -1, size, size),
        )
    return seen[0], Repeated(block, block.eigenvalues.shape[-2]), seen[1], seen[2]


def _read_potential(
    bound: Callable[[], Any], name: str, latent: LatentSite, x: jax.Array
) -> _SiteReading:
    """Read a log-density as an observation of the event itself."""
    theta = x.reshape(*latent.batch_shape, -1)

    def log_prob(theta: jax.Array) -> jax.Array:
        trace = trace_at(bound, latent, theta.reshape(x.shape))
        site = trace[name]
        mask, event_dim = unwrap(site["fn"]).mask, unwrap(site["fn"]).fn.event_dim
        if not isinstance(mask, bool):
            # What is hidden may be NaN, which derivatives do not bear.
            mask = mask.reshape(*mask.shape, *(1,) * event_dim)
            site["value"] = jnp.where(mask, site["value"], 0)
        return _log_prob_by_event(name, trace, latent)

    pseudo = from_log_prob(log_prob, theta)
    assert pseudo.directions is not None
    visible = jnp.ones(theta.shape, bool)
    return theta, Dense(pseudo.variances, pseudo.directions), pseudo.y, visible


def _log_prob_by_event(name: str, trace: Mapping[str, Any], latent: LatentSite) -> jax.Array:
    site = trace[name]
    fn = site["fn"]
    scaled = _local_scale(site, trace, latent) * log_density(fn, site["value"])
    by_event = _by_event(scaled, fn.batch_shape, latent)
    return by_event.reshape(*latent.batch_shape, -1).sum(-1)


def _local_scale(
    site: Mapping[str, Any], trace: Mapping[str, Any], latent: LatentSite
) -> jax.Array | float:
    """Return a site's scale without the factors of the latent's own subsampled plates."""
    scale = 1.0 if site["scale"] is None else site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.name in latent.plates:
            scale = scale * frame.size / trace[frame.name]["args"][0]
    return scale


def _by_event(array: jax.Array, batch_shape: tuple[int, ...], latent: LatentSite) -> jax.Array:
    """Move an observed site's own axes behind those of the latent's batch.

    Batch axes align from the right. Where the latent has an axis of one, the site's own axis
    there (a further plate) belongs to the event as well.
    """
    rank = len(latent.batch_shape)
    array = array.reshape((1,) * max(rank - len(batch_shape), 0) + array.shape)
    own = max(len(batch_shape) - rank, 0)
    array = jnp.moveaxis(array, range(own), range(rank, rank + own))
    for axis, size in enumerate(latent.batch_shape):
        if size == 1 and array.shape[axis] != 1:
            array = jnp.expand_dims(jnp.moveaxis(array, axis, rank - 1), axis)
    return array


def _over_extra_axes(f: Callable[[jax.Array], Any], x: jax.Array, latent: LatentSite) -> Any:
    """Apply a function of the site's value to draws or particles of it."""
    extra = x.shape[: x.ndim - len(latent.shape)]
    if not extra:
        return f(x)
    out = jax.vmap(f)(x.reshape(prod(extra), *latent.shape))
    return jax.tree.map(lambda leaf: leaf.reshape(*extra, *leaf.shape[1:]), out)


def _is_linear(read: Callable[[jax.Array], Reading], x: jax.Array) -> bool:
    """Whether the mean's derivative, noise and values do not depend on ``x``."""

    def derivative(x: jax.Array, v: jax.Array) -> tuple[jax.Array, Covariance, jax.Array]:
        _, tangent = jax.jvp(lambda x: read(x).y_hat, (x,), (v,))
        _, noise, y = read(x)
        return tangent, noise, y

    return not any(jax.tree.leaves(depends(derivative, x, x, on=[0])))


def _check_data(names: list[str], y: jax.Array, noise: Covariance) -> None:
    """Refuse NaN and singular noise where the values are there to be looked at."""
    if isinstance(y, jax.core.Tracer):
        return
    variance = noise.diagonal()
    if isinstance(variance, jax.core.Tracer):
        return
    if not bool(jnp.all(jnp.isfinite(y))):
        raise ValueError(
            f"the observed values of {names} hold NaN or infinities where they are not masked; "
            "mask them with `.mask(...)` on the site's distribution."
        )
    if not bool(jnp.all(variance > 0)):
        raise ValueError(
            f"the noise of {names} has no variance somewhere; expected a positive scale."
        )


def _check_uncoupled(
    names: list[str],
    log_prob: Callable[[jax.Array], jax.Array],
    template: jax.Array,
    latent: LatentSite,
) -> None:
    """Refuse sites that look at other elements of their plates: events are drawn apart.

    Half of the events move; the log-density of the others must not.
    """
    num = prod(latent.batch_shape)
    if num == 1:
        return
    key_half, key_size, key_step = jax.random.split(jax.random.key(0), 3)
    moves = (jax.random.permutation(key_half, num) < num // 2).reshape(latent.batch_shape)
    event_axes = tuple(range(-len(latent.prior.event_shape), 0))
    # In one direction, to different lengths: random numbers for all elements would take longer.
    length = jax.random.normal(key_size, latent.batch_shape, template.dtype)
    direction = jax.random.normal(key_step, latent.prior.event_shape, template.dtype)
    step = latent.prior.denoiser.scale * jnp.expand_dims(length, event_axes) * direction
    further = jnp.expand_dims(moves, event_axes) * step
    before, after = log_prob(template + step), log_prob(template + step + further)
    if isinstance(before, jax.core.Tracer):  # of an argument other than the observed values
        return
    tol = jnp.finfo(template.dtype).eps ** 0.5
    if not jnp.allclose(before[~moves], after[~moves], rtol=tol, atol=tol, equal_nan=True):
        raise ValueError(
            f"in the plates {list(latent.plates)} an observed site of {names} depends on other "
            f"elements of {_quote(latent)} than its own; take that site out of the plate, so that "
            "whole plates become one event."
        )
