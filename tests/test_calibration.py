"""Exact samplers calibrate, wrong ones do not."""

from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS, Gibbs
from scipy.stats import uniform

from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.diffusion.samplers import MultistepSDE
from numpyro_diffprior.guidance.literature import DPS
from numpyro_diffprior.infer.calibration import Calibration, calibrate
from numpyro_diffprior.infer.kernels import MMPSKernel, ParticleGibbs
from numpyro_diffprior.linalg.covariances import Isotropic
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.tracing import mask_priors
from tests.oracles import spd

RNG = np.random.default_rng(0)
SAMPLER = MultistepSDE(32)
GAUSSIAN = DiffusionPrior(
    GaussianDenoiser(jnp.asarray([1.0, -1.0]), jnp.asarray(spd(RNG, 2))), sampler=SAMPLER
)
MIXTURE = DiffusionPrior(
    MixtureDenoiser(
        jnp.asarray([0.3, 0.7]),
        jnp.asarray([[-3.0, 0.0], [3.0, 1.0]]),
        Isotropic(jnp.asarray(0.5), 2),
    ),
    sampler=SAMPLER,
)
Y = jnp.asarray([0.5])


def model(prior, y=None):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(0.1 * x[:1] + x[1:], 0.5).to_event(1), obs=y)


def is_uniform(result):
    pvalues = np.concatenate([result.pvalues()["x"].ravel(), result.distance_pvalues()["x"][None]])
    return pvalues.min() > 0.01 / len(pvalues)


@pytest.mark.parametrize(
    ("prior", "options"),
    [(GAUSSIAN, {}), (GAUSSIAN, {"num_particles": 4}), (MIXTURE, {"num_particles": 16})],
    ids=["Gaussian, MMPS", "Gaussian, particles", "mixture, particles"],
)
def test_exact_samplers_have_uniform_ranks(prior, options):
    result = calibrate(
        jax.random.key(0), model, prior, Y, num_simulations=200, num_samples=39, **options
    )
    assert result.ranks["x"].shape == (200, 2)
    assert result.distance_ranks["x"].shape == (200,)
    assert is_uniform(result)
    # The two elements of an event count as one.
    levels = np.array([0.5, 0.8, 0.95])
    error = np.sqrt(levels * (1 - levels) / 200)
    assert np.all(np.abs(result.coverage(levels)["x"] - levels) < 4 * error)


def test_approximations_are_found_out():
    result = calibrate(
        jax.random.key(0), model, GAUSSIAN, Y, num_simulations=300, num_samples=39, guidance=DPS()
    )
    assert min(result.pvalues()["x"].min(), result.distance_pvalues()["x"]) < 1e-4


@pytest.mark.parametrize("num_chains", [1, 2])
def test_kernels_have_uniform_ranks(num_chains):
    result = calibrate(
        jax.random.key(0),
        model,
        MIXTURE,
        Y,
        num_simulations=100,
        num_samples=20,
        kernel=partial(ParticleGibbs, num_particles=8, sampler=SAMPLER),
        num_warmup=5,
        num_chains=num_chains,
        thinning=2,
    )
    assert result.ranks["x"].shape == (100, 2)
    assert is_uniform(result)


def test_every_latent_site_of_a_kernel_is_ranked():
    def nuisance(prior, y=None):
        with numpyro.plate("n", 3):
            scale = numpyro.sample("scale", dist.LogNormal(0, 0.5))
            with numpyro.plate("repeats", 4):
                numpyro.sample("y", dist.Normal(prior.mean[0], scale), obs=y)

    result = calibrate(
        jax.random.key(0),
        nuisance,
        GAUSSIAN,
        jnp.zeros((4, 3)),
        num_simulations=40,
        num_samples=19,
        kernel=NUTS,
        num_warmup=100,
        thinning=3,
    )
    assert result.ranks["scale"].shape == result.distance_ranks["scale"].shape == (40, 3)
    assert np.all(result.pvalues(4)["scale"] > 0.001)


