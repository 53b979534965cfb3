"""Samplers: exact moments on Gaussians, orders of convergence, statistics on mixtures."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.diffusion.noise import Karras, LogLinear
from numpyro_diffprior.diffusion.samplers import (
    DDIM,
    DDPM,
    Heun,
    Levels,
    MultistepODE,
    MultistepSDE,
    PredictorCorrector,
)
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.likelihood import linear_gaussian
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.linalg.covariances import Diagonal, Isotropic

SAMPLERS = [DDPM, DDIM, MultistepSDE, MultistepODE, Heun, PredictorCorrector]
TOL = oracles.tolerance()
VARIANCES = np.array([0.1, 1.0, 4.0])


def propagate(sampler, denoiser, *num_steps):
    """Return the exact mean and covariance of a sampler's draws, for each number of steps.

    With an affine denoiser each step is an affine map of its noise and of the state (x_t and the
    denoiser's last mean): its derivatives carry the moments. At most one normal is drawn per step.
    """
    size = denoiser.event_size
    key, zeros = jax.random.key(0), jnp.zeros(size, denoiser.dtype)

    def with_noise(noise, function, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda *_: noise)
            return function(*args)

    def step(state, noise, levels):
        args = key, denoiser, state[:size], state[size:], levels
        return jnp.concatenate(with_noise(noise, sampler.step, *args))

    @jax.jit
    def move(mean, cov, levels):
        a, b = jax.jacfwd(step, argnums=(0, 1))(mean, zeros, levels)
        return step(mean, zeros, levels), a @ cov @ a.T + b @ b.T

    @jax.jit
    def last(mean, cov, sigma):
        a = jax.jacfwd(denoiser)(mean[:size], sigma)
        return denoiser(mean[:size], sigma), a @ cov[:size, :size] @ a.T

    @jax.jit
    def first():
        def start(noise):
            x_t = with_noise(noise, sampler.initial, key, denoiser, ())
            return jnp.concatenate([x_t, zeros])

        root = jax.jacfwd(start)(zeros)
        return start(zeros), root @ root.T

    moments = []
    for num in num_steps or (sampler.num_steps,):
        mean, cov = first()
        levels = jax.tree.map(np.asarray, replace(sampler, num_steps=num).levels(denoiser))
        for level in zip(*levels, strict=True):
            mean, cov = move(mean, cov, Levels(*level))
        moments.append([np.asarray(m, np.float64) for m in last(mean, cov, level[-1])])
    return moments


def order(errors, num_steps):
    """Return the slope of the error against the number of steps."""
    return -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]


def gaussian():
    return GaussianDenoiser(jnp.array([1.0, -2.0, 3.0]), Diagonal(jnp.array(VARIANCES)))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (DDPM, 1),
        (DDIM, 1),
        (MultistepSDE, 2),
        (MultistepODE, 2),
        (Heun, 2),
        (PredictorCorrector, 1),
    ],
)
def test_order_of_convergence(sampler, expected):
    denoiser, num_steps = gaussian(), np.array([24, 48, 96])
    if sampler is PredictorCorrector:  # predictor and corrector err in opposite directions
        num_steps = num_steps * 16
    # On a grid of equal steps the multistep samplers are better than their order.
    schedule = Karras() if sampler.order == 2 else LogLinear()
    run = sampler(sigma_min=0.01, sigma_max=20.0, schedule=schedule)
    # What the last mean has for variance if x at the last level has the right one.
    target = VARIANCES**2 / (VARIANCES + run.sigma_min**2)
    errors = []
    for mean, cov in propagate(run, denoiser, *num_steps):
        np.testing.assert_allclose(mean, denoiser.mean, atol=100 * TOL)
        np.testing.assert_allclose(cov, np.diag(np.diag(cov)), atol=TOL)
        errors.append(np.diag(cov) / target - 1)
    largest = np.abs(errors).max(axis=1)
    assert order(largest, num_steps) == pytest.approx(expected, abs=0.25)
    if sampler is DDPM:
        assert np.all(np.array(errors) < 0)  # too narrow


@pytest.mark.parametrize("sampler", [MultistepSDE, MultistepODE])
def test_equal_steps_keep_the_variance(sampler):
    run = sampler(sigma_min=5e-4, sigma_max=20.0)
    target = VARIANCES**2 / (VARIANCES + run.sigma_min**2)
    coarse, fine = (np.diag(cov) / target - 1 for _, cov in propagate(run, gaussian(), 16, 32))
    assert np.abs(coarse).max() < 0.01
    assert np.abs(fine).max() < 0.001


@pytest.mark.parametrize("sampler", [MultistepSDE, MultistepODE])
def test_equal_steps_are_at_least_of_the_order(sampler):
    num_steps = np.array([24, 48, 96])
    run = sampler(sigma_min=0.01, sigma_max=20.0)
    target = VARIANCES**2 / (VARIANCES + run.sigma_min**2)
    moments = propagate(run, gaussian(), *num_steps)
    errors = [np.abs(np.diag(cov) / target - 1).max() for _, cov in moments]
    assert order(errors, num_steps) > 1.75


@pytest.mark.parametrize("sampler", [DDPM, DDIM, MultistepSDE, MultistepODE, Heun])
def test_guided_sampling_converges_to_the_posterior(sampler):
    rng = np.random.default_rng(0)
    mean, cov = rng.normal(size=3), oracles.spd(rng, 3)
    matrix, y = rng.normal(size=(2, 3)), rng.normal(size=2)
    likelihood = linear_gaussian(
        jnp.asarray(y), jnp.asarray(matrix), Isotropic(jnp.asarray(0.1), 2), (3,)
    )
    posterior = MMPS(GaussianCovariance()).condition(GaussianDenoiser(mean, cov), likelihood)
    exact_mean, exact_cov = oracles.gaussian_posterior(mean, cov, matrix, 0.1 * np.eye(2), y)
    # The start is at the prior's mean: what the flow (or its square, the SDE) has not forgotten.
    values, vectors = np.linalg.eigh(exact_cov)
    forgotten = np.sqrt(values / (values + 50.0**2)) ** (1 + sampler.eta)
    offset = (vectors * forgotten) @ vectors.T @ (mean - exact_mean)

    run = sampler(sigma_min=1e-3, sigma_max=50.0)
    # With 32 steps the multistep samplers are already at what they have not forgotten.
    moments = propagate(run, posterior, 16 if sampler.order == 2 else 32, 128)
    np.testing.assert_allclose(moments[1][0], exact_mean + offset, atol=1.5e-3)
    errors = [np.abs(found - exact_cov).max() for _, found in moments]
    first_order = sampler in (DDPM, DDIM)
    assert errors[1] < (0.05 if first_order else 0.003)
    assert errors[1] < errors[0] / (3 if first_order else 10)


@pytest.mark.parametrize("sampler", [DDIM, MultistepODE, Heun])
def test_deterministic_start(sampler):
    """Starting from the Gaussian marginal removes the bias of a low first level."""
    mean, variance = 3.0, 4.0
    denoiser = GaussianDenoiser(jnp.array([mean]), Isotropic(variance, 1))
    high = 8.0
    run = sampler(256, sigma_min=1e-3, sigma_max=high)

    def flow(x_t):
        return np.asarray(jax.jit(lambda x: run.run(jax.random.key(0), denoiser, x))(x_t))

    center, deviation = (float(flow(jnp.array([x]))[0]) for x in (0.0, high))
    deviation -= center
    # From N(0, sigma_max^2): the flow contracts deviations from the mean by this ratio.
    ratio = np.sqrt(variance / (variance + high**2))
    np.testing.assert_allclose(center, mean * (1 - ratio), rtol=0.02)
    np.testing.assert_allclose(deviation, high * ratio, rtol=0.02)
    assert center < 0.8 * mean
    assert deviation < 0.98 * np.sqrt(variance)
    [(found_mean, found_cov)] = propagate(run, denoiser)
    np.testing.assert_allclose(found_mean, mean, rtol=10 * TOL)
    np.testing.assert_allclose(found_cov[0, 0], variance, rtol=0.02)


def test_corrector_is_unbiased_as_its_step_shrinks():
    """At one noise level, Langevin steps are too wide by a known factor that goes to one."""
    denoiser = gaussian()
    target = VARIANCES**2 / (VARIANCES + 1)
    for size in (0.4, 0.04):
        run = PredictorCorrector(800, sigma_min=1.0, sigma_max=1.0001, step_size=size)
        [(_, cov)] = propagate(run, denoiser)
        curvature = 1 / (VARIANCES + 1)
        expected = 1 / (1 - size * curvature / 2)
        np.testing.assert_allclose(np.diag(cov) / target, expected, rtol=1e-3)


@pytest.mark.parametrize("sampler", [DDPM, MultistepSDE, PredictorCorrector])
def test_draws_have_the_moments_of_the_prior(sampler):
    """By sampling, with steps enough that what is left is Monte-Carlo error."""
    num = 8192
    denoiser = gaussian()
    run = sampler(96)
    draws = jax.jit(lambda key: run.sample(key, denoiser, (num,)))(jax.random.key(1))
    [(expected_mean, expected_cov)] = propagate(run, denoiser)
    cov = np.cov(np.asarray(draws).T)
    deviation = np.sqrt(np.diag(expected_cov))
    assert np.all(np.abs(draws.mean(axis=0) - expected_mean) < 4.5 * deviation / np.sqrt(num))
    error = (cov - expected_cov) / np.outer(deviation, deviation)
    assert np.all(np.abs(error) < 4.5 * np.sqrt(2 / num))
    np.testing.assert_allclose(expected_mean, denoiser.mean, atol=1e-3)
    assert np.all(np.abs(np.diag(expected_cov) / VARIANCES - 1) < 0.1)


@pytest.mark.parametrize("sampler", [MultistepSDE, MultistepODE, Heun])
def test_modes_get_their_weights(sampler):
    num = 4096
    weights = np.array([0.15, 0.25, 0.6])
    denoiser = MixtureDenoiser(weights, [[-10.0], [0.0], [10.0]], Isotropic(1.0, 1))
    draws = jax.jit(lambda key: sampler(48).sample(key, denoiser, (num,)))(jax.random.key(2))
    found = np.histogram(draws, [-np.inf, -5, 5, np.inf])[0] / num
    assert np.all(np.abs(found - weights) < 4.5 * np.sqrt(weights * (1 - weights) / num) + 0.005)


@dataclass(frozen=True, eq=False)
class Counting(Denoiser):
    """Counts its evaluations when they happen, not when they are traced."""

    denoiser: Denoiser
    calls: list

    @property
    def mean(self):
        return self.denoiser.mean

    @property
    def cov(self):
        return self.denoiser.cov

    def __call__(self, x_t, sigma):
        jax.debug.callback(lambda level: self.calls.append(float(level)), sigma)
        return self.denoiser(x_t, sigma)


@pytest.mark.parametrize(
    "run",
    [*(sampler(7) for sampler in SAMPLERS), PredictorCorrector(7, num_corrections=3), DDIM(2)],
)
def test_number_of_evaluations(run):
    counting = Counting(gaussian(), [])
    jax.block_until_ready(run.sample(jax.random.key(0), counting, (2,)))
    jax.effects_barrier()
    assert len(counting.calls) == run.num_evaluations
    sigmas = run.sigmas(counting.denoiser)
    np.testing.assert_allclose(max(counting.calls), sigmas[0], rtol=1e-6)
    np.testing.assert_allclose(min(counting.calls), sigmas[-1], rtol=1e-6)


def test_levels():
    denoiser = GaussianDenoiser(jnp.zeros(2), Diagonal(jnp.array([1.0, 7.0])))
    levels = MultistepSDE(5).levels(denoiser)
    np.testing.assert_allclose(levels.current[0], denoiser.sigma_max, rtol=1e-6)
    np.testing.assert_allclose(levels.following[-1], denoiser.sigma_min, rtol=1e-6)
    np.testing.assert_array_equal(levels.current[1:], levels.following[:-1])
    np.testing.assert_array_equal(levels.previous[1:], levels.current[:-1])
    assert levels.previous[0] == jnp.inf
    given = DDIM(9, sigma_min=0.1, sigma_max=3.0, schedule=Karras()).sigmas(denoiser)
    np.testing.assert_allclose(given, Karras()(9, 0.1, 3.0), rtol=1e-6)
    assert given.dtype == denoiser.dtype


def test_transition_is_the_posterior_of_the_forward_process():
    """With eta = 1: x_s given x_t and x, for x_t = x_s + noise."""
    s2, t2, x, x_t = 0.3**2, 0.5**2, 1.2, 2.0
    levels = Levels(*(jnp.asarray(level) for level in (0.9, 0.5, 0.3)))
    mean, tau = DDPM().transition(jnp.asarray(x_t), jnp.asarray(x), levels)
    precision = 1 / s2 + 1 / (t2 - s2)
    np.testing.assert_allclose(mean, (x / s2 + x_t / (t2 - s2)) / precision, rtol=1e-5)
    np.testing.assert_allclose(tau**2, 1 / precision, rtol=1e-5)
    for eta in (0.0, 0.6):  # any eta leaves the marginal given x as it is
        mean, tau = DDPM(eta=eta).transition(jnp.asarray(x + 0.5), jnp.asarray(x), levels)
        np.testing.assert_allclose((mean - x) ** 2 + tau**2, s2, rtol=1e-5)


@pytest.mark.parametrize("sampler", [MultistepSDE, MultistepODE])
def test_first_step_has_no_memory(sampler):
    """The level before the first is infinite: nothing is extrapolated, all stays finite."""
    denoiser, run = gaussian(), sampler(4)
    levels = jax.tree.map(lambda leaf: leaf[0], run.levels(denoiser))
    x_t = jnp.array([5.0, 6.0, 7.0])

    @jax.jit
    def step(levels):
        return run.step(jax.random.key(0), denoiser, x_t, jnp.zeros(3), levels)

    x_s, x_hat = step(levels)
    first_order = DDPM(4) if run.eta else DDIM(4)
    expected, _ = first_order.step(jax.random.key(0), denoiser, x_t, jnp.ones(3), levels)
    np.testing.assert_allclose(x_s, expected, rtol=10 * TOL)
    np.testing.assert_allclose(x_hat, denoiser(x_t, levels.current), rtol=10 * TOL)

    def loss(scale):
        wider = replace(denoiser, cov=denoiser.cov.scale(scale))
        return jnp.sum(run.run(jax.random.key(0), wider, x_t))

    assert np.isfinite(jax.jit(jax.grad(loss))(1.0))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keys(sampler):
    denoiser, run = gaussian(), sampler(4)
    sample = jax.jit(lambda key: run.sample(key, denoiser, (2, 3)))
    one, same, other = (sample(jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.shape == (2, 3, 3)
    assert one.dtype == denoiser.dtype
    np.testing.assert_array_equal(one, same)
    assert not np.any(one == other)
    # From one start, only stochastic samplers depend on the key.
    finish = jax.jit(lambda key: run.run(key, denoiser, one))
    ends = [finish(jax.random.key(seed)) for seed in (0, 1)]
    stochastic = sampler in (DDPM, MultistepSDE, PredictorCorrector)
    assert np.any(ends[0] != ends[1]) == stochastic


def test_events_of_any_shape():
    denoiser = GaussianDenoiser(jnp.ones((2, 3)), jnp.eye(6))
    assert MultistepSDE(3).sample(jax.random.key(0), denoiser, (4,)).shape == (4, 2, 3)
    assert MultistepSDE(3).sample(jax.random.key(0), denoiser).shape == (2, 3)
    scalar = GaussianDenoiser(jnp.ones(()), Isotropic(1.0, 1))
    assert Heun(3).sample(jax.random.key(0), scalar, (4,)).shape == (4,)


def test_samplers_are_values():
    """Equal samplers are one static argument."""
    assert MultistepSDE(16) == MultistepSDE(16)
    assert hash(DDPM()) == hash(DDPM())
    assert DDPM(eta=0.5) != DDPM()
    assert DDIM() != MultistepODE()


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="DDPM: expected eta >= 0 and <= 1, got 2.0"):
        DDPM(eta=2.0)
    with pytest.raises(ValueError, match="DDPM: expected num_steps >= 2, got 1"):
        DDPM(1)
