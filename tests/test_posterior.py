import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.denoisers.function import FunctionDenoiser
from numpyro_diffprior.diffusion.samplers import DDIM, DDPM, Heun, MultistepODE, MultistepSDE
from numpyro_diffprior.guidance.covariances import GaussianCovariance, TweedieCovariance
from numpyro_diffprior.guidance.literature import DPS
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.posterior import sample_posterior
from numpyro_diffprior.prior import DiffusionPrior
from tests.counting import compilations, counted
from tests.oracles import gaussian_posterior, spd, tolerance

N, D, NOISE = 3, 2, 0.4
RNG = np.random.default_rng(0)
MEAN, COV = RNG.normal(size=D), spd(RNG, D)
MASK = np.array([[True, True], [True, False], [False, False]])
Y = np.where(MASK, RNG.normal(size=(N, D)), np.nan)
PRIOR = DiffusionPrior(GaussianDenoiser(jnp.asarray(MEAN), jnp.asarray(COV)))


def model(prior, mask, y, size=N):
    with numpyro.plate("n", size):
        mask = numpyro.subsample(mask, event_dim=1)
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).mask(mask).to_event(1), obs=y)


def exact_moments():
    moments = []
    for mask, y in zip(MASK, Y, strict=True):
        matrix = np.eye(D)[mask]
        noise = NOISE**2 * np.eye(len(matrix))
        moments.append(gaussian_posterior(MEAN, COV, matrix, noise, y[mask]))
    return [np.stack(part) for part in zip(*moments, strict=True)]


def check_moments(x, mean, cov, bias=0.0):
    """Draws, with shape ``(num, n, d)``, against moments, to four standard errors and a bias."""
    num = len(x)
    variance = np.diagonal(cov, axis1=-2, axis2=-1)
    error = np.abs(x.mean(0) - mean)
    assert np.all(error < 4 * np.sqrt(variance / num) + bias * np.sqrt(variance))
    ratio = x.var(0) / variance
    assert np.all(np.abs(ratio - 1) < 4 * np.sqrt(2 / num) + bias)


@pytest.mark.parametrize(
    ("sampler", "guidance", "num_particles"),
    [
        (MultistepSDE(64), None, 1),
        (MultistepSDE(64), MMPS(GaussianCovariance()), 1),
        (MultistepSDE(64), None, 4),
        (MultistepSDE(32), MMPS(TweedieCovariance()), 4),
        (MultistepODE(64), None, 1),
        (Heun(48), None, 1),
    ],
)
def test_gaussian_posterior_moments(sampler, guidance, num_particles):
    draws = sample_posterior(
        jax.random.key(1),
        model,
        PRIOR,
        jnp.asarray(MASK),
        jnp.asarray(Y),
        num_samples=4000,
        num_particles=num_particles,
        sampler=sampler,
        guidance=guidance,
        max_batch_size=6000,
    )
    x = np.asarray(draws.samples["x"])
    assert x.shape == (4000, N, D)
    check_moments(x, *exact_moments(), bias=0.03)
    assert np.all(draws.stats["residual"] < 1e-4)
    assert draws.stats["num_evaluations"] == num_particles * sampler.num_evaluations


@pytest.mark.parametrize("num_particles", [1, 2])
def test_steps_of_conjugate_gradients_are_counted(num_particles):
    """One per noise level, and none for an event without observations."""
    guidance = MMPS(TweedieCovariance(), atol=1e-12, max_dense=0, max_steps=1)
    draws = sample_posterior(
        jax.random.key(1), model, PRIOR, jnp.asarray(MASK), jnp.asarray(Y), num_samples=2,
        num_particles=num_particles, sampler=MultistepSDE(8), guidance=guidance,
    )  # fmt: skip
    counts = draws.stats["num_solver_steps"]
    np.testing.assert_array_equal(counts, np.broadcast_to(counts[0], (2, N)))
    assert 7 <= counts[0, 0] == counts[0, 1] <= 8
    assert counts[0, 2] == 0


@pytest.mark.filterwarnings("ignore:.*do not fit what was observed")
def test_draws_do_not_depend_on_how_the_plate_is_cut():
    """Not the numbers, but their distribution and their order along the plate."""
    size = 7
    y = 5.0 * jnp.arange(size)[:, None] * jnp.ones(D)
    mask = jnp.ones((size, D), bool)
    for max_batch_size in (3, 7, 100):
        draws = sample_posterior(
            jax.random.key(0),
            model,
            PRIOR,
            mask,
            y,
            size,
            num_samples=2,
            max_batch_size=max_batch_size,
            sampler=DDPM(8),
        )
        x = draws.samples["x"]
        assert x.shape == (2, size, D)
        assert draws.stats["residual"].shape == (2, size)
        assert np.all(np.diff(x.mean(-1), axis=1) > 0)


