"""Which latent sites are drawn together: those that some observation connects, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import MCMC
from scipy.stats import norm

import numpyro_diffprior as ndp
from numpyro_diffprior.reading.reader import read

D, NOISE = 2, 0.5
SIZES = {"first": 7, "second": 4}
RNG = np.random.default_rng(0)
DATA = {k: jnp.asarray(RNG.normal(size=(n, D)), "float32") for k, n in SIZES.items()}
PRIOR = ndp.DiffusionPrior(
    ndp.GaussianDenoiser(jnp.zeros(D), jnp.eye(D)), sampler=ndp.samplers.MultistepSDE(16)
)


def instrument(prior, name, y):
    with numpyro.plate(f"plate of {name}", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample(f"x of {name}", prior)
        numpyro.sample(f"y of {name}", dist.Normal(x, NOISE).to_event(1), obs=y)
        return x


def two_instruments(prior, first, second):
    instrument(prior, "first", first)
    instrument(prior, "second", second)


def connected(prior, first, second):
    """A third observation, of both."""
    x, z = instrument(prior, "first", first), instrument(prior, "second", second)
    numpyro.sample("total", dist.Normal(x.sum() + z.sum(), 1.0), obs=0.3)


def one_plate(prior, y):
    """Two sites in one plate that nothing connects."""
    with numpyro.plate("plate", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        for name, shift in (("first", 0.0), ("second", 1.0)):
            x = numpyro.sample(f"x of {name}", prior)
            numpyro.sample(f"y of {name}", dist.Normal(x + shift, NOISE).to_event(1), obs=y)


def groups(model, *args, **options):
    reading = read(model, (PRIOR, *args), {}, **options).reading
    return [(group.latents.names, group.latents.is_joined) for group in reading.groups]


def test_groups_are_connected_by_observations():
    apart = [(("x of first",), False), (("x of second",), False)]
    assert groups(two_instruments, *DATA.values()) == apart
    assert groups(two_instruments, *DATA.values(), block_size=lambda group: 3) == apart
    assert groups(one_plate, DATA["first"]) == apart
    assert groups(connected, *DATA.values()) == [(("x of first", "x of second"), True)]


def check(draws, name, y):
    """The posterior of each element, of draws of shape ``(num, *batch, D)``."""
    x = np.asarray(draws[f"x of {name}"])
    variance = NOISE**2 / (1 + NOISE**2)
    error = x.mean(0) - np.asarray(y) / (1 + NOISE**2)
    assert np.all(np.abs(error) < 4.5 * np.sqrt(variance / len(x)) + 0.02)
    assert abs(x.var(0).mean() / variance - 1) < 0.1


@pytest.mark.parametrize("num_particles", [1, 16])
@pytest.mark.parametrize("max_batch_size", [1024, 48])
def test_independent_plates_are_drawn_apart(num_particles, max_batch_size):
    found = ndp.sample_posterior(
        jax.random.key(0),
        two_instruments,
        PRIOR,
        *DATA.values(),
        num_samples=200,
        num_particles=num_particles,
        max_batch_size=max_batch_size,
    )
    for name, y in DATA.items():
        check(found.samples, name, y)
    # One axis of all events; as one event of all plates, they had 1.9 of 16 particles effective.
    assert found.stats["ess"].shape == (200, sum(SIZES.values()))
    assert found.stats["ess_path"].shape == (200, sum(SIZES.values()), 16)
    assert np.asarray(found.stats["ess"]).mean() > 0.7 * num_particles


def test_evidence_is_that_of_each_plate():
    found = ndp.log_evidence(jax.random.key(1), two_instruments, PRIOR, *DATA.values())
    expected = [
        norm.logpdf(np.asarray(y), scale=np.sqrt(1 + NOISE**2)).sum(-1) for y in DATA.values()
    ]
    assert found.value.shape == (sum(SIZES.values()),)
    np.testing.assert_allclose(
        found.value, np.concatenate(expected), atol=5 * np.max(found.standard_error) + 0.02
    )


@pytest.mark.parametrize(
    "make", [ndp.MMPSKernel, lambda model: ndp.ParticleGibbs(model, num_particles=4)]
)
@pytest.mark.parametrize("num_chains", [1, 2])
def test_kernels_draw_all_groups(make, num_chains):
    mcmc = MCMC(
        make(two_instruments),
        num_warmup=5,
        num_samples=400,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(2), PRIOR, *DATA.values(), extra_fields=("info.ess",))
    for name, y in DATA.items():
        check(mcmc.get_samples(), name, y)
    total = sum(SIZES.values())
    assert mcmc.get_extra_fields()["info.ess"].shape == (400 * num_chains, total)


def test_calibration_of_two_groups():
    found = ndp.calibrate(
        jax.random.key(3), two_instruments, PRIOR, *DATA.values(),
        num_simulations=100, num_samples=39,
    )  # fmt: skip
    for name, size in SIZES.items():
        assert found.ranks[f"x of {name}"].shape == (100, size, D)
        np.testing.assert_allclose(found.coverage([0.5])[f"x of {name}"], 0.5, atol=0.06)


def test_em_learns_one_prior_from_two_instruments():
    rng = np.random.default_rng(1)
    mean = np.array([2.0, -1.0])
    data = [
        jnp.asarray(mean + rng.normal(size=(n, D)) * 0.7 + NOISE * rng.normal(size=(n, D)))
        for n in (200, 150)
    ]
    net = ndp.MLP((D,), features=(8,), embedding=4, rngs=nnx.Rngs(0))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(16))
    fit = ndp.EM(
        two_instruments,
        optax.adam(1e-3),
        e_step=ndp.EStep(num_particles=4),
        m_step=ndp.MStep(num_steps=4),
        start=ndp.GaussianStart(num_iterations=8),
    )
    result = fit.run(jax.random.key(4), 2, prior, *data, progress_bar=False)
    np.testing.assert_allclose(result.prior.mean, mean, atol=0.2)
    np.testing.assert_allclose(result.prior.variance, 0.49, rtol=0.35)
    assert result.history.ess[-1] > 2


# Values that depend on the latent.


def residual(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(0.0, NOISE).expand([D]).to_event(1), obs=y - x)


def correlated_residual(prior, y):
    x = numpyro.sample("x", prior)
    fn = dist.MultivariateNormal(jnp.zeros(D), NOISE**2 * jnp.eye(D))
    numpyro.sample("y", fn, obs=y - x)


def log_residual(prior, y):
    """The volume of the transformation counts: the density of y is normal in its logarithm."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.LogNormal(0.0, NOISE).expand([D]).to_event(1), obs=jnp.exp(y - x))


