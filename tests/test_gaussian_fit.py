"""Each iteration against explicit formulas in NumPy; evidence, closed forms, invariances."""

import itertools
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import covariance, dense, gaussian_posterior, spd, tolerance
from scipy.stats import multivariate_normal

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.em import gaussian
from numpyro_diffprior.em.gaussian import fit_gaussian
from numpyro_diffprior.em.restoration import draw_linear_gaussian, restore_linear_gaussian
from numpyro_diffprior.guidance.likelihood import Likelihood, ObservationMoments, linear_gaussian
from numpyro_diffprior.linalg.covariances import (
    Blocks,
    Covariance,
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Isotropic,
)
from numpyro_diffprior.linalg.shrinkage import shrink_correlations

NUM = 23  # blocks of 8 do not divide it
FORMS = {"full": {}, "factors": {"max_dense": 0, "rank": 2}}
forms = pytest.mark.parametrize("form", FORMS)


class Problem(NamedTuple):
    """Observations as arrays with a leading axis of events, and how the package reads them."""

    matrix: np.ndarray
    offset: np.ndarray
    noise: np.ndarray
    y: np.ndarray
    seen: np.ndarray
    cov: Covariance  # the noise's, with a leading axis of events
    event_shape: tuple[int, ...] = (5,)
    axes: tuple[int, ...] = ()

    def read(self, index):
        matrix, offset, y = (
            jnp.expand_dims(jnp.asarray(a)[index], tuple(range(1, 1 + len(self.axes))))
            for a in (self.matrix, self.offset, self.y)
        )
        noise = jax.tree.map(
            lambda a: jnp.expand_dims(a[index], tuple(range(1, 1 + len(self.axes)))), self.cov
        )

        def read(x):
            flat = x.reshape(*x.shape[: x.ndim - len(self.event_shape)], -1)
            return ObservationMoments(
                jnp.einsum("...md,...d->...m", matrix, flat) + offset, noise, y
            )

        elementwise = isinstance(self.cov, Diagonal) and np.all((self.matrix != 0).sum(-1) <= 1)
        return Likelihood(
            y, read, lambda x: x, self.event_shape, elementwise=bool(elementwise), linear=True
        )

    def fit(self, **options):
        options = {"batch_size": 8, "num_iterations": 3} | options
        return fit_gaussian(self.read, len(self.y), event_shape=self.event_shape, **options)


def truth(size):
    """Return a mean and a covariance with strong correlations and a scale of about two."""
    return np.linspace(-1, 2, size), spd(np.random.default_rng(size), size, 0.1, 8.0)


def draw(rng, matrix, offset, noise, num=NUM):
    """Observe draws from the truth."""
    size = matrix.shape[-1]
    mean, cov = truth(size)
    x = mean + rng.normal(size=(num, size)) @ np.linalg.cholesky(cov).T
    y = np.einsum("nmd,nd->nm", matrix, x) + offset
    return y + np.einsum("nij,nj->ni", np.linalg.cholesky(noise), rng.normal(size=y.shape))


def diag(variances):
    return variances[..., None] * np.eye(variances.shape[-1])


def general(m):
    rng = np.random.default_rng(m)
    matrix, offset = rng.normal(size=(NUM, m, 5)), rng.normal(size=(NUM, m))
    noise = np.stack([spd(rng, m, 0.05, 0.3) for _ in range(NUM)])
    y = draw(rng, matrix, offset, noise)
    cov = Dense.from_matrix(jnp.asarray(noise))
    return Problem(matrix, offset, noise, y, np.ones(y.shape, bool), cov)


def two_sites():
    problem = general(4)
    variances = np.random.default_rng(0).uniform(0.01, 0.1, (NUM, 2))
    noise = problem.noise.copy()
    noise[:, :2, 2:] = noise[:, 2:, :2] = 0
    noise[:, 2:, 2:] = diag(variances)
    blocks = Dense.from_matrix(jnp.asarray(noise[:, :2, :2])), Diagonal(jnp.asarray(variances))
    return problem._replace(noise=noise, cov=Blocks(blocks), axes=(1,))


