"""Separate two sources that are seen together, with priors learned from the observations alone.

Each source is a smooth random curve in R^5. One view shows three random projections of a point of
the first source, the other view three of a sum of both sources; nothing shows the second source on
its own. Expectation maximization learns a prior for each from both views at once. With them the
sources of new sums are drawn: jointly, or in turns by Gibbs sampling, at equal network
evaluations. This is the contrastive experiment of DDPRISM (Wagner-Carena et al., NeurIPS 2025,
arXiv 2510.05205) with two sources, at a small size.

    python examples/sources.py --output out/sources
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import MCMC, Gibbs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples.manifold import DIM, NOISE, smooth_manifold
from numpyro_diffprior.metrics.transport import sinkhorn_divergence

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NUM_SEEN = 3
RANGE = 4.0  # every coordinate goes from -2 to 2
SOURCES = ("first", "second")


class Data(NamedTuple):
    """Projections of both views and of held-out sums, with the points behind these.

    Attributes:
        operators: The projections of both views, with shape ``(pairs, 2, NUM_SEEN, DIM)``.
        views: What they show: the first source alone, and a sum of both.
        operator: The projections of the held-out sums.
        y: What they show.
        truth: The held-out sums' points by source.
    """

    operators: jax.Array
    views: jax.Array
    operator: jax.Array
    y: jax.Array
    truth: dict[str, jax.Array]


def project(operator, x):
    return jnp.einsum("...ij,...j->...i", operator, x)


def make_data(rng_key, num_pairs, num_heldout):
    """Both curves' points; the second is smoother, as in DDPRISM's script."""
    key_first, key_second, key_operator, key_noise = jax.random.split(rng_key, 4)
    num_sums = num_pairs + num_heldout
    first = smooth_manifold(key_first, num_pairs + num_sums)
    second = smooth_manifold(key_second, num_sums, smoothness=4.0, cutoff=6)
    alone, first = first[:num_pairs], first[num_pairs:]
    operators = jax.random.normal(key_operator, (num_pairs + num_sums, NUM_SEEN, DIM))
    operators = operators / jnp.linalg.norm(operators, axis=-1, keepdims=True)
    y = project(operators, jnp.concatenate([alone, first + second]))
    y = y + NOISE * jax.random.normal(key_noise, y.shape)
    paired = [x[: 2 * num_pairs].reshape(2, num_pairs, *x.shape[1:]) for x in (operators, y)]
    truth = {"first": first[num_pairs:], "second": second[num_pairs:]}
    return Data(
        *(jnp.swapaxes(x, 0, 1) for x in paired),
        operators[2 * num_pairs :],
        y[2 * num_pairs :],
        truth,
    )


def both_views(priors, operators, y=None):
    """Pairs of observations: a point of the first source, and a sum of others."""
    with numpyro.plate("pairs", len(operators)):
        operators = numpyro.subsample(operators, event_dim=3)
        y = None if y is None else numpyro.subsample(y, event_dim=2)
        alone = numpyro.sample("alone", priors["first"])
        first = numpyro.sample("first", priors["first"])
        second = numpyro.sample("second", priors["second"])
        mean = project(operators, jnp.stack([alone, first + second], axis=-2))
        numpyro.sample("y", dist.Normal(mean, NOISE).to_event(2), obs=y)


def mixture(priors, operator, y=None):
    """Sums of both sources."""
    with numpyro.plate("sums", len(operator)):
        operator = numpyro.subsample(operator, event_dim=2)
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        first = numpyro.sample("first", priors["first"])
        second = numpyro.sample("second", priors["second"])
        mean = project(operator, first + second)
        numpyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)


def learn(rng_key, data, args):
    """Run EM on both views; the result, and the metrics of its iterations."""
    key_em, *keys = jax.random.split(rng_key, 1 + len(SOURCES))
    priors = {}
    for source, key in zip(SOURCES, keys, strict=True):
        net = ndp.MLP((DIM,), features=(args.width,) * 3, rngs=nnx.Rngs(key))
        priors[source] = ndp.DiffusionPrior(ndp.NetworkDenoiser(net))
    em = ndp.EM(
        both_views,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.learning_rate)),
        e_step=ndp.EStep(
            num_particles=args.num_particles,
            sampler=ndp.samplers.DDPM(args.num_steps),
            max_batch_size=args.batch_size * args.num_particles,
        ),
        m_step=ndp.MStep(num_steps=args.num_sgd_steps, batch_size=args.batch_size, ema_decay=0.99),
    )
    rows = []

    def record(state, metrics):
        rows.append({name: float(value) for name, value in metrics._asdict().items()})
        row = rows[-1]
        print(
            f"{len(rows) - 1:3d}  loss {row['loss']:.3f}  ess {row['ess']:.2f}"
            f"  chi-square {row['reduced_chi_square']:.2f}"
            f"  E {row['e_step_seconds']:.1f} s  M {row['m_step_seconds']:.1f} s",
            flush=True,
        )

    result = em.run(
        key_em,
        args.num_iterations,
        priors,
        data.operators,
        data.views,
        progress_bar=False,
        callback=record,
    )
    return result.prior, rows


def draw_jointly(num_steps, num_particles):
    """Draws of both sources at once."""

    def draw(rng_key, priors, data):
        return ndp.sample_posterior(
            rng_key,
            mixture,
            priors,
            data.operator,
            data.y,
            num_particles=num_particles,
            sampler=ndp.samplers.MultistepSDE(num_steps),
            guidance=ndp.MMPS(),
        ).samples

    return draw


def draw_in_turns(num_steps, num_sweeps):
    """Gibbs sampling: each source given the other, sweep after sweep; the last one's draw."""

    def draw(rng_key, priors, data):
        masked = ndp.mask_priors(mixture)
        kernel = ndp.MMPSKernel(masked, sampler=ndp.samplers.MultistepSDE(num_steps))
        mcmc = MCMC(
            Gibbs([(kernel, [source]) for source in SOURCES]),
            num_warmup=num_sweeps - 1,
            num_samples=1,
            progress_bar=False,
        )
        mcmc.run(rng_key, priors, data.operator, data.y)
        return mcmc.get_samples()

    return draw


