"""Parameters of the likelihood, from fixed draws, against their most likely values."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.handlers import substitute
from numpyro.infer.util import log_density

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.em.params import fit_params, init_params
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.reader import read

N, M, D = 40, 3, 2
PRIOR = DiffusionPrior(GaussianDenoiser(jnp.zeros(D), jnp.eye(D)))
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, M, N, D)))
Y = jnp.asarray(np.asarray(X[0]) + 0.3 * RNG.normal(size=(M, N, D)))
LABELS = jnp.asarray(RNG.choice(3, p=[0.5, 0.3, 0.2], size=(M, N)))


def model(prior, y, labels, subsample_size=None):
    noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
    shares = numpyro.param("shares", jnp.ones(3) / 3, constraint=dist.constraints.simplex)
    rows = numpyro.plate("rows", M, subsample_size=subsample_size, dim=-2)
    with rows, numpyro.plate("n", N, dim=-1):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)
        labels = numpyro.subsample(labels, event_dim=0)
        numpyro.sample("labels", dist.Categorical(shares), obs=labels)


def fit(num_steps, batch_size, *args, learning_rate=0.05):
    optimizer = optax.adam(learning_rate)
    bound = read(model, (PRIOR, *args), {}, block_size=lambda group: batch_size)
    params, opt_state = init_params(bound, optimizer)
    params, _ = fit_params(
        jax.random.key(0),
        bound.with_params(params),
        {"x": X},
        optimizer,
        opt_state,
        num_steps=num_steps,
    )
    return params


NOISE = np.sqrt(np.mean((np.asarray(Y) - np.asarray(X)) ** 2))
SHARES = np.bincount(np.asarray(LABELS).ravel(), minlength=3) / LABELS.size


def test_whole_plates():
    """Constraints are those of the sites: a simplex has one number less where it is free."""
    params = fit(400, N, Y, LABELS)
    np.testing.assert_allclose(params["noise"], NOISE, rtol=1e-3)
    np.testing.assert_allclose(params["shares"], SHARES, rtol=1e-3)


@pytest.mark.parametrize("subsample_size", [None, 2])
def test_minibatches(subsample_size):
    """Of one plate; the other is whole, even where the model would subsample it."""
    params = fit(1000, 2, Y, LABELS, subsample_size, learning_rate=0.005)
    assert abs(params["noise"] / NOISE - 1) < 0.05
    np.testing.assert_allclose(params["shares"], SHARES, atol=0.05)


def test_a_value_that_is_given_is_no_parameter():
    fixed = numpyro.handlers.substitute(model, data={"noise": jnp.asarray(0.2)})
    bound = read(fixed, (PRIOR, Y, LABELS), {})
    assert set(bound.reading.constraints) == {"shares"}
    params, _ = init_params(bound, optax.adam(0.1))
    np.testing.assert_allclose(params["shares"], 1 / 3, rtol=1e-6)


GAIN = np.array([[1.0, 0.5], [-0.3, 2.0]])
OFFSET = np.array([0.5, -1.0])


def linear(w, x):
    return x @ w["gain"] + w["offset"]


def tree(x):
    first = {"gain": jnp.eye(D), "offset": jnp.zeros(D)}
    return linear(numpyro.param("w", first), x)


def by_nnx(x):
    return nnx_module("net", nnx.Linear(D, D, rngs=nnx.Rngs(0)))(x)


def by_linen(x):
    return flax_module("net", linen.Dense(D), input_shape=(1, D))(x)


@pytest.mark.parametrize("forward", [tree, by_nnx, by_linen])
def test_trees_and_modules(forward):
    """A linear map, from exact draws: least squares."""

    def mapped(prior, y):
        with numpyro.plate("rows", M, dim=-2), numpyro.plate("n", N, dim=-1):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(forward(x), 0.1).to_event(1), obs=y)

    x = np.asarray(X[0])
    noise = 0.1 * np.random.default_rng(1).normal(size=x.shape)
    y = jnp.asarray(x @ GAIN + OFFSET + noise)
    optimizer = optax.adam(0.05)
    bound = read(mapped, (PRIOR, y), {}, block_size=lambda group: N)
    params, opt_state = init_params(bound, optimizer)
    params, _ = fit_params(
        jax.random.key(0),
        bound.with_params(params),
        {"x": X[:1]},
        optimizer,
        opt_state,
        num_steps=600,
    )
    design = np.concatenate([x.reshape(-1, D), np.ones((M * N, 1))], axis=1)
    best = np.linalg.lstsq(design, np.asarray(y).reshape(-1, D), rcond=None)[0]
    gain, offset = sorted(jax.tree.leaves(params), key=lambda leaf: -leaf.ndim)
    np.testing.assert_allclose(gain, best[:D], atol=1e-3)
    np.testing.assert_allclose(offset, best[D], atol=1e-3)
    # With these values, the model's density is that of the fitted map.
    fitted = substitute(mapped, data=params)
    density, _ = log_density(fitted, (PRIOR, y), {}, {"x": X[0]})
    residual = np.asarray(y) - (x @ best[:D] + best[D])
    expected = dist.Normal(0.0, 0.1).log_prob(residual).sum() + PRIOR.log_prob(X[0]).sum()
    np.testing.assert_allclose(density, expected, rtol=1e-3)
