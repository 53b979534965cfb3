"""Plots draw what they are given: the data of their artists against closed forms."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import numpyro_diffprior as ndp

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RNG = np.random.default_rng(0)
N = 6
ITERATION = np.arange(1, N + 1)
ONES = jnp.ones(N)
HISTORY = ndp.EMMetrics(
    loss=1 / jnp.arange(1.0, N + 1),
    sliced_wasserstein=ONES.at[0].set(jnp.nan),
    residual=ONES,
    num_truncated=jnp.zeros(N, int),
    num_solver_steps=jnp.zeros(N),
    ess=ONES,
    num_resamplings=jnp.zeros(N, int),
    log_evidence=jnp.nan * ONES,
    reduced_chi_square=ONES,
    e_step_seconds=2 * ONES,
    m_step_seconds=ONES,
    heldout_log_evidence=-jnp.square(jnp.arange(N) - 3.0).at[0].set(jnp.nan),
    heldout_standard_error=0.5 * ONES,
    num_failed=jnp.zeros(N, int),
    diverged=jnp.zeros(N, bool),
)


@pytest.fixture(autouse=True)
def _style():
    """Plots leave matplotlib's parameters as they are."""
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


def band(collection):
    """The place, the lower and the upper edge of a band."""
    vertices = collection.get_paths()[0].vertices
    place = np.unique(vertices[:, 0])
    edges = [vertices[vertices[:, 0] == x, 1] for x in place]
    return place, np.array([y.min() for y in edges]), np.array([y.max() for y in edges])


def images(axes):
    return [ax.images[0].get_array() for ax in np.ravel(axes)]


def test_matplotlib_is_imported_by_the_first_plot():
    code = "import numpyro_diffprior, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plot.samples: .*numpyro_diffprior\[plot\]"):
        ndp.plot.samples(np.zeros((2, 4, 4)))


# History


@pytest.mark.parametrize("form", ["metrics", "dataset"])
def test_history(form):
    history = HISTORY if form == "metrics" else HISTORY.to_dataset()
    axes = ndp.plot.history(history)
    shown = [
        name
        for name, x in HISTORY._asdict().items()
        if np.nan_to_num(x).any() and name != "heldout_standard_error"
    ]
    assert axes.shape == (len(shown),)
    for ax, name in zip(axes, shown, strict=True):
        line, best = ax.lines
        np.testing.assert_array_equal(line.get_xdata(), ITERATION)
        np.testing.assert_array_equal(line.get_ydata(), getattr(HISTORY, name))
        assert best.get_xdata() == [4, 4]
        assert ax.get_xlabel() == "iteration"
        assert len(ax.collections) == (name == "heldout_log_evidence")
    labels = {name: ax.get_ylabel().replace("\n", " ") for ax, name in zip(axes, shown)}
    assert labels["e_step_seconds"] == "time of the E-step [s]"
    assert labels["heldout_log_evidence"] == "held-out log-evidence [nat]"
    assert labels["loss"] == "training loss"
    _, low, high = band(axes[shown.index("heldout_log_evidence")].collections[0])
    np.testing.assert_allclose(low, np.asarray(HISTORY.heldout_log_evidence)[1:] - 0.5)
    np.testing.assert_allclose(high, np.asarray(HISTORY.heldout_log_evidence)[1:] + 0.5)


def test_history_on_given_axes():
    _, given = plt.subplots(1, 2)
    drawn = ndp.plot.history(HISTORY.to_dataset(11), metrics=["loss", "num_failed"], axes=given)
    assert list(drawn) == list(given)
    np.testing.assert_array_equal(given[1].lines[0].get_xdata(), ITERATION + 10)
    np.testing.assert_array_equal(given[1].lines[0].get_ydata(), np.zeros(N))


def test_history_without_held_out_events():
    history = HISTORY._replace(heldout_log_evidence=jnp.nan * ONES)
    (ax,) = ndp.plot.history(history, metrics=["loss"])
    assert len(ax.lines) == 1
    assert ax.get_legend() is None


def test_history_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"expected names of .*got \['losses'\]"):
        ndp.plot.history(HISTORY, metrics=["losses"])
    with pytest.raises(ValueError, match="expected 1 axes, got 2"):
        ndp.plot.history(HISTORY, metrics=["loss"], axes=plt.subplots(1, 2)[1])
    with pytest.raises(ValueError, match="one iteration or more, got none"):
        ndp.plot.history(HISTORY.to_dataset().isel(iteration=[]))
    with pytest.raises(ValueError, match="one iteration or more, got none"):
        ndp.plot.history(ndp.EMMetrics(*(x[0] for x in HISTORY)))


# Samples


