"""What an E-step costs beside its bare network, for events of users' sizes.

Overhead is the time of an E-step over that of its evaluations of the network: their number times
one jitted forward evaluation at the same batch, with one vector-Jacobian product where guidance
takes one. Both are timed in turn, in processor and in wall seconds, and the shortest of several
times is taken. The ratios count, the times only describe the machine. Steps of conjugate gradients
with Tweedie's covariance take further products, which are not counted.

Events are smooth random fields with a Gaussian summary of rank 32, as `GaussianStart` fits it, and
the U-Net has the package's default widths (the perceptron of 8 x 8 those of `examples/digits.py`).

    python benchmarks/event_sizes.py --sizes 28x28 32x32x3 --operators mask fourier --output out
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
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.infer.blocks import block_size, sample_blocks
from numpyro_diffprior.reading.reader import read

NOISE = 0.1
BATCHES = {"8x8": 256, "16x16": 128, "28x28": 64, "32x32x3": 64, "64x64x2": 16}
SIZES = tuple(BATCHES)
BAND = 0.15


def identity(x):
    return x


def fourier(x):
    """The unitary Fourier transform over the image's axes, real and imaginary parts last."""
    k = jnp.fft.fft2(x, axes=(1, 2), norm="ortho")
    return jnp.stack([k.real, k.imag], axis=-1)


def blur(x):
    """A Gaussian kernel of width 1.5 pixels, with periodic boundaries."""
    frequencies = jnp.meshgrid(*[jnp.fft.fftfreq(n) for n in x.shape[1:3]], indexing="ij")
    transfer = jnp.exp(-0.5 * (2 * jnp.pi * 1.5) ** 2 * sum(f**2 for f in frequencies))
    transfer = transfer.reshape(*transfer.shape, *(1,) * (x.ndim - 3))
    return jnp.fft.ifft2(transfer * jnp.fft.fft2(x, axes=(1, 2)), axes=(1, 2)).real


OPERATORS = {"mask": identity, "fourier": fourier, "blur": blur}


def smooth_fields(rng, num, shape):
    """Gaussian random fields with power at low frequencies, of variance one."""
    noise = rng.normal(size=(num, *shape))
    axes = (1, 2)
    frequencies = np.meshgrid(*[np.fft.fftfreq(n) for n in shape[:2]], indexing="ij")
    power = np.exp(-0.5 * sum(f**2 for f in frequencies) / (BAND / 2) ** 2)
    power = power.reshape(1, *power.shape, *(1,) * (len(shape) - 2))
    fields = np.fft.ifftn(np.fft.fftn(noise, axes=axes) * power, axes=axes).real
    return jnp.asarray(fields / fields.std(), jnp.float32)


def make_model(operator):
    """A quarter of the values that the operator returns is seen, in noise."""

    def model(prior, mask, y):
        with numpyro.plate("events", len(mask)):
            mask = numpyro.subsample(mask, event_dim=mask.ndim - 1)
            y = numpyro.subsample(y, event_dim=y.ndim - 1)
            mean = OPERATORS[operator](numpyro.sample("x", prior))
            seen = dist.Normal(mean, NOISE).mask(mask)
            numpyro.sample("y", seen.to_event(mask.ndim - 1), obs=y)

    return model


