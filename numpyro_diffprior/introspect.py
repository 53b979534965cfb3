r"""From a NumPyro model to a likelihood.

The model is traced with the latent site's value put in, and every observed site that depends on it
is read: mean and covariance of the observed values for guidance (`gaussian_moments`), exact
log-density for weights, masks, and the factor of `numpyro.handlers.scale`. The trace is made anew
inside whatever is compiled, so means may be any JAX function of the latent.

Events are the elements of the latent's plates. An observed site must be in all of these plates,
since an event's observations are read apart from those of other events; it may be in more. A
subsampled plate's factor does not touch what is local to the plate.
"""

from collections.abc import Callable, Mapping
from functools import singledispatch
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_diffprior.distributions import DiffusionPrior
from numpyro_diffprior.likelihoods import Likelihood
from numpyro_diffprior.linalg import Blocks, Covariance, Dense, Diagonal

__all__ = [
    "LatentSite",
    "Moments",
    "bind",
    "fix_plates",
    "gaussian_moments",
    "read_latent",
    "read_likelihood",
]

Model = Callable[..., Any]


class Moments(NamedTuple):
    """The first two moments of a distribution of observed values.

    Attributes:
        mean: The mean, with shape ``batch_shape + event_shape``.
        cov: The variances, shaped as the mean, or with ``full`` the covariance matrices of
            one-dimensional events, with shape ``batch_shape + event_shape + event_shape``.
        full: Whether ``cov`` holds matrices.
        mask: Which values were observed, broadcastable to the mean.
    """

    mean: jax.Array
    cov: jax.Array
    full: bool = False
    mask: jax.Array | bool = True


@singledispatch
def gaussian_moments(fn: dist.Distribution) -> Moments:
    """Return mean and covariance of a distribution; register your own distributions here.

    Raises:
        ValueError: If the distribution's type is not registered.
    """
    raise ValueError(
        f"no moments are known for observations from {type(fn).__name__}; register them with "
        f"`@gaussian_moments.register({type(fn).__name__})`, a function of the distribution that "
        "returns `Moments(mean, variance)`."
    )


@gaussian_moments.register
def _(fn: dist.Normal) -> Moments:
    shape = fn.shape()
    return Moments(jnp.broadcast_to(fn.loc, shape), jnp.broadcast_to(fn.scale, shape) ** 2)


@gaussian_moments.register(dist.MultivariateNormal)
@gaussian_moments.register(dist.LowRankMultivariateNormal)
def _(fn: dist.MultivariateNormal | dist.LowRankMultivariateNormal) -> Moments:
    size = fn.event_shape[0]
    cov = jnp.broadcast_to(fn.covariance_matrix, (*fn.batch_shape, size, size))
    return Moments(jnp.broadcast_to(fn.mean, fn.shape()), cov, full=True)


@gaussian_moments.register
def _(fn: dist.Delta) -> Moments:
    raise ValueError(
        "a Delta observation has no noise, and its posterior no density; observe it through a "
        "Normal with the scale at which it was recorded."
    )


@gaussian_moments.register
def _(fn: dist.Independent) -> Moments:
    return gaussian_moments(fn.base_dist)


@gaussian_moments.register
def _(fn: dist.ExpandedDistribution) -> Moments:
    base = gaussian_moments(fn.base_dist)
    cov_shape = (*fn.shape(), fn.event_shape[-1]) if base.full else fn.shape()
    mask = base.mask if isinstance(base.mask, bool) else jnp.broadcast_to(base.mask, fn.shape())
    return Moments(
        jnp.broadcast_to(base.mean, fn.shape()),
        jnp.broadcast_to(base.cov, cov_shape),
        base.full,
        mask,
    )


@gaussian_moments.register
def _(fn: dist.MaskedDistribution) -> Moments:
    base = gaussian_moments(fn.base_dist)
    mask = fn._mask  # NumPyro has no public name for it
    if not isinstance(mask, bool):
        mask = jnp.asarray(mask).reshape(*jnp.shape(mask), *(1,) * fn.event_dim)
    return base._replace(mask=jnp.logical_and(base.mask, mask))


