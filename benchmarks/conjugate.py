"""Two ways to guide by counts: Gauss-Newton iterations, or conjugate priors.

Where the natural parameter of a Poisson or Bernoulli distribution is the unknown, its conjugate
prior can stand for what is known of the unknown at a noise level (the evidence trick of Micheli et
al., arXiv 2502.05994): the gradient of the evidence then guides, in closed form. It is compared
with `MMPS`, as in `benchmarks/families.py`, for few and for many values of one unknown, of which
the conjugate prior either sees all together, or each as if it were alone, as it must where values
know different things.

    python benchmarks/conjugate.py --output out
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, polygamma

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks import families
from numpyro_diffprior.guidance.covariances import pull_back
from numpyro_diffprior.guidance.guidance import Guidance, Guided, GuidedDenoiser, SolveStats

NUM_NEWTON = 12


def gamma_prior(mean, variance):
    """The gamma distribution whose logarithm has a mean and variance."""

    def step(shape, _):
        slope = polygamma(1, shape)
        shape = shape + slope * (1 - slope / variance) / polygamma(2, shape)
        return shape, None

    shape, _ = jax.lax.scan(step, 0.5 + 1 / variance, length=NUM_NEWTON)
    return shape, jnp.exp(digamma(shape) - mean)


def poisson_score(mean, variance, total, count):
    """The derivative of the log-evidence of a total of counts by the mean of the log-rate."""
    shape, rate = gamma_prior(mean, variance)
    return (total * rate - count * shape) / (rate + count)


def beta_prior(mean, variance):
    """The beta distribution whose logit has these moments, and its derivative by the mean."""

    def derivative(a, b):
        return jnp.stack(
            [
                jnp.stack([polygamma(1, a), -polygamma(1, b)], axis=-1),
                jnp.stack([polygamma(2, a), polygamma(2, b)], axis=-1),
            ],
            axis=-2,
        )

    def step(logs, _):
        a, b = jnp.exp(logs[..., 0]), jnp.exp(logs[..., 1])
        error = jnp.stack(
            [digamma(a) - digamma(b) - mean, polygamma(1, a) + polygamma(1, b) - variance], axis=-1
        )
        matrix = derivative(a, b) * jnp.stack([a, b], axis=-1)[..., None, :]
        move = jnp.linalg.solve(matrix, error[..., None])[..., 0]
        return logs - jnp.clip(move, -1, 1), None

    start = jnp.stack([jnp.logaddexp(0, mean), jnp.logaddexp(0, -mean)], axis=-1)
    logs, _ = jax.lax.scan(step, start - jnp.log(variance)[..., None], length=NUM_NEWTON)
    a, b = jnp.exp(logs[..., 0]), jnp.exp(logs[..., 1])
    by_mean = jnp.linalg.inv(derivative(a, b))[..., 0]
    return a, b, by_mean


def bernoulli_score(mean, variance, total, count):
    """The derivative of the log-evidence of a number of ones by the mean of the logit."""
    a, b, by_mean = beta_prior(mean, variance)
    both = digamma(a + b) - digamma(a + b + count)
    by_a = digamma(a + total) - digamma(a) + both
    by_b = digamma(b + count - total) - digamma(b) + both
    return by_a * by_mean[..., 0] + by_b * by_mean[..., 1]


@dataclass(frozen=True)
class Conjugate(Guidance):
    """Guidance by the evidence under a conjugate prior, for one unknown."""

    score: Callable
    is_joint: bool

    def bind(self, denoiser, likelihood):
        return ConjugatePosterior(denoiser, likelihood, self.score, self.is_joint)


@dataclass(frozen=True, eq=False)
class ConjugatePosterior(GuidedDenoiser):
    rule: Callable
    is_joint: bool

    def evaluate(self, x_t, sigma, guess):
        x_hat, pull = pull_back(self.prior, x_t, sigma)
        variance = jnp.maximum(pull(jnp.ones_like(x_hat)), 1e-6)
        y = self.likelihood.y
        if self.is_joint:
            gradient = self.rule(x_hat, variance, y.sum(-1, keepdims=True), y.shape[-1])
        else:
            gradient = self.rule(x_hat, variance, y, 1).sum(-1, keepdims=True)
        zeros = jnp.zeros(x_hat.shape[:-1])
        return Guided(x_hat, x_hat + pull(gradient), zeros, SolveStats.of(zeros))


SCORES = {"Poisson": poisson_score, "Bernoulli": bernoulli_score, "Normal, square": None}


def methods(score):
    found = {f"{n} iterations": {"guidance": ndp.MMPS(num_iterations=n)} for n in (1, 4)}
    if score is None:
        return found
    return found | {
        "conjugate, together": {"guidance": Conjugate(score, True)},
        "conjugate, each alone": {"guidance": Conjugate(score, False)},
    }


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.families:
        score = SCORES[name]
        for num_values in args.numbers:
            args.num_values = num_values
            for kind, prior in families.PRIORS.items():
                row = {"family": name, "values": num_values, "prior": kind}
                for method, options in methods(score).items():
                    key = jax.random.key(args.seed)
                    family = families.FAMILIES[name]
                    row[method] = families.evaluate(key, prior, family, options, args)
                    error, ratio = row[method]["mean"], row[method]["deviation"]
                    print(f"{name:15s} {num_values:3d} {kind:10s} {method:22s}", end=" ")
                    print(f"{error:5.2f}, {ratio:4.2f}", flush=True)
                rows.append(row)
                (output / "conjugate.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--num-events", type=int, default=32)
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--families", nargs="+", choices=SCORES, default=list(SCORES))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
