"""Sources of events, which are read when they are needed, give the results of arrays."""

from functools import partial

import h5py
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import zarr
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior._compile.lazy import take_rows
from numpyro_diffprior.diffusion import minibatches, training
from numpyro_diffprior.em import conditions
from numpyro_diffprior.infer import blocks
from numpyro_diffprior.reading import parts

KEY = jax.random.key(0)
D, NUM_EVENTS, BATCH = 3, 200, 16


class Source:
    """Counts what is read of it."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.calls = []

    def __len__(self):
        return NUM_EVENTS

    def __getitem__(self, index):
        self.calls.append(np.array(index))
        return jax.tree.map(lambda x: x[index], self.arrays)

    @property
    def most(self):
        return max(len(index) for index in self.calls)


def model(prior, y, mask, gain):
    scale = numpyro.param("scale", 0.5, constraint=dist.constraints.positive)
    with numpyro.plate("events", len(y)):
        y, mask = (numpyro.subsample(v, event_dim=1) for v in (y, mask))
        gain = numpyro.subsample(gain, event_dim=0)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(gain[:, None] * x, scale).mask(mask).to_event(1), obs=y)


def simple(prior, y):
    with numpyro.plate("events", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y)


def curved(prior, y, mask, gain):
    with numpyro.plate("events", len(y)):
        y, mask = (numpyro.subsample(v, event_dim=1) for v in (y, mask))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x + 0.1 * x**2, 0.3).mask(mask).to_event(1), obs=y)


def context_model(prior, y, mask, gain):
    with numpyro.plate("events", len(y)):
        y, mask = (numpyro.subsample(v, event_dim=1) for v in (y, mask))
        gain = numpyro.subsample(gain, event_dim=0)
        x = numpyro.sample("x", prior.condition(gain[:, None]))
        numpyro.sample("y", dist.Normal(x, 0.3).mask(mask).to_event(1), obs=y)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(NUM_EVENTS, D)).astype(np.float32)
    mask = rng.random((NUM_EVENTS, D)) < 0.7
    return y, mask, np.linspace(0.5, 2.0, NUM_EVENTS, dtype=np.float32)


def make_prior(context=None):
    net = ndp.MLP((D,), features=(8,), embedding=8, context_shape=context, rngs=nnx.Rngs(0))
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(4))


def sources(data):
    y, mask, gain = data
    yield ndp.lazy_arrays(Source(data))
    yield ndp.lazy_arrays((Source(y), Source(mask), Source(gain)))
    yield ndp.lazy_arrays(lambda index: (y[index], mask[index], gain[index]), NUM_EVENTS)
    yield ndp.lazy_arrays(Source(data), by_event=True)
    yield y, *ndp.lazy_arrays((mask, gain))


def test_files(tmp_path, data):
    """HDF5 and Zarr."""
    names = ("y", "mask", "gain")
    draw = partial(ndp.sample_posterior, KEY, model, make_prior(), max_batch_size=BATCH)
    whole = draw(*data)
    group = zarr.open_group(tmp_path / "data.zarr", mode="w")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for name, array in zip(names, data, strict=True):
            file[name] = array
            chunks = (7, *array.shape[1:])
            group.create_array(name, shape=array.shape, chunks=chunks, dtype=array.dtype)
            group[name][:] = array
        for stored in (file, group):
            lazy = ndp.lazy_arrays(tuple(stored[name] for name in names))
            jax.tree.map(np.testing.assert_array_equal, whole, draw(*lazy))


@pytest.mark.parametrize("kind", range(5))
def test_draws(data, kind):
    """Of all kinds of sources."""
    draw = partial(
        ndp.sample_posterior, KEY, context_model, make_prior((1,)), max_batch_size=BATCH
    )
    lazy = list(sources(data))[kind]
    jax.tree.map(np.testing.assert_array_equal, draw(*data), draw(*lazy))


def test_evidence(data):
    estimate = partial(ndp.log_evidence, KEY, model, make_prior(), num_particles=2)
    source = Source(data)
    whole = estimate(*data, max_batch_size=4 * BATCH)
    lazy = estimate(*ndp.lazy_arrays(source), max_batch_size=4 * BATCH)
    np.testing.assert_array_equal(whole.value, lazy.value)
    assert source.most <= 8 * BATCH


def test_small_batches_of_events_are_read_once(data):
    source = Source(data)
    y, mask, gain = ndp.lazy_arrays(source)
    assert (y.shape, y.dtype, y.ndim, len(y)) == ((NUM_EVENTS, D), np.float32, 2, NUM_EVENTS)
    source.calls.clear()
    ndp.sample_posterior(KEY, model, make_prior(), y, mask, gain, max_batch_size=BATCH)
    # One pass that checks the values and one that draws: the three arrays share what is read.
    assert sum(len(index) for index in source.calls) <= 2 * (NUM_EVENTS + BATCH)
    assert all((np.diff(index) > 0).all() for index in map(np.atleast_1d, source.calls))


@pytest.mark.parametrize(
    ("model", "context", "num_events"),
    [(model, None, None), (model, None, 64), (curved, None, None), (context_model, (1,), None)],
)
def test_em(tmp_path, monkeypatch, data, model, context, num_events):
    """With parameters, partial E-steps, contexts, held-out data and checkpoints."""

    monkeypatch.setattr(conditions, "_NUM_ROWS", 2 * BATCH)

    def run(arguments, heldout, folder):
        em = ndp.EM(
            model,
            optax.adam(1e-3),
            e_step=ndp.EStep(2, max_batch_size=2 * BATCH, num_events=num_events),
            m_step=ndp.MStep(num_steps=4, batch_size=16, params=ndp.ParamStep(num_steps=3)),
            start=ndp.GaussianStart(num_iterations=2, max_events=4 * BATCH),
        )
        prior = make_prior(context)
        return em.run(KEY, 5, prior, *arguments, heldout=heldout, checkpoint=folder)

    source = Source(data)
    lazy = run(ndp.lazy_arrays(source), ndp.lazy_arrays(source), tmp_path / "lazy")
    assert source.most <= 8 * BATCH
    whole = run(data, data, tmp_path / "whole")
    for a, b in zip(*(ndp.to_arrays(r.best).values() for r in (whole, lazy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    evidences = (r.history.heldout_log_evidence for r in (whole, lazy))
    np.testing.assert_allclose(*evidences, rtol=5e-3)  # of few steps, which amplify rounding
    again = run(ndp.lazy_arrays(source), ndp.lazy_arrays(source), tmp_path / "lazy")
    assert again.state.num_iterations == 5
    other = ndp.lazy_arrays(Source((data[0] + 1, *data[1:])))
    with pytest.raises(ValueError, match="the argument 'y' differs"):
        run(other, other, tmp_path / "lazy")


def test_rows():
    x = np.arange(24).reshape(6, 4)
    for index in ([0, 1, 2], [1, 3, 5], [4, 5, 5, 5], [2], [0, 0, 3], [3, 1, 2], [5, 0, 5]):
        index = np.array(index)
        np.testing.assert_array_equal(take_rows(x, index), x[index])
        np.testing.assert_array_equal(take_rows(x, index % 4, 1), x[:, index % 4])
        np.testing.assert_array_equal(take_rows(ndp.lazy_arrays(Take(x)), index), x[index])
        found = take_rows(ndp.lazy_arrays(Take(x)), index % 4, 1)
        np.testing.assert_array_equal(found, x[:, index % 4])
    np.testing.assert_array_equal(np.asarray(ndp.lazy_arrays(Take(x))), x)


class Take:
    """As a file, it takes increasing indices alone; as an array of Zarr, it has no length."""

    def __init__(self, x):
        self.x = x
        self.shape = x.shape

    def __getitem__(self, index):
        assert (np.diff(index) > 0).all()
        return self.x[index]


def test_invalid_sources(data):
    with pytest.raises(ValueError, match="has no length; pass num_events"):
        ndp.lazy_arrays(lambda index: index)
    with pytest.raises(ValueError, match="expected a source of events, got 0"):
        ndp.lazy_arrays([])
    changing = ndp.lazy_arrays(lambda index: np.zeros((len(index), len(index))), 10)
    with pytest.raises(ValueError, match=r"shape \(3, 3\) .* for 3 events, expected \(3, 1\)"):
        changing[2:5]
    broken = np.array(data[0])
    broken[-1, 0] = np.inf
    lazy = ndp.lazy_arrays((broken, np.ones_like(data[1]), data[2]))
    with pytest.raises(ValueError, match="hold NaN or infinities"):
        ndp.sample_posterior(KEY, model, make_prior(), *lazy, max_batch_size=BATCH)


@pytest.mark.parametrize("call", ["draws", "steps"])
def test_the_next_events_are_read_while_the_device_computes(monkeypatch, call):
    module, name = {"draws": (blocks, "_draw_part"), "steps": (training, "_take_steps")}[call]
    compute, running, early = getattr(module, name), [], []

    def keep(*args):
        result = compute(*args)
        running[:] = jax.tree.leaves(result)
        return result

    def take(index):
        if running:
            early.append(not running[-1].is_ready())
        return np.random.default_rng(0).normal(size=(len(index), D)).astype("float32")

    monkeypatch.setattr(module, name, keep)
    monkeypatch.setattr(parts, "_MAX_BLOCKS", 2)
    monkeypatch.setattr(minibatches, "_MAX_READ", 16 * 256 * D)  # a fifth of a second, or more
    net = ndp.MLP((D,), features=(512, 512), embedding=4, rngs=nnx.Rngs(0))
    denoiser, y = ndp.NetworkDenoiser(net), ndp.lazy_arrays(take, 1536)
    if call == "draws":
        prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.DDPM(16))
        ndp.sample_posterior(KEY, simple, prior, y, num_particles=2, max_batch_size=512)
    else:
        state = ndp.training.init_training(denoiser, optimizer := optax.sgd(1e-4))
        ndp.training.train(KEY, state, y, optimizer, num_steps=48, batch_size=256)
    assert early == [True, True]  # before the second and the third of three parts
