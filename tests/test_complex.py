"""Complex means and values: pairs of real and imaginary parts, each with the scale that is stated.

Closed forms: the same models written with real numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive

import numpyro_diffprior as ndp
from numpyro_diffprior.reading.reader import read
from tests.oracles import tolerance

N, PIXELS = 3, 4
RNG = np.random.default_rng(0)
PRIOR = ndp.DiffusionPrior(
    ndp.GaussianDenoiser(jnp.zeros((PIXELS, 2)), jnp.eye(2 * PIXELS)),
    sampler=ndp.samplers.MultistepSDE(32),
)
Z = jnp.asarray(RNG.normal(size=(N, PIXELS)) + 1j * RNG.normal(size=(N, PIXELS)))
MASK = jnp.asarray(RNG.uniform(size=(N, PIXELS)) < 0.7)
SCALE = 0.3
TRIL = jnp.asarray(np.linalg.cholesky(0.1 * np.eye(PIXELS) + 0.05))


def image(x):
    return x[..., 0] + 1j * x[..., 1]


def pairs(z, axis=-1):
    return jnp.stack([z.real, z.imag], axis)


def make_model(observe):
    def model(prior, z=None):
        with numpyro.plate("n", N):
            z = None if z is None else numpyro.subsample(z, event_dim=1)
            x = numpyro.sample("x", prior)
            observe(x, z)

    return model


def site(fn, obs):
    numpyro.sample("z", fn, obs=obs)


# A model with complex numbers, and the same one with real numbers.
FAMILIES = {
    "Normal": (
        lambda x, z: site(dist.Normal(image(x), SCALE).to_event(1), z),
        lambda x, z: site(dist.Normal(x, SCALE).to_event(2), pairs(z)),
    ),
    "Normal of k-space": (
        lambda x, z: site(dist.Normal(jnp.fft.fft(image(x), norm="ortho"), SCALE).to_event(1), z),
        lambda x, z: site(
            dist.Normal(pairs(jnp.fft.fft(image(x), norm="ortho")), SCALE).to_event(2), pairs(z)
        ),
    ),
    "Normal with a mask": (
        lambda x, z: site(
            dist.Normal(image(x), jnp.linspace(0.2, 0.5, PIXELS)).mask(MASK).to_event(1),
            jnp.where(MASK, z, jnp.nan),
        ),
        lambda x, z: site(
            dist.Normal(x, jnp.linspace(0.2, 0.5, PIXELS)[:, None])
            .mask(MASK[..., None])
            .to_event(2),
            pairs(z),
        ),
    ),
    "Normal of a residual": (
        lambda x, z: site(dist.Normal(0.0, SCALE).expand([N, PIXELS]).to_event(1), z - image(x)),
        lambda x, z: site(dist.Normal(x, SCALE).to_event(2), pairs(z)),
    ),
    "StudentT": (
        lambda x, z: site(dist.StudentT(4.0, image(x), SCALE).to_event(1), z),
        lambda x, z: site(dist.StudentT(4.0, x, SCALE).to_event(2), pairs(z)),
    ),
    "Laplace": (
        lambda x, z: site(dist.Laplace(image(x), SCALE).to_event(1), z),
        lambda x, z: site(dist.Laplace(x, SCALE).to_event(2), pairs(z)),
    ),
    "MultivariateNormal": (
        lambda x, z: site(dist.MultivariateNormal(image(x), scale_tril=TRIL), z),
        lambda x, z: site(
            dist.MultivariateNormal(jnp.swapaxes(x, -1, -2), scale_tril=TRIL).to_event(1),
            pairs(z, -2),
        ),
    ),
    "LowRankMultivariateNormal": (
        lambda x, z: site(
            dist.LowRankMultivariateNormal(
                image(x), 0.3 * jnp.ones((PIXELS, 1)), jnp.ones(PIXELS)
            ),
            z,
        ),
        lambda x, z: site(
            dist.LowRankMultivariateNormal(
                jnp.swapaxes(x, -1, -2), 0.3 * jnp.ones((PIXELS, 1)), jnp.ones(PIXELS)
            ).to_event(1),
            pairs(z, -2),
        ),
    ),
    "scaled": (
        lambda x, z: handlers.scale(
            lambda: site(dist.Normal(image(x), SCALE).to_event(1), z), 2.0
        )(),
        lambda x, z: handlers.scale(
            lambda: site(dist.Normal(x, SCALE).to_event(2), pairs(z)), 2.0
        )(),
    ),
}


def likelihood_of(observe):
    bound = read(make_model(observe), (PRIOR, Z), {})
    (group,) = bound.reading.groups
    return group.bind(bound.data).likelihood


@pytest.mark.parametrize("name", FAMILIES)
def test_complex_sites_are_read_as_pairs(name):
    found, expected = map(likelihood_of, FAMILIES[name])
    x = jnp.asarray(RNG.normal(size=(N, PIXELS, 2)))
    tol = 20 * tolerance()
    np.testing.assert_allclose(found.log_prob(x), expected.log_prob(x), rtol=tol)
    local, other = found.linearize(x), expected.linearize(x)
    np.testing.assert_allclose(local.score(), other.score(), rtol=tol, atol=tol)
    v = x.reshape(N, -1)
    np.testing.assert_allclose(local.precision(v), other.precision(v), rtol=tol, atol=tol)
    np.testing.assert_array_equal(found.num_residuals, expected.num_residuals)
    assert found.linear == expected.linear


def test_posterior_and_evidence_have_the_closed_form():
    """Real and imaginary means alike, which were the point."""

    def model(prior, z):
        x = numpyro.sample("x", prior)
        numpyro.sample("z", dist.Normal(image(x), 0.1).to_event(1), obs=z)

    z = jnp.asarray([1 + 1j, -1 + 2j, 0.5 - 1j, 0.0 + 0j])
    draws = ndp.sample_posterior(jax.random.key(0), model, PRIOR, z, num_samples=2000)
    x = np.asarray(draws.samples["x"])
    mean, deviation = np.asarray(pairs(z)) / 1.01, np.sqrt(0.01 / 1.01)
    np.testing.assert_allclose(x.mean(0), mean, atol=4 * deviation / np.sqrt(2000) + 1e-3)
    np.testing.assert_allclose(x.std(0), deviation, rtol=4 / np.sqrt(4000) + 0.02)
    found = ndp.log_evidence(jax.random.key(1), model, PRIOR, z)
    expected = dist.Normal(0.0, np.sqrt(1.01)).log_prob(pairs(z)).sum()
    assert abs(found.total - expected) < 4 * found.total_standard_error + 0.05


def test_simulations_have_noise_in_both_parts():
    model = make_model(FAMILIES["Normal"][0])
    x = jnp.asarray(RNG.normal(size=(4000, N, PIXELS, 2)))
    predict = Predictive(ndp.complex_noise(model), {"x": x})
    error = np.asarray(predict(jax.random.key(2), PRIOR)["z"] - image(x))
    np.testing.assert_allclose(error.real.std(), SCALE, rtol=0.02)
    np.testing.assert_allclose(error.imag.std(), SCALE, rtol=0.02)
    assert abs(np.mean(error.real * error.imag)) < 0.01 * SCALE**2 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_density_of_values_is_that_of_pairs(family):
    """NumPyro's own inference differentiates it."""
    x = jnp.asarray(RNG.normal(size=(N, PIXELS, 2)))
    found, expected = (
        numpyro.infer.util.log_density(model, (PRIOR, Z), {}, {"x": x})[0]
        for model in (
            ndp.complex_noise(make_model(FAMILIES[family][0])),
            make_model(FAMILIES[family][1]),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.computes
def test_calibration_of_a_complex_model():
    model = make_model(FAMILIES["Normal of k-space"][0])
    found = ndp.calibrate(jax.random.key(3), model, PRIOR, Z, num_simulations=200, num_samples=79)
    pvalues = np.asarray(found.pvalues()["x"])
    assert pvalues.min() > 1e-4 / pvalues.size
    inside = np.asarray(found.coverage((0.5, 0.9))["x"])
    np.testing.assert_allclose(inside, [0.5, 0.9], atol=0.04)


ERRORS = {
    "real values": (
        lambda x, z: site(dist.Normal(image(x), SCALE).to_event(1), jnp.abs(z)),
        "'z': the mean is complex, but the values are real",
    ),
    "complex scale": (
        lambda x, z: site(dist.Normal(image(x), SCALE + 0j).to_event(1), z),
        "'z': a scale or covariance is complex",
    ),
    "another family": (
        lambda x, z: site(dist.Gumbel(image(x), SCALE).to_event(1), z),
        "'z': Gumbel is not read with complex values",
    ),
    "a factor": (
        lambda x, z: numpyro.factor("z", jnp.sum(image(x) - z, -1)),
        "'z': Unit is not read with complex values",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_right_is_refused(name):
    observe, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"observed site {message}"):
        likelihood_of(observe)
