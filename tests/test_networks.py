"""Networks and denoisers of the user's own: what is trained, carried along, and refused."""

from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx

import numpyro_diffprior as ndp
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.linalg.covariances import Covariance, Isotropic

D = 2
X = jnp.asarray(np.random.default_rng(0).normal(size=(256, D)) * [2.0, 0.5] + 1, "float32")
OPTIMIZER = optax.adam(1e-2)


def fit(net, num_steps=20):
    return ndp.fit_denoiser(
        jax.random.key(0),
        ndp.NetworkDenoiser(net),
        X,
        optimizer=OPTIMIZER,
        num_steps=num_steps,
        batch_size=64,
        ema_decay=0.0,
    ).denoiser


class Normed(nnx.Module):
    """Batch statistics, fixed frequencies and a count, beside weights."""

    event_shape = (D,)

    def __init__(self, rngs):
        self.frequencies = jnp.linspace(1.0, 3.0, 4)
        self.offset = nnx.Variable(jnp.asarray(0.5))
        self.first = nnx.Linear(D + 4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.last = nnx.Linear(8, D, rngs=rngs)

    def __call__(self, x, noise, *, rngs=None):
        waves = jnp.sin(self.frequencies * noise[:, None] + self.offset[...])
        waves = jnp.broadcast_to(waves, (len(x), 4))
        h = self.first(jnp.concatenate([x, waves], -1))
        return self.last(nnx.silu(self.norm(h, use_running_average=rngs is None)))


def test_only_parameters_are_trained_and_statistics_go_on():
    net = Normed(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net)))
    trained = fit(net).net
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(trained)))
    np.testing.assert_array_equal(after["frequencies"], before["frequencies"])
    np.testing.assert_array_equal(after["offset"], before["offset"])
    assert not np.allclose(after["first"]["kernel"], before["first"]["kernel"])
    # The statistics are those of what the first layer puts out at the end.
    assert not np.allclose(after["norm"]["mean"], 0)
    assert not np.allclose(after["norm"]["var"], 1)
    # The user's own module is as it was.
    np.testing.assert_array_equal(before["norm"]["mean"], net.norm.mean[...])


def test_draws_of_a_prior_with_batch_statistics():
    """With statistics that stay at zero and one, draws were wrong in silence."""
    prior = ndp.DiffusionPrior(
        fit(Normed(nnx.Rngs(0)), 200), sampler=ndp.samplers.MultistepSDE(32)
    )
    x = np.asarray(prior.sample(jax.random.key(1), (2000,)))
    np.testing.assert_allclose(x.mean(0), X.mean(0), atol=0.25)
    np.testing.assert_allclose(x.std(0), X.std(0), rtol=0.25)


