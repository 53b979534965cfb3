import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Gibbs, Predictive

from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.diffusion.samplers import DDPM, MultistepSDE
from numpyro_diffprior.infer.kernels import MMPSKernel, ParticleGibbs
from numpyro_diffprior.infer.posterior import sample_posterior
from numpyro_diffprior.particles.system import ParticleInfo
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.tracing import mask_priors

N, D = 3, 2
PRIOR = DiffusionPrior(GaussianDenoiser(jnp.ones(D), jnp.eye(D)), sampler=MultistepSDE(16))
Y = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)))
KERNELS = {"MMPS": MMPSKernel, "particle Gibbs": ParticleGibbs}
DRAW_STATS = tuple(f"info.{name}" for name in ParticleInfo._fields if name != "ess_path")


def model(prior, y=None):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        numpyro.deterministic("total", x.sum(-1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def run(kernel, *, num_samples=20, num_chains=1, chain_method="sequential", **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=0,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), PRIOR, Y, **kwargs)
    return mcmc


@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_kernel_is_a_shim(num_particles):
    """The same key gives the draw of `sample_posterior`, and its statistics."""
    kernel = MMPSKernel(model, num_particles=num_particles)
    state = kernel.init(jax.random.key(5), 0, None, (PRIOR, Y), {})
    for _ in range(2):
        _, key = jax.random.split(state.rng_key)
        state = kernel.sample(state, (PRIOR, Y), {})
        draws = sample_posterior(key, model, PRIOR, Y, num_particles=num_particles)
        # The same program, but compiled as one here and step by step there.
        np.testing.assert_allclose(state.z["x"], draws.samples["x"][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.info.ess, draws.stats["ess"][0], rtol=1e-3)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("chain_method", ["sequential", "vectorized", "parallel"])
@pytest.mark.filterwarnings("ignore:There are not enough devices")
def test_chain_methods(chain_method, name):
    kernel = KERNELS[name](model, num_particles=2)
    mcmc = run(kernel, num_chains=2, chain_method=chain_method, extra_fields=DRAW_STATS)
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["x"].shape == (2, 20, N, D)
    np.testing.assert_allclose(samples["total"], samples["x"].sum(-1), rtol=1e-5)
    assert not np.array_equal(samples["x"][0], samples["x"][1])
    for name in DRAW_STATS:
        assert mcmc.get_extra_fields(group_by_chain=True)[name].shape == (2, 20, N)


@pytest.mark.parametrize("name", KERNELS)
def test_draws_are_the_posterior(name):
    x = np.asarray(run(KERNELS[name](model), num_samples=2000).get_samples()["x"])
    ess = min(float(az.ess(x[None, :, i, j])) for i in range(N) for j in range(D))
    error = x.mean(0) - (1 + np.asarray(Y)) / 2
    assert np.all(np.abs(error) < 4 * np.sqrt(0.5 / ess) + 0.02)
    assert np.all(np.abs(x.var(0) / 0.5 - 1) < 4 * np.sqrt(2 / ess) + 0.05)


def test_particle_gibbs_reports_what_it_did():
    fields = ("updated", "num_evaluations", *DRAW_STATS)
    mcmc = run(ParticleGibbs(model, num_particles=4), extra_fields=fields)
    extra = mcmc.get_extra_fields()
    assert np.all((extra["updated"] >= 0) & (extra["updated"] <= 1))
    assert extra["updated"].mean() > 0.5
    np.testing.assert_array_equal(extra["num_evaluations"], 5 * 16)


def test_progress_bar_and_resume():
    kernel = MMPSKernel(model)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=5, progress_bar=True)
    mcmc.run(jax.random.key(0), PRIOR, Y)
    first = mcmc.get_samples()["x"]
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, PRIOR, Y)
    assert not np.any(first[-1] == mcmc.get_samples()["x"][0])


@pytest.mark.parametrize("name", KERNELS)
def test_arviz_and_predictive(name):
    mcmc = run(KERNELS[name](model), num_chains=2)
    idata = az.from_numpyro(mcmc, log_likelihood=True)  # not by default from ArviZ 1.0 on
    assert idata["posterior"]["x"].shape == (2, 20, N, D)
    assert "y" in idata["log_likelihood"]
    predictive = Predictive(model, mcmc.get_samples())
    assert predictive(jax.random.key(1), PRIOR)["y"].shape == (40, N, D)


