"""Priors with a context, p(x | c), in all that a prior goes through."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import MCMC, NUTS

from numpyro_diffprior.denoisers.exact import GaussianDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.diffusion.fitting import fit_denoiser
from numpyro_diffprior.diffusion.samplers import MultistepSDE
from numpyro_diffprior.em.e_step import EStep
from numpyro_diffprior.em.em import EM
from numpyro_diffprior.em.initial import GaussianStart
from numpyro_diffprior.em.m_step import MStep
from numpyro_diffprior.infer.evidence import log_evidence
from numpyro_diffprior.infer.kernels import MMPSKernel, ParticleGibbs
from numpyro_diffprior.infer.posterior import sample_posterior
from numpyro_diffprior.infer.reparam import DiffusionReparam
from numpyro_diffprior.nets.dit import DiT
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.nets.unet import UNet
from numpyro_diffprior.prior import DiffusionPrior

VARIANCE, NOISE = 0.25, 0.5
CONTEXTS = jnp.asarray([[-2.0, 0.0], [1.0, 0.5], [0.0, 3.0]])


@jax.tree_util.register_static
@dataclass(frozen=True)
class Shifted:
    """The network that makes a standard normal's denoiser that of N(c, VARIANCE)."""

    event_shape: tuple[int, ...] = (2,)
    context_shape: tuple[int, ...] = (2,)

    def __call__(self, x, noise, context, *, rngs=None):
        variance = jnp.exp(8 * noise)[:, None]
        x_t = x * jnp.sqrt(1 + variance)
        exact = context + VARIANCE / (VARIANCE + variance) * (x_t - context)
        return (exact - x_t / (1 + variance)) * jnp.sqrt((1 + variance) / variance)


def conditional_prior(**options):
    return DiffusionPrior(NetworkDenoiser(Shifted()), sampler=MultistepSDE(64), **options)


def model(prior, context, y=None):
    with numpyro.plate("events", len(context)):
        context = numpyro.subsample(context, event_dim=1)
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior.condition(context))
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


@pytest.mark.parametrize("max_batch_size", [1024, 1000])
def test_draws_follow_their_contexts(max_batch_size):
    prior = conditional_prior(max_batch_size=max_batch_size).condition(CONTEXTS)
    assert prior.batch_shape == (3,)
    x = prior.sample(jax.random.key(0), (341,))
    assert x.shape == (341, 3, 2)
    np.testing.assert_allclose(x.mean(0), CONTEXTS, atol=0.11)  # four standard errors
    np.testing.assert_allclose(x.std(0), VARIANCE**0.5, rtol=0.16)


@pytest.mark.parametrize("max_batch_size", [1024, 5])
def test_log_density_is_that_at_the_context(max_batch_size):
    prior = conditional_prior(max_batch_size=max_batch_size)
    x = CONTEXTS + VARIANCE**0.5 * jax.random.normal(jax.random.key(0), (4, 3, 2))

    def log_prob(context):
        return prior.condition(context).log_prob(x)

    exact = dist.Normal(CONTEXTS, VARIANCE**0.5).to_event(1).log_prob(x)
    np.testing.assert_allclose(log_prob(CONTEXTS), exact, atol=0.05)  # flows end at the summary
    gradient = jax.grad(lambda context: log_prob(context).sum())(CONTEXTS)
    exact = ((x - CONTEXTS) / VARIANCE).sum(0)
    np.testing.assert_allclose(gradient, exact, rtol=0.02)


def posterior(y):
    """Mean, variance and log-evidence in closed form."""
    gain = VARIANCE / (VARIANCE + NOISE**2)
    evidence = dist.Normal(CONTEXTS, (VARIANCE + NOISE**2) ** 0.5).to_event(1).log_prob(y)
    return CONTEXTS + gain * (y - CONTEXTS), gain * NOISE**2, evidence


Y = CONTEXTS + jnp.asarray([[0.5, -1.0], [0.0, 0.5], [-1.0, 0.0]])


@pytest.mark.parametrize("max_batch_size", [4096, 512])  # the latter in blocks of the plate
def test_posterior_draws_follow_their_contexts(max_batch_size):
    draws = sample_posterior(
        jax.random.key(1),
        model,
        conditional_prior(),
        CONTEXTS,
        Y,
        num_samples=400,
        max_batch_size=max_batch_size,
    )
    mean, variance, _ = posterior(Y)
    np.testing.assert_allclose(draws.samples["x"].mean(0), mean, atol=0.08)
    np.testing.assert_allclose(draws.samples["x"].var(0), variance, rtol=0.3)