@pytest.mark.parametrize("channels", [(), (1,)])
@pytest.mark.parametrize("kind", [float, complex])
def test_samples_of_images(channels, kind):
    x = RNG.normal(size=(11, 4, 5)).astype(kind) * (1 + 1j if kind is complex else 1)
    axes = ndp.plot.samples(x.reshape(*x.shape, *channels), num_columns=3, num_rows=3)
    assert axes.shape == (9,)
    values = abs(x[:9]) if kind is complex else x[:9]
    np.testing.assert_array_equal(images(axes), values)
    for ax in axes:
        assert ax.images[0].get_clim() == (values.min(), values.max())
    assert len(axes[0].figure.axes) == 10  # with a color bar


def test_samples_of_colors():
    """Limits are scaled to black and white; a pixel with a NaN is transparent."""
    x = RNG.uniform(-3, 3, size=(4, 5, 6, 3))
    x[0, 0, 0, 1] = np.nan
    axes = ndp.plot.samples(jnp.asarray(x), vmin=-2, vmax=2)
    colors = np.stack(images(axes))
    known = np.isfinite(x).all(-1)
    np.testing.assert_array_equal(colors[..., 3], known)
    expected = np.clip((x + 2) / 4, 0, 1)
    np.testing.assert_allclose(colors[known][:, :3], expected[known], atol=1e-6)
    assert len(axes[0].figure.axes) == 4


def test_hidden_pixels_are_gray():
    x = np.zeros((1, 2, 2))
    x[0, 0, 1] = np.nan
    (ax,) = ndp.plot.samples(x)
    np.testing.assert_array_equal(ax.images[0].get_array().mask, np.isnan(x[0]))
    assert ax.images[0].cmap.get_bad()[3] == 0
    red, green, blue, _ = ax.get_facecolor()
    assert red == green == blue == 0.8


def test_samples_of_curves():
    x = RNG.normal(size=(5, 7))
    axes = ndp.plot.samples(x, num_columns=3)
    np.testing.assert_array_equal([ax.lines[0].get_ydata() for ax in axes], x)
    assert len({ax.get_ylim() for ax in axes}) == 1
    x = RNG.normal(size=(3, 7, 2))
    given = plt.subplots(1, 3)[1]
    axes = ndp.plot.samples(x, spatial_dims=1, axes=given, vmin=-9)
    drawn = [[line.get_ydata() for line in ax.lines] for ax in axes]
    np.testing.assert_array_equal(drawn, np.moveaxis(x, -1, 1))
    assert all(ax.get_ylim()[0] == -9 for ax in given)


def test_samples_on_given_axes():
    """There is neither a color bar nor a limit of their number."""
    figure, given = plt.subplots(3, 3)
    axes = ndp.plot.samples(np.zeros((9, 2, 2)), num_columns=1, num_rows=1, axes=given)
    assert list(axes) == figure.axes


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 4, 4, 2), {}, "1 or 3 channels, got 2"),
        ((3, 4, 4, 4, 1), {}, r"events must have shape \(height, width\).*got \(4, 4, 4, 1\)"),
        ((3,), {}, r"events must have shape \(length\).*got \(\)"),
        ((3, 4, 4, 1), {"spatial_dims": 1}, r"spatial_dims=1, events must have shape \(length\)"),
        ((3, 4), {"spatial_dims": 3}, "spatial_dims must be 1 or 2, got 3"),
        ((0, 4), {}, "one sample or more, got none"),
    ],
)
def test_samples_that_cannot_be_drawn(shape, options, message):
    with pytest.raises(ValueError, match=f"plot.samples: .*{message}"):
        ndp.plot.samples(np.zeros(shape), **options)


# Restored events


def rows(axes):
    return {row[0].get_ylabel(): np.stack(images(row)) for row in axes}


def test_restored_images():
    truth = RNG.normal(size=(5, 4, 3))
    draws = truth + RNG.normal(size=(20, 5, 4, 3))
    mask = RNG.random((5, 4, 3)) < 0.5
    axes = ndp.plot.restored(truth, draws, truth=truth, mask=mask, num_events=4)
    assert axes.shape == (7, 4)
    drawn = rows(axes)
    expected = {
        "observed": np.ma.masked_where(~mask, truth),
        "truth": truth,
        "mean": draws.mean(0),
        "draw 1": draws[0],
        "draw 2": draws[1],
        "deviation": draws.std(0),
        "error": draws.mean(0) - truth,
    }
    assert list(drawn) == list(expected)
    for label, x in expected.items():
        np.testing.assert_allclose(drawn[label], x[:4], err_msg=label)
    limits = {row[0].get_ylabel(): [ax.images[0].get_clim() for ax in row] for row in axes}
    assert all(len(set(pairs)) == 1 for pairs in limits.values())
    shared = np.stack([truth, draws.mean(0), draws[0], draws[1]])[:, :4]
    for label in ("observed", "truth", "mean", "draw 1", "draw 2"):
        np.testing.assert_allclose(limits[label][0], (shared.min(), shared.max()))
    largest = abs(expected["error"][:4]).max()
    np.testing.assert_allclose(limits["error"][0], (-largest, largest))
    np.testing.assert_allclose(limits["deviation"][0], (0, draws.std(0)[:4].max()))
    assert len(axes[0, 0].figure.axes) == 7 * 4 + 3  # color bars


