"""How well the forms of a Gaussian describe images, and what it takes to fit them.

A Gaussian of each form is fitted to clean images of Fashion-MNIST, and, by the start of EM, to
images of which `--hidden` of the pixels are hidden. Of test images with 75 % of the pixels hidden,
the hidden ones are restored by the posterior mean; errors are relative to the images' deviation.
Clean images are also described by a Kronecker product of covariances of rows and columns, which
the package does not have.

    python benchmarks/summaries.py --num-images 128 512 4096
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import images

SUMMARIES = {
    "low rank": ndp.linalg.LowRankSummary,
    "stationary": lambda rank: ndp.linalg.StationarySummary(),
    "stationary plus low rank": ndp.linalg.StationaryLowRankSummary,
}


def fit_kronecker(x, num_rounds=10):
    """Fit mean and covariances of rows and columns by maximum likelihood, in turn."""
    x = np.asarray(x, "float64")
    mean = x.mean(0)
    centered = x - mean
    rows, columns = (np.eye(size) for size in mean.shape)
    for _ in range(num_rounds):
        rows = np.einsum("nij,jk,nlk->il", centered, np.linalg.inv(columns), centered)
        rows = ridge(rows / (len(x) * len(columns)))
        columns = np.einsum("nij,ik,nkl->jl", centered, np.linalg.inv(rows), centered)
        columns = ridge(columns / (len(x) * len(rows)))
    return mean, np.kron(rows, columns)


def ridge(matrix):
    return matrix + 1e-4 * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def judge(mean, cov, test, seen, noise):
    """Return the error of hidden pixels, and the log-density of the seen ones per image."""
    mean, cov = np.asarray(mean, "float64").ravel(), np.asarray(cov, "float64")
    values = test + noise * np.random.default_rng(1).normal(size=test.shape)
    squares, densities = [], []
    for x, y, mask in zip(test, values, seen, strict=True):
        marginal = cov[np.ix_(mask, mask)] + noise**2 * np.eye(mask.sum())
        residual = y[mask] - mean[mask]
        solved = np.linalg.solve(marginal, residual)
        squares.append(np.mean((mean + cov[:, mask] @ solved - x)[~mask] ** 2))
        logdet = np.linalg.slogdet(2 * np.pi * marginal)[1]
        densities.append(-0.5 * (residual @ solved + logdet))
    error = np.sqrt(np.mean(squares) / test.var(0).mean())
    return {"error": float(error), "log_density": float(np.mean(densities))}


def fit_hidden(clean, summary, args):
    """Fit a Gaussian to images with hidden pixels, as EM starts."""
    mask, y = images.hide(jax.random.key(0), clean, args.hidden, args.noise)
    net = ndp.UNet(clean.shape[1:], spatial_dims=2, channels=(4,), rngs=nnx.Rngs(0))
    em = ndp.EM(
        images.model, optax.sgd(1e-3), start=ndp.GaussianStart(args.num_iterations, summary)
    )
    untrained = ndp.DiffusionPrior(ndp.NetworkDenoiser(net))
    denoiser = em.init(jax.random.key(1), untrained, mask, args.noise, y).prior.denoiser
    return denoiser.to_data(denoiser.mean), denoiser.unit**2 * denoiser.cov.dense()


def main(args):
    train, test = (images.scale(images.read_images(args.data, p)[0]) for p in ("train", "test"))
    test = np.asarray(test[: args.num_judged], "float64").reshape(args.num_judged, -1)
    seen = np.random.default_rng(0).random(test.shape) > 0.75
    rows = []
    print("covariance                images  fitted to    error  log-density  seconds")

    def measure(name, num, kind, fit):
        began = time.process_time()
        mean, cov = fit()
        row = {"covariance": name, "num_images": num, "kind": kind}
        row |= {"seconds": time.process_time() - began} | judge(mean, cov, test, seen, args.noise)
        rows.append(row)
        print(
            "{covariance:25s} {num_images:6d}  {kind:9s} {error:8.3f} {log_density:12.1f} "
            "{seconds:8.0f}".format(**row),
            flush=True,
        )

    for num in args.num_images:
        clean = train[:num]
        for name, form in SUMMARIES.items():
            summary = form(args.rank)

            def fit(clean=clean, summary=summary):
                mean, cov = jax.jit(summary)(clean)
                return mean, cov.dense()

            measure(name, num, "clean", fit)
            if args.num_iterations:
                hidden = f"{args.hidden:.0%}"
                measure(name, num, hidden, lambda c=clean, s=summary: fit_hidden(c, s, args))
        measure("Kronecker product", num, "clean", lambda clean=clean: fit_kronecker(clean))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "summaries.json").write_text(
        json.dumps({"rows": rows, "args": vars(args)}, indent=1)
    )
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="out")
    parser.add_argument("--data", default=images.DATA, help="folder of Fashion-MNIST")
    parser.add_argument("--num-images", type=int, nargs="+", default=[128, 512, 4096])
    parser.add_argument("--num-judged", type=int, default=64)
    parser.add_argument("--num-iterations", type=int, default=16, help="of EM's start; 0 for none")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--hidden", type=float, default=0.75)
    parser.add_argument("--noise", type=float, default=0.01, help="for pixels from -2 to 2")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
