"""Likelihoods that are read as elementwise from models, or not, against dense posteriors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_diffprior as ndp
from numpyro_diffprior.linalg.covariances import DiagonalPlusLowRank
from numpyro_diffprior.reading.reader import read
from tests.oracles import gaussian_posterior_denoiser, tolerance

RNG = np.random.default_rng(0)
N, D, NOISE, SIGMA = 3, 6, 0.3, 0.7
MEAN, FACTOR = RNG.normal(size=D), RNG.normal(size=(D, 2))
DIAG, GAIN = RNG.uniform(0.2, 1.0, D), RNG.uniform(0.5, 2.0, D)
LEFT, RIGHT, TWICE = np.array([0, 1, 2, 3]), np.array([1, 2, 3, 5]), np.array([0, 0, 3])
X_T = RNG.normal(size=(N, D))
IDENTITY = np.eye(D)

# A mean as a function of events, its matrix, and whether it is elementwise.
MEANS = {
    "gain": (lambda x: GAIN * x, np.diag(GAIN), True),
    "subsampling, one value twice": (lambda x: x[..., TWICE], IDENTITY[TWICE], True),
    "in another order": (lambda x: jnp.take(x, 5 - np.arange(D), -1), IDENTITY[::-1], True),
    "sums of neighbors": (
        lambda x: jnp.take(x, LEFT, -1) + jnp.take(x, RIGHT, -1),
        IDENTITY[LEFT] + IDENTITY[RIGHT],
        False,
    ),
    "differences": (lambda x: jnp.diff(x), np.diff(IDENTITY, axis=0), False),
    "sums of shifted values": (
        lambda x: x + jnp.roll(x, 1, -1) + jnp.roll(x, 2, -1),
        IDENTITY + np.roll(IDENTITY, -1, 1) + np.roll(IDENTITY, -2, 1),
        False,
    ),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("num_sites", [1, 2])
def test_posterior_means(name, num_sites, caplog):
    """Of a Gaussian of low rank given noisy events and what some sites observe of them."""
    mean, matrix, elementwise = MEANS[name]
    m = len(matrix)
    seen = RNG.random((num_sites, N, m)) < 0.7
    y = RNG.normal(size=(num_sites, N, m))

    def model(prior, seen, y):
        with numpyro.plate("n", N):
            seen, y = (numpyro.subsample(v, event_dim=1) for v in (seen, y))
            x = numpyro.sample("x", prior)
            for i in range(num_sites):
                noisy = dist.Normal(mean(x), NOISE).mask(seen[i])
                numpyro.sample(f"y{i}", noisy.to_event(1), obs=y[i])

    cov = DiagonalPlusLowRank(jnp.asarray(DIAG), jnp.asarray(FACTOR))
    prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.asarray(MEAN), cov))
    bound = read(model, (prior, jnp.asarray(seen), jnp.asarray(y)), {})
    block = bound.reading.groups[0].bind(bound.data)
    assert block.likelihood.elementwise == elementwise

    guidance = ndp.MMPS(ndp.guidance.GaussianCovariance())
    with caplog.at_level("INFO", logger="numpyro_diffprior.guidance.mmps"):
        posterior = guidance.condition(block.denoiser, block.likelihood)
    assert ("ElementwiseSolve" if elementwise else "FactoredSolve") in caplog.text
    unit = float(block.denoiser.unit)
    found = unit * np.asarray(posterior(jnp.asarray(X_T / unit), SIGMA / unit))
    dense = np.diag(DIAG) + FACTOR @ FACTOR.T
    for n in range(N):
        rows = np.concatenate([matrix[seen[i, n]] for i in range(num_sites)])
        values = np.concatenate([y[i, n, seen[i, n]] for i in range(num_sites)])
        noise = NOISE**2 * np.eye(len(values))
        expected = gaussian_posterior_denoiser(MEAN, dense, rows, noise, values, X_T[n], SIGMA)
        np.testing.assert_allclose(found[n], expected, atol=20 * tolerance())


FAMILIES = {
    "counts": (lambda x: dist.Poisson(jnp.exp(x)), 2.0, True),
    "a mean that bends": (lambda x: dist.Normal(jnp.tanh(x), NOISE), 0.5, True),
    "positive values": (lambda x: dist.Gamma(jnp.exp(x), 2.0), 1.5, True),
    # Both parameters depend on the event, and their errors are correlated.
    "unknown noise": (lambda x: dist.Normal(x, jnp.exp(0.3 * x)), 0.5, False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_nonlinear_likelihoods(name):
    """Guidance is that of the factored matrix."""
    family, value, elementwise = FAMILIES[name]

    def model(prior, mask):
        with numpyro.plate("n", N):
            mask = numpyro.subsample(mask, event_dim=1)
            x = numpyro.sample("x", prior)
            y = jnp.full(x.shape, value)
            numpyro.sample("y", family(x).mask(mask).to_event(1), obs=y)

    cov = DiagonalPlusLowRank(jnp.asarray(DIAG), jnp.asarray(FACTOR / 2))
    prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.asarray(MEAN / 2), cov))
    bound = read(model, (prior, jnp.asarray(RNG.random((N, D)) < 0.7)), {})
    block = bound.reading.groups[0].bind(bound.data)
    assert block.likelihood.elementwise == elementwise
    guidance = ndp.MMPS(ndp.guidance.GaussianCovariance())
    x_t = jnp.asarray(X_T / 2)
    found, expected = (
        jax.jit(guidance.condition(block.denoiser, likelihood).guide)(x_t, SIGMA)
        for likelihood in (block.likelihood, replace(block.likelihood, elementwise=False))
    )
    tol = 100 * tolerance()
    np.testing.assert_allclose(found.x_hat_y, expected.x_hat_y, atol=tol)
    np.testing.assert_allclose(found.log_twist, expected.log_twist, rtol=tol, atol=tol)
