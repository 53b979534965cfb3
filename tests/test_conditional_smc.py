"""Conditional SMC leaves posteriors as they are, and finds them from anywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mixture_posterior

from numpyro_diffprior.denoisers.exact import MixtureDenoiser
from numpyro_diffprior.diffusion.samplers import DDPM, MultistepSDE
from numpyro_diffprior.guidance.covariances import FlatPriorCovariance, GaussianCovariance
from numpyro_diffprior.guidance.likelihood import linear_gaussian
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.linalg.covariances import Isotropic
from numpyro_diffprior.particles.conditional_smc import diffuse_path, update_path
from numpyro_diffprior.particles.system import SamplingOptions

WEIGHTS, MEANS = np.array([0.3, 0.7]), np.array([[-3.0, 0.0], [3.0, 1.0]])
COVS, MATRIX, NOISE = np.stack([0.5 * np.eye(2)] * 2), np.array([[0.1, 1.0]]), 0.5
PRIOR = MixtureDenoiser(jnp.asarray(WEIGHTS), jnp.asarray(MEANS), jnp.asarray(COVS))
GUIDANCE = MMPS(GaussianCovariance())


def observe(y):
    return linear_gaussian(jnp.asarray(y), jnp.asarray(MATRIX), Isotropic(NOISE**2, 1), (2,))


@partial(jax.jit, static_argnums=(3, 4))
def update(rng_key, y, path, options, num_updates):
    def body(path, key):
        draw = update_path(key, PRIOR, observe(y), options, path)
        return draw.path, draw

    return jax.lax.scan(body, path, jax.random.split(rng_key, num_updates))


def prior_paths(rng_key, sampler, num_events):
    """Walk down the prior's chain and remember the way."""
    key_init, key_run = jax.random.split(rng_key)
    x_t = sampler.initial(key_init, PRIOR, (num_events,))

    def body(carry, inputs):
        carry = sampler.step(inputs[0], PRIOR, *carry, inputs[1])
        return carry, carry[0]

    inputs = jax.random.split(key_run, sampler.num_steps - 1), sampler.levels(PRIOR)
    _, path = jax.lax.scan(body, (x_t, jnp.zeros_like(x_t)), inputs)
    path = jnp.concatenate([x_t[None], path])
    return path, PRIOR(path[-1], sampler.sigmas(PRIOR)[-1])


def innovations(sampler, path):
    """The standard normal noise of a path under the prior's chain, ``(num_steps - 1, ...)``."""
    x_hat_prev, found = jnp.zeros_like(path[0]), []
    levels = sampler.levels(PRIOR)
    for i in range(sampler.num_steps - 1):
        level = jax.tree.map(lambda leaf, i=i: leaf[i], levels)
        x_hat = PRIOR(path[i], level.current)
        x_tilde = sampler.extrapolate(x_hat, x_hat_prev, level)
        mean, tau = sampler.transition(path[i], x_tilde, level)
        found.append((path[i + 1] - mean) / tau)
        x_hat_prev = x_hat
    return jnp.stack(found)


