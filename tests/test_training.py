"""Training against exact denoisers, closed forms and the promise of one compilation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from numpyro_diffprior._compile.lazy import lazy_arrays
from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.diffusion import minibatches, training
from numpyro_diffprior.diffusion.fitting import fit_denoiser, measure_error
from numpyro_diffprior.diffusion.noise import LogBeta, LogNormal, LogUniform
from numpyro_diffprior.diffusion.training import denoising_loss, init_training, train
from numpyro_diffprior.linalg.covariances import Isotropic
from numpyro_diffprior.linalg.empirical import LowRankSummary, empirical_gaussian
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.nets.unet import UNet

SMALL = {"features": (8,), "embedding": 4}


def small_denoiser(dropout=0.0, seed=0):
    return NetworkDenoiser(MLP((2,), **SMALL, dropout=dropout, rngs=nnx.Rngs(seed)))


def mixture():
    means = jnp.array([[-2.0, 0.0], [2.0, 1.0], [1.0, -2.0]])
    return MixtureDenoiser(jnp.array([0.5, 0.3, 0.2]), means, 0.1 * jnp.eye(2)[None].repeat(3, 0))


def draw_mixture(rng_key, num):
    exact = mixture()
    key_component, key_noise = jax.random.split(rng_key)
    component = jax.random.choice(key_component, 3, (num,), p=exact.weights)
    noise = jax.random.normal(key_noise, (num, 2), exact.means.dtype)
    return exact.means[component] + jnp.sqrt(0.1) * noise


def constant_update(value):
    """An optimizer that adds a constant to every weight."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (
            jax.tree.map(lambda leaf: jnp.full_like(leaf, value), updates),
            state,
        ),
    )


def assert_trees_close(first, second, **kwargs):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **kwargs)


def test_loss_of_a_gaussian_has_a_closed_form():
    # E |D(x_t) - x|^2 is the trace of (cov^-1 + sigma^-2 I)^-1.
    factor = jnp.array([[1.0, 0.0], [0.9, 0.3]])
    cov = factor @ factor.T
    exact = GaussianDenoiser(jnp.array([3.0, -1.0]), cov)
    key_x, key_noise = jax.random.split(jax.random.key(0))
    x = exact.mean + jax.random.normal(key_x, (20_000, 2), factor.dtype) @ factor.T
    for sigma in (0.1, 0.5, 3.0):
        posterior = np.linalg.inv(np.linalg.inv(cov) + np.eye(2) / sigma**2)
        weight = 1 / sigma**2 + 2 / np.trace(cov)
        expected = weight * np.trace(posterior) / 2
        # The loss is a quadratic form of standard normals, with variance below 2 per event.
        error = weight * np.sqrt(2 * np.sum(posterior**2)) / 2 / np.sqrt(len(x))
        loss = denoising_loss(exact, x, jnp.full(len(x), sigma), key_noise)
        np.testing.assert_allclose(loss, expected, atol=4 * error)


def test_loss_of_a_new_denoiser_is_one_for_isotropic_data():
    # With cov = s^2 I the prediction by scaling alone has error c_out^2 at every noise level.
    scale = 3.0
    net = MLP((4,), **SMALL, rngs=nnx.Rngs(0))
    denoiser = NetworkDenoiser(net, jnp.full(4, 5.0), Isotropic(jnp.asarray(scale**2), 4))
    x = 5.0 + scale * jax.random.normal(jax.random.key(0), (10_000, 4))
    for sigma in (0.01, 1.0, 100.0):
        loss = denoising_loss(denoiser, x, jnp.asarray(sigma), jax.random.key(1))
        np.testing.assert_allclose(loss, 1.0, atol=4 * np.sqrt(2 / x.size))


