"""Denoisers against dense formulas, Tweedie's formula and EDM's preconditioning."""

from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jax.scipy.stats import multivariate_normal

from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.linalg.covariances import Dense, Diagonal, Isotropic
from numpyro_diffprior.nets.mlp import MLP

SHAPES = [(), (6,), (2, 3), (1, 2, 3)]
SIGMAS = [0.7, np.array([0.05, 1.0, 30.0]), np.array([[0.1], [2.0]]), np.full((2, 3), 0.4)]
BATCH = (2, 3)
TOL = oracles.tolerance()


@jax.jit
def denoise(denoiser, x_t, sigma):
    return denoiser(x_t, sigma)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Linear:
    """A network that depends on everything it is given."""

    weight: jax.Array

    event_shape = (4,)

    def __call__(self, x, noise, *, rngs=None):
        return jnp.tanh(x @ self.weight + noise[:, None])


def over_batch(function, x_t, sigma, event_shape):
    """Apply a function of one flat event and its noise level to a batch."""
    flat = np.asarray(x_t, np.float64).reshape(*BATCH, -1)
    sigma = np.broadcast_to(sigma, BATCH)
    rows = [[function(flat[i, j], sigma[i, j]) for j in range(BATCH[1])] for i in range(BATCH[0])]
    return np.asarray(rows).reshape(*BATCH, *event_shape)


@pytest.mark.parametrize("name", oracles.COVARIANCES)
def test_gaussian_of_every_covariance(name):
    rng = np.random.default_rng(0)
    cov = oracles.covariance(name, rng, 6)
    mean, x_t = rng.normal(size=6), 2 * rng.normal(size=(*BATCH, 6))
    denoiser = GaussianDenoiser(mean, cov)
    for sigma in SIGMAS:
        expected = over_batch(
            lambda x, s: oracles.gaussian_denoiser(mean, oracles.dense(cov), x, s),
            x_t,
            sigma,
            (6,),
        )
        np.testing.assert_allclose(denoise(denoiser, x_t, sigma), expected, atol=3 * TOL)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_event_shape(shape):
    rng = np.random.default_rng(1)
    size = prod(shape)
    mean, matrix = rng.normal(size=shape), oracles.spd(rng, size)
    weights, means = np.array([0.2, 0.8]), rng.normal(size=(2, *shape))
    x_t = rng.normal(size=(*BATCH, *shape))
    gaussian = GaussianDenoiser(mean, matrix)
    mixture = MixtureDenoiser(weights, means, np.stack([matrix, 2 * matrix]))
    for denoiser, expected in [
        (gaussian, lambda x, s: oracles.gaussian_denoiser(mean.reshape(-1), matrix, x, s)),
        (
            mixture,
            lambda x, s: oracles.mixture_denoiser(
                weights, means.reshape(2, -1), [matrix, 2 * matrix], x, s
            ),
        ),
    ]:
        assert denoiser.event_shape == shape
        for sigma in SIGMAS:
            x_hat = denoise(denoiser, x_t, sigma)
            assert x_hat.dtype == denoiser.dtype == jnp.result_type(float)
            np.testing.assert_allclose(
                x_hat, over_batch(expected, x_t, sigma, shape), atol=3 * TOL
            )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", oracles.COVARIANCES)
