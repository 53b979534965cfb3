"""Observations far more precise than the prior: draws end below their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from scipy.stats import multivariate_normal

import numpyro_diffprior as ndp

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SIZE, NUM_SEEN = 4, 2
ROOT = RNG.normal(size=(SIZE, SIZE))
COV = ROOT @ ROOT.T / SIZE + 0.1 * np.eye(SIZE)
Y = RNG.multivariate_normal(np.zeros(SIZE), COV, size=6)[:, :NUM_SEEN]
PRIOR = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(SIZE), COV))


def model(prior, y, scale):
    with numpyro.plate("events", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[..., :NUM_SEEN], scale).to_event(1), obs=y)


@pytest.mark.parametrize("num_particles", [1, 16])
@pytest.mark.parametrize("scale", [1e-3, 1e-4, 1e-5])
def test_draws_are_as_wide_as_the_noise(scale, num_particles):
    """Seen elements deviate by the noise, and hidden ones as they do given the seen."""
    draws = ndp.sample_posterior(
        KEY, model, PRIOR, Y, scale, num_samples=200, num_particles=num_particles
    )
    x = np.asarray(draws.samples["x"], float)
    residual = (x[..., :NUM_SEEN] - Y) / scale
    np.testing.assert_allclose(np.sqrt(np.mean(residual**2)), 1.0, rtol=0.07)
    seen, across = COV[:NUM_SEEN, :NUM_SEEN], COV[NUM_SEEN:, :NUM_SEEN]
    gain = across @ np.linalg.inv(seen)
    hidden = np.sqrt(np.diag(COV[NUM_SEEN:, NUM_SEEN:] - gain @ across.T))
    deviation = x[..., NUM_SEEN:].std(0).mean(0)
    np.testing.assert_allclose(deviation, hidden, rtol=0.05)
    bias = np.abs(x[..., NUM_SEEN:].mean(0) - Y @ gain.T) / hidden
    assert bias.mean() < 0.1


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_evidence(scale):
    """At a ten-thousandth of the prior's scale it was -169 +- 1 in place of -7."""
    found = ndp.log_evidence(KEY, model, PRIOR, Y, scale, num_particles=64)
    cov = COV[:NUM_SEEN, :NUM_SEEN] + scale**2 * np.eye(NUM_SEEN)
    expected = multivariate_normal(np.zeros(NUM_SEEN), cov).logpdf(Y).sum()
    assert abs(found.total - expected) < 4 * found.total_standard_error
    assert found.total_standard_error < 1.5


def test_the_particle_chain():
    kernel = ndp.ParticleGibbs(model, num_particles=16)
    mcmc = numpyro.infer.MCMC(kernel, num_warmup=5, num_samples=50, progress_bar=False)
    mcmc.run(KEY, PRIOR, Y, 1e-4)
    residual = (mcmc.get_samples()["x"][..., :NUM_SEEN] - Y) / 1e-4
    np.testing.assert_allclose(np.sqrt(np.mean(residual**2)), 1.0, rtol=0.2)


def test_one_precise_value_among_many():
    """The last noise level follows the most precise value."""
    scale = jnp.array([0.5, 1e-4])
    draws = ndp.sample_posterior(KEY, model, PRIOR, Y, scale, num_samples=200)
    residual = (draws.samples["x"][..., 1] - Y[:, 1]) / 1e-4
    np.testing.assert_allclose(np.sqrt(np.mean(residual**2)), 1.0, rtol=0.07)


def test_a_network_sees_no_level_that_it_was_not_trained_at():
    net = ndp.MLP((SIZE,), features=(8,), rngs=nnx.Rngs(0))
    levels = []

    @jax.tree_util.register_static
    class Recorded:
        event_shape = (SIZE,)

        def __call__(self, x, noise, *, rngs=None):
            levels.append(noise)
            return net(x, noise)

    denoiser = ndp.NetworkDenoiser(Recorded())
    denoiser(jnp.zeros(SIZE), 1e-6)
    np.testing.assert_allclose(levels[-1], np.log(denoiser.sigma_min) / 4, rtol=1e-5)


def test_noise_below_rounding_is_told():
    scale = 1e-3 * jnp.finfo(PRIOR.denoiser.dtype).eps
    with pytest.warns(UserWarning, match="the noise of .*too small against the prior's scale"):
        ndp.log_evidence(KEY, model, PRIOR, Y, scale, num_particles=2)
