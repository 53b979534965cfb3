"""Proposals against the dense Gaussians that they stand for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.diffusion.samplers import DDPM, MultistepSDE
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.likelihood import linear_gaussian
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.linalg.covariances import Diagonal, DiagonalPlusLowRank, Isotropic
from numpyro_diffprior.particles.proposals import Particles, propose
from numpyro_diffprior.particles.smc import draw_posterior
from numpyro_diffprior.particles.system import SamplingOptions
from tests.oracles import gaussian_posterior, spd, tolerance

LOOKING = MMPS(GaussianCovariance(), look_ahead=True)
D, M, NUM_EVENTS, NUM_PARTICLES = 3, 2, 2, 4
RNG = np.random.default_rng(0)
MEAN, COV = RNG.normal(size=D), spd(RNG, D)
NOISE = np.array([0.04, 0.3])
Y = RNG.normal(size=(NUM_EVENTS, M))
DENOISER = GaussianDenoiser(jnp.asarray(MEAN), jnp.asarray(COV))
FACTOR = RNG.normal(size=(D, 1))
LOW_RANK = GaussianDenoiser(
    jnp.asarray(MEAN), DiagonalPlusLowRank(jnp.asarray([0.5, 0.1, 0.3]), jnp.asarray(FACTOR))
)
X_T, X_HAT = (RNG.normal(size=(NUM_PARTICLES, NUM_EVENTS, D)) for _ in range(2))
X_HAT_Y = X_HAT + 0.1 * RNG.normal(size=X_HAT.shape)
OPERATORS = {
    "dense": RNG.normal(size=(M, D)),
    "by event": RNG.normal(size=(NUM_EVENTS, M, D)),
    "mask": np.stack([np.diag([1.0, 0.0, 1.0]), np.diag([0.0, 1.0, 0.0])]),
    # More values than elements, of which the second event hides one.
    "tall": RNG.normal(size=(NUM_EVENTS, D + 3, D)) * np.array([[[1, 1, 1]], [[1, 0, 1]]]),
}


def evaluate(guidance, operator, sampler=MultistepSDE(12), index=5, denoiser=DENOISER):
    """Propose from one level; a mask and a structured covariance are solved elementwise."""
    matrix = OPERATORS[operator]
    num_observed = matrix.shape[-2]
    y = np.pad(Y, ((0, 0), (0, num_observed - M)))
    noise = np.pad(NOISE, (0, num_observed - M), constant_values=0.5)
    likelihood = linear_gaussian(
        jnp.asarray(y), jnp.asarray(matrix), Diagonal(jnp.asarray(noise)), (D,)
    )
    likelihood = replace(likelihood, elementwise=operator == "mask")
    posterior = guidance.condition(denoiser, likelihood)
    levels = jax.tree.map(lambda leaf: leaf[index], sampler.levels(denoiser))
    previous = Particles(*(jnp.asarray(x) for x in (X_T, X_HAT, X_HAT_Y)))
    matrices = np.broadcast_to(matrix, (NUM_EVENTS, *matrix.shape[-2:]))
    return propose(posterior, sampler, previous, levels), levels, matrices, y, np.diag(noise)


@pytest.mark.parametrize("denoiser", [DENOISER, LOW_RANK], ids=["full", "low rank"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_looking_ahead_is_the_product_of_two_gaussians(operator, denoiser):
    evaluation, levels, matrices, y, cov_y = evaluate(LOOKING, operator, denoiser=denoiser)
    proposal = evaluation.proposal
    variance, tau = float(levels.following) ** 2, float(proposal.tau)
    prior_cov = np.asarray(denoiser.cov.dense(), float)
    cov = np.linalg.inv(np.linalg.inv(prior_cov) + np.eye(D) / variance)
    x_s = jnp.asarray(RNG.normal(size=X_T.shape))
    ratio = proposal.log_ratio(x_s)
    draws = jax.vmap(proposal.draw)(jax.random.split(jax.random.key(0), 4000))
    missing = {}
    for k in range(NUM_PARTICLES):
        for n in range(NUM_EVENTS):
            a, mean = matrices[n], np.asarray(proposal.mean[k, n], float)
            gain, residual = a @ cov / variance, y[n] - a @ np.asarray(evaluation.x_hat[k, n])
            ahead = cov_y + a @ cov @ a.T
            before = ahead + tau**2 * gain @ gain.T
            chain = tau**2 * np.eye(D)
            expected = multivariate_normal.logpdf(residual, cov=before)
            if len(a) > D:  # the twists of an event lack a common factor
                if k == 0:
                    missing[n] = expected - float(proposal.log_twist[k, n])
                expected -= missing[n]
            np.testing.assert_allclose(
                proposal.log_twist[k, n], expected, rtol=tolerance(1e-4, 1e-5)
            )
            center, spread = gaussian_posterior(mean, chain, gain, ahead, residual + gain @ mean)
            expected = multivariate_normal.logpdf(x_s[k, n], mean, chain)
            expected -= multivariate_normal.logpdf(x_s[k, n], center, spread)
            np.testing.assert_allclose(ratio[k, n], expected, rtol=1e-3, atol=1e-3)
            found = np.asarray(draws[:, k, n])
            deviation = np.sqrt(np.diagonal(spread))
            assert np.all(np.abs(found.mean(0) - center) < 5 * deviation / np.sqrt(4000))
            scaled = (np.cov(found.T) - spread) / np.outer(deviation, deviation)
            assert np.all(np.abs(scaled) < 5 * np.sqrt(2 / 4000))


@pytest.mark.parametrize("guidance", [MMPS(), MMPS(GaussianCovariance()), LOOKING])
@pytest.mark.parametrize("sampler", [MultistepSDE(60), DDPM(60)])
def test_ratio_turns_the_chain_into_the_proposal(sampler, guidance):
    """Over the chain the mean of q / p is one, and weighs it to the proposal's moments."""
    evaluation, *_ = evaluate(guidance, "by event", sampler, index=18)
    proposal, num = evaluation.proposal, 100_000
    noise = RNG.normal(size=(num, *X_T.shape))
    chain = proposal.mean + proposal.tau * noise
    weights = np.exp(-np.asarray(jax.vmap(proposal.log_ratio)(chain), float))
    drawn = np.asarray(jax.vmap(proposal.draw)(jax.random.split(jax.random.key(1), num)))
    drawn = (drawn - np.asarray(proposal.mean)) / float(proposal.tau)
    # Where chain and proposal have little in common, no number of draws would do.
    near = np.abs(drawn.mean(0)).max(-1) < 2
    assert near.sum() >= 1
    for power in (0, 1, 2):
        values = weights[..., None] * noise**power
        found, expected = values.mean(0), (drawn**power).mean(0)
        variance = (values.var(0) + (drawn**power).var(0)) / num
        assert np.all(np.abs(found - expected)[near] < 5 * np.sqrt(variance)[near] + 1e-6)


