"""Closed forms, written densely in NumPy and float64, and small problems to try them on."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from numpyro_diffprior.linalg.covariances import (
    Blocks,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Isotropic,
    Repeated,
)
from numpyro_diffprior.linalg.stationary import Stationary
from numpyro_diffprior.linalg.stationary_low_rank import StationaryPlusLowRank

COVARIANCES = (
    "Isotropic",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Dense",
    "Blocks",
    "Repeated",
    "Stationary",
    "StationaryPlusLowRank",
)


def tolerance(float32=1e-5, float64=1e-10):
    """Return the tolerance for the floating type that the tests run in."""
    return float64 if jax.config.jax_enable_x64 else float32


def spd(rng, size, low=0.3, high=2.0):
    """Return a random symmetric matrix with eigenvalues between ``low`` and ``high``."""
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (q * np.geomspace(low, high, size)) @ q.T


def covariance(name, rng, size):
    """Return a random covariance of each type, with variances of about one."""
    match name:
        case "Isotropic":
            return Isotropic(jnp.asarray(0.7), size)
        case "Diagonal":
            return Diagonal(jnp.asarray(rng.uniform(0.3, 2.0, size)))
        case "DiagonalPlusLowRank":
            diag = jnp.asarray(rng.uniform(0.3, 1.0, size))
            return DiagonalPlusLowRank(diag, jnp.asarray(0.6 * rng.normal(size=(size, 2))))
        case "Dense":
            return Dense.from_matrix(jnp.asarray(spd(rng, size)))
        case "Blocks":
            parts = covariance("Dense", rng, size // 2), covariance("Diagonal", rng, -(-size // 2))
            return Blocks(parts if size > 1 else parts[1:])
        case "Repeated":
            num = next(n for n in (3, 2, size) if size % n == 0)
            blocks = [covariance("Dense", rng, size // num) for _ in range(num)]
            return Repeated(jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks), num)
        case "Stationary":
            num = next(n for n in (2, 1) if size % n == 0)
            grid = (size // num,)
            power = np.abs(np.fft.fft(rng.normal(size=(*grid, num)), axis=0)) + 0.3
            rotation, _ = np.linalg.qr(rng.normal(size=(num, num)))
            return Stationary(jnp.asarray(power.reshape(-1)), jnp.asarray(rotation), grid)
        case "StationaryPlusLowRank":
            factor = jnp.asarray(0.6 * rng.normal(size=(size, 2)))
            return StationaryPlusLowRank(covariance("Stationary", rng, size), factor)


def dense(cov):
    """Return a covariance as a float64 matrix."""
    return np.asarray(cov.dense(), np.float64)


def gaussian_posterior(mean, cov, matrix, cov_y, y):
    r"""Return mean and covariance of :math:`x \mid y`, for :math:`y \sim N(A x, \Sigma_y)`."""
    gain = np.linalg.solve(matrix @ cov @ matrix.T + cov_y, matrix @ cov).T
    return mean + gain @ (y - matrix @ mean), cov - gain @ matrix @ cov


def gaussian_denoiser(mean, cov, x_t, sigma):
    r"""Return :math:`E[x \mid x_t]`: noise is an observation of everything."""
    identity = np.eye(len(mean))
    return gaussian_posterior(mean, cov, identity, sigma**2 * identity, x_t)[0]


def gaussian_posterior_denoiser(mean, cov, matrix, cov_y, y, x_t, sigma):
    r"""Return :math:`E[x \mid x_t, y]`, given the stacked observation :math:`(x_t, y)`."""
    size = len(mean)
    joint = np.zeros((size + len(y),) * 2)
    joint[:size, :size] = sigma**2 * np.eye(size)
    joint[size:, size:] = cov_y
    stacked = np.concatenate([np.eye(size), matrix])
    return gaussian_posterior(mean, cov, stacked, joint, np.concatenate([x_t, y]))[0]


def gaussian_log_twist(mean, cov, matrix, cov_y, y, x_t, sigma):
    r"""Return :math:`\log p(y \mid x_t)`, by way of the covariance of x given x_t."""
    identity = np.eye(len(mean))
    x_hat, cov_x = gaussian_posterior(mean, cov, identity, sigma**2 * identity, x_t)
    return multivariate_normal.logpdf(y, matrix @ x_hat, cov_y + matrix @ cov_x @ matrix.T)


def mixture_posterior(weights, means, covs, matrix, cov_y, y):
    r"""Return weights, means and covariances of the mixture :math:`x \mid y`."""
    parts = [gaussian_posterior(m, c, matrix, cov_y, y) for m, c in zip(means, covs, strict=True)]
    evidence = [
        multivariate_normal.logpdf(y, matrix @ m, matrix @ c @ matrix.T + cov_y)
        for m, c in zip(means, covs, strict=True)
    ]
    log_weights = np.log(weights) + np.asarray(evidence)
    posterior = np.exp(log_weights - logsumexp(log_weights))
    return posterior, np.stack([m for m, _ in parts]), np.stack([c for _, c in parts])


def mixture_denoiser(weights, means, covs, x_t, sigma):
    r"""Return :math:`E[x \mid x_t]` under a mixture."""
    identity = np.eye(means.shape[-1])
    posterior, centers, _ = mixture_posterior(
        weights, means, covs, identity, sigma**2 * identity, x_t
    )
    return posterior @ centers
