"""Calibration of draws of complex fields that are seen in masked k-space.

The fields are Gaussian with full rank, their power falls with the frequency, and the Fourier
transform is unitary, so that mean and variance of the posterior are known for each frequency. The
prior is exact, or a Gaussian fitted to simulated fields: stationary, or diagonal plus low rank,
which takes high frequencies for white noise. With "low rank, guidance", the denoiser is exact and
only the covariance that guidance takes has low rank. Every fourth line of k-space is seen, at
random, and the lowest frequencies.

The mean is compared in posterior deviations: the root mean square of the difference to the exact
mean, of which `1 / sqrt(draws)` is the error of the draws. The ratio of variances should be one.

    python benchmarks/kspace.py --sizes 32 64 --output out
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_diffprior as ndp
from numpyro_diffprior.linalg import LowRankSummary, Stationary, StationarySummary
from numpyro_diffprior.metrics.ranks import coverage

LEVELS = (0.5, 0.9)


def fourier(x):
    """The unitary Fourier transform of complex fields, real and imaginary parts last."""
    k = jnp.fft.fft2(x[..., 0] + 1j * x[..., 1], norm="ortho")
    return jnp.stack([k.real, k.imag], axis=-1)


def inverse_fourier(k):
    x = jnp.fft.ifft2(k[..., 0] + 1j * k[..., 1], norm="ortho")
    return jnp.stack([x.real, x.imag], axis=-1)


def model(prior, mask, noise, y):
    with numpyro.plate("slices", len(mask)):
        mask = numpyro.subsample(mask, event_dim=3)
        y = numpyro.subsample(y, event_dim=3)
        k = fourier(numpyro.sample("x", prior))
        numpyro.sample("y", dist.Normal(k, noise).mask(mask).to_event(3), obs=y)


def make_field(size):
    """A complex field of variance one."""
    frequencies = np.fft.fftfreq(size) * size
    distance = np.hypot(frequencies[:, None], frequencies)
    power = (1 + distance) ** -2.5
    power = np.repeat(power[..., None] / (2 * power.mean()), 2, axis=-1)
    cov = Stationary(jnp.asarray(power.reshape(-1), jnp.float32), jnp.eye(2), (size, size))
    return ndp.GaussianDenoiser(jnp.zeros((size, size, 2)), cov), power


def make_data(rng_key, exact, num_events, noise):
    """Fields, the mask and the observed values of k-space."""
    key_field, key_mask, key_noise = jax.random.split(rng_key, 3)
    shape = (num_events, *exact.event_shape)
    z = jax.random.normal(key_field, (num_events, exact.event_size))
    truth = exact.cov.sqrt_matvec(z).reshape(shape)
    size = exact.event_shape[0]
    low = jnp.abs(jnp.fft.fftfreq(size) * size) <= size // 10
    seen = low | jax.random.bernoulli(key_mask, 0.25, (num_events, size))
    mask = jnp.broadcast_to(seen[:, :, None, None], shape)
    return truth, mask, fourier(truth) + noise * jax.random.normal(key_noise, shape)


def fit(rng_key, exact, summary, num_fields):
    """Mean and covariance of simulated fields."""
    z = jax.random.normal(rng_key, (num_fields, exact.event_size))
    return summary(exact.cov.sqrt_matvec(z).reshape(num_fields, *exact.event_shape))


def make_denoiser(rng_key, name, exact, num_fields):
    match name:
        case "exact":
            return exact
        case "stationary":
            return ndp.GaussianDenoiser(*fit(rng_key, exact, StationarySummary(), num_fields))
        case "low rank":
            return ndp.GaussianDenoiser(*fit(rng_key, exact, LowRankSummary(), num_fields))
        case "low rank, guidance":
            return ndp.FunctionDenoiser(exact, *fit(rng_key, exact, LowRankSummary(), num_fields))


PRIORS = ("exact", "stationary", "low rank", "low rank, guidance")


def measure(size, noise, name, args):
    exact, power = make_field(size)
    key_data, key_fit, key_draw = jax.random.split(jax.random.key(args.seed), 3)
    truth, mask, y = make_data(key_data, exact, args.num_events, noise)
    denoiser = make_denoiser(key_fit, name, exact, args.num_fields)
    prior = ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.MultistepSDE(args.num_steps))
    start = time.process_time()
    draws = ndp.sample_posterior(
        key_draw,
        model,
        prior,
        mask,
        noise,
        y,
        num_samples=args.num_samples,
        guidance=ndp.MMPS(ndp.guidance.GaussianCovariance()),
    )
    x = draws.samples["x"]
    seconds = time.process_time() - start

    gain = jnp.where(mask, power / (power + noise**2), 0)
    mean = inverse_fourier(gain * y)
    # All points of an event have one variance: each has an equal part of every frequency.
    variance = ((1 - gain) * power).mean(axis=(1, 2, 3), keepdims=True)
    shift = (x.mean(0) - mean) / jnp.sqrt(variance)
    inside = coverage(x, truth, levels=LEVELS)
    return {
        "size": size,
        "noise": noise,
        "prior": name,
        "coverage": [float(c) for c in inside],
        "mean": float(jnp.sqrt(jnp.square(shift).mean())),
        "variance": float((x.var(0, ddof=1) / variance).mean()),
        "residual": float(draws.stats["residual"].max()),
        "chi-square": float(draws.stats["reduced_chi_square"].mean()),
        "seconds": seconds,
    }


def main(args):
    rows = []
    print(f"{args.num_events} fields, {args.num_samples} draws, {args.num_steps} steps")
    print(
        "size    noise  prior                 50 %   90 %   mean  variance  residual     chi2  s"
    )
    for size, noise, name in itertools.product(args.sizes, args.noise, args.priors):
        row = measure(size, noise, name, args)
        inside = "".join(f"{c:7.3f}" for c in row["coverage"])
        print(
            f"{size:4d} {noise:8.0e}  {name:18s} {inside} {row['mean']:6.3f} "
            f"{row['variance']:9.3f} {row['residual']:9.1e} {row['chi-square']:8.3f} "
            f"{row['seconds']:6.1f}",
            flush=True,
        )
        rows.append(row)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "settings": vars(args)}
    (output / "kspace.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--noise", nargs="+", type=float, default=[1e-1, 1e-2, 1e-3])
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--num-events", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--num-fields", type=int, default=512)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