@pytest.mark.computes
@pytest.mark.parametrize("guidance", [GUIDANCE, MMPS(FlatPriorCovariance())])
@pytest.mark.parametrize(
    ("sampler", "least_moved"),
    # At eight steps the weights are coarse and two particles move little, but the memory counts.
    [(MultistepSDE(12), 0.5), (DDPM(12), 0.5), (MultistepSDE(8), 0.1)],
)
@pytest.mark.parametrize("num_particles", [2, 8])
def test_exact_draws_stay_exact(sampler, least_moved, num_particles, guidance):
    """Paths of the prior with data drawn from them are joint draws, before and after updates.

    Few steps: what stays is the posterior under the chain itself, not under its limit. A poor
    guidance resamples more and is as exact.
    """
    num_events = 8192
    key_path, key_noise, key_update = jax.random.split(jax.random.key(1), 3)
    path, x = prior_paths(key_path, sampler, num_events)
    y = x @ MATRIX.T + NOISE * jax.random.normal(key_noise, (num_events, 1))
    options = SamplingOptions(num_particles, sampler, guidance)
    last, draws = update(key_update, y, path, options, 8)
    moved = np.asarray(draws.draws.x[-1])
    before, after = (np.asarray(innovations(sampler, p)) for p in (path, last))
    difference = np.mean(after**2 - before**2, axis=-1)
    error = difference.std(1) / np.sqrt(num_events)
    np.testing.assert_array_less(np.abs(difference.mean(1)), 4.5 * error + 1e-7)
    x, y = np.asarray(x), np.asarray(y)

    def statistics(x):
        return np.concatenate(
            [x, x**2, x * y, x[:, :1] * x[:, 1:], (x < 0), (x[:, :1] < 0) * y], axis=-1
        )

    difference = statistics(moved) - statistics(x)
    assert np.mean(np.any(moved != x, axis=-1)) > least_moved
    error = difference.std(0) / np.sqrt(num_events)
    np.testing.assert_array_less(np.abs(difference.mean(0)), 4 * error + 1e-7)


@pytest.mark.computes
def test_finds_the_posterior_from_the_wrong_mode():
    num_events, y = 2000, np.array([-0.5])
    weights, *_ = mixture_posterior(WEIGHTS, MEANS, COVS, MATRIX, np.array([[NOISE**2]]), y)
    options = SamplingOptions(8, MultistepSDE(32), GUIDANCE)
    for start, fraction in ((MEANS[0], 1.0), (MEANS[1], 0.0)):
        x = jnp.broadcast_to(jnp.asarray(start, PRIOR.dtype), (num_events, 2))
        path = diffuse_path(jax.random.key(1), PRIOR, options.sampler, x)
        arrived = PRIOR(path[-1], options.sampler.sigmas(PRIOR)[-1])
        assert np.mean(arrived[:, 0] < 0) == fraction
        _, draws = update(
            jax.random.key(2), jnp.broadcast_to(y, (num_events, 1)), path, options, 20
        )
        found = np.mean(draws.draws.x[-1, :, 0] < 0)
        error = np.sqrt(weights[0] * weights[1] / num_events)
        assert abs(found - weights[0]) < 4 * error + 0.01


def test_statistics():
    options = SamplingOptions(4, MultistepSDE(16), GUIDANCE)
    y = jnp.zeros((64, 1))
    path = diffuse_path(jax.random.key(0), PRIOR, options.sampler, jnp.zeros((64, 2)))
    assert path.shape == (16, 64, 2)
    last, (paths, draws, updated) = update(jax.random.key(1), y, path, options, 3)
    np.testing.assert_array_equal(last, paths[-1])
    sigma = options.sampler.sigmas(PRIOR)[-1]
    np.testing.assert_allclose(draws.x[-1], PRIOR(last[-1], sigma), rtol=1e-5, atol=1e-5)
    assert np.all((updated >= 0) & (updated <= 1))
    assert np.all((draws.info.ess >= 1) & (draws.info.ess <= 4))
    np.testing.assert_array_equal(draws.info.ess_path.min(-1), draws.info.ess)
    expected = np.mean(np.any(np.asarray(paths[1] != paths[0]), axis=-1), axis=0)
    np.testing.assert_allclose(updated[1], expected)


def test_noise_of_a_started_path_has_the_levels_of_the_sampler():
    sampler = MultistepSDE(16)
    x = jnp.ones((20_000, 2))
    path = diffuse_path(jax.random.key(0), PRIOR, sampler, x)
    deviation = np.asarray(path - x).std((1, 2))
    np.testing.assert_allclose(deviation, sampler.sigmas(PRIOR), rtol=0.03)
    # Noise accumulates: what is added above a level is independent of what is below.
    step = (path[0] - path[8]).reshape(-1)
    assert abs(np.corrcoef(step, (path[8] - x).reshape(-1))[0, 1]) < 0.03