def test_mixture_is_tweedie(name, shared):
    rng = np.random.default_rng(2)
    weights = jnp.array([1.0, 2.0, 3.0]) / 6
    means = jnp.asarray(3 * rng.normal(size=(3, 4)))
    each = [oracles.covariance(name, rng, 4) for _ in range(1 if shared else 3)]
    covs = each[0] if shared else jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    matrices = jnp.broadcast_to(covs.dense(), (3, 4, 4))
    denoiser = MixtureDenoiser(weights, means, covs)
    x_t = jnp.asarray(3 * rng.normal(size=(5, 4)))

    def log_density(x, sigma):
        noisy = matrices + sigma**2 * jnp.eye(4)
        parts = jax.vmap(lambda m, c: multivariate_normal.logpdf(x, m, c))(means, noisy)
        return jax.nn.logsumexp(parts + jnp.log(weights / weights.sum()))

    sigma = jnp.array([0.1, 0.5, 1.0, 3.0, 20.0])
    score = jax.jit(jax.vmap(jax.grad(log_density)))(x_t, sigma)
    x_hat = x_t + sigma[:, None] ** 2 * score
    np.testing.assert_allclose(denoise(denoiser, x_t, sigma), x_hat, atol=20 * TOL)
    unit = sigma[:, None] ** 2  # of the error of a score, for an error of the mean
    np.testing.assert_allclose(denoiser.score(x_t, sigma) * unit, score * unit, atol=20 * TOL)
    np.testing.assert_allclose(denoiser.weights, weights, rtol=TOL)


