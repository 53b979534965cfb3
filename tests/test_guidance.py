"""Guidance against closed-form posterior denoisers and densely written formulas."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from scipy.stats import multivariate_normal, norm

from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.function import FunctionDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.guidance.covariances import (
    CalibratedCovariance,
    FlatPriorCovariance,
    GaussianCovariance,
    IsotropicPriorCovariance,
    TweedieCovariance,
)
from numpyro_diffprior.guidance.guidance import SolveStats
from numpyro_diffprior.guidance.likelihood import Likelihood, ObservationMoments, linear_gaussian
from numpyro_diffprior.guidance.literature import DPS, TMPD, PiGDM
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.guidance.scheduled import Piecewise, Tempered
from numpyro_diffprior.linalg.covariances import Diagonal, Isotropic
from numpyro_diffprior.nets.mlp import MLP

EVENT, NUM_EVENTS, NUM_OBSERVED = (2, 3), 3, 4
SIGMA = np.array([[0.1], [1.0], [10.0]])  # an axis of noise levels before the plate's
TOL = oracles.tolerance()
RTOL = oracles.tolerance(1e-6, 1e-12)  # of residuals
ATOL = oracles.tolerance(1e-8, 1e-14)  # of conjugate gradients

EXACT = {
    "Tweedie, dense": MMPS(),
    "Tweedie, matrix-free": MMPS(max_dense=0, atol=ATOL, max_steps=12),
    "Gaussian, dense": MMPS(GaussianCovariance()),
    "Calibrated, dense": MMPS(CalibratedCovariance()),
    "Gaussian, matrix-free": MMPS(GaussianCovariance(), max_dense=0, atol=ATOL),
}


@dataclass(frozen=True)
class Problem:
    denoiser: Denoiser
    observed: tuple  # y, matrix and noise, for linear_gaussian
    matrix: np.ndarray
    y: np.ndarray
    cov_y: np.ndarray  # the noise of each event, as a matrix
    x_t: np.ndarray

    @property
    def likelihood(self):
        return linear_gaussian(*map(jnp.asarray, self.observed[:2]), self.observed[2], EVENT)

    @property
    def prior(self):
        return np.asarray(self.denoiser.mean, np.float64).reshape(-1), oracles.dense(
            self.denoiser.cov
        )

    def over(self, function):
        """Apply a dense formula to each noise level and event."""
        mean, cov = self.prior
        return np.asarray(
            [
                [
                    function(
                        mean,
                        cov,
                        self.matrix[i],
                        self.cov_y[i],
                        self.y[i],
                        self.x_t[j, i].reshape(-1),
                        SIGMA[j, 0],
                    )
                    for i in range(NUM_EVENTS)
                ]
                for j in range(len(SIGMA))
            ]
        )

    def flat(self, function):
        return self.over(function).reshape(self.x_t.shape)


def problem(prior="Dense", noise="Isotropic", seed=0, denoiser=None):
    """Make a plate of events, each with its own operator, and its x_t at each noise level."""
    rng = np.random.default_rng(seed)
    if denoiser is None:
        denoiser = GaussianDenoiser(rng.normal(size=EVENT), oracles.covariance(prior, rng, 6))
    matrix = rng.normal(size=(NUM_EVENTS, NUM_OBSERVED, 6)) / np.sqrt(6)
    cov_y = oracles.covariance(noise, rng, NUM_OBSERVED)
    y = rng.normal(size=(NUM_EVENTS, NUM_OBSERVED))
    x_t = np.sqrt(1 + SIGMA[..., None, None] ** 2) * rng.normal(size=(3, NUM_EVENTS, *EVENT))
    stacked = np.broadcast_to(oracles.dense(cov_y), (NUM_EVENTS, NUM_OBSERVED, NUM_OBSERVED))
    return Problem(denoiser, (y, matrix, cov_y), matrix, y, stacked, x_t)


@partial(jax.jit, static_argnums=0)  # compiled once for many tests
def guide(guidance, denoiser, observed, x_t, sigma=SIGMA):
    likelihood = linear_gaussian(*observed, denoiser.event_shape)
    return guidance.condition(denoiser, likelihood).guide(x_t, sigma)


def correction(mean, cov, matrix, cov_y, y, x_t, sigma, cov_x):
    """Return MMPS's mean with any covariance in place of the conditional one."""
    x_hat = oracles.gaussian_denoiser(mean, cov, x_t, sigma)
    jacobian = cov @ np.linalg.inv(cov + sigma**2 * np.eye(6))
    solution = np.linalg.solve(cov_y + matrix @ cov_x @ matrix.T, y - matrix @ x_hat)
    return x_hat + sigma**2 * jacobian.T @ matrix.T @ solution


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(
    ("prior", "noise"), [*zip(oracles.COVARIANCES, np.roll(oracles.COVARIANCES, 2), strict=True)]
)
def test_golden(method, prior, noise):
    """MMPS is the closed form for Gaussian priors and linear observations."""
    case = problem(prior, noise)
    guided = guide(EXACT[method], case.denoiser, case.observed, case.x_t)
    expected = case.flat(oracles.gaussian_posterior_denoiser)
    np.testing.assert_allclose(guided.x_hat_y, expected, atol=TOL * np.abs(expected).max())
    expected = case.flat(lambda m, c, a, n, y, x, s: oracles.gaussian_denoiser(m, c, x, s))
    np.testing.assert_allclose(guided.x_hat, expected, atol=TOL * np.abs(expected).max())
    assert guided.stats.residual.shape == guided.stats.num_truncated.shape == (3, NUM_EVENTS)
    assert np.all(guided.stats.residual < 10 * RTOL)
    assert not np.any(guided.stats.num_truncated)
    if "dense" in method:
        log_twist = case.over(oracles.gaussian_log_twist)
        np.testing.assert_allclose(guided.log_twist, log_twist, atol=30 * TOL)