def test_restored_without_observation_and_truth():
    axes = ndp.plot.restored(None, RNG.normal(size=(3, 2, 4, 4)), num_draws=1)
    assert list(rows(axes)) == ["mean", "draw 1", "deviation"]


def test_restored_colors():
    truth = RNG.random((2, 4, 4, 3))
    draws = truth + RNG.normal(size=(8, 2, 4, 4, 3))
    drawn = {
        row[0].get_ylabel(): images(row) for row in ndp.plot.restored(None, draws, truth=truth)
    }
    assert np.shape(drawn["mean"]) == (2, 4, 4, 4)
    np.testing.assert_allclose(drawn["deviation"], np.sqrt(draws.var(0).mean(-1)))
    error = np.sqrt(((draws.mean(0) - truth) ** 2).mean(-1))
    np.testing.assert_allclose(drawn["error"], error)


def test_restored_from_fourier_coefficients():
    """Observations of another kind have a scale of their own."""
    truth = RNG.normal(size=(2, 4, 4)) + 1j * RNG.normal(size=(2, 4, 4))
    draws = truth + RNG.normal(size=(8, 2, 4, 4))
    y = np.fft.fft2(truth)
    axes = ndp.plot.restored(y, draws, truth=truth)
    drawn = rows(axes)
    np.testing.assert_allclose(drawn["observed"], abs(y))
    np.testing.assert_allclose(drawn["mean"], abs(draws.mean(0)))
    np.testing.assert_allclose(drawn["error"], abs(draws.mean(0) - truth))
    assert axes[0, 0].images[0].get_clim() == (abs(y).min(), abs(y).max())
    axes = ndp.plot.restored(np.ones((2, 3, 3)), draws.real)
    assert rows(axes)["observed"].shape == (2, 3, 3)


@pytest.mark.parametrize("num_channels", [1, 2])
def test_restored_curves(num_channels):
    truth = RNG.normal(size=(3, 6, num_channels))
    draws = truth + RNG.normal(size=(21, *truth.shape))
    y = np.where(RNG.random(truth.shape) < 0.5, truth, np.nan)
    shape = truth.shape if num_channels > 1 else truth.shape[:2]
    options = {"truth": truth.reshape(shape), "spatial_dims": 1, "vmax": 9.0}
    axes = ndp.plot.restored(y.reshape(shape), draws.reshape(21, *shape), **options)
    assert axes.shape == (num_channels, 3)
    low, high = np.quantile(draws, (0.05, 0.95), axis=0)
    for channel, row in enumerate(axes):
        for i, ax in enumerate(row):
            at = (i, slice(None), channel)
            mean, draw, _, true, points = (line.get_ydata() for line in ax.lines)
            np.testing.assert_allclose(mean, draws.mean(0)[at])
            np.testing.assert_array_equal(draw, draws[0][at])
            np.testing.assert_array_equal(true, truth[at])
            np.testing.assert_array_equal(points, y[at])
            _, lower, upper = band(ax.collections[0])
            np.testing.assert_allclose(lower, low[at])
            np.testing.assert_allclose(upper, high[at])
            assert ax.get_ylim()[1] == 9
    (legend,) = axes[0, 0].figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["mean", "90 %", "draws", "truth", "observed"]


@pytest.mark.parametrize(
    ("y", "samples", "truth", "message"),
    [
        ((2, 4), (3, 2), None, r"samples with shape \(num_samples, num_events, \*event\)"),
        ((3, 4, 4), (3, 2, 4, 4), None, r"y with shape \(2, \*observed\).*got \(3, 4, 4\)"),
        ((2, 4, 4), (3, 2, 4, 4), (2, 4), r"truth with shape \(2, 4, 4\), got \(2, 4\)"),
        ((2, 3), (3, 2, 4), None, r"the shape \(2, 4\) of the curves, got \(2, 3\)"),
        ((2, 4, 4), (3, 2, 4, 4, 2), None, "1 or 3 channels, got 2"),
    ],
)
def test_restored_events_that_cannot_be_drawn(y, samples, truth, message):
    truth = None if truth is None else np.zeros(truth)
    with pytest.raises(ValueError, match=f"plot.restored: .*{message}"):
        ndp.plot.restored(np.zeros(y), np.zeros(samples), truth=truth)


# Diagnostics


