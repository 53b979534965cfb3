import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from numpyro_diffprior.metrics.transport import (
    entropic_transport,
    entropic_transport_cost,
    excess_transport_cost,
    max_sliced_wasserstein,
    sinkhorn_divergence,
    sliced_wasserstein,
)

KEY = jax.random.key(0)
SINGLE = jnp.zeros(()).dtype == jnp.float32
RTOL = 1e-4 if SINGLE else 1e-8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def dense_sinkhorn(x, y, regularization, num_steps=3_000):
    """Plain iterations in double precision: transport cost, and cost plus relative entropy."""
    x, y = (np.asarray(z, dtype=np.float64).reshape(len(z), -1) for z in (x, y))
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    kernel = np.exp(-cost / regularization)
    a, b = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
    v = np.ones(len(y))
    for _ in range(num_steps):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    relative = scipy.special.xlogy(plan, plan / np.outer(a, b)).sum()
    return (plan * cost).sum(), (plan * cost).sum() + regularization * relative


class TestSlicedWasserstein:
    @pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 4), (5, 3), (1, 8)])
    def test_one_dimension_matches_scipy(self, n, m):
        x, y = normal(1, n, 1), 1 + 2 * normal(2, m, 1)
        expected = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0])
        actual = sliced_wasserstein(KEY, x, y, num_projections=3, p=1)
        np.testing.assert_allclose(actual, expected, rtol=RTOL)

    @pytest.mark.parametrize("p", [1, 1.5, 2])
    def test_unequal_sizes_match_repeated_points(self, p):
        x, y = normal(1, 6, 3), normal(2, 4, 3)
        repeated = jnp.repeat(x, 2, axis=0), jnp.repeat(y, 3, axis=0)
        expected = sliced_wasserstein(KEY, *repeated, p=p)
        np.testing.assert_allclose(sliced_wasserstein(KEY, x, y, p=p), expected, rtol=RTOL)

    def test_one_dimensional_gaussians(self):
        n = 20_000
        x, y = normal(1, n, 1), 1 + 2 * normal(2, n, 1)
        # W_2^2 = (difference of means)^2 + (difference of deviations)^2; the estimate of its root
        # has a standard error below the sum of those of the two moments
        error = np.sqrt((1 + 4) / n) + np.sqrt((1 + 4) / (2 * n))
        actual = sliced_wasserstein(KEY, x, y, num_projections=1)
        np.testing.assert_allclose(actual, np.sqrt(2.0), atol=4 * error)

    def test_shift_of_a_cloud(self):
        x = normal(1, 50, 2, 3)
        shift = normal(3, 2, 3)
        directions = jax.random.normal(KEY, (64, 6))
        directions /= jnp.linalg.norm(directions, axis=-1, keepdims=True)
        expected = jnp.sqrt(jnp.mean((directions @ shift.ravel()) ** 2))
        actual = sliced_wasserstein(KEY, x, x + shift, num_projections=64)
        np.testing.assert_allclose(actual, expected, rtol=RTOL)

    def test_many_directions_average_the_shift(self):
        x, shift = normal(1, 20, 4), jnp.array([2.0, 0.0, 0.0, 0.0])
        num = 20_000
        squared = sliced_wasserstein(KEY, x, x + shift, num_projections=num) ** 2
        # u^2 is Beta(1/2, 3/2) for a coordinate u of a uniform direction
        error = 4 * scipy.stats.beta(0.5, 1.5).std() / np.sqrt(num)
        np.testing.assert_allclose(squared, 4 / 4, atol=4 * error)

    def test_follows_the_dtype_and_the_key(self):
        x, y = normal(1, 9, 2).astype(jnp.float32), normal(2, 9, 2).astype(jnp.float32)
        actual = sliced_wasserstein(KEY, x, y)
        assert actual.dtype == jnp.float32
        assert actual == sliced_wasserstein(KEY, x, y)
        assert actual != sliced_wasserstein(jax.random.key(1), x, y)

    def test_identical_clouds(self):
        x = normal(1, 9, 2)
        assert sliced_wasserstein(KEY, x, x[::-1]) == 0
        assert max_sliced_wasserstein(KEY, x, x[::-1]) == 0

    @pytest.mark.parametrize("p", [1, 2])
    def test_max_sliced_finds_the_shift(self, p):
        x, shift = normal(1, 100, 10), normal(3, 10)
        actual = max_sliced_wasserstein(KEY, x, x + shift, num_projections=32, p=p)
        np.testing.assert_allclose(actual, jnp.linalg.norm(shift), rtol=1e-4)

    def test_max_sliced_finds_the_stretched_axis(self):
        x = normal(1, 500, 8)
        y = x.at[:, 3].multiply(4)
        # along e_3 both clouds are sorted alike
        axis = jnp.sqrt(jnp.mean((3 * x[:, 3]) ** 2))
        random = max_sliced_wasserstein(KEY, x, y, num_steps=0)
        refined = max_sliced_wasserstein(KEY, x, y)
        assert random < refined
        assert axis * 0.999 < refined

    @pytest.mark.parametrize("function", [sliced_wasserstein, max_sliced_wasserstein])
    def test_rejects(self, function):
        x = jnp.zeros((3, 2))
        with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\)"):
            function(KEY, x, jnp.zeros((3, 4)))
        with pytest.raises(ValueError, match="non-empty"):
            function(KEY, x, jnp.zeros((0, 2)))
        with pytest.raises(ValueError, match="expected p >= 1, got 0.5"):
            function(KEY, x, x, p=0.5)
        with pytest.raises(ValueError, match="num_projections >= 1, got 0"):
            function(KEY, x, x, num_projections=0)
        with pytest.raises(ValueError, match="num_refined >= 1"):
            max_sliced_wasserstein(KEY, x, x, num_refined=0)