@pytest.mark.parametrize("method", EXACT)
def test_noise_of_each_event(method):
    case = problem()
    variances = np.random.default_rng(1).uniform(0.2, 2.0, (NUM_EVENTS, NUM_OBSERVED))
    cov_y = np.stack([np.diag(v) for v in variances])
    observed = case.y, case.matrix, Diagonal(variances)
    guided = guide(EXACT[method], case.denoiser, observed, case.x_t)
    case = Problem(case.denoiser, observed, case.matrix, case.y, cov_y, case.x_t)
    expected = case.flat(oracles.gaussian_posterior_denoiser)
    np.testing.assert_allclose(guided.x_hat_y, expected, atol=TOL * np.abs(expected).max())


@pytest.mark.parametrize("method", EXACT)
def test_each_event_is_on_its_own(method):
    """One event of a batch is hard: the others, and itself, get what they would get alone."""
    case = problem("Diagonal")
    matrix = case.matrix * np.array([1.0, 30.0, 0.0])[:, None, None]
    x_t, noise = case.x_t[1], Isotropic(0.5, NUM_OBSERVED)
    together = case.y, matrix, noise
    batch = guide(EXACT[method], case.denoiser, together, x_t, 1.0)
    for i in range(NUM_EVENTS):
        alone = case.y[i], matrix[i], noise
        one = guide(EXACT[method], case.denoiser, alone, x_t[i], 1.0)
        np.testing.assert_allclose(batch.x_hat_y[i], one.x_hat_y, atol=3 * TOL)
        np.testing.assert_allclose(batch.log_twist[i], one.log_twist, rtol=10 * TOL)
    np.testing.assert_array_equal(batch.x_hat_y[2], batch.x_hat[2])


@pytest.mark.parametrize("method", EXACT)
def test_particles(method):
    """Leading axes are particles of each event, at one noise level."""
    case = problem()
    particles = np.random.default_rng(2).normal(size=(2, 5, NUM_EVENTS, *EVENT))
    guided = guide(EXACT[method], case.denoiser, case.observed, particles, 0.7)
    one = guide(EXACT[method], case.denoiser, case.observed, particles[1, 3], 0.7)
    np.testing.assert_allclose(guided.x_hat_y[1, 3], one.x_hat_y, atol=3 * TOL)
    np.testing.assert_allclose(guided.log_twist[1, 3], one.log_twist, atol=30 * TOL)
    assert guided.log_twist.shape == (2, 5, NUM_EVENTS)


