"""Operators that are stationary: their blocks, and solves under a stationary covariance."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import dense, gaussian_posterior, tolerance
from scipy.linalg import eigvalsh
from scipy.stats import multivariate_normal

import numpyro_diffprior as ndp
from benchmarks.kspace import make_field
from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.guidance import MMPS, GaussianCovariance, linear_gaussian
from numpyro_diffprior.guidance.covariances import PosteriorOperator
from numpyro_diffprior.guidance.guidance import GuidedDenoiser
from numpyro_diffprior.guidance.solves import ConjugateGradients, StationarySolve
from numpyro_diffprior.linalg import Isotropic, Stationary, StationaryPlusLowRank
from numpyro_diffprior.linalg.solvers import conjugate_gradient
from numpyro_diffprior.linalg.stationary import stationary_part
from numpyro_diffprior.particles.smc import draw_posterior
from numpyro_diffprior.particles.system import SamplingOptions

GRID = (6, 5)
NUM = 30  # points of the grid


def stationary(num_channels, seed=0):
    """A covariance whose power spans three decades, with rotated channels."""
    rng = np.random.default_rng(seed)
    power = 10 ** rng.uniform(-2, 1, (*GRID, num_channels))
    power = (power + np.roll(np.flip(power, (0, 1)), (1, 1), (0, 1))) / 2
    rotation = np.linalg.qr(rng.normal(size=(num_channels, num_channels)))[0]
    return Stationary(jnp.asarray(power.reshape(-1)), jnp.asarray(rotation), GRID)


def with_factors(cov, rank=3, seed=1):
    """The covariance plus factors, in some of whose directions the variance is large."""
    factor = np.random.default_rng(seed).normal(size=(cov.size, rank)) * [0.1, 1, 10]
    return StationaryPlusLowRank(cov, jnp.asarray(factor))


def shifts(field):
    """The matrix whose product with a flattened image is its periodic convolution."""
    columns = [np.roll(field, (i, j), (0, 1)).ravel() for i, j in np.ndindex(GRID)]
    return np.stack(columns, axis=-1)


def convolution(num_channels, seed=0):
    """Sums over channels of periodic convolutions, as many as there are channels."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((NUM, num_channels, NUM, num_channels))
    for i, j in np.ndindex(num_channels, num_channels):
        matrix[:, i, :, j] = shifts(rng.normal(size=GRID))
    return matrix.reshape(NUM * num_channels, -1) / 5


def kspace(seed=0):
    """Some of the Fourier coefficients of complex fields, as pairs."""
    fourier = np.fft.fft2(np.eye(NUM).reshape(-1, *GRID), norm="ortho").reshape(NUM, NUM).T
    real = np.stack([fourier.real, -fourier.imag], axis=-1).reshape(NUM, -1)
    imag = np.stack([fourier.imag, fourier.real], axis=-1).reshape(NUM, -1)
    seen = np.random.default_rng(seed).random(NUM) < 0.5
    return np.concatenate([real[seen], imag[seen]])


def coils(num=4):
    """Some of the Fourier coefficients of complex fields in each of several smooth weights."""
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID), indexing="ij")
    angles = 2 * np.pi * np.arange(num)[:, None, None] / num
    square = (rows - np.cos(angles)) ** 2 + (columns - np.sin(angles)) ** 2
    weights = np.repeat(np.exp(-square / 2).reshape(num, -1), 2, axis=-1)
    return np.concatenate([kspace() * weight for weight in weights])


