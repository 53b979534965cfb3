"""Learn a distribution on a curve in five dimensions from two numbers per point.

Every point of a smooth random curve in R^5 (https://github.com/fzenke/randman) is seen through a
random projection to R^2 with noise 0.01: no observation tells where its point lies. Expectation
maximisation finds the curve all the same. This is the first experiment of DiEM (Rozet et al.,
NeurIPS 2024, arXiv 2405.13712), at a size that two cores finish in about ten minutes; `--paper`
runs the paper's own configuration.

    python examples/manifold.py --output out
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx

import numpyro_diffprior as ndp
from numpyro_diffprior.metrics import excess_transport_cost, sliced_wasserstein

matplotlib.use("Agg")

DIM = 5
NOISE = 1e-2


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


def make_data(rng_key, num_points, num_independent):
    key_curve, key_operator, key_noise = jax.random.split(rng_key, 3)
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


def judge(rng_key, x, data, num_points=2048):
    """Divergence and sliced W2 to the observed points and to independent ones.

    The divergence is the official code's: the entropic transport cost between draws and truth,
    less that between two halves of the truth.
    """
    scores = {}
    for name, truth in (("", data.x), ("_independent", data.independent)):
        count = min(num_points, len(x), len(truth) // 2)
        scores[f"divergence{name}"] = float(
            excess_transport_cost(x[:count], truth[:count], truth[-count:], regularization=0.01)
        )
        scores[f"sliced_w2{name}"] = float(sliced_wasserstein(rng_key, x, truth))
    return scores


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_data, key_net, key_em, key_judge = jax.random.split(jax.random.key(args.seed), 4)
    data = make_data(key_data, args.num_points, args.num_points)
    net = ndp.MLP((DIM,), features=(args.width,) * 3, rngs=nnx.Rngs(key_net))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net))
    em = ndp.EM(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.learning_rate)),
        num_sgd_steps=args.num_sgd_steps,
        batch_size=args.batch_size,
        num_particles=args.num_particles,
        sampler=ndp.DDPM(args.num_steps),
    )
    scores = []

    def record(state, metrics):
        x = state.draws.reshape(-1, DIM)
        scores.append(
            judge(key_judge, x, data) | {k: float(v) for k, v in metrics._asdict().items()}
        )
        row = scores[-1]
        print(
            f"{len(scores) - 1:3d}  loss {row['loss']:.3f}  ess {row['ess']:.2f}"
            f"  divergence {row['divergence']:.4f}  sliced W2 {row['sliced_w2']:.4f}"
            f"  (independent {row['divergence_independent']:.4f}"
            f" {row['sliced_w2_independent']:.4f})"
            f"  E {row['e_step_seconds']:.1f} s  M {row['m_step_seconds']:.1f} s",
            flush=True,
        )

    em.run(
        key_em,
        args.num_iterations,
        prior,
        data.operator,
        data.y,
        progress_bar=False,
        callback=record,
    )
    (output / "manifold.json").write_text(json.dumps(scores, indent=1))
    return scores


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-points", type=int, default=8192)
    parser.add_argument("--num-iterations", type=int, default=18)
    parser.add_argument("--num-sgd-steps", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--num-particles", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
