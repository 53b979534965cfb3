"""Work spread over devices against the same work on one; run where there are eight of them."""

import os
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import numpyro_diffprior as ndp
from numpyro_diffprior._compile import memory
from numpyro_diffprior.diffusion.training import init_training, train
from numpyro_diffprior.infer import blocks
from tests.oracles import tolerance

NUM_DEVICES = 8
on_eight = pytest.mark.skipif(jax.device_count() < NUM_DEVICES, reason="needs eight devices")

SIZE = 5
SAMPLER = ndp.samplers.MultistepSDE(8)
MASK = jax.random.bernoulli(jax.random.key(0), 0.6, (20, SIZE))
Y = jax.random.normal(jax.random.key(1), (20, SIZE))


def model(prior, mask, y=None):
    with numpyro.plate("events", len(mask)):
        mask = numpyro.subsample(mask, event_dim=1)
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).mask(mask).to_event(1), obs=y)


def make_prior():
    net = ndp.MLP((SIZE,), features=(16, 16), rngs=nnx.Rngs(0))
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net))


def make_mesh(*shape):
    return jax.make_mesh(shape, ("a", "b")[: len(shape)])


def draw(mesh, mask=MASK, y=Y, **kwargs):
    options = {"num_samples": 2, "max_batch_size": 4, "sampler": SAMPLER} | kwargs
    key = jax.random.key(2)
    return ndp.sample_posterior(key, model, make_prior(), mask, y, mesh=mesh, **options)


@pytest.mark.skipif(jax.device_count() >= NUM_DEVICES, reason="has eight devices")
def test_on_eight_devices():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={NUM_DEVICES}"
    # Without this test, which would call itself if the flag did nothing.
    others = "not test_on_eight_devices"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", others, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


@on_eight
@pytest.mark.parametrize(("shape", "num_particles"), [((8,), 1), ((2, 4), 4)])
def test_draws_are_those_of_one_device(shape, num_particles):
    """Twenty events in blocks of two: ten blocks, and six more to fill eight devices."""
    spread = draw(make_mesh(*shape), num_particles=num_particles)
    assert spread.samples["x"].shape == (2, 20, SIZE)
    # The blocks' keys depend on their number.
    padded = draw(
        None, *(jnp.tile(x, (2, 1))[:32] for x in (MASK, Y)), num_particles=num_particles
    )
    np.testing.assert_allclose(
        spread.samples["x"], padded.samples["x"][:, :20], atol=10 * tolerance()
    )
    assert spread.stats.keys() == padded.stats.keys()


@on_eight
def test_arguments_may_lie_on_the_mesh():
    mesh = make_mesh(4, 2)
    sharding = NamedSharding(mesh, PartitionSpec("a"))
    placed = draw(mesh, *(jax.device_put(x, sharding) for x in (MASK, Y)))
    np.testing.assert_array_equal(placed.samples["x"], draw(mesh).samples["x"])


