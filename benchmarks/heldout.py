"""Whether held-out log-evidence finds the iteration of EM at which to stop.

The digits of the example, learned from observations with hidden pixels by E-steps of one or more
particles. After every iteration: the log-evidence of digits that EM has not seen, hidden pixels
and all, which needs no truth; and beside it the Fréchet distance of fresh samples to the clean
digits and the coverage of the hidden pixels' intervals, which do. Another run starts at the prior
of the clean digits: what EM makes of it is what the observations know.

    python benchmarks/heldout.py --output out
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits


def start_at_clean(rng_key, em, prior, data, args):
    """The state of EM with the network trained on the clean digits."""
    key_init, key_train = jax.random.split(rng_key)
    start = em.init(key_init, prior, data.mask, data.y)
    training, _ = ndp.training.train(
        key_train,
        start.training["prior"],
        data.clean,
        em.optimizer,
        num_steps=1000 * args.clean_rounds,
        batch_size=args.batch_size,
    )
    return start._replace(
        priors={"prior": ndp.DiffusionPrior(training.averaged)}, training={"prior": training}
    )


def learn(rng_key, data, num_particles, args, from_clean=False):
    """Run EM; what was found after each of its iterations."""
    key_net, key_hide, key_em, key_clean, key_judge = jax.random.split(rng_key, 5)
    features = digits.make_features()
    heldout = digits.hide(*jax.random.split(key_hide), data.test, args.hidden)
    rows = []

    def record(state, metrics):
        if not digits.is_judged(state.num_iterations, args):
            return
        scores, _ = digits.judge_posterior(
            key_judge, state.prior, data, args.num_judged, args.num_samples
        )
        row = {
            "iteration": state.num_iterations,
            "log_evidence": float(metrics.heldout_log_evidence) / len(data.test),
            "standard_error": float(metrics.heldout_standard_error) / len(data.test),
            "frechet": digits.judge_prior(key_judge, state.prior, data, features),
            "ess": float(metrics.ess),
        }
        rows.append(row | scores)
        print(" ".join(f"{value:8.3f}" for value in rows[-1].values()), flush=True)

    optimizer = digits.make_optimizer(args.learning_rate)
    em = digits.make_em(args, optimizer=optimizer, num_particles=num_particles)
    prior = digits.make_prior(key_net, args.width, args.dropout)
    em.run(
        key_em,
        args.num_iterations,
        prior,
        data.mask,
        data.y,
        progress_bar=False,
        callback=record,
        heldout=heldout,
        init_state=start_at_clean(key_clean, em, prior, data, args) if from_clean else None,
    )
    return rows


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_data, key_run = jax.random.split(jax.random.key(args.seed))
    data = digits.make_data(key_data, args.hidden, args.num_images)
    data = data._replace(test=data.test[: args.num_heldout])
    plan = [(num_particles, False) for num_particles in args.particles]
    if args.from_clean:
        plan.append((args.particles[0], True))
    runs = []
    for num_particles, from_clean in plan:
        name = f"{num_particles} particles" + ", from the clean prior" * from_clean
        print(f"\n{args.hidden:.0%} hidden, {name}")
        print("    iteration, held-out log-evidence and its error, Frechet, ESS, RMSE, coverage")
        rows = learn(key_run, data, num_particles, args, from_clean)
        frechet = np.array([row["frechet"] for row in rows])
        chosen = int(np.argmax([row["log_evidence"] for row in rows]))
        run = {
            "run": name,
            "rows": rows,
            "best": float(frechet.min()),
            "last": float(frechet[-1]),
            "chosen": float(frechet[chosen]),
            "chosen_iteration": rows[chosen]["iteration"],
        }
        print(
            f"Frechet distance: best {run['best']:.3f}, last {run['last']:.3f},"
            f" chosen {run['chosen']:.3f} (iteration {run['chosen_iteration']})",
            flush=True,
        )
        runs.append(run)
        (output / f"heldout_{args.hidden:.2f}.json").write_text(json.dumps(runs, indent=1))
    return runs


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other options are those of examples/digits.py.",
    )
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--from-clean", action=argparse.BooleanOptionalAction, default=True, help="run that too"
    )
    parser.add_argument("--num-draws", type=int, default=2, help="per digit in the E-step")
    parser.add_argument("--num-iterations", type=int, default=32)
    parser.add_argument("--num-heldout", type=int, default=261, help="digits kept out")
    args, rest = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(digits.parse_args(rest)) | vars(args))


if __name__ == "__main__":
    main(parse_args())
