"""Augmentations: events that are mapped to others, as probable, before each step of training."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion import training
from numpyro_diffprior.diffusion.fitting import fit_denoiser
from numpyro_diffprior.diffusion.training import denoising_loss, init_training, train

UNIT = 1e9


def flip(rng_key, x):
    """The other sign, half of the time; a reflection of the first axis of events."""
    return jnp.where(jax.random.bernoulli(rng_key), x, -x)


def shift(rng_key, x):
    """A shift of all elements by the same amount, in the data's units."""
    return x + UNIT * jax.random.normal(rng_key)


def make_denoiser(context_shape=None):
    net = ndp.MLP((3,), features=(8,), embedding=8, context_shape=context_shape, rngs=nnx.Rngs(0))
    return NetworkDenoiser(net)


def record(monkeypatch):
    """What a network is trained on: events in the denoiser's unit, and their contexts."""
    recorded = []

    def loss(denoiser, x, sigma, rng_key, **options):
        context = getattr(denoiser, "context", jnp.zeros(()))
        jax.debug.callback(lambda *given: recorded.append(given), x, context)
        return denoising_loss(denoiser, x, sigma, rng_key, **options)

    monkeypatch.setattr(training, "denoising_loss", loss)
    return recorded


def test_each_event_of_a_minibatch_is_mapped_in_the_units_of_the_data(monkeypatch):
    recorded = record(monkeypatch)
    x = UNIT * jnp.asarray([[0.0, 1.0, 3.0], [0.0, -2.0, 5.0]], "float32")
    options = {"optimizer": optax.sgd(0.1), "num_steps": 3, "batch_size": 50}
    fit = fit_denoiser(jax.random.key(1), make_denoiser(), x, augment=shift, **options)
    jax.effects_barrier()
    seen = np.concatenate([fit.denoiser.to_data(x) for x, _ in recorded]) / UNIT
    assert seen.shape == (150, 3)
    kinds = np.asarray(x) / UNIT
    relative = seen - seen[:, :1]
    distance = np.abs(relative[:, None] - kinds).max(-1)
    assert distance.min(-1).max() < 1e-4
    assert np.all(np.bincount(distance.argmin(-1)) > 40)
    shifts = seen[:, 0]
    assert len(np.unique(shifts)) == 150
    assert abs(shifts.std() - 1) < 0.2
    # The Gaussian is that of mapped events, of eight copies of each: first elements do differ.
    variance = fit.denoiser.cov.diagonal() * (fit.denoiser.unit / UNIT) ** 2
    assert 0.2 < variance[0] < 3


def test_contexts_are_mapped_with_their_events(monkeypatch):
    """A reflection of the event reverses its direction."""
    recorded = record(monkeypatch)
    x = jnp.tile(jnp.asarray([[1.0, 2.0, 3.0], [-1.0, 2.0, -2.0]]), (32, 1))
    context = x[:, :1]

    def reflect(rng_key, x, context):
        sign = jnp.where(jax.random.bernoulli(rng_key), 1, -1)
        return sign * x, sign * context

    fit = fit_denoiser(
        jax.random.key(1),
        make_denoiser((1,)),
        x,
        context=context,
        augment=reflect,
        optimizer=optax.sgd(0.1),
        num_steps=1,
        batch_size=64,
    )
    jax.effects_barrier()
    ((seen, at),) = recorded
    seen = np.asarray(fit.denoiser.to_data(seen))
    np.testing.assert_allclose(seen[:, :1], at, rtol=1e-5)
    assert len(np.unique(np.round(seen, 3), axis=0)) == 4
    assert np.abs(fit.denoiser.to_data(fit.denoiser.mean)).max() < 1  # of both signs


def test_events_that_are_read_or_divided_are_mapped_alike():
    x = np.random.default_rng(0).normal(size=(30, 3)).astype("float32")
    options = {"optimizer": optax.adam(0.01), "num_steps": 5, "batch_size": 8, "augment": flip}
    state = init_training(make_denoiser(), options["optimizer"])
    _, losses = train(jax.random.key(1), state, x, **options)
    _, read = train(jax.random.key(1), state, ndp.lazy_arrays(x), **options)
    _, meshed = train(jax.random.key(1), state, x, mesh=jax.make_mesh((1,), ("a",)), **options)
    np.testing.assert_allclose(read, losses, rtol=1e-5)
    np.testing.assert_allclose(meshed, losses, rtol=1e-5)
    _, plain = train(jax.random.key(1), state, x, **options | {"augment": None})
    assert not np.allclose(plain, losses, rtol=1e-3)


def test_a_symmetry_halves_what_has_to_be_seen():
    """Of events of one sign, a network learns those of the other from their reflections."""
    key = jax.random.key(0)
    x = jnp.asarray([2.0, 1.0, -1.0]) + 0.3 * jax.random.normal(key, (64, 3))
    options = {"optimizer": optax.adam(1e-2), "num_steps": 300, "batch_size": 64}
    fits = [
        fit_denoiser(key, make_denoiser(), x, augment=f, ema_decay=0.9, **options).denoiser
        for f in (None, flip)
    ]
    errors = []
    for denoiser in fits:
        x_t = denoiser.from_data(-x)
        x_hat = denoiser.to_data(denoiser(x_t, denoiser.from_data(jnp.asarray(0.5))))
        errors.append(float(jnp.sqrt(jnp.mean((x_hat + x) ** 2))))
    assert errors[1] < 0.4
    assert errors[0] > 2 * errors[1]