class TestSinkhorn:
    def test_costs_match_dense_iterations(self):
        x, y = 0.5 * normal(1, 40, 2, 1), 0.2 + 0.5 * normal(2, 30, 2, 1)
        result = entropic_transport(x, y, regularization=0.1, tolerance=1e-5)
        cost, regularized = dense_sinkhorn(x, y, 0.1)
        assert result.converged
        np.testing.assert_allclose(result.cost, cost, rtol=1e-3)
        np.testing.assert_allclose(result.regularized_cost, regularized, rtol=1e-4)
        scalar = entropic_transport_cost(x, y, regularization=0.1, tolerance=1e-5)
        np.testing.assert_allclose(scalar, result.cost, rtol=1e-6)

    def test_divergence_of_identical_clouds(self):
        x = normal(1, 64, 5)
        assert abs(sinkhorn_divergence(x, x)) < 1e-4

    @pytest.mark.parametrize("regularization", [0.05, 1.0])
    def test_divergence_of_a_shift(self, regularization):
        x, shift = normal(1, 64, 3), jnp.array([0.5, -1.0, 0.2])
        actual = sinkhorn_divergence(x, x + shift, regularization=regularization)
        np.testing.assert_allclose(actual, jnp.sum(shift**2), rtol=2e-3)

    def test_divergence_matches_dense_iterations(self):
        x, y = 0.5 * normal(1, 30, 2), 0.2 + 0.4 * normal(2, 40, 2)
        xy, xx, yy = (dense_sinkhorn(*c, 0.2)[1] for c in ((x, y), (x, x), (y, y)))
        actual = sinkhorn_divergence(x, y, regularization=0.2, tolerance=1e-5)
        np.testing.assert_allclose(actual, xy - (xx + yy) / 2, rtol=1e-3)

    def test_excess_is_zero_for_more_truth_and_positive_for_a_shift(self):
        truth, other = normal(1, 64, 2), normal(2, 64, 2)
        excess = excess_transport_cost(other, truth, other, regularization=0.1)
        assert excess == 0
        shift = jnp.array([3.0, 0.0])
        mean_difference = jnp.mean(other - truth, axis=0)
        # exact for the squared cost, whatever the plan
        expected = jnp.sum(shift**2) + 2 * shift @ mean_difference
        excess = excess_transport_cost(
            other + shift, truth, other, regularization=0.1, tolerance=1e-4
        )
        np.testing.assert_allclose(excess, expected, rtol=1e-3)

    def test_follows_the_dtype_and_traces(self):
        x, y = normal(1, 16, 2).astype(jnp.float32), normal(2, 16, 2).astype(jnp.float32)
        eager = sinkhorn_divergence(x, y, regularization=0.5)
        traced = jax.jit(lambda x, y: sinkhorn_divergence(x, y, regularization=0.5))(x, y)
        assert eager.dtype == traced.dtype == jnp.float32
        np.testing.assert_allclose(eager, traced, rtol=1e-4)

    def test_warns_without_convergence(self):
        x, y = normal(1, 32, 2), normal(2, 32, 2)
        with pytest.warns(RuntimeWarning, match="did not converge in 10 steps"):
            entropic_transport_cost(x, y, regularization=1e-3, max_steps=10)
        assert not entropic_transport(x, y, regularization=1e-3, max_steps=10).converged

    def test_rejects(self, monkeypatch):
        x = jnp.zeros((3, 2))
        with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\)"):
            sinkhorn_divergence(x, jnp.zeros((3, 4)))
        with pytest.raises(ValueError, match="expected regularization > 0"):
            entropic_transport(x, x, regularization=0.0)
        with pytest.raises(ValueError, match="other_truth of one shape"):
            excess_transport_cost(x, x, x[:2])
        monkeypatch.setitem(sys.modules, "ott", None)
        with pytest.raises(ImportError, match=r"numpyro_diffprior\[metrics\]"):
            sinkhorn_divergence(x, x)

    @pytest.mark.slow
    def test_two_thousand_points_at_a_small_regularization(self):
        x = jax.random.uniform(KEY, (2048, 5), minval=-2, maxval=2)
        shift = jnp.array([0.1, 0.0, 0.0, 0.1, 0.0])
        result = entropic_transport(x, x + shift, regularization=0.01)
        assert result.converged
        actual = sinkhorn_divergence(x, x + shift, regularization=0.01)
        np.testing.assert_allclose(actual, 0.02, atol=2e-3)