@pytest.mark.parametrize("max_batch_size", [7, 30, 1000])
def test_draws_of_one_system(max_batch_size):
    draws = sample_posterior(
        jax.random.key(0),
        model,
        PRIOR,
        jnp.asarray(MASK),
        jnp.asarray(Y),
        num_samples=500,
        num_particles=20,
        independent=False,
        max_batch_size=max_batch_size,
        sampler=MultistepSDE(32),
    )
    assert draws.samples["x"].shape == (500, N, D)
    assert draws.stats["num_evaluations"] == 32
    mean, cov = exact_moments()
    error = np.abs(draws.samples["x"].mean(0) - mean)
    assert np.all(error < 0.3 * np.sqrt(np.diagonal(cov, axis1=-2, axis2=-1)))


def test_subsampled_models_are_drawn_whole():
    def subsampling(prior, y):
        with numpyro.plate("n", 6, subsample_size=2):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.01).to_event(1), obs=y)

    y = jnp.asarray(RNG.normal(size=(6, D)))
    x = sample_posterior(jax.random.key(0), subsampling, PRIOR, y).samples["x"]
    np.testing.assert_allclose(x[0], y, atol=0.1)


def test_plates_of_observations_are_whole():
    """Draws know of all values, however the model subsamples them."""

    def subsampling(prior, y, size):
        x = numpyro.sample("x", prior)
        with numpyro.plate("n", 40, subsample_size=size):
            y = numpyro.subsample(y, event_dim=1)
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    y = jnp.asarray(RNG.normal(size=(40, D)))
    whole, part = (sample_posterior(jax.random.key(0), subsampling, PRIOR, y, n) for n in (40, 4))
    np.testing.assert_allclose(part.samples["x"], whole.samples["x"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_batch_size", [3, 256])
def test_nested_plates_that_both_subsample(max_batch_size):
    def nested(prior, y):
        with numpyro.plate("a", 6, subsample_size=2, dim=-1):
            with numpyro.plate("b", 4, subsample_size=2, dim=-2):
                y = numpyro.subsample(y, event_dim=1)
                x = numpyro.sample("x", prior)
                numpyro.sample("y", dist.Normal(x, 0.01).to_event(1), obs=y)

    y = jnp.asarray(RNG.normal(size=(4, 6, D)))
    x = sample_posterior(jax.random.key(0), nested, PRIOR, y, max_batch_size=max_batch_size)
    np.testing.assert_allclose(x.samples["x"][0], y, atol=0.1)


def test_boolean_indices_are_explained():
    def picking(prior, mask, y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[mask], 1.0).to_event(1), obs=y[mask])

    with pytest.raises(ValueError, match="boolean array .* `.mask"):
        sample_posterior(jax.random.key(0), picking, PRIOR, jnp.array([True, False]), jnp.ones(D))


def test_same_key_same_draws_and_new_weights_compile_nothing():
    observed, executions = counted(model)

    def draw(prior):
        x = sample_posterior(
            jax.random.key(3), observed, prior, jnp.asarray(MASK), jnp.asarray(Y), sampler=DDPM(4)
        )
        return x.samples["x"]

    first = draw(PRIOR)
    other = DiffusionPrior(GaussianDenoiser(jnp.asarray(MEAN) + 1, jnp.asarray(COV)))
    before = len(executions)
    with compilations() as count:
        again, moved = draw(PRIOR), draw(other)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, moved)
    assert count.compiled == 0
    assert len(executions) == before + 2


@pytest.mark.computes
def test_nonlinear_means_are_linearized():
    def squared(prior, y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[0] + 0.1 * x[0] ** 2, 0.2), obs=y)

    draws = sample_posterior(
        jax.random.key(0),
        squared,
        PRIOR,
        0.5,
        num_samples=3000,
        num_particles=16,
        max_batch_size=3000,
    )
    grid = np.linspace(-6, 6, 2001)
    log_p = -((grid - MEAN[0]) ** 2) / (2 * COV[0, 0]) - (0.5 - grid - 0.1 * grid**2) ** 2 / 0.08
    p = np.exp(log_p - log_p.max())
    p = p / p.sum()
    mean = p @ grid
    deviation = np.sqrt(p @ (grid - mean) ** 2)
    x = np.asarray(draws.samples["x"])[:, 0]
    assert abs(x.mean() - mean) < (4 / np.sqrt(3000) + 0.03) * deviation
    assert abs(x.std() / deviation - 1) < 4 / np.sqrt(6000) + 0.03