def test_mixture_summary_has_the_moments():
    rng = np.random.default_rng(3)
    means = rng.normal(size=(2, 3))
    matrices = np.stack([oracles.spd(rng, 3), oracles.spd(rng, 3)])
    denoiser = MixtureDenoiser([0.25, 0.75], means, matrices)
    mean = 0.25 * means[0] + 0.75 * means[1]
    second = [c + np.outer(m, m) for m, c in zip(means, matrices, strict=True)]
    cov = 0.25 * second[0] + 0.75 * second[1] - np.outer(mean, mean)
    np.testing.assert_allclose(denoiser.mean, mean, rtol=3 * TOL)
    np.testing.assert_allclose(denoiser.cov.dense(), cov, atol=3 * TOL)
    np.testing.assert_allclose(denoiser.scale, np.sqrt(np.trace(cov) / 3), rtol=3 * TOL)
    replaced = replace(denoiser, weights=jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(replaced.mean, means.mean(axis=0), rtol=TOL)


def test_far_from_all_components():
    denoiser = MixtureDenoiser([0.5, 0.5], [[-1.0], [1.0]], Isotropic(1e-4, 1))
    x_hat = denoiser(jnp.array([[1e4]]), 1e-2)
    np.testing.assert_allclose(x_hat, (1e4 + 1) / 2, rtol=1e-3)


def test_isotropic_network_is_edm_in_units_of_the_scale():
    rng = np.random.default_rng(4)
    net = Linear(jnp.asarray(rng.normal(size=(4, 4))))
    scale, mean = 2.5, rng.normal(size=4)
    x_t, sigma = rng.normal(size=(*BATCH, 4)), np.array([[0.01, 0.5, 2.0], [3.0, 10.0, 80.0]])
    denoiser = NetworkDenoiser(net, mean, Isotropic(scale**2, 4))

    x, level = (x_t - mean) / scale, sigma[..., None] / scale
    c_skip, c_in = 1 / (1 + level**2), 1 / np.sqrt(1 + level**2)
    net_out = np.tanh(c_in * x @ np.asarray(net.weight) + np.log(level) / 4)
    expected = mean + scale * (c_skip * x + level * c_in * net_out)
    np.testing.assert_allclose(denoise(denoiser, x_t, sigma), expected, atol=10 * TOL)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_untrained_network_is_its_gaussian(shape):
    rng = np.random.default_rng(5)
    mean, matrix = rng.normal(size=shape), oracles.spd(rng, 6)
    net = MLP(shape, features=(16,), embedding=8, rngs=nnx.Rngs(0))
    denoiser = NetworkDenoiser(net, mean, matrix)
    gaussian = GaussianDenoiser(mean, matrix)
    for batch, sigma in [((), 0.3), (BATCH, np.array([0.1, 1.0, 9.0]))]:
        x_t = rng.normal(size=(*batch, *shape))
        x_hat = denoise(denoiser, x_t, sigma)
        np.testing.assert_allclose(x_hat, denoise(gaussian, x_t, sigma), rtol=TOL, atol=TOL)


def test_default_network_has_a_standard_gaussian():
    net = MLP((3,), features=(8,), embedding=8, rngs=nnx.Rngs(0))
    denoiser = NetworkDenoiser(net)
    assert denoiser.scale == 1
    np.testing.assert_allclose(denoiser(jnp.ones((1, 3)), 1.0), 0.5 * np.ones((1, 3)))


def test_summary_moves_without_the_preconditioning():
    net = Linear(jnp.eye(4))
    denoiser = NetworkDenoiser(net, jnp.ones(4), Isotropic(4.0, 4))
    moved = denoiser.with_summary(jnp.zeros(4), Isotropic(9.0, 4))
    x_t = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(moved(x_t, 0.5), denoiser(x_t, 0.5))
    np.testing.assert_allclose(moved.scale, 3.0)
    np.testing.assert_array_equal(moved.mean, np.zeros(4))
    fitted = denoiser.with_gaussian(jnp.zeros(4), Isotropic(9.0, 4))
    expected = NetworkDenoiser(net, jnp.zeros(4), Isotropic(9.0, 4))
    np.testing.assert_array_equal(fitted(x_t, 0.5), expected(x_t, 0.5))


def test_training_mode_drops_out():
    net = MLP((3,), features=(16,), embedding=4, dropout=0.5, rngs=nnx.Rngs(0))
    x_t = jnp.ones((1, 3))

    def loss(net, rngs):
        return jnp.sum(NetworkDenoiser(net)(x_t, 1.0, rngs=rngs) ** 2)

    # New networks put out zero, whatever is dropped: compare the gradients.
    grads = [
        jax.tree.leaves(nnx.grad(loss)(net, rngs))
        for rngs in (None, None, nnx.Rngs(dropout=0), nnx.Rngs(dropout=1))
    ]
    equal = [all(bool(jnp.all(a == b)) for a, b in zip(grads[0], g, strict=True)) for g in grads]
    assert equal == [True, True, False, False]


def test_sigma_range():
    denoiser = GaussianDenoiser(jnp.zeros(3), Diagonal(jnp.array([1.0, 4.0, 25.0])))
    np.testing.assert_allclose(denoiser.scale, np.sqrt(10), rtol=TOL)
    np.testing.assert_allclose(denoiser.sigma_min, 1e-3 * np.sqrt(10), rtol=TOL)
    np.testing.assert_allclose(denoiser.sigma_max, 50.0, rtol=TOL)


def example(name):
    rng = np.random.default_rng(6)
    means, matrices = rng.normal(size=(2, 4)), np.stack([oracles.spd(rng, 4)] * 2)
    match name:
        case "Gaussian":
            return GaussianDenoiser(means[0], matrices[0])
        case "Mixture":
            return MixtureDenoiser([0.3, 0.7], means, matrices)
        case "Network":
            net = MLP((4,), features=(8,), embedding=8, rngs=nnx.Rngs(0))
            return NetworkDenoiser(net, means[0], Dense.from_matrix(jnp.asarray(matrices[0])))


@pytest.mark.parametrize("name", ["Gaussian", "Mixture", "Network"])
def test_is_a_pytree(name):
    denoiser = example(name)
    leaves, treedef = jax.tree.flatten(denoiser)
    x_t = jnp.ones((2, 4))
    rebuilt = jax.tree.unflatten(treedef, leaves)
    x_hat = denoise(denoiser, x_t, 0.5)
    np.testing.assert_array_equal(denoise(rebuilt, x_t, 0.5), x_hat)
    assert jax.tree.structure(rebuilt) == treedef
    jax.tree.unflatten(treedef, [object()] * len(leaves))  # what JAX does inside
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(denoiser)
    ]
    assert ".mean" in paths
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), denoiser)
    both = jax.jit(jax.vmap(lambda one: one(x_t, 0.5)))(stacked)
    np.testing.assert_allclose(both[1], x_hat, atol=TOL)