OPERATORS = {
    "convolution, one channel": (convolution(1), 1, True),
    "convolution, two channels": (convolution(2), 2, True),
    "convolution, three channels": (convolution(3), 3, True),
    "k-space": (kspace(), 2, True),
    "mixed": (np.random.default_rng(0).normal(size=(40, 2 * NUM)), 2, False),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_stationary_part_is_all_of_a_stationary_operator(name):
    matrix, num_channels, is_stationary = OPERATORS[name]
    gram = jnp.asarray(np.stack([1, 4])[:, None, None] * (matrix.T @ matrix))
    parts = jax.jit(lambda: stationary_part(lambda v: gram @ v, GRID, num_channels, gram.dtype))()
    part, blocks = parts.mean, parts.mean.blocks
    assert blocks.shape == (2, 6, 3, num_channels, num_channels)
    cov = stationary(num_channels)
    v = np.random.default_rng(1).normal(size=(2, NUM * num_channels))
    product, exact = part.matvec(jnp.asarray(v)), np.einsum("nij,nj->ni", gram, v)
    error = np.abs(product - exact).max() / np.abs(exact).max()
    assert (error < tolerance(1e-5, 1e-12)) == is_stationary
    assert np.linalg.eigvalsh(blocks).min() > -tolerance(1e-5, 1e-12) * np.abs(blocks).max()

    # The lower part is hardly more than the operator, beside the prior's precision.
    basis = jnp.eye(NUM * num_channels)[:, None]
    lower, mean = (
        np.moveaxis(np.asarray(jax.vmap(p.matvec)(basis), float), 0, -1)
        for p in (parts.lower, parts.mean)
    )
    precision = np.linalg.inv(dense(cov))
    for i, scale in enumerate([1, 1e4]):
        total = precision + scale * np.asarray(gram[i], float)
        excess = [eigvalsh(precision + scale * p[i], total).max() for p in (lower, mean)]
        assert excess[0] < 1.5
        assert is_stationary or scale == 1 or excess[1] > 10

    if is_stationary:
        np.testing.assert_allclose(lower, mean, atol=tolerance(1e-4, 1e-10) * np.abs(mean).max())
        for prior in (cov, with_factors(cov)):
            system = np.eye(prior.size) + np.asarray(gram, float) @ dense(prior)
            expected = np.linalg.solve(system, v[..., None])[..., 0]
            shift = expected @ dense(prior)
            update = prior.update_stationary(part)
            found = update.solve(jnp.asarray(v))
            scale = max(1, np.abs(dense(prior)).max())
            np.testing.assert_allclose(found[0], expected, atol=tolerance(1e-4, 1e-10) * scale)
            np.testing.assert_allclose(found[1], shift, atol=tolerance(1e-4, 1e-10) * scale)
            logdet = np.linalg.slogdet(system)[1]
            np.testing.assert_allclose(update.logdet, logdet, rtol=tolerance(1e-4, 1e-10))
        square = dense(cov) + 0.3 * dense(cov) @ dense(cov)
        logdet = np.linalg.slogdet(np.eye(len(square)) + np.asarray(gram, float) @ square)[1]
        more = cov.update_stationary(part, 0.3)
        np.testing.assert_allclose(more.logdet, logdet, rtol=tolerance(1e-4, 1e-10))
        roots = jax.vmap(part.sqrt_matvec)(jnp.eye(len(square))[:, None])
        squares = np.einsum("kni,knj->nij", roots, roots)
        np.testing.assert_allclose(squares, gram, atol=tolerance(1e-4, 1e-10) * gram.max())


def test_updates_of_each_event():
    """Each as if it were alone; zeros and NaN stay with their event."""
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(5, 8, 8))
    matrix = jnp.asarray(np.einsum("nij,nkj->nik", roots, roots))
    rhs = jnp.asarray(rng.normal(size=(5, 8)) * 10.0 ** np.arange(-20, 20, 8)[:, None])
    rhs = rhs.at[3].set(0).at[4].set(jnp.nan)

    def solve(matrix, rhs, max_steps=100, inverse=None):
        return conjugate_gradient(
            lambda v: jnp.einsum("...ij,...j->...i", matrix, v),
            inverse or (lambda r: (r / 2, r)),  # with a covariance of two
            rhs,
            atol=0,
            max_steps=max_steps,
        )

    found = jax.jit(solve)(matrix, rhs)
    for i in range(3):
        system = np.eye(8) / 2 + np.asarray(matrix[i], float)
        expected = np.linalg.solve(system, np.asarray(rhs[i], float))
        for values, scale in ((found.shift, 1), (found.b, 2)):
            error = np.abs(scale * values[i] - expected).max() / np.abs(expected).max()
            assert error < tolerance(1e-3, 1e-8)
        alone = solve(matrix[i], rhs[i])
        assert alone.num_steps == found.num_steps[i] <= 20
        assert found.residual[i] < tolerance(1e-4, 1e-8)
    assert np.all(found.shift[3] == 0)
    assert found.num_steps[3] == 0
    assert np.isnan(found.shift[4]).any() or found.num_steps[4] == 0
    assert np.all(solve(matrix, rhs, max_steps=2).num_steps[:3] == 2)
    exact = jnp.linalg.inv(matrix + jnp.eye(8) / 2)

    def inverse(r):
        shift = jnp.einsum("...ij,...j->...i", exact, r)
        return shift / 2, shift

    assert np.all(solve(matrix, rhs, inverse=inverse).num_steps[:3] <= 2)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("noise", [0.3, 0.01])
