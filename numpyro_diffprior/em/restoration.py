"""Events of linear Gaussian models: draws and means of their posteriors, by one solve each.

Draws need no factorization: draws of the prior and of the noise are corrected by a solve, at the
cost of a posterior mean.

References:
    Papandreou and Yuille, *Gaussian sampling by local perturbations*, NeurIPS 2010 (draws by one
    solve for perturbed observations).
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.guidance.covariances import GaussianCovariance, PosteriorOperator
from numpyro_diffprior.guidance.likelihood import Likelihood, Linearization
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.linalg.stationary import Stationary

__all__ = ["Restored", "block_key", "draw_linear_gaussian", "restore_linear_gaussian"]


class Restored(NamedTuple):
    """Events of a linear Gaussian model; ``simulated + observed - restored`` is a posterior draw.

    Attributes:
        observed: Posterior means given the observed values, with shape ``(*batch, *event)``.
        simulated: Draws of the prior, with the same shape, or None.
        restored: Posterior means given values simulated from these draws, or None.
    """

    observed: jax.Array
    simulated: jax.Array | None = None
    restored: jax.Array | None = None


def draw_linear_gaussian(
    rng_key: jax.Array, denoiser: Denoiser, likelihood: Likelihood
) -> jax.Array:
    r"""Draw events from their posterior under a Gaussian prior and a linear likelihood.

    With :math:`x_0` a draw of the prior and :math:`n` one of the noise,

    .. math:: x = x_0 + \Sigma A^T (N + A \Sigma A^T)^{-1} (y - A x_0 - b - n)

    is an exact draw of the posterior, up to a hundredth of its deviations where conjugate
    gradients solve.

    Args:
        rng_key: Random key.
        denoiser: The prior, whose mean and covariance are taken.
        likelihood: A linear likelihood.

    Returns:
        An event for each of the likelihood's batch, with shape ``(*batch, *event)``.
    """
    key_event, key_noise = jax.random.split(rng_key)
    x_0 = denoiser.mean + _draw_shift(key_event, denoiser, likelihood.batch_shape)
    local = likelihood.linearize(x_0)
    residual = local.residual - _draw_noise(key_noise, local)
    return x_0 + _shift(denoiser, likelihood, x_0, local, residual)


def restore_linear_gaussian(
    rng_key: jax.Array | None, denoiser: Denoiser, likelihood: Likelihood
) -> Restored:
    """Restore events from their observations, and draws of the prior from simulated ones.

    Under a stationary prior all coefficients of the draws have the modulus of their deviation,
    and random phases.

    Args:
        rng_key: Random key; None for no draws.
        denoiser: The prior, whose mean and covariance are taken.
        likelihood: A linear likelihood.
    """
    batch_shape = likelihood.batch_shape
    mean = jnp.broadcast_to(denoiser.mean, (*batch_shape, *denoiser.event_shape))
    local = likelihood.linearize(mean)
    if rng_key is None:
        return Restored(mean + _shift(denoiser, likelihood, mean, local, local.residual))
    key_event, key_noise = jax.random.split(rng_key)
    shift = _draw_shift(key_event, denoiser, batch_shape, equal=True)
    simulated = local.matvec(shift.reshape(*batch_shape, -1)) + _draw_noise(key_noise, local)
    shifts = jax.vmap(partial(_shift, denoiser, likelihood, mean, local))(
        jnp.stack([local.residual, simulated])
    )
    return Restored(mean + shifts[0], mean + shift, mean + shifts[1])


def block_key(rng_key: jax.Array, group: int, indices: dict[str, jax.Array]) -> jax.Array:
    """Return the key of a block of a group of sites, given the indices of its elements."""
    first = jnp.concatenate([jnp.array([group]), *[index[:1] for index in indices.values()]])
    return reduce(jax.random.fold_in, first, rng_key)


def _draw_shift(
    rng_key: jax.Array, denoiser: Denoiser, batch_shape: tuple[int, ...], equal: bool = False
) -> jax.Array:
    """Draw events of a Gaussian, minus its mean; of equal moduli if it is stationary."""
    cov = denoiser.cov
    z = jax.random.normal(rng_key, (*batch_shape, denoiser.event_size), denoiser.dtype)
    if equal and isinstance(cov, Stationary):
        z = cov.equalize(z)
    return cov.sqrt_matvec(z).reshape(*batch_shape, *denoiser.event_shape)


def _draw_noise(rng_key: jax.Array, local: Linearization) -> jax.Array:
    noise = jax.random.normal(rng_key, local.residual.shape, local.residual.dtype)
    return local.noise.sqrt_matvec(noise)


def _shift(
    denoiser: Denoiser,
    likelihood: Likelihood,
    x: jax.Array,
    local: Linearization,
    residual: jax.Array,
) -> jax.Array:
    """Return what a residual adds to the mean of events."""
    # Errors of the draws would bias the fit.
    solve = MMPS(GaussianCovariance(), atol=0.01).choose_solve(denoiser, likelihood)
    cov = denoiser.cov
    prior = PosteriorOperator(x_hat=x, matvec=cov.matvec, pull=cov.matvec, closed_form=cov)
    local = local._replace(residual=residual)
    return solve(local, prior, partial(likelihood.operator, x)).shift.reshape(x.shape)
