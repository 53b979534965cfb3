"""Moments of NumPyro's distributions against those of their draws, and the table in the docs."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms

from numpyro_diffprior.reading.moments import gaussian_moments, handling

N = 3
LOC, SCALE = jnp.array([-0.5, 0.2, 1.0]), jnp.array([0.6, 1.0, 1.5])
PROBS = jnp.array([0.2, 0.5, 0.9])
LOGITS = jnp.array([-1.0, 0.0, 2.0])
RATES = jnp.array([0.8, 2.0, 5.0])
TRIL = jnp.array([[1.0, 0.0], [0.5, 0.8]])
WEIGHTS = jnp.array([0.2, 0.3, 0.5])

BY_ELEMENT = {
    "BernoulliLogits": lambda: dist.Bernoulli(logits=LOGITS),
    "BernoulliProbs": lambda: dist.Bernoulli(PROBS),
    "BinomialLogits": lambda: dist.Binomial(10, logits=LOGITS),
    "BinomialProbs": lambda: dist.Binomial(10, PROBS),
    "Chi2": lambda: dist.Chi2(RATES),
    "DiscreteUniform": lambda: dist.DiscreteUniform(jnp.zeros(N, int), jnp.arange(1, 4)),
    "Exponential": lambda: dist.Exponential(RATES),
    "Gamma": lambda: dist.Gamma(RATES, 2.0),
    "GammaPoisson": lambda: dist.GammaPoisson(RATES, 2.0),
    "GeometricLogits": lambda: dist.Geometric(logits=LOGITS),
    "GeometricProbs": lambda: dist.Geometric(PROBS),
    "HalfNormal": lambda: dist.HalfNormal(SCALE),
    "LeftTruncatedDistribution": lambda: dist.TruncatedNormal(LOC, SCALE, low=0.0),
    "LogNormal": lambda: dist.LogNormal(LOC, 0.5),
    "LogUniform": lambda: dist.LogUniform(RATES, 2 * RATES),
    "NegativeBinomial2": lambda: dist.NegativeBinomial2(RATES, 3.0),
    "NegativeBinomialLogits": lambda: dist.NegativeBinomialLogits(4.0, LOGITS),
    "NegativeBinomialProbs": lambda: dist.NegativeBinomialProbs(4.0, PROBS),
    "Normal": lambda: dist.Normal(LOC, SCALE),
    "Poisson": lambda: dist.Poisson(RATES),
    "TwoSidedTruncatedDistribution": lambda: dist.TruncatedNormal(LOC, SCALE, low=-1.0, high=2.0),
    "Uniform": lambda: dist.Uniform(LOC, LOC + SCALE),
    "Weibull": lambda: dist.Weibull(SCALE, 1.5),
    "affine": lambda: dist.TransformedDistribution(
        dist.Gamma(RATES, 2.0), transforms.AffineTransform(LOC, -2 * SCALE)
    ),
    "wrapped": lambda: dist.Poisson(2.0).expand([N, 2]).mask(jnp.array(True)).to_event(1),
}
FULL = {
    "Beta": lambda: dist.Beta(RATES, 2.0),
    "BetaProportion": lambda: dist.BetaProportion(PROBS, 5.0),
    "Dirichlet": lambda: dist.Dirichlet(jnp.stack([RATES, RATES[::-1], 2 * RATES])),
    "CAR": lambda: dist.CAR(
        LOC, 0.5, 2.0, jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    ),
    "CirculantNormal": lambda: dist.CirculantNormal(
        jnp.arange(5.0), jnp.array([1.0, 0.4, 0.1, 0.1, 0.4])
    ),
    "GaussianRandomWalk": lambda: dist.GaussianRandomWalk(SCALE, 4),
    "GaussianStateSpace": lambda: dist.GaussianStateSpace(
        3, jnp.array([[0.9, 0.2], [0.0, 0.7]]), scale_tril=TRIL
    ),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        LOC, jnp.ones((N, 1)), SCALE
    ),
    "MatrixNormal": lambda: dist.MatrixNormal(
        jnp.arange(6.0).reshape(3, 2), jnp.diag(SCALE) + 0.1 * jnp.tri(N, k=-1), TRIL
    ),
    "MultivariateNormal": lambda: dist.MultivariateNormal(
        jnp.stack([LOC[:2], LOC[1:]]), scale_tril=TRIL
    ),
    "ZeroSumNormal": lambda: dist.ZeroSumNormal(0.7, (4,)),
    "expanded": lambda: dist.MultivariateNormal(LOC[:2], scale_tril=TRIL).expand([2, 3]),
}


def draw(fn, num=40_000):
    """Draws, with what moments have flattened."""
    return np.asarray(fn.sample(jax.random.key(0), (num,)), np.float64)


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_variances(name):
    fn = BY_ELEMENT[name]()
    moments = gaussian_moments(fn)
    assert not moments.full
    assert moments.mean.shape == moments.cov.shape == fn.shape()
    x = draw(fn)
    if moments.transform is not None:
        x = np.asarray(moments.transform(x))
    error = x.std(0) / np.sqrt(len(x))
    np.testing.assert_array_less(np.abs(x.mean(0) - moments.mean), 5 * error + 1e-6)
    squared = (x - x.mean(0)) ** 2
    error = squared.std(0) / np.sqrt(len(x))
    np.testing.assert_array_less(np.abs(squared.mean(0) - moments.cov), 6 * error + 1e-6)


@pytest.mark.parametrize("name", FULL)
def test_covariances(name):
    fn = FULL[name]()
    moments = gaussian_moments(fn)
    assert moments.full
    size = moments.mean.shape[-1]
    assert moments.cov.shape == (*moments.mean.shape, size)
    x = draw(fn)
    if moments.transform is not None:
        x = np.asarray(moments.transform(x))
    x = x.reshape(len(x), -1, size)
    mean, cov = moments.mean.reshape(-1, size), moments.cov.reshape(-1, size, size)
    for i in range(x.shape[1]):
        scale = np.sqrt(np.diagonal(cov[i]))
        error = 5 / np.sqrt(len(x))
        assert np.all(np.abs(x[:, i].mean(0) - mean[i]) < error * scale)
        relative = np.cov(x[:, i].T) / np.outer(scale, scale)
        assert np.all(np.abs(relative - cov[i] / np.outer(scale, scale)) < 3 * error)


MULTINOMIAL = {
    "DirichletMultinomial": lambda: dist.DirichletMultinomial(jnp.linspace(0.2, 1.5, 20), 8),
    "MultinomialLogits": lambda: dist.Multinomial(8, logits=LOGITS),
    "MultinomialProbs": lambda: dist.Multinomial(8, WEIGHTS),
}


@pytest.mark.parametrize("name", MULTINOMIAL)
def test_multinomial_counts_have_the_covariance_of_independent_ones(name):
    """But for a multiple of the mean's square, along which nothing moves."""
    fn = MULTINOMIAL[name]()
    moments = gaussian_moments(fn)
    x = draw(fn)
    np.testing.assert_allclose(moments.mean, x.mean(0), atol=0.05)
    excess = np.diag(moments.cov) - np.cov(x.T)
    square = np.outer(moments.mean, moments.mean)
    factor = moments.cov.sum() / square.sum()
    np.testing.assert_allclose(excess, factor * square, atol=0.1)


