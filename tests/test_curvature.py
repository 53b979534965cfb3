"""Pseudo-observations against derivatives in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from numpyro_diffprior.reading.curvature import from_log_prob, pseudo_observe
from numpyro_diffprior.reading.unwrap import unwrap
from tests.oracles import spd, tolerance

LOC, VALUE = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.5, 1.5, -1.0])


def observe(fn, value, *names):
    """The pseudo-observation of the parameters with these names."""
    base = unwrap(fn)
    wanted = [getattr(base.fn, name) for name in names]
    depends = [any(leaf is w for w in wanted) for leaf in jax.tree.leaves(base.fn)]
    return pseudo_observe(base.fn, base.batch_shape, value, depends)


def test_a_normal_observation_is_itself():
    pseudo = observe(dist.Normal(LOC, 0.4), VALUE, "loc")
    np.testing.assert_allclose(pseudo.theta[:, 0], LOC)
    np.testing.assert_allclose(pseudo.y[:, 0], VALUE, atol=tolerance())
    np.testing.assert_allclose(pseudo.variances, 0.16, rtol=10 * tolerance())


def test_a_normal_observation_of_its_scale():
    """Fisher scoring of location and logarithm of the scale: 1 / s^2 and 2."""
    scale = jnp.array([0.5, 1.0, 2.0])
    fn = dist.Normal(LOC, scale)
    pseudo = observe(fn, VALUE, "scale")
    np.testing.assert_allclose(pseudo.theta, np.stack([LOC, np.log(scale)], -1), atol=tolerance())
    score = (pseudo.y - pseudo.theta) / pseudo.variances

    def log_prob(loc, log_scale):
        return dist.Normal(loc, jnp.exp(log_scale)).log_prob(VALUE).sum()

    expected = jax.grad(log_prob, (0, 1))(LOC, jnp.log(scale))
    np.testing.assert_allclose(score, np.stack(expected, -1), rtol=20 * tolerance())
    information = np.stack([1 / scale**2, 2 * np.ones(3)], -1)
    np.testing.assert_allclose(1 / pseudo.variances, information, rtol=10 * tolerance())


def test_logits():
    """Of a Bernoulli variable: y - p over p (1 - p), whose inverse is the noise."""
    pseudo = observe(dist.Bernoulli(logits=LOC), jnp.array([1, 0, 1]), "logits")
    p = jax.nn.sigmoid(LOC)
    variance = 1 / (p * (1 - p))
    np.testing.assert_allclose(pseudo.variances[:, 0], variance, rtol=10 * tolerance())
    expected = LOC + (jnp.array([1, 0, 1]) - p) * variance
    np.testing.assert_allclose(pseudo.y[:, 0], expected, rtol=10 * tolerance())


def test_a_vector_of_parameters():
    """Of a categorical variable: the curvature is diag(p) - p p^T, flat along ones."""
    logits = jnp.array([[0.1, 0.7, -0.4], [1.0, 0.0, 0.5]])
    value = jnp.array([2, 0])
    pseudo = observe(dist.Categorical(logits=logits), value, "logits")
    assert pseudo.y.shape == (2, 3)
    p = jax.nn.softmax(logits)
    precision = jnp.einsum(
        "nij,nj,nkj->nik", pseudo.directions, 1 / pseudo.variances, pseudo.directions
    )
    expected = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
    np.testing.assert_allclose(precision, expected, atol=tolerance(1e-4))
    score = jnp.einsum("nij,nj->ni", precision, pseudo.y - pseudo.theta)
    np.testing.assert_allclose(score, jax.nn.one_hot(value, 3) - p, atol=tolerance(1e-4))


WEIGHTS = dist.Categorical(jnp.array([0.7, 0.3]))
SPREAD = jnp.array([0.5, 2.0])
MIXTURES = {
    "same family": lambda locs: dist.MixtureSameFamily(WEIGHTS, dist.Normal(locs, SPREAD)),
    "general": lambda locs: dist.MixtureGeneral(
        WEIGHTS, [dist.Normal(locs[..., i], SPREAD[i]) for i in range(2)]
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_observed_by_component(name):
    """Scores are exact; the curvature is that of the value's own component, were it known."""
    locs = jnp.stack([LOC, LOC - 1], axis=-1)
    fn = MIXTURES[name](locs)
    parts = getattr(fn, "component_distributions", [getattr(fn, "component_distribution", None)])
    depends = [any(leaf is part.loc for part in parts) for leaf in jax.tree.leaves(fn)]
    pseudo = pseudo_observe(fn, (3,), VALUE, depends)
    np.testing.assert_allclose(pseudo.theta, locs)
    score = jax.grad(lambda locs: MIXTURES[name](locs).log_prob(VALUE).sum())(locs)
    found = (pseudo.y - pseudo.theta) / pseudo.variances
    np.testing.assert_allclose(found, score, rtol=50 * tolerance(), atol=tolerance())
    probability = jnp.exp(fn.component_log_probs(VALUE) - fn.log_prob(VALUE)[:, None])
    expected = np.maximum(probability, 1e-7) / SPREAD**2
    np.testing.assert_allclose(1 / pseudo.variances, expected, rtol=50 * tolerance(), atol=1e-7)


@pytest.mark.parametrize("gate", [{"gate": 0.2}, {"gate_logits": -1.5}], ids=["gate", "logits"])
def test_zero_inflated_counts_are_observed_by_component(gate):
    rate, counts = jnp.array([0.5, 2.0, 3.0]), jnp.array([0, 0, 4])
    fn = dist.ZeroInflatedDistribution(dist.Poisson(rate), **gate)
    depends = [leaf is fn.base_dist.rate for leaf in jax.tree.leaves(fn)]
    pseudo = pseudo_observe(fn, (3,), counts, depends)

    def log_prob(rate):
        return dist.ZeroInflatedDistribution(dist.Poisson(rate), **gate).log_prob(counts).sum()

    found = (pseudo.y - pseudo.theta) / pseudo.variances
    np.testing.assert_allclose(found[:, 0], jax.grad(log_prob)(rate), rtol=50 * tolerance())


