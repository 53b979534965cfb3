"""Progress bars: what they count, and where they are quiet."""

import io
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior.diffusion import fitting
from numpyro_diffprior.infer import blocks, calibration, progress

N, D = 40, 2
KEY = jax.random.key(0)
Y = jnp.ones((N, D))
X = jax.random.normal(jax.random.key(1), (N, D))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Make standard error a terminal, where bars are drawn at once."""
    terminal, make_bar = Terminal(), progress.make_bar
    monkeypatch.setattr(sys, "stderr", terminal)
    options = {"delay": 0, "mininterval": 0, "miniters": 1}
    for module in (calibration, progress, fitting):
        monkeypatch.setattr(
            module, "make_bar", lambda *args, **kwargs: make_bar(*args, **(kwargs | options))
        )
    return terminal


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Parts have one block each, as those of long calculations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_PART_WORK", 1)
        yield


def model(prior, y):
    with numpyro.plate("n", N):
        y = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


GAUSSIAN = ndp.DiffusionPrior(
    ndp.GaussianDenoiser(jnp.zeros(D), jnp.eye(D)), sampler=ndp.samplers.MultistepSDE(4)
)
NETWORK = ndp.NetworkDenoiser(ndp.MLP((D,), features=(4,), embedding=4, rngs=nnx.Rngs(0)))
CALLS = {
    "sample_posterior": partial(ndp.sample_posterior, KEY, model, GAUSSIAN, Y, max_batch_size=16),
    "log_evidence": partial(
        ndp.log_evidence, KEY, model, GAUSSIAN, Y, num_particles=4, max_batch_size=64
    ),
    "calibrate": partial(
        ndp.calibrate, KEY, model, GAUSSIAN, Y, num_simulations=35, num_samples=2
    ),
    "fit_denoiser": partial(
        ndp.fit_denoiser, KEY, NETWORK, X, optimizer=optax.adam(1e-3), num_steps=9, batch_size=4
    ),
}


@pytest.mark.parametrize(
    ("name", "total"),
    [("sample_posterior", 3), ("log_evidence", 10), ("calibrate", 35), ("fit_denoiser", 9)],
)
def test_what_is_done_is_counted(monkeypatch, name, total):
    terminal = open_terminal(monkeypatch)
    CALLS[name]()
    assert f"{name}: 100%" in terminal.getvalue()
    assert f"{total}/{total} " in terminal.getvalue()


@pytest.mark.parametrize("name", ["calibrate", "fit_denoiser"])
def test_bars_do_not_change_results(monkeypatch, name):
    quiet = CALLS[name](progress_bar=False)
    open_terminal(monkeypatch)
    for x, y in zip(jax.tree.leaves(CALLS[name]()), jax.tree.leaves(quiet), strict=True):
        assert jnp.array_equal(x, y)


@pytest.mark.parametrize("max_parts", [1, 4, 35])
def test_simulations_in_parts_are_those_of_one(monkeypatch, max_parts):
    """The last of four parts has eight simulations, and is filled up to nine."""
    whole = CALLS["calibrate"]()
    monkeypatch.setattr(calibration, "_MAX_PARTS", max_parts)
    for x, y in zip(jax.tree.leaves(CALLS["calibrate"]()), jax.tree.leaves(whole), strict=True):
        assert jnp.array_equal(x, y)


@pytest.mark.parametrize("name", CALLS)
def test_bars_that_are_not_wanted(monkeypatch, name):
    terminal = open_terminal(monkeypatch)
    CALLS[name](progress_bar=False)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("name", CALLS)
def test_bars_are_quiet_in_logs(monkeypatch, name):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    CALLS[name]()
    assert log.getvalue() == ""


def test_the_phases_of_expectation_maximization(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    net = ndp.MLP((D,), features=(4,), embedding=4, rngs=nnx.Rngs(0))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(4))
    em = ndp.EM(
        model, optax.adam(1e-3), e_step=ndp.EStep(1, max_batch_size=16), m_step=ndp.MStep(2, 8)
    )
    em.run(KEY, 2, prior, Y, heldout=(Y,))
    shown = terminal.getvalue()
    phases = ["Gaussian start, compiling", "E-step, compiling", "E-step 1/3", "E-step 3/3"]
    phases += ["M-step", "M-step 2/2", "held out"]
    places = [shown.index(phase) for phase in phases]
    assert places == sorted(places)
    assert "0/2 " in shown
    assert "2/2 " in shown
    assert "loss=" in shown
    assert "chi2=" in shown
    assert "held out=-" in shown
    assert re.search(r"0/2 \[\d\d:\d\d<\?", shown)
    assert re.search(r"1/2 \[\d\d:\d\d<\d\d:\d\d", shown)  # the time that is left
