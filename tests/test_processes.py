"""EM in several processes: each draws its share of the events, and all get the same priors."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import xarray as xr

from examples import processes
from numpyro_diffprior._compile import devices
from numpyro_diffprior.infer import blocks
from numpyro_diffprior.reading import parts as reading_parts


@pytest.mark.parametrize("num_elements", [1, 2, 7, 8, 9, 30, 32, 33])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares(monkeypatch, num_elements, num_processes):
    """Together they are all blocks, with their keys, in order; then the last element again."""
    size = 4
    for module in (blocks, reading_parts):
        monkeypatch.setattr(module, "num_processes", lambda mesh: num_processes)
    elements = 10 * np.arange(num_elements)
    keys = np.arange(-(-num_elements // size))
    shares = []
    for number in range(num_processes):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        shares.append(blocks._share(keys, elements, size, None))
    assert len({len(own) for _, own in shares}) == 1  # so that they can be gathered
    own_keys, own = (np.concatenate(parts) for parts in zip(*shares, strict=True))
    np.testing.assert_array_equal(own[:num_elements], elements)
    assert set(own[num_elements:]) <= {elements[-1]}
    np.testing.assert_array_equal(own_keys[: len(keys)], keys)


def test_one_process_shares_nothing():
    x = {"x": np.arange(3)}
    mesh = jax.make_mesh((1,), ("a",))
    assert devices.num_processes(None) == devices.num_processes(mesh) == 1
    assert devices.own_devices(mesh) is mesh
    assert devices.gather(x, 0, mesh) is devices.localize(x, mesh) is x


def parse(folder, num_processes, num_iterations, *options):
    return processes.parse_args(
        f"--num-events 250 --num-processes {num_processes} --num-iterations {num_iterations} "
        f"--output {folder}".split()
        + list(options)
    )


@pytest.mark.slow
def test_two_processes(tmp_path):
    """They have the numbers of one; if one is killed, another number of them goes on."""
    two = processes.main(parse(tmp_path / "two", 2, 2))
    assert two["num_processes"] == 2
    # Events and weights that the processes divide among them, and draws in files of each.
    options = ["--divided", "--lean", "--min-shard-size", "512"]
    divided = processes.main(parse(tmp_path / "divided", 2, 2, *options))
    for process in ("0", "1"):
        assert list((tmp_path / "divided" / "draws" / process).glob("draws.x.2.*.npy"))
    np.testing.assert_allclose(divided["loss"], two["loss"], rtol=1e-4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, processes.__file__, "--num-processes", "2", "--address", address]
    command += ["--num-iterations", "1000", "--output", str(tmp_path / "two")]
    running = [subprocess.Popen([*command, "--process", str(i)]) for i in range(2)]
    try:
        while not (tmp_path / "two" / "run" / "iterations" / "4").exists():
            assert [process.poll() for process in running] == [None, None]
            time.sleep(0.1)
        os.kill(running[1].pid, signal.SIGKILL)
        assert running[0].wait(300) != 0  # it does not wait for the other one
    finally:
        for process in running:
            process.kill()
    done = max(int(path.name) for path in (tmp_path / "two" / "run" / "iterations").glob("[0-9]*"))
    last = processes.main(parse(tmp_path / "two", 1, done + 1))
    one = processes.main(parse(tmp_path / "one", 1, done + 1))
    assert json.loads((tmp_path / "two" / "processes.json").read_text()) == last
    for found in (two, last):
        for name in ("loss", "reduced_chi_square"):
            np.testing.assert_allclose(found[name][0], one[name][0], rtol=1e-4)
            # Later on, resampling of particles amplifies rounding.
            np.testing.assert_allclose(found[name], one[name][: len(found[name])], rtol=0.05)


FIT = """
import sys
import jax, numpy as np, optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
import numpyro_diffprior as ndp

address, process = sys.argv[1], int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
mesh = None
if address:
    jax.distributed.initialize(address, 2, process)
    mesh = jax.make_mesh((2,), ("events",))
    own = np.array_split(x, 2)[process]
    sharding = NamedSharding(mesh, PartitionSpec("events"))
    x = jax.make_array_from_process_local_data(sharding, own, x.shape)
