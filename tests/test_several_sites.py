"""Several latent sites with diffusion priors in one model, drawn together."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from scipy.linalg import block_diag

from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.wrappers import ProductDenoiser
from numpyro_diffprior.diffusion.samplers import DDPM, MultistepSDE
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.calibration import calibrate
from numpyro_diffprior.infer.kernels import MMPSKernel, ParticleGibbs
from numpyro_diffprior.infer.posterior import sample_posterior
from numpyro_diffprior.prior import DiffusionPrior
from tests.oracles import gaussian_posterior, spd, tolerance

RNG = np.random.default_rng(0)
N, NOISE = 3, 0.3
MEANS = {"star": RNG.normal(size=2), "sky": 100 * RNG.normal(size=(3, 1))}
COVS = {"star": spd(RNG, 2), "sky": 1e4 * spd(RNG, 3)}
MIX = {"star": np.array([[1.0, 0.5], [0.0, 1.0]]), "sky": RNG.normal(size=(2, 3)) / 100}
Y = RNG.normal(size=(N, 2))
PRIORS = {
    name: DiffusionPrior(
        GaussianDenoiser(jnp.asarray(MEANS[name]), jnp.asarray(COVS[name])),
        sampler=MultistepSDE(64),
    )
    for name in MEANS
}


def model(priors, y=None):
    with numpyro.plate("n", N):
        star = numpyro.sample("star", priors["star"])
        sky = numpyro.sample("sky", priors["sky"])
        mean = star @ MIX["star"].T + sky[..., 0] @ MIX["sky"].T
        numpyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)


def exact_moments():
    mean = np.concatenate([value.ravel() for value in MEANS.values()])
    matrix = np.concatenate(list(MIX.values()), axis=1)
    cov_y = NOISE**2 * np.eye(2)
    found = [gaussian_posterior(mean, block_diag(*COVS.values()), matrix, cov_y, y) for y in Y]
    return [np.stack(part) for part in zip(*found, strict=True)]


def check(samples):
    """Draws of both sites, joined, against the closed form of the joint posterior."""
    assert samples["star"].shape[1:] == (N, 2)
    assert samples["sky"].shape[1:] == (N, 3, 1)
    x = np.concatenate([samples["star"], samples["sky"][..., 0]], axis=-1)
    mean, cov = exact_moments()
    scale = np.sqrt(np.diagonal(cov, axis1=-2, axis2=-1))
    error = 4 / np.sqrt(len(x))
    assert np.all(np.abs(x.mean(0) - mean) / scale < error)
    for i in range(N):
        relative = np.cov(x[:, i].T) / np.outer(scale[i], scale[i])
        expected = cov[i] / np.outer(scale[i], scale[i])
        assert np.all(np.abs(relative - expected) < 1.5 * error)


def test_product_denoises_its_parts_in_their_own_units():
    mixture = MixtureDenoiser(
        jnp.full(2, 0.5), jnp.asarray([[[-9.0, 0.0]], [[9.0, 3.0]]]), jnp.stack([jnp.eye(2)] * 2)
    )
    gaussian = PRIORS["star"].denoiser
    product = ProductDenoiser((mixture, gaussian))
    assert product.event_shape == (4,)
    np.testing.assert_allclose(product.scale, 1, rtol=1e-5)
    parts = jnp.asarray(RNG.normal(size=(5, 1, 2))), jnp.asarray(RNG.normal(size=(5, 2)))
    joined = product.join(parts)
    for part, found in zip(parts, product.split(joined), strict=True):
        np.testing.assert_allclose(found, part, rtol=1e-5)
    for sigma in (0.3, jnp.linspace(0.1, 2, 5)):
        found = product.split(product(joined, sigma))
        for denoiser, part, x_hat in zip((mixture, gaussian), parts, found, strict=True):
            expected = denoiser(part, sigma * denoiser.scale)
            np.testing.assert_allclose(x_hat, expected, rtol=tolerance(1e-4), atol=1e-4)
    assert product.error_ratio(0.5) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": MMPS(GaussianCovariance(), max_dense=0)},
        {"num_particles": 3},
        {"max_batch_size": 512},
    ],
    ids=["MMPS", "Gaussian, matrix-free", "particles", "blocks"],
)
def test_sum_of_two_sources(options):
    draws = sample_posterior(
        jax.random.key(0), model, PRIORS, jnp.asarray(Y), num_samples=1000, **options
    )
    check(draws.samples)


@pytest.mark.parametrize("kernel", [MMPSKernel, ParticleGibbs])
def test_kernels(kernel):
    mcmc = MCMC(
        kernel(model, num_particles=4),
        num_warmup=2,
        num_samples=5,
        num_chains=200,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), PRIORS, jnp.asarray(Y))
    check(mcmc.get_samples())


def test_particle_gibbs_starts_at_given_values():
    values = {name: jnp.broadcast_to(p.mean, (N, *p.event_shape)) for name, p in PRIORS.items()}
    kernel = ParticleGibbs(model, num_particles=2)
    state = kernel.init(jax.random.key(0), 0, values, (PRIORS, jnp.asarray(Y)), {})
    for name, value in values.items():
        np.testing.assert_allclose(state.z[name], value, rtol=1e-5)


def test_two_sites_of_one_prior_are_calibrated():
    def twice(prior, y=None):
        a, b = (numpyro.sample(name, prior) for name in "ab")
        numpyro.sample("y", dist.Normal(a - 0.5 * b, 0.5).to_event(1), obs=y)

    result = calibrate(
        jax.random.key(0), twice, PRIORS["star"], jnp.zeros(2), num_simulations=200, num_samples=39
    )
    for name in "ab":
        assert result.ranks[name].shape == (200, 2)
        assert np.all(result.pvalues()[name] > 0.01 / 4)


def in_different_plates(priors, y):
    """One star behind all skies."""
    star = numpyro.sample("star", priors["star"])
    with numpyro.plate("n", N):
        sky = numpyro.sample("sky", priors["sky"])[..., :2, 0]
        numpyro.sample("y", dist.Normal(star + sky, NOISE).to_event(1), obs=y)


@pytest.mark.parametrize("guidance", [MMPS(max_dense=100), MMPS(GaussianCovariance())])
def test_sites_in_different_plates(guidance):
    """Against the joint Gaussian of one star and N skies."""
    draws = sample_posterior(
        jax.random.key(0),
        in_different_plates,
        PRIORS,
        jnp.asarray(Y),
        num_samples=1000,
        guidance=guidance,
    )
    star, sky = draws.samples["star"], draws.samples["sky"]
    assert star.shape == (1000, 2)
    assert sky.shape == (1000, N, *PRIORS["sky"].event_shape)
    assert draws.stats["reduced_chi_square"].shape == (1000,)
    cov_star, cov_sky = (np.asarray(PRIORS[n].denoiser.cov.dense()) for n in ("star", "sky"))
    pick = np.zeros((2, cov_sky.shape[0]))
    width = PRIORS["sky"].event_shape[1]
    pick[[0, 1], [0, width]] = 1
    cov_y = pick @ cov_sky @ pick.T + NOISE**2 * np.eye(2)
    residual = Y - np.asarray(PRIORS["sky"].mean)[:2, 0]
    precision = np.linalg.inv(cov_star) + N * np.linalg.inv(cov_y)
    cov = np.linalg.inv(precision)
    mean_star = np.asarray(PRIORS["star"].mean)
    information = np.linalg.solve(cov_star, mean_star) + np.linalg.solve(cov_y, residual.sum(0))
    mean = cov @ information
    scale = np.sqrt(np.diag(cov))
    error = 4 / np.sqrt(1000) + 0.02
    assert np.all(np.abs(star.mean(0) - mean) < error * scale)
    np.testing.assert_allclose(
        np.cov(star.T) / np.outer(scale, scale), cov / np.outer(scale, scale), atol=1.5 * error
    )


def test_errors():
    key, y = jax.random.key(0), jnp.asarray(Y)
    other = PRIORS | {"star": DiffusionPrior(PRIORS["star"].denoiser, sampler=DDPM(8))}
    with pytest.raises(ValueError, match=r"different samplers.*DDPM"):
        sample_posterior(key, model, other, y)
