"""Answers do not depend on the unit of the data: every public function, from 1e-30 to 1e30."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Predictive

import numpyro_diffprior as ndp
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.guidance import GaussianCovariance
from numpyro_diffprior.linalg.powers import floor_log2, scale_by_power
from numpyro_diffprior.reading.units import standardized_log_density
from numpyro_diffprior.reading.unwrap import to_pairs

KEY = jax.random.key(0)
# Powers of two, with which nothing is rounded: 8e-31 to 6e29.
UNITS = [2.0**n for n in (-100, -86, -56, -24, 40, 99)]
SIZE = 3
Z = np.random.default_rng(0).normal(1.0, 1.0, (6, SIZE)).astype(np.float32)
MEAN, COV = jnp.ones(SIZE), jnp.eye(SIZE) + 0.5
SAMPLER = ndp.samplers.MultistepSDE(16)


def make_prior(unit):
    return ndp.DiffusionPrior(ndp.GaussianDenoiser(MEAN, COV, unit), sampler=SAMPLER)


def make_network(variance=1.0, unit=1.0):
    net = ndp.MLP((SIZE,), features=(8,), rngs=nnx.Rngs(0))
    denoiser = ndp.NetworkDenoiser(net, cov=variance * jnp.eye(SIZE), unit=unit)
    return ndp.DiffusionPrior(denoiser, sampler=SAMPLER)


def model(prior, y, scale):
    with numpyro.plate("events", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.deterministic("twice", 2 * x)
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def observations(unit):
    return Z * np.float32(unit), np.float32(0.5 * unit)


def check_prior(unit):
    prior = make_prior(unit)
    x = prior.sample(KEY, (2,))
    size = prior.event_shape[0]
    return {
        "sample": x / unit,
        "mean": prior.mean / unit,
        "variance": jnp.sqrt(prior.denoiser.cov.diagonal()),
        "log_prob": prior.log_prob(x) + size * np.log(unit),
        "gradient": jax.grad(lambda x: prior.log_prob(x).sum())(x) * unit,
        "denoise": prior.denoise(x, 0.5 * unit) / unit,
        "score": prior.score(x, 0.5 * unit) * unit,
    }


def check_mixture(unit):
    denoiser = ndp.MixtureDenoiser([0.3, 0.7], np.stack([Z[0], Z[1]]), 0.1 * jnp.eye(SIZE), unit)
    prior = ndp.DiffusionPrior(denoiser, sampler=SAMPLER)
    draws = ndp.sample_posterior(KEY, model, prior, *observations(unit), num_particles=4)
    return {"x": draws.samples["x"] / unit, "ess": draws.stats["ess"]}


def check_function(unit):
    denoiser = ndp.FunctionDenoiser(
        lambda x_t, sigma: x_t / (1 + sigma[..., None] ** 2), jnp.zeros(SIZE), jnp.eye(SIZE), unit
    )
    return {"x": ndp.DiffusionPrior(denoiser, sampler=SAMPLER).sample(KEY) / unit}


def check_posterior(unit):
    draws = ndp.sample_posterior(KEY, model, make_prior(unit), *observations(unit), num_samples=2)
    return {
        "x": draws.samples["x"] / unit,
        "reduced_chi_square": draws.stats["reduced_chi_square"],
    }


def check_particles(unit):
    draws = ndp.sample_posterior(
        KEY, model, make_prior(unit), *observations(unit), num_particles=4
    )
    return {"x": draws.samples["x"] / unit, "ess": draws.stats["ess"]}


def check_evidence(unit):
    found = ndp.log_evidence(KEY, model, make_prior(unit), *observations(unit), num_particles=4)
    return {"value": found.value + SIZE * np.log(unit)}


def check_calibration(unit):
    y, scale = observations(unit)
    prior = make_prior(unit)
    found = ndp.calibrate(KEY, model, prior, y, scale, num_simulations=4, num_samples=9)
    return {"ranks": found.ranks["x"], "distances": found.distance_ranks["x"]}


def check_kernel(unit):
    mcmc = MCMC(ndp.MMPSKernel(model), num_warmup=0, num_samples=2, progress_bar=False)
    mcmc.run(KEY, make_prior(unit), *observations(unit))
    return {name: value / unit for name, value in mcmc.get_samples().items()}


def check_particle_gibbs(unit):
    kernel = ndp.ParticleGibbs(model, num_particles=4)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=2, progress_bar=False)
    y, scale = observations(unit)
    mcmc.run(KEY, make_prior(unit), y, scale, init_params={"x": jnp.asarray(y)})
    return {"x": mcmc.get_samples()["x"] / unit}


def check_pmmh(unit):
    def amplified(prior, y, scale):
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.1))
        model(prior, y / gain, scale)

    mcmc = MCMC(
        ndp.PMMH(amplified, num_particles=4), num_warmup=2, num_samples=4, progress_bar=False
    )
    mcmc.run(KEY, make_prior(unit), *observations(unit))
    return {"x": mcmc.get_samples()["x"] / unit, "gain": mcmc.get_samples()["gain"]}


def check_reparam(unit):
    exact = handlers.reparam(model, config={"x": ndp.DiffusionReparam(4)})
    nuts = NUTS(exact, max_tree_depth=2, step_size=0.1, adapt_step_size=False)
    mcmc = MCMC(nuts, num_warmup=0, num_samples=2, progress_bar=False)
    prior, (y, scale) = make_prior(unit), observations(unit)
    start = {"x_base": ndp.DiffusionReparam(4).invert(prior, y)}
    mcmc.run(KEY, prior, y, scale, init_params=start)
    return {"x": mcmc.get_samples()["x"] / unit, "start": start["x_base"]}


def check_predictive(unit):
    draws = {"x": jnp.asarray(Z * np.float32(unit))[None]}
    found = Predictive(model, draws)(KEY, make_prior(unit), *observations(unit))
    return {"twice": found["twice"] / unit}


def learn(unit, model, prior, *args, **options):
    em = ndp.EM(model, optax.adam(1e-3), m_step=ndp.MStep(8, 8, **options))
    result = em.run(KEY, 2, prior, *args, progress_bar=False, heldout=args)
    return result, {
        "heldout": result.history.heldout_log_evidence + Z.size * np.log(unit),
        "sliced_wasserstein": result.history.sliced_wasserstein[1] / unit,
        "loss": result.history.loss,
    }


def check_em(unit):
    result, found = learn(unit, model, make_network(), *observations(unit))
    x = result.best.sample(KEY, (3,))
    return found | {"x": x / unit, "mean": result.prior.mean / unit}


def check_em_of_two_priors(unit):
    def joint(priors, y, scale):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            a, b = (numpyro.sample(name, priors[name]) for name in "ab")
            numpyro.sample("y", dist.Normal(a + b, scale).to_event(1), obs=y)

    priors = {"a": make_network(0.1, unit), "b": make_network(1.0, unit)}
    em = ndp.EM(joint, optax.adam(1e-3), start=ndp.GaussianStart(2), m_step=ndp.MStep(4, 8))
    state = em.init(KEY, priors, *observations(unit))
    state, _ = em.update(state, *observations(unit))
    return {name: state.prior[name].sample(KEY) / unit for name in "ab"}


def check_em_of_a_noise_level(unit):
    def noisy(prior, y, scale):
        level = numpyro.param("level", 0.5 * scale, constraint=dist.constraints.positive)
        model(prior, y, level)

    params = ndp.ParamStep(num_steps=4)
    result, found = learn(unit, noisy, make_network(), *observations(unit), params=params)
    return found | {"level": result.params["level"] / unit}


def check_fit(unit):
    x = Z * np.float32(unit)
    optimizer, denoiser = optax.adam(1e-3), make_network().denoiser
    fit = ndp.fit_denoiser(KEY, denoiser, x, optimizer=optimizer, num_steps=8, batch_size=8)
    return {
        "losses": fit.losses,
        "errors": fit.denoiser.error_ratios,
        "x": ndp.DiffusionPrior(fit.denoiser, sampler=SAMPLER).sample(KEY, (3,)) / unit,
    }


def check_metrics(unit):
    x, y = Z * np.float32(unit), (Z[::-1] + 1) * np.float32(unit)
    return {
        "sliced": ndp.metrics.sliced_wasserstein(KEY, x, y) / unit,
        "max_sliced": ndp.metrics.max_sliced_wasserstein(KEY, x, y) / unit,
    }


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


@cache
def expected(name):
    return CHECKS[name](1.0)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.filterwarnings("ignore:.*do not fit what was observed")
def test_answers_are_those_of_unit_one(name, unit):
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=5e-3),
        CHECKS[name](unit),
        expected(name),
    )


@pytest.mark.parametrize("name", ["y", "params", "prior", "observed"])
def test_a_latent_site_may_have_any_name(name):
    """Also those that the package uses for values of its own."""

    def renamed(prior, y, scale):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample(name, prior)
            numpyro.sample("x", dist.Normal(x, scale).to_event(1), obs=y)

    em = ndp.EM(renamed, optax.adam(1e-3), start=ndp.GaussianStart(2))
    unit = 2.0**-100
    prior = em.init(KEY, make_network(), *observations(unit)).prior
    assert 0.1 * unit < prior.denoiser.unit < 10 * unit


@pytest.mark.parametrize("unit", UNITS)
def test_files_keep_the_unit(tmp_path, unit):
    prior = make_prior(unit)
    prior.save(tmp_path / "prior.safetensors")
    loaded = ndp.DiffusionPrior.load(tmp_path / "prior.safetensors", sampler=SAMPLER)
    assert (loaded.sample(KEY, (3,)) == prior.sample(KEY, (3,))).all()


# Every likelihood that has a unit.


def of_pairs(x, u):
    return dist.Normal(x + 1j * x, 0.5 * u).to_event(1)


def of_masked(x, u):
    return dist.Normal(x, 0.5 * u).mask(Z > 0).to_event(1)


def of_correlated(x, u):
    return dist.MultivariateNormal(x, scale_tril=u * jnp.linalg.cholesky(COV))


def of_outliers(x, u):
    parts = [dist.Normal(x, 0.5 * u), dist.Normal(x, 5 * u)]
    return dist.MixtureGeneral(dist.Categorical(jnp.array([0.9, 0.1])), parts).to_event(1)


def of_same_family(x, u):
    scales = u * jnp.array([0.5, 5.0])
    parts = dist.Normal(x[..., None], scales)
    return dist.MixtureSameFamily(dist.Categorical(jnp.array([0.9, 0.1])), parts).to_event(1)


LIKELIHOODS = {
    "normal": lambda x, u: dist.Normal(x, 0.5 * u).to_event(1),
    "pairs": of_pairs,
    "masked": of_masked,
    "correlated": of_correlated,
    "multivariate student": lambda x, u: dist.MultivariateStudentT(4.0, x, u * jnp.eye(SIZE)),
    "student": lambda x, u: dist.StudentT(4.0, x, 0.5 * u).to_event(1),
    "cauchy": lambda x, u: dist.Cauchy(x, 0.5 * u).to_event(1),
    "laplace": lambda x, u: dist.Laplace(x, 0.5 * u).to_event(1),
    "logistic": lambda x, u: dist.Logistic(x, 0.5 * u).to_event(1),
    "gumbel": lambda x, u: dist.Gumbel(x, 0.5 * u).to_event(1),
    "soft laplace": lambda x, u: dist.SoftLaplace(x, 0.5 * u).to_event(1),
    "scale too": lambda x, u: dist.Normal(x, u * jnp.exp(0.1 * x / u)).to_event(1),
    "scale": lambda x, u: dist.HalfNormal(u * jnp.exp(x / u)).to_event(1),
    "half cauchy": lambda x, u: dist.HalfCauchy(u * jnp.exp(x / u)).to_event(1),
    "exponential": lambda x, u: dist.Exponential(jnp.exp(x / u) / u).to_event(1),
    "gamma": lambda x, u: dist.Gamma(3.0, jnp.exp(x / u) / u).to_event(1),
    "weibull": lambda x, u: dist.Weibull(u * jnp.exp(x / u), 2.0).to_event(1),
    "log-normal": lambda x, u: dist.LogNormal(x / u + jnp.log(u), 0.5).to_event(1),
    "censored": lambda x, u: dist.RightCensoredDistribution(
        dist.Normal(x, 0.5 * u), Z > 1
    ).to_event(1),
    "truncated": lambda x, u: dist.TruncatedNormal(x, 0.5 * u, low=0.0).to_event(1),
    "truncated twice": lambda x, u: dist.TruncatedNormal(x, 0.5 * u, low=0.0, high=9 * u).to_event(
        1
    ),
    "walk": lambda x, u: dist.GaussianRandomWalk(u * jnp.exp(x[..., 0] / u), SIZE),
    "outliers": of_outliers,
    "same family": of_same_family,
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_densities_are_numpyros(name):
    x = jnp.asarray(np.abs(Z[::-1]))
    fn, y = LIKELIHOODS[name](x, jnp.float32(0.37)), jnp.asarray(np.abs(Z))
    if name == "pairs":
        fn, y = to_pairs(fn, y + 1j * y)
    found = standardized_log_density(fn, y)
    np.testing.assert_allclose(found, fn.log_prob(y), rtol=1e-5, atol=1e-5)


def posterior_of(name, unit):
    def model(prior, y, unit):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", LIKELIHOODS[name](x, unit), obs=y)

    y = np.abs(Z) * np.float32(unit)
    if name == "pairs":
        y = y + 1j * y
    draws = ndp.sample_posterior(KEY, model, make_prior(unit), y, jnp.float32(unit))
    return {"x": draws.samples["x"] / unit, "chi": draws.stats["reduced_chi_square"]}


@pytest.mark.parametrize("unit", [2.0**-86, 2.0**40])
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.filterwarnings("ignore:.*do not fit what was observed")
def test_likelihoods_have_units(name, unit):
    found, wanted = posterior_of(name, unit), posterior_of(name, 1.0)
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-2, atol=1e-2)


# Draws are right, not only the same in all units: compiled loops once were not.

GUIDANCE = {
    "matrices of a Gaussian": ndp.MMPS(GaussianCovariance()),
    "matrices": ndp.MMPS(),
    "no matrices": ndp.MMPS(max_dense=0, max_steps=32),
}


@pytest.mark.parametrize("unit", [1e-26, 1.0, 1e12])
@pytest.mark.parametrize("name", GUIDANCE)
def test_many_values_of_one_unknown(name, unit):
    """Mean and deviation are closed form."""
    num, scale = 10, 0.7

    def model(prior, y, scale):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            mean = jnp.broadcast_to(x, (*x.shape[:-1], num))
            numpyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(1), jnp.eye(1), unit))
    y = (1 + scale * np.random.default_rng(0).normal(size=(4, num))).astype(np.float32)
    draws = ndp.sample_posterior(
        KEY,
        model,
        prior,
        y * np.float32(unit),
        np.float32(scale * unit),
        num_samples=500,
        guidance=GUIDANCE[name],
    )
    x, precision = draws.samples["x"][..., 0] / unit, 1 + num / scale**2
    deviation = precision**-0.5
    np.testing.assert_allclose(x.std(0), deviation, rtol=0.15)
    expected = y.sum(-1) / scale**2 / precision
    np.testing.assert_allclose(x.mean(0), expected, atol=0.2 * deviation)


@pytest.mark.parametrize("exponent", [-100, -1, 0, 86])
def test_products_with_powers(exponent):
    """Values and derivatives of any order, forward and backward, and nothing is squared."""
    x, factor = jnp.array([1.5, -0.3, 0.0]), 2.0**exponent
    shift = partial(scale_by_power, exponent=exponent)
    np.testing.assert_array_equal(shift(x), factor * x)
    np.testing.assert_array_equal(jax.jacfwd(shift)(x), factor * jnp.eye(3))
    np.testing.assert_array_equal(jax.jacrev(shift)(x), factor * jnp.eye(3))
    np.testing.assert_array_equal(jax.vmap(shift)(x), factor * x)
    small = (x / factor).astype(x.dtype)
    square = jax.jit(lambda x: jnp.sum(shift(x) ** 2))
    np.testing.assert_allclose(square(small), jnp.sum(x**2), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(square))(small), 2 * x * factor, rtol=1e-6)
    hessian = jax.hessian(lambda z: square(scale_by_power(z, -exponent)))(x)
    np.testing.assert_allclose(hessian, 2 * jnp.eye(3), rtol=1e-6)


FLOATS = sorted({"float16", "bfloat16", "float32", jnp.zeros(()).dtype.name})


@pytest.mark.parametrize("exponent", [-250, -30, 0, 30, 250])
@pytest.mark.parametrize("dtype", FLOATS)
def test_products_at_the_ends_of_the_range(dtype, exponent):
    """Infinite and NaN values stay, and what leaves the normal range is infinite or zero."""
    limits = jnp.finfo(dtype)
    x = jnp.array([1, -1.75, limits.max, limits.tiny, 0, -0.0, np.inf, -np.inf, np.nan], dtype)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.ldexp(np.asarray(x, np.longdouble), exponent)
    expected = np.where(np.abs(expected) < limits.tiny, 0, expected)
    expected = np.where(np.abs(expected) > limits.max, np.copysign(np.inf, expected), expected)
    product = np.asarray(scale_by_power(x, exponent), np.longdouble)
    np.testing.assert_array_equal(product, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponents(dtype):
    limits = jnp.finfo(dtype)
    x = jnp.array([1, 1.75, 2, 0.5, 0.49, limits.max, limits.tiny], dtype)
    expected = np.frexp(np.asarray(x, np.longdouble))[1] - 1
    np.testing.assert_array_equal(floor_log2(x), expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 0)], ids=str)
def test_products_with_powers_are_batched(axes):
    """Also where one argument is broadcast, and where only one has the mapped axis."""
    x = jnp.arange(1.0, 5.0).reshape(2, 2)
    exponent = jnp.array([[1], [-3]])
    found = jax.vmap(scale_by_power, axes)(x, exponent)
    rows = [x.T[i] if axes[0] == 1 else x if axes[0] is None else x[i] for i in range(2)]
    powers = [exponent if axes[1] is None else exponent[i] for i in range(2)]
    expected = jnp.stack([row * 2.0**power for row, power in zip(rows, powers, strict=True)])
    np.testing.assert_array_equal(found, expected)


def test_a_factor_has_the_unit_of_its_event():
    def model(prior, y, u):
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.factor("y", -0.5 * jnp.sum(((x - y) / u) ** 2, axis=-1))

    def draw(unit):
        y, _ = observations(unit)
        unit = jnp.float32(unit)
        return ndp.sample_posterior(KEY, model, make_prior(unit), y, unit).samples["x"] / unit

    np.testing.assert_allclose(draw(1e-26), draw(1.0), rtol=1e-3, atol=1e-3)


# What cannot be said in a floating type is refused by name.


@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])
def test_a_covariance_far_from_one_gets_a_unit(scale):
    """As long as its variances are numbers; the prior stays the same."""
    parts = Z[:2], np.stack([COV, COV])
    net = ndp.MLP((SIZE,), features=(8,), rngs=nnx.Rngs(0))
    for make in (
        lambda s, unit: ndp.GaussianDenoiser(s * MEAN, s**2 * COV, unit),
        lambda s, unit: ndp.MixtureDenoiser([0.5, 0.5], s * parts[0], s**2 * parts[1], unit),
        lambda s, unit: ndp.NetworkDenoiser(net, s * MEAN, s**2 * COV, unit=unit),
    ):
        stated, own = ndp.DiffusionPrior(make(scale, 1.0)), ndp.DiffusionPrior(make(1.0, scale))
        x = np.float32(scale) * Z
        for found, wanted in (
            (stated.denoise(x, scale) / scale, own.denoise(x, scale) / scale),
            (stated.log_prob(x), own.log_prob(x)),
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
        assert jnp.isfinite(stated.sample(KEY)).all()
        assert stated.denoiser.unit != 1


def test_a_function_far_from_one_needs_a_unit():
    with pytest.raises(ValueError, match="FunctionDenoiser: .* state it in a `unit`"):
        ndp.DiffusionPrior(
            ndp.FunctionDenoiser(lambda x, sigma: x, jnp.zeros(2), 1e-20 * jnp.eye(2))
        )


def test_variances_that_are_no_numbers():
    with pytest.raises(ValueError, match=r"give the prior some width.*unit=1e-17"):
        ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(2), np.eye(2) * 1e-52))


@pytest.mark.parametrize("unit", [0.0, -1.0, np.nan, np.inf, 1e-60, [1.0, 2.0]])
def test_a_unit_is_a_positive_number(unit):
    with pytest.raises(ValueError, match="GaussianDenoiser: expected a unit that is a positive"):
        ndp.GaussianDenoiser(jnp.zeros(2), jnp.eye(2), unit)


@pytest.mark.parametrize("unit", [1e-26, 1e25])
def test_squared_distances_have_no_such_units(unit):
    x = Z * np.float32(unit)
    for distance in (
        ndp.metrics.frechet_distance,
        ndp.metrics.sinkhorn_divergence,
        ndp.metrics.entropic_transport_cost,
    ):
        with pytest.raises(ValueError, match="divide both clouds by their unit"):
            distance(x, x)


def test_levels_of_samplers_are_in_the_units_of_the_data():
    def draw(unit):
        sampler = ndp.samplers.MultistepSDE(16, sigma_min=0.1 * unit, sigma_max=4.0 * unit)
        prior = ndp.DiffusionPrior(make_prior(unit).denoiser, sampler=sampler)
        posterior = ndp.sample_posterior(KEY, model, prior, *observations(unit))
        return prior.sample(KEY, (4,)) / unit, posterior.samples["x"] / unit

    for found, expected in zip(draw(2.0**-80), draw(1.0), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_conditioned_denoiser_gets_a_unit():
    def draw(unit):
        net = ndp.MLP((SIZE,), features=(8,), context_shape=(2,), rngs=nnx.Rngs(0))
        # Draws of degenerate covariances depend on the eigenvectors that were found.
        cov = np.diag([1.0, 2.0, 3.0]) * unit**2
        denoiser = ndp.NetworkDenoiser(net, unit * MEAN, cov)
        contexts = np.eye(2, dtype=np.float32)
        prior = ndp.DiffusionPrior(ConditionedDenoiser(denoiser, contexts), sampler=SAMPLER)
        return prior.sample(KEY, (4,)) / unit

    np.testing.assert_allclose(draw(2.0**-50), draw(1.0), rtol=1e-5)