def masked():
    """Hide entries of images, of which one pixel is never seen."""
    rng = np.random.default_rng(0)
    seen = rng.uniform(size=(NUM, 6)) < 0.6
    seen[:, 4] = False
    matrix = diag(np.where(seen, rng.uniform(0.5, 2.0, (NUM, 6)), 0))
    offset = np.where(seen, rng.normal(size=(NUM, 6)), 0)
    variances = np.where(seen, rng.uniform(0.01, 0.1, (NUM, 6)), 1)
    y = np.where(seen, draw(rng, matrix, offset, diag(variances)), 0)
    cov = Diagonal(jnp.asarray(variances))
    return Problem(matrix, offset, diag(variances), y, seen, cov, (2, 3))


def subsampled():
    """See some pixels, in any order, and one of them twice."""
    rng = np.random.default_rng(1)
    pixels = np.stack([rng.permutation(6)[:4] for _ in range(NUM)])
    pixels = np.concatenate([pixels, pixels[:, :1]], axis=1)
    matrix = rng.uniform(0.5, 2.0, (NUM, 5, 1)) * np.eye(6)[pixels]
    offset, variances = rng.normal(size=(NUM, 5)), rng.uniform(0.01, 0.1, (NUM, 5))
    y = draw(rng, matrix, offset, diag(variances))
    cov = Diagonal(jnp.asarray(variances))
    return Problem(matrix, offset, diag(variances), y, np.ones(y.shape, bool), cov, (2, 3))


def masked_general():
    """Hide entries of mixtures: the operator is not diagonal."""
    problem, seen = general(5), np.random.default_rng(1).uniform(size=(NUM, 5)) < 0.7
    variances = np.where(seen, 0.05, 1)
    return problem._replace(
        matrix=np.where(seen[..., None], problem.matrix, 0),
        offset=np.where(seen, problem.offset, 0),
        noise=diag(variances),
        y=np.where(seen, problem.y, 0),
        seen=seen,
        cov=Diagonal(jnp.asarray(variances)),
    )


def manifold(num=NUM):
    """See two directions of five, with noise far below the signal."""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(num, 2, 5))
    matrix /= np.linalg.norm(matrix, axis=-1, keepdims=True)
    noise = np.broadcast_to(1e-4 * np.eye(2), (num, 2, 2))
    y = draw(rng, matrix, 0, noise, num)
    cov = Isotropic(jnp.full(num, 1e-4), 2)
    return Problem(matrix, np.zeros(y.shape), noise, y, np.ones(y.shape, bool), cov)


PROBLEMS = {
    "few": general(2),
    "as many": general(5),
    "more": general(8),
    "two sites": two_sites(),
    "masked": masked(),
    "subsampled": subsampled(),
    "masked mixtures": masked_general(),
    "manifold": manifold(),
}


@cache
def fit(name, form, **options):
    """Fit once what several tests look at: most of the time goes into compilation."""
    return PROBLEMS[name].fit(**FORMS[form], **options)


def full_step(problem, mean, cov):
    """Return the mean and covariance that maximize the expected log-density of the events."""
    posteriors = [
        gaussian_posterior(mean, cov, a, n, y - b)
        for a, b, n, y in zip(problem.matrix, problem.offset, problem.noise, problem.y)
    ]
    means, covs = map(np.stack, zip(*posteriors))
    return means.mean(0), covs.mean(0) + np.cov(means.T, bias=True)


def factor_step(problem, mean, variances, factor):
    """Return the same for x = mean + F z + e, with the factors' covariance free."""
    size, rank = factor.shape
    joint = np.eye(size + rank)
    joint[:size, :size] = np.diag(variances) + factor @ factor.T
    joint[:size, size:], joint[size:, :size] = factor, factor.T
    first, second = np.zeros(size + rank), np.zeros(joint.shape)
    for a, b, n, y in zip(problem.matrix, problem.offset, problem.noise, problem.y):
        operator = np.concatenate([a, np.zeros((len(a), rank))], axis=1)
        center = np.concatenate([mean, np.zeros(rank)])
        m, c = gaussian_posterior(center, joint, operator, n, y - b)
        first += m / len(problem.y)
        second += (c + np.outer(m, m)) / len(problem.y)
    second -= np.outer(first, first)
    cov_x, cov_xz, cov_z = second[:size, :size], second[:size, size:], second[size:, size:]
    slope = np.linalg.solve(cov_z, cov_xz.T).T
    explained = slope @ cov_z @ slope.T
    return first[:size], explained + np.diag(np.diag(cov_x - explained))