@pytest.mark.parametrize(
    "kernel", [MMPSKernel(model), ParticleGibbs(model, num_particles=8)], ids=lambda k: type(k)
)
def test_kernels_follow_the_contexts(kernel):
    mcmc = MCMC(kernel, num_warmup=10, num_samples=400, progress_bar=False)
    mcmc.run(jax.random.key(2), conditional_prior(), CONTEXTS, Y)
    mean, variance, _ = posterior(Y)
    x = mcmc.get_samples()["x"]
    np.testing.assert_allclose(x.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(x.var(0), variance, rtol=0.35)


def test_evidence_is_that_at_the_context():
    evidence = log_evidence(
        jax.random.key(3), model, conditional_prior(), CONTEXTS, Y, num_particles=64
    )
    error = (evidence.value - posterior(Y)[2]) / evidence.standard_error
    assert jnp.abs(error).max() < 5
    assert evidence.standard_error.max() < 0.2


def test_a_context_may_be_latent():
    def latent_context(prior, y):
        context = numpyro.sample("context", dist.Normal().expand([2]).to_event(1))
        x = numpyro.sample("x", prior.condition(context))
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    y = jnp.asarray([1.0, -0.5])
    reparametrized = numpyro.handlers.reparam(latent_context, config={"x": DiffusionReparam(16)})
    mcmc = MCMC(NUTS(reparametrized), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(4), conditional_prior(), y)
    gain = 1 / (1 + VARIANCE + NOISE**2)
    context = mcmc.get_samples()["context"]
    np.testing.assert_allclose(context.mean(0), gain * y, atol=0.1)
    np.testing.assert_allclose(context.var(0), 1 - gain, rtol=0.25)


def labeled(num):
    """Observations of two classes, and their labels."""
    rng = np.random.default_rng(5)
    label = np.eye(2)[rng.integers(0, 2, num)]
    x = label @ np.asarray([[2.0, 0.0], [-2.0, 1.0]]) + 0.3 * rng.normal(size=(num, 2))
    return jnp.asarray(label), jnp.asarray(x + NOISE * rng.normal(size=x.shape))


STEPS = {
    "e_step": EStep(num_particles=1, max_batch_size=128),
    "m_step": MStep(num_steps=128, batch_size=128),
}


def new_prior():
    net = MLP((2,), features=(32, 32), context_shape=(2,), rngs=nnx.Rngs(0))
    return DiffusionPrior(NetworkDenoiser(net))


def test_em_learns_the_classes_apart():
    label, y = labeled(512)
    prior = (
        EM(model, optax.adam(3e-3), **STEPS).run(
            jax.random.key(6), 8, new_prior(), label, y, progress_bar=False
        )
    ).prior
    x = prior.condition(jnp.eye(2)).sample(jax.random.key(7), (512,))
    np.testing.assert_allclose(x.mean(0), [[2.0, 0.0], [-2.0, 1.0]], atol=0.15)
    assert jnp.all(x.std(0) < 0.45)  # of all classes together, 2


def test_em_knows_the_contexts_of_one_of_several_priors():
    label, y = labeled(128)

    def in_a_dict(priors, label, y=None):
        with numpyro.plate("events", len(label)):
            label = numpyro.subsample(label, event_dim=1)
            y = None if y is None else numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", priors["labeled"].condition(label))
            offset = numpyro.sample("offset", priors["offset"])
            numpyro.sample("y", dist.Normal(x + offset, NOISE).to_event(1), obs=y)

    offset = DiffusionPrior(GaussianDenoiser(jnp.zeros(2), 0.01 * jnp.eye(2)))
    em = EM(
        in_a_dict,
        optax.adam(3e-3),
        start=GaussianStart(num_iterations=2),
        **STEPS,
    )
    result = em.run(
        jax.random.key(8),
        4,
        {"labeled": new_prior(), "offset": offset},
        label,
        y,
        progress_bar=False,
    )
    x = result.prior["labeled"].condition(jnp.eye(2)).sample(jax.random.key(7), (256,))
    np.testing.assert_allclose(x.mean(0), [[2.0, 0.0], [-2.0, 1.0]], atol=0.3)


SIZES = {
    MLP: {"features": (32,)},
    UNet: {"channels": (8,), "num_blocks": 1},
    DiT: {"patch_size": 2, "width": 16, "depth": 1},
}


@pytest.mark.parametrize("net", SIZES)
def test_fitting_uses_the_contexts(net):
    shape = (4, 4)
    context = jnp.where(jax.random.bernoulli(jax.random.key(9), shape=(512,)), 1.0, -1.0)
    x = context[:, None, None] + 0.1 * jax.random.normal(jax.random.key(10), (512, *shape))
    denoiser = NetworkDenoiser(net(shape, context_shape=(), rngs=nnx.Rngs(0), **SIZES[net]))
    fit = fit_denoiser(
        jax.random.key(11),
        denoiser,
        x,
        context=context,
        optimizer=optax.adam(1e-2),
        num_steps=200,
        batch_size=64,
    )
    # At the highest noise level only the context tells.
    x_t = x[:64] + 10 * jax.random.normal(jax.random.key(12), (64, *shape))
    guess = ConditionedDenoiser(fit.denoiser, context[:64])(x_t, 10.0)
    for value in (-1.0, 1.0):
        np.testing.assert_allclose(guess[context[:64] == value].mean(), value, atol=0.15)


def test_the_shape_of_contexts_may_be_a_list():
    class Listed(nnx.Module):
        event_shape, context_shape = [2], [2]

        def __call__(self, x, noise, context, *, rngs=None):
            return Shifted()(x, noise, context)

    prior = DiffusionPrior(NetworkDenoiser(Listed())).condition(CONTEXTS)
    expected = conditional_prior().condition(CONTEXTS)
    x_t = jnp.ones((3, 2))
    np.testing.assert_array_equal(prior.denoiser(x_t, 1.0), expected.denoiser(x_t, 1.0))


def test_refusals():
    with pytest.raises(ValueError, match="give its network a `context_shape`"):
        DiffusionPrior(GaussianDenoiser(jnp.zeros(2), jnp.eye(2))).condition(CONTEXTS)
    with pytest.raises(ValueError, match=r"contexts of shape \(2,\) in the last axes"):
        conditional_prior().condition(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"prior.condition\(context\)"):
        conditional_prior().sample(jax.random.key(0))
    with pytest.raises(ValueError, match=r"contexts of shape \(8, 2\)"):
        fit_denoiser(
            jax.random.key(0),
            new_prior().denoiser,
            jnp.ones((8, 2)),
            optimizer=optax.adam(1e-3),
            num_steps=1,
        )
    with pytest.raises(ValueError, match="context_shape"):
        MLP((2,), context_shape=(0,), rngs=nnx.Rngs(0))
    net = MLP((2,), context_shape=(2,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="got shape"):
        net(jnp.ones((1, 2)), jnp.ones(1), jnp.ones((1, 3)))
