"""Log-evidences against closed forms, and their errors against their spread."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import numpyro_diffprior as ndp

NUM_EVENTS, D, NOISE = 200, 3, 0.4
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(NUM_EVENTS, 2, D))
GAUSSIAN = np.ones(1), RNG.normal(size=(1, D)), oracles.spd(RNG, D)[None]
MIXTURE = (
    np.array([0.3, 0.7]),
    np.array([[-2.0, 0, 1], [2.0, 1, 0]]),
    np.stack([0.5 * np.eye(D)] * 2),
)


def model(prior, matrix, y=None):
    with numpyro.plate("n", len(matrix)):
        matrix = numpyro.subsample(matrix, event_dim=2)
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        mean = jnp.einsum("...ij,...j->...i", matrix, x)
        numpyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)


def make_case(weights, means, covs):
    rng = np.random.default_rng(1)
    component = rng.choice(len(weights), size=NUM_EVENTS, p=weights)
    noise = np.einsum("nij,nj->ni", np.linalg.cholesky(covs)[component], rng.normal(size=(200, D)))
    x = means[component] + noise
    y = np.einsum("nij,nj->ni", MATRIX, x) + NOISE * rng.normal(size=(NUM_EVENTS, 2))
    exact = [
        logsumexp(
            [
                np.log(w)
                + multivariate_normal(a @ m, a @ c @ a.T + NOISE**2 * np.eye(2)).logpdf(v)
                for w, m, c in zip(weights, means, covs, strict=True)
            ]
        )
        for a, v in zip(MATRIX, y, strict=True)
    ]
    return y, np.asarray(exact)


def test_of_more_values_than_elements():
    """Their sufficient statistics guide the particles; the evidence is that of all values."""
    rng = np.random.default_rng(2)
    _, (mean,), (cov,) = GAUSSIAN
    matrix = rng.normal(size=(50, 12, D))
    y = np.einsum("nij,nj->ni", matrix, rng.multivariate_normal(mean, cov, 50))
    y += NOISE * rng.normal(size=y.shape)
    exact = [
        multivariate_normal(a @ mean, a @ cov @ a.T + NOISE**2 * np.eye(12)).logpdf(v)
        for a, v in zip(matrix, y, strict=True)
    ]
    denoiser = ndp.GaussianDenoiser(jnp.asarray(mean), jnp.asarray(cov))
    prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.MultistepSDE(64))
    found = ndp.log_evidence(jax.random.key(0), model, prior, matrix, y)
    error = np.asarray(found.value) - exact
    assert np.abs(error).max() < 0.5
    assert abs(error.mean()) < 0.05


@pytest.mark.parametrize("case", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
def test_agrees_with_the_closed_form_within_its_error(case):
    y, exact = make_case(*case)
    prior = ndp.DiffusionPrior(ndp.MixtureDenoiser(*case), sampler=ndp.samplers.MultistepSDE(64))
    found = ndp.log_evidence(jax.random.key(0), model, prior, MATRIX, y, num_estimates=16)
    assert found.value.shape == found.standard_error.shape == (NUM_EVENTS,)
    # Unbiased where it is an estimate of p(y), up to the steps' bias.
    ratio = np.exp(np.asarray(found.value) - exact)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(NUM_EVENTS) + 0.01
    # The errors that it states are those that it makes.
    error = np.asarray(found.standard_error)
    assert np.median(error) < 0.2
    scores = (np.asarray(found.value) - exact) / error
    assert 0.7 < np.std(scores[error < 0.3]) < 1.5
    np.testing.assert_allclose(found.total, found.value.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.total_standard_error, np.sqrt(np.sum(error**2)), rtol=1e-5)


def test_chooses_the_prior_that_made_the_data():
    y, _ = make_case(*MIXTURE)
    denoiser = ndp.MixtureDenoiser(*MIXTURE)
    gaussian = ndp.GaussianDenoiser(denoiser.mean, denoiser.cov)
    values = [
        ndp.log_evidence(jax.random.key(0), model, ndp.DiffusionPrior(d), MATRIX, y)
        for d in (denoiser, gaussian)
    ]
    error = np.hypot(*(float(v.total_standard_error) for v in values))
    assert float(values[0].total - values[1].total) > 5 * error


@pytest.mark.parametrize("name", ["num_estimates", "num_particles"])
def test_refuses_what_has_no_error(name):
    prior = ndp.DiffusionPrior(ndp.MixtureDenoiser(*GAUSSIAN))
    with pytest.raises(ValueError, match=f"expected {name} >= 2, got 1"):
        ndp.log_evidence(
            jax.random.key(0), model, prior, MATRIX, np.zeros((NUM_EVENTS, 2)), **{name: 1}
        )


# ArviZ before 1.0 fills a frame of one type by another.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:pandas", "ignore::DeprecationWarning:arviz"
)
def test_priors_compared_in_arviz():
    value = RNG.normal(size=(20, 5))
    difference = 0.5 + 0.2 * RNG.normal(size=(20, 5))
    better, worse = (
        ndp.LogEvidence(jnp.asarray(v), jnp.zeros((20, 5))) for v in (value, value - difference)
    )
    table = az.compare({"worse": worse.to_elpd(), "better": better.to_elpd()})
    assert list(table.index) == ["better", "worse"]
    assert abs(table["elpd_diff"]["worse"]) == pytest.approx(difference.sum(), rel=0.1)
    assert table["dse"]["worse"] == pytest.approx(10 * difference.std(), rel=0.1)
    assert table["se"]["better"] == pytest.approx(10 * value.std(), rel=0.1)
    assert "100 observations" in str(better.to_elpd())
