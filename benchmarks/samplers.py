"""What a sampler's own bias does to EM: a Gaussian refitted from its posterior draws.

Digits with hidden pixels and a Gaussian prior, whose posterior is known in closed form, and so is
EM's fixed point. From there on the Gaussian is refitted from draws of each sampler, iteration
after iteration. The trace of its covariance should stay where it is.

    python benchmarks/samplers.py --hidden 0.75
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits

SAMPLERS = (
    ndp.samplers.DDPM(32),
    ndp.samplers.DDPM(64),
    ndp.samplers.DDPM(256),
    ndp.samplers.MultistepODE(32),
    ndp.samplers.MultistepSDE(32),
)


def refit(rng_key, prior, data, sampler, args):
    """The traces of the covariance over the iterations."""
    traces = []
    for key in jax.random.split(rng_key, args.num_iterations):
        draws = ndp.sample_posterior(
            key,
            digits.model,
            prior,
            data.mask,
            data.y,
            sampler=sampler,
            guidance=ndp.MMPS(ndp.guidance.GaussianCovariance()),
            num_samples=args.num_draws,
        )
        flat = draws.samples["x"].reshape(-1, 64)
        mean, cov = ndp.linalg.empirical_gaussian(flat)
        prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(mean.reshape(8, 8), cov))
        traces.append(float(cov.trace()))
    return traces


def main(args):
    key_data, key_fit, key_refit = jax.random.split(jax.random.key(args.seed), 3)
    data = digits.make_data(key_data, args.hidden, args.num_images)
    em = ndp.EM(
        digits.model, optax.adam(1e-3), start=ndp.GaussianStart(num_iterations=args.num_gaussian)
    )
    start = em.init(key_fit, digits.make_prior(key_fit, width=8), data.mask, data.y).prior
    gaussian = ndp.DiffusionPrior(ndp.GaussianDenoiser(start.mean, start.denoiser.cov))
    fixed = float(gaussian.denoiser.cov.trace())
    print(f"{args.hidden:.0%} of the pixels hidden; closed form: trace {fixed:.2f}")
    rows = []
    for sampler in SAMPLERS:
        traces = refit(key_refit, gaussian, data, sampler, args)
        name = type(sampler).__name__
        rows.append({"sampler": name, "num_steps": sampler.num_steps, "traces": traces})
        print(
            f"{name:14s} {sampler.num_steps:4d}  " + " ".join(f"{t:6.2f}" for t in traces),
            flush=True,
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "samplers.json").write_text(json.dumps({"fixed": fixed, "rows": rows}, indent=1))
    return fixed, rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=float, default=0.75)
    parser.add_argument("--num-images", type=int, default=digits.NUM_TRAIN)
    parser.add_argument("--num-iterations", type=int, default=6)
    parser.add_argument("--num-draws", type=int, default=4)
    parser.add_argument("--num-gaussian", type=int, default=256, help="closed-form iterations")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