def log_evidence(problem, mean, cov):
    """Return the log-density of the values that were seen."""
    total = 0.0
    for a, b, n, y, seen in zip(*problem[:5]):
        if seen.any():
            marginal = (a @ cov @ a.T + n)[np.ix_(seen, seen)]
            total += multivariate_normal.logpdf(y[seen], (a @ mean + b)[seen], marginal)
    return total


def assert_same(actual, desired, tol):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tol * np.abs(desired).max())


def white(problem):
    """Return operators and residuals of what was seen, in units of the noise."""
    for a, b, n, y, seen in zip(*problem[:5]):
        chol = np.linalg.cholesky(n[np.ix_(seen, seen)])
        yield np.linalg.solve(chol, a[seen]), np.linalg.solve(chol, (y - b)[seen])


def initial_mean(problem):
    """Return the one event that explains all that was seen best, and is the shortest to do so."""
    operators, residuals = map(np.concatenate, zip(*white(problem)))
    return np.linalg.lstsq(operators, residuals)[0]


def initial_variance(problem):
    """Return the variance of isotropic events that explains the mean square of the rest."""
    mean, signal, gain = initial_mean(problem), 0.0, 0.0
    for operator, residual in white(problem):
        residual = residual - operator @ mean
        # Of more values than elements, what no event explains is left out.
        projection = np.eye(len(operator))
        if len(operator) > operator.shape[1]:
            projection = operator @ np.linalg.pinv(operator)
        signal += residual @ projection @ residual - np.trace(projection)
        gain += np.square(operator).sum()
    return signal / gain


@pytest.mark.parametrize("name", PROBLEMS)
def test_full_covariance_agrees_with_explicit_formulas(name):
    problem, found = PROBLEMS[name], fit(name, "full")
    size = np.prod(problem.event_shape)
    mean, cov = initial_mean(problem), initial_variance(problem) * np.eye(size)
    evidence = []
    for _ in range(3):
        evidence.append(log_evidence(problem, mean, cov))
        mean, cov = full_step(problem, mean, cov)
    assert found.mean.shape == problem.event_shape
    assert found.mean.dtype == jnp.zeros(()).dtype
    assert isinstance(found.cov, Dense)
    assert_same(found.mean.ravel(), mean, tolerance(1e-4, 1e-10))
    assert_same(dense(found.cov), cov, tolerance(1e-4, 1e-10))
    np.testing.assert_allclose(found.log_evidence, evidence, rtol=tolerance(1e-4, 1e-10))


@pytest.mark.parametrize("name", ["more", "masked", "subsampled", "masked mixtures", "manifold"])
def test_iteration_for_factors_agrees_with_explicit_formulas(name):
    problem, before = PROBLEMS[name], fit(name, "factors")
    after = problem.fit(num_iterations=4, **FORMS["factors"])
    assert isinstance(before.cov, DiagonalPlusLowRank)
    mean = np.asarray(before.mean, np.float64).ravel()
    parts = np.asarray(before.cov.diag, np.float64), np.asarray(before.cov.factor, np.float64)
    desired_mean, desired_cov = factor_step(problem, mean, *parts)
    assert_same(after.mean.ravel(), desired_mean, tolerance(1e-4, 1e-10))
    assert_same(dense(after.cov), desired_cov, tolerance(1e-4, 1e-10))
    evidence = log_evidence(problem, mean, dense(before.cov))
    np.testing.assert_allclose(after.log_evidence[-1], evidence, rtol=tolerance(1e-4, 1e-10))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("manifold", "full"),
        ("masked mixtures", "full"),
        ("masked", "factors"),
        ("masked mixtures", "factors"),
    ],
)
def test_evidence_never_falls(name, form):
    evidence = np.asarray(fit(name, form, num_iterations=60).log_evidence)
    assert np.diff(evidence).min() >= -tolerance(1e-5, 1e-11) * np.abs(evidence).max()
    assert evidence[-1] > evidence[0]


def test_complete_observations_have_a_closed_form():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(500, 4)) @ np.linalg.cholesky(spd(rng, 4)).T + 3
    noise, matrix = Isotropic(jnp.asarray(0.1), 4), jnp.eye(4)

    def read(index):
        return linear_gaussian(jnp.asarray(y)[index], matrix, noise, (4,))

    found = fit_gaussian(read, 500, event_shape=(4,), num_iterations=200)
    np.testing.assert_allclose(found.mean, y.mean(0), atol=tolerance(1e-4, 1e-10))
    expected = np.cov(y.T, bias=True) - 0.1 * np.eye(4)
    np.testing.assert_allclose(dense(found.cov), expected, atol=tolerance(1e-4, 1e-10))


