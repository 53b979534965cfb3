"""How often EM should draw anew, and what an M-step should start from.

The digits of the example, half of their pixels hidden, learned in the same number of SGD steps
with more or fewer E-steps between them, and with other starts of the M-steps. The learning rate
is constant, so that no schedule favors a rate of refreshing.

    python benchmarks/refresh.py --output out
"""

import argparse
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples import digits

# The SGD steps between E-steps, the draws per digit, and other options of `EM`.
RUNS = {
    "16 steps, one draw": (16, 1, {}),
    "64 steps, one draw": (64, 1, {}),
    "64 steps": (64, 4, {}),
    "256 steps": (256, 4, {}),
    "1,024 steps": (1024, 4, {}),
    "256 steps, new optimizer": (256, 4, {"reset_optimizer": True}),
    "256 steps, E-step without averaging": (256, 4, {"use_average": False}),
    "256 steps, new network": (256, 4, {"warm_start": False}),
    "1,024 steps, new network": (1024, 4, {"warm_start": False}),
}


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_data, key_net, key_em, key_judge = jax.random.split(jax.random.key(args.seed), 4)
    data = digits.make_data(key_data, args.hidden, args.num_images)
    features = digits.make_features()
    rows = []
    print(f"{'':36s} {'E-steps':>8s} {'Frechet':>8s} {'E, s':>8s} {'M, s':>8s}")
    for name in args.runs:
        num_sgd_steps, num_draws, options = RUNS[name]
        settings = argparse.Namespace(**vars(args))
        settings.num_sgd_steps, settings.num_draws = num_sgd_steps, num_draws
        settings.num_iterations = args.num_steps // num_sgd_steps
        optimizer = digits.make_optimizer(args.learning_rate)
        em = digits.make_em(settings, optimizer=optimizer, **options)
        prior = digits.make_prior(key_net, args.width)
        result = em.run(
            key_em, settings.num_iterations, prior, data.mask, data.y, progress_bar=False
        )
        row = {
            "run": name,
            "frechet": digits.judge_prior(key_judge, result.prior, data, features),
            "num_e_steps": settings.num_iterations,
            "e_step_seconds": float(result.history.e_step_seconds.sum()),
            "m_step_seconds": float(result.history.m_step_seconds.sum()),
        }
        rows.append(row)
        print(
            f"{name:36s} {row['num_e_steps']:8d} {row['frechet']:8.3f}"
            f" {row['e_step_seconds']:8.0f} {row['m_step_seconds']:8.0f}",
            flush=True,
        )
        (output / "refresh.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other options are those of examples/digits.py.",
    )
    parser.add_argument("--num-steps", type=int, default=2048, help="of SGD, in each run")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    args, rest = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(digits.parse_args(rest)) | vars(args))


if __name__ == "__main__":
    main(parse_args())
