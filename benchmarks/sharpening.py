"""What spoils a prior learned by EM: biased E-steps, or M-steps that learn their draws by heart.

Two figures tell them apart without looking at the truth. The sampler of the E-step is calibrated
on digits simulated from the current prior: intervals that do not hold what they should are its
bias. And the log-evidence of digits that were learned from is compared with that of digits kept
out: the difference is what the prior has learned by heart. Beside them, with the truth, the part
of the hidden pixels in their intervals, of digits learned from and of digits kept out.

    python benchmarks/sharpening.py --output out
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits

LEVEL = 0.9


def calibrate_e_step(rng_key, prior, data, num_particles, args):
    """The part of simulated hidden pixels in the E-step's intervals."""
    mask, y = data.mask[: args.num_judged], data.y[: args.num_judged]
    found = ndp.calibrate(
        rng_key,
        digits.model,
        prior,
        mask,
        y,
        num_simulations=args.num_simulations,
        num_samples=39,
        num_particles=num_particles,
        guidance=ndp.MMPS(ndp.guidance.CalibratedCovariance()),
    )
    inside = jnp.abs(2 * found.pit()["x"] - 1) <= LEVEL
    hidden = jnp.broadcast_to(~mask & (data.clean.std(0) > 0.1), inside.shape)
    return float(inside[hidden].mean())


def evidence_per_digit(rng_key, prior, mask, y):
    return float(ndp.log_evidence(rng_key, digits.model, prior, mask, y).total) / len(y)


def learn(rng_key, data, num_particles, args):
    """Run EM; what was found after some of its iterations."""
    key_net, key_hide, key_em, key_judge = jax.random.split(rng_key, 4)
    kept_out = digits.hide(*jax.random.split(key_hide), data.test, args.hidden)
    test = digits.Data(data.test, data.test, *kept_out)
    rows = []

    def record(state, _):
        if not digits.is_judged(state.num_iterations, args):
            return
        prior = state.prior
        learned, unseen = (
            digits.judge_posterior(key_judge, prior, part, args.num_judged, args.num_samples)[0]
            for part in (data, test)
        )
        evidence = [
            evidence_per_digit(key_judge, prior, part.mask[: len(test.y)], part.y[: len(test.y)])
            for part in (data, test)
        ]
        row = {
            "particles": num_particles,
            "iteration": state.num_iterations,
            "simulated": calibrate_e_step(key_judge, prior, data, num_particles, args),
            "learned": learned["cover90"],
            "kept_out": unseen["cover90"],
            "evidence_learned": evidence[0],
            "evidence_kept_out": evidence[1],
        }
        rows.append(row)
        print(" ".join(f"{value:8.3f}" for value in row.values()), flush=True)

    optimizer = digits.make_optimizer(args.learning_rate)
    em = digits.make_em(args, optimizer=optimizer, num_particles=num_particles)
    prior = digits.make_prior(key_net, args.width)
    em.run(
        key_em, args.num_iterations, prior, data.mask, data.y, progress_bar=False, callback=record
    )
    return rows


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_data, key_run = jax.random.split(jax.random.key(args.seed))
    data = digits.make_data(key_data, args.hidden, args.num_images)
    data = data._replace(test=data.test[: args.num_heldout])
    print(f"{args.hidden:.0%} hidden; hidden pixels in {LEVEL:.0%} intervals, evidence per digit")
    print("particles, iteration, simulated, learned from, kept out, evidence of both")
    rows = []
    for num_particles in args.particles:
        rows += learn(key_run, data, num_particles, args)
        (output / "sharpening.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other options are those of examples/digits.py.",
    )
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--num-simulations", type=int, default=4)
    parser.add_argument("--num-draws", type=int, default=1, help="per digit in the E-step")
    parser.add_argument("--num-iterations", type=int, default=24)
    parser.add_argument("--num-heldout", type=int, default=261, help="digits kept out")
    parser.add_argument("--judge-every", type=int, default=4)
    parser.add_argument("--num-judged", type=int, default=64)
    args, rest = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(digits.parse_args(rest)) | vars(args))


if __name__ == "__main__":
    main(parse_args())
