"""Log-evidence of large masked images under a Gaussian prior, whose exact value is known.

Images are smooth random fields with a covariance of low rank, a quarter of their pixels is seen in
noise of a tenth of their deviation. The error of 16 particles is shown by the number of the
sampler's steps, for particles that look ahead (the default of `log_evidence`) and for particles
that are only guided. A standard error near one says that one of the estimates outweighs the
others. With ``--seen kspace``, complex fields of full rank, whose power falls with the frequency,
are seen in a quarter of the lines of k-space and the lowest ones instead.

    python benchmarks/evidence.py --sizes 28x28 32x32x3 --output out
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import multivariate_normal, norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks import kspace
from benchmarks.event_sizes import NOISE, make_model, smooth_fields

GUIDANCE = {
    "looking ahead": ndp.MMPS(ndp.guidance.GaussianCovariance(), look_ahead=True),
    "guided": ndp.MMPS(ndp.guidance.GaussianCovariance()),
}


def make_problem(shape, args):
    """A Gaussian denoiser, masks and values, and the exact log-evidence of each event."""
    rng = np.random.default_rng(args.seed)
    fields = smooth_fields(rng, 512, shape)
    mean, cov = ndp.linalg.empirical_gaussian(fields.reshape(512, -1), rank=32)
    z = rng.normal(size=(args.num_events, mean.size))
    x = np.asarray(mean + cov.sqrt_matvec(jnp.asarray(z, jnp.float32)))
    mask = rng.random(x.shape) < 0.25
    y = x + NOISE * rng.normal(size=x.shape)
    mean, matrix = np.asarray(mean, float), np.asarray(cov.dense(), float)
    exact = [
        multivariate_normal.logpdf(
            values[seen], mean[seen], matrix[np.ix_(seen, seen)] + NOISE**2 * np.eye(seen.sum())
        )
        for values, seen in zip(y, mask, strict=True)
    ]
    denoiser = ndp.GaussianDenoiser(mean.reshape(shape), cov)
    shape = (args.num_events, *shape)
    observed = jnp.asarray(mask.reshape(shape)), jnp.asarray(y.reshape(shape), jnp.float32)
    return denoiser, observed, np.asarray(exact)


def make_kspace(shape, args):
    """The same for fields that are seen in k-space, in noise of a tenth of a value's deviation."""
    denoiser, power = kspace.make_field(shape[0])
    key = jax.random.key(args.seed)
    _, mask, y = kspace.make_data(key, denoiser, args.num_events, kspace_noise(denoiser))
    deviation = np.sqrt(power + kspace_noise(denoiser) ** 2)
    log_density = np.where(mask, norm.logpdf(np.asarray(y, float), scale=deviation), 0)
    return denoiser, (mask, y), log_density.sum((1, 2, 3))


def kspace_noise(denoiser):
    return NOISE * float(jnp.sqrt(denoiser.cov.diagonal().mean()))


def model_of_kspace(noise):
    return lambda prior, mask, y: kspace.model(prior, mask, noise, y)


def main(args):
    rows = []
    print(f"{args.num_events} events, {args.num_particles} particles")
    print("event     steps  particles      mean error  spread  standard error  processor s")
    for size in args.sizes:
        shape = tuple(map(int, size.split("x")))
        if args.seen == "kspace":
            denoiser, observed, exact = make_kspace(shape, args)
            model = model_of_kspace(kspace_noise(denoiser))
        else:
            denoiser, observed, exact = make_problem(shape, args)
            model = make_model("mask")
        for steps, name in itertools.product(args.num_steps, GUIDANCE):
            prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.MultistepSDE(steps))
            start = time.process_time()
            found = ndp.log_evidence(
                jax.random.key(args.seed),
                model,
                prior,
                *observed,
                num_particles=args.num_particles,
                guidance=GUIDANCE[name],
            )
            error = np.asarray(found.value) - exact
            row = {
                "size": size,
                "num_steps": steps,
                "guidance": name,
                "error": float(error.mean()),
                "spread": float(error.std()),
                "standard error": float(np.mean(found.standard_error)),
                "seconds": time.process_time() - start,
            }
            print(
                f"{size:8s} {steps:6d}  {name:13s} {row['error']:11.1f} {row['spread']:7.1f} "
                f"{row['standard error']:15.2f} {row['seconds']:12.1f}",
                flush=True,
            )
            rows.append(row)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "settings": vars(args)}
    (output / "evidence.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", default=["28x28", "32x32x3"])
    parser.add_argument("--seen", choices=("pixels", "kspace"), default="pixels")
    parser.add_argument("--num-steps", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--num-events", type=int, default=16)
    parser.add_argument("--num-particles", type=int, default=16)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