@pytest.mark.parametrize("num_particles", [None, 4])
def test_ess_path(num_particles):
    quantile = np.arange(101) / 100  # of which each quantile is the quantile's order
    path = np.outer(quantile, [4.0, 2.0, 1.0]).reshape(1, 101, 3)
    ax = plt.subplots()[1]
    stats = {"ess_path": jnp.asarray(path)}
    assert ndp.plot.ess_path(stats, num_particles=num_particles, ax=ax) is ax
    scale = np.array([4.0, 2.0, 1.0]) / (num_particles or 1)
    (median,) = ax.lines
    np.testing.assert_array_equal(median.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(median.get_ydata(), 0.5 * scale, rtol=1e-6)
    for collection, (low, high) in zip(ax.collections, [(0.25, 0.75), (0.05, 0.95)], strict=True):
        _, lower, upper = band(collection)
        np.testing.assert_allclose(lower, low * scale, rtol=1e-5)
        np.testing.assert_allclose(upper, high * scale, rtol=1e-5)
    relative = "" if num_particles is None else "relative "
    assert ax.get_ylabel() == f"{relative}effective sample size"


def test_ess_path_over_noise_levels():
    stats = {"ess_path": jnp.ones((2, 5, 3))}
    ax = ndp.plot.ess_path(stats, sigma=(10.0, 1.0, 0.1))
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [10.0, 1.0, 0.1])
    left, right = ax.get_xlim()
    assert left > right
    assert ax.get_xscale() == "log"
    with pytest.raises(ValueError, match=r"expected sigma with shape \(3,\), got \(2,\)"):
        ndp.plot.ess_path(stats, sigma=(1.0, 0.1))


def half_width(ax):
    """Half the width of the band at the nominal coverage of one half."""
    place, low, high = band(ax.collections[0])
    middle = np.argmin(abs(place - 0.5))
    return (high[middle] - low[middle]) / 2


@pytest.mark.parametrize("masked", [False, True])
def test_coverage(masked):
    truth, draws = RNG.normal(size=(40, 3)), RNG.normal(size=(39, 40, 3))
    where = RNG.random((40, 3)) < 0.5 if masked else None
    if masked:
        where[0] = False  # an event without elements
    ax = ndp.plot.coverage(draws, truth, levels=(0.2, 0.5, 0.9), where=where)
    diagonal, curve = ax.lines
    expected = ndp.metrics.coverage(draws, truth, levels=(0.2, 0.5, 0.9), where=where)
    np.testing.assert_array_equal(curve.get_xdata(), [0.2, 0.5, 0.9])
    np.testing.assert_allclose(curve.get_ydata(), expected, rtol=1e-5)
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())


@pytest.mark.parametrize("num_elements", [1, 8])
def test_coverage_counts_elements_that_are_equal_once(num_elements):
    truth, draws = RNG.normal(size=(400, 1)), RNG.normal(size=(39, 400, 1))
    truth, draws = (np.repeat(x, num_elements, axis=-1) for x in (truth, draws))
    width = half_width(ndp.plot.coverage(draws, truth))
    np.testing.assert_allclose(width, 1.96 * np.sqrt(0.25 / 400), rtol=0.01)


def test_coverage_counts_independent_elements():
    """Their effective number has a relative standard error of less than sqrt(2 / 400)."""
    truth, draws = RNG.normal(size=(400, 8)), RNG.normal(size=(39, 400, 8))
    width = half_width(ndp.plot.coverage(draws, truth))
    np.testing.assert_allclose(width, 1.96 * np.sqrt(0.25 / 3200), rtol=0.15)


def test_coverage_of_one_event_or_of_all():
    """Without any variation, events count once."""
    truth = RNG.normal(size=(1, 8))
    width = half_width(ndp.plot.coverage(RNG.normal(size=(39, 1, 8)), truth))
    np.testing.assert_allclose(width, 1.96 * 0.5, rtol=1e-5)
    draws = np.linspace(-1, 1, 39)[:, None, None] * np.ones((25, 8))
    width = half_width(ndp.plot.coverage(draws, np.zeros((25, 8))))
    np.testing.assert_allclose(width, 1.96 * 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("samples", "truth", "options", "message"),
    [
        ((1, 4), (4,), {}, "two or more samples"),
        ((5, 4), (3,), {}, r"truth with shape .*got \(5, 4\) and \(3,\)"),
        ((5, 4), (4,), {"where": np.zeros(4, bool)}, "to select an element, got none"),
        ((5, 4), (4,), {"levels": (0.9,)}, "take more draws or lower levels"),
    ],
)
def test_coverage_that_cannot_be_drawn(samples, truth, options, message):
    with pytest.raises(ValueError, match=message):
        ndp.plot.coverage(np.zeros(samples), np.zeros(truth), **options)
