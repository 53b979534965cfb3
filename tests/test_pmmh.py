"""Other parameters with diffusion sites integrated out, against quadrature."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Gibbs
from scipy.special import logsumexp
from scipy.stats import norm

from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.diffusion.samplers import MultistepSDE
from numpyro_diffprior.infer.calibration import calibrate
from numpyro_diffprior.infer.pmmh import PMMH
from numpyro_diffprior.prior import DiffusionPrior

COV = np.array([[1.0, 0.6], [0.6, 1.0]])
WEIGHTS, MEANS = np.array([0.3, 0.7]), np.array([[-2.0, -2.0], [2.0, 1.0]])
SAMPLER = MultistepSDE(24)
PRIOR = DiffusionPrior(MixtureDenoiser(WEIGHTS, MEANS, COV / 4), sampler=SAMPLER)
Y, SIDE = jnp.array([1.5, -0.5]), 0.3


def model(prior, y=None, side=None, spread=1.0):
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, spread))
    shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", prior)
    numpyro.deterministic("total", x.sum() + shift)
    numpyro.sample("y", dist.Normal(x + shift, noise).to_event(1), obs=y)
    numpyro.sample("side", dist.Normal(shift, 0.5), obs=side)


def run(kernel, *args, num_warmup=300, num_samples=1500, num_chains=4, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *args, **kwargs)
    return mcmc


def quadrature():
    """Return means and deviations of log-noise, shift, and the sum of x and shift."""
    log_noise, shift = np.meshgrid(np.linspace(-6, 3, 121), np.linspace(-3, 3, 121), indexing="ij")
    log_prob = norm.logpdf(log_noise, -1, 1) + norm.logpdf(shift) + norm.logpdf(SIDE, shift, 0.5)
    parts, totals = [], []
    for weight, mean in zip(WEIGHTS, MEANS, strict=True):
        variance = np.exp(2 * log_noise)[..., None, None] * np.eye(2)
        residual = np.asarray(Y) - mean - shift[..., None]
        whole = variance + COV / 4
        square = np.einsum("...i,...ij,...j", residual, np.linalg.inv(whole), residual)
        parts.append(np.log(weight) - square / 2 - np.log(np.linalg.det(whole)) / 2)
        gain = COV / 4 @ np.linalg.inv(whole)
        totals.append((mean + np.einsum("...ij,...j->...i", gain, residual)).sum(-1) + shift)
    weights = np.exp(log_prob + np.stack(parts) - logsumexp(log_prob + np.stack(parts)))
    found = {}
    for name, value in (("noise", log_noise), ("shift", shift)):
        mean = (weights * value).sum()
        found[name] = mean, np.sqrt((weights * (value - mean) ** 2).sum())
    found["total"] = (weights * np.stack(totals)).sum(), None
    return found


def check_means(draws, exact):
    """Compare means, by chain, within their errors, and deviations where they are given."""
    for name, (mean, deviation) in exact.items():
        if name not in draws:
            continue
        values = np.asarray(draws[name], float)
        error = values.std() / np.sqrt(float(az.ess(values)))
        assert abs(values.mean() - mean) < 4 * error + 0.01
        if deviation is not None:
            np.testing.assert_allclose(values.std(), deviation, rtol=0.1)


def test_draws_are_the_joint_posterior():
    """Of two modes, of constrained values, and with data that say nothing of x."""
    mcmc = run(PMMH(model, num_particles=8), PRIOR, Y, SIDE)
    draws = {k: np.asarray(v, float) for k, v in mcmc.get_samples(group_by_chain=True).items()}
    draws["noise"] = np.log(draws["noise"])
    np.testing.assert_allclose(draws["total"], draws["x"].sum(-1) + draws["shift"], rtol=1e-4)
    exact = quadrature()
    assert all(az.rhat(draws[name]) < 1.05 for name in exact)
    check_means(draws, exact)


def test_what_a_state_tells():
    fields = ("mean_accept_prob", "log_density", "info.ess", "i")
    mcmc = run(PMMH(model), PRIOR, Y, SIDE, num_samples=20, num_warmup=30, extra_fields=fields)
    assert mcmc.get_samples()["x"].shape == (80, 2)
    extra = mcmc.get_extra_fields(group_by_chain=True)
    assert extra["info.ess"].shape == (4, 20)
    assert np.all(extra["i"][:, -1] == 50)
    rate = extra["mean_accept_prob"][:, -1]
    assert np.all((rate > 0) & (rate < 1))
    # Where a chain stays, all of the state stays.
    stays = np.diff(mcmc.get_samples(group_by_chain=True)["noise"], axis=1) == 0
    assert stays.any()
    for value in (extra["log_density"], extra["info.ess"]):
        assert np.all((np.diff(value, axis=1) == 0)[stays])
    mcmc.num_samples = 10
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, PRIOR, Y, SIDE)
    assert np.all(mcmc.last_state.i == 60)


@pytest.mark.parametrize("chain_method", ["sequential", jax.vmap])
def test_chain_methods(chain_method):
    kernel = PMMH(model, num_particles=2)
    mcmc = MCMC(
        kernel,
        num_warmup=2,
        num_samples=10,
        num_chains=2,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), PRIOR, Y, SIDE)
    samples = mcmc.get_samples(group_by_chain=True)
    assert not np.array_equal(samples["noise"][0], samples["noise"][1])


@pytest.mark.parametrize("unit", [1e-15, 1e12])
def test_parameters_in_any_unit(unit):
    """Proposals start with the deviations of the priors. (Squares below 1e-38 are NumPyro's.)"""

    def scaled(prior, y, side):
        x, shift = numpyro.sample("x", prior), numpyro.sample("shift", dist.Normal(0.0, unit))
        numpyro.sample("y", dist.Normal(x + shift / unit, 0.5).to_event(1), obs=y)
        numpyro.sample("side", dist.Normal(shift / unit, 0.5), obs=side)

    mcmc = run(PMMH(scaled, num_particles=4), PRIOR, Y, SIDE, num_samples=500)
    shift = np.asarray(mcmc.get_samples(group_by_chain=True)["shift"]) / unit
    assert az.rhat(shift) < 1.05
    assert float(az.ess(shift)) > 200
    assert 0.2 < shift.std() < 0.6


def test_a_proposal_of_the_users():
    """Its mean and covariance are not adapted; unconstrained values are in the order of names."""
    root = jnp.diag(jnp.array([1.0, 0.5]))
    proposal = dist.MultivariateStudentT(5, jnp.array([-1.0, 0.3]), root)
    mcmc = run(PMMH(model, num_particles=8, proposal=proposal), PRIOR, Y, SIDE, num_warmup=200)
    np.testing.assert_array_equal(mcmc.last_state.proposal.root[0], root)
    draws = {k: np.asarray(v, float) for k, v in mcmc.get_samples(group_by_chain=True).items()}
    draws["noise"] = np.log(draws["noise"])
    check_means(draws, {name: (mean, None) for name, (mean, _) in quadrature().items()})


def test_a_proposal_without_moments():
    base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    scale = dist.transforms.AffineTransform(jnp.array([-1.0, 0.3]), jnp.array([1.5, 0.5]))
    proposal = dist.TransformedDistribution(base, scale)
    mcmc = run(PMMH(model, num_particles=8, proposal=proposal), PRIOR, Y, SIDE, num_warmup=100)
    check_means({"shift": mcmc.get_samples(group_by_chain=True)["shift"]}, quadrature())


def test_complex_values():
    """Real and imaginary parts have the noise, of unknown size."""

    def observe(prior, y):
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        x = numpyro.sample("x", prior)
        k = jax.lax.complex(x[..., 0], x[..., 1])
        numpyro.sample("y", dist.Normal(k, noise).to_event(1), obs=y)

    y = jnp.array([0.5 + 1.0j, -1.0 - 0.3j])
    gaussian = GaussianDenoiser(jnp.zeros((2, 2)), jnp.eye(4))
    mcmc = run(PMMH(observe), DiffusionPrior(gaussian, sampler=SAMPLER), y)
    log_noise = np.log(mcmc.get_samples(group_by_chain=True)["noise"])
    grid = np.linspace(-4, 2, 601)
    variance = 1 + np.exp(2 * grid)
    square = np.sum(np.abs(np.asarray(y)) ** 2)
    log_prob = norm.logpdf(grid, -1, 0.5) - square / variance / 2 - 2 * np.log(variance)
    weights = np.exp(log_prob - logsumexp(log_prob))
    check_means({"noise": log_noise}, {"noise": ((weights * grid).sum(), None)})


@pytest.mark.parametrize("kind", ["factor", "param", "dict of priors"])
def test_other_kinds_of_models(kind):
    """Noise of 0.5 about an event of variance one and a shift."""

    def shifted(prior, y):
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", prior["a"] if isinstance(prior, dict) else prior) + shift
        if kind == "factor":
            numpyro.factor("y", -jnp.sum((y - x) ** 2) / 0.5)
        else:
            offset = numpyro.param("offset", 0.3) if kind == "param" else 0.3
            numpyro.sample("y", dist.Normal(x + offset - 0.3, 0.5).to_event(1), obs=y)

    prior = DiffusionPrior(GaussianDenoiser(jnp.zeros(2), jnp.eye(2)), sampler=SAMPLER)
    mcmc = run(PMMH(shifted), {"a": prior} if kind == "dict of priors" else prior, Y)
    precision = 2 / 1.25
    exact = {"shift": (float(Y.sum()) / 1.25 / (1 + precision), (1 + precision) ** -0.5)}
    check_means(mcmc.get_samples(group_by_chain=True), exact)


def test_starts_where_it_is_told():
    start = {"noise": jnp.array([0.5, 1.0]), "shift": jnp.array([2.0, 3.0])}
    kernel = PMMH(model)
    keys = jax.random.split(jax.random.key(0), 2)
    state = kernel.init(keys, 0, start, (PRIOR, Y, SIDE), {})
    for name, value in start.items():
        np.testing.assert_array_equal(state.z[name], value)


def test_a_prior_that_depends_on_other_sites():
    """A Gaussian of unknown variance: the evidence holds the prior, too."""

    def scaled(mean, y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        prior = DiffusionPrior(GaussianDenoiser(mean, scale**2 * jnp.eye(2)), sampler=SAMPLER)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    y = jnp.array([2.0, -3.0])
    values = np.log(
        np.asarray(run(PMMH(scaled), jnp.zeros(2), y).get_samples(group_by_chain=True)["scale"])
    )
    grid = np.linspace(-3, 3, 601)
    variance = np.exp(2 * grid) + 0.25
    log_prob = norm.logpdf(grid, 0, 0.5) - 13 / variance / 2 - np.log(variance)
    weights = np.exp(log_prob - logsumexp(log_prob))
    error = values.std() / np.sqrt(float(az.ess(values)))
    assert abs(values.mean() - (weights * grid).sum()) < 4 * error + 0.01


def test_plates_and_hidden_values():
    """Whole plates, and values that nobody draws."""

    def hiding(prior, y):
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 3, subsample_size=2):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior) + shift
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y, obs_mask=y[:, 0] > 0)

    y = jnp.array([[1.0, 2.0], [-1.0, 0.0], [3.0, 2.0]])
    samples = run(PMMH(hiding), PRIOR, y, num_samples=3, num_warmup=2).get_samples()
    assert {name: x.shape for name, x in samples.items()} == {"x": (12, 3, 2), "shift": (12,)}