def test_truth_is_recovered_from_two_directions_of_five():
    num = 4096
    problem, (mean, cov) = manifold(num), truth(5)
    result = problem.fit(batch_size=1024, num_iterations=100)
    found = np.asarray(result.mean, np.float64), dense(result.cov)
    assert log_evidence(problem, *found) > log_evidence(problem, mean, cov)
    # An event shows 2/5 of a mean and, of a covariance's 15 numbers, 3.
    largest = np.linalg.eigvalsh(cov).max()
    np.testing.assert_allclose(found[0], mean, atol=5 * np.sqrt(largest / (num * 2 / 5)))
    np.testing.assert_allclose(found[1], cov, atol=5 * largest * np.sqrt(2 / (num * 3 / 15)))


def test_factors_are_recovered():
    rng = np.random.default_rng(0)
    num, size = 2000, 12
    factor, variances = rng.normal(size=(size, 2)), rng.uniform(0.1, 0.3, size)
    x = rng.normal(size=(num, 2)) @ factor.T + np.sqrt(variances) * rng.normal(size=(num, size))
    seen = rng.uniform(size=x.shape) < 0.5
    y = np.where(seen, x + 0.1 * rng.normal(size=x.shape), 0)
    noise = np.where(seen, 0.01, 1)
    problem = Problem(
        diag(1.0 * seen), 0 * y, diag(noise), y, seen, Diagonal(jnp.asarray(noise)), (size,)
    )
    found = problem.fit(batch_size=500, num_iterations=60, max_dense=0, rank=2)
    cov = np.diag(variances) + factor @ factor.T
    # A covariance shows where both elements do: in a quarter of the events.
    error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / (num / 4))
    assert (np.abs(dense(found.cov) - cov) < 5 * error).all()
    assert (np.abs(found.mean) < 5 * np.sqrt(np.diag(cov) / (num / 2))).all()


@pytest.mark.parametrize(
    ("name", "form", "batch_size"),
    [("masked", "full", 1), ("masked", "factors", NUM), ("more", "full", 1000)],
)
def test_batch_size_does_not_matter(name, form, batch_size):
    a, b = fit(name, form), fit(name, form, batch_size=batch_size)
    assert_same(a.mean, b.mean, tolerance(1e-4, 1e-10))
    assert_same(dense(a.cov), dense(b.cov), tolerance(1e-4, 1e-10))
    assert_same(a.log_evidence, b.log_evidence, tolerance(1e-5, 1e-11))


def test_distance_from_zero_does_not_matter():
    problem, far = PROBLEMS["few"], np.full(5, 3e3)
    moved = problem._replace(y=problem.y + problem.matrix @ far)
    a, b = problem.fit(**FORMS["full"]), moved.fit(**FORMS["full"])
    assert_same(b.mean - far, a.mean, tolerance(1e-2, 1e-8))
    assert_same(dense(b.cov), dense(a.cov), tolerance(1e-2, 1e-8))


@pytest.mark.parametrize(("name", "form"), [("two sites", "full"), ("masked", "factors")])
def test_units_do_not_matter(name, form):
    problem = PROBLEMS[name]
    scaled = problem._replace(
        y=1e3 * problem.y, offset=1e3 * problem.offset, cov=problem.cov.scale(jnp.full(NUM, 1e6))
    )
    a, b = fit(name, form), scaled.fit(**FORMS[form])
    assert_same(b.mean / 1e3, a.mean, tolerance(1e-4, 1e-10))
    assert_same(dense(b.cov) / 1e6, dense(a.cov), tolerance(1e-4, 1e-10))


@forms
def test_values_of_hidden_entries_do_not_matter(form):
    problem = PROBLEMS["masked"]
    variances = jnp.where(problem.seen, problem.cov.diagonal(), 0.3)
    other = problem._replace(y=np.where(problem.seen, problem.y, 99), cov=Diagonal(variances))
    a, b = fit("masked", form), other.fit(**FORMS[form])
    assert_same(a.mean, b.mean, tolerance(1e-5, 1e-12))
    assert_same(dense(a.cov), dense(b.cov), tolerance(1e-5, 1e-12))
    assert_same(a.log_evidence, b.log_evidence, tolerance(1e-5, 1e-12))