def test_isotropic_preconditioning_is_edms():
    # Karras et al. 2022, table 1, with sigma_data = s; the loss is their lambda = 1 / c_out^2.
    s = 0.5
    leaves, treedef = jax.tree.flatten(MLP((3,), **SMALL, rngs=nnx.Rngs(0)))
    net = jax.tree.unflatten(treedef, [leaf + 0.3 for leaf in leaves])
    denoiser = NetworkDenoiser(net, jnp.zeros(3), Isotropic(jnp.asarray(s**2), 3))
    sigma = jnp.array([0.02, 0.5, 7.0])
    x, key = jnp.array([[0.1, -0.4, 0.7], [1.0, 0.2, 0.0], [-0.3, 0.5, 0.9]]), jax.random.key(3)
    level = sigma[:, None]
    x_t = x + level * jax.random.normal(key, x.shape, x.dtype)
    c_skip = s**2 / (s**2 + level**2)
    c_out = level * s / jnp.sqrt(s**2 + level**2)
    c_in = 1 / jnp.sqrt(s**2 + level**2)
    # EDM's c_noise = log(sigma) / 4, here of sigma relative to the data.
    expected = c_skip * x_t + c_out * net(c_in * x_t, jnp.log(sigma / s) / 4)
    np.testing.assert_allclose(denoiser(x_t, sigma), expected, rtol=1e-4, atol=1e-5)
    loss = jnp.mean((expected - x) ** 2 / c_out**2)
    np.testing.assert_allclose(denoising_loss(denoiser, x, sigma, key), loss, rtol=1e-4)


def test_loss_does_not_depend_on_units():
    x, key = draw_mixture(jax.random.key(0), 64), jax.random.key(1)
    losses = []
    for unit in (1.0, 1e3):
        denoiser = NetworkDenoiser(
            MLP((2,), **SMALL, rngs=nnx.Rngs(0)), None, Isotropic(jnp.asarray(unit**2), 2)
        )
        losses.append(denoising_loss(denoiser, unit * x, jnp.full(64, 0.3 * unit), key))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_loss_takes_any_batch_and_event_shape():
    net = MLP((3, 2), **SMALL, rngs=nnx.Rngs(0))
    denoiser = NetworkDenoiser(net)
    x = jax.random.normal(jax.random.key(0), (4, 5, 3, 2))
    sigma = jnp.linspace(0.1, 2.0, 20, dtype=x.dtype).reshape(4, 5)
    flat = denoising_loss(denoiser, x.reshape(20, 3, 2), sigma.reshape(20), jax.random.key(1))
    np.testing.assert_allclose(denoising_loss(denoiser, x, sigma, jax.random.key(1)), flat, 1e-5)


def test_loss_with_and_without_dropout():
    leaves, treedef = jax.tree.flatten(small_denoiser(dropout=0.5))
    denoiser = jax.tree.unflatten(treedef, [leaf + 0.3 for leaf in leaves])
    x, sigma, key = draw_mixture(jax.random.key(0), 16), jnp.full(16, 0.5), jax.random.key(1)

    def loss(seed):
        return denoising_loss(denoiser, x, sigma, key, rngs=nnx.Rngs(dropout=seed))

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    plain = denoising_loss(denoiser, x, sigma, key)
    assert plain == denoising_loss(denoiser, x, sigma, key)
    assert plain != loss(0)


def test_fit_approaches_the_exact_denoiser_of_a_mixture():
    exact = mixture()
    x = draw_mixture(jax.random.key(0), 4096)
    net = MLP((2,), features=(64, 64), embedding=16, rngs=nnx.Rngs(0))
    steps = 1500
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    )
    result = fit_denoiser(
        jax.random.key(1),
        NetworkDenoiser(net),
        x,
        optimizer=optimizer,
        num_steps=steps,
        batch_size=256,
        ema_decay=0.99,
    )
    assert result.losses.shape == (steps,)
    assert np.all(np.isfinite(result.losses))
    test = draw_mixture(jax.random.key(2), 4096)
    # Location and scale were fitted from the data.
    error = np.sqrt(np.diagonal(exact.cov.dense()) / len(x))
    assert np.all(np.abs(result.denoiser.mean - exact.mean) < 4 * error)
    np.testing.assert_allclose(result.denoiser.scale, exact.scale, rtol=0.05)
    gaussian = GaussianDenoiser(exact.mean, exact.cov)
    for sigma in (0.3, 0.7, 1.5):
        level, key = jnp.full(len(test), sigma), jax.random.key(3)
        best, fitted, start = (
            denoising_loss(denoiser, test, level, key)
            for denoiser in (exact, result.denoiser, gaussian)
        )
        # Same noise for all three: the excess over the best has a small variance.
        assert fitted < best + 0.1 * (start - best) + 0.01
        assert best < start


