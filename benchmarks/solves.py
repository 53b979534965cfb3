"""Solves for the mean of a posterior under a stationary covariance: steps and errors.

A complex field whose power falls with the frequency is seen through a masked Fourier transform, a
periodic blur, four coils of a scanner, and a random matrix. The Gaussian update at a noise level
(the limit of large ones, and the noise of the observations ten times) is computed by conjugate
gradients, preconditioned by the covariance, and by the stationary part of the precision. The error
is that of the mean in deviations of the posterior, root mean square over all directions, against a
dense solution in double precision.

With `--path`, updates are solved at the noise levels of a sampler, at noisy events of one draw of
the posterior: from zero at each level, and from the posterior mean of the level before, as much of
it as minimizes the energy.

    python benchmarks/solves.py --output out
    JAX_ENABLE_X64=1 python benchmarks/solves.py --path --noise 0.1 0.01
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.kspace import fourier, make_field
from numpyro_diffprior.guidance import linear_gaussian
from numpyro_diffprior.guidance.covariances import PosteriorOperator
from numpyro_diffprior.guidance.solves import ConjugateGradients, StationarySolve
from numpyro_diffprior.linalg import Isotropic
from numpyro_diffprior.linalg.solvers import conjugate_gradient


def make_coils(size, num_coils):
    """Smooth sensitivities whose squares sum to one."""
    points = np.linspace(-1, 1, size)
    angles = 2 * np.pi * np.arange(num_coils) / num_coils
    x, y = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    square = (points[:, None] - x) ** 2 + (points - y) ** 2
    coils = np.exp(-square / 2) * np.exp(1j * angles)[:, None, None]
    return coils / np.sqrt((np.abs(coils) ** 2).sum(0))


def masked_fourier(size, num_coils, rng):
    """A quarter of the lines of k-space and the lowest ones, in each coil."""
    seen = rng.random(size) < 0.25
    seen[[0, 1, -1]] = True
    coils = make_coils(size, num_coils) if num_coils > 1 else np.ones((1, size, size))

    def observe(x):
        image = coils * jax.lax.complex(x[..., 0], x[..., 1])
        return fourier(jnp.stack([image.real, image.imag], axis=-1))[:, seen]

    return observe


def blur(size, _):
    distance = np.fft.fftfreq(size) * size
    kernel = np.exp(-(distance**2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    transfer = jnp.fft.fft2(kernel)[..., None]
    return lambda x: jnp.fft.ifft2(transfer * jnp.fft.fft2(x, axes=(0, 1)), axes=(0, 1)).real


def mix(size, rng):
    matrix = jnp.asarray(rng.normal(size=(size**2, 2 * size**2)) / size, jnp.float32)
    return lambda x: matrix @ x.ravel()


OPERATORS = {
    "k-space": lambda size, rng: masked_fourier(size, 1, rng),
    "blur": blur,
    "k-space, four coils": lambda size, rng: masked_fourier(size, 4, rng),
    "random": mix,
}


def measure(name, noise, sigma, args):
    rng = np.random.default_rng(args.seed)
    prior, _ = make_field(args.size)
    observe = OPERATORS[name](args.size, rng)
    basis = jnp.eye(prior.event_size).reshape(-1, *prior.event_shape)
    matrix = jax.lax.map(lambda x: observe(x).ravel(), basis).T
    x = prior.cov.sqrt_matvec(jnp.asarray(rng.normal(size=prior.event_size), jnp.float32))
    y = matrix @ x + noise * jnp.asarray(rng.normal(size=len(matrix)), jnp.float32)
    noises = Isotropic(jnp.asarray(noise**2), len(y))
    likelihood = linear_gaussian(y, matrix, noises, prior.event_shape)
    cov = prior.cov.conditional(jnp.asarray(sigma**2))
    local = likelihood.linearize(jnp.zeros(prior.event_shape))
    operator = PosteriorOperator(x, cov.matvec, cov.matvec, cov)

    columns = np.asarray(jax.vmap(cov.matvec)(jnp.eye(cov.size)), float)
    a = np.asarray(matrix, float)
    system = np.linalg.inv(columns) + a.T @ a / noise**2
    exact = np.linalg.solve(system, a.T @ np.asarray(y, float) / noise**2)
    row = {"operator": name, "noise": noise, "sigma": sigma}
    for atol in args.atol:
        plain = ConjugateGradients(atol, None)
        part = StationarySolve.of(local, cov, plain)
        for solver, solve in (("conjugate gradients", plain), ("stationary part", part)):
            found = jax.jit(lambda solve=solve: solve(local, operator, lambda: matrix))()
            error = np.asarray(found.shift, float) - exact
            row[f"{solver}, {atol:g}"] = {
                "steps": float(found.stats.num_steps),
                "error": float(np.sqrt(error @ system @ error)),
            }
    return row


def follow(name, noise, args):
    """Return the steps per level of solves from zero, and from the level before."""
    rng = np.random.default_rng(args.seed)
    prior, _ = make_field(args.size)
    observe = OPERATORS[name](args.size, rng)
    shape, size = prior.event_shape, prior.event_size
    white = [jnp.asarray(rng.normal(size=size), prior.dtype) for _ in range(args.path + 1)]
    x = prior.cov.sqrt_matvec(white[0]).reshape(shape)
    matrix = jax.lax.map(lambda v: observe(v).ravel(), jnp.eye(size).reshape(-1, *shape)).T
    y = matrix @ x.ravel() + noise * jnp.asarray(rng.normal(size=len(matrix)), prior.dtype)
    noises = Isotropic(jnp.asarray(noise**2), len(y))
    likelihood = linear_gaussian(y, matrix, noises, shape)
    # The events at all levels are noisy versions of one, the smallest first.
    levels = jnp.geomspace(float(prior.sigma_min), float(prior.sigma_max), args.path)
    added = jnp.sqrt(jnp.diff(jnp.square(levels), prepend=0))
    noisy = x.ravel() + jnp.cumsum(added[:, None] * jnp.stack(white[1:]), axis=0)
    part = StationarySolve.of(likelihood.linearize(x), prior.cov, ConjugateGradients()).part

    @jax.jit
    def solve(x_t, sigma, mean):
        cov = prior.cov.conditional(sigma**2)
        x_hat = prior(x_t.reshape(shape), sigma)
        local = likelihood.linearize(x_hat)
        start = mean - x_hat.ravel()
        slope = cov.solve(start) + local.precision(start)
        start = (local.score() @ start) / (start @ slope) * start

        def steps(precondition, start):
            score = local.score() - cov.solve(start) - local.precision(start)
            return conjugate_gradient(local.precision, precondition, score, atol=args.atol[0])

        found = []
        for precondition in (
            lambda r: (r, cov.matvec(r)),
            cov.update_stationary(part.lower).solve,
        ):
            cold, warm = steps(precondition, 0 * start), steps(precondition, start)
            found += [cold.num_steps, warm.num_steps]
        return x_hat.ravel() + cold.shift, jnp.stack(found)

    mean, counts = jnp.zeros(size), []
    for x_t, sigma in zip(noisy[::-1], levels[::-1], strict=True):
        mean, found = solve(x_t, sigma, mean)
        counts.append(found)
    names = ("conjugate gradients", "from the last level", "stationary part", "both")
    totals = np.mean(counts, axis=0).tolist()
    return {"operator": name, "noise": noise} | dict(zip(names, totals, strict=True))


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    if args.path:
        for name, noise in itertools.product(OPERATORS, args.noise):
            rows.append(follow(name, noise, args))
            print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
        result = {"args": vars(args), "rows": rows}
        (output / "solves.json").write_text(json.dumps(result, indent=1))
        return result
    for name, noise in itertools.product(OPERATORS, args.noise):
        for sigma in (100.0, 10 * noise):
            row = measure(name, noise, sigma, args)
            rows.append(row)
            found = "  ".join(
                f"{key} {value['steps']:5.0f} steps {value['error']:9.2e}"
                for key, value in row.items()
                if isinstance(value, dict)
            )
            print(f"{name:20s} noise {noise:.0e} sigma {sigma:6g}  {found}", flush=True)
    result = {"args": vars(args), "rows": rows}
    (output / "solves.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out", help="folder of the result")
    parser.add_argument("--size", type=int, default=16, help="of a side of the fields")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.01, 0.001])
    parser.add_argument("--atol", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--path", type=int, nargs="?", const=32, default=0, help="levels of a sampler, if any"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
