"""Whether expectation maximisation finds the noise level beside the prior.

The curve of `examples/manifold.py` and the digits of `examples/digits.py`, with the noise level a
parameter of the model that starts at twice its value.

    python benchmarks/noise_level.py --output out
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpyro
from flax import nnx
from numpyro.distributions import constraints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits, manifold


def with_unknown_noise(model, start):
    """The model of an example, with its noise level as a parameter."""

    def unknown(prior, *args):
        noise = numpyro.param("noise", start, constraint=constraints.positive)
        return model(prior, *args, noise=noise)

    return unknown


def make_manifold(rng_key, args):
    """The example's EM, a new prior, and what was observed."""
    key_curve, key_data, key_net = jax.random.split(rng_key, 3)
    options = ["--num-sgd-steps", str(args.num_sgd_steps), "--width", str(args.width)]
    settings = manifold.parse_args(options)
    data = manifold.make_data(key_curve, key_data, args.num_points, 2)
    net = ndp.MLP((manifold.DIM,), features=(args.width,) * 3, rngs=nnx.Rngs(key_net))
    model = with_unknown_noise(manifold.model, 2 * manifold.NOISE)
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net))
    return manifold.make_em(settings, model), prior, (data.operator, data.y)


def make_digits(rng_key, args):
    """The same of the digits, half of whose pixels are hidden."""
    key_data, key_net = jax.random.split(rng_key)
    options = ["--num-sgd-steps", str(args.num_sgd_steps), "--width", str(args.width)]
    settings = digits.parse_args([*options, "--num-iterations", str(args.num_iterations)])
    data = digits.make_data(key_data, 0.5, min(args.num_points, digits.NUM_TRAIN))
    model = with_unknown_noise(digits.model, 2 * digits.NOISE)
    prior = digits.make_prior(key_net, args.width)
    return digits.make_em(settings, model), prior, (data.mask, data.y)


PROBLEMS = {"manifold": (make_manifold, manifold.NOISE), "digits": (make_digits, digits.NOISE)}


def main(args):
    rows = {}
    for name in args.problems:
        make, noise = PROBLEMS[name]
        key_make, key_run = jax.random.split(jax.random.key(args.seed))
        em, prior, observed = make(key_make, args)
        found = rows[name] = []

        def record(state, metrics, name=name, noise=noise, found=found):
            found.append(float(state.params["noise"]) / noise)
            print(
                f"{name:10s} {len(found) - 1:3d}  noise level {found[-1]:.3f} of the truth"
                f"  chi-square {float(metrics.chi_square):.2f}",
                flush=True,
            )

        em.run(key_run, args.num_iterations, prior, *observed, progress_bar=False, callback=record)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "noise_level.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--num-points", type=int, default=8192)
    parser.add_argument("--num-iterations", type=int, default=24)
    parser.add_argument("--num-sgd-steps", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
