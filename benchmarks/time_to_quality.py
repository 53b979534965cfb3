"""Time to quality: the defaults against the algorithm of the paper, from the same Gaussian start.

The algorithm of DiEM (Rozet et al., NeurIPS 2024, arXiv 2405.13712) is run with the parts of this
package at the published settings, of which the numbers of events, iterations, sampling steps and
training steps are scaled down; the defaults are run with whole E-steps, and with partial ones. All
runs are judged after every iteration, against the time of their E- and M-steps so far, compilation
included; the time of judging is not counted.

    python benchmarks/time_to_quality.py manifold --output out   # draws against the true curve
    python benchmarks/time_to_quality.py images --output out     # samples against test images
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import images, manifold
from numpyro_diffprior.metrics.frechet import frechet_distance

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# What is scaled down. `steps` are those of the sampler, `sgd` those of training per iteration,
# `part` the events of a partial E-step.
SIZES = {
    "manifold": {
        "num_events": 8192,  # 65,536 in the paper
        "paper": {"iterations": 16, "steps": 256, "sgd": 4096, "batch": 512},  # 64, 4096, 65,536
        "default": {"iterations": 18, "steps": 32, "sgd": 512, "batch": 512},
        "partial": {"iterations": 36, "steps": 32, "sgd": 512, "batch": 512, "part": 2048},
    },
    "images": {
        "num_events": 512,  # 50,000 in the paper
        "paper": {"iterations": 4, "steps": 256, "sgd": 2048, "batch": 32},  # 32, 256, 50,000
        "default": {"iterations": 6, "steps": 32, "sgd": 512, "batch": 32},
        "partial": {"iterations": 16, "steps": 32, "sgd": 512, "batch": 32, "part": 128},
    },
}
RUNS = ("partial", "default", "paper")
LABELS = {
    "default": "defaults",
    "partial": "defaults, partial E-steps",
    "paper": "settings of the paper, scaled",
}


class Manifold:
    """A curve in five dimensions, judged by the divergence of the E-step's draws."""

    quality, time_scale = "divergence", "log"
    scale = {"value": "symlog", "linthresh": 1e-2}  # it may be negative

    def __init__(self, rng_key, args):
        key_curve, key_data, key_net, key_judge = jax.random.split(rng_key, 4)
        self.data = manifold.make_data(key_curve, key_data, args.num_events, args.num_events)
        self.arguments = self.data.operator, self.data.y
        self.net_key = key_net
        self.score = manifold.make_judge(key_judge, self.data.x)

    def make_prior(self, args):
        net = ndp.MLP((manifold.DIM,), features=(args.width,) * 3, rngs=nnx.Rngs(self.net_key))
        return ndp.DiffusionPrior(ndp.NetworkDenoiser(net))

    def make_em(self, name, size, args):
        options = manifold.parse_args(["--paper"] if name == "paper" else [])
        options.num_iterations, options.num_steps = size["iterations"], size["steps"]
        options.num_sgd_steps, options.batch_size = size["sgd"], size["batch"]
        if name == "paper":
            options.covariance = "tweedie"
        return manifold.make_em(options)

    def judge(self, rng_key, state):
        draws = state.draws["x"].reshape(-1, manifold.DIM)
        return self.score(draws[jnp.isfinite(draws).all(-1)])["divergence"]  # those so far


class Images:
    """Fashion-MNIST with hidden pixels, judged by the Frechet distance of samples of the prior."""

    quality, scale, time_scale = "Frechet distance", {"value": "linear"}, "linear"

    def __init__(self, rng_key, args):
        self.keys = jax.random.split(rng_key, 3)
        given = "--summary low-rank --num-gaussian-iterations 32 --num-images".split()
        self.options = images.parse_args([*given, str(args.num_events)])
        self.options.hidden, self.options.data = args.hidden, args.data
        self.options.num_features_steps = args.num_features_steps
        (train, labels), (test, _) = (images.read_images(args.data, p) for p in ("train", "test"))
        self.data = images.make_data(self.keys[0], train, test, self.options)
        classifier = images.train_classifier(
            self.keys[1], train[:20_000], labels[:20_000], self.options
        )
        self.features = partial(nnx.jit(images.Classifier.features), classifier)
        self.truth = self.features(self.data.test)
        self.arguments = self.data.mask, self.options.noise, self.data.y
        self.options.num_generated = args.num_generated

    def make_prior(self, args):
        self.options.channels = args.channels
        return images.make_prior(self.keys[2], self.data.clean.shape[1:], self.options)

    def make_em(self, name, size, args):
        options = argparse.Namespace(**vars(self.options))
        options.num_iterations, options.num_sgd_steps = size["iterations"], size["sgd"]
        options.batch_size = size["batch"]
        em = images.make_em("default", images.make_optimizer(images.anneal(options)), options)
        if name != "paper":
            return em
        # One step of conjugate gradients, DDPM, and an optimizer that starts anew.
        e_step = ndp.EStep(
            num_particles=1,
            sampler=ndp.samplers.DDPM(size["steps"]),
            guidance=ndp.MMPS(max_steps=1),
            max_batch_size=options.max_batch_size,
        )
        m_step = ndp.MStep(
            num_steps=size["sgd"],
            batch_size=size["batch"],
            noise=ndp.noise.LogBeta(),
            ema_decay=options.ema_decay,
            reset_optimizer=True,
        )
        optimizer = images.make_optimizer(optax.constant_schedule(args.paper_learning_rate))
        return ndp.EM(images.model, optimizer, e_step=e_step, m_step=m_step, start=em.start)

    def judge(self, rng_key, state):
        samples = images.generate(rng_key, state.prior, self.options)
        return float(frechet_distance(self.features(samples), self.truth))


