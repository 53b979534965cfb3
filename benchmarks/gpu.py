"""What an accelerator makes of the package, in a few minutes: one table, in two precisions.

For each event size, a U-Net of the default widths is trained in float32 on smooth random fields.
Then E-steps with masks and with a masked Fourier transform are timed beside as many evaluations of
the bare network (`benchmarks/event_sizes.py`), with the weights in float32 and in bfloat16. The
batch is the package's default for the event's size. What bfloat16 loses is measured on the
denoiser's outputs, as the root-mean-square difference to those of float32 over their deviation,
and on the draws, by the reduced chi-square of the observed values.

Peak memory is that of the device so far (of the process on CPUs). Cases that would start after the
time limit are skipped. ``--tiny`` runs the same on small events, the default without accelerator.

    python benchmarks/gpu.py --output out
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks import event_sizes

DTYPES = ("float32", "bfloat16")
OPERATORS = ("mask", "fourier")
LEVELS = (0.1, 0.3, 1.0, 3.0)


def train(rng_key, prior, fields, args):
    """Train the prior's network; return it, steps per second and the seconds of compilation."""
    optimizer = optax.adam(1e-3)
    state = ndp.training.init_training(prior.denoiser, optimizer)
    seconds = []
    for key in jax.random.split(rng_key, 2):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(
            ndp.training.train(
                key,
                state,
                fields,
                optimizer,
                num_steps=args.num_train_steps,
                batch_size=args.train_batch_size,
            )
        )
        seconds.append(time.perf_counter() - start)
    first, second = seconds
    return prior.replace_denoiser(state.averaged), args.num_train_steps / second, first - second


def with_dtype(prior, dtype, options):
    """Return the prior with the same weights in another dtype."""
    net = prior.denoiser.net
    other = ndp.UNet(
        prior.event_shape, spatial_dims=2, rngs=nnx.Rngs(0), param_dtype=dtype, **options
    )
    nnx.update(other, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(net, nnx.Param)))
    return prior.replace_denoiser(replace(prior.denoiser, net=other))


def difference(prior, reference, fields):
    """The relative root-mean-square difference of denoised fields, by noise level."""
    denoise = jax.jit(lambda prior, x_t, sigma: prior.denoise(x_t, sigma))
    result = []
    for sigma in LEVELS:
        x_t = fields + sigma * jax.random.normal(jax.random.key(0), fields.shape)
        x_hat, expected = denoise(prior, x_t, sigma), denoise(reference, x_t, sigma)
        result.append(float(jnp.sqrt(jnp.mean((x_hat - expected) ** 2)) / jnp.std(expected)))
    return result


def peak_bytes():
    """The most memory that was in use so far: of the device, or of the process on CPUs."""
    stats = jax.devices()[0].memory_stats()
    if stats is None:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats["peak_bytes_in_use"]


def measure(prior, fields, dtype, operator, args):
    num_particles = 4
    limit = ndp.EStep(num_particles=num_particles).limit
    num_events = limit.num_groups(fields[0].size, num_particles)
    num_events = min(num_events, args.max_events, len(fields))
    timed = event_sizes.time_e_step(prior, fields, operator, num_particles, None, num_events, args)
    wall = {name: seconds[1] for name, seconds in timed["seconds"].items()}
    return {
        "dtype": dtype,
        "operator": operator,
        "at once": num_events * num_particles,
        "ratio to forward": wall["E-step"] / wall["forward"],
        "ratio to forward and vjp": wall["E-step"] / wall["forward and vjp"],
        "draws per second": num_events / wall["E-step"],
        "first call": timed["first call, wall"] - wall["E-step"],
        "reduced chi square": timed["reduced chi square"],
        "peak bytes": peak_bytes(),
    }


HEADER = (
    "event      dtype     observed  at once   forward  and vjp    draws/s  compile, s"
    "   chi^2  peak, GiB"
)


def line(row):
    return (
        f"{row['size']:10s} {row['dtype']:9s} {row['operator']:8s} {row['at once']:8d}"
        f" {row['ratio to forward']:9.2f} {row['ratio to forward and vjp']:8.2f}"
        f" {row['draws per second']:10.1f} {row['first call']:11.1f}"
        f" {row['reduced chi square']:7.2f} {row['peak bytes'] / 2**30:10.2f}"
    )


def main(args):
    started = time.perf_counter()
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), JAX {jax.__version__}\n{HEADER}")
    rows, networks, skipped = [], [], []
    for size in args.sizes:
        if time.perf_counter() - started > args.seconds:
            skipped.append(size)
            continue
        shape = tuple(int(n) for n in size.split("x"))
        options = {"channels": args.channels}
        fields = event_sizes.smooth_fields(np.random.default_rng(args.seed), 1024, shape)
        prior = event_sizes.make_prior(shape, fields, args.num_steps, **options)
        trained, rate, compiling = train(jax.random.key(args.seed), prior, fields, args)
        priors = {dtype: with_dtype(trained, dtype, options) for dtype in DTYPES}
        networks.append(
            {
                "size": size,
                "training steps per second": rate,
                "compilation of training": compiling,
                "difference of bfloat16": difference(
                    priors["bfloat16"], priors["float32"], fields[: args.max_events]
                ),
            }
        )
        for operator in OPERATORS:
            for dtype in DTYPES:
                if time.perf_counter() - started > args.seconds:
                    skipped.append(f"{size} {dtype} {operator}")
                    continue
                row = {"size": size} | measure(priors[dtype], fields, dtype, operator, args)
                rows.append(row)
                print(line(row), flush=True)
    levels = ", ".join(map(str, LEVELS))
    print(f"\nevent      training steps/s  compile, s   bfloat16's difference at sigma {levels}")
    for row in networks:
        lost = "  ".join(f"{value:.2e}" for value in row["difference of bfloat16"])
        rate, compiling = row["training steps per second"], row["compilation of training"]
        print(f"{row['size']:10s} {rate:16.1f} {compiling:11.1f}   {lost}")
    if skipped:
        print(f"skipped for want of time: {', '.join(skipped)}")
    result = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "rows": rows,
        "networks": networks,
        "skipped": skipped,
        "settings": vars(args),
    }
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=420, help="no case starts later")
    parser.add_argument("--sizes", nargs="+", default=["28x28", "32x32x3", "64x64x2"])
    parser.add_argument("--channels", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--num-repeats", type=int, default=3)
    parser.add_argument("--num-train-steps", type=int, default=500)
    parser.add_argument("--train-batch-size", type=int, default=256)
    parser.add_argument("--max-events", type=int, default=256)
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, help="small events")
    args = parser.parse_args(argv)
    if args.tiny or (args.tiny is None and jax.default_backend() == "cpu"):
        args.sizes, args.channels, args.num_steps, args.num_repeats = ["8x10"], [8, 8], 4, 1
        args.num_train_steps, args.train_batch_size, args.max_events = 4, 16, 4
    return args


if __name__ == "__main__":
    main(parse_args())
