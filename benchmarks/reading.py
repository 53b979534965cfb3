"""What reading a model costs: executions of the model, and memory against the number of events.

Executions are counted at a first call and at a second one. Memory is the largest that a process of
its own has during a call, less what it had before; each process reads a model of so many events of
32 values, from arrays, from a file that is mapped into memory, and from Zarr. Pages of mapped
files, which the system may drop at any time, are not counted. Some are also measured in two
processes, each of which draws half of the events; the larger number is shown.

    python benchmarks/reading.py --num-events 250000 2000000
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import zarr
from flax import nnx
from numpyro.infer import MCMC

import numpyro_diffprior as ndp

SIZE = 32
FUNCTIONS = ("sample_posterior", "log_evidence", "EM.init", "EM.update", "MMPSKernel")
MEASURED = (
    "sample_posterior",
    "sample_posterior, draws in a folder",
    "log_evidence",
    "EM.init",
    "EM.run",
    "EM.run, draws in a folder",
    "EM.run, draws in a folder, checkpoints",
)
IN_TWO_PROCESSES = (
    "sample_posterior",
    "sample_posterior, draws in a folder",
    "EM.run",
    "EM.run, draws in a folder",
    "EM.run, draws in a folder, checkpoints",
)
KINDS = ("array", "mapped", "zarr")


def make_model():
    """A model, and a list that grows at each of its executions."""
    executions = []

    def model(prior, y=None):
        executions.append(1)
        with numpyro.plate("events", len(y)):
            y = numpyro.subsample(y, event_dim=1)
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    return model, executions


def make_call(name, model, mesh=None, folder=None):
    """A function of the data that calls one of the public functions, once if it needs a folder."""
    key = jax.random.key(0)
    sampler = ndp.samplers.DDPM(2)
    gaussian = ndp.GaussianDenoiser(jnp.zeros(SIZE), ndp.linalg.Isotropic(1.0, SIZE))
    prior = ndp.DiffusionPrior(gaussian, sampler=sampler)
    net = ndp.MLP((SIZE,), features=(8,), embedding=4, rngs=nnx.Rngs(0))
    network = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=sampler)
    states = []

    def make_em(draws_in="device"):
        return ndp.EM(
            model,
            optax.adam(1e-3),
            e_step=ndp.EStep(num_particles=2, max_batch_size=512, draws_in=draws_in),
            m_step=ndp.MStep(num_steps=2),
            start=ndp.GaussianStart(num_iterations=2),
            mesh=mesh,
        )

    em = make_em()

    def update(y):
        if not states:
            states.append(em.init(key, network, y))
        states.append(em.update(states[-1], y)[0])
        return states[-1].draws

    def run(y):
        em = make_em(f"{folder}/draws" if "draws in a folder" in name else "device")
        checkpoint = f"{folder}/run" if "checkpoints" in name else None
        result = em.run(key, 2, network, y, checkpoint=checkpoint, progress_bar=False)
        return result.history.loss

    def kernel(y):
        mcmc = MCMC(ndp.MMPSKernel(model), num_warmup=0, num_samples=2, progress_bar=False)
        mcmc.run(key, prior, y)
        return mcmc.get_samples()

    def write(y):
        return ndp.sample_posterior(
            key, model, prior, y, folder=f"{folder}/draws", mesh=mesh
        ).stats

    if name.startswith("EM.run"):
        return run
    return {
        "sample_posterior": lambda y: (
            ndp.sample_posterior(key, model, prior, y, mesh=mesh).samples
        ),
        "sample_posterior, draws in a folder": write,
        "log_evidence": lambda y: (
            ndp.log_evidence(key, model, prior, y, num_estimates=2, num_particles=2).value
        ),
        "EM.init": lambda y: em.init(key, network, y).draws,
        "EM.update": update,
        "MMPSKernel": kernel,
    }[name]


def count_executions(name):
    """The executions of the model at a first call and at a second one."""
    model, executions = make_model()
    call = make_call(name, model)
    y = np.zeros((600, SIZE), np.float32)
    counts = []
    for _ in range(2):
        before = len(executions)
        jax.block_until_ready(call(y))
        counts.append(len(executions) - before)
    return counts


def resident():
    """The memory of this process that is resident and not of a file, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak:
    """The largest resident memory while a context is open."""

    def __enter__(self):
        self.largest, self._open = resident(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while self._open:
            self.largest = max(self.largest, resident())
            time.sleep(1e-3)

    def __exit__(self, *_):
        self._open = False
        self._thread.join()


def make_data(folder, kind, num_events):
    """Values of one, as an array, in a mapped file or in Zarr."""
    shape = (num_events, SIZE)
    if kind == "array":
        return np.ones(shape, np.float32)
    if kind == "mapped":
        y = np.memmap(Path(folder) / "y", np.float32, "w+", shape=shape)
    else:
        chunks = (8192, SIZE)
        y = zarr.create_array(Path(folder) / "y", shape=shape, chunks=chunks, dtype="float32")
    for start in range(0, num_events, 8192):
        y[start : start + 8192] = 1.0
    return y if kind == "mapped" else ndp.lazy_arrays(y)


def measure_memory(name, num_events, kind, folder, address="", process=0):
    """The memory of one call, after one on little data of the same kind, in MiB.

    The folder, which is empty, is that of all processes.
    """
    mesh = None
    if address:
        jax.distributed.initialize(address, 2, process)
        mesh = jax.make_mesh((2,), ("events",))
    model, _ = make_model()
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        call = make_call(name, model, mesh, f"{folder}/few")
        jax.block_until_ready(call(make_data(few, kind, 20_000)))
        y, call = make_data(many, kind, num_events), make_call(name, model, mesh, f"{folder}/many")
        before = resident()
        with Peak() as peak:
            jax.block_until_ready(call(y))
        return (peak.largest - before) / 2**20


def in_processes(name, num_events, kind, num_processes=1):
    address = ""
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", name, str(num_events), kind, folder]
        children = [
            subprocess.Popen([*command, address, str(i)], stdout=subprocess.PIPE, text=True)
            for i in range(num_processes)
        ]
        found = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"{name}: a process ended with an error")
    return max(float(text.strip().splitlines()[-1]) for text in found)


def main(args):
    executions = {name: count_executions(name) for name in FUNCTIONS}
    print("executions of the model   first  second")
    for name, (cold, warm) in executions.items():
        print(f"{name:24s} {cold:6d} {warm:7d}", flush=True)
    memory = {}
    sizes = ", ".join(f"{n * SIZE * 4 / 2**20:.0f}" for n in args.num_events)
    print(f"peak memory in MiB, for data of {sizes} MiB")
    for name in args.measured:
        for kind in args.kinds:
            for num_processes in (1, 2) if name in IN_TWO_PROCESSES else (1,):
                found = [in_processes(name, n, kind, num_processes) for n in args.num_events]
                label = name if num_processes == 1 else f"{name}, two processes"
                memory[f"{label}: {kind}"] = found
                print(f"{label:40s} {kind:6s}", *(f"{x:7.0f}" for x in found), flush=True)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {"executions": executions, "memory": memory}
    (output / "reading.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-events", type=int, nargs="+", default=[250_000, 2_000_000])
    parser.add_argument("--output", default="out")
    parser.add_argument("--measured", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.child:
        child, count, kind, shared, address, process = arguments.child
        print(measure_memory(child, int(count), kind, shared, address, int(process)))
    else:
        main(arguments)
