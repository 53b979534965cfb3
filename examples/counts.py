"""Restore digits from a handful of photons, with a prior learned from the counts alone.

Every pixel of every digit is a Poisson count of at most some eight photons. Expectation
maximization learns a diffusion prior from these counts, with the likelihood as it is and, to
compare, with the Gaussian approximation that one would make by hand: counts with a variance of
their own size.

    python examples/counts.py --output out
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits


def rate(x, photons):
    """Expected counts: black is -1, white is 1, and light cannot be negative."""
    return photons * jax.nn.softplus(4 * (1 + x)) / 8


def poisson(prior, photons, counts=None):
    with numpyro.plate("images", len(counts)):
        counts = numpyro.subsample(counts, event_dim=2)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Poisson(rate(x, photons)).to_event(2), obs=counts)


def by_hand(prior, photons, counts=None):
    with numpyro.plate("images", len(counts)):
        counts = numpyro.subsample(counts, event_dim=2)
        x = numpyro.sample("x", prior)
        noise = jnp.sqrt(counts + 1.0)
        numpyro.sample("y", dist.Normal(rate(x, photons), noise).to_event(2), obs=counts)


MODELS = {"Poisson": poisson, "by hand": by_hand}


def learn(rng_key, model, counts, args):
    """The prior that a model learns from the counts."""
    key_net, key_em = jax.random.split(rng_key)
    num_steps = args.num_iterations * args.num_sgd_steps
    em = ndp.EM(
        model,
        digits.make_optimizer(digits.anneal(1e-3, num_steps)),
        e_step=ndp.EStep(
            num_particles=1,
            guidance=ndp.MMPS(ndp.guidance.CalibratedCovariance(), num_iterations=2),
            max_batch_size=256,
        ),
        m_step=ndp.MStep(num_steps=args.num_sgd_steps),
        start=ndp.GaussianStart(num_iterations=args.num_gaussian_iterations),
    )
    prior = digits.make_prior(key_net, args.width)
    return em.run(key_em, args.num_iterations, prior, args.photons, counts)


def restore(rng_key, model, prior, counts, truth, args):
    """Draws of some digits, their posterior means' error and the coverage of their intervals."""
    draws = ndp.sample_posterior(
        rng_key,
        model,
        prior,
        args.photons,
        counts,
        num_samples=args.num_samples,
        guidance=ndp.MMPS(ndp.guidance.CalibratedCovariance()),
    )
    x = draws.samples["x"]
    inside = ndp.metrics.coverage(x, truth, levels=(0.5, 0.9), where=truth.std(0) > 0.1)
    scores = {
        "rmse": float(jnp.sqrt(jnp.mean((x.mean(0) - truth) ** 2))),
        "cover50": float(inside[0]),
        "cover90": float(inside[1]),
    }
    return x, scores


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_data, key_counts, key_learn, key_judge, key_draw = jax.random.split(
        jax.random.key(args.seed), 5
    )
    data = digits.make_data(key_data, 0.0, args.num_images)
    counts = jax.random.poisson(key_counts, rate(data.clean, args.photons))
    features = digits.make_features()
    truth, seen = data.clean[: args.num_judged], counts[: args.num_judged]
    table, rows = {}, {"truth": truth, "counts": (seen, (0, args.photons), "gray")}
    for name, model in MODELS.items():
        result = learn(key_learn, model, counts, args)
        x, scores = restore(key_draw, model, result.prior, seen, truth, args)
        frechet = digits.judge_prior(key_judge, result.prior, data, features)
        table[name] = {"frechet": frechet, **scores}
        rows[f"mean, {name}"] = x.mean(0)
        if model is poisson:
            rows["one draw"] = x[0]
    digits.show_rows(rows, output / "counts.png")
    print(f"{'likelihood':10s} {'Frechet':>8s} {'RMSE':>8s} {'50 %':>8s} {'90 %':>8s}")
    for name, row in table.items():
        print(f"{name:10s} " + " ".join(f"{value:8.3f}" for value in row.values()))
    (output / "counts.json").write_text(json.dumps(table, indent=1))
    return table


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photons", type=float, default=8.0, help="of the brightest pixel")
    parser.add_argument("--num-images", type=int, default=digits.NUM_TRAIN)
    parser.add_argument("--num-iterations", type=int, default=8)
    parser.add_argument("--num-sgd-steps", type=int, default=256)
    parser.add_argument("--num-gaussian-iterations", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--num-judged", type=int, default=32, help="digits to restore")
    parser.add_argument("--num-samples", type=int, default=32, help="draws per digit")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