@pytest.mark.parametrize("guidance", [MMPS(GaussianCovariance()), PiGDM()])
def test_particles_share_the_factor(guidance):
    case = problem()
    posterior = guidance.condition(case.denoiser, case.likelihood)
    jaxpr = str(jax.make_jaxpr(posterior.guide)(jnp.ones((7, NUM_EVENTS, *EVENT)), 0.7))
    factors = [line for line in jaxpr.splitlines() if "= cholesky" in line]
    shape = f"[{NUM_EVENTS},{NUM_OBSERVED},{NUM_OBSERVED}] = cholesky"
    assert factors
    assert all(shape in line for line in factors)


@pytest.mark.parametrize("method", [*EXACT, "TMPD", "DPS"])
def test_masked_rows_contribute_nothing(method):
    """Hidden values have a zero row, unit noise and a zero in y."""
    case = problem()
    shown = np.array([1, 0, 1, 1])
    variances = np.array([0.3, 1.0, 0.7, 0.5])
    masked = case.y * shown, case.matrix * shown[:, None], Diagonal(variances)
    keep = np.flatnonzero(shown)
    without = case.y[:, keep], case.matrix[:, keep], Diagonal(variances[keep])
    guidance = EXACT.get(method) or {"TMPD": TMPD(), "DPS": DPS()}[method]
    a = guide(guidance, case.denoiser, masked, case.x_t)
    b = guide(guidance, case.denoiser, without, case.x_t)
    np.testing.assert_allclose(a.x_hat_y, b.x_hat_y, atol=10 * TOL)
    # A constant of the hidden value's unit Gaussian, which no weight depends on.
    constant = -0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(a.log_twist, b.log_twist + constant, atol=30 * TOL)


def test_more_values_than_elements():
    """Where A V A^T has not full rank, rounding decides on the signs of eigenvalues."""
    rng = np.random.default_rng(0)
    denoiser = MixtureDenoiser(jnp.full(2, 0.5), jnp.array([[-1.2], [1.2]]), Isotropic(0.25, 1))
    y, matrix, noise = rng.normal(size=(1, 7)), rng.normal(size=(1, 7, 1)), Isotropic(0.5, 7)
    x_t = rng.normal(size=(200, 1, 1))
    guided = guide(MMPS(), denoiser, (jnp.asarray(y), jnp.asarray(matrix), noise), x_t, 0.7)

    def denoise(x):
        return denoiser(x[None], 0.7)[0]

    x_hat = np.asarray(guided.x_hat, np.float64)[:, 0]
    variance = 0.49 * np.asarray(jax.vmap(jax.jacfwd(denoise))(x_t[:, 0]), np.float64)
    for k in range(len(x_t)):
        cov = 0.5 * np.eye(7) + matrix[0] @ variance[k] @ matrix[0].T
        expected = multivariate_normal(matrix[0] @ x_hat[k], cov).logpdf(y[0])
        np.testing.assert_allclose(guided.log_twist[k, 0], expected, rtol=30 * TOL)


def test_nothing_observed():
    case = problem()
    nothing = np.zeros_like(case.y), np.zeros_like(case.matrix), case.observed[2]
    for guidance in (*EXACT.values(), PiGDM(), TMPD(), DPS()):
        with jax.disable_jit():  # compiled twice into one program, x_hat may be rounded twice
            guided = guide(guidance, case.denoiser, nothing, case.x_t)
        np.testing.assert_array_equal(guided.x_hat_y, guided.x_hat)
        assert np.all(guided.stats.residual == 0)


