"""NumPyro's own inference in the noise space of the sampler, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.contrib.einstein import RBFKernel, SteinVI
from numpyro.handlers import reparam, seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_sample, init_to_value
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

import numpyro_diffprior as ndp

RNG = np.random.default_rng(0)
MEAN, COV = RNG.normal(size=(2, 2)), oracles.spd(RNG, 4)
PRIOR = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.asarray(MEAN, "float32"), COV))
MATRIX = RNG.normal(size=(3, 4)) / 2
NUM_EVENTS, NOISE = 3, 0.5
Y = RNG.normal(size=(NUM_EVENTS, 3))
MODES = ndp.DiffusionPrior(
    ndp.MixtureDenoiser(jnp.array([0.3, 0.7]), jnp.array([[-2.0], [2.0]]), 0.25 * jnp.eye(1))
)


def plated(prior, y=None):
    with numpyro.plate("events", NUM_EVENTS):
        x = numpyro.sample("x", prior)
        mean = x.reshape(*x.shape[:-2], 4) @ MATRIX.T
        numpyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)


def one(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.5).to_event(1), obs=y)


def exactly(model, num_steps=32):
    return reparam(model, config={"x": ndp.DiffusionReparam(num_steps)})


def run_nuts(model, *args, num_samples=1000, **kwargs):
    mcmc = MCMC(NUTS(model, **kwargs), num_warmup=300, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(0), *args)
    return mcmc.get_samples()


def test_the_map_is_that_of_the_deterministic_sampler():
    sites = trace(seed(exactly(plated, 16), 0)).get_trace(PRIOR)
    z, x = sites["x_base"]["value"], sites["x"]["value"]
    assert sites["x"]["type"] == "deterministic"
    assert z.shape == x.shape == (NUM_EVENTS, 2, 2)
    sampler = ndp.samplers.MultistepODE(16)
    expected = sampler.run(jax.random.key(7), PRIOR.denoiser, sampler.start(PRIOR.denoiser, z))
    np.testing.assert_array_equal(x, expected)


def test_noise_has_the_density_of_a_standard_normal():
    sites = trace(seed(exactly(plated), 0)).get_trace(PRIOR)
    base = sites["x_base"]
    assert base["fn"].batch_shape == (NUM_EVENTS,)
    expected = -0.5 * jnp.sum(base["value"] ** 2, (-2, -1)) - 2 * np.log(2 * np.pi)
    np.testing.assert_allclose(base["fn"].log_prob(base["value"]), expected, rtol=1e-5)


def test_nuts_has_the_posterior_of_a_gaussian():
    x = run_nuts(exactly(plated), PRIOR, Y)["x"].reshape(-1, NUM_EVENTS, 4)
    for i in range(NUM_EVENTS):
        cov_y = NOISE**2 * np.eye(3)
        mean, cov = oracles.gaussian_posterior(MEAN.reshape(-1), COV, MATRIX, cov_y, Y[i])
        deviation = np.sqrt(np.diag(cov))
        # NUTS is antithetic on Gaussians: at least as good as a quarter of independent draws.
        error = deviation / np.sqrt(len(x) / 4)
        assert np.all(np.abs(x[:, i].mean(0) - mean) < 4.5 * error)
        np.testing.assert_allclose(x[:, i].std(0), deviation, rtol=0.15)


def test_nuts_weighs_the_modes_of_a_mixture():
    """In the noise, two modes are one: NUTS passes between them."""
    y = jnp.array([-0.4])
    samples = run_nuts(exactly(one, 64), MODES, y, num_samples=4000)["x"][:, 0]
    spread = np.array([(-0.4 + 2) ** 2, (-0.4 - 2) ** 2]) / (2 * (0.25 + 1.5**2))
    weights = np.array([0.3, 0.7]) * np.exp(-spread)
    expected = weights[0] / weights.sum()
    assert abs(np.mean(samples < 0) - expected) < 0.05


def test_inversion_is_where_posterior_draws_are():
    draws = ndp.sample_posterior(jax.random.key(1), plated, PRIOR, Y).samples["x"][0]
    z = ndp.DiffusionReparam(64).invert(PRIOR, draws)
    sites = trace(numpyro.handlers.substitute(exactly(plated, 64), {"x_base": z})).get_trace(
        PRIOR, Y
    )
    np.testing.assert_allclose(sites["x"]["value"], draws, atol=0.02)
    start = init_to_value(values={"x_base": z})
    x = run_nuts(exactly(plated), PRIOR, Y, num_samples=10, init_strategy=start)["x"]
    assert np.all(np.isfinite(x))


def test_svi():
    """A full-rank normal guide has the posterior of a Gaussian model, for the map is affine."""
    model = exactly(one)
    prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.ones(2), jnp.eye(2)))
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=8))
    result = svi.run(jax.random.key(0), 1500, prior, jnp.array([3.0, 0.0]), progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(4000,))
    expected = 1 + (np.array([3.0, 0.0]) - 1) / (1 + 1.5**2)
    np.testing.assert_allclose(draws["x"].mean(0), expected, atol=0.08)
    np.testing.assert_allclose(draws["x"].std(0), np.sqrt(1.5**2 / (1 + 1.5**2)), rtol=0.1)


@pytest.mark.slow
def test_stein_vi():
    """Particles in the noise are those of NumPyro's own Gaussian, for the map is a shift."""
    y = jnp.array([3.0, 0.0])
    prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.ones(2), jnp.eye(2)))

    def run(model, site, *args):
        guide = AutoDelta(model, init_loc_fn=init_to_sample)
        optim = numpyro.optim.Adam(0.05)
        stein = SteinVI(
            model, guide, optim, RBFKernel(), num_stein_particles=50, repulsion_temperature=50.0
        )
        state = stein.run(jax.random.key(0), 500, *args, progress_bar=False).state
        return stein.get_params(state)[f"{site}_auto_loc"]

    def value(z):
        fixed = substitute(exactly(one), {"x_base": z})
        return trace(seed(fixed, 0)).get_trace(prior, y)["x"]["value"]

    def gaussian(y):
        x = numpyro.sample("x", dist.Normal(jnp.ones(2), 1).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.5).to_event(1), obs=y)

    x = jax.vmap(value)(run(exactly(one), "x_base", prior, y))
    expected = run(gaussian, "x", y)
    np.testing.assert_allclose(x.mean(0), expected.mean(0), atol=0.02)
    np.testing.assert_allclose(jnp.cov(x.T), jnp.cov(expected.T), atol=0.05)
    np.testing.assert_allclose(x.mean(0), 1 + (y - 1) / (1 + 1.5**2), atol=0.02)


def test_expanded_and_declared_as_one_event():
    def model(prior):
        numpyro.sample("x", prior.expand([5]).to_event(1))

    sites = trace(seed(exactly(model), 0)).get_trace(PRIOR)
    assert sites["x"]["value"].shape == (5, 2, 2)
    assert sites["x_base"]["fn"].event_shape == (5, 2, 2)


def test_refuses_what_is_not_its_own():
    def observed(prior):
        numpyro.sample("x", prior, obs=jnp.zeros((2, 2)))

    with pytest.raises(ValueError, match="site 'x' is observed"):
        trace(seed(exactly(observed), 0)).get_trace(PRIOR)
    with pytest.raises(ValueError, match="expected a DiffusionPrior at site 'x', got Normal"):
        trace(seed(exactly(one), 0)).get_trace(dist.Normal(jnp.zeros(2), 1), jnp.zeros(2))