def collectives(compiled):
    """The communication between devices in compiled code, with the number of each."""
    found = re.findall(
        r"= .*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    return Counter(found)


@on_eight
def test_events_are_divided(monkeypatch):
    """Each device holds the events of its own blocks, and asks no other one for any."""
    mesh, num_events = make_mesh(4, 2), 50
    mask, y = (jnp.tile(x, (3, 1))[:num_events] for x in (MASK, Y))
    parts, draw_part = [], blocks._draw_part

    def record(*args):
        parts.append(args)
        return draw_part(*args)

    monkeypatch.setattr(blocks, "_draw_part", record)
    draw(mesh, mask, y)
    size = parts[0][1].shape[1]
    for keys, indices, part, plan in parts:
        per_device = indices.size // NUM_DEVICES
        events = [part.data.arrays[i] for i, _ in part.data.held]
        assert len(events) == 2
        for x in events:
            shards = [shard.data.shape for shard in x.addressable_shards]
            assert shards == [(per_device, SIZE)] * NUM_DEVICES
        assert per_device % size == 0
        compiled = jax.jit(draw_part.__wrapped__, static_argnums=3).lower(
            keys, indices, part, plan
        )
        assert not collectives(compiled.compile())
    assert sum(len(np.unique(indices)) for _, indices, _, _ in parts) == num_events


@on_eight
def test_a_step_of_training_sums_its_gradients_once():
    """One sum per array of weights, and one for the loss; XLA may join them."""
    optimizer = optax.sgd(0.1)
    state = init_training(make_prior().denoiser, optimizer)

    def f(x):
        key = jax.random.key(4)
        return train(key, state, x, optimizer, num_steps=5, batch_size=64, mesh=make_mesh(8))[1]

    num_weights = len(jax.tree.leaves(nnx.state(state.denoiser.net, nnx.Param)))
    found = collectives(jax.jit(f).lower(Y).compile())
    assert set(found) == {"all-reduce"}
    assert 1 <= found["all-reduce"] <= num_weights + 1


@on_eight
@pytest.mark.parametrize("num_events", [1, 20])
def test_work_is_divided(num_events):
    """By the events, or by the draws where events are few."""

    def flops(mesh):
        def f(mask, y):
            return draw(mesh, mask, y, num_samples=1024, max_batch_size=32768).samples["x"]

        compiled = jax.jit(f).lower(MASK[:num_events], Y[:num_events]).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(make_mesh(8)) < flops(None) / 3


@on_eight
def test_draws_of_one_event_have_its_posterior():
    prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(SIZE), jnp.eye(SIZE)))
    samples = ndp.sample_posterior(
        jax.random.key(3), model, prior, jnp.ones((1, SIZE), bool), Y[:1],
        num_samples=4000, num_particles=50, independent=False, mesh=make_mesh(8),
    ).samples["x"]  # fmt: skip
    assert samples.shape == (4000, 1, SIZE)
    np.testing.assert_allclose(samples.mean(0), 0.8 * Y[:1], atol=0.05)
    np.testing.assert_allclose(samples.std(0), np.sqrt(0.2), rtol=0.1)


@on_eight
@pytest.mark.parametrize("num_parts", [1, 2])
def test_training_is_that_of_one_device(monkeypatch, num_parts):
    optimizer = optax.sgd(0.1)
    state = init_training(make_prior().denoiser, optimizer)
    options = {"optimizer": optimizer, "num_steps": 4, "batch_size": 16}

    def run(mesh, num_devices):
        # Gradients are accumulated over parts of this size on each device.
        monkeypatch.setattr(memory, "_MAX_ELEMENTS", 16 * SIZE // (num_devices * num_parts))
        return train(jax.random.key(4), state, Y, mesh=mesh, **options)

    (alone, losses), (spread, spread_losses) = run(None, 1), run(make_mesh(8), 8)
    np.testing.assert_allclose(spread_losses, losses, rtol=10 * tolerance())
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=10 * tolerance())


