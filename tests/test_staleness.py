"""What a model reads from anywhere is seen: whatever changed since the last call, results follow.

Every public function that takes a model is called, the model's surroundings are changed, and it is
called again. The result must be that of a model that was never called before.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import MCMC

import numpyro_diffprior as ndp
from tests.counting import compilations, counted

N, D = 3, 2
Y = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), "float32")
SAMPLER = ndp.samplers.DDPM(4)
GAUSSIAN = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(D), jnp.eye(D)), sampler=SAMPLER)
NETWORK = ndp.DiffusionPrior(
    ndp.NetworkDenoiser(ndp.MLP((D,), features=(4,), embedding=4, rngs=nnx.Rngs(0))),
    sampler=SAMPLER,
)
KEY = jax.random.key(0)


def observe(prior, y, scale):
    with numpyro.plate("e", len(Y)):
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


# Ways of a model to its scale, each with a function that changes it to twice its value.

GLOBAL = 0.5


def read_a_global():
    def model(prior, y=None):
        observe(prior, y, GLOBAL)

    def change():
        global GLOBAL
        GLOBAL = 1.0

    def restore():
        global GLOBAL
        GLOBAL = 0.5

    return model, change, restore


def read_a_dict():
    settings = {"scale": 0.5}

    def model(prior, y=None):
        observe(prior, y, settings["scale"])

    return model, lambda: settings.update(scale=1.0), None


def read_an_enclosed_array():
    scales = np.full(D, 0.5, np.float32)

    def model(prior, y=None):
        observe(prior, y, scales)

    return model, lambda: scales.__imul__(2), None


def read_an_array_in_a_computation():
    scales = np.full(D, 0.5, np.float32)

    def model(prior, y=None):
        observe(prior, y, jax.vmap(lambda s: jnp.sqrt(s**2))(jnp.asarray(scales)))

    return model, lambda: scales.__imul__(2), None


class Config:
    """Not hashable, as many configurations are."""

    __hash__ = None

    def __init__(self):
        self.scale = 0.5

    def __eq__(self, other):
        return self.scale == other.scale


def read_an_attribute():
    config = Config()

    def model(prior, y=None):
        observe(prior, y, config.scale)

    return model, lambda: setattr(config, "scale", 1.0), None


def call_a_helper():
    helpers = {"scale": lambda: 0.5}

    def model(prior, y=None):
        observe(prior, y, helpers["scale"]())

    return model, lambda: helpers.update(scale=lambda: 1.0), None


class Instrument:
    """A model that is a method."""

    def __init__(self):
        self.scale = 0.5

    def model(self, prior, y=None):
        observe(prior, y, self.scale)


def read_itself():
    instrument = Instrument()
    return instrument.model, lambda: setattr(instrument, "scale", 1.0), None


WAYS = [
    read_a_global,
    read_a_dict,
    read_an_enclosed_array,
    read_an_array_in_a_computation,
    read_an_attribute,
    call_a_helper,
    read_itself,
]


def after(prior, y=None):
    """The model that all of them are after the change, and never were before."""
    observe(prior, y, 1.0)


# The public functions that take a model.


def kernel(make):
    def call(model):
        mcmc = MCMC(make(model), num_warmup=0, num_samples=2, progress_bar=False)
        mcmc.run(KEY, GAUSSIAN, Y)
        return mcmc.get_samples()["x"]

    return call


def em(model):
    options = {
        "e_step": ndp.EStep(num_particles=2),
        "m_step": ndp.MStep(num_steps=2, batch_size=4),
        "start": ndp.GaussianStart(num_iterations=2),
    }
    fit = ndp.EM(model, optax.sgd(0.01), **options)
    result = fit.run(KEY, 2, NETWORK, Y, heldout=(Y,), progress_bar=False)
    return result.prior.mean, result.state.draws["x"], result.history.heldout_log_evidence


def learned_params(model):
    """A parameter beside what changes."""

    def with_offset(prior, y=None):
        offset = numpyro.param("offset", 0.1)
        model(prior, y - offset)

    options = {"e_step": ndp.EStep(num_particles=1), "m_step": ndp.MStep(num_steps=1)}
    fit = ndp.EM(with_offset, optax.sgd(0.01), start=ndp.GaussianStart(2), **options)
    return fit.run(KEY, 1, NETWORK, Y, progress_bar=False).params["offset"]


def pmmh(model):
    """A latent parameter beside what changes."""

    def with_offset(prior, y=None):
        offset = numpyro.sample("offset", dist.Normal(0.0, 0.1))
        model(prior, y - offset)

    return kernel(lambda model: ndp.PMMH(model, num_particles=2))(with_offset)


FUNCTIONS = {
    "sample_posterior": lambda model: ndp.sample_posterior(KEY, model, GAUSSIAN, Y).samples["x"],
    "log_evidence": lambda model: ndp.log_evidence(KEY, model, GAUSSIAN, Y).value,
    "MMPSKernel": kernel(ndp.MMPSKernel),
    "ParticleGibbs": kernel(lambda model: ndp.ParticleGibbs(model, num_particles=2)),
    "PMMH": pmmh,
    "calibrate": lambda model: ndp.calibrate(
        KEY, model, GAUSSIAN, Y, num_simulations=4, num_samples=39
    ).ranks["x"],
    "EM": em,
    "numpyro.param": learned_params,
}


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, rtol=1e-5, atol=1e-6, equal_nan=True) for x, y in leaves)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_changed_is_seen(name):
    function = FUNCTIONS[name]
    expected = function(after)
    for way in WAYS:
        model, change, restore = way()
        before = function(model)
        assert not same(before, expected), way.__name__
        change()
        try:
            assert same(function(model), expected), way.__name__
        finally:
            if restore is not None:
                restore()


@pytest.mark.parametrize("name", ["sample_posterior", "log_evidence"])
def test_arguments_may_be_any_objects(name):
    """An object that cannot be hashed is a static argument like any other."""
    config = Config()

    def model(prior, config, y=None):
        observe(prior, y, config.scale)

    function = getattr(ndp, name)
    first = function(KEY, model, GAUSSIAN, config, Y)
    config.scale = 1.0
    second = function(KEY, model, GAUSSIAN, config, Y)
    assert same(second, function(KEY, after, GAUSSIAN, Y))
    assert not same(first, second)


def test_unchanged_models_compile_nothing_and_run_once():
    model, executions = counted(after)
    for name in ("sample_posterior", "log_evidence"):
        FUNCTIONS[name](model)
        cold = len(executions)
        assert cold <= 4, name
        with compilations() as count:
            FUNCTIONS[name](model)
        assert count.compiled == 0, name
        assert len(executions) == cold + 1, name
        executions.clear()


def test_changed_arrays_compile_nothing():
    scales = np.full(D, 0.5, np.float32)

    def model(prior, y=None):
        observe(prior, y, scales)

    first = FUNCTIONS["sample_posterior"](model)
    scales *= 3
    with compilations() as count:
        second = FUNCTIONS["sample_posterior"](model)
    assert count.compiled == 0
    assert not same(first, second)


def test_a_redefined_rule_of_moments_is_seen():
    class Noisy(dist.Normal):
        pass

    def model(prior, y=None):
        with numpyro.plate("e", len(Y)):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", Noisy(x, 0.5).to_event(1), obs=y)

    def register(factor):
        @ndp.gaussian_moments.register(Noisy)
        def _(fn):
            return ndp.Moments(fn.loc, factor * fn.scale**2)

    register(1.0)
    first = ndp.sample_posterior(KEY, model, GAUSSIAN, Y).samples["x"]
    register(4.0)
    second = ndp.sample_posterior(KEY, model, GAUSSIAN, Y).samples["x"]
    assert not same(first, second)


def test_models_with_other_derivatives_are_other_models():
    """Two custom gradients of one function do not share compiled code."""

    def make(factor):
        @jax.custom_jvp
        def double(x):
            return 2 * x

        double.defjvp(lambda primals, tangents: (2 * primals[0], factor * tangents[0]))

        def model(prior, y=None):
            with numpyro.plate("e", len(Y)):
                x = numpyro.sample("x", prior)
                numpyro.sample("y", dist.Normal(double(x), 0.5).to_event(1), obs=y)

        return model

    draws = [FUNCTIONS["sample_posterior"](make(factor)) for factor in (2.0, 0.5, 2.0)]
    assert same(draws[0], draws[2])
    assert not same(draws[0], draws[1])