@pytest.mark.parametrize("num_particles", [1, 2])
def test_dtype_follows_the_prior(num_particles):
    x = sample_posterior(
        jax.random.key(0),
        model,
        PRIOR,
        jnp.asarray(MASK),
        jnp.asarray(Y),
        num_particles=num_particles,
    )
    assert x.samples["x"].dtype == PRIOR.denoiser.dtype
    assert tolerance(jnp.float32, jnp.float64) == x.samples["x"].dtype


@pytest.mark.parametrize("num_particles", [1, 2])
def test_float32_where_float64_is_the_default(num_particles):
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PRIOR)
    draws = sample_posterior(
        jax.random.key(0),
        model,
        single,
        jnp.asarray(MASK),
        jnp.asarray(Y, jnp.float32),
        num_particles=num_particles,
    )
    assert draws.samples["x"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("num_particles", "sampler", "message"),
    [
        (0, None, "num_particles >= 1, got 0"),
        (2, DDIM(), "2 particles need a stochastic sampler"),
        (2, Heun(), "2 particles need a stochastic sampler"),
        (1, DDPM, "expected an instance of Sampler, got <class"),
    ],
)
def test_particles_and_samplers_that_do_not_fit(num_particles, sampler, message):
    with pytest.raises(ValueError, match=message):
        sample_posterior(
            jax.random.key(0),
            model,
            PRIOR,
            jnp.asarray(MASK),
            jnp.asarray(Y),
            num_particles=num_particles,
            sampler=sampler,
        )


def test_guidance_is_an_object():
    with pytest.raises(ValueError, match="expected an instance of Guidance, got <class"):
        sample_posterior(
            jax.random.key(0), model, PRIOR, jnp.asarray(MASK), jnp.asarray(Y), guidance=MMPS
        )


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_units_do_not_matter(unit):
    """Neither for draws of the prior nor for guidance without matrices, in the same noise."""
    size = 20  # more values than guidance makes matrices for

    def observe(prior, y, noise):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    def draw(unit):
        cov = jnp.asarray(unit**2 * spd(np.random.default_rng(1), size))
        prior = DiffusionPrior(GaussianDenoiser(jnp.zeros(size), cov), sampler=MultistepSDE(16))
        y = unit * jax.random.normal(jax.random.key(2), (size,))
        draws = sample_posterior(jax.random.key(0), observe, prior, y, 0.1 * unit)
        return prior.sample(jax.random.key(1), (4,)) / unit, draws.samples["x"] / unit, draws.stats

    (prior, x, stats), (expected_prior, expected, expected_stats) = draw(unit), draw(1.0)
    tol = tolerance(1e-3, 1e-7)
    np.testing.assert_allclose(prior, expected_prior, rtol=tol, atol=tol)
    np.testing.assert_allclose(x, expected, rtol=tol, atol=tol)
    np.testing.assert_allclose(
        stats["reduced_chi_square"], expected_stats["reduced_chi_square"], rtol=10 * tol
    )


def test_numbers_are_positive():
    with pytest.raises(ValueError, match="expected num_samples >= 1, got 0"):
        sample_posterior(
            jax.random.key(0), model, PRIOR, jnp.asarray(MASK), jnp.asarray(Y), num_samples=0
        )


def half_line(prior):
    x = numpyro.sample("x", prior)
    numpyro.factor("positive", jnp.where(x[0] > 0, 0.0, -jnp.inf))


def log_link(prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(jnp.log(x[0]), 0.5), obs=-1.0)


