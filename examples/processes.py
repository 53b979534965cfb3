"""EM in several processes, each of which reads its own events.

Here they run on one machine:

    python examples/processes.py --num-processes 2

On a cluster, start the script once per host with the environment that JAX finds (SLURM, Open MPI,
Kubernetes), or with the address of the first host:

    srun python examples/processes.py --cluster
    python examples/processes.py --address host0:1234 --num-processes 2 --process 0

Events are noisy random walks, some of whose steps are hidden. The data are files, of which each
process reads the events that it draws, or arrays that the processes divide among them. A run goes
on from its checkpoints, also with another number of processes.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp

SIZE, NOISE = 16, 0.3


def model(prior, mask, y=None):
    with numpyro.plate("events", len(mask)):
        mask, y = (numpyro.subsample(v, event_dim=1) for v in (mask, y))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).mask(mask).to_event(1), obs=y)


def simulate(folder, num_events):
    """Write the data."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_events, SIZE)).cumsum(-1)
    np.save(folder / "mask.npy", rng.random(x.shape) < 0.75)
    np.save(folder / "y.npy", (x + NOISE * rng.normal(size=x.shape)).astype("float32"))


def divide(x, mesh):
    """An array of which each process holds its own events."""
    sharding = NamedSharding(mesh, PartitionSpec("events"))
    own = np.array_split(x, jax.process_count())[jax.process_index()]
    return jax.make_array_from_process_local_data(sharding, own, x.shape)


def learn(args):
    """Run EM on the devices of all processes; return what the first process writes."""
    folder = Path(args.output)
    if jax.process_index() == 0 and not (folder / "y.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        simulate(folder, args.num_events)
    multihost_utils.sync_global_devices("the data are written")
    mask, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("mask", "y"))
    mesh = jax.make_mesh((jax.device_count(),), ("events",))
    if args.divided:
        mask, y = (divide(x, mesh) for x in (mask, y))
    net = ndp.MLP((SIZE,), features=(32,), embedding=16, rngs=nnx.Rngs(0))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(16))
    em = ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(
            num_particles=4,
            max_batch_size=128,
            draws_in=folder / "draws" if args.lean else "device",
        ),
        m_step=ndp.MStep(num_steps=64, batch_size=64, min_shard_size=args.min_shard_size),
        mesh=mesh,
    )
    result = em.run(
        jax.random.key(0), args.num_iterations, prior, mask, y, checkpoint=folder / "run"
    )
    found = {
        "num_processes": jax.process_count(),
        "loss": np.asarray(result.history.loss).tolist(),
        "reduced_chi_square": np.asarray(result.history.reduced_chi_square).tolist(),
    }
    if jax.process_index() == 0:
        (folder / "processes.json").write_text(json.dumps(found, indent=1))
        print(json.dumps(found))
    return found


def start(args):
    """Start the processes on this machine, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--address", address, "--output", args.output]
    for name in ("num_processes", "num_events", "num_iterations", "min_shard_size"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--divided"] * args.divided + ["--lean"] * args.lean
    processes = [
        subprocess.Popen([*command, "--process", str(i)]) for i in range(args.num_processes)
    ]
    try:
        # If one of them fails, the others would wait for it.
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"the processes ended with the codes {codes}")
    return json.loads((Path(args.output) / "processes.json").read_text())


def main(args):
    if args.cluster:
        jax.distributed.initialize()
    elif args.address is not None:
        jax.distributed.initialize(args.address, args.num_processes, args.process)
    elif args.num_processes > 1:
        return start(args)
    return learn(args)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--num-events", type=int, default=4096)
    parser.add_argument("--num-iterations", type=int, default=8)
    parser.add_argument("--divided", action="store_true", help="arrays instead of files")
    parser.add_argument("--lean", action="store_true", help="draws in files, not in memory")
    parser.add_argument("--min-shard-size", type=int, help="of weights, in training")
    parser.add_argument("--cluster", action="store_true", help="processes started by a cluster")
    parser.add_argument("--address", help="of the first process, with a port")
    parser.add_argument("--process", type=int, default=0, help="the number of this process")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
