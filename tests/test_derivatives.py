"""Derivatives of a prior's log-density, of first and second order, forward and reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from numpyro.optim import Adam

import numpyro_diffprior as ndp

COV = jnp.asarray([[1.0, 0.3], [0.3, 0.5]])
PRECISION = np.linalg.inv(COV)
PRIOR = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(2), COV))
X = jnp.asarray([0.3, -0.2])


@pytest.mark.parametrize("gradient", [jax.grad, jax.jacfwd, jax.jacrev])
def test_gradients(gradient):
    np.testing.assert_allclose(gradient(PRIOR.log_prob)(X), -PRECISION @ X, rtol=1e-3)


@pytest.mark.parametrize(
    "hessian",
    [jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacfwd(jax.grad(f))],
)
def test_hessians(hessian):
    np.testing.assert_allclose(hessian(PRIOR.log_prob)(X), -PRECISION, rtol=1e-3)


@pytest.mark.parametrize("gradient", [jax.grad, jax.jacfwd])
def test_gradients_of_the_prior_itself(gradient):
    """Of a factor of its covariance: d/ds [-log s - x^T P x / (2 s)] at one, in two dimensions."""

    def log_prob(factor):
        return ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(2), factor * COV)).log_prob(X)

    expected = -1 + 0.5 * X @ PRECISION @ X
    np.testing.assert_allclose(gradient(log_prob)(1.0), expected, rtol=1e-3)


def test_laplace_approximation():
    """Its covariance is the inverse of the Hessian at the mode: here, of the posterior."""

    def model(prior, y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    guide = AutoLaplaceApproximation(model)
    y = jnp.asarray([1.0, -1.0])
    result = SVI(model, guide, Adam(0.1), Trace_ELBO()).run(
        jax.random.key(0), 200, PRIOR, y, progress_bar=False
    )
    posterior = guide.get_posterior(result.params)
    precision = PRECISION + np.eye(2) / 0.25
    np.testing.assert_allclose(
        posterior.covariance_matrix, np.linalg.inv(precision), rtol=1e-2, atol=1e-3
    )
    np.testing.assert_allclose(posterior.mean, np.linalg.solve(precision, y / 0.25), atol=1e-2)