@pytest.mark.parametrize(
    ("operator", "denoiser"),
    [("dense", DENOISER), ("mask", LOW_RANK)],
    ids=["dense", "elementwise"],
)
@pytest.mark.parametrize("guidance", [MMPS(), MMPS(GaussianCovariance()), LOOKING])
def test_take_follows_the_particles(guidance, operator, denoiser):
    proposal = evaluate(guidance, operator, denoiser=denoiser)[0].proposal
    index = jnp.asarray([[1, 0], [1, 3], [2, 2], [0, 1]])
    taken = proposal.take(index)
    x_s = jnp.asarray(RNG.normal(size=X_T.shape))
    for n in range(NUM_EVENTS):
        np.testing.assert_array_equal(taken.mean[:, n], proposal.mean[index[:, n], n])
        np.testing.assert_array_equal(taken.log_twist[:, n], proposal.log_twist[index[:, n], n])
        # The ratio at the same place is that of the particle taken.
        x_all = jnp.zeros_like(x_s).at[index[:, n], n].set(x_s[index[:, n], n])
        found = taken.log_ratio(x_all.at[:, n].set(x_s[index[:, n], n]))[:, n]
        expected = proposal.log_ratio(x_all)[index[:, n], n]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_more_values_than_elements_are_reduced():
    """Guidance is that of all values, also where a direction is not seen."""
    _, _, matrices, y, cov_y = evaluate(LOOKING, "tall")
    noise = Diagonal(jnp.asarray(np.diagonal(cov_y)))
    likelihood = linear_gaussian(jnp.asarray(y), jnp.asarray(matrices), noise, (D,))
    posterior = MMPS(GaussianCovariance()).condition(DENOISER, likelihood)
    sigma = 0.7
    guided = posterior.guide(jnp.asarray(X_T), jnp.full((), sigma))
    cov = np.linalg.inv(np.linalg.inv(COV) + np.eye(D) / sigma**2)
    for k in range(NUM_PARTICLES):
        for n in range(NUM_EVENTS):
            x_hat = cov @ (np.linalg.solve(COV, MEAN) + X_T[k, n] / sigma**2)
            expected, _ = gaussian_posterior(x_hat, cov, matrices[n], cov_y, y[n])
            np.testing.assert_allclose(guided.x_hat_y[k, n], expected, rtol=1e-3, atol=1e-4)
            before = cov_y + matrices[n] @ cov @ matrices[n].T
            expected = multivariate_normal.logpdf(y[n], matrices[n] @ x_hat, before)
            np.testing.assert_allclose(guided.log_twist[k, n], expected, rtol=1e-3, atol=1e-3)


