"""Whether expectation maximization finds the noise level beside the prior.

The curve of `examples/manifold.py` and the digits of `examples/digits.py`, with the noise level a
parameter of the model that starts at twice its value. Of a single look at each event a prior with
noise of its own explains as much as noise does; of two looks only noise explains the difference.

    python benchmarks/noise_level.py --output out
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.distributions import constraints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits, manifold


def unknown_noise(truth):
    """A noise level to learn."""
    return numpyro.param("noise", 2 * truth, constraint=constraints.positive)


def points(prior, operator, y):
    """Looks at points of the curve, with shape ``(num_points, num_looks, 2)``."""
    noise = unknown_noise(manifold.NOISE)
    with numpyro.plate("points", operator.shape[0]):
        operator = numpyro.subsample(operator, event_dim=2)
        y = numpyro.subsample(y, event_dim=2)
        x = numpyro.sample("x", prior)
        mean = jnp.einsum("...ij,...j->...i", operator, x)[..., None, :]
        numpyro.sample("y", dist.Normal(mean, noise).expand(y.shape).to_event(2), obs=y)


def images(prior, mask, y):
    """Looks at the same pixels of digits, with shape ``(num_images, num_looks, 8, 8)``."""
    noise = unknown_noise(digits.NOISE)
    with numpyro.plate("images", mask.shape[0]):
        mask = numpyro.subsample(mask, event_dim=2)[..., None, :, :]
        y = numpyro.subsample(y, event_dim=3)
        x = numpyro.sample("x", prior)[..., None, :, :]
        numpyro.sample("y", dist.Normal(x, noise).expand(y.shape).mask(mask).to_event(3), obs=y)


def look(rng_key, clean, noise, num_looks):
    """Look at values so many times, along a second axis."""
    shape = (len(clean), num_looks, *clean.shape[1:])
    return clean[:, None] + noise * jax.random.normal(rng_key, shape)


def make_manifold(rng_key, num_looks, args):
    """The example's EM, a new prior, and what was observed."""
    key_curve, key_data, key_look, key_net = jax.random.split(rng_key, 4)
    options = ["--num-sgd-steps", str(args.num_sgd_steps), "--width", str(args.width)]
    settings = manifold.parse_args(options)
    data = manifold.make_data(key_curve, key_data, args.num_points, 2)
    clean = jnp.einsum("nij,nj->ni", data.operator, data.x)
    y = look(key_look, clean, manifold.NOISE, num_looks)
    net = ndp.MLP((manifold.DIM,), features=(args.width,) * 3, rngs=nnx.Rngs(key_net))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net))
    return manifold.make_em(settings, points), prior, (data.operator, y)


def make_digits(rng_key, num_looks, args):
    """The same of the digits, half of whose pixels are hidden."""
    key_data, key_look, key_net = jax.random.split(rng_key, 3)
    options = ["--num-sgd-steps", str(args.num_sgd_steps), "--width", str(args.width)]
    settings = digits.parse_args([*options, "--num-iterations", str(args.num_iterations)])
    data = digits.make_data(key_data, 0.5, min(args.num_points, digits.NUM_TRAIN))
    y = look(key_look, data.clean, digits.NOISE, num_looks)
    prior = digits.make_prior(key_net, args.width)
    return digits.make_em(settings, model=images), prior, (data.mask, y)


PROBLEMS = {"manifold": (make_manifold, manifold.NOISE), "digits": (make_digits, digits.NOISE)}


def learn(rng_key, name, num_looks, args):
    """Run EM; the noise level over its true value, at every iteration."""
    make, noise = PROBLEMS[name]
    key_make, key_run = jax.random.split(rng_key)
    em, prior, observed = make(key_make, num_looks, args)
    found = []

    def record(state, metrics):
        found.append(float(state.params["noise"]) / noise)
        print(
            f"{name:10s} {num_looks} looks {state.num_iterations:3d}"
            f"  noise level {found[-1]:.3f} of the truth"
            f"  chi-square {float(metrics.reduced_chi_square):.2f}",
            flush=True,
        )

    em.run(key_run, args.num_iterations, prior, *observed, progress_bar=False, callback=record)
    return found


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.problems:
        for num_looks in args.num_looks:
            found = learn(jax.random.key(args.seed), name, num_looks, args)
            rows.append({"problem": name, "num_looks": num_looks, "noise_level": found})
            (output / "noise_level.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--num-looks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-points", type=int, default=8192)
    parser.add_argument("--num-iterations", type=int, default=16)
    parser.add_argument("--num-sgd-steps", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