def test_element_never_seen_keeps_its_variance_and_no_correlation():
    found, problem = fit("masked", "full"), PROBLEMS["masked"]
    expected = np.where(np.arange(6) == 4, initial_variance(problem), 0)
    assert abs(found.mean[1, 1]) < tolerance(1e-5, 1e-12)
    np.testing.assert_allclose(dense(found.cov)[4], expected, atol=tolerance(1e-5, 1e-12))


@pytest.mark.skipif(not jax.config.jax_enable_x64, reason="there is only one type")
@forms
def test_dtype_is_as_asked(form):
    found = PROBLEMS["masked"].fit(dtype=jnp.float32, **FORMS[form])
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def test_nonlinear_likelihood_is_refused():
    def read(index):
        noise = Isotropic(jnp.asarray(1.0), 3)
        y = jnp.zeros((index.size, 3))
        return Likelihood(
            y, lambda x: ObservationMoments(x**2, noise, y), lambda x: x, (3,), linear=False
        )

    with pytest.raises(ValueError, match="got a non-linear likelihood; give the prior"):
        fit_gaussian(read, 4, event_shape=(3,))


@pytest.mark.parametrize("name", ["num_iterations", "batch_size", "rank"])
def test_options_are_positive(name):
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
        PROBLEMS["few"].fit(**{name: 0})


def test_events_are_needed():
    with pytest.raises(ValueError, match="expected num_events >= 1, got 0"):
        fit_gaussian(PROBLEMS["few"].read, 0, event_shape=(5,))


def test_likelihood_must_be_of_the_events_asked_for():
    problem = PROBLEMS["few"]
    with pytest.raises(ValueError, match=r"8 events of shape \(5,\), got batch shape \(3,\)"):
        fit_gaussian(lambda index: problem.read(index[:3]), NUM, event_shape=(5,), batch_size=8)
    with pytest.raises(ValueError, match=r"shape \(5, 1\), got .* event shape \(5,\)"):
        fit_gaussian(problem.read, NUM, event_shape=(5, 1))


@pytest.mark.parametrize("name", PROBLEMS)
def test_draws_by_one_solve_are_those_of_the_posterior(name):
    problem, num = PROBLEMS[name], 4000
    size = problem.matrix.shape[-1]
    mean, cov = truth(size)
    denoiser = GaussianDenoiser(mean.reshape(problem.event_shape), cov)

    def draw(key):
        return draw_linear_gaussian(key, denoiser, problem.read(jnp.arange(3)))

    x = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), num))
    x = np.asarray(x).reshape(num, 3, size)
    for i in range(3):
        seen = problem.seen[i]
        observed = problem.matrix[i][seen], problem.noise[i][np.ix_(seen, seen)]
        residual = (problem.y[i] - problem.offset[i])[seen]
        expected, posterior = gaussian_posterior(mean, cov, *observed, residual)
        deviation = np.sqrt(np.diagonal(posterior))
        assert np.all(np.abs(x[:, i].mean(0) - expected) < 4.5 * deviation / np.sqrt(num))
        found = np.cov(x[:, i].T)
        assert np.all(np.abs(found - posterior) < 7 * np.outer(deviation, deviation) / num**0.5)


@pytest.mark.parametrize("cov", ["Stationary", "DiagonalPlusLowRank"])
@pytest.mark.parametrize("kind", ["elementwise", "mixed", "mixed, no matrix"])
def test_draws_of_large_events(kind, cov):
    """By each solver, for a field of which every fourth value is seen, or every fourth sum."""
    size, num = (160 if kind == "mixed, no matrix" else 24), 2000
    rng = np.random.default_rng(0)
    prior = GaussianDenoiser(jnp.zeros(size), covariance(cov, rng, size))
    matrix = np.eye(size) * (np.arange(size) % 4 == 0)
    if kind != "elementwise":
        matrix = matrix + np.roll(matrix, 1, axis=1)
    noise, y = Isotropic(jnp.asarray(1e-4), size), matrix @ rng.normal(size=size)
    likelihood = linear_gaussian(jnp.asarray(y), jnp.asarray(matrix), noise, (size,))
    likelihood = replace(likelihood, elementwise=kind == "elementwise")
    keys = jax.random.split(jax.random.key(1), num)
    x = jax.jit(jax.vmap(lambda key: draw_linear_gaussian(key, prior, likelihood)))(keys)
    expected, posterior = gaussian_posterior(
        np.zeros(size), dense(prior.cov), matrix, 1e-4 * np.eye(size), y
    )
    deviation = np.sqrt(np.diagonal(posterior))
    assert np.all(np.abs(x.mean(0) - expected) < 5 * deviation / np.sqrt(num))
    assert np.all(np.abs(x.std(0) / deviation - 1) < 5 / np.sqrt(2 * num))


