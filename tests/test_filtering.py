"""Filtered states beside those of a Kalman filter."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import numpyro_diffprior as ndp
from examples import filtering

pytestmark = pytest.mark.slow


def test_filtering(tmp_path):
    args = filtering.parse_args(
        "--num-pairs 64 --num-sgd-steps 8 --batch-size 16 --width 8 --num-sequences 2 --length 4"
        " --num-states 24 --num-particles 2 --num-equations 24 --num-steps 4"
        f" --output {tmp_path}".split()
    )
    result = filtering.main(args)
    assert set(result["table"]) == set(filtering.LABELS)
    assert all(np.isfinite(list(row.values())).all() for row in result["table"].values())
    assert (tmp_path / "filtering.png").stat().st_size > 10_000


@jax.tree_util.register_static
@dataclass(frozen=True)
class LinearTransitions:
    """The network of a state N(A c, Q) that follows the state c."""

    matrix: tuple = ((0.9, 0.4), (-0.4, 0.9))
    variance: float = 0.1
    event_shape: tuple = (2,)
    context_shape: tuple = (2,)

    def __call__(self, x, noise, context, *, rngs=None):
        variance = jnp.exp(8 * noise)[:, None]
        x_t = x * jnp.sqrt(1 + variance)
        mean = context @ jnp.asarray(self.matrix).T
        exact = mean + self.variance / (self.variance + variance) * (x_t - mean)
        return (exact - x_t / (1 + variance)) * jnp.sqrt((1 + variance) / variance)


def filter_by_kalman(transitions, noise, y):
    """Means and covariances of states of one sequence from N(0, I), and the log-evidence."""
    matrix, variance = np.array(transitions.matrix), transitions.variance
    mean, cov, moments, evidence = np.zeros(2), np.eye(2), [], 0.0
    for value in y:
        mean, cov = matrix @ mean, matrix @ cov @ matrix.T + variance * np.eye(2)
        total = cov[0, 0] + noise**2
        evidence += norm.logpdf(value, mean[0], total**0.5)
        gain = cov[:, 0] / total
        mean, cov = mean + gain * (value - mean[0]), cov - np.outer(gain, cov[0])
        moments.append((mean, cov))
    return *map(np.stack, zip(*moments)), evidence


@pytest.mark.parametrize("guidance", [ndp.MMPS(), None])
def test_filtered_states_have_the_closed_form(guidance):
    """Also if guidance takes the covariance of all states for that of the transitions."""
    transitions, noise, num = LinearTransitions(), 0.3, 1024
    prior = ndp.DiffusionPrior(
        ndp.NetworkDenoiser(transitions), sampler=ndp.samplers.MultistepSDE(32)
    )
    y = np.array([[0.5, 1.0, 0.2, -1.5], [-0.5, 0.3, 0.8, 1.0]])
    # Four filters for each sequence, since each has an error of its own.
    start = jax.random.normal(jax.random.key(0), (8, num, 2))
    x, evidence = filtering.filter_states(
        jax.random.key(1),
        prior,
        start,
        noise,
        jnp.asarray(np.repeat(y, 4, axis=0), "float32"),
        num_particles=8,
        guidance=guidance,
    )
    assert x.shape == (num, 8, 4, 2)
    for i in range(2):
        own = slice(4 * i, 4 * i + 4)
        mean, cov, exact = filter_by_kalman(transitions, noise, y[i])
        np.testing.assert_allclose(x[:, own].mean((0, 1)), mean, atol=0.1)
        for t in range(4):
            found = np.mean([np.cov(x[:, j, t].T) for j in range(own.start, own.stop)], axis=0)
            np.testing.assert_allclose(found, cov[t], atol=0.1)
        np.testing.assert_allclose(np.exp(evidence[own] - exact).mean(), 1, atol=0.25)