def test_mixtures_whose_scales_depend_go_by_their_log_density():
    """Their means alone would tell nothing."""

    def mixture(scale):
        return dist.MixtureSameFamily(WEIGHTS, dist.Normal(0.0, scale))

    scale = jnp.array([[0.7, 1.5]])
    fn = mixture(scale)
    depends = [leaf is fn.component_distribution.scale for leaf in jax.tree.leaves(fn)]
    pseudo = pseudo_observe(fn, (1,), VALUE[:1], depends)
    np.testing.assert_allclose(pseudo.theta, scale)
    score = jax.grad(lambda scale: mixture(scale).log_prob(VALUE[:1]).sum())(scale)
    along = jnp.einsum("nij,ni->nj", pseudo.directions, pseudo.y - pseudo.theta)
    found = jnp.einsum("nij,nj->ni", pseudo.directions, along / pseudo.variances)
    np.testing.assert_allclose(found, score, rtol=tolerance(1e-4), atol=tolerance(1e-5))


def test_mixtures_whose_weights_depend_go_by_their_log_density():
    logits = jnp.array([[0.3, -0.4]])
    fn = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(LOC[:2], SPREAD))
    depends = [leaf is fn.mixing_distribution.logits for leaf in jax.tree.leaves(fn)]
    pseudo = pseudo_observe(fn, (1,), VALUE[:1], depends)
    np.testing.assert_allclose(pseudo.theta, logits)
    assert pseudo.directions is not None


def test_matrices_of_second_derivatives():
    matrix = spd(np.random.default_rng(0), 3)
    target = jnp.array([1.0, -2.0, 0.5])

    def log_prob(theta):
        residual = theta - target
        return -0.5 * jnp.einsum("ni,ij,nj->n", residual, matrix, residual)

    pseudo = from_log_prob(log_prob, jnp.arange(6.0).reshape(2, 3))
    np.testing.assert_allclose(pseudo.y, np.tile(target, (2, 1)), atol=100 * tolerance())
    noise = (pseudo.directions * pseudo.variances[:, None]) @ pseudo.directions.mT
    np.testing.assert_allclose(noise, [np.linalg.inv(matrix)] * 2, rtol=1e-4)


def test_where_a_log_density_is_not_concave_it_moves_by_a_unit():
    """With H = g^2 a step of one over g, which raises the log-density by one."""
    pseudo = from_log_prob(lambda theta: theta[:, 0] ** 2 + 3 * theta[:, 0], jnp.array([[1.0]]))
    np.testing.assert_allclose(pseudo.y - pseudo.theta, [[1 / 5]], rtol=1e-5)
    np.testing.assert_allclose(pseudo.variances, [[1 / 25]], rtol=1e-5)
    flat = from_log_prob(lambda theta: 0 * theta[:, 0], jnp.array([[1.0]]))
    np.testing.assert_array_equal(flat.y, flat.theta)
    assert np.all(np.isfinite(flat.variances))


@pytest.mark.parametrize(("fn", "df"), [(dist.Cauchy, 1), (lambda *a: dist.StudentT(4.0, *a), 4)])
def test_heavy_tails_are_mixtures_of_gaussians(fn, df):
    """The score is that of the distribution, and the noise grows with the residual."""
    fn = fn(LOC, 0.5)
    pseudo = observe(fn, VALUE, "loc")
    np.testing.assert_array_equal(pseudo.y[:, 0], VALUE)
    score = ((pseudo.y - pseudo.theta) / pseudo.variances)[:, 0]
    expected = -jax.grad(lambda value: fn.log_prob(value).sum())(VALUE)
    np.testing.assert_allclose(score, expected, rtol=10 * tolerance())
    residual = np.asarray(VALUE - LOC)
    variance = (df * 0.25 + residual**2) / (df + 1)
    np.testing.assert_allclose(pseudo.variances[:, 0], variance, rtol=10 * tolerance())
    # Other parameters go by their curvature.
    assert observe(fn, VALUE, "loc", "scale").theta.shape == (3, 2)


def test_censored_values():
    fn = dist.RightCensoredDistribution(dist.Normal(LOC, 1.0), jnp.array([0, 1, 1]))
    leaves = jax.tree.leaves(fn)
    pseudo = pseudo_observe(fn, (3,), VALUE, [leaf is fn.base_dist.loc for leaf in leaves])
    np.testing.assert_allclose(pseudo.y[0], VALUE[:1], atol=10 * tolerance())
    score = (pseudo.y - pseudo.theta)[:, 0] / pseudo.variances[:, 0]
    z = VALUE - LOC
    hazard = np.exp(dist.Normal().log_prob(z)) / (1 - dist.Normal().cdf(z))
    np.testing.assert_allclose(score[1:], hazard[1:], rtol=tolerance(1e-4, 1e-6))


def test_unwrapping():
    fn = dist.Cauchy(jnp.zeros((3, 1)), 1.0).expand([3, 4])
    fn = fn.mask(jnp.eye(3, 4, dtype=bool)).to_event(1).expand([2, 3])
    base = unwrap(fn.mask(jnp.array([True, False, True])))
    assert type(base.fn) is dist.Cauchy
    assert base.batch_shape == (2, 3, 4)
    expected = np.eye(3, 4, dtype=bool) & np.array([[True], [False], [True]])
    np.testing.assert_array_equal(np.broadcast_to(base.mask, (2, 3, 4))[0], expected)
