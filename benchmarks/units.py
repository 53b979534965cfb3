"""Whether answers depend on the unit of the data, at the size of images.

Expectation maximization on smooth images with most pixels hidden, draws, samples of the learned
prior and log-evidence, in several units. Everything is divided by the unit and compared with unit
one. Training and resampling amplify rounding; the unit 1.000001 shows by how much.

    python benchmarks/units.py --output out
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx

import numpyro_diffprior as ndp

SHOWN, NOISE, LENGTH = 0.25, 0.1, 4.0
UNITS = [2.0**-86, 2.0**40, 1e-26, 1.000001]


def model(prior, mask, y, noise):
    with numpyro.plate("images", len(y)):
        mask = numpyro.subsample(mask, event_dim=2)
        y = numpyro.subsample(y, event_dim=2)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).mask(mask).to_event(2), obs=y)


def make_data(size, num_images):
    """Draws of a Gaussian process, of which some pixels are observed."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*2 * [np.arange(size)], indexing="ij"), -1).reshape(-1, 2)
    square = ((grid[:, None] - grid[None]) ** 2).sum(-1)
    root = np.linalg.cholesky(np.exp(-square / 2 / LENGTH**2) + 1e-6 * np.eye(size**2))
    x = 1 + (rng.normal(size=(num_images, size**2)) @ root.T).reshape(-1, size, size)
    mask = rng.random(x.shape) < SHOWN
    return mask, np.where(mask, x + NOISE * rng.normal(size=x.shape), 0)


def learn(unit, args):
    """Draws, samples and log-evidence in a unit, in terms of unit one."""
    mask, y = make_data(args.size, args.num_images)
    y, noise = (y * unit).astype(np.float32), np.float32(NOISE * unit)
    sampler = ndp.samplers.MultistepSDE(args.num_steps)
    net = ndp.UNet((args.size, args.size), channels=(8, 16), num_blocks=1, rngs=nnx.Rngs(0))
    em = ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(num_particles=2, max_batch_size=64, sampler=sampler),
        m_step=ndp.MStep(num_steps=8, batch_size=32),
        start=ndp.GaussianStart(num_iterations=8),
    )
    keys = [jax.random.key(i) for i in range(3)]
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net))
    result = em.run(keys[0], args.num_iterations, prior, mask, y, noise, progress_bar=False)
    few = slice(args.num_judged)
    evidence = ndp.log_evidence(
        keys[1],
        model,
        result.prior,
        mask[few],
        y[few],
        noise,
        num_particles=4,
        num_estimates=2,
        sampler=sampler,
    )
    return {
        "draws": np.asarray(result.state.draws["x"]) / unit,
        "samples": np.asarray(result.prior.sample(keys[2], (4,))) / unit,
        "log_evidence": float(evidence.total) + mask[few].sum() * np.log(unit),
    }


def main(args):
    reference = learn(1.0, args)
    rows = []
    print("unit          draws   samples  log-evidence")
    print(f"{1.0:10.3g} {'':8s} {'':8s} {reference['log_evidence']:12.2f}", flush=True)
    for unit in args.units:
        found = learn(unit, args)
        row = {"unit": unit, "log_evidence": found["log_evidence"]} | {
            name: float(np.abs(found[name] - reference[name]).max())
            for name in ("draws", "samples")
        }
        rows.append(row)
        print(
            f"{unit:10.3g} {row['draws']:8.1e} {row['samples']:8.1e} {row['log_evidence']:12.2f}",
            flush=True,
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {"log_evidence": reference["log_evidence"], "units": rows}
    (output / "units.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=float, nargs="+", default=UNITS)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--num-images", type=int, default=96)
    parser.add_argument("--num-iterations", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=12)
    parser.add_argument("--num-judged", type=int, default=16)
    parser.add_argument("--output", default="out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