def test_gibbs_in_several_chains():
    def nuisance(prior, y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0, 0.5))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    def kernel(model):
        masked = mask_priors(model)
        particles = ParticleGibbs(masked, num_particles=4, sampler=MultistepSDE(8))
        return Gibbs([(particles, ["x"]), (NUTS(masked, max_tree_depth=3), None)])

    result = calibrate(
        jax.random.key(0),
        nuisance,
        GAUSSIAN,
        jnp.zeros(2),
        num_simulations=3,
        num_samples=6,
        num_warmup=2,
        num_chains=2,
        kernel=kernel,
    )
    assert {name: ranks.shape for name, ranks in result.ranks.items()} == {
        "scale": (3,),
        "x": (3, 2),
    }


def test_hidden_values_are_no_latents():
    def hiding(prior, y):
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", prior)
            seen = jnp.array([True, False])
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y, obs_mask=seen)

    result = calibrate(
        jax.random.key(0), hiding, GAUSSIAN, jnp.zeros((2, 2)), num_simulations=3, num_samples=5
    )
    assert {name: ranks.shape for name, ranks in result.ranks.items()} == {"x": (3, 2, 2)}


def test_plates_are_taken_whole_and_data_simulated():
    def plated(prior, y, num):
        with numpyro.plate("n", num, subsample_size=2):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    results = [
        calibrate(
            jax.random.key(0), plated, GAUSSIAN, y, 5, num_simulations=6, num_samples=9,
            max_batch_size=3,
        )
        for y in (jnp.zeros((5, 2)), jnp.ones((5, 2)))
    ]  # fmt: skip
    assert results[0].ranks["x"].shape == (6, 5, 2)
    assert results[0].distance_ranks["x"].shape == (6, 5)
    np.testing.assert_array_equal(results[0].ranks["x"], results[1].ranks["x"])


def test_coverage_and_pit_of_all_ranks():
    result = Calibration({"x": jnp.arange(40)}, {}, 39)
    np.testing.assert_allclose(result.coverage((0.5, 0.8, 0.95))["x"], [0.5, 0.8, 0.95])
    np.testing.assert_allclose(result.coverage(0.5)["x"], [0.5])
    np.testing.assert_allclose(result.pit()["x"], (np.arange(40) + 0.5) / 40, rtol=1e-6)


def test_errors():
    def factored(prior):
        x = numpyro.sample("x", prior)
        numpyro.factor("y", -(x**2).sum())

    key = jax.random.key(0)
    with pytest.raises(ValueError, match="no observed site"):
        calibrate(key, model, GAUSSIAN)
    with pytest.raises(ValueError, match=r"\['y'\] are factors"):
        calibrate(key, factored, GAUSSIAN)
    with pytest.raises(ValueError, match="function of the model.*`lambda model: MMPSKernel"):
        calibrate(key, model, GAUSSIAN, Y, kernel=MMPSKernel(model))
    with pytest.raises(ValueError, match="give them to the kernel"):
        calibrate(key, model, GAUSSIAN, Y, kernel=MMPSKernel, num_particles=4)
    with pytest.raises(ValueError, match="multiple of num_chains = 2, got 9"):
        calibrate(key, model, GAUSSIAN, Y, num_samples=9, num_chains=2)


def test_arviz_plots_the_ranks():
    ranks = {"x": jnp.arange(40)[:, None] * jnp.ones((1, 2), int)}
    result = Calibration(ranks, {"x": jnp.arange(40)}, 39)
    group = result.to_datatree()["prior_sbc"]
    assert group["x"].dims == ("chain", "draw", "x_dim_0")
    assert group["x"].shape == (1, 40, 2)
    np.testing.assert_array_equal(group["x"][0], result.pit()["x"])
    np.testing.assert_allclose(group["x_distance"][0], (np.arange(40) + 0.5) / 40, rtol=1e-6)
    if hasattr(az, "plot_ecdf_pit"):  # from version 1 on
        az.plot_ecdf_pit(result.to_datatree(), backend="none")
    else:
        pit = np.array(result.pit()["x"][:, 0])  # a copy, which it sorts in place
        options = {"eval_points": np.linspace(0, 1, 20), "ci_prob": 0.94, "show": False}
        az.plot_ecdf(pit, cdf=uniform.cdf, difference=True, confidence_bands=True, **options)
