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

from examples import processes
from numpyro_diffprior._compile import devices
from numpyro_diffprior.infer import blocks


@pytest.mark.parametrize("num_elements", [1, 2, 7, 8, 9, 30, 32, 33])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares(monkeypatch, num_elements, num_processes):
    """Together they are all blocks, with their keys, in order; then the last element again."""
    size = 4
    monkeypatch.setattr(blocks, "num_processes", lambda mesh: num_processes)
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
