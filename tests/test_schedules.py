"""Grids and distributions of noise levels, against their formulas and scipy's distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from numpyro_diffprior.diffusion.noise import Karras, LogBeta, LogLinear, LogNormal, LogUniform

SCHEDULES = {"LogLinear": LogLinear(), "Karras": Karras(), "Karras(3)": Karras(rho=3.0)}
NOISES = {
    "LogBeta": LogBeta(),
    "LogBeta(2, 5)": LogBeta(2.0, 5.0),
    "LogBeta(0.7, 1)": LogBeta(0.7, 1.0),
    "LogNormal": LogNormal(),
    "LogUniform": LogUniform(),
}
RANGE = {"sigma_min": 0.01, "sigma_max": 50.0, "scale": 2.0}


def cdf(noise, sigma):
    """Distribution function of a noise distribution, by scipy."""
    sigma = np.asarray(sigma, float)
    t = np.log(sigma / RANGE["sigma_min"]) / np.log(RANGE["sigma_max"] / RANGE["sigma_min"])
    match noise:
        case LogBeta():
            return scipy.stats.beta(noise.alpha, noise.beta).cdf(t)
        case LogNormal():
            return scipy.stats.norm(noise.mean, noise.std).cdf(np.log(sigma / RANGE["scale"]))
        case LogUniform():
            return t


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 17])
def test_schedule_decreases_between_its_ends(schedule, num_steps):
    sigma = jax.jit(schedule, static_argnums=0)(num_steps, 0.02, 80.0)
    assert sigma.shape == (num_steps,)
    assert sigma.dtype == jnp.result_type(float)
    assert np.all(np.diff(sigma) < 0)
    np.testing.assert_allclose(sigma[0], 80.0, rtol=1e-6)
    if num_steps > 1:
        np.testing.assert_allclose(sigma[-1], 0.02, rtol=1e-4)


def test_log_linear_formula():
    np.testing.assert_allclose(LogLinear()(9, 1e-3, 1e2), np.geomspace(1e2, 1e-3, 9), rtol=1e-5)


def test_karras_formula():
    low, high, rho, t = 0.002, 80.0, 7.0, np.linspace(0, 1, 18)
    expected = (high ** (1 / rho) + t * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(Karras()(18, low, high), expected, rtol=1e-4)


def test_karras_tends_to_log_linear():
    np.testing.assert_allclose(
        Karras(rho=300.0)(9, 0.1, 10.0), LogLinear()(9, 0.1, 10.0), rtol=0.03
    )


def test_schedule_scales_with_its_range():
    schedule = Karras()
    np.testing.assert_allclose(schedule(8, 0.3, 30.0), 3 * schedule(8, 0.1, 10.0), rtol=1e-5)


def test_schedule_without_levels():
    with pytest.raises(ValueError, match="expected num_steps >= 1, got 0"):
        LogLinear()(0, 0.1, 1.0)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_quantile_inverts_the_distribution_function(noise):
    u = jnp.linspace(0.01, 0.97, 97)
    sigma = noise.quantile(u, **RANGE)
    inside = np.asarray(sigma) < RANGE["sigma_max"]
    assert inside.mean() > 0.95
    np.testing.assert_allclose(cdf(noise, sigma)[inside], u[inside], atol=2e-5)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_quantile_stays_in_the_range(noise):
    sigma = noise.quantile(jnp.array([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0]), **RANGE)
    assert np.all(np.isfinite(sigma))
    assert np.all(np.diff(sigma) >= 0)
    assert sigma.min() >= RANGE["sigma_min"]
    assert sigma.max() <= RANGE["sigma_max"]


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_the_distribution(noise, stratified):
    kwargs = {**vars(noise), "stratified": stratified}
    noise = type(noise)(**kwargs)
    sigma = np.asarray(noise.sample(jax.random.key(0), 2000, **RANGE))
    assert sigma.shape == (2000,)
    inside = sigma[(sigma > RANGE["sigma_min"]) & (sigma < RANGE["sigma_max"])]
    assert len(inside) > 1950
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1 % point for independent draws.
    distance = np.abs(np.sort(cdf(noise, sigma)) - (np.arange(2000) + 0.5) / 2000)
    distance = distance[np.isin(np.sort(sigma), inside)].max()
    assert distance < (1e-3 if stratified else 1.95 / np.sqrt(2000))


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_strata_hold_one_draw_each_in_random_order(noise):
    sigma = noise.sample(jax.random.key(1), 64, **RANGE)
    inside = np.asarray((sigma > RANGE["sigma_min"]) & (sigma < RANGE["sigma_max"]))
    stratum = np.floor(64 * cdf(noise, sigma)[inside] + 1e-3)
    assert len(set(stratum)) >= len(stratum) - 2  # rounding at a boundary
    # Rank correlation of order and level: standard error 1 / sqrt(63).
    correlation = scipy.stats.spearmanr(np.arange(64), sigma).statistic
    assert abs(correlation) < 4 / np.sqrt(63)


def test_log_normal_follows_the_scale():
    u = jnp.linspace(0.1, 0.9, 5)
    wide = {"sigma_min": 1e-6, "sigma_max": 1e6}
    small = LogNormal().quantile(u, scale=1.0, **wide)
    large = LogNormal().quantile(u, scale=10.0, **wide)
    np.testing.assert_allclose(large, 10 * small, rtol=1e-5)
    np.testing.assert_allclose(small[2], np.exp(-0.5), rtol=1e-5)


def test_range_may_be_traced_and_never_recompiles():
    traces = []

    @jax.jit
    def draw(noise, rng_key, sigma_max):
        traces.append(None)
        return noise.sample(rng_key, 8, sigma_min=0.1, sigma_max=sigma_max, scale=1.0)

    first = draw(LogBeta(), jax.random.key(0), 1.0)
    second = draw(LogBeta(), jax.random.key(0), 10.0)
    assert len(traces) == 1
    np.testing.assert_allclose(second / 0.1, (first / 0.1) ** 2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_follows_the_range(dtype):
    low, high = jnp.asarray(0.1, jnp.float32), jnp.asarray(1.0, jnp.float32)
    if dtype == jnp.float64:
        if not jax.config.jax_enable_x64:
            pytest.skip("needs JAX_ENABLE_X64=1")
        low, high = low.astype(dtype), high.astype(dtype)
    noise = {"sigma_min": low, "sigma_max": high, "scale": high}
    assert Karras()(4, low, high).dtype == dtype
    assert LogBeta().sample(jax.random.key(0), 4, **noise).dtype == dtype


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Karras(rho=0.0), "rho > 0, got 0.0"),
        (lambda: LogBeta(alpha=-1.0), "alpha > 0, got -1.0"),
        (lambda: LogBeta(beta=0.0), "beta > 0, got 0.0"),
        (lambda: LogNormal(std=float("nan")), "std > 0, got nan"),
    ],
)
def test_invalid_parameters(make, match):
    with pytest.raises(ValueError, match=match):
        make()