@pytest.mark.parametrize(
    ("guidance", "variance"),
    [
        (MMPS(FlatPriorCovariance()), lambda s2, scale2: s2),
        (MMPS(IsotropicPriorCovariance()), lambda s2, scale2: 1 / (1 / s2 + 1 / scale2)),
        (
            MMPS(IsotropicPriorCovariance(), max_dense=0, atol=ATOL),
            lambda s2, c2: s2 * c2 / (s2 + c2),
        ),
        (PiGDM(), lambda s2, scale2: s2 * scale2 / (s2 + scale2)),
    ],
    ids=["isotropic", "unit", "unit, matrix-free", "PiGDM"],
)
def test_heuristic_covariances(guidance, variance):
    case = problem(noise="Dense")
    guided = guide(guidance, case.denoiser, case.observed, case.x_t)

    def expected(*args):
        return correction(*args, variance(args[-1] ** 2, np.trace(args[1]) / 6) * np.eye(6))

    expected = case.flat(expected)
    np.testing.assert_allclose(guided.x_hat_y, expected, atol=3 * TOL * np.abs(expected).max())


def test_corrections_that_overshoot_are_shortened():
    """With a covariance that is much too small, a correction by the Jacobian goes too far."""
    case = problem()
    small = 0.01 * np.eye(6)
    denoiser = FunctionDenoiser(case.denoiser, case.denoiser.mean, Diagonal(jnp.full(6, 0.01)))
    guided = guide(MMPS(GaussianCovariance()), denoiser, case.observed, case.x_t)
    parts = []

    def expected(mean, cov, matrix, cov_y, y, x_t, sigma):
        cov_x = np.linalg.inv(np.linalg.inv(small) + np.eye(6) / sigma**2)
        x_hat = oracles.gaussian_denoiser(mean, cov, x_t, sigma)
        u = correction(mean, cov, matrix, cov_y, y, x_t, sigma, cov_x) - x_hat
        residual = y - matrix @ x_hat
        v = cov_x @ matrix.T @ np.linalg.solve(cov_y + matrix @ cov_x @ matrix.T, residual)
        precision = matrix.T @ np.linalg.solve(cov_y, matrix)
        gain = v @ matrix.T @ np.linalg.solve(cov_y, residual)
        parts.append(min(1, gain / ((u - v) @ precision @ (u - v))))
        return x_hat + v + parts[-1] * (u - v)

    expected = case.flat(expected)
    assert min(parts) < 0.4
    assert max(parts) == 1
    np.testing.assert_allclose(guided.x_hat_y, expected, atol=3 * TOL * np.abs(expected).max())


def test_tmpd():
    case = problem(noise="Dense")
    guided = guide(TMPD(), case.denoiser, case.observed, case.x_t)

    def expected(mean, cov, matrix, cov_y, y, x_t, sigma):
        x_hat = oracles.gaussian_denoiser(mean, cov, x_t, sigma)
        cov_x = sigma**2 * cov @ np.linalg.inv(cov + sigma**2 * np.eye(6))
        row_sums = np.maximum((matrix @ cov_x @ matrix.T).sum(axis=1), 0)
        return x_hat + cov_x @ matrix.T @ ((y - matrix @ x_hat) / (np.diag(cov_y) + row_sums))

    np.testing.assert_allclose(guided.x_hat_y, case.flat(expected), atol=10 * TOL)


def test_dps():
    case = problem()
    guided = guide(DPS(strength=0.3), case.denoiser, case.observed, case.x_t)
    x_hat = case.denoiser(jnp.asarray(case.x_t), SIGMA)

    def distance(x_t):
        flat = case.denoiser(x_t, SIGMA).reshape(3, NUM_EVENTS, 6)
        residual = case.likelihood.y - jnp.einsum("imd,jid->jim", case.matrix, flat)
        return jnp.sum(jnp.linalg.norm(residual, axis=-1))

    step = 0.3 * case.denoiser.scale * jax.grad(distance)(jnp.asarray(case.x_t))
    np.testing.assert_allclose(guided.x_hat_y, x_hat - step, atol=10 * TOL)
    at_x_hat = [
        [
            oracles.multivariate_normal.logpdf(case.y[i], case.matrix[i] @ x, case.cov_y[i])
            for i, x in enumerate(np.asarray(x_hat).reshape(3, NUM_EVENTS, 6)[j])
        ]
        for j in range(3)
    ]
    np.testing.assert_allclose(guided.log_twist, at_x_hat, rtol=30 * TOL)