def psnr(x, truth):
    """Peak signal-to-noise ratio in dB, the mean over the events (as DDPRISM's code has it)."""
    error = jnp.sqrt(jnp.mean((x - truth) ** 2, axis=-1))
    return float(20 * jnp.mean(jnp.log10(RANGE / (error + 1e-6))))


def judge(samples, data):
    """Each source's error, and the observations' mean squared residual over the noise's."""
    residual = data.y - project(data.operator, samples["first"] + samples["second"])
    scores = {source: psnr(samples[source], data.truth[source]) for source in SOURCES}
    return scores | {"reduced_chi_square": float(jnp.mean((residual / NOISE) ** 2))}


def show(clouds, truth, path, num_points=1024):
    """Two coordinates of every cloud over the truth: a row for each source."""
    figure, axes = plt.subplots(
        len(SOURCES),
        len(clouds),
        figsize=(2.6 * len(clouds), 2.6 * len(SOURCES)),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis_row, source in zip(axes, SOURCES, strict=True):
        for axis, (name, cloud) in zip(axis_row, clouds.items(), strict=True):
            for x, color in ((truth[source], "0.7"), (cloud[source].reshape(-1, DIM), "C3")):
                axis.plot(*np.asarray(x[:num_points, :2]).T, ".", color=color, ms=2)
            axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
            if source == SOURCES[0]:
                axis.set_title(name, fontsize=10)
        axis_row[0].set_ylabel(f"{source} source")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_data, key_learn, key_prior, key_draw = jax.random.split(jax.random.key(args.seed), 4)
    data = make_data(key_data, args.num_observations // 2, args.num_heldout)
    priors, rows = learn(key_learn, data, args)
    names = zip(SOURCES, jax.random.split(key_prior, len(SOURCES)), strict=True)
    clouds = {"learned priors": {s: priors[s].sample(k, (args.num_heldout,)) for s, k in names}}
    divergence = {
        source: float(sinkhorn_divergence(x, data.truth[source]))
        for source, x in clouds["learned priors"].items()
    }
    data = data._replace(
        operator=data.operator[: args.num_judged],
        y=data.y[: args.num_judged],
        truth={source: x[: args.num_judged] for source, x in data.truth.items()},
    )
    steps, sweeps = args.num_steps, args.num_sweeps
    methods = {
        "joint, all steps": draw_jointly(steps * sweeps, 1),
        "joint, particles": draw_jointly(steps, sweeps),
        "Gibbs": draw_in_turns(steps, sweeps),
    }
    table = {}
    for name, draw in methods.items():
        clouds[name] = draw(key_draw, priors, data)
        table[name] = judge(clouds[name], data)
    show(clouds, data.truth, output / "sources.png")
    print(f"Sinkhorn divergences of the priors: {divergence}")
    print(f"\nPSNR in dB; {steps * sweeps} evaluations of each network per draw")
    print(f"{'':18s} {'first':>8s} {'second':>8s} {'chi-square':>12s}")
    for name, row in table.items():
        misfit = row["reduced_chi_square"]
        print(f"{name:18s} {row['first']:8.2f} {row['second']:8.2f} {misfit:12.2f}")
    result = {"iterations": rows, "divergence": divergence, "table": table}
    (output / "sources.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out/sources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-observations", type=int, default=4096, help="of both views")
    parser.add_argument("--num-iterations", type=int, default=16)
    parser.add_argument("--num-sgd-steps", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-particles", type=int, default=4, help="per draw of the E-step")
    parser.add_argument("--num-steps", type=int, default=32, help="of the sampler")
    parser.add_argument("--num-sweeps", type=int, default=16, help="of Gibbs; joint particles")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--num-heldout", type=int, default=1024, help="sums for the priors")
    parser.add_argument("--num-judged", type=int, default=256, help="sums to separate")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
