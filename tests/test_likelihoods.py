"""Likelihoods against dense matrices, and non-linear means against their Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.stats import multivariate_normal

from numpyro_diffprior.guidance.likelihood import Likelihood, ObservationMoments, linear_gaussian
from numpyro_diffprior.linalg.covariances import Diagonal, Isotropic

EVENT = (2, 3)
TOL = oracles.tolerance()


def linear(num_observed, batch, *, shared=False, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(*(() if shared else batch), num_observed, 6))
    y = rng.normal(size=(*batch, num_observed))
    noise = oracles.covariance("Dense", rng, num_observed)
    likelihood = linear_gaussian(jnp.asarray(y), jnp.asarray(matrix), noise, EVENT)
    return likelihood, matrix, y, rng


@pytest.mark.parametrize("extra", [(), (5,), (2, 1)])
@pytest.mark.parametrize(
    ("num_observed", "batch", "shared"), [(3, (4,), False), (8, (4,), False), (3, (), True)]
)
def test_linear_operator(num_observed, batch, shared, extra):
    likelihood, matrix, y, rng = linear(num_observed, batch, shared=shared)
    x = jnp.asarray(rng.normal(size=(*extra, *batch, *EVENT)))
    flat = np.asarray(x).reshape(*extra, *batch, 6)
    u = jnp.asarray(rng.normal(size=(*extra, *batch, num_observed)))
    local = likelihood.linearize(x)

    assert likelihood.batch_shape == batch
    assert likelihood.num_observed == num_observed
    expected = y - np.einsum("...md,...d->...m", matrix, flat)
    np.testing.assert_allclose(local.residual, expected, atol=10 * TOL)
    np.testing.assert_allclose(local.matvec(jnp.asarray(flat)), y - expected, atol=10 * TOL)
    expected = np.einsum("...md,...m->...d", matrix, u)
    np.testing.assert_allclose(local.transpose(u), expected, atol=10 * TOL)
    expected = np.broadcast_to(matrix, (*extra, *batch, num_observed, 6))
    np.testing.assert_allclose(likelihood.operator(x), expected, atol=TOL)


def test_linear_log_prob():
    likelihood, matrix, y, rng = linear(3, (4,))
    x = rng.normal(size=(5, 4, *EVENT))
    noise = np.asarray(likelihood.read(jnp.asarray(x))[1].dense(), np.float64)
    expected = [
        [
            multivariate_normal.logpdf(y[i], matrix[i] @ x[k, i].reshape(-1), noise)
            for i in range(4)
        ]
        for k in range(5)
    ]
    np.testing.assert_allclose(likelihood.log_prob(jnp.asarray(x)), expected, rtol=10 * TOL)


@pytest.mark.parametrize("num_observed", [4, 9])
def test_nonlinear_mean(num_observed):
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(num_observed, 6)))
    y = jnp.asarray(rng.normal(size=(3, num_observed)))

    def mean_one(x):
        product = jnp.matmul(weight, x.reshape(-1), precision="highest")
        return jnp.sin(product) * jnp.sum(x**2)

    def read(x):
        y_hat = jnp.vectorize(mean_one, signature="(a,b)->(m)")(x)
        return ObservationMoments(y_hat, Diagonal(0.1 + y_hat**2), y)

    likelihood = Likelihood(y, read, lambda x: jnp.zeros(x.shape[:-2]), EVENT)
    x = jnp.asarray(rng.normal(size=(2, 3, *EVENT)))
    local = jax.jit(lambda x: likelihood.linearize(x).residual)(x)
    jacobian = jax.vmap(jax.vmap(jax.jacfwd(mean_one)))(x).reshape(2, 3, num_observed, 6)
    y_hat = jax.vmap(jax.vmap(mean_one))(x)
    np.testing.assert_allclose(local, y - y_hat, atol=10 * TOL)
    np.testing.assert_allclose(likelihood.operator(x), jacobian, atol=10 * TOL)
    noise = likelihood.linearize(x).noise
    np.testing.assert_allclose(noise.diagonal(), 0.1 + y_hat**2, rtol=10 * TOL)


@pytest.mark.parametrize(("rows", "columns", "size"), [(4, 6, 3), (3, 5, 3), (3, 6, 4)])
def test_linear_gaussian_errors(rows, columns, size):
    with pytest.raises(
        ValueError, match=r"matrix of shape \(..., 3, 6\) and noise of size 3; got"
    ):
        linear_gaussian(jnp.ones(3), jnp.ones((rows, columns)), Isotropic(1.0, size), EVENT)


def blur(frequency_response):
    """A periodic convolution of images, and its largest eigenvalue squared."""

    def f(x):
        return jnp.fft.ifft2(jnp.fft.fft2(x) * frequency_response).real

    return f, float(np.abs(frequency_response).max() ** 2)


def operators(size):
    """Operators on images as functions, each with the square of its largest singular value."""
    rng = np.random.default_rng(0)
    mask, gains = rng.random((size, size)) < 0.25, rng.uniform(0.1, 3, (size, size))
    matrix = rng.normal(size=(20, size**2)) / size
    pixel = np.zeros((size, size))
    pixel[size // 2, size // 3] = 1
    frequencies = 2 * np.pi * np.fft.fftfreq(size)
    cosines = np.cos(frequencies)
    low = np.exp(-2 * (frequencies[:, None] ** 2 + frequencies**2))
    return {
        "mask": (lambda x: mask * x, 1.0),
        "gains": (lambda x: gains * x, gains.max() ** 2),
        "one pixel": (lambda x: pixel * x, 1.0),
        "sum": (lambda x: x.sum((-1, -2), keepdims=True), size**2),
        "sums of rows": (lambda x: x.sum(-1), size),
        "matrix": (
            lambda x: x.reshape(*x.shape[:-2], -1) @ matrix.T,
            np.linalg.norm(matrix, 2) ** 2,
        ),
        "low frequencies": blur(low),
        "high frequencies": blur(1 - low),
        "Laplacian": blur(4 - 2 * cosines[:, None] - 2 * cosines),
    }


# At the size of the digits, and at that of images.
@pytest.mark.parametrize("size", [2, 8, 28])
@pytest.mark.parametrize("name", operators(8))
def test_largest_precision(name, size):
    """A few power iterations find its order of magnitude."""
    operator, square = operators(size)[name]
    scale = 0.1

    def read(x):
        y_hat = operator(x).reshape(*x.shape[:-2], -1)
        return ObservationMoments(
            y_hat, Isotropic(scale**2, y_hat.shape[-1]), jnp.zeros_like(y_hat)
        )

    x = jnp.zeros((3, size, size))
    likelihood = Likelihood(read(x).y, read, lambda x: x.sum((-1, -2)), (size, size))
    found = float(likelihood.largest_precision(x)) * scale**2
    assert 0.7 * square < found < 1.1 * square