TASKS = {"manifold": Manifold, "images": Images}


def follow(rng_key, name, task, args):
    """Run EM; return its quality and the seconds so far after every iteration."""
    key_em, key_judge = jax.random.split(rng_key)
    size = getattr(args, name)
    em, prior = task.make_em(name, size, args), task.make_prior(args)
    em.e_step = replace(em.e_step, num_events=size.get("part"))
    rows = [{"iteration": 0, "wall": 0.0, "processor": 0.0}]
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    started = {}

    def record(state, metrics):
        spent = {clock: read() - started[clock] for clock, read in clocks.items()}
        row = {"iteration": state.num_iterations, "quality": task.judge(key_judge, state)}
        row |= {clock: rows[-1][clock] + seconds for clock, seconds in spent.items()}
        row |= {"loss": float(metrics.loss), "e_step": float(metrics.e_step_seconds)}
        rows.append(row)
        print(
            f"{name:8s} {row['iteration']:3d}  {task.quality} {row['quality']:9.4f}"
            f"  {row['wall']:7.0f} s  {row['processor']:7.0f} processor s"
            f"  (E-step {row['e_step']:.0f} s)  loss {row['loss']:.3f}",
            flush=True,
        )
        started.update({clock: read() for clock, read in clocks.items()})

    state = em.init(key_em, prior, *task.arguments)
    started.update({clock: read() for clock, read in clocks.items()})
    em.run(
        key_em,
        size["iterations"],
        prior,
        *task.arguments,
        init_state=state,
        callback=record,
        progress_bar=False,
    )
    return rows[1:]


def compare(rows, paper):
    """When a run is as good as the end, and as the best, of the paper's settings."""
    comparison = {}
    for which, row in {"end": paper[-1], "best": min(paper, key=lambda r: r["quality"])}.items():
        reached = next((r for r in rows if r["quality"] <= row["quality"]), None)
        comparison[which] = {
            "quality": row["quality"],
            "paper": row["processor"],
            "seconds": reached and reached["processor"],
            "ratio": reached and reached["processor"] / row["processor"],
        }
    return comparison


def show_curves(runs, task, path):
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, rows in runs.items():
        seconds, values = ([row[key] for row in rows] for key in ("processor", "quality"))
        axis.plot(seconds, values, marker=".", label=LABELS[name])
    axis.set(xlabel="processor time [s]", ylabel=task.quality, xscale=task.time_scale)
    axis.set_yscale(**task.scale)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_task, key_run = jax.random.split(jax.random.key(args.seed))
    task = TASKS[args.task](key_task, args)
    runs = {}
    result = {"args": vars(args), "runs": runs}
    for name in args.runs:
        runs[name] = follow(key_run, name, task, args)
        (output / f"time_to_quality_{args.task}.json").write_text(json.dumps(result, indent=1))
        show_curves(runs, task, output / f"time_to_quality_{args.task}.png")
    for name in set(runs) - {"paper"} if "paper" in runs else ():
        result.setdefault("comparison", {})[name] = compare(runs[name], runs["paper"])
        for which, row in result["comparison"][name].items():
            reached = "not reached" if row["ratio"] is None else f"reached in {row['ratio']:.3f}"
            quality = f"{which} of the paper's settings ({row['quality']:.4f})"
            print(f"{LABELS[name]}: {quality} {reached} of its time")
    (output / f"time_to_quality_{args.task}.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--num-events", type=int)
    parser.add_argument("--width", type=int, default=256, help="of the network of the manifold")
    parser.add_argument("--hidden", type=float, default=0.75, help="part of the hidden pixels")
    parser.add_argument("--data", default=images.DATA)
    parser.add_argument("--channels", type=int, nargs="+", default=(8, 16, 32))
    parser.add_argument("--num-features-steps", type=int, default=1000)
    parser.add_argument("--num-generated", type=int, default=512)
    parser.add_argument("--paper-learning-rate", type=float, default=1e-3, help="for images")
    for name in RUNS:
        parser.add_argument(
            f"--{name}", type=json.loads, default={}, help="sizes that differ, in JSON"
        )
    args = parser.parse_args(argv)
    sizes = SIZES[args.task]
    args.num_events = args.num_events or sizes["num_events"]
    for name in RUNS:
        setattr(args, name, sizes[name] | getattr(args, name))
    return args


if __name__ == "__main__":
    main(parse_args())