def test_images_train_too():
    x = jnp.sign(jax.random.normal(jax.random.key(0), (64, 1, 1))) * jnp.ones((64, 6, 6))
    net = UNet((6, 6), channels=(4, 8), num_blocks=1, embedding=8, rngs=nnx.Rngs(0))
    denoiser = NetworkDenoiser(net)
    optimizer = optax.adam(1e-2)
    state, losses = train(
        jax.random.key(1),
        init_training(denoiser, optimizer),
        x,
        optimizer,
        num_steps=60,
        batch_size=16,
    )
    assert losses[-10:].mean() < 0.75 * losses[:3].mean()
    assert state.averaged(x, 0.5).shape == x.shape


def test_only_the_network_is_trained():
    denoiser, optimizer = small_denoiser(), optax.adam(1e-2)
    x = draw_mixture(jax.random.key(0), 32)
    state = init_training(denoiser, optimizer)
    new, losses = train(jax.random.key(1), state, x, optimizer, num_steps=5, batch_size=8)
    assert losses.shape == (5,)
    assert int(new.num_steps) == 5
    for after in (new.denoiser, new.averaged):
        assert jax.tree.structure(after) == jax.tree.structure(denoiser)
        assert_trees_close(replace(after, net=denoiser.net), denoiser, rtol=0)
        changed = jax.tree.map(
            lambda a, b: bool(jnp.any(a != b)),
            jax.tree.leaves(after.net.last),
            jax.tree.leaves(denoiser.net.last),
        )
        assert all(changed)
    # What was passed in is still there: nothing is donated.
    assert np.all(np.isfinite(state.denoiser(x, 1.0)))


def test_training_in_pieces_counts_steps_and_same_key_gives_same_weights():
    optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, 6))
    x = draw_mixture(jax.random.key(0), 32)
    start = init_training(small_denoiser(), optimizer)
    options = {"num_steps": 6, "batch_size": 8}
    once, losses = train(jax.random.key(1), start, x, optimizer, **options)
    again, _ = train(jax.random.key(1), start, x, optimizer, **options)
    assert_trees_close(once, again, rtol=0)
    # The schedule has reached zero, and its count is part of the state.
    resumed, _ = train(jax.random.key(2), once, x, optimizer, **options)
    assert int(resumed.num_steps) == 12
    assert_trees_close(resumed.denoiser, once.denoiser, rtol=0, atol=1e-7)
    other, other_losses = train(jax.random.key(2), start, x, optimizer, **options)
    assert not np.allclose(losses, other_losses)


