"""How well guidance restores images under a learned network, and at what cost.

A prior of clean images, trained here or saved by `examples/images.py`, and posterior draws of
images that it has not seen, with most of their pixels hidden. The draws are judged by the
continuous ranked probability score (CRPS), the error of their mean and the coverage of the hidden
pixels. Cost is the processor time of a draw over that of as many evaluations of the network as
the sampler has steps. With `--counts`, images are also seen by Poisson counts of their
exponential; all pixels are judged.

    python examples/images.py --priors clean --output out
    python benchmarks/images.py --prior out/images_clean --output out
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import images
from numpyro_diffprior.metrics.ranks import coverage
from numpyro_diffprior.metrics.scores import crps


class Case(NamedTuple):
    """A way of drawing."""

    name: str
    guidance: ndp.MMPS
    num_particles: int = 1


GAUSSIAN = ndp.guidance.GaussianCovariance()
CASES = (
    Case("Gaussian", ndp.MMPS(GAUSSIAN)),
    Case("Gaussian, looking ahead", ndp.MMPS(GAUSSIAN, look_ahead=True), 4),
    Case("Gaussian, guided", ndp.MMPS(GAUSSIAN), 4),
    Case("calibrated", ndp.MMPS(ndp.guidance.CalibratedCovariance())),
    Case("Tweedie, 1 step", ndp.MMPS(max_steps=1)),
    Case("Tweedie, 2 steps", ndp.MMPS(max_steps=2)),
    Case("Tweedie, 3 steps", ndp.MMPS(max_steps=3)),
    Case("Tweedie, 32 steps", ndp.MMPS(max_steps=32)),
)
COLUMNS = ("crps", "difference", "standard_error", "rmse", "cover50", "cover90", "cost")


def train_prior(args):
    """Train the prior of clean images of `examples/images.py`, at its defaults."""
    defaults = images.parse_args([])
    key_net, key_train = jax.random.split(jax.random.key(defaults.seed))
    pixels, _ = images.read_images(args.data, "train")
    clean = images.scale(pixels[: defaults.num_images], args.scale)
    prior = images.make_prior(key_net, clean.shape[1:], defaults)
    optimizer = images.make_optimizer(images.anneal(defaults))
    return images.train_on_clean(key_train, prior, clean, optimizer, defaults)


def time_network(denoiser, batch_size, num_repeats=16):
    """Return the processor seconds of one evaluation of the network, per image."""
    x = jax.random.normal(jax.random.key(0), (batch_size, *denoiser.event_shape))
    evaluate = jax.jit(lambda x, sigma: denoiser(x, sigma))
    seconds = []
    for _ in range(1 + num_repeats):
        start = time.process_time()
        jax.block_until_ready(evaluate(x, denoiser.scale))
        seconds.append(time.process_time() - start)
    return sorted(seconds[1:])[num_repeats // 2] / batch_size


class Problem(NamedTuple):
    """Images that are seen by a model, of which some pixels are judged."""

    name: str
    model: Callable[..., Any]
    data: tuple[Any, ...]  # the model's arguments after the prior
    judged: jax.Array


def count_photons(prior, level, y):
    """Photon counts of a rate that is the exponential of the image, times a level."""
    with numpyro.plate("images", len(y)):
        y = numpyro.subsample(y, event_dim=2)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Poisson(level * jnp.exp(x)).to_event(2), obs=y)


def make_problems(truth, args):
    """See the images with hidden pixels in each noise, and by counts of each level."""
    key_hide, _ = jax.random.split(jax.random.key(args.seed))
    for noise in args.noises:
        mask, y = images.hide(key_hide, truth, args.hidden, noise)
        yield Problem(f"noise {noise:g}", images.model, (mask, noise, y), ~mask)
    for level in args.counts:
        key = jax.random.fold_in(key_hide, 1)
        counts = jax.random.poisson(key, level * jnp.exp(truth)).astype(float)
        yield Problem(
            f"counts {level:g}", count_photons, (level, counts), jnp.ones(truth.shape, bool)
        )


def draw(rng_key, case, prior, problem, args):
    """Draw in two calls; return the draws, and the seconds per draw of the compiled call."""
    parts = []
    for key in jax.random.split(rng_key):
        start = time.process_time()
        draws = ndp.sample_posterior(
            key,
            problem.model,
            prior,
            *problem.data,
            num_samples=args.num_samples // 2,
            num_particles=case.num_particles,
            sampler=ndp.samplers.MultistepSDE(args.num_steps),
            guidance=case.guidance,
            max_batch_size=args.max_batch_size,
        )
        parts.append(jax.block_until_ready(draws.samples["x"]))
        seconds = time.process_time() - start
    return jnp.concatenate(parts), seconds / (args.num_samples // 2 * len(problem.judged))


def judge(draws, truth, judged, args):
    """Return scores of the judged pixels, and the CRPS of each image."""
    of_images = jnp.mean(crps(draws, truth), axis=range(1, truth.ndim), where=judged)
    levels = [level for level in (0.5, 0.9) if level <= (len(draws) - 1) / (len(draws) + 1)]
    varies = truth.std(0) > 0.05 * args.scale
    inside = coverage(draws, truth, levels=levels, where=judged & varies)
    row = {
        "crps": float(of_images.mean()),
        "rmse": float(jnp.sqrt(jnp.mean((draws.mean(0) - truth) ** 2, where=judged))),
    }
    names = [f"cover{100 * level:.0f}" for level in levels]
    return row | dict(zip(names, map(float, inside), strict=True)), of_images


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    prior = train_prior(args) if args.prior is None else ndp.DiffusionPrior.load(args.prior)
    pixels, _ = images.read_images(args.data, "test")
    truth = images.scale(pixels[: args.num_images], args.scale)
    per_network = args.num_steps * time_network(prior.denoiser, args.max_batch_size)
    cases = [case for case in CASES if args.cases is None or case.name in args.cases]
    rows = []
    print(f"{'seen':12s} {'covariance':24s}  K " + " ".join(f"{c[:9]:>9s}" for c in COLUMNS))
    _, key_draw = jax.random.split(jax.random.key(args.seed))
    for problem in make_problems(truth, args):
        first = None
        for case in cases:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # draws that do not fit are what is measured
                draws, seconds = draw(key_draw, case, prior, problem, args)
            scores, of_images = judge(draws, truth, problem.judged, args)
            first = of_images if first is None else first
            row = {"seen": problem.name, "name": case.name, "num_particles": case.num_particles}
            row |= scores
            row["difference"] = float(jnp.mean(of_images - first))
            row["standard_error"] = float(jnp.std(of_images - first) / len(of_images) ** 0.5)
            row["cost"] = seconds / per_network
            rows.append(row)
            values = " ".join(f"{row.get(column, float('nan')):9.4f}" for column in COLUMNS)
            print(
                f"{problem.name:12s} {case.name:24s} {case.num_particles:2d} {values}", flush=True
            )
            (output / "images_guidance.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", help="folder of a saved prior (default: train one)")
    parser.add_argument("--data", default=images.DATA)
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=images.SCALE, help="value of white pixels")
    parser.add_argument("--hidden", type=float, default=0.75, help="fraction of hidden pixels")
    parser.add_argument("--noises", type=float, nargs="*", default=[1e-3, 0.1])
    parser.add_argument(
        "--counts", type=float, nargs="*", default=[], help="levels of photon counts"
    )
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=20, help="even; coverage needs 20")
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--max-batch-size", type=int, default=8, help="particles in memory")
    parser.add_argument("--cases", nargs="+", help="names of the table, the first to compare with")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
