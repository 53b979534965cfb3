"""Denoisers composed from windows, against dense Gaussians: chains, rings and fields."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior.denoisers.serialization import load_denoiser, save_denoiser
from numpyro_diffprior.denoisers.windows import WindowDenoiser
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.linalg.covariances import Blocks, DiagonalPlusLowRank, Isotropic, Repeated
from numpyro_diffprior.linalg.stationary import Stationary, extend_stationary

KEY = jax.random.key(0)
TOL = oracles.tolerance()
RHO = 0.8
SIGMAS = (0.1, 0.5, 1.0, 3.0, 30.0)


def distance(length, periodic=False):
    lag = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    return np.minimum(lag, length - lag) if periodic else lag


def markov(length, periodic=False, rho=RHO):
    """The covariance of a chain of first order with unit variance, or of one on a ring."""
    lag = distance(length, periodic)
    return (rho**lag + rho ** (length - lag)) / (1 + rho**length) if periodic else rho**lag


def gaussian(cov, mean=0.0):
    return ndp.GaussianDenoiser(mean + np.zeros(len(cov)), cov)


@jax.jit
def denoise(denoiser, x_t, sigma):
    return denoiser(x_t, sigma)


@jax.jit
def gains(denoiser):
    """The matrices of a linear denoiser, one for each noise level."""
    basis = jnp.eye(denoiser.event_size).reshape(-1, *denoiser.event_shape)
    images = jax.lax.map(lambda sigma: denoiser(basis, sigma), jnp.asarray(SIGMAS))
    return images.reshape(len(SIGMAS), denoiser.event_size, -1).mT


def worst_error(denoiser, cov):
    """The largest root-mean-square error of an element, over all noise levels."""
    errors = []
    for sigma, gain in zip(SIGMAS, np.asarray(gains(denoiser), float), strict=True):
        noisy = cov + sigma**2 * np.eye(len(cov))
        difference = gain - np.linalg.solve(noisy, cov).T
        errors.append(np.sqrt(np.diag(difference @ noisy @ difference.T).max()))
    return max(errors)


@pytest.mark.parametrize("periodic", [False, True])
def test_error_decays_with_the_margin(periodic):
    length = 40
    cov = markov(length, periodic)
    errors = []
    for width, stride in [(3, 1), (9, 1), (17, 1), (9, 5)]:
        inner = gaussian(cov[:width, :width])
        denoiser = WindowDenoiser(inner, length, stride=stride, periodic=periodic)
        margin = (width - stride) // 2
        errors.append(worst_error(denoiser, cov))
        assert errors[-1] < np.sqrt(2) * RHO ** (margin + 1)
    small, medium, large, coarse = errors
    assert medium < RHO**3 * small
    assert large < RHO**4 * medium
    assert medium < coarse < small


def read_from_windows(x, inner, sigma, length, stride, periodic):
    """Element by element, from one dense Gaussian for each window; one axis after the other."""
    window = inner.event_shape[: len(length)]

    def along(axis):
        size, width, step = length[axis], window[axis], stride[axis]
        before = (width - step) // 2
        if size == width:
            return [(0, range(size))]
        if periodic[axis]:
            firsts = range(0, size, step)
            return [(f - before, range(f, min(f + step, size))) for f in firsts]
        starts = [*range(0, size - width, step), size - width]
        firsts = [0, *(i * step + before for i in range(1, len(starts))), size]
        return [(s, range(*firsts[i : i + 2])) for i, s in enumerate(starts)]

    found = np.full(x.shape, np.nan)
    axes = [along(axis) for axis in range(len(length))]
    for choice in np.ndindex(*(len(axis) for axis in axes)):
        cuts = [axis[i] for axis, i in zip(axes, choice, strict=True)]
        places = [
            (start + np.arange(width)) % size
            for (start, _), width, size in zip(cuts, window, length, strict=True)
        ]
        values = oracles.gaussian_denoiser(
            np.asarray(inner.mean, float).reshape(-1),
            oracles.dense(inner.cov),
            x[np.ix_(*places)].reshape(-1),
            sigma,
        ).reshape(inner.event_shape)
        read = [list(elements) for _, elements in cuts]
        offsets = [np.asarray(r) - start for (start, _), r in zip(cuts, read, strict=True)]
        found[np.ix_(*read)] = values[np.ix_(*offsets)]
    return found


LAYOUTS = {
    "every window": ((5,), (11,), 1, False),
    "even window": ((4, 2), (11,), 1, False),
    "stride": ((5, 2), (12,), 3, False),
    "no overlap": ((4,), (11,), 4, False),
    "ring": ((5,), (11,), 1, True),
    "ring with a stride": ((4, 2), (11,), 3, True),
    "field": ((3, 4), (7, 6), (2, 1), (True, False)),
    "field of full height": ((3, 4, 2), (3, 7), 2, (True, False)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_element_is_read_from_one_window(name):
    shape, length, stride, periodic = LAYOUTS[name]
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    inner = ndp.GaussianDenoiser(rng.normal(size=shape), oracles.spd(rng, size))
    options = {"stride": stride, "periodic": periodic}
    parts = WindowDenoiser(inner, length, max_batch_size=3, **options)
    x = rng.normal(size=(2, 3, *parts.event_shape))
    sigma = np.array([0.2, 1.0, 5.0])
    each = [np.broadcast_to(option, len(length)).tolist() for option in (stride, periodic)]
    expected = np.empty(x.shape)
    for i, j in np.ndindex(2, 3):
        expected[i, j] = read_from_windows(x[i, j], inner, sigma[j], length, *each)
    found = denoise(parts, x, sigma)
    assert found.dtype == parts.dtype == jnp.result_type(float)
    np.testing.assert_allclose(found, expected, atol=3 * TOL)
    at_once = WindowDenoiser(inner, length, max_batch_size=10_000, **options)
    np.testing.assert_allclose(denoise(at_once, x, sigma), expected, atol=3 * TOL)
    # Far from the data, the denoiser returns the mean.
    far = denoise(parts, np.zeros(parts.event_shape), 1e3)
    np.testing.assert_allclose(far, parts.mean, atol=1e-4)


@pytest.mark.parametrize("periodic", [False, True])
def test_one_window_is_the_denoiser_itself(periodic):
    rng = np.random.default_rng(1)
    inner = ndp.GaussianDenoiser(rng.normal(size=(4, 3)), oracles.spd(rng, 12))
    x = jnp.asarray(rng.normal(size=(5, 4, 3)))
    for length in (4, (4,), (4, 3)):
        whole = WindowDenoiser(inner, length, periodic=periodic)
        assert whole.num_windows == 1
        np.testing.assert_allclose(whole(x, 0.5), inner(x, 0.5), atol=TOL)
        np.testing.assert_allclose(whole.mean, inner.mean)
    chain = WindowDenoiser(inner, 4)
    np.testing.assert_allclose(chain.cov.dense(), inner.cov.dense(), atol=TOL)


def test_fields_of_two_axes():
    """A field that is a product of two chains, one of them a ring."""
    length, window = (10, 12), (7, 9)
    cov = np.kron(markov(10, True, 0.4), markov(12, False, 0.5))
    inner = np.kron(markov(10, True, 0.4)[:7, :7], markov(9, False, 0.5))
    inner = ndp.GaussianDenoiser(np.zeros(window), inner)
    errors = [
        worst_error(WindowDenoiser(inner, length, stride=s, periodic=(True, False)), cov)
        for s in (1, 3, (7, 9))
    ]
    assert errors[0] < 0.02
    assert errors[0] < errors[1] < 0.06
    assert errors[1] < errors[2]


# Draws.

LENGTH = 18
OBSERVED = np.arange(1, LENGTH, 3)
NOISE = 0.3


def model(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[..., OBSERVED], NOISE).to_event(1), obs=y)


def assert_moments(draws, mean, cov, num, bias=0.0):
    """Means and variances within five standard errors, and a bias in standard deviations."""
    draws, variance = np.asarray(draws, float), np.diag(cov)
    z = (draws.mean(0) - mean) / np.sqrt(variance)
    assert np.abs(z).max() < 5 / np.sqrt(num) + bias
    ratio = draws.var(0) / variance
    assert np.abs(ratio - 1).max() < 5 * np.sqrt(2 / num) + bias


DRAWS = {
    "every window": ({}, {}),
    "ring": ({"periodic": True, "stride": 5}, {}),
    "particles": ({}, {"num_particles": 4}),
}


@pytest.mark.parametrize("name", DRAWS)
def test_posterior_draws_are_those_of_the_smoother(name):
    """Six sparse observations of a chain, whose posterior is Gaussian."""
    options, sampling = DRAWS[name]
    rho, width, num = 0.6, 13, 1000
    cov = markov(LENGTH, "periodic" in options, rho)
    rng = np.random.default_rng(2)
    y = np.linalg.cholesky(cov)[OBSERVED] @ rng.normal(size=LENGTH)
    y = y + NOISE * rng.normal(size=len(OBSERVED))
    matrix = np.eye(LENGTH)[OBSERVED]
    exact = oracles.gaussian_posterior(
        np.zeros(LENGTH), cov, matrix, NOISE**2 * np.eye(len(OBSERVED)), y
    )
    denoiser = WindowDenoiser(gaussian(cov[:width, :width]), LENGTH, **options)
    prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.MultistepSDE(48))
    draws = ndp.sample_posterior(KEY, model, prior, jnp.asarray(y), num_samples=num, **sampling)
    # Four particles are not enough for an approximate covariance to be corrected in full.
    assert_moments(draws.samples["x"], *exact, num, bias=0.1 if sampling else 0.02)


def test_prior_draws_are_a_chain():
    num, length = 3000, 20
    cov = markov(length, rho=0.6)
    denoiser = WindowDenoiser(gaussian(cov[:11, :11], mean=1.0), length)
    prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.MultistepSDE(48))
    draws = np.asarray(prior.sample(KEY, (num,)), float)
    assert_moments(draws, 1.0, cov, num, bias=0.03)
    assert np.abs(np.cov(draws.T) - cov).max() < 5 * np.sqrt(2 / num) + 0.03
    np.testing.assert_allclose(prior.mean, 1, rtol=TOL)
    np.testing.assert_allclose(prior.variance, 1, rtol=TOL)
    score = prior.score(draws[:3], 0.5)
    np.testing.assert_allclose(score, (prior.denoise(draws[:3], 0.5) - draws[:3]) / 0.25, atol=TOL)


# Memory and transformations.


def network(width=9, **options):
    net = ndp.MLP((width, 2), features=(8,), embedding=4, rngs=nnx.Rngs(0), **options)
    state = nnx.state(net, nnx.Param)
    rng = np.random.default_rng(3)
    nnx.update(net, jax.tree.map(lambda w: w + 0.1 * jnp.asarray(rng.normal(size=w.shape)), state))
    return ndp.NetworkDenoiser(net)


def pulled(denoiser, x, v):
    return jax.vjp(lambda x: denoiser(x, 0.5), x)[1](v)[0]


@pytest.mark.parametrize("function", [lambda d, x, v: d(x, 0.5), pulled], ids=["mean", "product"])
def test_memory_grows_with_the_events(function):
    """A few copies of an event fit beside it; its windows would take 33 times its size."""
    inner = network(33)

    def temporary(length):
        denoiser = WindowDenoiser(inner, length, max_batch_size=8)
        x = jnp.zeros((length, 2))
        compiled = jax.jit(function).lower(denoiser, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes, x.nbytes

    (small, one), (large, eight) = temporary(512), temporary(8 * 512)
    assert large - small < 4 * (eight - one)


def test_transformations():
    inner = network()
    parts, at_once = (WindowDenoiser(inner, 20, max_batch_size=n) for n in (3, None))
    rng = np.random.default_rng(4)
    x, v = jnp.asarray(rng.normal(size=(2, 3, 20, 2)))
    sigma = jnp.array([0.1, 1.0, 3.0])
    expected = denoise(at_once, x, sigma)
    np.testing.assert_allclose(denoise(parts, x, sigma), expected, atol=TOL)
    np.testing.assert_allclose(parts(x, sigma), expected, atol=TOL)
    np.testing.assert_allclose(jax.vmap(parts)(x, sigma), expected, atol=TOL)
    np.testing.assert_allclose(
        jax.jit(pulled)(parts, x, v), jax.jit(pulled)(at_once, x, v), atol=3 * TOL
    )

    def loss(denoiser):
        return jnp.sum(v * denoiser(x, sigma))

    gradients = (jax.jit(jax.grad(loss))(d).wrapped.net for d in (parts, at_once))
    states = [jax.tree.leaves(nnx.state(net, nnx.Param)) for net in gradients]
    for found, wanted in zip(*states, strict=True):
        np.testing.assert_allclose(found, wanted, atol=30 * TOL)


def test_all_windows_of_an_event_have_its_context():
    inner = network(5, context_shape=(3,))
    long = WindowDenoiser(inner, 12, max_batch_size=2)
    assert long.context_shape == (3,)
    prior, contexts = ndp.DiffusionPrior(long), jnp.eye(3)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(3, 12, 2)))
    found = prior.condition(contexts).denoise(x, 0.5)
    for i in range(3):
        one = WindowDenoiser(Given(inner, contexts[i]), 12)
        np.testing.assert_allclose(found[i], one(x[i], 0.5), atol=TOL)
    assert prior.condition(contexts).sample(KEY, (2,)).shape == (2, 3, 12, 2)


class Given(ndp.Denoiser):
    """A denoiser at one context, written by a user."""

    def __init__(self, inner, context):
        self.inner, self.context = inner, context
        self.mean, self.cov = inner.mean, inner.cov

    def __call__(self, x_t, sigma):
        num = x_t.size // self.event_size
        return self.inner(x_t, sigma, jnp.broadcast_to(self.context, (num, 3)))


jax.tree_util.register_pytree_node(
    Given, lambda d: ((d.inner, d.context), None), lambda _, children: Given(*children)
)


# The Gaussian summary.


def test_summary_of_a_sequence_repeats_the_window():
    rng = np.random.default_rng(6)
    matrix = oracles.spd(rng, 6)
    inner = ndp.GaussianDenoiser(rng.normal(size=(3, 2)), matrix)
    whole, rest = WindowDenoiser(inner, 9), WindowDenoiser(inner, 11)
    assert isinstance(whole.cov, Repeated)
    np.testing.assert_allclose(whole.cov.dense(), np.kron(np.eye(3), matrix), atol=TOL)
    expected = np.kron(np.eye(4), matrix)[:22, :22]
    np.testing.assert_allclose(rest.cov.dense(), expected, atol=TOL)
    np.testing.assert_allclose(rest.error_ratio(jnp.ones(2)), 1)


def test_low_rank_windows_need_no_large_matrix():
    rng = np.random.default_rng(7)
    cov = DiagonalPlusLowRank(jnp.ones(8), jnp.asarray(rng.normal(size=(8, 2))))
    denoiser = WindowDenoiser(ndp.GaussianDenoiser(jnp.zeros((4, 2)), cov), 11)
    assert isinstance(denoiser.cov, Blocks)
    assert not denoiser.cov.has_dense_update


def autocovariance(matrix, window, grid):
    """The covariance of a stationary field on a ring, by a loop over pairs of points."""
    points = list(np.ndindex(*window))
    channels = len(matrix) // len(points)
    blocks = matrix.reshape(len(points), channels, len(points), channels)
    lags = np.zeros((*grid, channels, channels))
    for i, j in np.ndindex(len(points), len(points)):
        lags[tuple(np.subtract(points[i], points[j]) % grid)] += blocks[i, :, j] / len(points)
    places = list(np.ndindex(*grid))
    rows = [[lags[tuple(np.subtract(p, q) % grid)] for q in places] for p in places]
    return np.block(rows)


@pytest.mark.parametrize("grid", [(4, 5), (3, 4), (2, 3)])
def test_summary_of_a_field_is_stationary(grid):
    rng, window = np.random.default_rng(8), (2, 3)
    rotation, _ = np.linalg.qr(rng.normal(size=(2, 2)))
    # Channels whose correlation is the same at all lags are kept whole.
    channels = rotation * np.array([0.5, 2.0]) @ rotation.T
    matrix = np.kron(oracles.spd(rng, 6), channels)
    inner = ndp.GaussianDenoiser(np.zeros((*window, 2)), matrix)
    cov = WindowDenoiser(inner, grid).cov
    assert isinstance(cov, Stationary)
    cov.check("test")
    expected = autocovariance(matrix, window, grid)
    np.testing.assert_allclose(cov.dense(), expected, atol=30 * TOL)
    np.testing.assert_allclose(cov.trace() / cov.size, np.trace(matrix) / 12, rtol=30 * TOL)
    assert cov.max_eigenvalue() < inner.cov.max_eigenvalue() * (1 + TOL)


def test_many_columns_are_summed_in_parts():
    cov = extend_stationary(Isotropic(jnp.asarray(2.0), 100), (10, 10), (12, 20))
    np.testing.assert_allclose(cov.eigenvalues, 2, rtol=30 * TOL)


def test_a_better_covariance_may_be_given():
    cov = markov(10)
    denoiser = WindowDenoiser(gaussian(cov[:3, :3]), 10, cov=cov)
    np.testing.assert_allclose(denoiser.cov.dense(), cov, atol=TOL)
    assert denoiser.sigma_max > 1.4 * WindowDenoiser(gaussian(cov[:3, :3]), 10).sigma_max


# Files, units and refusals.


def test_files(tmp_path):
    options = {"stride": (2, 1), "periodic": (True, False), "max_batch_size": 4}
    inner = ndp.NetworkDenoiser(ndp.UNet((4, 4), channels=(4,), num_blocks=1, rngs=nnx.Rngs(1)))
    denoiser = WindowDenoiser(inner, (7, 5), **options)
    save_denoiser(tmp_path / "windows.safetensors", denoiser)
    loaded = load_denoiser(tmp_path / "windows.safetensors")
    assert jax.tree.structure(loaded.cov) == jax.tree.structure(denoiser.cov)
    assert {name: getattr(loaded, name) for name in options} == options
    x = jnp.asarray(np.random.default_rng(9).normal(size=(7, 5)))
    assert (denoise(loaded, x, 0.5) == denoise(denoiser, x, 0.5)).all()
    assert (loaded.cov.matvec(x.reshape(-1)) == denoiser.cov.matvec(x.reshape(-1))).all()


def test_a_window_far_from_one_gets_a_unit():
    scale, cov = 2.0 ** (-300 if jax.config.jax_enable_x64 else -50), markov(3)
    x = np.random.default_rng(10).normal(size=8)
    stated = ndp.DiffusionPrior(WindowDenoiser(gaussian(scale**2 * cov), 8))
    assert stated.denoiser.unit != 1
    expected = WindowDenoiser(gaussian(cov), 8)(x, 0.7)
    np.testing.assert_allclose(stated.denoise(scale * x, 0.7 * scale) / scale, expected, atol=1e-5)
    own = WindowDenoiser(ndp.GaussianDenoiser(np.zeros(3), cov, unit=scale), 8)
    assert own.unit == scale


REFUSALS = {
    "expected a Denoiser of windows, got int": lambda _: WindowDenoiser(3, 10),
    "expected a length of at least the window's, 4, got 3": lambda d: WindowDenoiser(d, 3),
    "expected length to be an integer, got 5.0": lambda d: WindowDenoiser(d, (5.0,)),
    r"one length for each windowed axis, got \(5, 5, 5\)": lambda d: WindowDenoiser(d, (5, 5, 5)),
    r"one length for each windowed axis, got \(\)": lambda d: WindowDenoiser(d, ()),
    "a stride of at most the window's length, 4, got 5": lambda d: WindowDenoiser(d, 9, stride=5),
    "expected stride >= 1, got 0": lambda d: WindowDenoiser(d, 9, stride=0),
    r"stride .* one for each of the 1 axes .* got \(1, 1\)": lambda d: WindowDenoiser(
        d, 9, stride=(1, 1)
    ),
    r"periodic .* one for each of the 2 axes .* got \[True\]": lambda d: WindowDenoiser(
        d, (9, 9), periodic=[True]
    ),
    "expected max_batch_size >= 1, got 0": lambda d: WindowDenoiser(d, 9, max_batch_size=0),
    r"events of shape \(9, 2\) need a covariance of size 18, got one of size 8": lambda d: (
        WindowDenoiser(d, 9, cov=d.cov)
    ),
    "expected no rngs": lambda d: WindowDenoiser(d, 9)(jnp.zeros((9, 2)), 1.0, rngs=nnx.Rngs(0)),
    "the denoiser of windows is trained, by fit_denoiser": lambda d: ndp.EM(
        model, optax.adam(1e-3)
    ).init(KEY, ndp.DiffusionPrior(WindowDenoiser(d, 9)), jnp.zeros(3)),
    "condition the prior of the long events": lambda _: WindowDenoiser(
        ConditionedDenoiser(network(5, context_shape=(3,)), jnp.ones(3)), 9
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(ValueError, match=message):
        REFUSALS[message](ndp.GaussianDenoiser(np.zeros((4, 2)), np.eye(8)))