@pytest.mark.computes
@pytest.mark.parametrize(
    ("model", "loc", "log_prob"),
    [
        (half_line, 0.0, lambda x: np.where(x > 0, 0, -np.inf)),
        (log_link, 1.0, lambda x: norm.logpdf(-1, np.log(np.maximum(x, 1e-12)), 0.5)),
    ],
)
def test_where_the_likelihood_is_no_number(model, loc, log_prob):
    """Evidence is unbiased though guidance and twists fail, and no draw is lost."""
    denoiser = GaussianDenoiser(jnp.full(1, loc), jnp.eye(1))
    prior = DiffusionPrior(denoiser, sampler=MultistepSDE(32))
    draws = sample_posterior(
        jax.random.key(0), model, prior, num_samples=2000, num_particles=32, max_batch_size=2000
    )
    grid = np.linspace(1e-6, 7, 100_001)
    density = norm.pdf(grid, loc) * np.exp(log_prob(grid))
    evidence = np.trapezoid(density, grid)
    x, ratio = np.asarray(draws.samples["x"][:, 0]), np.exp(draws.stats["log_evidence"]) / evidence
    assert np.all(x > 0)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(x) ** 0.5 + 0.01
    mean = np.trapezoid(grid * density, grid) / evidence
    assert abs(x.mean() - mean) < 4 * x.std() / len(x) ** 0.5 + 0.02


def test_systems_without_weight_are_told():
    def impossible(prior):
        x = numpyro.sample("x", prior)
        numpyro.factor("far", jnp.where(x[0] > 100, 0.0, -jnp.inf))

    with pytest.warns(UserWarning, match="4 of 4 posterior draws do not fit"):
        draws = sample_posterior(
            jax.random.key(0), impossible, PRIOR, num_samples=4, num_particles=4
        )
    np.testing.assert_array_equal(draws.stats["log_evidence"], -np.inf)


def test_chi_square_of_exact_draws():
    """Over draws of event and data it is chi-square, with as many degrees as are visible."""
    num, visible = 400, np.array([True, True, False])
    rng = np.random.default_rng(1)
    prior = DiffusionPrior(GaussianDenoiser(jnp.zeros(3), jnp.asarray(spd(rng, 3))))
    mask = jnp.broadcast_to(visible, (num, 3)).at[0].set(False)
    x = prior.sample(jax.random.key(0), (num,))
    y = jnp.where(mask, x + NOISE * rng.normal(size=x.shape), jnp.nan)
    draws = sample_posterior(jax.random.key(1), model, prior, mask, y, num, num_samples=10)
    found = np.asarray(draws.stats["reduced_chi_square"])
    assert found.shape == (10, num)
    assert abs(found[:, 1:].mean() - 1) < 4 * np.sqrt(2 / 2 / num)
    x, y = np.asarray(draws.samples["x"]), np.asarray(y)
    expected = ((x - y) ** 2)[..., :2].mean(-1) / NOISE**2  # NaN for the event without values
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_draws_that_miss_the_data_warn_once():
    mask, y = jnp.asarray(MASK), jnp.where(MASK, Y, 0)
    with pytest.warns(UserWarning, match=r"of 12 posterior draws do not fit"):
        sample_posterior(
            jax.random.key(0), model, PRIOR, mask, y + 10, num_samples=4, guidance=DPS(0.0)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_posterior(jax.random.key(0), model, PRIOR, mask, y, num_samples=4)


@pytest.mark.filterwarnings("ignore:draws of one particle are biased")  # they are, a little
def test_a_covariance_that_is_much_too_small_keeps_draws_stable():
    """Without shortened corrections, the mean of these draws is a hundred deviations off."""
    size, noise = 12, 0.03
    rng = np.random.default_rng(1)
    cov = spd(rng, size, 0.01, 30.0)
    exact = GaussianDenoiser(jnp.zeros(size), jnp.asarray(cov))
    small = FunctionDenoiser(exact, jnp.zeros(size), 0.1 * jnp.eye(size))
    mask = np.arange(size) % 3 != 0
    y = np.where(mask, np.linalg.cholesky(cov) @ rng.normal(size=size), 0)[None]

    def model(prior, y):
        with numpyro.plate("n", 1):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, noise).mask(mask).to_event(1), obs=y)

    draws = sample_posterior(
        jax.random.key(0),
        model,
        DiffusionPrior(small, sampler=MultistepSDE(64)),
        jnp.asarray(y),
        num_samples=512,
        guidance=MMPS(GaussianCovariance()),
    )
    mean, posterior = gaussian_posterior(
        np.zeros(size), cov, np.eye(size)[mask], noise**2 * np.eye(mask.sum()), y[0, mask]
    )
    deviation = np.sqrt(np.diagonal(posterior))
    x = np.asarray(draws.samples["x"][:, 0])
    assert np.abs(x.mean(0) - mean)[~mask].max() < deviation[~mask].max()
    assert 0.8 < draws.stats["reduced_chi_square"].mean() < 1.5
