"""Batches follow from the size of events, and programs that do not fit are refused."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior._compile import memory
from numpyro_diffprior._compile.memory import BatchLimit, check_memory
from numpyro_diffprior.diffusion import fitting, minibatches, training
from tests.counting import compilations

KEY = jax.random.key(0)
SIZE, NUM = 4, 2048
SAMPLER = ndp.samplers.DDPM(4)
DENOISER = ndp.NetworkDenoiser(ndp.MLP((SIZE,), features=(128,), rngs=nnx.Rngs(0)))
PRIOR = ndp.DiffusionPrior(DENOISER, sampler=SAMPLER)
Y = jnp.zeros((NUM, SIZE))


def model(prior, y):
    with numpyro.plate("events", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def prior_with(max_batch_size):
    return ndp.DiffusionPrior(DENOISER, sampler=SAMPLER, max_batch_size=max_batch_size)


CALLS = {
    "sample_posterior": lambda size: ndp.sample_posterior(
        KEY, model, PRIOR, Y, num_particles=4, max_batch_size=size
    ).samples["x"],
    "log_evidence": lambda size: (
        ndp.log_evidence(KEY, model, PRIOR, Y, num_particles=4, max_batch_size=size).value
    ),
    "sample": lambda size: prior_with(size).sample(KEY, (NUM,)),
    "log_prob": lambda size: prior_with(size).log_prob(Y),
}


@pytest.mark.parametrize("name", CALLS)
def test_programs_that_do_not_fit_are_refused(monkeypatch, name):
    """With advice that suffices."""
    call, plans, plan_of = CALLS[name], [], memory._plan

    def record(executable):
        plans.append(plan_of(executable))
        return plans[-1]

    monkeypatch.setattr(memory, "_plan", record)
    expected = call(NUM)
    (plan,) = plans
    assert plan.fixed < plan.temporary / 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: sum(plan) // 2)
    found = (
        r" need .* GiB of memory on .* are free: .*max_batch_size=(\d+) \(now 2048\) or less\.$"
    )
    with pytest.raises(MemoryError, match=found) as caught:
        call(NUM)
    advice = int(re.search(found, str(caught.value)).group(1))
    assert NUM / 8 < advice < NUM / 2
    assert call(advice).shape == expected.shape


def test_results_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="Samples need .* of memory on .*: the results alone do"):
        PRIOR.sample(KEY, (NUM,))


def test_one_event_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="max_batch_size=1 does not suffice; use a network of"):
        PRIOR.log_prob(Y[:1])


@partial(jax.jit, static_argnums=1)
def outer_products(x, num):
    return sum(jnp.sin(i + x[:, None] * x).sum() for i in range(num))


def test_checks_compile_nothing_again():
    checked = check_memory("Sums", lambda factor, *args: "")(outer_products)
    x = jnp.arange(100.0)
    jax.block_until_ready(x)
    with compilations() as count:
        checked(x, 3)
        checked(x, 3)
    assert count.compiled <= 2  # the program itself, and a scalar of the check
    assert outer_products._cache_size() == 1


def test_inside_of_a_compiled_function_there_is_no_check(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    checked = check_memory("Sums", lambda factor, *args: "advice")(outer_products)
    x = jnp.arange(100.0)
    with pytest.raises(MemoryError, match="Sums need"):
        checked(x, 2)
    expected = outer_products(x, 2)
    np.testing.assert_allclose(jax.jit(lambda x: checked(x, 2))(x), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: checked(x, 2))(), expected, rtol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(checked(x, 2), expected, rtol=1e-5)


def test_limits_of_control_groups(monkeypatch, tmp_path):
    """Of a process's own group and of those around it; cached files count as free."""
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for group, limit, used, cached in ((inner, "max", 0, 0), (inner.parent, 1000, 700, 200)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert memory._unused_limits(["1:name=systemd:/", "0::/job/step"]) == [500]
    assert memory._unused_limits([]) == []
    assert memory.free_bytes(jax.devices()[0]) > 2**20


def test_batches_follow_from_the_size_of_events():
    """By default; a user's own number is kept."""

    def sizes(max_batch_size):
        limit = BatchLimit.of("EStep", max_batch_size, default=1024)
        return [limit.num_groups(size) for size in (64, 256, 784, 8192, 2**19)]

    assert sizes(None) == [1024, 1024, 334, 32, 1]
    assert sizes(512) == [512] * 5


def loss_without_random_numbers(denoiser, x, sigma, rng_key, *, rngs=None):
    x_t = x + jnp.reshape(sigma, (-1, 1)) * jnp.cos(7 * x)
    return jnp.mean((denoiser(x_t, sigma) - x) ** 2 / jnp.reshape(sigma, (-1, 1)) ** 2)


def steps(batch_size, num_steps=3):
    optimizer = optax.sgd(1e-3)
    state = training.init_training(DENOISER, optimizer)
    x = jax.random.normal(KEY, (64, SIZE))
    return training.train(KEY, state, x, optimizer, num_steps=num_steps, batch_size=batch_size)


def test_gradients_accumulate_over_parts_of_a_batch(monkeypatch):
    monkeypatch.setattr(training, "denoising_loss", loss_without_random_numbers)
    whole, losses = steps(24)
    assert not np.allclose(losses[0], losses[-1], rtol=1e-3)
    monkeypatch.setattr(memory, "_MAX_ELEMENTS", 5 * SIZE)
    parts, losses_of_parts = steps(24)  # of four events
    assert minibatches.count_parts(24, DENOISER) == 6
    np.testing.assert_allclose(losses_of_parts, losses, rtol=1e-5)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        nnx.state(parts.denoiser.net, nnx.Param),
        nnx.state(whole.denoiser.net, nnx.Param),
    )


def test_error_ratios_by_parts_of_a_batch(monkeypatch):
    x = jax.random.normal(KEY, (64, SIZE))
    measure = partial(fitting.measure_error, KEY, DENOISER, x, batch_size=24)
    whole = measure().error_ratios
    monkeypatch.setattr(memory, "_MAX_ELEMENTS", 5 * SIZE)
    np.testing.assert_allclose(measure().error_ratios, whole, rtol=1e-5)


def test_gaussian_fits_are_refused_if_they_do_not_fit(monkeypatch):
    em = ndp.EM(model, optax.sgd(1e-3), start=ndp.GaussianStart(2))
    em.init(KEY, PRIOR, Y)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    message = r"Gaussian fits need .*batch_size=\d+ \(now 256\) or less \(EStep: max_batch_size\)"
    with pytest.raises(MemoryError, match=message):
        em.init(KEY, PRIOR, Y)


def test_training_is_refused_if_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4_000_000)
    with pytest.raises(MemoryError, match="Training steps need .* remat=True.*batch_size"):
        steps(1024)


def test_memory_of_training_is_bounded(monkeypatch):
    """A minibatch of eight times as many events takes hardly more of it."""

    def used(batch_size):
        def run(x):
            state = training.init_training(DENOISER, optax.sgd(1e-3))
            return training.train(
                KEY, state, x, optax.sgd(1e-3), num_steps=1, batch_size=batch_size
            )[1]

        spec = jax.ShapeDtypeStruct((64, SIZE), jnp.float32)
        return jax.jit(run).lower(spec).compile().memory_analysis().temp_size_in_bytes

    assert used(2048) > 6 * used(256)
    monkeypatch.setattr(memory, "_MAX_ELEMENTS", 256 * SIZE)
    assert used(2048) < 1.5 * used(256)