@pytest.mark.parametrize("method", EXACT)
def test_nonlinear_mean_is_linearized(method):
    case = problem()

    y = case.likelihood.y

    def read(x):
        flat = x.reshape(*x.shape[:-2], 6)
        y_hat = jnp.tanh(jnp.einsum("imd,...id->...im", case.matrix, flat))
        return ObservationMoments(y_hat, Diagonal(0.2 + y_hat**2), y)

    def log_prob(x):
        y_hat, noise, *_ = read(x)
        return jax.scipy.stats.norm.logpdf(y, y_hat, jnp.sqrt(noise.variances)).sum(-1)

    likelihood = Likelihood(y, read, log_prob, EVENT)
    once = replace(EXACT[method], num_iterations=1)
    posterior = once.condition(case.denoiser, likelihood)
    guided = jax.jit(posterior.guide)(jnp.asarray(case.x_t), SIGMA)

    def search(mean, cov, matrix, cov_y, y, x_t, sigma):
        """The step as long as makes the joint density largest, and that density."""
        x_hat = oracles.gaussian_denoiser(mean, cov, x_t, sigma)
        y_hat = np.tanh(matrix @ x_hat)
        slope = (1 - y_hat**2)[:, None] * matrix
        cov_x = sigma**2 * cov @ np.linalg.inv(cov + sigma**2 * np.eye(6))
        gain = slope @ cov_x @ slope.T + np.diag(0.2 + y_hat**2)
        step = cov_x @ slope.T @ np.linalg.solve(gain, y - y_hat)

        def log_joint(length):
            at = np.tanh(matrix @ (x_hat + length * step))
            log_prior = -0.5 * length**2 * step @ np.linalg.solve(cov_x, step)
            return norm.logpdf(y, at, np.sqrt(0.2 + at**2)).sum() + log_prior

        length = max(0.5 ** np.arange(8), key=log_joint)
        logdet = np.linalg.slogdet(gain)[1] - np.log(0.2 + y_hat**2).sum()
        return np.append(x_hat + length * step, log_joint(length) - logdet / 2)

    expected = case.over(search)
    found = guided.x_hat_y.reshape(3, NUM_EVENTS, 6)
    np.testing.assert_allclose(found, expected[..., :6], atol=20 * TOL)
    if "matrix-free" not in method:
        np.testing.assert_allclose(guided.log_twist, expected[..., 6], rtol=50 * TOL)


@pytest.mark.parametrize("method", ["Tweedie, dense", "Gaussian, dense", "Gaussian, matrix-free"])
def test_gauss_newton_finds_the_mode(method):
    """At the mode b is the gradient of the log-likelihood, and guidance is sigma^2 J^T b."""
    case = problem()
    y = 2 + case.likelihood.y

    def read(x):
        rate = jnp.exp(jnp.einsum("imd,...id->...im", case.matrix, x.reshape(*x.shape[:-2], 6)))
        return ObservationMoments(rate, Diagonal(rate), y)

    def log_prob(x):
        rate = read(x).y_hat
        return (y * jnp.log(rate) - rate).sum(-1)

    likelihood = Likelihood(y, read, log_prob, EVENT)
    guidance = replace(EXACT[method], num_iterations=20)
    guided = guidance.condition(case.denoiser, likelihood).guide(jnp.asarray(case.x_t[1]), 1.0)
    gradient = jax.grad(lambda x: log_prob(x).sum())(guided.x_hat_y).reshape(NUM_EVENTS, 6)
    cov = case.prior[1]
    cov_x = cov @ np.linalg.inv(cov + np.eye(6))
    shift = (guided.x_hat_y - guided.x_hat).reshape(NUM_EVENTS, 6)
    np.testing.assert_allclose(shift, gradient @ cov_x, atol=oracles.tolerance(1e-3, 1e-6))


