"""Whether an image and its noise level are calibrated when Gibbs samples them in turn.

Every image has a noise level of its own, as unknown as the image. One kernel draws the image given
the noise level, NUTS draws the noise level given the image. The prior of images is a Gaussian, for
which MMPS is exact, or has two modes, for which it is not. Ranks of the truth must be uniform for
both sites where the kernel of images is exact; those of DPS must not. Five hundred simulations
tell gross errors apart, and not the small ones of PiGDM or of MMPS on two modes.

Ranks ask for independent draws, which chains do not give: only one of so many is kept, and the
table has the correlation of successive draws that are kept (of independent ones: minus one over
their number, for their mean is estimated too).

    python benchmarks/joint.py --output out
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, Gibbs, Predictive

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks import calibration
from numpyro_diffprior.linalg.covariances import Isotropic

DIM = 8
SAMPLER = ndp.samplers.MultistepSDE(32)
ONES = jnp.ones(DIM)
PRIORS = {
    "Gaussian": ndp.GaussianDenoiser(0 * ONES, 0.3 * jnp.eye(DIM) + 0.5),
    "two modes": ndp.MixtureDenoiser(
        jnp.array([0.3, 0.7]), jnp.stack([-0.5 * ONES, 0.5 * ONES]), Isotropic(ONES[0] / 16, DIM)
    ),
}
METHODS = {
    "MMPS": ndp.MMPSKernel,
    "particle Gibbs": partial(ndp.ParticleGibbs, num_particles=8),
    "PiGDM": partial(ndp.MMPSKernel, guidance=ndp.guidance.PiGDM()),
    "DPS": partial(ndp.MMPSKernel, guidance=ndp.guidance.DPS()),
}


def model(prior, num_images, y=None):
    """Images are independent of each other: as many simulations at once."""
    with numpyro.plate("images", num_images):
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise[..., None]).to_event(1), obs=y)


def gibbs(make_kernel, model):
    masked = ndp.mask_priors(model)
    return Gibbs([(make_kernel(masked), ["x"]), (NUTS(masked), None)])


def calibrate(rng_key, prior, kernel, args):
    """Ranks with an axis for simulations in front, and no plate."""
    result = ndp.calibrate(
        rng_key,
        model,
        prior,
        args.batch_size,
        jnp.zeros((args.batch_size, DIM)),
        num_simulations=args.num_batches,
        num_samples=args.num_samples,
        kernel=kernel,
        num_warmup=args.num_warmup,
        thinning=args.thinning,
    )
    return result._replace(
        ranks={name: rank.reshape(-1, *rank.shape[2:]) for name, rank in result.ranks.items()},
        distance_ranks={name: rank.ravel() for name, rank in result.distance_ranks.items()},
    )


def measure_correlation(rng_key, prior, kernel, args):
    """Correlation of successive draws as they are kept, over all images and elements."""
    key_data, key_chain = jax.random.split(rng_key)
    y = Predictive(model, num_samples=1)(key_data, prior, args.batch_size)["y"][0]
    mcmc = MCMC(
        kernel(model),
        num_warmup=args.num_warmup,
        num_samples=args.num_samples * args.thinning,
        thinning=args.thinning,
        progress_bar=False,
    )
    mcmc.run(key_chain, prior, args.batch_size, y)
    correlations = {}
    for name, draws in mcmc.get_samples().items():
        z = (draws - draws.mean(0)) / draws.std(0)
        correlations[name] = float(jnp.mean(z[1:] * z[:-1]))
    return correlations


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_run, key_chain = jax.random.split(jax.random.key(args.seed))
    rows, curves = [], {}
    titles = (
        "prior",
        "method",
        "site",
        "p",
        "p, distance",
        "50, 80, 95 %",
        "correlation",
        "seconds",
    )
    print("".join(f"| {title} " for title in titles) + "|")
    print("| --- " * len(titles) + "|")
    for name in args.priors:
        prior = ndp.DiffusionPrior(PRIORS[name], sampler=SAMPLER)
        for method in args.methods:
            kernel = partial(gibbs, METHODS[method])
            start = time.perf_counter()
            result = calibrate(key_run, prior, kernel, args)
            coverage = result.coverage(calibration.LEVELS)
            seconds = time.perf_counter() - start
            correlation = measure_correlation(key_chain, prior, kernel, args)
            for site in ("noise", "x"):
                # One element's p-value of the smallest of many, after Bonferroni.
                pvalues = np.asarray(result.pvalues()[site])
                row = {
                    "prior": name,
                    "method": method,
                    "site": site,
                    "pvalue": min(1.0, float(pvalues.min()) * pvalues.size),
                    "distance_pvalue": float(result.distance_pvalues()[site]),
                    "coverage": coverage[site].tolist(),
                    "correlation": correlation[site],
                    "seconds": seconds,
                }
                rows.append(row)
                curves[f"{name}, {site}", method] = np.asarray(result.pit()[site])
                levels = ", ".join(f"{value:.3f}" for value in row["coverage"])
                print(
                    f"| {name} | {method} | {site} | {row['pvalue']:.2g} |"
                    f" {row['distance_pvalue']:.2g} | {levels} | {row['correlation']:.2f} |"
                    f" {seconds:.0f} |",
                    flush=True,
                )
            (output / "joint.json").write_text(json.dumps(rows, indent=1))
    calibration.show(curves, output / "joint.png")
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=list(PRIORS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num-batches", type=int, default=5, help="of simulations, at least two")
    parser.add_argument("--batch-size", type=int, default=100, help="simulations at once")
    parser.add_argument("--num-samples", type=int, default=39, help="per simulation")
    parser.add_argument("--num-warmup", type=int, default=100)
    parser.add_argument("--thinning", type=int, default=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