def test_several_diffusion_sites():
    def both(prior, y):
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        a, b = numpyro.sample("a", prior), numpyro.sample("b", prior)
        numpyro.sample("y", dist.Normal(a + shift, 0.5).to_event(1), obs=y)
        numpyro.sample("w", dist.Normal(b - shift, 0.5).to_event(1), obs=-y)

    gaussian = DiffusionPrior(GaussianDenoiser(jnp.zeros(2), COV), sampler=SAMPLER)
    values = run(PMMH(both, num_particles=8), gaussian, Y).get_samples(group_by_chain=True)
    shift = np.asarray(values["shift"])
    # Both say the same: y ~ N(shift, COV + 0.25).
    precision = np.linalg.inv(COV + np.eye(2) / 4)
    total = 1 + 2 * precision.sum()
    error = shift.std() / np.sqrt(float(az.ess(shift)))
    assert abs(shift.mean() - 2 * (precision @ np.asarray(Y)).sum() / total) < 4 * error
    np.testing.assert_allclose(shift.std(), total**-0.5, rtol=0.1)


def test_what_is_refused():
    def discrete(prior, y):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior) + k, 1.0).to_event(1), obs=y)

    def alone(prior, y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0).to_event(1), obs=y)

    for refused, message in (
        (discrete, r"expected continuous latent sites, got the discrete ones \['k'\]"),
        (alone, "no latent site but those with diffusion priors"),
        (lambda prior, y: numpyro.sample("z", dist.Normal()), "no latent site with a Diffusion"),
    ):
        with pytest.raises(ValueError, match=message):
            PMMH(refused).init(jax.random.key(0), 0, None, (PRIOR, Y), {})
    with pytest.raises(ValueError, match="expected num_particles >= 2, got 1"):
        PMMH(model, num_particles=1)
    with pytest.raises(ValueError, match="cannot be a block of Gibbs; use ParticleGibbs"):
        Gibbs([(PMMH(model), ["x", "noise"]), (NUTS(model), None)])
    for proposal, start, message in (
        (dist.Normal(jnp.zeros(3), 1).to_event(1), None, r"shape \(2,\), got shape \(3,\)"),
        (1.0, None, "expected a distribution as proposal, got 1.0"),
        (None, {"nose": 0.0, "x": Y}, r"sites \['noise', 'shift'\], got \['nose', 'x'\]"),
    ):
        kernel = PMMH(model, proposal=proposal)
        with pytest.raises(ValueError, match=message):
            kernel.init(jax.random.key(0), 0, start, (PRIOR, Y, SIDE), {})


@pytest.mark.slow
def test_calibration():
    """Ranks of all sites are uniform, however few the sampler's steps."""
    prior = DiffusionPrior(MixtureDenoiser(WEIGHTS, MEANS, COV / 4), sampler=MultistepSDE(8))
    result = calibrate(
        jax.random.key(0),
        model,
        prior,
        Y,
        SIDE,
        spread=0.4,  # draws are kept once in forty updates, which is too often in less noise
        num_simulations=200,
        num_samples=19,
        num_warmup=200,
        thinning=40,
        kernel=lambda model: PMMH(model, num_particles=8),
        progress_bar=False,
    )
    for name, pvalues in result.pvalues().items():
        assert np.all(pvalues > 1e-3), name