@pytest.mark.parametrize("covariance", [TweedieCovariance(), GaussianCovariance()])
def test_residual_is_reported(covariance):
    case = problem()
    budget = MMPS(covariance, max_dense=0, max_steps=1)
    residual = guide(budget, case.denoiser, case.observed, case.x_t).stats.residual
    # One step of conjugate gradients goes along the score.
    mean, cov = case.prior
    sigma, matrix, cov_y = SIGMA[1, 0], case.matrix[2], case.cov_y[2]
    x_t = case.x_t[1, 2].reshape(-1)
    r = case.y[2] - matrix @ oracles.gaussian_denoiser(mean, cov, x_t, sigma)
    cov_x = sigma**2 * cov @ np.linalg.inv(cov + sigma**2 * np.eye(6))
    score = matrix.T @ np.linalg.solve(cov_y, r)
    moved = score + matrix.T @ np.linalg.solve(cov_y, matrix @ cov_x @ score)
    error = score - score @ cov_x @ score / (score @ cov_x @ moved) * moved
    expected = np.linalg.norm(error) / np.linalg.norm(score)
    assert expected > 1e-2
    np.testing.assert_allclose(residual[1, 2], expected, rtol=100 * TOL)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LinearDenoiser(Denoiser):
    """Like a network's, its Jacobian is neither symmetric nor positive."""

    weight: jax.Array
    mean: jax.Array
    cov: Isotropic

    def __call__(self, x_t, sigma):
        return (x_t.reshape(*x_t.shape[:-2], 6) @ self.weight.T).reshape(x_t.shape)


def test_learned_jacobian_is_truncated():
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(6, 6))
    denoiser = LinearDenoiser(jnp.asarray(weight), jnp.zeros(EVENT), Isotropic(1.0, 6))
    case = problem(denoiser=denoiser)
    guided = guide(MMPS(), denoiser, case.observed, case.x_t)
    variance = case.cov_y[0, 0, 0]
    num_truncated = []

    def expected(mean, cov, matrix, cov_y, y, x_t, sigma):
        x_hat = weight @ x_t
        gain = matrix @ (sigma**2 * weight) @ matrix.T
        values, vectors = np.linalg.eigh((gain + gain.T) / 2)
        keep = values > 0
        num_truncated.append((~keep).sum())
        kept = vectors[:, keep]
        solution = kept @ (kept.T @ (y - matrix @ x_hat) / (variance + values[keep]))
        return x_hat + sigma**2 * weight.T @ matrix.T @ solution

    expected = case.flat(expected)
    assert 0 < np.sum(num_truncated) < 3 * NUM_EVENTS * NUM_OBSERVED
    np.testing.assert_array_equal(guided.stats.num_truncated.reshape(-1), num_truncated)
    np.testing.assert_allclose(guided.x_hat_y, expected, atol=100 * TOL * np.abs(expected).max())
    iterated = guide(MMPS(max_dense=0, max_steps=12), denoiser, case.observed, case.x_t)
    for leaf in jax.tree.leaves((guided, iterated)):
        assert np.all(np.isfinite(leaf))


def test_nearly_symmetric_jacobian_needs_no_matrix():
    rng = np.random.default_rng(4)
    weight = 0.3 * oracles.spd(rng, 6) + 1e-3 * rng.normal(size=(6, 6))
    denoiser = LinearDenoiser(jnp.asarray(weight), jnp.zeros(EVENT), Isotropic(1.0, 6))
    case = problem(denoiser=denoiser)
    guided = guide(MMPS(), denoiser, case.observed, case.x_t)
    iterated = guide(MMPS(max_dense=0, max_steps=12, atol=0.05), denoiser, case.observed, case.x_t)
    np.testing.assert_allclose(iterated.x_hat_y, guided.x_hat_y, atol=0.02)


