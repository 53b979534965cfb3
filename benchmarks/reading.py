"""What reading a model costs: executions of the model, and memory against the number of events.

Executions are counted at a first call and at a second one. Memory is the largest that a process of
its own has during a call, less what it had before, in multiples of the data's size; each process
reads a model of so many events of 32 values. The last column has the data in a file that is mapped
into memory; of its pages, which the system may drop at any time, none is counted.

    python benchmarks/reading.py --num-events 125000 500000 2000000
"""

import argparse
import json
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
from flax import nnx
from numpyro.infer import MCMC

import numpyro_diffprior as ndp

SIZE = 32
FUNCTIONS = ("sample_posterior", "log_evidence", "EM.init", "EM.update", "MMPSKernel")


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


def make_call(name, model):
    """A function of the data that calls one of the public functions."""
    key = jax.random.key(0)
    sampler = ndp.samplers.DDPM(2)
    gaussian = ndp.GaussianDenoiser(jnp.zeros(SIZE), ndp.linalg.Isotropic(1.0, SIZE))
    prior = ndp.DiffusionPrior(gaussian, sampler=sampler)
    net = ndp.MLP((SIZE,), features=(8,), embedding=4, rngs=nnx.Rngs(0))
    network = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=sampler)
    em = ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(num_particles=2, max_batch_size=512),
        m_step=ndp.MStep(num_steps=2),
        start=ndp.GaussianStart(num_iterations=2),
    )
    states = []

    def update(y):
        if not states:
            states.append(em.init(key, network, y))
        states.append(em.update(states[-1], y)[0])
        return states[-1].draws

    def kernel(y):
        mcmc = MCMC(ndp.MMPSKernel(model), num_warmup=0, num_samples=2, progress_bar=False)
        mcmc.run(key, prior, y)
        return mcmc.get_samples()

    return {
        "sample_posterior": lambda y: ndp.sample_posterior(key, model, prior, y).samples,
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


def measure_memory(name, num_events, is_mapped):
    """The memory of one call, after one on little data, in multiples of the data's size."""
    model, _ = make_model()
    call = make_call(name, model)
    jax.block_until_ready(call(np.zeros((2000, SIZE), np.float32)))
    with tempfile.NamedTemporaryFile() as file:
        shape = (num_events, SIZE)
        if is_mapped:
            y = np.memmap(file.name, np.float32, "w+", shape=shape)
        else:
            y = np.zeros(shape, np.float32)
            y[:] = 1.0
        before = resident()
        with Peak() as peak:
            jax.block_until_ready(call(y))
        return (peak.largest - before) / y.nbytes


def in_a_process(name, num_events, is_mapped):
    arguments = ["--child", name, str(num_events), str(int(is_mapped))]
    found = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    return float(found.stdout.strip().splitlines()[-1])


def main(args):
    executions = {name: count_executions(name) for name in FUNCTIONS}
    print("executions of the model   first  second")
    for name, (cold, warm) in executions.items():
        print(f"{name:24s} {cold:6d} {warm:7d}", flush=True)
    memory = {}
    names = ("sample_posterior", "EM.init")
    print("peak memory, in multiples of the data")
    for name in names:
        memory[name] = {n: in_a_process(name, n, False) for n in args.num_events}
        largest = args.num_events[-1]
        memory[name]["mapped"] = in_a_process(name, largest, True)
        columns = "  ".join(f"{n}: {value:.1f}" for n, value in memory[name].items())
        print(f"{name:24s} {columns}", flush=True)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {"executions": executions, "memory": memory}
    (output / "reading.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-events", type=int, nargs="+", default=[125_000, 500_000, 2_000_000])
    parser.add_argument("--output", default="out")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.child:
        child, count, mapped = arguments.child
        print(measure_memory(child, int(count), bool(int(mapped))))
    else:
        main(arguments)