def test_clipping_limits_a_step():
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    x = draw_mixture(jax.random.key(0), 32)
    start = init_training(small_denoiser(), optimizer)
    new, _ = train(jax.random.key(1), start, x, optimizer, num_steps=1, batch_size=8)
    step = jax.tree.map(jnp.subtract, new.denoiser.net, start.denoiser.net)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(step)))
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-2)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.5, 0.9])
def test_average_in_closed_form(decay):
    # The weights are their start plus t; so is the average of them, whatever the network.
    optimizer = constant_update(1.0)
    start = init_training(small_denoiser(), optimizer)
    x = draw_mixture(jax.random.key(0), 8)
    num_steps = 20
    new, _ = train(
        jax.random.key(1), start, x, optimizer, num_steps=num_steps, batch_size=4, ema_decay=decay
    )
    average = 0.0
    for t in range(1, num_steps + 1):
        rate = min(decay, (1 + t) / (10 + t))
        average = rate * average + (1 - rate) * t
    if decay <= 0.1:  # no warm-up: the sum of the geometric series
        lag = decay * (1 - decay**num_steps) / (1 - decay)
        np.testing.assert_allclose(average, num_steps - lag, rtol=1e-6)
    shift = jax.tree.map(jnp.subtract, new.averaged.net, start.denoiser.net)
    for leaf in jax.tree.leaves(shift):
        np.testing.assert_allclose(leaf, average, rtol=1e-4)
    for leaf in jax.tree.leaves(jax.tree.map(jnp.subtract, new.denoiser.net, start.denoiser.net)):
        np.testing.assert_allclose(leaf, num_steps, rtol=1e-4)


def test_average_of_narrow_weights_moves_on():
    """From half of the weights: a thousandth of the rest is less than bfloat16 resolves."""
    denoiser = small_denoiser()
    net = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1.5, jnp.bfloat16), denoiser.net)
    denoiser, optimizer = replace(denoiser, net=net), optax.set_to_zero()
    half = replace(denoiser, net=jax.tree.map(lambda leaf: leaf / 2, net))
    # Long after the start, where the decay would be smaller.
    state = init_training(denoiser, optimizer)._replace(
        averaged=half, num_steps=jnp.asarray(1_000_000)
    )
    x = draw_mixture(jax.random.key(0), 8)
    new, _ = train(jax.random.key(1), state, x, optimizer, num_steps=3000, batch_size=1)
    for leaf in jax.tree.leaves(new.averaged.net):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.astype(float), 1.5 - 0.75 * 0.999**3000, rtol=0.01)


def test_train_compiles_once(monkeypatch):
    traces = []

    def counted(*args, **kwargs):
        traces.append(None)
        return denoising_loss(*args, **kwargs)

    monkeypatch.setattr(training, "denoising_loss", counted)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    x = draw_mixture(jax.random.key(0), 24)
    options = {"num_steps": 3, "batch_size": 7}
    state = init_training(small_denoiser(), optimizer)
    state, _ = train(jax.random.key(1), state, x, optimizer, **options)
    first = len(traces)
    assert first >= 1
    state, _ = train(jax.random.key(2), state, 2 * x, optimizer, **options, ema_decay=0.5)
    fresh = init_training(small_denoiser(seed=1), optimizer)
    train(jax.random.key(3), fresh, x, optimizer, **options, noise=LogNormal())
    assert len(traces) == first
    train(jax.random.key(3), fresh, x, optimizer, **options, noise=LogUniform())
    assert len(traces) > first


@pytest.mark.parametrize("noise", [LogBeta(), LogNormal(), LogUniform(stratified=False)])
def test_noise_levels_are_the_distributions(noise, monkeypatch):
    drawn = []

    def recorded(denoiser, x, sigma, rng_key, **kwargs):
        jax.debug.callback(lambda sigma: drawn.append(np.asarray(sigma)), sigma)
        return denoising_loss(denoiser, x, sigma, rng_key, **kwargs)

    monkeypatch.setattr(training, "denoising_loss", recorded)
    optimizer = optax.sgd(0.0)
    denoiser = small_denoiser()
    state = init_training(denoiser, optimizer)
    x = draw_mixture(jax.random.key(0), 4)
    # More events in a minibatch than there are; a size of its own, so that nothing is cached.
    train(jax.random.key(1), state, x, optimizer, num_steps=2, batch_size=511, noise=noise)
    jax.effects_barrier()
    sigma = np.concatenate(drawn)
    assert sigma.shape == (1022,)
    assert len(np.unique(sigma)) > 900
    ends = {name: getattr(denoiser, name) for name in ("sigma_min", "sigma_max", "scale")}
    quartiles = noise.quantile(jnp.array([0.25, 0.5, 0.75]), **ends)
    below = np.mean(sigma[:, None] < np.asarray(quartiles), axis=0)
    np.testing.assert_allclose(below, [0.25, 0.5, 0.75], atol=4 * 0.5 / np.sqrt(1022))


