r"""Looking ahead: the observations given the next noise level, under a Gaussian prior.

The prior's chain draws a step :math:`z \sim \mathcal{N}(0, \tau^2 I)` to the level
:math:`\sigma_s`. For a mean linear in :math:`x` and a prior with covariance :math:`V` given
:math:`x_s`, the observations given the step are

.. math:: y \sim \mathcal{N}\bigl(h(\hat x) + G z, S\bigr), \quad
    G = A V / \sigma_s^2, \quad S = \Sigma_y + A V A^T,

and without the step they have covariance :math:`M = S + \tau^2 G G^T`. A `LookAhead` holds the
factors of :math:`S` and :math:`M`, for the twist and for draws of the step given :math:`y`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp

from numpyro_diffprior.guidance.likelihood import Linearization, gaussian_log_density
from numpyro_diffprior.linalg.batched import Factor, gather
from numpyro_diffprior.linalg.covariances import Covariance, Diagonal, Update
from numpyro_diffprior.linalg.solvers import sandwich, sandwich_square
from numpyro_diffprior.linalg.stationary import StationaryOperator

__all__ = ["DenseLookAhead", "PrecisionLookAhead", "LookAhead"]


@dataclass(frozen=True, eq=False)
class LookAhead(ABC):
    r"""The distribution of :math:`y` given a step of the prior's chain.

    Attributes:
        tau: The standard deviation :math:`\tau` of the step, a scalar.
        log_twist: The log-density of :math:`y` without the step, :math:`\log \mathcal{N}(r; 0, M)`
            with :math:`r = y - h(\hat x)`, with shape ``(num_particles, *batch)``.
    """

    tau: jax.Array
    log_twist: jax.Array

    def take(self, index: jax.Array) -> Self:
        """Return the distributions of the chosen particles, by indices ``(n, *batch)``."""
        return replace(self, log_twist=gather(self.log_twist, index))

    @abstractmethod
    def draw(self, rng_key: jax.Array) -> jax.Array:
        """Draw the step given :math:`y`, with shape ``(num_particles, *batch, d)``.

        Chain and observations are drawn jointly, then conditioned on :math:`y` (Matheron's rule).
        """

    @abstractmethod
    def log_prob(self, step: jax.Array) -> jax.Array:
        r"""Return the log-density of :math:`y` given a step, :math:`\log \mathcal{N}(r; G z, S)`.

        Args:
            step: :math:`z`, with shape ``(num_particles, *batch, d)``.

        Returns:
            An array with shape ``(num_particles, *batch)``.
        """


@dataclass(frozen=True, eq=False)
class DenseLookAhead(LookAhead):
    """Looking ahead with the matrices :math:`S` and :math:`M`."""

    residual: jax.Array  # (num_particles, *batch, m)
    matvec: Callable[[jax.Array], jax.Array]  # the product with G
    transpose: Callable[[jax.Array], jax.Array]  # the product with its transpose
    ahead: Factor  # of S
    before: Factor  # of M

    @classmethod
    def of(
        cls,
        local: Linearization,
        cov: Covariance,
        matrix: jax.Array,
        sigma: jax.Array,
        tau: jax.Array,
    ) -> "DenseLookAhead":
        r"""Factor the matrices.

        Args:
            local: The likelihood, linearized at :math:`\hat x`.
            cov: :math:`V`.
            matrix: The operator :math:`A`, with shape ``(*batch, m, d)``.
            sigma: The next level's :math:`\sigma_s`, a scalar.
            tau: The standard deviation of the step, a scalar.
        """
        variance = sigma**2
        ahead = sandwich(cov, matrix) + local.noise.dense()
        spread = sandwich_square(cov, matrix) * jnp.square(tau / variance)
        # A jitter against rounding, added to S and so to M, which stays the marginal covariance.
        trace = jnp.trace(ahead + spread, axis1=-2, axis2=-1)[..., None, None]
        identity = jnp.eye(ahead.shape[-1], dtype=ahead.dtype)
        ahead = ahead + jnp.finfo(ahead.dtype).eps * trace * identity
        before, residual = Factor.of(ahead + spread), local.residual
        return cls(
            tau=tau,
            log_twist=gaussian_log_density(residual, before.solve(residual), before.logdet()),
            residual=residual,
            matvec=lambda v: local.matvec(cov.matvec(v)) / variance,
            transpose=lambda u: cov.matvec(local.transpose(u)) / variance,
            ahead=Factor.of(ahead),
            before=before,
        )

    def take(self, index: jax.Array) -> Self:
        return replace(super().take(index), residual=gather(self.residual, index))

    def draw(self, rng_key: jax.Array) -> jax.Array:
        key_step, key_ahead = jax.random.split(rng_key)
        shape, dtype = self.residual.shape, self.residual.dtype
        size = self.transpose(self.residual).shape
        step = self.tau * jax.random.normal(key_step, size, dtype)
        simulated = self.matvec(step)
        simulated += self.ahead.sqrt_matvec(jax.random.normal(key_ahead, shape, dtype))
        solution = self.before.solve(self.residual - simulated)
        return step + self.tau**2 * self.transpose(solution)

    def log_prob(self, step: jax.Array) -> jax.Array:
        error = self.residual - self.matvec(step)
        return gaussian_log_density(error, self.ahead.solve(error), self.ahead.logdet())


@dataclass(frozen=True, eq=False)
class PrecisionLookAhead(LookAhead):
    r"""Looking ahead with a structured precision :math:`\Lambda` of the likelihood.

    With the score :math:`s = A^T \Sigma_y^{-1} r`, a covariance :math:`V` and
    :math:`(I + \Lambda V) b = s`,

    .. math:: \log \mathcal{N}(r; 0, \Sigma_y + A V A^T) = \log \mathcal{N}(r; 0, \Sigma_y)
        + \tfrac{1}{2} s^T V b - \tfrac{1}{2} \log \det (I + \Lambda V),

    and :math:`M` has :math:`V + (\tau / \sigma_s^2)^2 V^2` in the place of :math:`V`.

    With an approximation of :math:`\Lambda`, these are the likelihood and the draws of another
    Gaussian model, of the same score. Particle samplers stay exact.
    """

    score: jax.Array  # s, (num_particles, *batch, d)
    log_density: jax.Array  # log N(r; 0, S_y), (num_particles, *batch)
    precision: Diagonal | StationaryOperator
    sigma: jax.Array
    cov: Covariance
    ahead: Update  # of V
    before: Update  # of V + c V^2

    @classmethod
    def of(
        cls,
        local: Linearization,
        cov: Covariance,
        precision: Diagonal | StationaryOperator,
        update: Callable[[jax.Array | None], Update],
        sigma: jax.Array,
        tau: jax.Array,
    ) -> "PrecisionLookAhead":
        r"""Factor the matrices.

        Args:
            local: The likelihood, linearized at :math:`\hat x`.
            cov: :math:`V`.
            precision: :math:`\Lambda`, or an approximation of it.
            update: Maps :math:`c` to the update of :math:`V + c V^2` by the precision, None to
                that of :math:`V`.
            sigma: The next level's :math:`\sigma_s`, a scalar.
            tau: The standard deviation of the step, a scalar.
        """
        residual, noise, score = local.residual, local.noise, local.score()
        log_density = gaussian_log_density(residual, noise.solve(residual), noise.logdet())
        before = update(jnp.square(tau / sigma**2))
        return cls(
            tau=tau,
            log_twist=log_density + _log_gain(before, score),
            score=score,
            log_density=log_density,
            precision=precision,
            sigma=sigma,
            cov=cov,
            ahead=update(None),
            before=before,
        )

    def take(self, index: jax.Array) -> Self:
        return replace(
            super().take(index),
            score=gather(self.score, index),
            log_density=gather(self.log_density, index),
        )

    def draw(self, rng_key: jax.Array) -> jax.Array:
        shape, dtype = self.score.shape, self.score.dtype
        noises = (jax.random.normal(key, shape, dtype) for key in jax.random.split(rng_key, 3))
        step, own, noise = noises
        step = self.tau * step
        x = self._image(step) + self.cov.sqrt_matvec(own)
        simulated = self.precision.matvec(x) + self.precision.sqrt_matvec(noise)
        b, _ = self.before.solve(self.score - simulated)
        return step + self.tau**2 * self._image(b)

    def log_prob(self, step: jax.Array) -> jax.Array:
        image = self._image(step)
        change = self.precision.matvec(image)
        log_density = self.log_density + jnp.sum(image * (self.score - change / 2), axis=-1)
        return log_density + _log_gain(self.ahead, self.score - change)

    def _image(self, v: jax.Array) -> jax.Array:
        return self.cov.matvec(v) / self.sigma**2


def _log_gain(update: Update, score: jax.Array) -> jax.Array:
    _, shift = update.solve(score)
    return 0.5 * (jnp.sum(score * shift, axis=-1) - update.logdet)
