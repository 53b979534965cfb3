"""What guidance makes of each family of distributions: posteriors against quadrature.

One unknown with a Gaussian prior or one of two modes, seen through some draws of each family.
Exact posteriors by quadrature. Of many such problems: the error of the posterior mean in posterior
deviations (root mean square), and the ratio of the posterior deviations (geometric mean). All
particles of an unknown are one system.

    python benchmarks/families.py --output out
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import numpyro_diffprior as ndp
from numpyro_diffprior.linalg import Isotropic

GRID = jnp.linspace(-6, 6, 6001)
CUTS = jnp.array([-1.0, 0.0, 1.0])
ONES = jnp.ones(3)

FAMILIES = {
    "Normal": lambda x: dist.Normal(x, 0.7),
    "Normal, scale": lambda x: dist.Normal(0.0, jnp.exp(x)),
    "Normal, both": lambda x: dist.Normal(x, 0.3 * jnp.exp(x / 2)),
    "Normal, square": lambda x: dist.Normal(x**2, 0.5),
    "LogNormal": lambda x: dist.LogNormal(x, 0.7),
    "StudentT": lambda x: dist.StudentT(4.0, x, 0.5),
    "Cauchy": lambda x: dist.Cauchy(x, 0.5),
    "Laplace": lambda x: dist.Laplace(x, 0.5),
    "Logistic": lambda x: dist.Logistic(x, 0.5),
    "Gumbel": lambda x: dist.Gumbel(x, 0.7),
    "SoftLaplace": lambda x: dist.SoftLaplace(x, 0.5),
    "Exponential": lambda x: dist.Exponential(jnp.exp(x)),
    "Gamma": lambda x: dist.Gamma(2.0, jnp.exp(x)),
    "InverseGamma": lambda x: dist.InverseGamma(4.0, jnp.exp(x)),
    "Weibull": lambda x: dist.Weibull(jnp.exp(x), 1.5),
    "HalfNormal": lambda x: dist.HalfNormal(jnp.exp(x)),
    "Beta": lambda x: dist.BetaProportion(jax.nn.sigmoid(x), 6.0),
    "TruncatedNormal": lambda x: dist.TruncatedNormal(x, 1.0, low=0.0),
    "RightCensored": lambda x: dist.RightCensoredDistribution(
        dist.Normal(x, 1.0), jnp.arange(NUM_VALUES) < NUM_VALUES // 2
    ),
    "VonMises": lambda x: dist.VonMises(x, 2.0),
    "Poisson": lambda x: dist.Poisson(jnp.exp(x)),
    "Bernoulli": lambda x: dist.Bernoulli(logits=x),
    "Binomial": lambda x: dist.Binomial(5, logits=x),
    "NegativeBinomial2": lambda x: dist.NegativeBinomial2(jnp.exp(x), 3.0),
    "Geometric": lambda x: dist.Geometric(logits=x),
    "ZeroInflatedPoisson": lambda x: dist.ZeroInflatedPoisson(0.2, jnp.exp(x + 1)),
    "Categorical": lambda x: dist.Categorical(logits=x[..., None] * jnp.array([-1.0, 0.0, 1.0])),
    "OrderedLogistic": lambda x: dist.OrderedLogistic(x, CUTS),
    "MixtureSameFamily": lambda x: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.8, 0.2])),
        dist.Normal(x[..., None], jnp.array([0.5, 2.0])),
    ),
    "MixtureGeneral": lambda x: dist.MixtureGeneral(
        dist.Categorical(jnp.array([0.8, 0.2])),
        [dist.Normal(x, 0.5), dist.Normal(jnp.zeros_like(x), 2.0)],
    ),
}
NUM_VALUES = 10
MAX_BATCH_SIZE = 32_000 // NUM_VALUES  # see docs/distributions.md on larger sums
PRIORS = {
    "Gaussian": ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(1), jnp.eye(1))),
    "two modes": ndp.DiffusionPrior(
        ndp.MixtureDenoiser(
            jnp.ones(2), jnp.array([[-1.2], [1.2]]), Isotropic(jnp.asarray(0.25), 1)
        )
    ),
}
METHODS = {
    "1 iteration": {"guidance": ndp.MMPS(num_iterations=1)},
    "MMPS": {},
    "200 particles": {"num_particles": 200, "independent": False, "guidance": ndp.MMPS()},
}


def model(prior, family, num_events, y=None):
    with numpyro.plate("n", num_events):
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        fn = family(jnp.broadcast_to(x, (*x.shape[:-1], NUM_VALUES)))
        numpyro.sample("y", fn.to_event(1), obs=y)


def simulate(rng_key, prior, family, num_events):
    """Data of unknowns drawn from the prior; censored values are what censoring leaves."""
    draws = numpyro.infer.Predictive(model, num_samples=1)(rng_key, prior, family, num_events)
    return draws["y"][0]


@partial(jax.jit, static_argnums=1)
def quadrature(prior, family, y):
    """Exact posterior means and deviations."""
    denoiser = prior.denoiser
    if isinstance(denoiser, ndp.GaussianDenoiser):
        log_prior = dist.Normal(0.0, 1.0).log_prob(GRID)
    else:
        parts = dist.Normal(denoiser.means[:, 0], 0.5).log_prob(GRID[:, None])
        log_prior = jax.nn.logsumexp(parts, axis=-1)

    def one(y):
        x = jnp.broadcast_to(GRID[:, None], (len(GRID), NUM_VALUES))
        weights = jax.nn.softmax(log_prior + family(x).log_prob(y).sum(-1))
        mean = weights @ GRID
        return mean, jnp.sqrt(weights @ (GRID - mean) ** 2)

    return jax.vmap(one)(y)


def evaluate(rng_key, prior, family, options, args):
    key_data, key_draw = jax.random.split(rng_key)
    y = simulate(key_data, prior, family, args.num_events)
    mean, deviation = quadrature(prior, family, y)
    draws = ndp.sample_posterior(
        key_draw,
        model,
        prior,
        family,
        args.num_events,
        y,
        num_samples=args.num_samples,
        sampler=ndp.MultistepSDE(args.num_steps),
        max_batch_size=MAX_BATCH_SIZE,
        **options,
    )
    x = draws.samples["x"][..., 0]
    return {
        "mean": float(jnp.sqrt(jnp.mean(((x.mean(0) - mean) / deviation) ** 2))),
        "deviation": float(jnp.exp(jnp.mean(jnp.log(x.std(0) / deviation)))),
    }


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    print("".join(f"| {title} " for title in ("family", "prior", *METHODS)) + "|")
    print("| --- " * (2 + len(METHODS)) + "|")
    for name in args.families:
        jax.clear_caches()  # a process takes only so many compiled programs
        for kind, prior in PRIORS.items():
            row = {"family": name, "prior": kind}
            for method, options in METHODS.items():
                key = jax.random.key(args.seed)
                row[method] = evaluate(key, prior, FAMILIES[name], options, args)
            rows.append(row)
            cells = [f"{row[m]['mean']:.2f}, {row[m]['deviation']:.2f}" for m in METHODS]
            print("| " + " | ".join([name, kind, *cells]) + " |", flush=True)
            (output / "families.json").write_text(json.dumps(rows, indent=1))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-events", type=int, default=32)
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
