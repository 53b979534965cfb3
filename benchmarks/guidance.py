"""How well guidance draws from posteriors under a learned prior.

A prior trained on clean digits, and one posterior draw of each digit from some of its pixels, by
several covariances, numbers of particles and steps. Judged by the Fréchet distance of the draws to
the true digits, the error of the hidden pixels, and the mean squared residual of the observed ones
over the noise variance, which should be one.

    python benchmarks/guidance.py --output out
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits
from numpyro_diffprior.metrics.frechet import frechet_distance


class Case(NamedTuple):
    """A way of drawing."""

    name: str
    guidance: ndp.MMPS
    num_particles: int = 1
    num_steps: int = 32


GAUSSIAN = ndp.MMPS(ndp.guidance.GaussianCovariance())
CALIBRATED = ndp.MMPS(ndp.guidance.CalibratedCovariance())
LOOKING_AHEAD = ndp.MMPS(ndp.guidance.GaussianCovariance(), look_ahead=True)
CASES = (
    Case("Tweedie", ndp.MMPS()),
    Case("Tweedie, one step of the solver", ndp.MMPS(max_steps=1)),
    Case("calibrated", CALIBRATED),
    Case("calibrated", CALIBRATED, 4),
    Case("Gaussian", GAUSSIAN),
    Case("Gaussian", GAUSSIAN, 4),
    Case("Gaussian", GAUSSIAN, 4, 64),
    Case("Gaussian", GAUSSIAN, 16),
    Case("Gaussian, looking ahead", LOOKING_AHEAD, 4),
    Case("Gaussian, looking ahead", LOOKING_AHEAD, 4, 64),
    Case("Gaussian, looking ahead", LOOKING_AHEAD, 16),
    Case("Gaussian", GAUSSIAN, 16, 128),
)


def judge(rng_key, case, prior, data, features):
    """Draw once for every digit; the scores, and seconds with compilation."""
    start = time.perf_counter()
    draws = ndp.sample_posterior(
        rng_key,
        digits.model,
        prior,
        data.mask,
        data.y,
        num_particles=case.num_particles,
        sampler=ndp.samplers.MultistepSDE(case.num_steps),
        guidance=case.guidance,
    )
    x = jax.block_until_ready(draws.samples["x"][0])
    return {
        "frechet": float(frechet_distance(features(x), features(data.clean))),
        "rmse": float(jnp.sqrt(jnp.mean((x - data.clean) ** 2, where=~data.mask))),
        "residual": float(jnp.mean((x - data.y) ** 2, where=data.mask) / digits.NOISE**2),
        "ess": float(draws.stats["ess"].mean()),
        "log_evidence": float(draws.stats["log_evidence"].mean()),
        "seconds": time.perf_counter() - start,
    }


def main(args):
    key_data, key_net, key_train, key_draw = jax.random.split(jax.random.key(args.seed), 4)
    data = digits.make_data(key_data, args.hidden, args.num_images)
    features = digits.make_features()
    fit = ndp.fit_denoiser(
        key_train,
        digits.make_prior(key_net, args.width).denoiser,
        data.clean,
        optimizer=digits.make_optimizer(1e-3),
        num_steps=args.num_sgd_steps,
    )
    prior = ndp.DiffusionPrior(fit.denoiser)
    ratios = ", ".join(f"{ratio:.2f}" for ratio in fit.denoiser.error_ratios)
    print(f"the network's error over a Gaussian's, from low to high noise: {ratios}")
    columns = "Frechet  RMSE  residual  ESS  evidence  seconds"
    print(f"{'covariance':32s} {'K':>3s} {'steps':>5s}  {columns}")
    rows = []
    for case in CASES[: args.num_cases]:
        row = judge(key_draw, case, prior, data, features)
        rows.append(
            {"name": case.name, "num_particles": case.num_particles, "num_steps": case.num_steps}
            | row
        )
        print(
            f"{case.name:32s} {case.num_particles:3d} {case.num_steps:5d}"
            f"  {row['frechet']:7.3f} {row['rmse']:5.3f} {row['residual']:9.2f}"
            f" {row['ess']:4.1f} {row['log_evidence']:9.2f} {row['seconds']:8.1f}",
            flush=True,
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "guidance.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=float, default=0.5, help="fraction of hidden pixels")
    parser.add_argument("--num-images", type=int, default=digits.NUM_TRAIN)
    parser.add_argument("--num-sgd-steps", type=int, default=4000)
    parser.add_argument("--num-cases", type=int, default=len(CASES))
    parser.add_argument("--width", type=int, default=512)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