def test_reduced_values_keep_directions_that_are_seen_less_precisely():
    """By four decades, which single precision has not squared."""
    noise = 1e-6
    a = RNG.normal(size=(D + 3, D)) * np.array([1, 1e-2, 1e-4])
    y = a @ RNG.multivariate_normal(MEAN, COV) + noise * RNG.normal(size=len(a))
    cov_y = Isotropic(jnp.asarray(noise**2), len(a))
    likelihood = linear_gaussian(jnp.asarray(y), jnp.asarray(a), cov_y, (D,))
    posterior = MMPS(GaussianCovariance()).condition(DENOISER, likelihood)
    sigma = 0.7
    guided = posterior.guide(jnp.asarray(X_T[0, 0]), jnp.full((), sigma))
    cov = np.linalg.inv(np.linalg.inv(COV) + np.eye(D) / sigma**2)
    x_hat = cov @ (np.linalg.solve(COV, MEAN) + X_T[0, 0] / sigma**2)
    y, a = np.asarray(likelihood.y, float), np.asarray(jnp.asarray(a), float)
    expected, posterior_cov = gaussian_posterior(x_hat, cov, a, noise**2 * np.eye(len(a)), y)
    # The last direction, which is known to a hundredth.
    error = (np.asarray(guided.x_hat_y, float) - expected)[-1]
    assert abs(error) < 0.2 * np.sqrt(posterior_cov[-1, -1])


def test_weights_stay_equal_on_a_gaussian():
    """Nearly: what is left is the steps' own error. The guided proposal's spread more."""
    likelihood = linear_gaussian(
        jnp.asarray(Y), jnp.asarray(OPERATORS["dense"]), Diagonal(jnp.asarray(NOISE)), (D,)
    )
    ess = []
    for guidance in (LOOKING, MMPS(GaussianCovariance())):
        options = SamplingOptions(16, MultistepSDE(32), guidance)
        draws = draw_posterior(jax.random.key(0), DENOISER, likelihood, options, 100)
        ess.append(float(draws.info.ess.mean()))
    assert ess[0] > 11
    assert ess[0] > ess[1] + 3
