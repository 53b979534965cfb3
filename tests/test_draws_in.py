"""EM with draws in host memory or files against EM with draws on the device: the same numbers."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx

import numpyro_diffprior as ndp
from benchmarks import reading
from numpyro_diffprior._compile import lazy
from numpyro_diffprior.diffusion import minibatches
from numpyro_diffprior.infer import blocks
from tests.counting import compilations

N, D, NOISE = 60, 2, 0.3
RNG = np.random.default_rng(0)
X = 3 * RNG.normal(size=(N, D)) @ np.array([[1.0, 0.8], [0.0, 0.5]])
Y = jnp.asarray(X + NOISE * RNG.normal(size=(N, D)), "float32")
CONTEXT = jnp.asarray(RNG.normal(size=(N, 1)), "float32")
KEY = jax.random.key(0)


def model(prior, y):
    with numpyro.plate("n", N):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def unknown_noise(prior, y):
    noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("n", N):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def two_sites(prior, y):
    for name, plate in (("a", "n"), ("b", "m")):
        with numpyro.plate(plate, N // 2):
            part = numpyro.subsample(y[: N // 2] if name == "a" else y[N // 2 :], event_dim=1)
            x = numpyro.sample(name, prior)
            numpyro.sample(f"y_{name}", dist.Normal(x, NOISE).to_event(1), obs=part)


def conditional(prior, y):
    with numpyro.plate("n", N):
        y = numpyro.subsample(y, event_dim=1)
        context = numpyro.subsample(CONTEXT, event_dim=1)
        x = numpyro.sample("x", prior.condition(context))
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def make_prior(**options):
    net = ndp.MLP((D,), features=(8,), embedding=4, rngs=nnx.Rngs(0), **options)
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(8))


def run(
    model, draws_in, prior=None, num_iterations=2, checkpoint=None, init_state=None, **options
):
    e_step = {"num_particles": 2, "max_batch_size": 32} | options
    em = ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(draws_in=draws_in, **e_step),
        m_step=ndp.MStep(num_steps=6, batch_size=16),
    )
    return em.run(
        KEY,
        num_iterations,
        prior or make_prior(),
        Y,
        checkpoint=checkpoint,
        init_state=init_state,
        progress_bar=False,
    )


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of some blocks of events, and of two steps of training."""
    monkeypatch.setattr(blocks, "_PART_WORK", 1)
    monkeypatch.setattr(minibatches, "_MAX_READ", 2 * 16 * D)


def assert_same(first, second):
    for site, x in first.state.draws.items():
        assert isinstance(x, np.ndarray)
        np.testing.assert_allclose(x, second.state.draws[site], rtol=1e-3, atol=1e-4)
    for name in ("loss", "sliced_wasserstein", "ess", "reduced_chi_square"):
        a, b = getattr(first.history, name), getattr(second.history, name)
        np.testing.assert_allclose(a, b, rtol=1e-3)
    for name, value in second.params.items():
        np.testing.assert_allclose(first.params[name], value, rtol=1e-3)


@pytest.fixture(params=["host", "folder"])
def draws_in(request, tmp_path):
    return "host" if request.param == "host" else tmp_path / "draws"


@pytest.mark.parametrize(
    ("model", "network", "options"),
    [
        (model, {}, {"num_events": 32, "num_iterations": 3}),
        (model, {}, {"max_batch_size": 1024}),  # one block
        (unknown_noise, {}, {"num_draws": 2}),
        (two_sites, {}, {}),
        (two_sites, {}, {"num_events": 10, "max_batch_size": 10, "num_iterations": 3}),
        (conditional, {"context_shape": (1,)}, {}),
    ],
    ids=["some events", "one block", "param", "two sites", "some of two sites", "contexts"],
)
def test_same_numbers(small_parts, draws_in, model, network, options):
    prior = make_prior(**network)
    found = run(model, draws_in, prior, **options)
    assert_same(found, run(model, "device", prior, **options))
    mapped = [isinstance(x, np.memmap) for x in found.state.draws.values()]
    assert all(mapped) if draws_in != "host" else not any(mapped)