def test_restored_events_are_posterior_means_of_observed_and_of_simulated_values():
    """And their parts make up draws of the posterior."""
    size, num = 24, 3000
    rng = np.random.default_rng(0)
    mean, cov = rng.normal(size=size), covariance("Stationary", rng, size)
    prior = GaussianDenoiser(jnp.asarray(mean), cov)
    matrix, y = rng.normal(size=(6, size)), rng.normal(size=6)
    noise = Isotropic(jnp.asarray(0.1), 6)
    likelihood = linear_gaussian(jnp.asarray(y), jnp.asarray(matrix), noise, (size,))
    keys = jax.random.split(jax.random.key(0), num)
    found = jax.jit(jax.vmap(lambda key: restore_linear_gaussian(key, prior, likelihood)))(keys)
    expected, posterior = gaussian_posterior(mean, dense(cov), matrix, 0.1 * np.eye(6), y)
    scale = np.sqrt(np.diag(dense(cov)))
    np.testing.assert_allclose(found.observed[0], expected, atol=1e-3 * scale.max())
    np.testing.assert_array_equal(found.observed[0], found.observed[1])
    for x, variance in (
        (found.simulated, scale**2),
        (found.restored, scale**2 - np.diag(posterior)),
        (found.simulated + found.observed - found.restored, np.diag(posterior)),
    ):
        assert np.all(np.abs(x.var(0) / variance - 1) < 5 * np.sqrt(2 / num))
    waves = cov.waves(found.simulated - prior.mean)
    power = np.broadcast_to(cov.eigenvalues, waves.shape)
    np.testing.assert_allclose(np.abs(waves) ** 2, power, rtol=tolerance(1e-3, 1e-8))


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_covariance_is_shrunk_to_stationary_correlations(weight):
    """Against sums over all pairs of elements at the same distance."""
    shape = (3, 2)
    places = list(np.ndindex(shape))
    cov = spd(np.random.default_rng(0), 6, 0.5, 2.0) * np.outer(*[np.linspace(1, 3, 6)] * 2)
    deviation = np.sqrt(np.diag(cov))
    target = np.zeros((6, 6))
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        pairs = [
            (k, m)
            for (k, c), (m, d) in itertools.product(enumerate(places), repeat=2)
            if np.array_equal(np.subtract(a, b), np.subtract(c, d))
        ]
        total = sum(cov[pair] for pair in pairs)
        target[i, j] = total / sum(deviation[k] * deviation[m] for k, m in pairs)
    target *= np.outer(deviation, deviation)
    root = np.linalg.cholesky(cov)
    found = shrink_correlations(jnp.asarray(root), jnp.asarray(weight), shape)
    expected = (1 - weight) * cov + weight * target
    np.testing.assert_allclose(found @ found.T, expected, rtol=1e-4, atol=1e-4)


def test_correlations_that_no_covariance_has_are_mended():
    """The dark third element hardly counts: neighbours correlate by 0.9, the ends by -0.9."""
    correlation = np.array([[1, 0.9, -0.9], [0.9, 1, -0.9], [-0.9, -0.9, 1]])
    root = np.array([1, 1, 1e-3])[:, None] * np.linalg.cholesky(correlation)
    found = np.asarray(shrink_correlations(jnp.asarray(root), jnp.asarray(1.0), (3,)), "float64")
    found = found / np.array([1, 1, 1e-3])[:, None]
    target = np.array([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])
    eigenvalues, eigenvectors = np.linalg.eigh(target)
    assert eigenvalues[0] < -0.5
    nearest = (eigenvectors * np.maximum(eigenvalues, 0)) @ eigenvectors.T
    np.testing.assert_allclose(found @ found.T, nearest, atol=0.01)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_element_has_nothing_to_shrink(shape):
    root = jnp.full((1, 1), 3.0)
    np.testing.assert_allclose(
        shrink_correlations(root, jnp.asarray(0.5), shape) ** 2, 9, rtol=1e-5
    )