net = ndp.MLP((3,), features=(16,), embedding=8, rngs=nnx.Rngs(0))
fit = ndp.fit_denoiser(
    jax.random.key(0), ndp.NetworkDenoiser(net), x, optimizer=optax.adam(1e-2), num_steps=8,
    batch_size=16, mesh=mesh,
)
print(*np.asarray(fit.losses))
"""


@pytest.mark.slow
def test_a_fit_to_events_that_processes_divide():
    def run(address, number):
        command = [sys.executable, "-c", FIT, address]
        options = {"stdout": subprocess.PIPE, "text": True}
        running = [subprocess.Popen([*command, str(i)], **options) for i in range(number)]
        found = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0] * number
        return np.array([text.splitlines()[-1].split() for text in found], float)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    two, one = run(address, 2), run("", 1)
    np.testing.assert_array_equal(two[0], two[1])
    np.testing.assert_allclose(two[0], one[0], rtol=1e-4)


STOPPED = """
import os, sys, time
from examples import processes
from numpyro_diffprior.em import checkpoints
from numpyro_diffprior.infer import blocks
from numpyro_diffprior.reading import parts

address, process, last, *options = sys.argv[1:]
checkpoints._DRAWS_SECONDS, parts._MAX_BLOCKS = 0.0, 1
draw_part, num_drawn = blocks._draw_part, 0

def draw(*args):
    global num_drawn
    if num_drawn == int(last):
        time.sleep(5 * (process == "0"))  # without which the others end
        os._exit(7)
    num_drawn += 1
    return draw_part(*args)

blocks._draw_part = draw
options += ["--address", address, "--process", process]
processes.main(processes.parse_args(options))
print("drawn", num_drawn)
"""


@pytest.mark.slow
def test_an_e_step_of_two_processes_goes_on(tmp_path):
    """Each has saved the parts that it drew, and draws the others."""

    def run(folder, last, num_iterations=3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        options = ["--num-processes", "2", "--num-iterations", str(num_iterations)]
        options += ["--num-events", "250", "--output", str(tmp_path / folder)]
        command = [sys.executable, "-c", STOPPED, address]
        running = [
            subprocess.Popen(
                [*command, str(i), str(last), *options], stdout=subprocess.PIPE, text=True
            )
            for i in range(2)
        ]
        texts = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [7 * (last < 12)] * 2
        if last >= 12:
            return [int(text.split()[-1]) for text in texts]

    # Each iteration has four parts in each process: one and a half are done.
    run("stopped", 6)
    folder = tmp_path / "stopped" / "run"
    names = {f"draws-{i}.of2" for i in range(2)}
    assert {path.name for path in folder.glob("draws*")} == names
    assert {len(list((folder / name).iterdir())) for name in names} == {2}
    assert run("stopped", 99) == [6, 6]
    assert not [path for name in names for path in (folder / name).iterdir()]
    assert run("whole", 99) == [12, 12]
    found, whole = (
        json.loads((tmp_path / name / "processes.json").read_text())
        for name in ("stopped", "whole")
    )
    assert found == whole
    processes.main(parse(tmp_path / "stopped", 1, 4))
    assert {path.name for path in folder.glob("draws*")} == {"draws"}


DRAW = """
import sys
import jax, numpy as np, numpyro, numpyro.distributions as dist
import numpyro_diffprior as ndp

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
y = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
mesh = None
if address:
    jax.distributed.initialize(address, 2, process)
    mesh = jax.make_mesh((2,), ("events",))

def model(prior, y):
    with numpyro.plate("events", len(y)):
        value = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=value)

prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(np.zeros(3), np.eye(3)))
options = dict(num_samples=2, max_batch_size=16, mesh=mesh)
drawn = ndp.sample_posterior(jax.random.key(0), model, prior, y, **options)
written = ndp.sample_posterior(jax.random.key(0), model, prior, y, **options, folder=folder)
np.testing.assert_array_equal(written.samples["x"][...], drawn.samples["x"])

events = set()

def take(index):
    events.update(index.tolist())
    return y[index]

lazy = ndp.lazy_arrays(take, len(y))
ndp.sample_posterior(jax.random.key(0), model, prior, lazy, **options)
assert len(events) <= (33 if address else 60), events  # its own, and the first one
y[-1, 0] = np.nan  # an event that the last process reads
try:
    ndp.sample_posterior(jax.random.key(0), model, prior, y, **options)
except ValueError as error:
    assert "hold NaN" in str(error)
else:
    raise AssertionError("NaN was not found")
print(float(np.sum(drawn.samples["x"])))
"""


@pytest.mark.slow
def test_draws_in_a_folder_of_two_processes(tmp_path):
    def run(address, number):
        command = [sys.executable, "-c", DRAW, address]
        options = {"stdout": subprocess.PIPE, "text": True}
        folder = tmp_path / str(number)
        running = [
            subprocess.Popen([*command, str(i), str(folder)], **options) for i in range(number)
        ]
        found = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0] * number
        return xr.open_zarr(folder, consolidated=False)["x"], [
            float(text.split()[-1]) for text in found
        ]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (two, sums), (one, (total,)) = run(address, 2), run("", 1)
    np.testing.assert_allclose(two, one, atol=1e-5)
    np.testing.assert_allclose(sums, total, rtol=1e-4)