@pytest.mark.parametrize("form", [lambda cov: cov, with_factors], ids=["stationary", "factors"])
def test_posterior_means_under_stationary_priors(name, noise, form):
    """In one step, and one that finds nothing to do, if the operator is stationary."""
    matrix, num_channels, is_stationary = OPERATORS[name]
    rng = np.random.default_rng(2)
    cov = form(stationary(num_channels))
    prior = GaussianDenoiser(jnp.zeros((*GRID, num_channels)), cov)
    size, sigma = NUM * num_channels, 0.7
    y = matrix @ rng.normal(size=size) + noise * rng.normal(size=len(matrix))
    noises = Isotropic(jnp.asarray(noise**2), len(matrix))
    likelihood = linear_gaussian(jnp.asarray(y), jnp.asarray(matrix), noises, prior.event_shape)
    mmps = MMPS(GaussianCovariance(), max_dense=0, atol=tolerance(1e-3, 1e-8))
    solve = mmps.choose_solve(prior, likelihood)
    assert isinstance(solve, StationarySolve)
    assert solve.looks_ahead == isinstance(cov, Stationary)
    x_t = jnp.asarray(rng.normal(size=(3, *prior.event_shape)))
    guided = jax.jit(lambda x: mmps.bind(prior, likelihood).guide(x, sigma))(x_t)
    if is_stationary:
        assert np.all(guided.stats.num_steps <= 3)
        assert np.all(guided.stats.residual < tolerance(1e-4, 1e-10))
    else:
        assert np.all(guided.stats.num_steps > 3)

    covariance = dense(prior.cov)
    gain = np.linalg.solve(covariance + sigma**2 * np.eye(size), covariance)
    posterior = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(size)) * sigma**2
    for x, found in zip(x_t, guided.x_hat_y, strict=True):
        x_hat = np.asarray(x, float).ravel() @ gain
        noises = noise**2 * np.eye(len(matrix))
        mean, rest = gaussian_posterior(x_hat, posterior, matrix, noises, y)
        error = (np.asarray(found, float).ravel() - mean) / np.sqrt(np.diagonal(rest))
        assert np.abs(error).max() < tolerance(0.02, 1e-5)


