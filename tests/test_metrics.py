import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from numpyro_diffprior.metrics.frechet import frechet_distance
from numpyro_diffprior.metrics.ranks import coverage, sbc_ranks, sbc_uniformity_pvalue
from numpyro_diffprior.metrics.scores import crps

SINGLE = jnp.zeros(()).dtype == jnp.float32
RTOL = 1e-4 if SINGLE else 1e-8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class TestFrechetDistance:
    def test_matches_scipy(self):
        x, y = normal(1, 200, 6) @ normal(3, 6, 6), 1 + normal(2, 150, 6) @ normal(4, 6, 6)
        cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = scipy.linalg.sqrtm(cov_x.astype(np.float64) @ cov_y.astype(np.float64)).real
        expected = np.sum((np.mean(x, 0) - np.mean(y, 0)) ** 2) + np.trace(
            cov_x + cov_y - 2 * root
        )
        np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=RTOL)

    def test_shift_and_scale(self):
        x, shift = normal(1, 100, 4), jnp.arange(4.0)
        np.testing.assert_allclose(frechet_distance(x, x + shift), 14.0, rtol=RTOL)
        variance = jnp.sum(jnp.var(x, axis=0, ddof=1))
        centered = x - jnp.mean(x, axis=0)
        actual = frechet_distance(centered, 3 * centered)
        np.testing.assert_allclose(actual, 4 * variance, rtol=RTOL)

    def test_gaussians(self):
        n, deviations = 50_000, jnp.array([1.0, 2.0, 3.0])
        actual = frechet_distance(normal(1, n, 3), 1 + deviations * normal(2, n, 3))
        # 3 (means) + 0 + 1 + 4; delta method on means and deviations, each a few over sqrt(n)
        error = 2 * np.sqrt(sum((1 + s**2) * (1 + (s - 1) ** 2 / 2) for s in (1, 2, 3)) / n)
        np.testing.assert_allclose(actual, 8.0, atol=4 * error)

    def test_full_precision_with_singular_covariances(self):
        # 40 features of rank 3: roots of the eigenvalues of the product would be off by 1e-3
        basis = normal(3, 3, 40)
        x = normal(1, 300, 3) @ basis
        scale = jnp.sum(jnp.var(x, axis=0))
        assert abs(frechet_distance(x, x)) < (1e-5 if SINGLE else 1e-12) * scale

    def test_fewer_events_than_features(self):
        x = normal(1, 5, 12)
        np.testing.assert_allclose(frechet_distance(x, x + 1), 12.0, rtol=RTOL)

    def test_rejects(self):
        for x, y in [((5, 2), (5, 3)), ((5, 2), (1, 2)), ((5,), (5,))]:
            with pytest.raises(ValueError, match="features with shapes"):
                frechet_distance(jnp.zeros(x), jnp.zeros(y))


