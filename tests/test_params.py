"""Parameters of the likelihood, from fixed draws, against their most likely values."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

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
