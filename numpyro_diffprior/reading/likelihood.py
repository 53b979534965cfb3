r"""The likelihood of a group of latent sites, from the outputs of a model's program.

For every observed site that depends on the group, a `LikelihoodReader` evaluates

- for guidance, the mean and the covariance of the observed values, or the gradient and curvature
  of the log-density if it has no moments to match (`numpyro_diffprior.reading.curvature`);
- for weights, the exact log-density.

It applies masks and the factor of `numpyro.handlers.scale`, and transforms values of a
distribution with a fixed elementwise transformation back. For latents in a subsampled plate, it
removes the plate's factor, since the likelihood is that of single events.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.arguments import merge_arguments
from numpyro_diffprior.guidance.likelihood import Likelihood, ObservationMoments
from numpyro_diffprior.linalg.covariances import Blocks, Covariance, Dense, Diagonal, Repeated
from numpyro_diffprior.reading.curvature import (
    from_log_prob,
    pearson_residuals,
    pseudo_observe,
)
from numpyro_diffprior.reading.latent import LatentGroup
from numpyro_diffprior.reading.observed import ObservedSite, Quantity, SiteForm
from numpyro_diffprior.reading.unwrap import unwrap

__all__ = ["LikelihoodReader"]

Evaluate = Callable[[jax.Array], Sequence[Mapping[str, Any]]]
"""Maps a batch of events to the arrays of each observed site; see `observed.describe`."""


class Reading(NamedTuple):
    """The observations of one site, or of all, for each event of the batch.

    Attributes:
        moments: Their moments; masked values have mean and value zero, and variance one.
        has_residual: Which values have a residual, which masked values do not, with shape
            ``(*batch, m)``.
    """

    moments: ObservationMoments
    has_residual: jax.Array


@dataclass(frozen=True, eq=False)
class LikelihoodReader:
    """The likelihood of latent sites, from the observed sites that depend on them; static.

    Attributes:
        latents: The latent sites.
        observed: How the observed sites that depend on them are read.
        forms: The forms of these observed sites.
    """

    latents: LatentGroup
    observed: tuple[ObservedSite, ...]
    forms: tuple[SiteForm, ...]

    @property
    def names(self) -> list[str]:
        """The names of the observed sites."""
        return [form.name for form in self.forms]

    def read(self, evaluate: Evaluate, x: jax.Array) -> Reading:
        """Read all sites at one batch of events.

        Args:
            evaluate: Maps events, with shape ``(*batch, *event)``, to the arrays of the sites.
            x: The events.
        """
        outputs = evaluate(x)
        parts = []
        for i, (site, form) in enumerate(zip(self.observed, self.forms, strict=True)):
            if site.quantity == Quantity.EVENT:
                parts.append(self._read_event(i, evaluate, x))
            elif site.quantity == Quantity.MOMENTS:
                parts.append(self._read_moments(site, form, outputs[i]))
            elif site.quantity == Quantity.PARAMETERS:
                parts.append(self._read_parameters(site, form, outputs[i]))
        if not parts:
            return self._unobserved(x)
        by_site, masks = zip(*parts, strict=True)
        means, noises, values, squares = zip(*by_site, strict=True)
        moments = ObservationMoments(
            y_hat=jnp.concatenate(means, axis=-1),
            noise=noises[0] if len(noises) == 1 else Blocks(noises),
            y=jnp.concatenate(values, axis=-1),
        )
        if any(given is not None for given in squares):
            filled = [moments.squared_residuals() for moments in by_site]
            moments = moments._replace(squares=jnp.concatenate(filled, axis=-1))
        # All in the events' floating type, whatever the type of the model's constants.
        moments = jax.tree.map(lambda a: a.astype(x.dtype), moments)
        return Reading(moments, jnp.concatenate(masks, axis=-1))

    def log_prob(
        self, evaluate: Evaluate, x: jax.Array, sites: Sequence[int] | None = None
    ) -> jax.Array:
        """Return the log-likelihood of one batch of events by some sites (default: all)."""
        outputs = evaluate(x)
        total = jnp.zeros(self.latents.batch_shape, x.dtype)
        for i in range(len(self.forms)) if sites is None else sites:
            total = total + self._log_prob_of(self.forms[i], outputs[i]).astype(x.dtype)
        return total

    def likelihood(
        self, evaluate: Evaluate, template: jax.Array, *, linear: bool, elementwise: bool
    ) -> Likelihood:
        """Return the likelihood of a batch of events.

        Observed values and noise are evaluated at the template, a batch of events. If ``linear``,
        means are affine in the events, and noise and values constant; see `Likelihood` for
        ``elementwise``.
        """
        moments, has_residual = self.read(evaluate, template)
        noise, y = moments.noise, moments.y

        def over_extra_axes(f: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
            """Map a function of a batch of events over draws or particles of it."""

            def mapped(x: jax.Array) -> Any:
                extra = x.shape[: x.ndim - template.ndim]
                if not extra:
                    return f(x)
                out = jax.vmap(f)(x.reshape(prod(extra), *x.shape[len(extra) :]))
                return jax.tree.map(lambda leaf: leaf.reshape(*extra, *leaf.shape[1:]), out)

            return mapped

        read_all = over_extra_axes(lambda x: self.read(evaluate, x).moments)

        def read(x: jax.Array) -> ObservationMoments:
            moments = read_all(x)
            return moments._replace(noise=noise, y=y) if linear else moments

        potentials = [
            i for i, site in enumerate(self.observed) if site.quantity == Quantity.POTENTIAL
        ]
        potential = over_extra_axes(partial(self.log_prob, evaluate, sites=potentials))
        return Likelihood(
            y=y,
            read=read,
            log_prob=over_extra_axes(partial(self.log_prob, evaluate)),
            event_shape=template.shape[len(self.latents.batch_shape) :],
            elementwise=elementwise,
            linear=linear,
            has_residual=has_residual,
            potential=potential if potentials else None,
        )

    def _unobserved(self, x: jax.Array) -> Reading:
        """Return one masked value, so that the posterior is the prior."""
        zero = jnp.zeros((*self.latents.batch_shape, 1), x.dtype)
        mean = zero * x.reshape(*self.latents.batch_shape, -1)[..., :1]
        moments = ObservationMoments(mean, Diagonal(jnp.ones_like(zero)), zero)
        return Reading(moments, zero.astype(bool))

    def _read_moments(
        self, observed: ObservedSite, form: SiteForm, arrays: Mapping[str, Any]
    ) -> Reading:
        """Read a site by the moments of its distribution."""
        moments = arrays["forms"][observed.form_position]["moments"]
        mean, cov, value = moments["mean"], moments["cov"], moments["value"]
        mask = jnp.broadcast_to(moments["mask"], mean.shape)
        if observed.is_residual:
            mean, value = mean - value, jnp.zeros_like(value)
        by_event = partial(self._by_event, form.batch_shape)
        cov = cov / self._local_scale(form, arrays, cov.ndim)
        noise: Covariance
        if form.forms[observed.form_position].is_full:
            size = mean.shape[-1]
            pairs = mask[..., :, None] & mask[..., None, :]
            matrix = jnp.where(pairs, cov, jnp.eye(size, dtype=mean.dtype))
            block = Dense.from_matrix(by_event(matrix, size, size))
            noise = Repeated(block, block.eigenvalues.shape[-2])
        else:
            noise = Diagonal(by_event(jnp.where(mask, cov, 1)))
        y_hat, y = (by_event(jnp.where(mask, v, 0)) for v in (mean, value))
        return Reading(ObservationMoments(y_hat, noise, y), by_event(mask))

    def _read_parameters(
        self, observed: ObservedSite, form: SiteForm, arrays: Mapping[str, Any]
    ) -> Reading:
        """Read a site by pseudo-observations of its distribution's parameters."""
        outputs = arrays["forms"][observed.form_position]
        own = unwrap(merge_arguments(outputs["fn"], form.forms[observed.form_position].fn))
        value = outputs["quotient"]
        pseudo = pseudo_observe(own.fn, own.batch_shape, value, observed.depends)
        size = pseudo.theta.shape[-1]
        mask = jnp.broadcast_to(jnp.asarray(own.mask)[..., None], pseudo.theta.shape)
        by_event = partial(self._by_event, form.batch_shape)
        scale = self._local_scale(form, arrays, mask.ndim)
        variances = jnp.where(mask, pseudo.variances / scale, 1)
        noise: Covariance
        if pseudo.directions is None or size == 1:
            noise = Diagonal(by_event(variances))
        else:
            identity = jnp.eye(size, dtype=pseudo.theta.dtype)
            directions = jnp.where(mask[..., None], pseudo.directions, identity)
            block = Dense(by_event(variances, size), by_event(directions, size, size))
            noise = Repeated(block, block.eigenvalues.shape[-2])
        y_hat, y = (by_event(jnp.where(mask, v, 0)) for v in (pseudo.theta, pseudo.y))
        moments, has_residual = ObservationMoments(y_hat, noise, y), mask & pseudo.has_residual
        squares = None if pseudo.has_residual else pearson_residuals(own.fn, value)
        if squares is not None:
            # A value with several parameters has one residual: its first entry stands for it.
            has_residual = mask & (jnp.arange(size) == 0)
            squares = jnp.where(has_residual, scale * squares[..., None], 0)
            moments = moments._replace(squares=by_event(squares))
        return Reading(moments, by_event(has_residual))

    def _read_event(self, position: int, evaluate: Evaluate, x: jax.Array) -> Reading:
        """Read a log-density as an observation of the event itself."""
        theta = x.reshape(*self.latents.batch_shape, -1)

        def log_prob(theta: jax.Array) -> jax.Array:
            arrays = evaluate(theta.reshape(x.shape))[position]
            return self._log_prob_of(self.forms[position], arrays)

        pseudo = from_log_prob(log_prob, theta)
        assert pseudo.directions is not None
        noise = Dense(pseudo.variances, pseudo.directions)
        moments = ObservationMoments(theta, noise, pseudo.y)
        return Reading(moments, has_residual=jnp.zeros(theta.shape, bool))

    def _log_prob_of(self, form: SiteForm, arrays: Mapping[str, Any]) -> jax.Array:
        log_prob = arrays["log_prob"]
        scaled = self._local_scale(form, arrays, log_prob.ndim) * log_prob
        return self._by_event(form.batch_shape, scaled).sum(-1)

    def _local_scale(self, form: SiteForm, arrays: Mapping[str, Any], ndim: int) -> jax.Array:
        """Return a site's scale without the factors of the latent's own divided plates.

        It has the site's batch shape, followed by axes of one up to ``ndim``.
        """
        sizes = {plate.name: plate.size for plate in self.latents.plates}
        factor = prod(taken / sizes[name] for name, taken in form.plates if name in sizes)
        scale = jnp.broadcast_to(factor * arrays["scale"], form.batch_shape)
        return scale.reshape(*scale.shape, *(1,) * (ndim - scale.ndim))

    def _by_event(
        self, batch_shape: tuple[int, ...], array: jax.Array, *own_shape: int
    ) -> jax.Array:
        """Return an observed site's array by event, with shape ``(*batch, -1, *own_shape)``.

        Batch axes align from the right. Where the latent has an axis of one, the site's own axis
        there (a further plate) belongs to the event as well.
        """
        latent = self.latents.batch_shape
        rank = len(latent)
        array = array.reshape((1,) * max(rank - len(batch_shape), 0) + array.shape)
        own = max(len(batch_shape) - rank, 0)
        array = jnp.moveaxis(array, range(own), range(rank, rank + own))
        for axis, size in enumerate(latent):
            if size == 1 and array.shape[axis] != 1:
                array = jnp.expand_dims(jnp.moveaxis(array, axis, rank - 1), axis)
        return array.reshape(*latent, -1, *own_shape)
