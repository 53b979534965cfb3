"""Draws that are written to a folder are those in memory."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from flax import nnx

import numpyro_diffprior as ndp

KEY = jax.random.key(0)
D, NUM_EVENTS = 3, 41


def model(prior, y):
    with numpyro.plate("groups", 2, dim=-2), numpyro.plate("events", y.shape[1], dim=-1):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def two_groups(prior, y):
    for i, name in enumerate(("a", "b")):
        with numpyro.plate(f"events_{name}", y.shape[1]):
            value = numpyro.subsample(y[i], event_dim=1)
            x = numpyro.sample(name, prior)
            numpyro.sample(f"y_{name}", dist.Normal(x, 0.5).to_event(1), obs=value)


scoped = numpyro.handlers.scope(model, "night")


def named_as_a_statistic(prior, y):
    with numpyro.plate("events", y.shape[1]):
        value = numpyro.subsample(y[0], event_dim=1)
        x = numpyro.sample("residual", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=value)


@pytest.fixture(scope="module")
def prior():
    net = ndp.MLP((D,), features=(8,), embedding=8, rngs=nnx.Rngs(0))
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(8))


Y = jnp.asarray(np.random.default_rng(0).normal(size=(2, NUM_EVENTS, D)), "float32")


@pytest.mark.parametrize("max_batch_size", [16, 1024])
@pytest.mark.parametrize("model", [model, two_groups, scoped, named_as_a_statistic])
def test_draws(tmp_path, prior, model, max_batch_size):
    """In parts, and of whole plates."""
    draw = partial(ndp.sample_posterior, KEY, model, prior, Y, num_samples=3)
    # These are compared with draws of particles, as those of a network.
    written = draw(max_batch_size=max_batch_size, folder=tmp_path / "draws")
    whole = draw(max_batch_size=max_batch_size)
    assert written.samples.keys() == whole.samples.keys()
    jax.tree.map(np.testing.assert_array_equal, whole.stats, written.stats)
    for name, x in whole.samples.items():
        np.testing.assert_array_equal(written.samples[name][...], x)
    dataset = xr.open_zarr(tmp_path / "draws", consolidated=False)
    stats = xr.open_zarr(tmp_path / "draws", group="stats", consolidated=False)
    for name, x in whole.samples.items():
        np.testing.assert_array_equal(dataset[name.replace("/", ".")], x)
    for name, x in whole.stats.items():
        np.testing.assert_array_equal(stats[name], x)
    if "x" in dataset:
        assert dataset["x"].dims == ("draw", "groups", "events", "x_dim_0")
        assert stats["ess_path"].dims == ("draw", "groups", "events", "level")


def test_a_folder_that_exists(tmp_path, prior):
    with pytest.raises(FileExistsError, match="draws need a new folder"):
        ndp.sample_posterior(KEY, model, prior, Y, folder=tmp_path)


def test_without_zarr(tmp_path, prior, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"numpyro_diffprior\[zarr\]"):
        ndp.sample_posterior(KEY, model, prior, Y, folder=tmp_path / "draws")
