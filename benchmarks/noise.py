"""Which distribution of noise levels trains best.

The same network on the clean digits, with the noise levels of its minibatches drawn from several
distributions, independent or stratified. Judged on what the network was not trained for: the
denoising loss of held-out digits at noise levels spread evenly over the logarithmic axis, and the
Fréchet distance of its samples to the digits it was trained on.

    python benchmarks/noise.py --output out
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
from numpyro_diffprior.diffusion.noise import LogBeta, LogNormal, LogUniform
from numpyro_diffprior.diffusion.training import denoising_loss

DISTRIBUTIONS = {
    "LogBeta(3, 3), independent": LogBeta(stratified=False),
    "LogBeta(3, 3), stratified": LogBeta(),
    "LogNormal, stratified": LogNormal(),
    "LogUniform, stratified": LogUniform(),
}


def evaluate(rng_key, denoiser, x, num_levels=64):
    """The weighted denoising loss at levels spread evenly over the logarithmic axis."""
    sigmas = ndp.noise.LogLinear()(num_levels, denoiser.sigma_min, denoiser.sigma_max)

    @jax.jit
    def loss(key, sigma):
        return denoising_loss(denoiser, x, sigma, key)

    keys = jax.random.split(rng_key, num_levels)
    return float(np.mean([loss(key, sigma) for key, sigma in zip(keys, sigmas, strict=True)]))


def main(args):
    key_data, *keys = jax.random.split(jax.random.key(args.seed), 1 + args.num_seeds)
    data = digits.make_data(key_data, 0.5, args.num_images)
    features, optimizer = digits.make_features(), digits.make_optimizer(1e-3)
    rows = []
    print(f"{'':28s} {'held-out loss':>18s} {'Frechet':>18s}")
    for name, noise in DISTRIBUTIONS.items():
        losses, distances = [], []
        for key in keys:
            key_net, key_train, key_judge = jax.random.split(key, 3)
            fit = ndp.fit_denoiser(
                key_train,
                digits.make_prior(key_net, args.width).denoiser,
                data.clean,
                optimizer=optimizer,
                num_steps=args.num_sgd_steps,
                noise=noise,
            )
            losses.append(evaluate(key_judge, fit.denoiser, data.test))
            prior = ndp.DiffusionPrior(fit.denoiser)
            distances.append(digits.judge_prior(key_judge, prior, data, features))
        rows.append({"noise": name, "losses": losses, "frechet": distances})
        cells = (f"{np.mean(v):8.3f} +- {np.std(v):.3f}" for v in (losses, distances))
        print(f"{name:28s} " + " ".join(f"{cell:>18s}" for cell in cells), flush=True)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "noise.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=digits.NUM_TRAIN)
    parser.add_argument("--num-sgd-steps", type=int, default=3000)
    parser.add_argument("--width", type=int, default=512)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