@pytest.mark.parametrize("name", ["Gaussian", "Mixture", "Network"])
def test_known_numbers_inside_of_a_traced_function(name):
    """Whether they are checked depends on the numbers, not on where the denoiser is made."""
    denoiser = example(name)
    x_t = jnp.ones((2, 4))
    x_hat = jax.jit(lambda x_t: replace(denoiser)(x_t, 0.5))(x_t)
    np.testing.assert_allclose(x_hat, denoise(denoiser, x_t, 0.5), atol=TOL)


def test_invalid_numbers_inside_of_a_traced_function():
    cov = Diagonal(jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="covariance that has negative variances"):
        jax.jit(lambda x_t: GaussianDenoiser(jnp.zeros(2), cov)(x_t, 1.0))(jnp.ones(2))


@pytest.mark.parametrize("name", ["Gaussian", "Mixture", "Network"])
def test_new_numbers_do_not_recompile(name):
    traces = []

    @jax.jit
    def apply(denoiser, x_t, sigma):
        traces.append(1)
        return denoiser(x_t, sigma)

    denoiser = example(name)
    first = apply(denoiser, jnp.ones((2, 4)), 0.5)
    other = jax.tree.map(lambda leaf: leaf + 1, denoiser)
    second = apply(other, jnp.ones((2, 4)), 0.5)
    assert len(traces) == 1
    assert not np.allclose(first, second)


def test_network_of_another_seed_does_not_recompile():
    traces = []

    @jax.jit
    def apply(denoiser, x_t):
        traces.append(1)
        return denoiser(x_t, 0.5)

    for seed in range(3):
        net = MLP((4,), features=(8,), embedding=8, dropout=0.1, rngs=nnx.Rngs(seed))
        apply(NetworkDenoiser(net), jnp.ones((2, 4)))
        apply(replace(example("Network"), net=net), jnp.ones((2, 4)))
    assert len(traces) == 2  # isotropic and dense


def test_one_dtype():
    denoiser = GaussianDenoiser(np.zeros(2, np.float32), np.eye(2))
    assert denoiser.dtype == jnp.float32
    assert denoiser(jnp.ones((1, 2), jnp.float32), 0.5).dtype == jnp.float32
    assert jnp.issubdtype(GaussianDenoiser([0, 1], np.eye(2)).dtype, jnp.floating)
    mixture = MixtureDenoiser([0.5, 0.5], np.zeros((2, 2), np.float32), np.eye(2))
    assert mixture(jnp.ones((1, 2), jnp.float32), 0.5).dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianDenoiser(jnp.zeros(3), jnp.eye(4)), r"shape \(3,\) need .* size 3.* 4"),
        (lambda: GaussianDenoiser(jnp.zeros(3), Isotropic(1.0, 4)), "GaussianDenoiser: .* size 4"),
        (lambda: MixtureDenoiser([1.0], jnp.zeros((2, 3)), jnp.eye(3)), r"\(1,\) and \(2, 3\)"),
        (lambda: MixtureDenoiser([0.5] * 2, jnp.zeros((2, 3)), jnp.eye(2)), "Mixture.* size 2"),
        (
            lambda: MixtureDenoiser([0.5] * 2, jnp.zeros((2, 3)), jnp.ones((3, 3, 3))),
            r"2 components .* got leading axes \(3,\)",
        ),
        (lambda: NetworkDenoiser(Linear(jnp.eye(4)), jnp.zeros(3), jnp.eye(3)), "network's.*mean"),
        (lambda: NetworkDenoiser(Linear(jnp.eye(4)), None, jnp.eye(3)), "NetworkDenoiser.*size 3"),
        (
            lambda: NetworkDenoiser(
                Linear(jnp.eye(4)), base=GaussianDenoiser(jnp.zeros(3), jnp.eye(3))
            ),
            r"network's .* base have shape \(3,\)",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