def test_copula():
    """Means and variances are the marginals'; the correlation is nearly that of the scores."""
    correlation = jnp.array([[1.0, 0.6], [0.6, 1.0]])
    fn = dist.GaussianCopula(dist.Logistic(LOC[1:], RATES[1:]), correlation_matrix=correlation)
    moments = gaussian_moments(fn)
    x = draw(fn)
    np.testing.assert_allclose(moments.mean, x.mean(0), atol=0.15)
    np.testing.assert_allclose(moments.cov, np.cov(x.T), rtol=0.1)


def test_certain_counts_keep_some_variance():
    moments = gaussian_moments(dist.Bernoulli(logits=jnp.array([-1000.0, 1000.0])))
    assert np.all(moments.cov > 0)


def test_without_moments():
    mixture = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(LOC, SCALE))
    inflated = dist.ZeroInflatedPoisson(PROBS, RATES)
    few = dist.DirichletMultinomial(RATES, 8)
    for fn in (dist.Cauchy(), dist.Categorical(WEIGHTS), dist.Unit(0.0), mixture, inflated, few):
        assert gaussian_moments(fn) is None
        assert gaussian_moments(fn.expand([2, *fn.batch_shape])) is None
        assert gaussian_moments(fn.mask(False)) is None
    assert gaussian_moments(dist.StudentT(1.0).expand([3]).to_event(1)) is None


def test_errors():
    with pytest.raises(ValueError, match="a Delta observation has no noise"):
        gaussian_moments(dist.Delta(0.0))
    with pytest.raises(ValueError, match="from LKJ are not read; add its log-density.*factor"):
        gaussian_moments(dist.LKJ(3))

    class Mine(dist.Distribution):
        pass

    with pytest.raises(ValueError, match=r"no moments are known for observations from Mine"):
        gaussian_moments(Mine())


def table():
    """The docs' table: a row for each distribution of NumPyro."""
    families = {
        family.__name__: family
        for _, family in inspect.getmembers(dist, inspect.isclass)
        if issubclass(family, dist.Distribution) and family is not dist.Distribution
    }
    rows = [f"| `{name}` | {handling(families[name])} |" for name in sorted(families)]
    return "\n".join(["| distribution | how it is read |", "| --- | --- |", *rows])


def test_table_in_the_docs():
    """Rows of families that only other releases of NumPyro have are not looked at."""
    page = Path(__file__).parent.parent / "docs" / "distributions.md"
    missing = [row for row in table().splitlines() if row not in page.read_text()]
    assert not missing, "write these rows into docs/distributions.md:\n" + "\n".join(missing)
    assert "unknown" not in table()
