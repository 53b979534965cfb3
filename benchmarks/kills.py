"""Whether runs of EM survive being killed: at random moments, in each of their phases.

A process runs EM with checkpoints. It is killed (SIGKILL) in an E-step, in an M-step or while a
checkpoint is being written, and started again, many times over. What counts is whether every start
finds the last complete checkpoint, how many iterations are lost, and whether the result is that of
a run which was never stopped, bit by bit.

    python benchmarks/kills.py --num-kills 100 --output out
"""

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from numpyro_diffprior.em import checkpoints
from numpyro_diffprior.em.store import Store
from numpyro_diffprior.em.watch import Watch
from numpyro_diffprior.infer import blocks

NUM_EVENTS, SIZE, NOISE = 768, 16, 0.3
PHASES = ("E-step", "M-step", "write")


def model(prior, mask, y=None):
    with numpyro.plate("events", len(mask)):
        mask, y = (numpyro.subsample(v, event_dim=1) for v in (mask, y))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).mask(mask).to_event(1), obs=y)


def run(num_iterations, folder=None):
    """Run EM; with a folder, from its last checkpoint. Draws are saved after every block."""
    checkpoints._DRAWS_SECONDS, blocks._PART_WORK = 0.0, 1
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_EVENTS, SIZE)).cumsum(-1)
    mask = rng.random(x.shape) < 0.5
    y = jnp.asarray(x + NOISE * rng.normal(size=x.shape), "float32")
    net = ndp.MLP((SIZE,), features=(32,), embedding=16, rngs=nnx.Rngs(0))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(16))
    em = ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(num_particles=4, max_batch_size=96),
        m_step=ndp.MStep(num_steps=128, batch_size=64),
    )
    return em.run(
        jax.random.key(0),
        num_iterations,
        prior,
        jnp.asarray(mask),
        y,
        progress_bar=False,
        checkpoint=folder,
    )


def run_child(args):
    """Run EM in this process, which says what it does."""
    enter, write = Watch.enter, Store.write

    def say_phase(self, phase):
        print(phase, flush=True)
        enter(self, phase)

    def say_write(self, number, arrays, **header):
        if self.folder.name == "iterations":
            print("write", number, flush=True)
        write(self, number, arrays, **header)

    Watch.enter, Store.write = say_phase, say_write
    result = run(args.num_iterations, args.child)
    np.savez(args.child + ".npz", **to_compare(result))


def to_compare(result):
    """All arrays of a result, except for times."""
    history = result.history._replace(e_step_seconds=0, m_step_seconds=0)
    arrays = ndp.to_arrays(result._replace(history=history))
    return {name: np.asarray(x) for name, x in arrays.items()}


def complete(folder):
    """The numbers of the complete checkpoints in a folder."""
    names = [path.name for path in (folder / "iterations").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def start_and_kill(rng, phase, folder, args):
    """Kill a process in a phase; return whether it was alive, and its last write."""
    script = [sys.executable, __file__, "--child", str(folder)]
    script += ["--num-iterations", str(args.num_iterations)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
    limits = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen(
        script, stdout=subprocess.PIPE, text=True, env=os.environ | cache | limits
    )
    left, last, entered = int(rng.integers(1, 5)), None, time.monotonic()
    for line in process.stdout:
        name, *number = line.split()
        last = int(number[0]) if name == "write" else last
        duration, entered = time.monotonic() - entered, time.monotonic()
        left -= name == phase
        if left == 0:
            time.sleep(rng.uniform() * min(duration, 0.5))
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait() == -signal.SIGKILL, last


def main(args):
    rng = np.random.default_rng(args.seed)
    kills, lost, findings = collections.Counter(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        for i in range(args.num_kills):
            phase = PHASES[i % len(PHASES)]
            before = complete(folder)
            killed, last = start_and_kill(rng, phase, folder, args)
            after = complete(folder)
            kills[phase] += killed
            # The last write may not have been complete.
            if last is not None and killed:
                lost.append(max(0, last - max(after, default=-1)))
            if max(after, default=-1) < max(before, default=-1) or (lost and lost[-1] > 1):
                findings.append(f"kill {i} in {phase}: {before} -> {after}, last write {last}")
            if not killed:
                break
            print(f"kill {i + 1:3d} in {phase:6s}: checkpoints {after}", flush=True)
        final = run(args.num_iterations, folder)
        whole = to_compare(run(args.num_iterations))
        found = to_compare(final)
    differing = [
        name for name, x in whole.items() if not np.array_equal(x, found[name], equal_nan=True)
    ]
    result = {
        "kills": dict(kills),
        "iterations lost": dict(collections.Counter(lost)),
        "findings": findings,
        "differing": differing,
        "settings": vars(args),
    }
    print(json.dumps(result, indent=1))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "kills.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-kills", type=int, default=100)
    parser.add_argument("--num-iterations", type=int, default=400)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()
    run_child(arguments) if arguments.child else main(arguments)