def test_an_element_without_variance_keeps_none():
    root = np.linalg.cholesky(spd(np.random.default_rng(0), 3, 0.5, 2.0))
    root[1] = 0
    cov = shrink_correlations(jnp.asarray(root), jnp.asarray(0.5), (3,))
    cov = np.asarray(cov @ cov.T)
    assert np.all(np.isfinite(cov))
    np.testing.assert_allclose(np.diag(cov), np.diag(root @ root.T), rtol=1e-4)


@pytest.mark.parametrize("unit", [2.0**-86, 2.0**40])
def test_shrinkage_in_any_unit(unit):
    root = jnp.asarray(np.linalg.cholesky(spd(np.random.default_rng(0), 6, 0.5, 2.0)))
    found, expected = (
        shrink_correlations(u * root, jnp.asarray(0.5), (2, 3)) / u for u in (unit, 1)
    )
    np.testing.assert_array_equal(found, expected)


def few_events(cov, shape, num=60):
    """Half of the values of a few events with this covariance, in noise of 0.1."""
    rng, size = np.random.default_rng(0), len(cov)
    x = rng.normal(size=(num, size)) @ np.linalg.cholesky(cov).T
    seen = rng.random(x.shape) < 0.5
    variances = np.full(x.shape, 0.01)
    y = np.where(seen, x + 0.1 * rng.normal(size=x.shape), 0)
    noise = Diagonal(jnp.asarray(variances))
    return Problem(diag(seen * 1.0), 0 * y, diag(variances), y, seen, noise, shape)


def divergence(found, cov):
    """The Kullback-Leibler divergence of a Gaussian from that of a covariance and mean zero."""
    mean, estimate = np.asarray(found.mean, "float64").ravel(), dense(found.cov)
    inverse = np.linalg.inv(estimate)
    logdet = np.linalg.slogdet(estimate)[1] - np.linalg.slogdet(cov)[1]
    return 0.5 * (np.trace(inverse @ cov) - len(cov) + mean @ inverse @ mean + logdet)


def test_few_events_of_a_field_are_shrunk():
    shape = (4, 6)
    places = np.stack(np.unravel_index(np.arange(24), shape), -1)
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    bright = np.exp(-((places - [1.5, 2.5]) ** 2).sum(-1) / 8)
    cov = np.outer(bright, bright) * np.exp(-((distance / 1.5) ** 2)) + 1e-3 * np.eye(24)
    problem = few_events(cov, shape)
    chosen = problem.fit(num_iterations=64, batch_size=64, shrinkage=None)
    without = problem.fit(num_iterations=64, batch_size=64)
    assert chosen.shrinkage > 0
    assert divergence(chosen, cov) < 0.5 * divergence(without, cov)
    given = problem.fit(num_iterations=64, batch_size=7, shrinkage=float(chosen.shrinkage))
    last = int(np.isfinite(chosen.log_evidence).sum()) - 1
    np.testing.assert_allclose(chosen.log_evidence[last], given.log_evidence[last], rtol=1e-3)


def test_events_without_neighbours_are_not_fitted_worse():
    """Correlations of either sign at each distance: shrinkage is weak, or iterations are few."""
    rng = np.random.default_rng(1)
    factor = rng.normal(size=(24, 3))
    cov = factor @ factor.T + 0.1 * np.eye(24)
    problem = few_events(cov, (24,))
    chosen = problem.fit(num_iterations=64, batch_size=64, shrinkage=None)
    without = problem.fit(num_iterations=64, batch_size=64)
    assert divergence(chosen, cov) < divergence(without, cov)


def test_many_events_are_not_shrunk():
    problem = few_events(np.eye(2) + 0.5, (2,), num=32)
    chosen, without = problem.fit(shrinkage=None), problem.fit()
    assert chosen.shrinkage == 0
    np.testing.assert_array_equal(chosen.log_evidence, without.log_evidence)


def test_observations_are_kept_or_read_anew(monkeypatch):
    problem = PROBLEMS["few"]
    kept = problem.fit()
    monkeypatch.setattr(gaussian, "_MAX_KEPT", 1)
    np.testing.assert_allclose(problem.fit().log_evidence, kept.log_evidence, rtol=1e-5)
