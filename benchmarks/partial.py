"""How few events an E-step may draw: the manifold of the example, learned with partial E-steps.

All events in each E-step, or a part of them in turn, while the others keep their last draws: in as
many iterations (E-steps cost less), or in more of them with as many draws and steps of training in
all. Fresh samples of the prior are judged.

    python benchmarks/partial.py --output out
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import manifold

# One part in how many is drawn, and how many times as often.
RUNS = {
    "all": (1, 1),
    "a quarter": (4, 1),
    "a 16th": (16, 1),
    "a 64th": (64, 1),
    "a quarter, 4 times as often": (4, 4),
    "a 16th, 16 times as often": (16, 16),
}


def learn(rng_key, data, name, args):
    """Run EM; return the prior's scores and the time of its steps."""
    part, often = RUNS[name]
    settings = argparse.Namespace(**vars(args))
    settings.num_iterations = args.num_iterations * often
    settings.num_sgd_steps = args.num_sgd_steps // often
    key_net, key_em, key_judge, key_sample = jax.random.split(rng_key, 4)
    net = ndp.MLP((manifold.DIM,), features=(args.width,) * 3, rngs=nnx.Rngs(key_net))
    em = manifold.make_em(settings)
    if part > 1:
        em.e_step = replace(em.e_step, num_events=args.num_points // part)
    start = time.process_time()
    result = em.run(
        key_em,
        settings.num_iterations,
        ndp.DiffusionPrior(ndp.NetworkDenoiser(net)),
        data.operator,
        data.y,
        progress_bar=False,
    )
    seconds = time.process_time() - start
    sampler = manifold.SAMPLERS[args.sampler](args.num_steps)
    prior = ndp.DiffusionPrior(result.prior.denoiser, sampler=sampler)
    samples = jax.jit(lambda key: prior.sample(key, (args.num_points,)))(key_sample)
    history = result.history
    return manifold.make_judge(key_judge, data.independent)(samples) | {
        "e_step_seconds": float(np.sum(history.e_step_seconds)),
        "m_step_seconds": float(np.sum(history.m_step_seconds)),
        "processor_seconds": seconds,
    }


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_curve, key_data, *keys = jax.random.split(jax.random.key(args.seed), 2 + args.num_repeats)
    data = manifold.make_data(key_curve, key_data, args.num_points, args.num_points)
    rows = []
    print(f"{'drawn in an E-step':30s} divergence  sliced W2   E, s   M, s  processor s")
    for name in args.runs:
        for key in keys:
            row = {"run": name} | learn(key, data, name, args)
            rows.append(row)
            print(
                f"{name:30s} {row['divergence']:10.4f} {row['sliced_w2']:10.4f}"
                f" {row['e_step_seconds']:6.0f} {row['m_step_seconds']:6.0f}"
                f" {row['processor_seconds']:12.0f}",
                flush=True,
            )
            result = {"rows": rows, "settings": vars(args)}
            (output / "partial.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other options are those of examples/manifold.py.",
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--num-repeats", type=int, default=1, help="with other keys")
    args, rest = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(manifold.parse_args(rest)) | vars(args))


if __name__ == "__main__":
    main(parse_args())
