"""Log-densities in place of observations: posteriors in closed form, for events of any size."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.evidence import log_evidence
from numpyro_diffprior.infer.posterior import sample_posterior
from numpyro_diffprior.linalg.covariances import Isotropic
from numpyro_diffprior.prior import DiffusionPrior

NUM, SCALE, Y = 512, 0.3, 2.0
MEAN, DEVIATION = Y / (1 + SCALE**2), SCALE / np.sqrt(1 + SCALE**2)
SIZES = [1, 64, 65, 784]


def make_prior(size):
    return DiffusionPrior(GaussianDenoiser(jnp.zeros(size), Isotropic(jnp.ones(()), size)))


def factor(prior):
    x = numpyro.sample("x", prior)
    numpyro.factor("l", -0.5 * jnp.sum((x - Y) ** 2) / SCALE**2)


def plate(prior):
    with numpyro.plate("n", 4):
        x = numpyro.sample("x", prior)
        numpyro.factor("l", -0.5 * jnp.sum((x - Y) ** 2, axis=-1) / SCALE**2)


def value_of_the_latent(prior):
    """Twice the latent is what is observed: as a value, and not Gaussian."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Logistic(0.0, 1e-3).to_event(1), obs=1e-3 * x / SCALE)


def check(x, mean, deviation):
    """Moments over draws and elements, which are all independent and alike."""
    x = np.asarray(x, np.float64)
    assert abs(x.mean() - mean) < 4 * deviation / np.sqrt(x.size) + 0.01 * deviation
    assert abs(x.std() / deviation - 1) < 4 / np.sqrt(2 * x.size) + 0.02


@pytest.mark.parametrize("model", [factor, plate], ids=["alone", "in a plate"])
@pytest.mark.parametrize("size", SIZES)
def test_a_gaussian_factor_has_the_closed_form(size, model):
    num_samples = max(8, NUM // size)
    for guidance in (None, MMPS(GaussianCovariance())):
        draws = sample_posterior(
            jax.random.key(0), model, make_prior(size), num_samples=num_samples, guidance=guidance
        )
        check(draws.samples["x"], MEAN, DEVIATION)


@pytest.mark.parametrize("size", SIZES)
def test_particles_have_the_closed_form(size):
    draws = sample_posterior(
        jax.random.key(1), factor, make_prior(size), num_samples=max(8, NUM // size),
        num_particles=8,
    )  # fmt: skip
    check(draws.samples["x"], MEAN, DEVIATION)


@pytest.mark.parametrize("size", [2, 65])
def test_evidence_of_a_factor(size):
    """The integral of the factor over the prior."""
    found = log_evidence(jax.random.key(2), factor, make_prior(size), num_particles=64)
    variance = 1 + SCALE**2
    expected = size * (np.log(SCALE) - 0.5 * np.log(variance) - 0.5 * Y**2 / variance)
    assert abs(found.total - expected) < 4 * found.total_standard_error + 0.05


@pytest.mark.parametrize("size", [64, 65])
def test_reduced_chi_square_is_that_of_observed_values(size):
    """A factor has no residuals; beside a site that has some, they count alone."""

    def both(prior):
        x = numpyro.sample("x", prior)
        numpyro.factor("l", -0.5 * jnp.sum((x - Y) ** 2) / SCALE**2)
        numpyro.sample("y", dist.Normal(x[:2], 0.5).to_event(1), obs=jnp.full(2, 1.5))

    prior = make_prior(size)
    draws = sample_posterior(jax.random.key(3), factor, prior)
    assert np.all(np.isnan(draws.stats["reduced_chi_square"]))
    draws = sample_posterior(jax.random.key(3), both, prior)
    expected = np.mean(((np.asarray(draws.samples["x"])[:, :2] - 1.5) / 0.5) ** 2, axis=-1)
    np.testing.assert_allclose(draws.stats["reduced_chi_square"], expected, rtol=1e-4)


FAMILIES = {
    "Laplace": lambda x: dist.Laplace(x, 0.3),
    "SoftLaplace": lambda x: dist.SoftLaplace(x, 0.3),
    "Gamma": lambda x: dist.Gamma(jnp.exp(x), 2.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_reduced_chi_square_of_densities_read_by_their_curvature(name):
    """It is one on average over exact draws of event and data, as in the stated moments.

    Gradient over curvature is no residual: for good draws it was up to 2,500, and one exactly
    where the density is not concave.
    """

    def model(prior, y, with_values):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", FAMILIES[name](x).to_event(1), obs=y)
            if with_values:
                numpyro.sample("z", dist.Normal(x[..., 0], 0.5), obs=jnp.ones(len(x)))

    prior, key = make_prior(3), jax.random.key(0)
    x = prior.sample(key, (300,))
    y = FAMILIES[name](x).sample(jax.random.key(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one particle may be biased
        draws = sample_posterior(key, model, prior, y, False, num_particles=16)
        both = sample_posterior(key, model, prior, y, True, num_samples=1)
    found = np.asarray(draws.stats["reduced_chi_square"])
    assert abs(found.mean() - 1) < 4 * found.std() / np.sqrt(found.size) + 0.05
    x = both.samples["x"]
    fn = FAMILIES[name](x)
    squares = [*np.moveaxis((y - fn.mean) ** 2 / fn.variance, -1, 0), (x[..., 0] - 1) ** 2 / 0.25]
    np.testing.assert_allclose(both.stats["reduced_chi_square"], np.mean(squares, 0), rtol=1e-3)


@pytest.mark.parametrize("size", [3, 65])
def test_a_log_density_that_is_not_concave(size):
    """Student's density far from its center, as a factor: moments by quadrature."""

    def robust(prior):
        x = numpyro.sample("x", prior)
        numpyro.factor("l", dist.StudentT(2.0, 3.0, 0.5).log_prob(x).sum())

    grid = np.linspace(-8, 8, 20_001)
    log_density = -0.5 * grid**2 - 1.5 * np.log1p(((grid - 3) / 0.5) ** 2 / 2)
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = np.sum(density * grid)
    deviation = np.sqrt(np.sum(density * (grid - mean) ** 2))
    x = sample_posterior(
        jax.random.key(4), robust, make_prior(size), num_samples=max(16, 1024 // size)
    ).samples["x"]
    # Two modes of each element: the Gaussian approximation is rough, but it sees the value.
    assert abs(np.asarray(x).mean() - mean) < 0.6 * deviation
    assert np.all(np.isfinite(x))
