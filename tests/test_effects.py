"""NumPyro's handlers and control flow around a model: they work, or are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.diffusion.samplers import MultistepSDE
from numpyro_diffprior.infer.posterior import sample_posterior
from numpyro_diffprior.infer.reparam import DiffusionReparam
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.reader import read as read_model
from tests.oracles import tolerance

N, D = 4, 3
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, D)), jnp.asarray(RNG.normal(size=(N, D)))
PRIOR = DiffusionPrior(GaussianDenoiser(jnp.zeros(D), jnp.eye(D)), sampler=MultistepSDE(16))


def model(prior, y=None):
    with numpyro.plate("n", N):
        x = numpyro.sample("x", prior)
        numpyro.deterministic("total", x.sum(-1))
        numpyro.sample("y", dist.Normal(jnp.sin(x), 0.5).to_event(1), obs=y)


def read(model, *args):
    bound = read_model(model, args, {})
    (group,) = bound.reading.groups
    return group.latents, group.bind(bound.data).likelihood


def same(found, expected):
    """Whether two likelihoods read the same."""
    x = jnp.asarray(X)
    np.testing.assert_allclose(found.log_prob(x), expected.log_prob(x), rtol=10 * tolerance())
    a, b = found.linearize(x), expected.linearize(x)
    np.testing.assert_allclose(a.residual, b.residual, atol=10 * tolerance())
    np.testing.assert_allclose(
        a.transpose(a.residual), b.transpose(b.residual), atol=10 * tolerance()
    )


def test_scan():
    """A trajectory observed step by step, within a plate of trajectories."""

    def stepwise(prior, y):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)

        def step(carry, inputs):
            x_i, y_i = inputs
            with numpyro.plate("n", N):
                numpyro.sample("y", dist.Normal(jnp.sin(x_i), 0.5), obs=y_i)
            return carry, None

        scan(step, None, (x.T, y.T))

    latent, likelihood = read(stepwise, PRIOR, Y)
    assert latent.batch_shape == (N,)
    same(likelihood, read(model, PRIOR, Y)[1])
    draws = sample_posterior(jax.random.key(0), stepwise, PRIOR, Y)
    assert draws.samples["x"].shape == (1, N, D)


def test_vmapped_forward_models():
    def vmapped(prior, y):
        with numpyro.plate("n", N):
            x = numpyro.sample("x", prior)
            mean = jax.vmap(lambda x: jax.lax.map(jnp.sin, x))(x)
            numpyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    same(read(vmapped, PRIOR, Y)[1], read(model, PRIOR, Y)[1])


def test_scope():
    latent, likelihood = read(handlers.scope(model, prefix="galaxy"), PRIOR, Y)
    assert latent.names == ("galaxy/x",)
    assert [plate.name for plate in latent.plates] == ["galaxy/n"]
    same(likelihood, read(model, PRIOR, Y)[1])
    scoped = handlers.scope(model, prefix="galaxy")
    draws = sample_posterior(jax.random.key(0), scoped, PRIOR, Y)
    assert draws.samples["galaxy/x"].shape == (1, N, D)


def test_condition():
    same(read(handlers.condition(model, {"y": Y}), PRIOR)[1], read(model, PRIOR, Y)[1])


def test_block():
    hidden = handlers.block(model, hide=["total"])
    same(read(hidden, PRIOR, Y)[1], read(model, PRIOR, Y)[1])
    with pytest.raises(ValueError, match="no observed site depends on the latent site 'x'"):
        read(handlers.block(model, hide=["y"]), PRIOR, Y)
    with pytest.raises(ValueError, match="no latent site with a DiffusionPrior"):
        read(handlers.block(model, hide=["x"]), PRIOR, Y)


def test_do():
    with pytest.raises(ValueError, match="no observed site depends on the latent site 'x'"):
        read(handlers.do(model, {"x": jnp.asarray(X)}), PRIOR, Y)


def test_reparametrized_models_are_for_numpyros_own_inference():
    config = {"x": DiffusionReparam(num_steps=4)}
    with pytest.raises(ValueError, match=r"no latent site with a DiffusionPrior.*\['x_base'\]"):
        read(handlers.reparam(model, config=config), PRIOR, Y)


def test_replayed_models():
    """What a trace would replay gives way to what is drawn."""
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(PRIOR, Y)
    same(read(handlers.replay(model, trace), PRIOR, Y)[1], read(model, PRIOR, Y)[1])


@pytest.mark.parametrize("subsample_size", [None, 2])
def test_scaled_priors_are_refused(subsample_size):
    """The scale of a plate that subsamples is its own, and no other."""

    def scaled(prior, scale=None):
        with numpyro.plate("n", N, subsample_size=subsample_size):
            y = numpyro.subsample(Y, event_dim=1)
            with handlers.scale(scale=1.0 if scale is None else scale):
                x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    draws = sample_posterior(jax.random.key(0), scaled, PRIOR)
    assert draws.samples["x"].shape == (1, N, D)
    for scale in (0.5, jnp.asarray(0.5)):
        with pytest.raises(ValueError, match="'x' is under `numpyro.handlers.scale`.*observed"):
            sample_posterior(jax.random.key(0), scaled, PRIOR, scale)
