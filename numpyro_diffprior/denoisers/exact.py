r"""Exact denoisers of Gaussians and Gaussian mixtures."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffprior._compile.checks import set_fields
from numpyro_diffprior.denoisers.denoiser import (
    Denoiser,
    as_covariance,
    as_floating,
    as_gaussian,
    as_unit,
    check_size,
    flatten_events,
    register,
)
from numpyro_diffprior.linalg.batched import einsum
from numpyro_diffprior.linalg.covariances import Covariance, Dense

__all__ = ["GaussianDenoiser", "MixtureDenoiser"]


@register
@dataclass(frozen=True, eq=False, init=False)
class GaussianDenoiser(Denoiser):
    r"""The exact denoiser of :math:`\mathcal{N}(\mu, \Sigma)`.

    .. math:: D(x_t, \sigma) = \mu + \Sigma (\Sigma + \sigma^2 I)^{-1} (x_t - \mu)

    Args:
        mean: The mean, with shape ``event_shape``.
        cov: The covariance over flattened events, a `Covariance` or a matrix.
        unit: The unit of mean and covariance in units of the data. For example, a flux near 1e-17
            with standard deviation 2e-18 has mean 1, variance 0.04 and ``unit=1e-17``.

    Raises:
        ValueError: If the sizes of mean and covariance differ, or the covariance is not valid.
    """

    mean: jax.Array
    cov: Covariance
    unit: jax.Array

    def __init__(
        self, mean: ArrayLike, cov: Covariance | ArrayLike, unit: ArrayLike = 1.0
    ) -> None:
        set_fields(self, **as_gaussian(self, mean, cov, unit))

    def in_unit(self, unit: jax.Array) -> "GaussianDenoiser":
        ratio = self.unit / unit
        return GaussianDenoiser(ratio * self.mean, self.cov.scale(ratio**2), unit)

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        variance = jnp.asarray(sigma, self.dtype) ** 2
        deviation = flatten_events(x_t - self.mean, self.event_shape)
        # V / sigma^2, with V the conditional covariance, is the same matrix and needs no solve.
        shrunk = self.cov.conditional(variance).matvec(deviation) / variance[..., None]
        return self.mean + shrunk.reshape(x_t.shape)


@register
@dataclass(frozen=True, eq=False, init=False)
class MixtureDenoiser(Denoiser):
    r"""The exact denoiser of a Gaussian mixture, an oracle for multimodal problems.

    .. math:: D(x_t, \sigma) = \sum_k p(k \mid x_t) \, E_k[x \mid x_t], \quad
        p(k \mid x_t) \propto w_k \, \mathcal{N}(x_t; \mu_k, \Sigma_k + \sigma^2 I)

    Its Gaussian summary has the mixture's mean and covariance.

    Args:
        weights: Nonnegative weights that sum to one, with shape ``(k,)``.
        means: Components' means, with shape ``(k, *event)``.
        covs: A `Covariance` whose parameters have a leading axis ``k`` (or none, if it is shared),
            or matrices of shape ``(k, d, d)``.
        unit: The unit of means and covariances in units of the data.

    Raises:
        ValueError: If the sizes of weights, means and covariances differ.
    """

    weights: jax.Array
    means: jax.Array
    covs: Covariance
    mean: jax.Array = field(init=False)
    cov: Covariance = field(init=False)
    unit: jax.Array

    def __init__(
        self,
        weights: ArrayLike,
        means: ArrayLike,
        covs: Covariance | ArrayLike,
        unit: ArrayLike = 1.0,
    ) -> None:
        weights, means = as_floating(weights), as_floating(means)
        if weights.ndim != 1 or means.shape[:1] != weights.shape:
            raise ValueError(
                "MixtureDenoiser: expected weights of shape (k,) and means of shape (k, *event), "
                f"got {weights.shape} and {means.shape}."
            )
        num, *event_shape = means.shape
        covs = as_covariance("MixtureDenoiser", covs, means.dtype)
        check_size("MixtureDenoiser", tuple(event_shape), covs)
        batch_shape = jnp.shape(covs.trace())
        if batch_shape not in ((), (num,)):
            raise ValueError(
                f"MixtureDenoiser: {num} components need covariances with a leading axis of "
                f"length {num}, or none; got leading axes {batch_shape}."
            )
        if not isinstance(weights, jax.core.Tracer):
            found = np.asarray(weights)
            if not (found >= 0).all() or abs(found.sum() - 1) > 1e-3:
                raise ValueError(
                    "MixtureDenoiser: expected weights that are not negative and sum to one, got "
                    f"{found}; divide them by their sum."
                )
        weights = (weights / weights.sum()).astype(means.dtype)
        mean = einsum("k,k...->...", weights, means)
        within = jnp.broadcast_to(covs.dense(), (num, covs.size, covs.size))
        between = (means - mean).reshape(num, -1)
        cov = einsum("k,kij->ij", weights, within)
        cov = cov + einsum("k,ki,kj->ij", weights, between, between)
        summary = {"mean": mean, "cov": Dense.from_matrix(cov)}
        unit = as_unit("MixtureDenoiser", unit, means.dtype)
        set_fields(self, weights=weights, means=means, covs=covs, unit=unit, **summary)

    def in_unit(self, unit: jax.Array) -> "MixtureDenoiser":
        ratio = self.unit / unit
        return MixtureDenoiser(self.weights, ratio * self.means, self.covs.scale(ratio**2), unit)

    def __call__(self, x_t: jax.Array, sigma: jax.Array | float) -> jax.Array:
        variance = jnp.asarray(sigma, self.dtype)[..., None] ** 2
        means = flatten_events(self.means, self.event_shape)
        deviation = flatten_events(x_t, self.event_shape)[..., None, :] - means
        noisy = self.covs.noisy(variance)
        solution = noisy.solve(deviation)
        log_density = -0.5 * (jnp.sum(deviation * solution, axis=-1) + noisy.logdet())
        posterior = jax.nn.softmax(jnp.log(self.weights) + log_density, axis=-1)
        x_hat = jnp.sum(posterior[..., None] * (means + self.covs.matvec(solution)), axis=-2)
        return x_hat.reshape(x_t.shape)