@pytest.mark.parametrize("noise", [0.1, 0.01])
@pytest.mark.parametrize("is_guessed", [False, True])
def test_convolutions_with_a_gap(noise, is_guessed):
    """In the gap their stationary part exceeds them by far, and is not used."""
    prior, _ = make_field(10)
    cov, grid = prior.cov, prior.event_shape[:2]
    distance = np.minimum(np.arange(10), 10 - np.arange(10))
    blur = np.exp(-(distance[:, None] ** 2 + distance**2) / 2.88)
    transfer = np.fft.fft2(blur / blur.sum())[..., None]
    seen = np.ones((*grid, 2), bool)
    seen[:4, :4] = False
    basis = np.eye(cov.size).reshape(-1, *grid, 2)
    columns = np.fft.ifft2(transfer * np.fft.fft2(basis, axes=(1, 2)), axes=(1, 2)).real
    matrix = columns.reshape(cov.size, -1).T[seen.ravel()]
    rng = np.random.default_rng(6)
    x = np.asarray(cov.sqrt_matvec(jnp.asarray(rng.normal(size=(20, cov.size)))), float)
    y = x @ matrix.T + noise * rng.normal(size=(20, len(matrix)))
    noises = Isotropic(jnp.asarray(noise**2), len(matrix))
    likelihood = linear_gaussian(jnp.asarray(y), jnp.asarray(matrix), noises, prior.event_shape)
    local = likelihood.linearize(jnp.zeros((20, *prior.event_shape)))
    solve = StationarySolve.of(local, cov, ConjugateGradients(0.1, 1000))
    inverse = np.linalg.inv(dense(cov))
    system = inverse + matrix.T @ matrix / noise**2
    for i in range(20):
        lower = replace(solve.part.lower, blocks=solve.part.lower.blocks[i])
        rest = np.asarray(jax.vmap(lower.matvec)(jnp.eye(cov.size)), float)
        assert eigvalsh(system, inverse + rest)[0] >= 0.999 * solve.least[i]
    exact = np.linalg.solve(system, matrix.T @ y.T / noise**2).T
    deviation = np.linalg.inv(np.linalg.cholesky(system))
    guess = exact + rng.normal(size=(20, cov.size)) @ deviation
    operator = PosteriorOperator(likelihood.y, cov.matvec, cov.matvec, cov)
    given = jnp.asarray(guess) if is_guessed else None
    found = solve(local, operator, lambda: jnp.asarray(matrix), given)
    error = np.asarray(found.shift, float) - exact
    assert np.sqrt(np.einsum("ni,ij,nj->n", error, system, error)).max() < 0.1