class TestCalibration:
    """A Gaussian model: x ~ N(0, 1) and y | x ~ N(x, s^2)."""

    num, noise = 4_000, 0.5

    def draws(self, num_draws, widen=1.0, bias=0.0):
        truth = normal(1, self.num)
        y = truth + self.noise * normal(2, self.num)
        variance = self.noise**2 / (1 + self.noise**2)
        mean = y / (1 + self.noise**2) + bias
        return truth, mean + widen * jnp.sqrt(variance) * normal(3, num_draws, self.num)

    # with 19 draws the bounds at 0.9 are the smallest and the largest
    @pytest.mark.parametrize("num_draws", [19, 199])
    def test_exact_draws_cover(self, num_draws):
        truth, samples = self.draws(num_draws)
        levels = np.array([0.5, 0.9])
        error = np.sqrt(levels * (1 - levels) / self.num)
        actual = coverage(samples, truth)
        assert actual.shape == (2,)
        assert np.all(np.abs(actual - levels) < 4 * error)

    @pytest.mark.parametrize("widen", [0.5, 2.0])
    def test_wrong_draws_cover_as_they_should(self, widen):
        truth, samples = self.draws(999, widen=widen)
        levels = (0.5, 0.9)
        expected = np.array(
            [
                2 * scipy.stats.norm.cdf(widen * scipy.stats.norm.ppf((1 + p) / 2)) - 1
                for p in levels
            ]
        )
        error = np.sqrt(expected * (1 - expected) / self.num)
        np.testing.assert_array_less(
            np.abs(coverage(samples, truth, levels=levels) - expected), 4 * error + 2e-3
        )

    def test_events_and_mask(self):
        truth = jnp.array([[0.0, 10.0], [0.0, 10.0]])
        samples = jnp.linspace(-1, 1, 101)[:, None, None] + jnp.zeros((2, 2))
        np.testing.assert_allclose(coverage(samples, truth, levels=(0.5,)), [0.5])
        mask = jnp.array([True, False])
        np.testing.assert_allclose(coverage(samples, truth, levels=(0.5,), where=mask), [1.0])
        np.testing.assert_allclose(coverage(samples, truth, levels=(0.5,), where=~mask), [0.0])

    def test_interval_ends_at_order_statistics(self):
        samples = jnp.arange(1.0, 20.0)
        inside = [float(coverage(samples, jnp.array(t), levels=(0.5,))[0]) for t in (4, 5, 15, 16)]
        assert inside == [0, 1, 1, 0]

    def test_nan_is_a_miss(self):
        samples = jnp.zeros((9, 2)).at[0, 0].set(jnp.nan)
        np.testing.assert_allclose(coverage(samples, jnp.zeros(2), levels=(0.5,)), [0.5])

    def test_coverage_rejects(self):
        with pytest.raises(ValueError, match=r"got \(9, 3\) and \(2,\)"):
            coverage(jnp.zeros((9, 3)), jnp.zeros(2))
        with pytest.raises(ValueError, match="levels between 0 and 1"):
            coverage(jnp.zeros((9, 3)), jnp.zeros(3), levels=(1.0,))
        with pytest.raises(ValueError, match="levels up to 0.8 with 9 draws"):
            coverage(jnp.zeros((9, 3)), jnp.zeros(3), levels=(0.9,))

    def test_ranks_by_hand(self):
        samples = jnp.array([[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]])
        ranks = sbc_ranks(samples, jnp.array([[-1.0, 4.0]]))
        assert jnp.issubdtype(ranks.dtype, jnp.integer)
        np.testing.assert_array_equal(ranks, [[0, 2]])

    def test_ranks_of_ties_are_uniform(self):
        samples, truth = jnp.zeros((2000, 9, 2)).at[..., 1].set(1.0), jnp.zeros((2000, 2))
        np.testing.assert_array_equal(sbc_ranks(samples, truth), 0)
        ranks = sbc_ranks(samples, truth, rng_key=jax.random.key(0))
        assert sbc_uniformity_pvalue(ranks[:, 0], 9) > 0.01
        np.testing.assert_array_equal(ranks[:, 1], 0)

    # 30 ranks in 20 bins: the bins' widths differ
    @pytest.mark.parametrize(("num_draws", "num_bins"), [(19, 10), (29, 20), (9, 10)])
    def test_pvalue_matches_scipy(self, num_draws, num_bins):
        truth, samples = self.draws(num_draws, widen=1.05)
        ranks = sbc_ranks(samples.T, truth)
        bins = np.asarray(ranks) * num_bins // (num_draws + 1)
        widths = np.bincount(
            np.arange(num_draws + 1) * num_bins // (num_draws + 1), minlength=num_bins
        )
        expected = scipy.stats.chisquare(
            np.bincount(bins, minlength=num_bins), self.num * widths / (num_draws + 1)
        ).pvalue
        actual = sbc_uniformity_pvalue(ranks, num_draws, num_bins=num_bins)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)

    def test_pvalues_of_exact_draws_are_uniform(self):
        num_draws, shape = 29, (10, 12)
        values = normal(7, 300, num_draws + 1, *shape)
        ranks = sbc_ranks(values[:, 1:], values[:, 0])
        pvalues = sbc_uniformity_pvalue(ranks, num_draws, num_bins=6)
        assert pvalues.shape == shape
        assert scipy.stats.kstest(np.ravel(pvalues), "uniform").pvalue > 1e-3

    @pytest.mark.parametrize("wrong", [{"widen": 0.7}, {"widen": 1.4}, {"bias": 0.1}])
    def test_pvalue_of_wrong_draws(self, wrong):
        truth, samples = self.draws(29, **wrong)
        assert sbc_uniformity_pvalue(sbc_ranks(samples.T, truth), 29) < 1e-6

    def test_ranks_reject(self):
        with pytest.raises(ValueError, match=r"got \(3, 9, 2\) and \(3,\)"):
            sbc_ranks(jnp.zeros((3, 9, 2)), jnp.zeros(3))
        with pytest.raises(ValueError, match="integer ranks"):
            sbc_uniformity_pvalue(jnp.zeros(9), 9)
        with pytest.raises(ValueError, match="num_bins from 2 to 10, got 11"):
            sbc_uniformity_pvalue(jnp.zeros(9, int), 9, num_bins=11)
        with pytest.raises(ValueError, match="ranks from 0 to num_draws = 9, got 0 to 10"):
            sbc_uniformity_pvalue(jnp.array([0, 10]), 9)


def test_crps_of_few_draws():
    """Without bias, it is E|X - t| - E|X - X'| / 2; both are known for two draws."""
    draws, truth = jnp.array([[0.0, 3.0], [2.0, -1.0]]), jnp.array([0.5, 1.0])
    np.testing.assert_allclose(crps(draws, truth), [1 - 1, 2 - 2])
    x = jax.random.normal(jax.random.key(0), (7, 5))
    pairs = jnp.abs(x[:, None] - x[None]).sum((0, 1)) / (7 * 6)
    expected = jnp.abs(x - 0.3).mean(0) - pairs / 2
    np.testing.assert_allclose(crps(x, jnp.full(5, 0.3)), expected, atol=1e-6)


def test_crps_of_normal_draws():
    """Gneiting and Raftery (2007), equation 21; in any unit."""
    truth = np.array([-1.0, 0.0, 2.5])
    x = jax.random.normal(jax.random.key(1), (20_000, 3))
    pdf, cdf = scipy.stats.norm.pdf(truth), scipy.stats.norm.cdf(truth)
    expected = truth * (2 * cdf - 1) + 2 * pdf - 1 / np.sqrt(np.pi)
    for unit in (1.0, 1e-26, 1e12):
        np.testing.assert_allclose(crps(unit * x, unit * truth) / unit, expected, atol=0.02)


def test_crps_is_refused():
    for samples, truth in ((np.zeros((1, 3)), np.zeros(3)), (np.zeros((4, 3)), np.zeros(2))):
        with pytest.raises(ValueError, match="crps: expected samples with shape"):
            crps(samples, truth)
