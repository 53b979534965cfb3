"""What checkpoints, data in files and the progress bar cost, in time of an iteration of EM.

Fashion-MNIST with hidden pixels, as in examples/images.py. Runs with arrays in memory, no
checkpoints and no bar alternate with runs from memory-mapped files, with a checkpoint after every
iteration, the draws of long E-steps included, and a bar in a terminal. An iteration is timed from
the end of the one before; what a run with checkpoints does once, at its start, is not counted.

The difference of two such runs is mostly noise. So the same is measured with iterations that
compute next to nothing (a sampler of two steps, eight steps of training): what these additions
cost there, in seconds, is set against an iteration of the whole.

    python benchmarks/overhead.py --output out
"""

import argparse
import io
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples import images

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def measure(run):
    """Return the seconds of an iteration, given a function that takes a callback of EM."""
    ends = []
    run(lambda state, metrics: ends.append({name: clock() for name, clock in CLOCKS.items()}))
    return {name: (ends[-1][name] - ends[0][name]) / (len(ends) - 1) for name in CLOCKS}


def compare(args):
    """Return the seconds of iterations, of runs without and with all additions."""
    key_data, key_net, key_em = jax.random.split(jax.random.key(args.seed), 3)
    train, _ = images.read_images(args.data, "train")
    mask, y = images.hide(
        key_data, images.scale(train[: args.num_images]), args.hidden, args.noise
    )
    optimizer = images.make_optimizer(args.learning_rate)
    em = images.make_em("default", optimizer, args)
    prior = images.make_prior(key_net, mask.shape[1:], args)
    state = em.init(key_em, prior, mask, args.noise, y)
    times = {"plain": [], "all": []}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, array in (("mask", mask), ("y", y)):
            np.save(f"{folder}/{name}.npy", array)
            files[name] = np.load(f"{folder}/{name}.npy", mmap_mode="r")

        def run(name, number, callback):
            everything = name == "all"
            arrays = (files["mask"], files["y"]) if everything else (mask, y)
            em.run(
                key_em,
                args.num_iterations,
                prior,
                arrays[0],
                args.noise,
                arrays[1],
                init_state=state,
                checkpoint=f"{folder}/run{number}" if everything else None,
                progress_bar=everything,
                callback=callback,
            )

        terminal, sys.stderr = sys.stderr, Terminal()
        try:
            for number in range(-1, args.num_repeats):
                # In turn, so that a machine that gets slower or faster favors none.
                for name in list(times)[:: 1 if number % 2 else -1]:
                    seconds = measure(partial(run, name, number))
                    if number >= 0:  # the first ones compile
                        times[name].append(seconds)
                        print(
                            f"{name:6s} {seconds['wall']:8.2f} s"
                            f" {seconds['processor']:8.2f} processor s",
                            flush=True,
                        )
            shown = bool(sys.stderr.getvalue())
        finally:
            sys.stderr = terminal
    return times, shown


def differences(times):
    """Return the median over repeats of what the additions cost, in seconds."""
    return {
        clock: float(
            np.median([a[clock] - p[clock] for p, a in zip(*times.values(), strict=True)])
        )
        for clock in CLOCKS
    }


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    nothing = argparse.Namespace(
        **vars(args) | {"num_steps": 2, "num_sgd_steps": 8, "num_repeats": 5 * args.num_repeats}
    )
    times, shown = compare(args)
    extra = differences(compare(nothing)[0])
    whole = differences(times)
    result = {"args": vars(args), "times": times, "bar": shown, "extra": extra, "overhead": {}}
    for clock in CLOCKS:
        plain = float(np.median([seconds[clock] for seconds in times["plain"]]))
        result["overhead"][clock] = extra[clock] / plain
        print(
            f"{clock}: {plain:.2f} s per iteration, with all {whole[clock]:+.2f} s; with next to"
            f" nothing computed {extra[clock]:+.2f} s, {result['overhead'][clock]:.1%}",
            flush=True,
        )
    (output / "overhead.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other options: those of examples/images.py."
    )
    parser.add_argument("--num-repeats", type=int, default=5)
    args, rest = parser.parse_known_args(argv)
    settings = {"num_images": "256", "num_iterations": "4", "summary": "low-rank"}
    defaults = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return argparse.Namespace(**vars(images.parse_args(defaults + rest)) | vars(args))


if __name__ == "__main__":
    main(parse_args())