@pytest.mark.parametrize(
    ("augment", "context_shape", "match"),
    [
        (lambda key, x: x[:2], None, r"an event of shape \(3,\), as it is given, got \(2,\)"),
        (lambda key, x: (x, x), None, r"an event of shape \(3,\)"),
        (lambda key, x, context: x, (1,), r"an event and its context of shape \(\(3,\), \(1,\)\)"),
    ],
)
def test_what_an_augmentation_must_return(augment, context_shape, match):
    denoiser = make_denoiser(context_shape)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    context = None if context_shape is None else x[:, :1]
    options = {"optimizer": optax.sgd(0.1), "num_steps": 1, "batch_size": 2}
    with pytest.raises(ValueError, match=match):
        fit_denoiser(jax.random.key(0), denoiser, x, context=context, augment=augment, **options)


def model(prior, y):
    with numpyro.plate("n", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)


def make_em(augment):
    return ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(1),
        m_step=ndp.MStep(2, 8, augment=augment),
        start=ndp.GaussianStart(2),
    )


def test_expectation_maximization_maps_draws(tmp_path):
    """The Gaussian that it learns has the symmetry; a run goes on with the same one alone."""
    y = 2 + jnp.asarray(np.random.default_rng(0).normal(size=(24, 3)), "float32")
    prior = ndp.DiffusionPrior(make_denoiser(), sampler=ndp.samplers.MultistepSDE(4))
    key, options = jax.random.key(0), {"progress_bar": False, "checkpoint": tmp_path}
    em = make_em(flip)
    em.run(key, 1, prior, y, **options)
    result = em.run(key, 2, prior, y, **options)
    whole = em.run(key, 2, prior, y, progress_bar=False)
    denoiser = result.prior.denoiser
    np.testing.assert_array_equal(denoiser.mean, whole.prior.denoiser.mean)
    assert np.abs(denoiser.to_data(denoiser.mean)).max() < 1
    variance = np.asarray(denoiser.cov.diagonal()) * np.asarray(denoiser.unit) ** 2
    assert variance.min() > 3  # two squared, and more
    with pytest.raises(ValueError, match="the augmentation"):
        make_em(lambda key, x: flip(key, 2 * x / 2)).run(key, 3, prior, y, **options)


def test_constants_of_compiled_augmentations_are_compared(tmp_path):
    """A run does not go on with another table, also where a program holds it in an inner one."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), "float32")
    prior = ndp.DiffusionPrior(make_denoiser(), sampler=ndp.samplers.MultistepSDE(4))
    options = {"progress_bar": False, "checkpoint": tmp_path}

    def add(table):
        return jax.jit(lambda key, x: x + jnp.asarray(table))

    make_em(add(np.array([0.0, 0.5, 0.0], "float32"))).run(
        jax.random.key(0), 1, prior, y, **options
    )
    other = make_em(add(np.array([0.0, 0.25, 0.0], "float32")))
    with pytest.raises(ValueError, match="the augmentation"):
        other.run(jax.random.key(0), 2, prior, y, **options)


def test_each_prior_has_its_own_symmetry():
    """Of two sources that are seen as their sum, the one with an augmentation alone is mapped."""

    def two(priors, y):
        with numpyro.plate("n", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", priors["signal"]) + numpyro.sample("z", priors["rest"])
            numpyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)

    y = 4 + jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), "float32")
    sampler = ndp.samplers.MultistepSDE(4)
    priors = {
        name: ndp.DiffusionPrior(make_denoiser(), sampler=sampler) for name in ("signal", "rest")
    }
    options = {"e_step": ndp.EStep(1), "start": ndp.GaussianStart(2)}
    em = ndp.EM(two, optax.adam(1e-3), m_step=ndp.MStep(2, 8, augment={"rest": flip}), **options)
    result = em.run(jax.random.key(0), 1, priors, y, progress_bar=False).prior
    means = {key: np.abs(p.denoiser.to_data(p.denoiser.mean)).max() for key, p in result.items()}
    assert means["rest"] < 0.5 < 1.5 < means["signal"]
    em = ndp.EM(two, optax.adam(1e-3), m_step=ndp.MStep(2, 8, augment={"noise": flip}), **options)
    with pytest.raises(ValueError, match="got some of"):
        em.init(jax.random.key(0), priors, y)


def test_a_wrong_augmentation_is_refused_before_the_first_iteration():
    prior = ndp.DiffusionPrior(make_denoiser())
    with pytest.raises(ValueError, match="expected augment to be a function"):
        ndp.MStep(augment=3)
    x, options = jnp.eye(3), {"optimizer": optax.sgd(0.1), "num_steps": 1}
    with pytest.raises(ValueError, match="augment: expected a function, got 3"):
        fit_denoiser(jax.random.key(0), make_denoiser(), x, augment=3, **options)
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_denoiser(
            jax.random.key(0), make_denoiser(), x, augment=lambda key, x: x / 0, **options
        )
    with pytest.raises(ValueError, match=r"an event of shape \(3,\)"):
        make_em(lambda key, x: x[None]).init(jax.random.key(0), prior, jnp.ones((4, 3)))