@pytest.mark.parametrize("sigma", [1e-4, 1.0])
def test_twists_without_a_matrix_differ_by_a_constant(sigma):
    """Also where all but one direction of the observed values have no gain, or next to none."""
    rng = np.random.default_rng(6)
    denoiser = GaussianDenoiser(jnp.zeros(EVENT), oracles.covariance("Dense", rng, 6))
    matrix = np.broadcast_to(rng.normal(size=6), (NUM_OBSERVED, 6))
    noise = oracles.covariance("Dense", rng, NUM_OBSERVED)
    observed = rng.normal(size=NUM_OBSERVED), matrix, noise
    x_t = 3 * rng.normal(size=(8, *EVENT))  # particles
    sigmas = np.full(8, sigma)
    dense = guide(MMPS(), denoiser, observed, x_t, sigmas)
    iterated = guide(MMPS(max_dense=0, atol=ATOL, max_steps=12), denoiser, observed, x_t, sigmas)
    differences = iterated.log_twist - dense.log_twist
    assert np.ptp(dense.log_twist) > 1
    np.testing.assert_allclose(differences, differences.mean(), atol=100 * TOL)


@pytest.mark.parametrize("prior", oracles.COVARIANCES)
def test_diagonal_operator_needs_no_products(prior):
    """Masks and gains of each value take another way than the matrices that they are."""
    rng = np.random.default_rng(5)
    denoiser = GaussianDenoiser(rng.normal(size=EVENT), oracles.covariance(prior, rng, 6))
    y, gains = rng.normal(size=(2, NUM_EVENTS, 6)) * np.array([1, 0, 1, 1, 0, 1])
    x_t = rng.normal(size=(NUM_EVENTS, *EVENT))
    mean, cov = np.asarray(denoiser.mean).reshape(-1), oracles.dense(denoiser.cov)
    for angle in (0.0, 0.1):
        matrix = np.stack([np.diag(g) for g in gains])
        matrix[:, 0, 5] = angle
        observed = y, matrix, Isotropic(0.5, 6)
        guided = guide(MMPS(GaussianCovariance()), denoiser, observed, x_t, 0.8)
        for i in range(NUM_EVENTS):
            expected = oracles.gaussian_posterior_denoiser(
                mean, cov, matrix[i], 0.5 * np.eye(6), y[i], x_t[i].reshape(-1), 0.8
            )
            np.testing.assert_allclose(guided.x_hat_y[i].reshape(-1), expected, atol=3 * TOL)


def test_nearly_singular_system_stays_finite():
    """Smooth priors and low noise, beyond the edge of the floating type."""
    grid = np.linspace(0, 1, 128)
    smooth = np.exp(-0.5 * (grid[:, None] - grid) ** 2 / 0.1**2)
    denoiser = GaussianDenoiser(jnp.zeros(128), smooth)
    noise = Isotropic(oracles.tolerance(1e-4, 1e-9) ** 2, 128)
    observed = np.sin(6 * grid), np.eye(128), noise
    x_t = jnp.asarray(np.cos(9 * grid))
    for sigma in (0.01, 1.0, 100.0):
        guided = guide(MMPS(GaussianCovariance()), denoiser, observed, x_t, sigma)
        for leaf in guided:
            assert np.all(np.isfinite(leaf))
        assert guided.stats.residual < 1e-2  # of the jitter, where there had to be one
        distance = np.abs(guided.x_hat_y - observed[0]).max()
        assert distance < (0.5 if sigma < 0.1 else 0.01)


def test_piecewise_is_one_guidance_above_and_the_other_below():
    case = problem()
    high, low = MMPS(GaussianCovariance()), TMPD()
    guidance = Piecewise(high, low, threshold=0.5)
    scale = float(case.denoiser.scale)
    for factor, part in ((0.51, high), (0.49, low)):
        arguments = case.denoiser, case.observed, case.x_t[1], factor * scale
        found, expected = guide(guidance, *arguments), guide(part, *arguments)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=10 * TOL, atol=10 * TOL)
    with pytest.raises(ValueError, match="expected one noise level, got levels of shape"):
        guide(guidance, case.denoiser, case.observed, case.x_t)


