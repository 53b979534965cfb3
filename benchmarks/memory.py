"""The memory that XLA plans for programs of the package, for events of users' sizes.

Programs are compiled, not run: planned is the peak of all intermediate arrays on one device. Each
program has a fixed number of events (or particles) at once, and the default number, which follows
from the event's size. Exponents of the planned memory are fitted over several batches of the first
event size, and over event sizes at the fixed batch: their elements, or their pixels, whatever the
number of channels.

Events, model and U-Net are those of `benchmarks/event_sizes.py`, with masks.

    python benchmarks/memory.py --sizes 28x28 64x64x2 --output out
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks import event_sizes
from numpyro_diffprior.em.e_step import draw_events
from numpyro_diffprior.em.initial import fit_in_closed_form
from numpyro_diffprior.infer.blocks import block_size
from numpyro_diffprior.reading.reader import read

SIZES = ("28x28", "64x64x2", "128x128x2")
NUM_EVENTS = 256
KEY = jax.random.key(0)
OPTIMIZER = optax.adam(1e-3)
MODEL = event_sizes.make_model("mask")


def e_step(num):
    options = ndp.EStep(num_particles=4, max_batch_size=num)

    def program(prior, mask, y):
        size = block_size(options.num_particles, 1, options.limit)
        bound = read(MODEL, (prior, mask, y), {}, block_size=size)
        return draw_events(KEY, bound, options, None).samples

    return program


def evidence(num):
    return lambda prior, mask, y: ndp.log_evidence(KEY, MODEL, prior, mask, y, max_batch_size=num)


def gaussian_start(num):
    size = block_size(4, 1, ndp.EStep(max_batch_size=num).limit)

    def program(prior, mask, y):
        bound = read(MODEL, (prior, mask, y), {}, block_size=size)
        return fit_in_closed_form(bound, ndp.GaussianStart())

    return program


def limited(prior, num):
    return ndp.DiffusionPrior(prior.denoiser, sampler=prior.sampler, max_batch_size=num)


def samples(num):
    return lambda prior, mask, y: limited(prior, num).sample(KEY, (1024,))


def log_prob(num):
    return lambda prior, mask, y: limited(prior, num).log_prob(y)


def training(num):
    """Of minibatches of 256 events; a number means as many, all of them at once."""

    def program(prior, mask, y):
        state = ndp.training.init_training(prior.denoiser, OPTIMIZER)
        size = num or NUM_EVENTS
        return ndp.training.train(KEY, state, y, OPTIMIZER, num_steps=2, batch_size=size)

    return program


# Programs, and a fixed number at once: the default of small events, or less for training.
PROGRAMS = {
    "E-step, 4 particles": (e_step, 1024),
    "evidence, 16 particles": (evidence, 1024),
    "Gaussian start": (gaussian_start, 1024),
    "samples": (samples, 1024),
    "log-density": (log_prob, NUM_EVENTS),
    "training": (training, 8),
}


def planned(program, prior, shape):
    """The bytes that a program plans for intermediate arrays, and its seconds of compilation."""
    mask = jax.ShapeDtypeStruct((NUM_EVENTS, *shape), bool)
    y = jax.ShapeDtypeStruct((NUM_EVENTS, *shape), jnp.float32)
    start = time.process_time()
    compiled = jax.jit(program).lower(prior, mask, y).compile()
    seconds = time.process_time() - start
    return compiled.memory_analysis().temp_size_in_bytes, seconds


def exponent(x, y):
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else math.nan


def main(args):
    rows = []
    priors = {}
    for size in args.sizes:
        shape = tuple(int(n) for n in size.split("x"))
        fields = event_sizes.smooth_fields(np.random.default_rng(0), 64, shape)
        priors[size] = shape, event_sizes.make_prior(shape, fields, args.num_steps)

    def measure(name, size, num):
        shape, prior = priors[size]
        num_bytes, seconds = planned(PROGRAMS[name][0](num), prior, shape)
        row = {"program": name, "size": size, "at once": num, "bytes": num_bytes}
        print(f"{name:28s} {size:10s} {num or 'default':>8} {num_bytes / 2**30:10.2f}", flush=True)
        rows.append(row | {"elements": math.prod(shape), "seconds": seconds})
        return num_bytes

    print("program                      event       at once   GiB planned")
    exponents = {}
    for name in args.programs:
        fixed = PROGRAMS[name][1]
        sizes = [measure(name, size, fixed) for size in args.sizes]
        for size in args.sizes:
            measure(name, size, None)
        batches = [measure(name, args.sizes[0], num) for num in args.batches]
        shapes = [priors[size][0] for size in args.sizes]
        exponents[name] = {
            "batch": exponent([fixed, *args.batches], [sizes[0], *batches]),
            "elements": exponent([math.prod(shape) for shape in shapes], sizes),
            "pixels": exponent([math.prod(shape[:2]) for shape in shapes], sizes),
        }
    print("\nexponent in                     batch  elements    pixels")
    for name, row in exponents.items():
        print(f"{name:28s} {row['batch']:8.2f} {row['elements']:9.2f} {row['pixels']:9.2f}")
    result = {"rows": rows, "exponents": exponents, "settings": vars(args)}
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "memory.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS))
    parser.add_argument("--batches", nargs="+", type=int, default=[64])
    parser.add_argument("--num-steps", type=int, default=32)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
