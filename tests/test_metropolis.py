"""Fitted proposals, with exact densities in the place of estimates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffprior.particles.metropolis import FittedProposal, Independent, adapt, propose
from tests.oracles import spd

SIZE = 3
COV = spd(np.random.default_rng(0), SIZE, low=1e-3, high=4.0)
PRECISION = np.linalg.inv(COV)
MEAN = np.array([3.0, 0.0, -1.0])
WARMUP_ENDS = np.cumsum([50, 100, 200, 400, 800])
ELSEWHERE = Independent(
    sample=lambda key: 1 + 4 * jax.random.normal(key, (SIZE,)),
    log_prob=lambda x: -jnp.sum((x - 1) ** 2) / 32,
)


def make_chain(num_steps, *, num_warmup=0, independent=None, unit=1.0):
    """Return a function to draw chains of a normal distribution, from zero."""

    def log_density(x):
        shift = x / unit - MEAN
        return -jnp.einsum("i,ij,j->", shift, PRECISION, shift) / 2

    def update(carry, inputs):
        x, proposal = carry
        key, i = inputs
        key_proposal, key_accept = jax.random.split(key)
        proposed = propose(key_proposal, proposal, x, independent)
        log_ratio = log_density(proposed.x) - log_density(x) + proposed.log_ratio
        accept_prob = jnp.exp(jnp.minimum(log_ratio, 0))
        moved = jax.random.uniform(key_accept) < accept_prob
        x = jnp.where(moved, proposed.x, x)
        adapted = adapt(
            proposal,
            x,
            accept_prob,
            is_step=proposed.is_step,
            moved=moved,
            is_last=jnp.isin(i, WARMUP_ENDS),
        )
        proposal = jax.tree.map(partial(jnp.where, i < num_warmup), adapted, proposal)
        return (x, proposal), (x, accept_prob, proposed.is_step)

    @jax.jit
    def sample(key, proposal):
        keys = jax.random.split(key, num_warmup + num_steps)
        start = jnp.zeros(SIZE), proposal
        (_, proposal), states = jax.lax.scan(update, start, (keys, jnp.arange(len(keys))))
        return jax.tree.map(lambda leaf: leaf[num_warmup:], states), proposal

    return sample


@pytest.mark.parametrize("independent", [None, ELSEWHERE])
def test_the_target_is_invariant(independent):
    """Whatever the proposals: steps of another size, and independent ones about another place."""
    proposal = FittedProposal.start(jnp.ones(SIZE), 0.3 * jnp.eye(SIZE))
    sample = jax.vmap(make_chain(5000, independent=independent), in_axes=(0, None))
    (x, _, _), _ = sample(jax.random.split(jax.random.key(0), 64), proposal)
    white = np.linalg.solve(np.linalg.cholesky(COV), (np.asarray(x[:, 2000:]) - MEAN)[..., None])
    for power, expected in ((1, 0.0), (2, 1.0)):
        means = (white[..., 0] ** power).mean(1)
        error = means.std(0) / np.sqrt(len(means))
        assert np.all(np.abs(means.mean(0) - expected) < 4 * error)


def test_warmup_finds_mean_and_covariance():
    sample = make_chain(4000, num_warmup=1700)
    proposal = FittedProposal.start(jnp.zeros(SIZE), jnp.eye(SIZE))
    (x, accept_prob, is_step), proposal = sample(jax.random.key(0), proposal)
    shape = np.linalg.solve(np.linalg.cholesky(COV), proposal.root)
    assert np.all(np.abs(np.linalg.svd(shape, compute_uv=False) - 1) < 0.4)
    assert np.abs(np.linalg.solve(np.linalg.cholesky(COV), proposal.mean - MEAN)).max() < 0.5
    assert 0.1 < accept_prob[is_step].mean() < 0.25
    assert accept_prob[~is_step].mean() > 0.5
    np.testing.assert_allclose(x.std(0), np.sqrt(np.diag(COV)), rtol=0.15)


def test_units_do_not_matter():
    """A power of two changes no digit."""
    draws = []
    for unit in (1.0, 2.0**-86):
        sample = make_chain(50, num_warmup=400, unit=unit)
        proposal = FittedProposal.start(jnp.zeros(SIZE), unit * jnp.eye(SIZE))
        draws.append(np.asarray(sample(jax.random.key(0), proposal)[0][0]) / unit)
    np.testing.assert_array_equal(*draws)


def test_a_window_without_moves_changes_nothing():
    proposal = FittedProposal.start(jnp.zeros(SIZE), jnp.eye(SIZE))
    for is_last in (False, True):
        proposal = adapt(
            proposal,
            jnp.zeros(SIZE),
            jnp.zeros(()),
            is_step=jnp.array(True),
            moved=jnp.array(False),
            is_last=jnp.array(is_last),
        )
    np.testing.assert_array_equal(proposal.root, np.eye(SIZE))
    assert proposal.log_scale < 0
