"""Learn a distribution on a curve in five dimensions from two numbers per point.

Every point of a smooth random curve in R^5 (https://github.com/fzenke/randman) is seen through a
random projection to R^2 with noise 0.01: no observation tells where its point lies. Expectation
maximization finds the curve all the same. This is the first experiment of DiEM (Rozet et al.,
NeurIPS 2024, arXiv 2405.13712), at a size that two cores finish in about ten minutes; `--paper`
takes the paper's own settings, for which a GPU is needed.

    python examples/manifold.py --output out
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import corner
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior.metrics.transport import entropic_transport_cost, sliced_wasserstein

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

DIM = 5
NOISE = 1e-2
SAMPLERS = {
    "ddpm": ndp.samplers.DDPM,
    "multistep": ndp.samplers.MultistepSDE,
    "corrector": ndp.samplers.PredictorCorrector,
}
COVARIANCES = {
    "gaussian": ndp.guidance.GaussianCovariance,
    "tweedie": ndp.guidance.TweedieCovariance,
}
NOISES = {"normal": ndp.noise.LogNormal, "beta": ndp.noise.LogBeta}

# The settings of the paper's published script.
PAPER = {
    "num_points": 65_536,
    "num_iterations": 64,
    "num_sgd_steps": 65_536,
    "batch_size": 1024,
    "num_particles": 1,
    "num_steps": 4096,
    "sampler": "corrector",
    "noise": "beta",
    "final_learning_rate": 1e-6,
    "ema_decay": 0.0,
    "reset_optimizer": True,
}


class Data(NamedTuple):
    """Observations, the points behind them, and independent points of the same curve."""

    operator: jax.Array
    y: jax.Array
    x: jax.Array
    independent: jax.Array


def smooth_manifold(rng_key, num_points, *, dim=DIM, smoothness=3.0, cutoff=10):
    """Points of a smooth random curve, scaled to [-2, 2] in each coordinate."""
    key_curve, key_points = jax.random.split(rng_key)
    order = jnp.arange(1, cutoff + 1)
    amplitude, frequency, phase = jax.random.uniform(key_curve, (3, dim, cutoff))
    position = jax.random.uniform(key_points, (num_points, 1, 1))
    waves = jnp.sin(2 * jnp.pi * (order * frequency * position + phase))
    x = jnp.sum(amplitude / order**smoothness * waves, axis=-1)
    low, high = x.min(axis=0), x.max(axis=0)
    return 4 * (x - low) / (high - low) - 2


def make_data(key_curve, rng_key, num_points, num_independent):
    key_operator, key_noise = jax.random.split(rng_key)
    points = smooth_manifold(key_curve, num_points + num_independent)
    x, independent = points[:num_points], points[num_points:]
    operator = jax.random.normal(key_operator, (num_points, 2, DIM))
    operator = operator / jnp.linalg.norm(operator, axis=-1, keepdims=True)
    y = jnp.einsum("nij,nj->ni", operator, x)
    return Data(operator, y + NOISE * jax.random.normal(key_noise, y.shape), x, independent)


def model(prior, operator, y=None):
    with numpyro.plate("points", operator.shape[0]):
        operator = numpyro.subsample(operator, event_dim=2)
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        mean = jnp.einsum("...ij,...j->...i", operator, x)
        numpyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)


def make_judge(rng_key, truth, num_points=2048):
    """A function that scores points by divergence and sliced W2 to the truth.

    The divergence is the official code's: the entropic transport cost between points and truth,
    less that between two halves of the truth, which is found once.
    """
    count = min(num_points, len(truth) // 2)
    cost = partial(entropic_transport_cost, truth[:count], regularization=0.01)
    between_halves = float(cost(truth[-count:]))

    def judge(x):
        return {
            "divergence": float(cost(x[:count])) - between_halves,
            "sliced_w2": float(sliced_wasserstein(rng_key, x, truth)),
        }

    return judge


def make_em(args, model=model):
    schedule = optax.linear_schedule(
        args.learning_rate, args.final_learning_rate, args.num_sgd_steps
    )
    return ndp.EM(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        e_step=ndp.EStep(
            num_particles=args.num_particles,
            sampler=SAMPLERS[args.sampler](args.num_steps),
            guidance=ndp.MMPS(COVARIANCES[args.covariance]()),
            max_batch_size=args.batch_size * args.num_particles,
        ),
        m_step=ndp.MStep(
            num_steps=args.num_sgd_steps,
            batch_size=args.batch_size,
            noise=NOISES[args.noise](),
            ema_decay=args.ema_decay,
            reset_optimizer=args.reset_optimizer,
        ),
    )


def learn(rng_key, data, args):
    """Run EM, and judge the draws of every E-step; the learned draws and the scores."""
    key_net, key_em, key_judge = jax.random.split(rng_key, 3)
    net = ndp.MLP((DIM,), features=(args.width,) * 3, rngs=nnx.Rngs(key_net))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net))
    judge = make_judge(key_judge, data.x)
    rows = []

    def record(state, metrics):
        row = judge(state.draws["x"].reshape(-1, DIM))
        row |= {name: float(value) for name, value in metrics._asdict().items()}
        rows.append(row)
        print(
            f"{len(rows) - 1:3d}  loss {row['loss']:.3f}  ess {row['ess']:.2f}"
            f"  divergence {row['divergence']:.4f}  sliced W2 {row['sliced_w2']:.4f}"
            f"  E {row['e_step_seconds']:.1f} s  M {row['m_step_seconds']:.1f} s",
            flush=True,
        )

    result = make_em(args).run(
        key_em,
        args.num_iterations,
        prior,
        data.operator,
        data.y,
        progress_bar=False,
        callback=record,
    )
    independent = make_judge(key_judge, data.independent)(result.state.draws["x"].reshape(-1, DIM))
    rows[-1] |= {f"{name}_independent": value for name, value in independent.items()}
    print("against independent points:", independent, flush=True)
    return result, rows


def show_corner(samples, truth, path, num_points=4096):
    """Samples of the learned prior over points of the true curve, in all pairs of coordinates."""
    figure = None
    for x, color in ((truth, "0.6"), (samples, "C3")):
        figure = corner.corner(
            np.asarray(x[:num_points]),
            fig=figure,
            color=color,
            bins=40,
            range=[(-2.5, 2.5)] * DIM,
            plot_contours=False,
            plot_density=False,
            no_fill_contours=True,
            data_kwargs={"alpha": 0.3, "ms": 1},
            hist_kwargs={"density": True},
            labels=[f"$x_{i + 1}$" for i in range(DIM)],
        )
    handles = [plt.Line2D([], [], color=c, marker="o", ls="") for c in ("0.6", "C3")]
    figure.legend(handles, ["true curve", "learned prior"], loc="upper right", fontsize=14)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def show_curves(runs, path):
    """Both scores over the iterations, a line for each run."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for axis, name, label in zip(
        axes, ("divergence", "sliced_w2"), ("divergence", "sliced $W_2$"), strict=True
    ):
        for run, (rows, style) in runs.items():
            axis.plot([row[name] for row in rows], label=run, **style)
        axis.set(xlabel="iteration of EM", ylabel=f"{label} of the draws", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_yscale("symlog", linthresh=1e-2)  # it may be negative
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    # The first key of seed 0 is what draws the curve in the paper's published script.
    key_curve, *keys = jax.random.split(jax.random.key(args.seed), 4)
    key_data, key_learn, key_sample = keys
    data = make_data(key_curve, key_data, args.num_points, args.num_points)
    result, rows = learn(key_learn, data, args)
    samples = result.prior.sample(key_sample, (4096,))
    show_corner(samples, data.independent, output / "manifold_corner.png")
    runs = {f"{args.num_particles} particles": (rows, {"color": "C3"})}
    show_curves(runs, output / "manifold_curves.png")
    (output / "manifold.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", action="store_true", help="the paper's settings for the rest")
    parser.add_argument("--num-points", type=int, default=8192)
    parser.add_argument("--num-iterations", type=int, default=18)
    parser.add_argument("--num-sgd-steps", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--num-particles", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm")
    parser.add_argument("--covariance", choices=COVARIANCES, default="gaussian")
    parser.add_argument("--noise", choices=NOISES, default="normal", help="levels to train on")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--final-learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.99)
    parser.add_argument("--reset-optimizer", action="store_true")
    args = parser.parse_args(argv)
    if args.paper:
        parser.set_defaults(**PAPER)
        args = parser.parse_args(argv)
    return args


if __name__ == "__main__":
    main(parse_args())