@pytest.mark.parametrize("name", KERNELS)
def test_a_block_of_gibbs(monkeypatch, name):
    """The conditional of x given a nuisance that NUTS samples: a mean that is known exactly."""

    def with_offset(prior, y):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x + offset, 0.5).to_event(1), obs=y)

    # No leapfrog step asks for the prior's density.
    monkeypatch.setattr(DiffusionPrior, "log_prob", None)
    masked = mask_priors(with_offset)
    kernel = Gibbs([(KERNELS[name](masked), ["x"]), (NUTS(masked), None)])
    mcmc = MCMC(kernel, num_warmup=50, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(0), PRIOR, Y)
    offset = np.asarray(mcmc.get_samples()["offset"])
    # Marginally y ~ N(1 + offset, 1.25) for each of N * D values.
    precision = 1 + N * D / 1.25
    mean = float(jnp.sum(Y - 1)) / 1.25 / precision
    ess = float(az.ess(offset[None]))
    assert abs(offset.mean() - mean) < 4 / np.sqrt(precision * ess)


def test_particle_gibbs_with_an_unknown_noise_level():
    """Images from two modes and their noise: as NUTS on the mixture with x summed out."""
    weights, means, variance = np.array([0.3, 0.7]), np.array([-2.0, 2.0]), 0.25
    rng, num = np.random.default_rng(1), 12
    x = means[(rng.random(num) < 0.7).astype(int)] + 0.5 * rng.normal(size=num)
    y = jnp.asarray(x + 0.8 * rng.normal(size=num))[:, None]
    denoiser = MixtureDenoiser(weights, means[:, None], variance * np.eye(1))
    prior = DiffusionPrior(denoiser, sampler=MultistepSDE(32))

    def joint(prior, y):
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("n", num):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    def marginal(y):
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 1.0))
        spread = jnp.sqrt(variance + noise**2)
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, spread))
        with numpyro.plate("n", num):
            numpyro.sample("y", mixture, obs=y[:, 0])

    masked = mask_priors(joint)
    kernel = Gibbs([(ParticleGibbs(masked, num_particles=4), ["x"]), (NUTS(masked), None)])
    mcmc = MCMC(kernel, num_warmup=100, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), prior, y)
    exact = MCMC(NUTS(marginal), num_warmup=500, num_samples=4000, progress_bar=False)
    exact.run(jax.random.key(1), y)
    found, expected = (np.log(np.asarray(m.get_samples()["noise"])) for m in (mcmc, exact))
    error = np.sqrt(found.var() / float(az.ess(found[None])) + expected.var() / 1000)
    assert abs(found.mean() - expected.mean()) < 4 * error + 0.01
    assert abs(found.std() / expected.std() - 1) < 0.2


def test_init_refuses_what_the_core_refuses():
    with pytest.raises(ValueError, match="no observed site depends"):
        run(MMPSKernel(lambda prior, y: numpyro.sample("x", prior)))
    with pytest.raises(ValueError, match="have no sampler"):
        MMPSKernel(model).init(jax.random.key(0), 0, None, (PRIOR,), {})
    with pytest.raises(ValueError, match="stochastic sampler"):
        run(MMPSKernel(model, num_particles=2, sampler=DDPM(4, eta=0.0)))
    with pytest.raises(ValueError, match="expected num_particles >= 2, got 1"):
        ParticleGibbs(model, num_particles=1)


def test_starts_where_it_is_told():
    start = {"x": jnp.full((N, D), 50.0)}
    kernel = ParticleGibbs(model)
    state = kernel.init(jax.random.key(0), 0, start, (PRIOR, Y), {})
    np.testing.assert_array_equal(state.z["x"], start["x"])
    np.testing.assert_allclose(state.path[0][-1], start["x"], atol=1.0)


@pytest.mark.parametrize("name", KERNELS)
def test_a_chain_gets_out_of_nan(name):
    kernel = KERNELS[name](model, num_particles=4)
    init_params = {"x": jnp.full((N, D), jnp.nan)}
    state = kernel.init(jax.random.key(0), 0, init_params, (PRIOR, Y), {})
    state = kernel.sample(state, (PRIOR, Y), {})
    assert np.all(np.isfinite(state.z["x"]))


def test_whole_plates_and_no_values_that_nobody_draws():
    def hiding(prior, y):
        with numpyro.plate("n", N, subsample_size=2):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y, obs_mask=y[:, 0] > 0)

    samples = run(MMPSKernel(hiding), num_samples=3).get_samples()
    assert {name: x.shape for name, x in samples.items()} == {"x": (3, N, D)}


def test_sampling_before_init():
    kernel = MMPSKernel(model)
    state = kernel.init(jax.random.key(0), 0, None, (PRIOR, Y), {})
    with pytest.raises(RuntimeError, match="`init` must be called before `sample`"):
        kernel.wrap_model(lambda model: model).sample(state, (PRIOR, Y), {})
