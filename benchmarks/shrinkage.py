"""What shrinkage does for the Gaussian that EM starts from, where events are few.

Digits, standardized, are seen with half of their pixels hidden, blurred, or through random
projections, or lensed galaxies through lenses of their own (`examples/lensing.py`). A Gaussian is
fitted to some of them, with and without the choice of a shrinkage by held-out evidence. Other
events are restored by its posterior mean (peak signal-to-noise ratio over a range of 1 for
galaxies, 2 for digits), and its log-evidence of their observations is counted per event.

    python benchmarks/shrinkage.py --num-events 256 1024
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import lensing
from numpyro_diffprior.em.gaussian import fit_gaussian
from numpyro_diffprior.guidance.likelihood import linear_gaussian

NUM_OTHERS = 256
PROBLEMS = ("hidden", "blurred", "projected", "lensed")


def make_problem(name, num_events):
    """Events, operators of shape ``(n, m, d)``, the deviation of the noise and the range."""
    rng, num = np.random.default_rng(0), num_events + NUM_OTHERS
    if name == "lensed":
        args = lensing.parse_args([])
        optics = lensing.make_optics(args.image_size)
        x = jnp.asarray(lensing.make_galaxies(rng, num, args), "float32")
        systems = lensing.observe(jax.random.key(0), x, optics, args.noise)
        operator = jax.lax.map(
            lambda lens: lensing.make_operator(lens, optics, args.source_size), systems.lens
        )
        return x, operator.reshape(num, -1, args.source_size**2), args.noise, 1.0
    images = load_digits().images / 8 - 1
    x, size = images[rng.permutation(len(images))[:num]], 64
    if name == "hidden":
        operator, noise = (rng.random((num, size)) < 0.5)[..., None] * np.eye(size), 0.1
    elif name == "projected":
        operator, noise = rng.normal(size=(num, 8, size)) / 8, 0.1
    else:
        distance = np.subtract.outer(np.arange(8), np.arange(8))
        row = np.exp(-0.5 * distance**2)
        row /= row.sum(1, keepdims=True)
        operator, noise = np.broadcast_to(np.kron(row, row), (num, size, size)), 0.05
    return jnp.asarray(x, "float32"), jnp.asarray(operator, "float32"), noise, 2.0


def measure(name, num_events, shrinkage, num_iterations):
    """Fit a Gaussian to the first events; judge it by the others."""
    x, operator, noise, width = make_problem(name, num_events)
    rng = np.random.default_rng(1)
    clean = jnp.einsum("nmd,nd->nm", operator, x.reshape(len(x), -1), precision="highest")
    y = clean + noise * rng.normal(size=clean.shape).astype("float32")

    variances = jnp.full(y.shape, noise**2)

    def read(index):
        return linear_gaussian(
            y[index], operator[index], ndp.linalg.Diagonal(variances[index]), x.shape[1:]
        )

    began = time.process_time()
    fit = jax.block_until_ready(
        fit_gaussian(
            read,
            num_events,
            event_shape=x.shape[1:],
            num_iterations=num_iterations,
            shrinkage=shrinkage,
        )
    )
    seconds = time.process_time() - began
    mean, cov = np.asarray(fit.mean, "float64").ravel(), np.asarray(fit.cov.dense(), "float64")
    errors, evidence = [], []
    for i in range(num_events, len(x)):
        a, truth = np.asarray(operator[i], "float64"), np.asarray(x[i]).ravel()
        seen = np.any(a != 0, axis=1)
        a, residual = a[seen], np.asarray(y[i], "float64")[seen] - a[seen] @ mean
        marginal = a @ cov @ a.T + noise**2 * np.eye(len(a))
        solved = np.linalg.solve(marginal, residual)
        logdet = np.linalg.slogdet(2 * np.pi * marginal)[1]
        errors.append(np.mean((mean + cov @ a.T @ solved - truth) ** 2))
        evidence.append(-0.5 * (residual @ solved + logdet))
    return {
        "problem": name,
        "num_events": num_events,
        "num_iterations": int(np.isfinite(fit.log_evidence).sum()),
        "shrinkage": float(fit.shrinkage),
        "psnr": float(-10 * np.log10(np.mean(errors) / width**2)),
        "evidence": float(np.mean(evidence)),
        "seconds": seconds,
    }


def main(args):
    rows = []
    print("problem    events  shrinkage  iterations   PSNR  held-out evidence  seconds")
    for name in args.problems:
        for num_events in args.num_events:
            for shrinkage in (0.0, None):
                row = measure(name, num_events, shrinkage, args.num_iterations)
                rows.append(row)
                print(
                    "{problem:10s} {num_events:6d} {shrinkage:10.0f} {num_iterations:11d} "
                    "{psnr:6.2f} {evidence:18.2f} {seconds:8.0f}".format(**row),
                    flush=True,
                )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "shrinkage.json").write_text(
        json.dumps({"rows": rows, "args": vars(args)}, indent=1)
    )
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--num-events", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--num-iterations", type=int, default=32)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