def test_a_run_goes_on_wherever_its_draws_are(small_parts, draws_in, tmp_path):
    whole = run(model, draws_in)
    run(model, draws_in, num_iterations=1, checkpoint=tmp_path / "run")
    other = "host" if draws_in != "host" else tmp_path / "draws"
    rest = run(model, other, checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(rest.state.draws["x"], whole.state.draws["x"])
    np.testing.assert_array_equal(rest.history.loss, whole.history.loss)


def test_checkpoints_share_the_files_of_draws(small_parts, monkeypatch, tmp_path):
    """They have other names for the same files, or copies where there can be no such names."""
    files, checkpoints = tmp_path / "draws", tmp_path / "run"
    whole = run(model, files, num_iterations=5)
    run(model, files, num_iterations=3, checkpoint=checkpoints)
    (own,) = files.glob("*.npy")
    last = checkpoints / "mapped" / "3.0.npy"
    assert own.samefile(last)
    assert {path.name for path in last.parent.iterdir()} <= {f"{i}.0.npy" for i in range(4)}

    def fail(*args):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", fail)
    rest = run(model, files, num_iterations=5, checkpoint=checkpoints)
    np.testing.assert_array_equal(rest.state.draws["x"], whole.state.draws["x"])
    np.testing.assert_array_equal(rest.history.loss, whole.history.loss)
    assert not next(files.glob("*.npy")).samefile(checkpoints / "mapped" / "5.0.npy")
    assert len(list(last.parent.iterdir())) <= 4


def test_runs_that_share_a_folder_of_draws(small_parts, tmp_path):
    """The files of the first are unlinked by the second, and its checkpoints have copies."""
    first = run(model, tmp_path / "draws")
    run(model, tmp_path / "draws", num_iterations=2)
    options = {"num_iterations": 1, "init_state": first.state}
    whole = run(model, "host", **options)
    run(model, tmp_path / "draws", checkpoint=tmp_path / "run", **options)
    again = run(model, tmp_path / "draws", checkpoint=tmp_path / "run", **options)
    np.testing.assert_array_equal(again.state.draws["x"], whole.state.draws["x"])


@pytest.mark.parametrize("damage", ["lost", "truncated", "changed"])
def test_draws_of_a_checkpoint_that_are_damaged(small_parts, tmp_path, damage):
    run(model, tmp_path / "draws", num_iterations=2, checkpoint=tmp_path / "run")
    path = tmp_path / "run" / "mapped" / "2.0.npy"
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-8])
    elif damage == "changed":
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read: its arrays .* go on from '.*/1'"):
        run(model, tmp_path / "draws", num_iterations=3, checkpoint=tmp_path / "run")


def test_events_whose_draws_fail(monkeypatch, small_parts, draws_in):
    """They keep their last draws, and in the first iteration they have the prior's mean."""
    draw_part = blocks._draw_part

    def fail(*args):
        draws = draw_part(*args)
        return draws._replace(samples={"x": draws.samples["x"].at[:, 3].set(jnp.nan)})

    monkeypatch.setattr(blocks, "_draw_part", fail)
    with pytest.warns(UserWarning, match="draws of iteration"):
        runs = [run(model, where) for where in (draws_in, "device")]
    assert int(runs[0].history.num_failed[0]) > 0
    assert_same(*runs)


def test_nothing_compiles_after_the_first_iterations(small_parts, draws_in):
    em = ndp.EM(
        unknown_noise,
        optax.adam(1e-3),
        e_step=ndp.EStep(2, max_batch_size=32, num_events=32, draws_in=draws_in),
        m_step=ndp.MStep(num_steps=6, batch_size=16),
    )
    state = em.init(KEY, make_prior(), Y)
    for _ in range(3):
        state, _ = em.update(state, Y)
    with compilations() as compiled:
        em.update(state, Y)
    assert compiled.compiled == 0


def test_training_reads_a_part_of_the_draws(monkeypatch, small_parts, draws_in):
    sizes = []
    take = minibatches.take_rows

    def record(x, index):
        sizes.append(len(index))
        return take(x, index)

    monkeypatch.setattr(minibatches, "take_rows", record)
    run(model, draws_in, num_iterations=1)
    assert len(sizes) == 1 + 3  # mean and covariance, then two of six steps at a time
    assert max(sizes[1:]) <= 2 * 16


@pytest.mark.parametrize("num_events", [None, 32])
def test_files_of_draws(small_parts, tmp_path, num_events):
    """Those of the last iteration stay; arrays of earlier ones are what they were."""
    em = ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(2, max_batch_size=32, num_events=num_events, draws_in=tmp_path),
        m_step=ndp.MStep(num_steps=2, batch_size=16),
    )
    (tmp_path / "own.npy").touch()
    first = em.init(KEY, make_prior(), Y)
    states, copies = [first], []
    for _ in range(3):
        states.append(em.update(states[-1], Y)[0])
        copies.append(np.array(states[-1].draws["x"]))
    em.update(first, Y)  # writes to the file of the first iteration again
    for state, copy in zip(states[1:], copies, strict=True):
        np.testing.assert_array_equal(state.draws["x"], copy)
    kind = "drawn" if num_events is None else "all"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert re.fullmatch(rf"draws\.x\.1\.{kind}\.[0-9a-f]+\.npy", names[0])
    assert names[1:] == ["own.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / names[0]), copies[0])


def test_where_draws_are_is_checked():
    with pytest.raises(ValueError, match='draws_in to be "device", "host" or a folder, got True'):
        ndp.EStep(draws_in=True)


def test_draws_on_the_host_are_handled_in_chunks(monkeypatch):
    monkeypatch.setattr(lazy, "_MAX_CHUNK", 6)
    for shape in ((), (0,), (4,), (2, 5), (3, 2, 7), (2, 3, 4, 1), (9, 3)):
        for num_axes in range(len(shape) + 1):
            x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
            seen = [x[rows].ravel() for rows in lazy.chunks_of(shape, num_axes)]
            np.testing.assert_array_equal(np.concatenate([*seen, []]), x.ravel())
            rest = int(np.prod(shape[num_axes:], dtype=int))
            assert all(part.size <= max(6, rest) for part in seen)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_events():
    """In a process of its own: data in a file, draws in files, and checkpoints.

    From 100,000 to 800,000 events, data and draws grow by 86 MiB each. What does grow are indices
    and flags of events, by some 20 MiB.
    """
    name = "EM.run, draws in a folder, checkpoints"
    few, many = (reading.in_processes(name, num, "mapped") for num in (100_000, 800_000))
    assert many - few < 60
