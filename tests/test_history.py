"""The history of a run as a dataset of xarray, and in a CSV file."""

import re
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import numpyro_diffprior as ndp

FIELDS = ndp.EMMetrics._fields
N = 3
NUMBERS = np.arange(1, N + 1)


def make_history(dtype=jnp.float32):
    """Metrics of which each has its own values, a NaN, and the types that EM returns."""
    columns = {name: jnp.arange(N, dtype=dtype) / 3 + i for i, name in enumerate(FIELDS)}
    columns["heldout_log_evidence"] = columns["heldout_log_evidence"].at[1].set(jnp.nan)
    integers = {"num_failed": jnp.arange(N), "diverged": jnp.array([False, False, True])}
    return ndp.EMMetrics(**columns | integers)


HISTORY = make_history()


def test_variables_have_names_and_units():
    data = HISTORY.to_dataset()
    assert list(data) == list(FIELDS)
    np.testing.assert_array_equal(data["iteration"], NUMBERS)
    for name, column in HISTORY._asdict().items():
        np.testing.assert_array_equal(data[name], column)
        assert data[name].attrs["long_name"]
    units = {name: x.attrs.get("units") for name, x in data.items()}
    assert units["loss"] == units["ess"] == "1"
    assert units["e_step_seconds"] == units["m_step_seconds"] == "s"
    assert {name for name, unit in units.items() if unit == "nat"} == {
        "log_evidence",
        "heldout_log_evidence",
        "heldout_standard_error",
    }
    # One has the unit of the data, the other is true or false.
    assert {n for n, unit in units.items() if unit is None} == {"sliced_wasserstein", "diverged"}


def test_iterations_are_numbered():
    np.testing.assert_array_equal(HISTORY.to_dataset(11)["iteration"], [11, 12, 13])
    single = ndp.EMMetrics(*(x[0] for x in HISTORY)).to_dataset()
    assert dict(single.sizes) == {}
    assert float(single["loss"]) == float(HISTORY.loss[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("number", [0, N])
def test_a_dataset_is_stored_in_netcdf(tmp_path, dtype, number):
    history = ndp.EMMetrics(*(x[:number] for x in make_history(dtype)))
    data = history.to_dataset()
    data.to_netcdf(tmp_path / "history.nc", engine="scipy")
    assert xr.load_dataset(tmp_path / "history.nc").identical(data)


def write(logger, first, last):
    """Write the lines of some iterations; the history has the numbers modulo N."""
    for number in range(first, last + 1):
        metrics = ndp.EMMetrics(*(x[(number - 1) % N] for x in HISTORY))
        assert logger(types.SimpleNamespace(num_iterations=number), metrics) is None


def read(path):
    return np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding=None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_lines_are_metrics(path):
    write(ndp.CSVLogger(path), 1, N)
    rows = read(path)
    assert rows.dtype.names == ("iteration", *FIELDS)
    np.testing.assert_array_equal(rows["iteration"], NUMBERS)
    for name, column in HISTORY._asdict().items():
        np.testing.assert_array_equal(rows[name].astype(column.dtype), column)


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize(("last", "first"), [(3, 4), (5, 4), (5, 1), (5, 5)])
def test_lines_from_the_current_iteration_on_are_replaced(path, tmp_path, last, first, is_new):
    """By another logger as by the same."""
    logger = ndp.CSVLogger(path)
    write(logger, 1, last)
    write(ndp.CSVLogger(path) if is_new else logger, first, 6)
    write(ndp.CSVLogger(tmp_path / "whole.csv"), 1, 6)
    assert path.read_text() == (tmp_path / "whole.csv").read_text()


@pytest.mark.parametrize("num_lost", [1, 3, 40])
def test_an_incomplete_line_is_dropped(path, num_lost):
    write(ndp.CSVLogger(path), 1, 2)
    path.write_text(path.read_text()[:-num_lost])
    write(ndp.CSVLogger(path), 3, 3)
    np.testing.assert_array_equal(read(path)["iteration"], [1, 3])


def test_another_file_is_refused(path, tmp_path):
    path.write_text("time,flux\n1,2\n")
    with pytest.raises(ValueError, match="to begin with 'iteration,loss,.*got 'time,flux'"):
        ndp.CSVLogger(path)
    assert path.read_text() == "time,flux\n1,2\n"
    with pytest.raises(FileNotFoundError, match="missing"):
        ndp.CSVLogger(tmp_path / "missing" / "metrics.csv")


def test_a_line_that_cannot_be_written(path, monkeypatch):
    """The run goes on with one warning, and later lines are written."""
    logger = ndp.CSVLogger(path)
    write(logger, 1, 1)

    def fail(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.warns(UserWarning, match="line could not be written.*No space left") as caught:
            write(logger, 2, 3)
    assert len(caught) == 1
    write(logger, 4, 4)
    np.testing.assert_array_equal(read(path)["iteration"], [1, 4])


def test_the_function_for_tensorboard_in_the_guide():
    guide = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
    namespace, written = {}, {}
    exec(re.search(r"^def log\(writer.*?\n\n", guide, re.MULTILINE | re.DOTALL)[0], namespace)
    writer = types.SimpleNamespace(add_scalar=lambda *args: written.update({args[0]: args[1:]}))
    metrics = ndp.EMMetrics(*(x[0] for x in HISTORY))
    namespace["log"](writer, types.SimpleNamespace(num_iterations=7), metrics)
    assert written == {name: (float(x), 7) for name, x in metrics._asdict().items()}