@on_eight
def test_large_weights_are_sharded():
    """With their average and the optimizer's state; the numbers stay the same."""
    optimizer, mesh = optax.adam(1e-2), make_mesh(4, 2)
    state = init_training(make_prior().denoiser, optimizer)
    options = {"num_steps": 6, "batch_size": 16, "mesh": mesh}
    key = jax.random.key(4)
    whole, losses = train(key, state, Y, optimizer, **options)
    divided, divided_losses = train(key, state, Y, optimizer, min_shard_size=256, **options)
    np.testing.assert_allclose(divided_losses, losses, rtol=10 * tolerance())
    for a, b in zip(jax.tree.leaves(divided), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=10 * tolerance())

    def sizes(tree):
        arrays = [x for x in jax.tree.leaves(tree) if x.ndim == 2 and x.size >= 256]
        return [(x.size, x.addressable_shards[0].data.size) for x in arrays]

    for tree in (divided.denoiser.net, divided.averaged.net, divided.opt_state):
        assert sizes(tree)
        assert all(own == size // NUM_DEVICES for size, own in sizes(tree))
    assert all(own == size for size, own in sizes(whole))
    again, _ = train(key, divided, Y, optimizer, min_shard_size=256, **options)
    np.testing.assert_allclose(
        jax.tree.leaves(again.averaged)[0],
        jax.tree.leaves(train(key, whole, Y, optimizer, **options)[0].averaged)[0],
        rtol=1e-3,
        atol=10 * tolerance(),
    )


@on_eight
def test_em_with_sharded_weights(tmp_path):
    """It goes on from its checkpoints, and gives whole priors."""

    def run(num_iterations, **options):
        em = ndp.EM(
            model,
            optax.adam(1e-3),
            e_step=ndp.EStep(sampler=SAMPLER, max_batch_size=32),
            m_step=ndp.MStep(num_steps=8, batch_size=8, **options),
            mesh=make_mesh(8),
        )
        return em.run(
            jax.random.key(5), num_iterations, make_prior(), MASK, Y,
            checkpoint=tmp_path if options else None, progress_bar=False,
        )  # fmt: skip

    run(1, min_shard_size=256)
    found, expected = run(2, min_shard_size=256), run(2)
    np.testing.assert_allclose(found.history.loss, expected.history.loss, rtol=1e-3)
    arrays = [x for x in jax.tree.leaves(found.prior.denoiser.net) if x.size >= 256]
    assert arrays
    assert all(x.is_fully_replicated for x in arrays)
    state = jax.tree.leaves(found.state.training["prior"].opt_state)
    assert not all(x.is_fully_replicated for x in state if x.size >= 256)


@on_eight
def test_training_is_divided():
    optimizer = optax.sgd(0.1)
    state = init_training(make_prior().denoiser, optimizer)

    def flops(mesh):
        def f(x):
            key = jax.random.key(4)
            return train(key, state, x, optimizer, num_steps=2, batch_size=1024, mesh=mesh)[1]

        return jax.jit(f).lower(Y).compile().cost_analysis()["flops"]

    assert flops(make_mesh(8)) < flops(None) / 3


@on_eight
def test_fit_to_events_that_lie_on_the_mesh():
    placed = jax.device_put(Y[:16], NamedSharding(make_mesh(4, 2), PartitionSpec("a")))
    fit = ndp.fit_denoiser(
        jax.random.key(4), make_prior().denoiser, placed, optimizer=optax.sgd(0.1), num_steps=2,
        batch_size=16, mesh=make_mesh(8),
    )  # fmt: skip
    assert np.all(np.isfinite(fit.losses))
    assert np.all(np.isfinite(fit.denoiser.error_ratios))


@on_eight
def test_minibatch_that_cannot_be_divided():
    optimizer = optax.sgd(0.1)
    state = init_training(make_prior().denoiser, optimizer)
    with pytest.raises(ValueError, match="multiple of the 8 devices of the mesh, got 12"):
        train(
            jax.random.key(4), state, Y, optimizer, num_steps=1, batch_size=12, mesh=make_mesh(8)
        )
    with pytest.raises(ValueError, match="multiple of the 8 devices .* got 12; take 16"):
        ndp.EM(model, optimizer, m_step=ndp.MStep(batch_size=12), mesh=make_mesh(8))


@on_eight
@pytest.mark.parametrize("draws_in", ["device", "host"])
def test_em(draws_in):
    """From data that lie on the mesh, in the same blocks as on one device; evidence too."""
    data = [jnp.tile(x, (4, 1))[:64] for x in (MASK, Y)]
    sharding = NamedSharding(make_mesh(4, 2), PartitionSpec("a"))
    histories = []
    for mesh, (mask, y) in ((None, data), (make_mesh(8), jax.device_put(data, sharding))):
        em = ndp.EM(
            model,
            optax.adam(1e-3),
            e_step=ndp.EStep(sampler=SAMPLER, max_batch_size=32, draws_in=draws_in),
            m_step=ndp.MStep(num_steps=8, batch_size=8),
            mesh=mesh,
        )
        result = em.run(
            jax.random.key(5), 2, make_prior(), mask, y, heldout=(mask, y), progress_bar=False
        )
        histories.append(result.history)
    alone, spread = histories
    np.testing.assert_allclose(spread.loss, alone.loss, rtol=1e-3)
    for name in ("ess", "reduced_chi_square", "log_evidence", "heldout_log_evidence"):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), rtol=1e-3)