@pytest.mark.parametrize("num_particles", [1, 4])
def test_solves_start_from_the_level_before(monkeypatch, num_particles):
    """With fewer steps in all, and draws that differ by less than what the steps leave."""
    matrix, num_channels, noise = coils(), 2, 0.03
    rng, cov = np.random.default_rng(5), stationary(num_channels)
    prior = GaussianDenoiser(jnp.zeros((*GRID, num_channels)), cov)
    x = np.asarray(cov.sqrt_matvec(jnp.asarray(rng.normal(size=(6, cov.size)))))
    y = jnp.asarray(x @ matrix.T + noise * rng.normal(size=(6, len(matrix))))
    noises = Isotropic(jnp.asarray(noise**2), len(matrix))
    likelihood = linear_gaussian(y, jnp.asarray(matrix), noises, prior.event_shape)
    guidance = MMPS(GaussianCovariance(), max_dense=0)
    options = SamplingOptions(num_particles, ndp.samplers.MultistepSDE(16), guidance)
    warm = draw_posterior(jax.random.key(0), prior, likelihood, options)
    guide = GuidedDenoiser.guide
    monkeypatch.setattr(GuidedDenoiser, "guide", lambda self, x, s, _: guide(self, x, s))
    cold = draw_posterior(jax.random.key(0), prior, likelihood, options)
    assert np.all(warm.info.num_solver_steps < 0.7 * cold.info.num_solver_steps)
    if num_particles == 1:
        posterior = np.linalg.inv(np.linalg.inv(dense(cov)) + matrix.T @ matrix / noise**2)
        error = np.asarray(warm.x - cold.x).reshape(6, -1) / np.sqrt(np.diagonal(posterior))
        assert np.abs(error).max() < 0.1


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("solver", ["covariance", "stationary part"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_precise_observations_in_single_precision(name, solver, scale):
    """Their rounding stays in directions of which they tell; in the score it does not."""
    matrix, num_channels, _ = OPERATORS[name]
    rng, cov, noise = np.random.default_rng(4), stationary(num_channels), 1e-3
    y = matrix @ np.asarray(cov.sqrt_matvec(jnp.asarray(rng.normal(size=cov.size))))
    y += noise * rng.normal(size=len(matrix))
    system = np.linalg.inv(dense(cov)) + matrix.T @ matrix / noise**2
    exact = np.linalg.solve(system, matrix.T @ y / noise**2)

    scaled = cov.scale(jnp.asarray(scale**2))
    noises = Isotropic(jnp.asarray((scale * noise) ** 2), len(matrix))
    likelihood = linear_gaussian(
        jnp.asarray(scale * y), jnp.asarray(matrix), noises, (*GRID, num_channels)
    )
    local = likelihood.linearize(jnp.zeros((*GRID, num_channels)))
    solve = ConjugateGradients(atol=0.01)
    if solver == "stationary part":
        solve = StationarySolve.of(local, scaled, solve)
    operator = PosteriorOperator(likelihood.y, scaled.matvec, scaled.matvec, scaled)
    found = solve(local, operator, lambda: jnp.asarray(matrix))
    error = np.asarray(found.shift, float) / scale - exact
    assert np.sqrt(error @ system @ error) < 0.05


@pytest.mark.computes
@pytest.mark.parametrize("name", ["convolution, two channels", "k-space", "mixed"])
def test_evidence_by_looking_ahead(name):
    """Close where the operator is stationary, where it is not by means of the weights."""
    matrix, num_channels, is_stationary = OPERATORS[name]
    num, noise, rng = 8, 0.3, np.random.default_rng(3)
    matrix = matrix[:20] if name == "mixed" else matrix
    cov = stationary(num_channels)
    x = np.asarray(cov.sqrt_matvec(jnp.asarray(rng.normal(size=(num, cov.size)))))
    y = x @ matrix.T + noise * rng.normal(size=(num, len(matrix)))
    total = matrix @ dense(cov) @ matrix.T + noise**2 * np.eye(len(matrix))
    exact = multivariate_normal(np.zeros(len(matrix)), total).logpdf(y)

    def model(prior, y):
        with numpyro.plate("n", num):
            x = numpyro.sample("x", prior)
            mean = x.reshape(num, -1) @ jnp.asarray(matrix, x.dtype).T
            numpyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    denoiser = GaussianDenoiser(jnp.zeros((*GRID, num_channels)), cov)
    prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.MultistepSDE(64))
    guidance = MMPS(GaussianCovariance(), max_dense=0)
    found = ndp.log_evidence(
        jax.random.key(0), model, prior, jnp.asarray(y), guidance=guidance, num_particles=64
    )
    error = np.asarray(found.value) - exact
    assert np.abs(error.mean()) < (0.5 if is_stationary else 3)
    assert np.abs(error).max() < (2 if is_stationary else 8)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_each_event_has_its_own_part(scale):
    """Also where the precision of one is much smaller than that of the others, or larger."""
    first, _, _ = OPERATORS["convolution, two channels"]
    second = scale * np.random.default_rng(0).normal(size=first.shape)
    for matrices in ((first, scale * first), (first, second)):
        matrix = np.stack(matrices)
        gram = jnp.asarray(np.einsum("nki,nkj->nij", matrix, matrix))
        together = stationary_part(lambda v, gram=gram: gram @ v, GRID, 2, gram.dtype)
        for i in range(2):
            alone = stationary_part(lambda v, gram=gram[i]: gram @ v, GRID, 2, gram.dtype)
            for name in ("mean", "lower"):
                found, expected = getattr(together, name).blocks[i], getattr(alone, name).blocks
                size = np.abs(alone.mean.blocks).max()
                np.testing.assert_allclose(found, expected, atol=tolerance(1e-5, 1e-12) * size)
            share = np.abs(alone.lower.blocks).max() / size
            assert share > 0.99 if matrices[i] is not second else share < 0.5


def test_other_operators_keep_their_solver():
    """Masks do: in white coordinates their hidden values would converge last."""
    cov = stationary(1)
    prior = GaussianDenoiser(jnp.zeros(GRID), cov)
    mask, noise = np.diag(np.arange(NUM) % 3 == 0).astype(float), Isotropic(jnp.asarray(0.1), NUM)
    masked = linear_gaussian(jnp.ones(NUM), jnp.asarray(mask), noise, GRID)
    mmps = MMPS(GaussianCovariance(), max_dense=0)

    masked = replace(masked, elementwise=True)
    assert isinstance(mmps.choose_solve(prior, masked), ConjugateGradients)
    assert isinstance(MMPS(max_dense=0).choose_solve(prior, masked), ConjugateGradients)