def test_dropout_is_on_in_training():
    x = draw_mixture(jax.random.key(0), 32)
    losses = []
    for dropout in (0.0, 0.5):
        optimizer = optax.sgd(0.1)
        state = init_training(small_denoiser(dropout=dropout), optimizer)
        _, loss = train(jax.random.key(1), state, x, optimizer, num_steps=3, batch_size=16)
        losses.append(np.asarray(loss))
    # A new network's output is zero, dropped out or not; then the weights part.
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
    assert losses[0][2] != losses[1][2]


class OwnStream(nnx.Module):
    """A network whose dropout has random streams of its own, flax's usual form."""

    event_shape = (2,)

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, noise, *, rngs=None):
        return self.dropout(self.linear(x), deterministic=rngs is None, rngs=rngs)


def test_random_streams_of_a_network_are_not_trained():
    denoiser, optimizer = NetworkDenoiser(OwnStream(nnx.Rngs(0))), optax.adamw(0.1)
    x = draw_mixture(jax.random.key(0), 32)
    start = init_training(denoiser, optimizer)
    options = {"num_steps": 3, "batch_size": 16}
    new, losses = train(jax.random.key(1), start, x, optimizer, **options)
    again, _ = train(jax.random.key(2), new, x, optimizer, **options)
    assert np.all(np.isfinite(losses))
    assert jax.tree.structure(again) == jax.tree.structure(start)
    for before, after in ((denoiser, again.denoiser), (denoiser, again.averaged)):
        assert np.all(before.net.linear.kernel[...] != after.net.linear.kernel[...])
        streams = before.net.dropout.rngs, after.net.dropout.rngs
        assert streams[0].count[...] == streams[1].count[...]
        assert streams[0].key[...] == streams[1].key[...]


def test_a_large_event_gets_a_low_rank_covariance():
    x = jax.random.normal(jax.random.key(0), (16, 23, 23))
    denoiser = NetworkDenoiser(MLP((23, 23), **SMALL, rngs=nnx.Rngs(0)))
    result = fit_denoiser(
        jax.random.key(1),
        denoiser,
        x,
        optimizer=optax.adam(1e-3),
        num_steps=1,
        summary=LowRankSummary(2),
    )
    np.testing.assert_allclose(result.denoiser.mean, x.mean(0), atol=1e-5)
    assert result.denoiser.cov.size == 529
    np.testing.assert_allclose(
        result.denoiser.cov.diagonal(), x.reshape(16, -1).var(0, ddof=1), rtol=1e-3
    )


@pytest.mark.parametrize(
    ("x", "options", "match"),
    [
        (jnp.zeros((4, 3)), {}, r"= \(n, 2\) and n > 0, got \(4, 3\)"),
        (jnp.zeros(2), {}, r"= \(n, 2\) and n > 0, got \(2,\)"),
        (jnp.zeros((3, 4, 2)), {}, r"got \(3, 4, 2\)"),
        (jnp.zeros((0, 2)), {}, r"n > 0, got \(0, 2\)"),
        (jnp.array([[0.0, jnp.nan], [1.0, 2.0]]), {}, "NaN or infinity in 1 of 2"),
        (jnp.array([[0.0, jnp.inf], [-jnp.inf, jnp.nan]]), {}, "NaN or infinity in 2 of 2"),
        (jnp.zeros((4, 2)), {"num_steps": 0}, "expected num_steps >= 1, got 0"),
        (jnp.zeros((4, 2)), {"batch_size": 0}, "expected batch_size >= 1, got 0"),
        (jnp.zeros((4, 2)), {"ema_decay": 1.5}, "expected ema_decay >= 0 and <= 1, got 1.5"),
    ],
)
def test_invalid_arguments(x, options, match):
    optimizer = optax.sgd(0.1)
    state = init_training(small_denoiser(), optimizer)
    options = {"num_steps": 1, "batch_size": 2, **options}
    with pytest.raises(ValueError, match=match):
        train(jax.random.key(0), state, x, optimizer, **options)