class LatentSite(NamedTuple):
    """A latent site with a diffusion prior.

    Attributes:
        name: The site's name.
        prior: Its distribution.
        batch_shape: The shape of the batch of events that the site holds.
        plates: The names of its plates, outermost first.
        plate_sizes: Their full sizes.
        plate_dims: Their dimensions, counted from the right of the batch shape.
    """

    name: str
    prior: DiffusionPrior
    batch_shape: tuple[int, ...]
    plates: tuple[str, ...]
    plate_sizes: tuple[int, ...]
    plate_dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the site's value."""
        return (*self.batch_shape, *self.prior.event_shape)


class fix_plates(Messenger):  # noqa: N801  # a NumPyro handler
    """Run a model on given elements of its plates.

    Args:
        fn: The model.
        indices: The elements by the plate's name. What the model slices with
            `numpyro.subsample` follows.
    """

    def __init__(self, fn: Model | None = None, indices: Mapping[str, jax.Array] | None = None):
        self.indices = indices or {}
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set a plate's elements where they are given."""
        if msg["type"] == "plate" and msg["name"] in self.indices:
            index = self.indices[msg["name"]]
            msg["args"] = (msg["args"][0], index.shape[0])
            msg["value"] = index


def bind(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    indices: Mapping[str, jax.Array] | None = None,
) -> Callable[[], Any]:
    """Return the model with its arguments and plates' elements as a function of nothing."""

    def bound() -> Any:
        # The key only serves what the model draws on its own, such as a plate's subsample: the
        # same at every trace, so that all of them see the same data.
        try:
            with fix_plates(indices=indices), handlers.seed(rng_seed=0):
                return model(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if not indices:
                raise
            raise ValueError(
                f"the model fails on a part of its plates {sorted(indices)}; what belongs to a "
                "plate's elements must pass through `numpyro.subsample` inside of the plate."
            ) from error

    return bound


def read_latent(bound: Callable[[], Any]) -> LatentSite:
    """Find the latent site with a diffusion prior in a bound model.

    Raises:
        ValueError: If there is none or more than one, or a latent site that nobody samples.
    """
    trace = handlers.trace(handlers.substitute(bound, substitute_fn=_prior_mean)).get_trace()
    latents = {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and not _is_unobserved(name, trace)
    }
    priors = {
        name: prior
        for name, site in latents.items()
        if (prior := _find_prior(site["fn"])) is not None
    }
    names = list(priors)
    others = sorted(set(latents) - set(names))
    if not names:
        raise ValueError(
            "no latent site with a DiffusionPrior was found in the model; expected one, such as "
            f'`numpyro.sample("x", prior)`. Its latent sites: {sorted(latents)}.'
        )
    if len(names) > 1:
        raise ValueError(
            f"expected one latent site with a DiffusionPrior, got {names}; condition the model on "
            "all but one of them."
        )
    if others:
        raise ValueError(
            f"nobody samples the latent sites {others}; give them values with "
            "`numpyro.handlers.condition` or sample them beside this one in `numpyro.infer.Gibbs`."
        )
    (name,) = names
    site = latents[name]
    frames = site["cond_indep_stack"]
    sizes = {name: site["args"][0] for name, site in trace.items() if site["type"] == "plate"}
    prior = priors[name]
    if site["fn"].shape() != (*site["fn"].batch_shape, *prior.event_shape):
        raise ValueError(
            f"latent site '{name}': expected events of shape {prior.event_shape} in plates, got "
            f"events of shape {site['fn'].event_shape}; replace `.to_event` by a plate."
        )
    return LatentSite(
        name,
        prior,
        tuple(site["fn"].batch_shape),
        tuple(frame.name for frame in frames),
        tuple(sizes[frame.name] for frame in frames),
        tuple(frame.dim for frame in frames),
    )


def read_likelihood(bound: Callable[[], Any], latent: LatentSite) -> Likelihood:
    """Read what the observed sites of a bound model say about its latent site.

    Raises:
        ValueError: If no observed site depends on the latent, if one couples its events or has
            no moments, or if concrete data hold NaN outside the masks or noise without variance.
    """
    template = jnp.broadcast_to(latent.prior.mean, latent.shape)
    names = _dependent_sites(bound, latent, template)
    if not names:
        raise ValueError(
            f"no observed site depends on the latent site '{latent.name}'; pass the data that the "
            "model observes."
        )

    def read(x: jax.Array) -> tuple[jax.Array, Covariance, jax.Array]:
        trace = _trace(bound, latent, x)
        parts = [_read_site(name, trace, latent) for name in names]
        means, noises, values = zip(*parts, strict=True)
        noise = noises[0] if len(noises) == 1 else Blocks(noises)
        return jnp.concatenate(means, axis=-1), noise, jnp.concatenate(values, axis=-1)

    def log_prob(x: jax.Array) -> jax.Array:
        trace = _trace(bound, latent, x)
        return sum(
            (_log_prob_by_event(name, trace, latent) for name in names),
            start=jnp.zeros(latent.batch_shape, x.dtype),
        )

    _, noise, y = read(template)
    _check_data(names, y, noise)
    linear = _is_linear(lambda x: read(x)[:2], template)

    def moments(x: jax.Array) -> tuple[jax.Array, Covariance]:
        mean, noise_x = _over_extra_axes(lambda v: read(v)[:2], x, latent)
        return mean, noise if linear else noise_x

    return Likelihood(
        y,
        moments,
        lambda x: _over_extra_axes(log_prob, x, latent),
        latent.prior.event_shape,
        linear,
    )


def _find_prior(fn: dist.Distribution) -> DiffusionPrior | None:
    """Return the diffusion prior under what plates, masks and `to_event` wrap around it."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, DiffusionPrior) else None


def _prior_mean(site: dict[str, Any]) -> jax.Array | None:
    """Put the mean in place of a draw, which would run the sampler."""
    if site["type"] != "sample" or site["is_observed"]:
        return None
    prior = _find_prior(site["fn"])
    return None if prior is None else jnp.broadcast_to(prior.mean, site["fn"].shape())


def _is_unobserved(name: str, trace: Mapping[str, Any]) -> bool:
    """Whether a latent site stands for the hidden part of an observed one (``obs_mask=``)."""
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in trace


def _trace(bound: Callable[[], Any], latent: LatentSite, x: jax.Array) -> dict[str, Any]:
    return handlers.trace(handlers.substitute(bound, data={latent.name: x})).get_trace()


def _dependent_sites(
    bound: Callable[[], Any], latent: LatentSite, template: jax.Array
) -> list[str]:
    """Return the names of the observed sites whose density depends on the latent."""

    def log_probs(x: jax.Array) -> dict[str, jax.Array]:
        sites = {
            name: site
            for name, site in _trace(bound, latent, x).items()
            if site["type"] == "sample" and site["is_observed"]
        }
        for name, site in sites.items():
            if jnp.shape(site["value"]) != site["fn"].shape():
                raise ValueError(
                    f"observed site '{name}': expected values of shape {site['fn'].shape()}, got "
                    f"{jnp.shape(site['value'])}; what belongs to a plate's elements must pass "
                    "through `numpyro.subsample` inside of the plate."
                )
        return {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()}

    jaxpr, shapes = jax.make_jaxpr(log_probs, return_shape=True)(template)
    return [
        name for name, depends in zip(shapes, _taint(jaxpr.jaxpr, [True]), strict=True) if depends
    ]


def _read_site(
    name: str, trace: Mapping[str, Any], latent: LatentSite
) -> tuple[jax.Array, Covariance, jax.Array]:
    """Return an observed site's mean, noise and value, with hidden entries taken out."""
    site = trace[name]
    fn = site["fn"]
    try:
        mean, cov, full, mask = gaussian_moments(fn)
    except ValueError as error:
        raise ValueError(f"observed site '{name}': {error}") from None
    _check_plates(name, site, latent)
    mask = jnp.broadcast_to(mask, mean.shape)
    scale = _local_scale(site, trace, latent)
    if not isinstance(scale, float):
        scale = jnp.broadcast_to(scale, fn.batch_shape)
        scale = scale.reshape(*fn.batch_shape, *(1,) * (cov.ndim - len(fn.batch_shape)))

    def by_event(array: jax.Array) -> jax.Array:
        return _by_event(array, fn.batch_shape, latent)

    def flat(array: jax.Array) -> jax.Array:
        return by_event(array).reshape(*latent.batch_shape, -1)

    mean = flat(jnp.where(mask, mean, 0))
    value = flat(jnp.where(mask, site["value"], 0))
    if not full:
        return mean, Diagonal(flat(jnp.where(mask, cov / scale, 1))), value
    size = cov.shape[-1]
    pairs = mask[..., :, None] & mask[..., None, :]
    cov = by_event(jnp.where(pairs, cov / scale, jnp.eye(size, dtype=cov.dtype)))
    cov = cov.reshape(*latent.batch_shape, -1, size, size)
    blocks = tuple(Dense.from_matrix(cov[..., i, :, :]) for i in range(cov.shape[-3]))
    return mean, blocks[0] if len(blocks) == 1 else Blocks(blocks), value


def _log_prob_by_event(name: str, trace: Mapping[str, Any], latent: LatentSite) -> jax.Array:
    site = trace[name]
    fn = site["fn"]
    log_prob = _local_scale(site, trace, latent) * fn.log_prob(site["value"])
    by_event = _by_event(log_prob, fn.batch_shape, latent)
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


def _check_plates(name: str, site: Mapping[str, Any], latent: LatentSite) -> None:
    missing = sorted(set(latent.plates) - {frame.name for frame in site["cond_indep_stack"]})
    batch_shape = site["fn"].batch_shape
    padded = (1,) * (len(latent.batch_shape) - len(batch_shape)) + tuple(batch_shape)
    sizes = padded[len(padded) - len(latent.batch_shape) :]
    if missing or any(
        size not in (1, own) for size, own in zip(latent.batch_shape, sizes, strict=True)
    ):
        where = f"in the plates {missing}" if missing else f"of batch shape {latent.batch_shape}"
        raise ValueError(
            f"observed site '{name}' with batch shape {tuple(batch_shape)} couples the events of "
            f"the latent site '{latent.name}'; expected it {where}, so that each event has its "
            "own observations (its other axes belong in `.to_event`)."
        )


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


def _is_linear(moments: Callable[[jax.Array], tuple[jax.Array, Covariance]], x: jax.Array) -> bool:
    """Whether the mean's derivative and the noise do not depend on ``x``, by their programs."""

    def derivative(x: jax.Array, v: jax.Array) -> tuple[jax.Array, Covariance]:
        _, tangent = jax.jvp(lambda x: moments(x)[0], (x,), (v,))
        return tangent, moments(x)[1]

    return not any(_taint(jax.make_jaxpr(derivative)(x, x).jaxpr, [True, False]))


_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "checkpoint",
}


def _taint(jaxpr: Jaxpr, tainted: list[bool]) -> list[bool]:
    """Return which outputs of a program may depend on the inputs that are marked."""
    marked = {var for var, mark in zip(jaxpr.invars, tainted, strict=True) if mark}
    for eqn in jaxpr.eqns:
        marks = [isinstance(var, Var) and var in marked for var in eqn.invars]
        if any(marks):
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            outs = [True] * len(eqn.outvars)
            if eqn.primitive.name in _CALLS and inner is not None:
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                outs = _taint(inner, marks)
            marked.update(var for var, mark in zip(eqn.outvars, outs, strict=True) if mark)
    return [isinstance(var, Var) and var in marked for var in jaxpr.outvars]


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