class Equinox(eqx.Module):
    """Its activation function is a leaf that is no array."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    activation: callable
    event_shape: tuple = eqx.field(static=True, default=(D,))

    def __call__(self, x, noise, *, rngs=None):
        noise = jnp.broadcast_to(noise[:, None], (len(x), 1))
        h = jax.vmap(self.first)(jnp.concatenate([x, noise], -1))
        return jax.vmap(self.last)(self.activation(h))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, noise):
        noise = jnp.broadcast_to(noise[:, None], (len(x), 1))
        h = linen.Dense(8)(jnp.concatenate([x, noise], -1))
        return linen.Dense(D)(linen.silu(h))


def plain(params, x, noise):
    noise = jnp.broadcast_to(noise[:, None], (len(x), 1))
    h = jnp.concatenate([x, noise], -1) @ params["first"]
    return jnp.tanh(h) @ params["last"]


def make_equinox():
    keys = jax.random.split(jax.random.key(0))
    first, last = eqx.nn.Linear(D + 1, 8, key=keys[0]), eqx.nn.Linear(8, D, key=keys[1])
    return Equinox(first, last, jax.nn.silu)


def make_linen():
    module = Linen()
    params = module.init(jax.random.key(0), X[:1], jnp.zeros(1))
    return ndp.FunctionNetwork(module.apply, params, (D,))


def make_plain():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": jax.random.normal(keys[0], (D + 1, 8)),
        "last": 0.1 * jax.random.normal(keys[1], (8, D)),
    }
    return ndp.FunctionNetwork(plain, params, (D,))


NETWORKS = {"equinox": make_equinox, "linen": make_linen, "a function": make_plain}


def model(prior, y):
    with numpyro.plate("n", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_libraries(name):
    """They are trained, drawn from, and learn in EM."""
    denoiser = ndp.NetworkDenoiser(NETWORKS[name]())
    trained = fit(NETWORKS[name]())
    x_t = jnp.ones((3, D))
    assert not np.allclose(trained(x_t, 1.0), denoiser(x_t, 1.0))
    prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.DDPM(4))
    assert np.all(np.isfinite(prior.sample(jax.random.key(1), (5,))))
    em = ndp.EM(
        model,
        OPTIMIZER,
        e_step=ndp.EStep(num_particles=1),
        m_step=ndp.MStep(num_steps=2),
        start=ndp.GaussianStart(num_iterations=2),
    )
    result = em.run(jax.random.key(2), 1, prior, X[:16], progress_bar=False)
    assert np.all(np.isfinite(result.prior.denoise(x_t, 1.0)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_networks_of_half_precision(dtype):
    net = ndp.MLP((D,), features=(8,), embedding=4, param_dtype=dtype, rngs=nnx.Rngs(0))
    trained = fit(net)
    assert trained.dtype == jnp.float32
    prior = ndp.DiffusionPrior(trained, sampler=ndp.samplers.DDPM(4))
    draws = ndp.sample_posterior(jax.random.key(0), model, prior, X[:4], num_particles=2)
    assert draws.samples["x"].dtype == jnp.float32
    assert np.all(np.isfinite(draws.samples["x"]))


def test_a_denoiser_that_is_a_function():
    """Of a Gaussian: draws, density and posterior are those of the exact one."""
    variance = jnp.asarray([4.0, 0.25])

    def function(x_t, sigma):
        return 1 + variance / (variance + sigma[..., None] ** 2) * (x_t - 1)

    denoiser = ndp.FunctionDenoiser(function, jnp.ones(D), jnp.diag(variance))
    exact = ndp.GaussianDenoiser(jnp.ones(D), jnp.diag(variance))
    x_t = X[:5]
    np.testing.assert_allclose(denoiser(x_t, 0.7), exact(x_t, 0.7), rtol=1e-5)
    a, b = (ndp.DiffusionPrior(d, sampler=ndp.samplers.DDPM(8)) for d in (denoiser, exact))
    key = jax.random.key(0)
    np.testing.assert_allclose(a.sample(key, (7,)), b.sample(key, (7,)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a.log_prob(x_t), b.log_prob(x_t), rtol=1e-4)
    x, y = (ndp.sample_posterior(key, model, p, x_t).samples["x"] for p in (a, b))
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_a_denoiser_that_is_a_module():
    """Its weights are data: others compile nothing, and static parts are kept."""

    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Shrink:
        weight: jax.Array
        power: int = field(metadata={"static": True}, default=2)

        def __call__(self, x_t, sigma):
            return x_t * self.weight / (self.weight + sigma[..., None] ** self.power)

    denoiser = ndp.FunctionDenoiser(Shrink(jnp.asarray(1.0)), jnp.zeros(D), jnp.eye(D))
    assert len(jax.tree.leaves(denoiser)) == 1 + 1 + 2 + 1  # weight, mean, covariance, unit
    np.testing.assert_allclose(denoiser(X[:3], 1.0), X[:3] / 2, rtol=1e-6)


class NoPytree(Denoiser):
    def __init__(self):
        self.mean: jax.Array = jnp.zeros(D)
        self.cov: Covariance = Isotropic(jnp.ones(()), D)

    def __call__(self, x_t, sigma):
        return x_t


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="NoPytree is no pytree.*register_dataclass"):
        ndp.DiffusionPrior(NoPytree())
    with pytest.raises(ValueError, match="network function has no `event_shape`"):
        ndp.NetworkDenoiser(lambda x, noise: x)
    with pytest.raises(ValueError, match="expected a network, which is callable, got int"):
        ndp.NetworkDenoiser(3)

    class Plain:
        event_shape = (D,)

        def __call__(self, x, noise, *, rngs=None):
            return x

    with pytest.raises(ValueError, match="network Plain is not a pytree.*FunctionNetwork"):
        ndp.NetworkDenoiser(Plain())
    with pytest.raises(ValueError, match="expected a function of x_t and sigma, got 3"):
        ndp.FunctionDenoiser(3, jnp.zeros(D), jnp.eye(D))
    with pytest.raises(
        ValueError, match=r"returns events like x_t, of shape \(2, 2\), got \(2,\)"
    ):
        ndp.FunctionDenoiser(lambda x_t, sigma: x_t.sum(-1), jnp.zeros(D), jnp.eye(D))
    with pytest.raises(ValueError, match="called with two events it raised ZeroDivisionError"):
        ndp.FunctionDenoiser(lambda x_t, sigma: x_t / (1 // 0), jnp.zeros(D), jnp.eye(D))
    with pytest.raises(ValueError, match="GaussianDenoiser: .* float32 or float64, got float16"):
        ndp.GaussianDenoiser(jnp.zeros(D, jnp.float16), jnp.eye(D, dtype=jnp.float16))
