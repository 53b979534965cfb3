"""Arrays that are mapped into memory are read part by part, with the same results."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_diffprior as ndp
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.infer import blocks
from numpyro_diffprior.infer.blocks import block_size
from numpyro_diffprior.reading.latent import LatentGroup, LatentSite
from numpyro_diffprior.reading.parts import split_into_parts
from numpyro_diffprior.reading.reader import read

SIZE, NUM_EVENTS, BATCH_SIZE = 3, 1033, 32
KEY = jax.random.key(0)


def model(prior, y, mask, gain):
    with numpyro.plate("events", len(y)) as index:
        y = numpyro.subsample(y, event_dim=1)
        mask = numpyro.subsample(mask, event_dim=1)
        x = numpyro.sample("x", prior)
        mean = x * gain[index][:, None]
        numpyro.sample("y", dist.Normal(mean, 0.3).mask(mask).to_event(1), obs=y)


@pytest.fixture(scope="module")
def prior():
    gaussian = ndp.GaussianDenoiser(jnp.zeros(SIZE), ndp.linalg.Isotropic(1.0, SIZE))
    return ndp.DiffusionPrior(gaussian, sampler=ndp.samplers.DDPM(8))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(NUM_EVENTS, SIZE)).astype(np.float32)
    mask = rng.random((NUM_EVENTS, SIZE)) < 0.7
    gain = np.linspace(0.5, 2.0, NUM_EVENTS, dtype=np.float32)
    return y, mask, gain


@pytest.fixture
def mapped(tmp_path, data):
    """The data in files: values and mask, of which a part is read, and a gain that is not."""

    def save(i, array):
        file = tmp_path / f"{i}.npy"
        np.save(file, array)
        return np.load(file, mmap_mode="r")

    return tuple(save(i, array) for i, array in enumerate(data))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_draws(prior, data, mapped, num_samples):
    draw = partial(
        ndp.sample_posterior,
        KEY,
        model,
        prior,
        num_samples=num_samples,
        max_batch_size=BATCH_SIZE,
    )
    whole, parts = draw(*data), draw(*mapped)
    assert whole.samples["x"].shape == (num_samples, NUM_EVENTS, SIZE)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_evidence(prior, data, mapped):
    estimate = partial(
        ndp.log_evidence, KEY, model, prior, num_particles=2, max_batch_size=8 * BATCH_SIZE
    )
    whole, parts = estimate(*data), estimate(*mapped)
    np.testing.assert_array_equal(whole.value, parts.value)


def test_evidence_collects_estimates_alone(monkeypatch, prior, mapped):
    """Neither draws nor other statistics, which would be larger than the data."""
    draw, kept = blocks._draw_part, []

    def keep(*args):
        kept.append(draw(*args))
        return kept[-1]

    monkeypatch.setattr(blocks, "_draw_part", keep)
    ndp.log_evidence(KEY, model, prior, *mapped, num_particles=2, max_batch_size=8 * BATCH_SIZE)
    for part in kept:
        assert part.samples == {}
        assert list(part.stats) == ["log_evidence"]


def test_only_the_values_are_mapped(prior, data, mapped):
    y, *others = data
    draw = partial(ndp.sample_posterior, KEY, model, prior, max_batch_size=BATCH_SIZE)
    parts = draw(mapped[0], *others)
    np.testing.assert_array_equal(draw(y, *others).samples["x"], parts.samples["x"])


def test_under_jit(prior, data, mapped):
    @jax.jit
    def draw(key):
        draws = ndp.sample_posterior(key, model, prior, *mapped, max_batch_size=BATCH_SIZE)
        return draws.samples["x"]

    whole = ndp.sample_posterior(KEY, model, prior, *data, max_batch_size=BATCH_SIZE)
    np.testing.assert_allclose(draw(KEY), whole.samples["x"], rtol=1e-5, atol=1e-6)


def test_invalid_values_are_found_in_any_part(prior, data, mapped):
    y, mask, gain = (np.array(array) for array in data)
    y[-1] = np.nan
    mask[-1] = True
    np.save(mapped[0].filename, y)
    np.save(mapped[1].filename, mask)
    broken = [np.load(array.filename, mmap_mode="r") for array in mapped]
    with pytest.raises(ValueError, match="hold NaN or infinities"):
        ndp.sample_posterior(KEY, model, prior, *broken, max_batch_size=BATCH_SIZE)


def test_parts_hold_a_few_blocks(prior, data, mapped):
    bound = read(model, (prior, *mapped), {}, block_size=block_size(1, 1, BatchLimit(BATCH_SIZE)))
    parts = list(split_into_parts(bound, 0))
    assert len(parts) == 5
    shapes = {tuple(array.shape for array in part.model.data.arrays) for part in parts}
    assert len(shapes) == 1  # so that nothing is compiled anew
    sizes = sorted(shape[0] for shape in shapes.pop() if shape and shape[0] > SIZE)
    # The gain is indexed by the model itself.
    assert sizes == [7 * BATCH_SIZE, 7 * BATCH_SIZE, NUM_EVENTS]
    elements = np.concatenate([part.indices.ravel() for part in parts])
    np.testing.assert_array_equal(np.unique(elements), np.arange(NUM_EVENTS))
    in_memory = bound.data._replace(arrays=[np.array(array) for array in bound.data.arrays])
    assert len(list(split_into_parts(replace(bound, data=in_memory), 0))) == 1


def test_particles_count_in_the_batch(prior, data):
    """`max_batch_size` bounds what is in memory, particles included."""

    def used(num_particles):
        def total(prior):
            draws = ndp.sample_posterior(
                KEY,
                model,
                prior,
                *data,
                num_particles=num_particles,
                max_batch_size=128,
            )
            return draws.samples["x"].sum()

        compiled = jax.jit(total).lower(prior).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert used(64) < 1.5 * used(2)


def test_large_events_make_small_batches():
    """By default; a user's own number is kept."""

    def num_systems(max_batch_size, event_size):
        site = LatentSite("x", (event_size,), (), (), ndp.samplers.MultistepSDE())
        limit = BatchLimit.of("EStep", max_batch_size, default=1024)
        return limit.num_groups(LatentGroup((site,)).event_size, 4)

    sizes = (64, 28 * 28, 64 * 64 * 2, 320 * 320 * 2)
    assert [num_systems(None, size) for size in sizes] == [256, 83, 8, 1]
    assert [num_systems(512, size) for size in sizes] == [128] * 4
