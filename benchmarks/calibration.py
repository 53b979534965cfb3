"""Which samplers' posteriors are calibrated: simulation-based calibration on three priors.

Latents drawn from the prior, data given them, posterior draws given the data: a Gaussian and the
25-mode mixture of MCGDiff, both seen through a few projections, and a prior learned from clean
digits of which half of the pixels are hidden. Exact samplers have uniform ranks. Those of a
wrong prior must not.

    python benchmarks/calibration.py --output out
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from numpyro import handlers
from numpyro.infer import NUTS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks import mixture
from examples import digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LEVELS = (0.5, 0.8, 0.95)
SAMPLER = ndp.samplers.MultistepSDE(32)
GAUSSIAN = ndp.MMPS(ndp.guidance.GaussianCovariance())


def make_gaussian(rng_key, args):
    """Eight dimensions, of which two projections are seen."""
    key_cov, key_operator = jax.random.split(rng_key)
    factor = jax.random.normal(key_cov, (8, 8))
    denoiser = ndp.GaussianDenoiser(jnp.arange(8.0), factor @ factor.T / 8 + 0.1 * jnp.eye(8))
    operator = jax.random.normal(key_operator, (2, 8))
    return mixture.model, denoiser, (operator, 0.5, jnp.zeros(2))


def make_mixture(rng_key, args):
    """MCGDiff's mixture in eight dimensions, of which one projection is seen."""
    problem = mixture.make_problem(rng_key, 8, 1)
    return mixture.model, problem.prior.denoiser, (problem.operator, problem.scale, problem.y)


def make_digits(rng_key, args):
    """A network trained on clean digits; half of the pixels are hidden."""
    keys = jax.random.split(rng_key, 3)
    data = digits.make_data(keys[0], hidden=0.5)
    result = ndp.fit_denoiser(
        keys[1],
        digits.make_prior(keys[2], args.width).denoiser,
        data.clean,
        optimizer=digits.make_optimizer(digits.anneal(1e-3, args.num_sgd_steps)),
        num_steps=args.num_sgd_steps,
    )
    return digits.model, result.denoiser, (data.mask[:1], data.y[:1])


PROBLEMS = {"Gaussian": make_gaussian, "mixture": make_mixture, "digits": make_digits}


def nuts(model):
    """NUTS in the noise of the deterministic sampler."""
    config = {"x": ndp.DiffusionReparam(SAMPLER.num_steps)}
    return NUTS(handlers.reparam(model, config=config), max_tree_depth=6)


def wrong(model):
    """Particle Gibbs under a prior that is too narrow: a Gaussian with 0.7 of the variance."""

    def narrow(prior, *args):
        gaussian = ndp.GaussianDenoiser(prior.mean, prior.denoiser.cov.scale(0.7))
        return model(ndp.DiffusionPrior(gaussian, sampler=SAMPLER), *args)

    return ndp.ParticleGibbs(narrow, num_particles=8)


def chains(kernel, num_warmup):
    """As many chains as draws, each kept at its end."""
    return lambda args: {
        "kernel": kernel,
        "num_warmup": num_warmup,
        "num_chains": args.num_samples,
    }


METHODS = {
    "MMPS": lambda args: {},
    "MMPS, Gaussian covariance": lambda args: {"guidance": GAUSSIAN},
    "SMC, K = 4": lambda args: {"num_particles": 4},
    "SMC, K = 16": lambda args: {"num_particles": 16},
    "SMC, K = 64": lambda args: {"num_particles": 64},
    "particle Gibbs": chains(partial(ndp.ParticleGibbs, num_particles=16), 5),
    "NUTS": lambda args: {"kernel": nuts, "num_warmup": 150, "thinning": 2},
    "wrong prior": chains(wrong, 5),
}
# Tweedie's covariance of many observed values and 64 particles take too long; NUTS does so in 64
# dimensions, and does not cross between the mixture's modes (see mixture.py).
LEFT_OUT = {
    ("mixture", "NUTS"),
    ("digits", "MMPS"),
    ("digits", "SMC, K = 64"),
    ("digits", "NUTS"),
}


def show(curves, path):
    """Differences between the ranks' distribution functions and the uniform one, all elements."""
    problems = list(dict.fromkeys(problem for problem, _ in curves))
    methods = list(dict.fromkeys(method for _, method in curves))
    figure, axes = plt.subplots(
        len(problems), len(methods), figsize=(1.9 * len(methods), 1.9 * len(problems)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    grid = np.linspace(0, 1, 41)
    for (problem, method), pit in curves.items():
        axis = axes[problems.index(problem), methods.index(method)]
        band = 2.6 * np.sqrt(grid * (1 - grid) / len(pit))  # 99 % of each point
        axis.fill_between(grid, -band, band, color="0.85", lw=0)
        for element in pit.reshape(len(pit), -1).T:
            ecdf = np.searchsorted(np.sort(element), grid) / len(element)
            axis.plot(grid, ecdf - grid, "C0", lw=0.6, alpha=0.6)
        axis.set(ylim=(-0.2, 0.2), xticks=[0, 0.5, 1])
    for axis, method in zip(axes[0], methods, strict=True):
        axis.set_title(method, fontsize=8)
    for axis, problem in zip(axes[:, 0], problems, strict=True):
        axis.set_ylabel(problem)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows, curves = [], {}
    for problem in args.problems:
        key_make, key_run = jax.random.split(jax.random.key(args.seed))
        model, denoiser, data = PROBLEMS[problem](key_make, args)
        prior = ndp.DiffusionPrior(denoiser, sampler=SAMPLER)
        print(f"\n{problem}\n{'':26s} {'p':>8s} {'p, distance':>12s} {'coverage':>22s} seconds")
        for method in args.methods:
            if (problem, method) in LEFT_OUT:
                continue
            start = time.perf_counter()
            result = ndp.calibrate(
                key_run,
                model,
                prior,
                *data,
                num_simulations=args.num_simulations,
                num_samples=args.num_samples,
                max_batch_size=args.num_samples,
                **METHODS[method](args),
            )
            # One element's p-value of the smallest of many, after Bonferroni.
            pvalues = np.asarray(result.pvalues()["x"])
            row = {
                "problem": problem,
                "method": method,
                "pvalue": min(1.0, float(pvalues.min()) * pvalues.size),
                "distance_pvalue": float(np.min(result.distance_pvalues()["x"])),
                "coverage": result.coverage(LEVELS)["x"].tolist(),
                "seconds": time.perf_counter() - start,
            }
            rows.append(row)
            curves[problem, method] = np.asarray(result.pit()["x"])
            coverage = " ".join(f"{value:.3f}" for value in row["coverage"])
            print(
                f"{method:26s} {row['pvalue']:8.2g} {row['distance_pvalue']:12.2g}"
                f" {coverage:>22s} {row['seconds']:7.0f}",
                flush=True,
            )
            (output / "calibration.json").write_text(json.dumps(rows, indent=1))
    show(curves, output / "calibration.png")
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num-simulations", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=39, help="per simulation")
    parser.add_argument("--width", type=int, default=128, help="of the digits' network")
    parser.add_argument("--num-sgd-steps", type=int, default=3000, help="of its training")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
