"""Solves for the mean of a posterior under a stationary covariance: steps and errors.

A complex field whose power falls with the frequency is seen through a masked Fourier transform, a
periodic blur, four coils of a scanner, and a random matrix. The Gaussian update at a noise level
(the limit of large ones, and the noise of the observations ten times) is computed by conjugate
gradients, preconditioned by the covariance, and by the stationary part of the precision. The error
is that of the mean in deviations of the posterior, root mean square over all directions, against a
dense solution in double precision.

With `--path`, posteriors are drawn in so many noise levels, with solves that start from zero at
each level, and from the posterior mean of the level before. The error is that of the draws, in
deviations of the posterior as above, against draws from the same numbers with precise solves.

    python benchmarks/solves.py --output out
    JAX_ENABLE_X64=1 python benchmarks/solves.py --path --noise 0.1 0.01
"""

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.kspace import fourier, make_field
from numpyro_diffprior.diffusion.samplers import MultistepSDE
from numpyro_diffprior.guidance import MMPS, GaussianCovariance, linear_gaussian
from numpyro_diffprior.guidance.covariances import PosteriorOperator
from numpyro_diffprior.guidance.guidance import GuidedDenoiser
from numpyro_diffprior.guidance.solves import ConjugateGradients, StationarySolve
from numpyro_diffprior.linalg import Isotropic
from numpyro_diffprior.particles.smc import draw_posterior
from numpyro_diffprior.particles.system import SamplingOptions


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


@dataclass(frozen=True, eq=False)
class FromZero(GuidedDenoiser):
    """A posterior whose solves do not start from the last noise level."""

    posterior: GuidedDenoiser

    def evaluate(self, x_t, sigma, guess):
        return self.posterior.guide(x_t, sigma)


@jax.tree_util.register_static
@dataclass(frozen=True)
class GuidanceFromZero(MMPS):
    def bind(self, denoiser, likelihood):
        return FromZero(denoiser, likelihood, super().bind(denoiser, likelihood))


def follow(name, noise, args):
    """Return the steps per level of draws, and their errors, from zero and from the last level."""
    rng = np.random.default_rng(args.seed)
    prior, _ = make_field(args.size)
    observe = OPERATORS[name](args.size, rng)
    shape, size = prior.event_shape, prior.event_size
    matrix = jax.lax.map(lambda v: observe(v).ravel(), jnp.eye(size).reshape(-1, *shape)).T
    white = jnp.asarray(rng.normal(size=(args.num_events, size)), prior.dtype)
    y = jax.vmap(prior.cov.sqrt_matvec)(white) @ matrix.T
    y += noise * jnp.asarray(rng.normal(size=y.shape), prior.dtype)
    noises = Isotropic(jnp.asarray(noise**2), y.shape[-1])
    likelihood = linear_gaussian(y, matrix, noises, shape)
    columns = np.asarray(jax.vmap(prior.cov.matvec)(jnp.eye(size)), float)
    precision = np.linalg.inv(columns) + np.asarray(matrix.T @ matrix, float) / noise**2
    sampler = MultistepSDE(args.path)

    def draw(guidance):
        options = SamplingOptions(1, sampler, guidance)
        draws = draw_posterior(jax.random.key(args.seed), prior, likelihood, options)
        steps = float(draws.info.num_solver_steps.mean()) / args.path
        return np.asarray(draws.x, float).reshape(args.num_events, -1), steps

    row = {"operator": name, "noise": noise}
    options = {"covariance": GaussianCovariance(), "max_dense": 0}
    exact, _ = draw(GuidanceFromZero(atol=1e-4, **options))
    for start, guidance in (("from zero", GuidanceFromZero), ("from the last level", MMPS)):
        draws, steps = draw(guidance(atol=args.atol[0], **options))
        error = draws - exact
        square = np.einsum("ni,ij,nj->n", error, precision, error).mean()
        row[start] = {"steps": steps, "error": float(np.sqrt(square))}
    return row


def show(row):
    found = "  ".join(
        f"{key} {value['steps']:6.1f} steps {value['error']:9.2e}"
        for key, value in row.items()
        if isinstance(value, dict)
    )
    sigma = f" sigma {row['sigma']:6g}" if "sigma" in row else ""
    print(f"{row['operator']:20s} noise {row['noise']:.0e}{sigma}  {found}", flush=True)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, noise in itertools.product(OPERATORS, args.noise):
        if args.path:
            rows.append(follow(name, noise, args))
            show(rows[-1])
            continue
        for sigma in (100.0, 10 * noise):
            rows.append(measure(name, noise, sigma, args))
            show(rows[-1])
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
    parser.add_argument("--num-events", type=int, default=8, help="drawn along a path")
    parser.add_argument(
        "--path", type=int, nargs="?", const=32, default=0, help="levels of a sampler, if any"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