def itself(prior, y):
    """The latent is observed: a factor of its density."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(y, NOISE).to_event(1), obs=x)


@pytest.mark.parametrize("model", [residual, correlated_residual, log_residual, itself])
@pytest.mark.parametrize("level", [0.5, 4.0])
def test_values_may_depend_on_the_latent(model, level):
    y = jnp.asarray([level, -level])
    x = np.asarray(
        ndp.sample_posterior(jax.random.key(5), model, PRIOR, y, num_samples=2000).samples["x"]
    )
    variance = NOISE**2 / (1 + NOISE**2)
    # The density of exp(y - x) has the factor exp(x - y).
    shift = variance if model is log_residual else 0.0
    expected = np.asarray(y) / (1 + NOISE**2) + shift
    assert np.all(np.abs(x.mean(0) - expected) < 4.5 * np.sqrt(variance / 2000) + 0.01)
    np.testing.assert_allclose(x.var(0), variance, rtol=4.5 * np.sqrt(2 / 2000) + 0.02)


def test_em_of_residuals_learns_the_prior():
    """With the values taken for data, the prior was learned from noise that is not there."""
    rng = np.random.default_rng(2)
    y = jnp.asarray(1.0 + 0.7 * rng.normal(size=(400, D)) + NOISE * rng.normal(size=(400, D)))

    def model(prior, y):
        with numpyro.plate("n", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(0.0, NOISE).expand([D]).to_event(1), obs=y - x)

    net = ndp.MLP((D,), features=(8,), embedding=4, rngs=nnx.Rngs(0))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(16))
    start = ndp.EM(model, optax.adam(1e-3)).init(jax.random.key(6), prior, y).prior
    np.testing.assert_allclose(start.mean, 1.0, atol=4 * 0.86 / 20)
    np.testing.assert_allclose(start.variance, 0.49, rtol=0.3)
