"""A warning where draws of one particle are biased, and none where they are good."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_diffprior as ndp
from numpyro_diffprior.infer import diagnostics
from tests.counting import compilations, counted

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SIZE, NUM = 6, 4
SAMPLER = ndp.samplers.MultistepSDE(16)
GAUSSIAN = ndp.DiffusionPrior(
    ndp.GaussianDenoiser(jnp.zeros(SIZE), jnp.eye(SIZE)), sampler=SAMPLER
)
MIXTURE = ndp.DiffusionPrior(
    ndp.MixtureDenoiser(np.ones(3) / 3, 3 * RNG.normal(size=(3, SIZE)), 0.3 * np.eye(SIZE)),
    sampler=SAMPLER,
)
KERNELS = ndp.DiffusionPrior(
    ndp.GaussianDenoiser(jnp.array([0.2, 1.0, 0.2]), 0.1 * jnp.eye(3)), sampler=SAMPLER
)
X = RNG.normal(size=(NUM, SIZE))
DIRECTION = RNG.normal(size=(SIZE, 1))


def make_model(mean, scale):
    def model(prior, y):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(mean(x), scale).to_event(1), obs=y)

    return model


def observe(mean, scale, x=X):
    clean = np.asarray(mean(jnp.asarray(x)))
    return clean + scale * np.random.default_rng(1).normal(size=clean.shape)


def blur(x, kernel):
    return jax.vmap(lambda x: jnp.convolve(x, kernel, mode="same"))(x)


def capped(x):
    return jnp.minimum(x, 0.5)


def projected(x):
    return x @ DIRECTION


def of_capped():
    return make_model(capped, 0.1), GAUSSIAN, observe(capped, 0.1)


def of_an_unknown_kernel():
    def model(priors, y):
        kernel = numpyro.sample("kernel", priors["kernel"])
        with numpyro.plate("events", NUM):
            x = numpyro.sample("x", priors["x"])
        numpyro.sample("y", dist.Normal(blur(x, kernel), 0.05).to_event(2), obs=y)

    y = observe(lambda x: blur(x, jnp.array([0.5, 0.8, 0.0])), 0.05)
    return model, {"kernel": KERNELS, "x": GAUSSIAN}, y


def of_censored():
    def model(prior, y):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            fn = dist.RightCensoredDistribution(dist.Normal(x, 0.1), y >= 0.5)
            numpyro.sample("y", fn.to_event(1), obs=y)

    return model, GAUSSIAN, np.minimum(observe(jnp.asarray, 0.1), 0.5)


def of_modes():
    x = MIXTURE.sample(KEY, (NUM,))
    return make_model(projected, 0.5), MIXTURE, observe(projected, 0.5, x)


@pytest.mark.parametrize(
    "problem",
    [
        of_capped,
        pytest.param(of_an_unknown_kernel, marks=pytest.mark.computes),
        of_censored,
        of_modes,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.filterwarnings("ignore:.*do not fit what was observed")
def test_bias_is_told_once(problem):
    model, prior, y = problem()
    match = r"one particle are biased for site '.*num_particles=16"
    with pytest.warns(UserWarning, match=match):
        ndp.sample_posterior(KEY, model, prior, y, num_samples=256)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ndp.sample_posterior(KEY, model, prior, y, num_samples=256)
    assert not any("biased" in str(warning.message) for warning in found)


def of_precise():
    return make_model(jnp.asarray, 1e-3), GAUSSIAN, observe(jnp.asarray, 1e-3)


def of_a_bend():
    return make_model(jnp.tanh, 0.3), GAUSSIAN, observe(jnp.tanh, 0.3)


def of_one_mode():
    x = MIXTURE.sample(KEY, (NUM,))
    return make_model(jnp.asarray, 0.5), MIXTURE, observe(jnp.asarray, 0.5, x)


@pytest.mark.parametrize(
    "problem", [of_precise, of_a_bend, of_one_mode], ids=lambda function: function.__name__
)
@pytest.mark.filterwarnings("ignore:.*do not fit what was observed")
def test_nothing_is_said_of_good_draws(problem):
    """A warning is an error in these tests."""
    model, prior, y = problem()
    ndp.sample_posterior(KEY, model, prior, y, num_samples=256)


def test_it_costs_nothing_where_guidance_is_exact():
    model, executions = counted(of_precise()[0])
    y = of_precise()[2]
    ndp.sample_posterior(KEY, model, GAUSSIAN, y, num_samples=256)
    executions.clear()
    with compilations() as count:
        ndp.sample_posterior(KEY, model, GAUSSIAN, y, num_samples=256)
    assert (len(executions), count.compiled) == (1, 0)


def test_nothing_is_compared_for_few_draws(monkeypatch):
    monkeypatch.setattr(diagnostics, "sample_first_block", None)  # must not be called
    model, prior, y = of_a_bend()
    ndp.sample_posterior(KEY, model, prior, y, num_samples=31)


@pytest.mark.parametrize("scale", [1e-26, 1.0, 1e26])
def test_draws_of_another_width_are_found(scale):
    """Twice as wide, and twice as wide plus another mean."""
    x = scale * RNG.normal(size=(64, NUM, SIZE)).astype(np.float32)
    reference = scale * RNG.normal(size=(16, NUM, SIZE)).astype(np.float32)
    same, wide, off = (
        diagnostics._compare(samples, reference) for samples in (x, 2 * x, x + np.float32(scale))
    )
    assert abs(same.z) < 4 < min(wide.z, off.z)
    np.testing.assert_allclose([same.ratio, wide.ratio], [1.0, 2.0], rtol=0.2)
    np.testing.assert_allclose(off.ratio, 2**0.5, rtol=0.2)