def test_tempered_twists_are_flat_where_noise_is_high():
    case = problem()
    scale = float(case.denoiser.scale)
    for sigma, power in ((1e4 * scale, 0.2), (scale, 0.6), (1e-4 * scale, 1.0)):
        arguments = case.denoiser, case.observed, case.x_t[1], sigma
        found = guide(Tempered(MMPS(GaussianCovariance()), 0.2), *arguments)
        expected = guide(MMPS(GaussianCovariance()), *arguments)
        np.testing.assert_allclose(found.log_twist, power * expected.log_twist, rtol=1e-3)
        np.testing.assert_array_equal(found.x_hat_y, expected.x_hat_y)


def test_event_shapes_must_agree():
    case = problem()
    other = GaussianDenoiser(jnp.zeros(6), jnp.eye(6))
    for guidance in (MMPS(), PiGDM(), TMPD(), DPS()):
        with pytest.raises(
            ValueError, match=r"events have shape \(6,\), the likelihood's \(2, 3\)"
        ):
            guidance.condition(other, case.likelihood)


def test_guided_denoiser_is_a_denoiser():
    case = problem()
    posterior = DPS().condition(case.denoiser, case.likelihood)
    assert posterior.event_shape == EVENT
    assert posterior.dtype == case.denoiser.dtype
    assert posterior.sigma_max == case.denoiser.sigma_max
    x_t = jnp.asarray(case.x_t[1])
    x_hat_y = posterior(x_t, 1.0)
    np.testing.assert_array_equal(x_hat_y, posterior.guide(x_t, 1.0).x_hat_y)
    np.testing.assert_allclose(posterior.score(x_t, 1.0), x_hat_y - x_t, atol=TOL)


def test_calibrated_covariance_is_the_gaussian_one_times_the_measured_error():
    net = MLP((3,), features=(8,), embedding=4, rngs=nnx.Rngs(0))
    cov = Diagonal(jnp.array([1.0, 0.5, 2.0]))
    denoiser = NetworkDenoiser(net, jnp.zeros(3), cov, error_ratios=jnp.array([1.0, 0.2, 0.6]))
    middle = jnp.sqrt(denoiser.sigma_min * denoiser.sigma_max)
    quarter = jnp.sqrt(denoiser.sigma_min * middle)
    far = 10 * denoiser.sigma_max
    for sigma, ratio in ((middle, 0.2), (quarter, 0.6), (far, 0.6), (denoiser.sigma_min, 1.0)):
        expected = ratio * GaussianCovariance().closed_form(denoiser, sigma).dense()
        found = CalibratedCovariance().closed_form(denoiser, sigma).dense()
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    # A level for each event, as guidance passes them.
    sigmas = jnp.stack([middle, far])[:, None]
    found = CalibratedCovariance().closed_form(denoiser, sigmas)
    for i in range(2):
        alone = CalibratedCovariance().closed_form(denoiser, sigmas[i, 0])
        np.testing.assert_allclose(
            found.matvec(jnp.ones((2, 5, 3)))[i, 0], alone.matvec(jnp.ones(3)), rtol=1e-4
        )


@pytest.mark.parametrize("covariance", [TweedieCovariance(), GaussianCovariance()])
def test_steps_of_the_solver_are_counted(covariance):
    case = problem()
    for max_steps in (1, 2):
        budget = MMPS(covariance, atol=1e-12, max_dense=0, max_steps=max_steps)
        stats = guide(budget, case.denoiser, case.observed, case.x_t).stats
        np.testing.assert_array_equal(stats.num_steps, np.full((3, NUM_EVENTS), max_steps))
    stats = guide(MMPS(covariance), case.denoiser, case.observed, case.x_t).stats
    assert not np.any(stats.num_steps)


def test_statistics_of_several_solves():
    first = SolveStats(jnp.array([0.1, 0.3]), jnp.array([2, 1]), jnp.array([3.0, 4.0]))
    later = SolveStats(jnp.array([0.2, 0.1]), jnp.array([0, 5]), jnp.array([1.0, 2.0]))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, later)
    expected = SolveStats(np.array([0.2, 0.3]), np.array([2, 5]), np.array([4.0, 6.0]))
    for stats in (first.then(later), both.over_path()):
        jax.tree.map(np.testing.assert_allclose, stats, expected)
    np.testing.assert_allclose(both.over_particles().num_steps, [2.0, 3.0])
