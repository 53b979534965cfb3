r"""Guidance: the posterior's denoiser from the prior's denoiser and a likelihood.

Tweedie's formula for :math:`p(x_t \mid y)` gives the posterior's denoiser

.. math:: E[x \mid x_t, y] = \hat x + \sigma^2 \nabla_{x_t} \log p(y \mid x_t), \quad
    \hat x = D(x_t, \sigma).

A `Guidance` approximates it from :math:`\hat x` and the likelihood of the observed batch;
`numpyro_diffprior.guidance.mmps` has the recommended one. Its approximation of
:math:`p(y \mid x_t)` is also the *twist* of the particle samplers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.wrappers import DenoiserWrapper
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.guidance.look_ahead import LookAhead

__all__ = ["Guidance", "Guided", "GuidedDenoiser", "SolveStats", "finest_sigma"]


class SolveStats(NamedTuple):
    """Statistics of guidance's solves, per event.

    Attributes:
        residual: The relative residual of the solve, with shape ``(*batch,)``; zero if there is
            no solve, or an exact one.
        num_truncated: The number of directions with negative prior variance, same shape; zero
            where the solve is matrix-free.
        num_steps: The number of steps of conjugate gradients, same shape, a float; zero if the
            solve is another one.
    """

    residual: jax.Array
    num_truncated: jax.Array
    num_steps: jax.Array

    @classmethod
    def of(cls, residual: jax.Array, num_truncated: jax.Array | None = None) -> "SolveStats":
        """Return the statistics of a solve that takes no steps."""
        zeros = jnp.zeros_like(residual)
        return cls(residual, zeros.astype(int) if num_truncated is None else num_truncated, zeros)

    def over_path(self) -> "SolveStats":
        """Return the largest residual and count, and the sum of steps, over the leading axis."""
        return SolveStats(self.residual.max(0), self.num_truncated.max(0), self.num_steps.sum(0))

    def over_particles(self) -> "SolveStats":
        """Return the largest residual and count, and the mean of steps, over the leading axis."""
        return self.over_path()._replace(num_steps=self.num_steps.mean(0))

    def then(self, later: "SolveStats") -> "SolveStats":
        """Return the statistics of these solves and of later ones."""
        return SolveStats(
            residual=jnp.maximum(self.residual, later.residual),
            num_truncated=jnp.maximum(self.num_truncated, later.num_truncated),
            num_steps=self.num_steps + later.num_steps,
        )


class Guided(NamedTuple):
    r"""The result of guidance at one noise level.

    Attributes:
        x_hat: The prior's mean :math:`E[x \mid x_t]`, with shape ``(*batch, *event)``.
        x_hat_y: The posterior's mean :math:`E[x \mid x_t, y]`, with the same shape.
        log_twist: The approximate :math:`\log p(y \mid x_t)`, with shape ``(*batch,)``, without
            its log-determinant where the solve is matrix-free.
        stats: The statistics of the solve.
    """

    x_hat: jax.Array
    x_hat_y: jax.Array
    log_twist: jax.Array
    stats: SolveStats


@dataclass(frozen=True, eq=False)
class GuidedDenoiser(DenoiserWrapper, ABC):
    """The denoiser of a posterior, for any sampler; see `Guidance.condition`.

    Subclasses hold what their guidance precomputes for a likelihood.

    Args:
        wrapped: The prior.
        likelihood: The likelihood of the observed batch.
        precision: The largest precision of the likelihood, which bounds `sigma_min`, or None.
    """

    likelihood: Likelihood
    precision: jax.Array | None = field(default=None, kw_only=True)

    @property
    def prior(self) -> Denoiser:
        """The denoiser of the prior."""
        return self.wrapped

    @property
    def sigma_min(self) -> jax.Array:
        """The noise level at which sampling stops.

        It is the prior's, or lower for precise observations: a tenth of the likelihood's smallest
        standard deviation in any direction, but not below `finest_sigma`.
        """
        low = self.prior.sigma_min
        if self.precision is None:
            return low
        known = self.precision > 0
        deviation = jax.lax.rsqrt(jnp.where(known, self.precision, 1))
        wanted = jnp.where(known, 0.1 * deviation, low)
        return jnp.minimum(low, jnp.maximum(wanted, finest_sigma(self.prior)))

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        return self.guide(x_t, sigma).x_hat_y

    def guide(
        self, x_t: jax.Array, sigma: jax.Array | float, guess: jax.Array | None = None
    ) -> Guided:
        """Evaluate prior and posterior at one noise level.

        Args:
            x_t: Noisy events, with shape ``(*extra, *batch, *event)``.
            sigma: Noise levels, broadcastable to shape ``(*extra, *batch)``.
            guess: The posterior's means at the noise level before, with the shape of ``x_t``, from
                which iterative solves may start. They only save steps: any values are allowed.
        """
        return self.evaluate(x_t, jnp.asarray(sigma, self.dtype), guess)

    @abstractmethod
    def evaluate(self, x_t: jax.Array, sigma: jax.Array, guess: jax.Array | None = None) -> Guided:
        """Implement `guide`, for an array of noise levels."""

    @property
    def looks_ahead(self) -> bool:
        """Whether particle proposals use `look_ahead` instead of `guide`."""
        return False

    def look_ahead(self, x: jax.Array, sigma: jax.Array, tau: jax.Array) -> LookAhead:
        r"""Return the distribution of the observations given a step of the prior's chain.

        Args:
            x: The denoised events :math:`\hat x`, with shape ``(*extra, *batch, *event)``.
            sigma: The level :math:`\sigma_s` at which the step ends, a scalar.
            tau: The standard deviation :math:`\tau` of the step, a scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} does not look ahead.")


def finest_sigma(denoiser: Denoiser) -> jax.Array:
    """Return the lowest noise level that rounding resolves for events of the prior's scale."""
    return 10 * jnp.finfo(denoiser.dtype).eps * denoiser.scale


class Guidance(ABC):
    """An approximation of the posterior's denoiser.

    Subclasses implement `bind`. They are static under `jax.jit`: they must be hashable and compare
    by value, as frozen dataclasses do.
    """

    def condition(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Return the denoiser of the posterior.

        Raises:
            ValueError: If prior and likelihood have different event shapes.
        """
        if denoiser.event_shape != likelihood.event_shape:
            raise ValueError(
                f"guidance: the prior's events have shape {denoiser.event_shape}, "
                f"the likelihood's {likelihood.event_shape}."
            )
        shape = (*likelihood.batch_shape, *likelihood.event_shape)
        precision = likelihood.largest_precision(jnp.broadcast_to(denoiser.mean, shape))
        return replace(self.bind(denoiser, likelihood), precision=precision)

    @abstractmethod
    def bind(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """Implement `condition`, for a prior and a likelihood with the same event shape."""