def make_prior(shape, fields, num_steps, **options):
    rngs = nnx.Rngs(0)
    net = ndp.UNet(shape, spatial_dims=2, rngs=rngs, **options)
    if shape == (8, 8):
        net = ndp.MLP(shape, features=(512, 512, 512), rngs=rngs)
    flat = fields.reshape(len(fields), -1)
    mean, cov = ndp.linalg.empirical_gaussian(flat, rank=min(32, flat.shape[1] // 4))
    denoiser = ndp.NetworkDenoiser(net, mean.reshape(shape), cov)
    return ndp.DiffusionPrior(denoiser, sampler=ndp.samplers.MultistepSDE(num_steps))


def forward(prior, x):
    return prior.denoise(x, 1.0)


def forward_and_vjp(prior, x):
    x_hat, vjp = jax.vjp(lambda x: prior.denoise(x, 1.0), x)
    return vjp(x_hat)


def clock(functions, num_repeats):
    """The shortest processor and wall seconds of several functions, measured in turn."""
    times = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(num_repeats):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            times[name].append((time.process_time() - processor, time.perf_counter() - wall))
    return {name: [min(column) for column in zip(*t, strict=True)] for name, t in times.items()}


def measure(size, operator, num_particles, guidance, args):
    shape = tuple(int(n) for n in size.split("x"))
    num_events = max(1, BATCHES[size] // num_particles)
    fields = smooth_fields(np.random.default_rng(args.seed), 512, shape)
    prior = make_prior(shape, fields, args.num_steps)
    row = time_e_step(prior, fields, operator, num_particles, guidance, num_events, args)
    return {"size": size, "operator": operator, "num_particles": num_particles} | row


def time_e_step(prior, fields, operator, num_particles, guidance, num_events, args):
    """Time an E-step of events, and as many evaluations of the network."""
    rng = np.random.default_rng(args.seed + 1)
    clean = OPERATORS[operator](fields[:num_events])
    mask = jnp.asarray(rng.random(clean.shape) < 0.25)
    y = clean + NOISE * jnp.asarray(rng.normal(size=mask.shape), jnp.float32)
    model = make_model(operator)
    options = ndp.EStep(num_particles=num_particles, guidance=guidance).options(prior.sampler)
    limit = BatchLimit(num_events * num_particles)
    key = jax.random.key(args.seed)

    def draw():
        size = block_size(num_particles, 1, limit)
        bound = read(model, (prior, mask, y), {}, block_size=size)
        return sample_blocks(key, bound, options, num_draws=1, limit=limit)

    start, start_wall = time.process_time(), time.perf_counter()
    draws = jax.block_until_ready(draw())
    first, first_wall = time.process_time() - start, time.perf_counter() - start_wall
    x = jnp.zeros((num_particles * num_events, *prior.event_shape))
    jitted, jitted_vjp = jax.jit(forward), jax.jit(forward_and_vjp)
    seconds = clock(
        {
            "E-step": draw,
            "forward": lambda: [jitted(prior, x) for _ in range(args.num_steps)],
            "forward and vjp": lambda: [jitted_vjp(prior, x) for _ in range(args.num_steps)],
        },
        args.num_repeats,
    )
    fit = float(draws.stats["reduced_chi_square"].mean())
    return {
        "first call": first,
        "first call, wall": first_wall,
        "seconds": seconds,
        "reduced chi square": fit,
    }


GUIDANCE = {
    "gaussian": ndp.MMPS(ndp.guidance.GaussianCovariance()),
    "looking ahead": ndp.MMPS(ndp.guidance.GaussianCovariance(), look_ahead=True),
    "tweedie": ndp.MMPS(),
}


def ratios(row):
    """The E-step's processor and wall seconds over those of its evaluations."""
    seconds = row["seconds"]
    names = itertools.product((0, 1), ("forward", "forward and vjp"))
    return [seconds["E-step"][i] / seconds[name][i] for i, name in names]


def exponents(rows):
    """Growth of processor seconds per particle with the number of elements, of U-Nets only.

    Fitted to the sizes of one operator, guidance and number of particles, for E-steps and for as
    many evaluations of the network; by the case's name.
    """
    cases = {}
    for row in rows:
        if row["size"] != "8x8":
            case = f"{row['operator']}, {row['guidance']}, {row['num_particles']} particles"
            cases.setdefault(case, []).append(row)
    found = {}
    for case, members in cases.items():
        if len(members) < 2:
            continue
        elements = [np.prod([int(n) for n in row["size"].split("x")]) for row in members]
        found[case] = {
            name: float(
                np.polyfit(
                    np.log(elements),
                    [np.log(row["seconds"][name][0] / BATCHES[row["size"]]) for row in members],
                    1,
                )[0]
            )
            for name in ("E-step", "forward and vjp")
        }
    return found


def main(args):
    rows = []
    print(f"{'':38s} {'processor':>15s} {'wall':>15s}     first")
    print("event    observed  guidance       n   forward    vjp  forward    vjp   call, s")
    cases = itertools.product(args.sizes, args.operators, args.guidance, args.particles)
    for size, operator, name, num in cases:
        row = measure(size, operator, num, GUIDANCE[name], args) | {"guidance": name}
        values = " ".join(f"{value:7.2f}" for value in ratios(row))
        print(
            f"{size:8s} {operator:9s} {name:13s} {num:2d}   {values} {row['first call']:9.1f}",
            flush=True,
        )
        rows.append(row)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    grown = exponents(rows)
    for case, found in grown.items():
        print(
            f"exponent in elements, {case}: " + ", ".join(f"{n} {e:.2f}" for n, e in found.items())
        )
    result = {"rows": rows, "exponents": grown, "settings": vars(args)}
    (output / "event_sizes.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS))
    parser.add_argument("--guidance", nargs="+", default=list(GUIDANCE))
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--num-repeats", type=int, default=3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