@pytest.mark.parametrize("max_read", [1, 48, 2**24])
@pytest.mark.parametrize("kind", ["memory map", "lazy"])
def test_minibatches_that_are_read(monkeypatch, tmp_path, kind, max_read):
    """One step at a time, three (of eight events with two numbers), and all together."""
    monkeypatch.setattr(minibatches, "_MAX_READ", max_read)
    x = 3 * np.random.default_rng(0).normal(size=(30, 2))
    np.save(tmp_path / "x.npy", x)
    read = np.load(tmp_path / "x.npy", mmap_mode="r") if kind == "memory map" else lazy_arrays(x)
    options = {"optimizer": optax.adam(0.01), "num_steps": 7, "batch_size": 8}
    fits = [
        fit_denoiser(jax.random.key(1), small_denoiser(dropout=0.5), events, **options)
        for events in (x, read)
    ]
    for a, b in zip(jax.tree.leaves(fits[0]), jax.tree.leaves(fits[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_contexts_that_are_read_with_the_events():
    x, context = np.random.default_rng(0).normal(size=(2, 30, 2)).astype("float32")
    net = MLP((2,), context_shape=(2,), **SMALL, rngs=nnx.Rngs(0))
    state = init_training(NetworkDenoiser(net), optimizer := optax.adam(0.01))
    options = {"optimizer": optimizer, "num_steps": 5, "batch_size": 4}
    called = []
    read = lazy_arrays((x, context))
    streamed = train(
        jax.random.key(1), state, read[0], context=read[1], on_steps=called.append, **options
    )
    assert called == [5]
    whole = train(jax.random.key(1), state, x, context=context, **options)
    np.testing.assert_allclose(streamed[1], whole[1], rtol=1e-5)


def test_contexts_that_are_read_beside_events_in_memory():
    x, context = np.random.default_rng(0).normal(size=(2, 30, 2)).astype("float32")
    net = MLP((2,), context_shape=(2,), **SMALL, rngs=nnx.Rngs(0))
    options = {"optimizer": optax.sgd(0.1), "num_steps": 2, "batch_size": 4}
    fits = [
        fit_denoiser(jax.random.key(1), NetworkDenoiser(net), x, context=c, mesh=mesh, **options)
        for c in (context, lazy_arrays(context))
        for mesh in (None, jax.make_mesh((1,), ("a",)))
    ]
    for fit in fits[1:]:
        np.testing.assert_allclose(fit.losses, fits[0].losses, rtol=1e-5)


def test_some_events_stand_for_all(monkeypatch):
    monkeypatch.setattr(minibatches, "_MAX_ELEMENTS", 20)
    monkeypatch.setattr(minibatches, "_LEAST_SOME", 4)
    x, context = np.arange(66.0).reshape(33, 2), np.arange(33)
    some, contexts = minibatches.take_some(lazy_arrays(x), context)
    np.testing.assert_array_equal(some, x[contexts])
    np.testing.assert_array_equal(contexts, np.arange(10) * 33 // 10)
    monkeypatch.setattr(minibatches, "_LEAST_SOME", 12)
    assert len(minibatches.take_some(lazy_arrays(x), context)[0]) == 12
    monkeypatch.setattr(minibatches, "_MAX_SOME", 6)
    assert len(minibatches.take_some(lazy_arrays(x), context)[0]) == 6
    monkeypatch.setattr(minibatches, "_MOST_ELEMENTS", 8)
    assert len(minibatches.take_some(lazy_arrays(x), context)[0]) == 4
    assert minibatches.take_some(x, context)[0] is x


def test_events_that_are_read_must_be_finite():
    x = np.random.default_rng(0).normal(size=(30, 2))
    x[7] = np.nan
    state = init_training(small_denoiser(), optimizer := optax.sgd(0.1))
    with pytest.raises(ValueError, match="NaN or infinity in"):
        train(jax.random.key(0), state, lazy_arrays(x), optimizer, num_steps=50, batch_size=4)


@pytest.mark.parametrize("num_events", [1, 5])
def test_events_that_do_not_differ(num_events):
    denoiser, optimizer = small_denoiser(), optax.sgd(0.1)
    x = jnp.full((num_events, *denoiser.event_shape), 0.3)
    with pytest.raises(ValueError, match=f"events that differ, got {num_events} that"):
        fit_denoiser(jax.random.key(0), denoiser, x, optimizer=optimizer, num_steps=1)


def test_known_events_inside_of_a_traced_function():
    optimizer, x = optax.sgd(0.1), jax.random.normal(jax.random.key(0), (8, 2))
    state = init_training(small_denoiser(), optimizer)
    options = {"optimizer": optimizer, "num_steps": 2, "batch_size": 4}
    traced = jax.jit(lambda key: train(key, state, x, **options)[1])(jax.random.key(1))
    np.testing.assert_allclose(traced, train(jax.random.key(1), state, x, **options)[1], rtol=1e-5)


def test_steps_in_parts_are_those_of_one_loop():
    """Dropout, and weights of bfloat16, whose small updates must not be lost between parts."""
    x = jax.random.normal(jax.random.key(0), (8, 2))
    net = MLP((2,), **SMALL, dropout=0.5, rngs=nnx.Rngs(0))
    graph, weights, rest = nnx.split(net, nnx.Param, ...)
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    denoiser = NetworkDenoiser(nnx.merge(graph, weights, rest))
    optimizer = optax.adam(1e-4)
    state = init_training(denoiser, optimizer)
    options = {"optimizer": optimizer, "num_steps": 9, "batch_size": 4}
    called = []
    parts = train(jax.random.key(1), state, x, on_steps=called.append, **options)
    assert called[0] == 1
    assert called[-1] == 9
    assert called == sorted(set(called))
    whole = train(jax.random.key(1), state, x, **options)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert jnp.array_equal(a, b)


def test_the_error_of_a_gaussian_is_its_own():
    denoiser = small_denoiser()
    x = np.random.default_rng(3).normal(size=(4096, *denoiser.event_shape))
    mean, cov = empirical_gaussian(jnp.asarray(x.reshape(4096, -1), denoiser.dtype))
    denoiser = denoiser.with_gaussian(mean.reshape(denoiser.event_shape), cov)
    measured = measure_error(jax.random.key(0), denoiser, x, batch_size=2048)
    standard_error = np.sqrt(2 / (2048 * denoiser.event_size))
    np.testing.assert_allclose(measured.error_ratios, 1, atol=5 * standard_error)
    np.testing.assert_allclose(measured.error_ratio(0.3), 1, atol=5 * standard_error)


def test_less_is_left_open_where_the_prior_is_not_gaussian():
    """Two points: the network learns which of them it is, a Gaussian cannot."""
    x = jnp.sign(jax.random.normal(jax.random.key(0), (512, 1)))
    net = MLP((1,), features=(32, 32), embedding=16, rngs=nnx.Rngs(0))
    fit = fit_denoiser(
        jax.random.key(1), NetworkDenoiser(net), x, optimizer=optax.adam(3e-3), num_steps=600
    )
    sigma = 0.4
    # E (x - tanh(x_t / sigma^2))^2, over the Gaussian's 1 / (1 + 1 / sigma^2).
    x_t = 1 + sigma * np.random.default_rng(0).normal(size=100_000)
    exact = np.mean((1 - np.tanh(x_t / sigma**2)) ** 2) * (1 + 1 / sigma**2)
    assert exact < 0.5
    np.testing.assert_allclose(fit.denoiser.error_ratio(sigma), exact, atol=0.15)
