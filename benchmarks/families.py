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
from numpyro_diffprior.linalg.covariances import Isotropic

GRID = jnp.linspace(-6, 6, 3001)  # not too fine: see `MAX_VALUES`
CUTS = jnp.array([-1.0, 0.0, 1.0])
ONES = jnp.ones(3)
LOADINGS = jnp.array([-1.0, 0.0, 1.0])
COV = jnp.array([[1.0, 0.6, 0.2], [0.6, 1.0, 0.4], [0.2, 0.4, 1.0]])
TRIL = jnp.linalg.cholesky(COV)
RING = jnp.array([1.0, 0.4, 0.1, 0.4])
ADJACENCY = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def times(x, vector):
    """The vector times the unknown."""
    return x[..., None] * vector


def censored(x):
    """Which values are: half of them."""
    return jnp.arange(x.shape[-1]) < x.shape[-1] // 2


def scaled(x, matrix):
    """The matrix times a scale that grows with the unknown."""
    return jnp.exp(x)[..., None, None] * matrix


# The unknown is a location, the logarithm of a scale, or the logit of a probability.
FAMILIES = {
    "Normal": lambda x: dist.Normal(x, 0.7),
    "Normal, scale": lambda x: dist.Normal(0.0, jnp.exp(x)),
    "Normal, both": lambda x: dist.Normal(x, 0.3 * jnp.exp(x / 2)),
    "Normal, square": lambda x: dist.Normal(x**2, 0.5),
    "FoldedDistribution": lambda x: dist.FoldedDistribution(dist.Normal(x, 0.7)),
    "LogNormal": lambda x: dist.LogNormal(x, 0.7),
    "StudentT": lambda x: dist.StudentT(4.0, x, 0.5),
    "StudentT, scale": lambda x: dist.StudentT(4.0, 0.0, jnp.exp(x)),
    "Cauchy": lambda x: dist.Cauchy(x, 0.5),
    "Laplace": lambda x: dist.Laplace(x, 0.5),
    "AsymmetricLaplace": lambda x: dist.AsymmetricLaplace(x, 0.5, 1.5),
    "Logistic": lambda x: dist.Logistic(x, 0.5),
    "Gumbel": lambda x: dist.Gumbel(x, 0.7),
    "SoftLaplace": lambda x: dist.SoftLaplace(x, 0.5),
    "Exponential": lambda x: dist.Exponential(jnp.exp(x)),
    "Gamma": lambda x: dist.Gamma(2.0, jnp.exp(x)),
    "Gamma, shape": lambda x: dist.Gamma(jnp.exp(x), 1.0),
    "InverseGamma": lambda x: dist.InverseGamma(4.0, jnp.exp(x)),
    "Weibull": lambda x: dist.Weibull(jnp.exp(x), 1.5),
    "Gompertz": lambda x: dist.Gompertz(0.5, jnp.exp(x)),
    "Dagum": lambda x: dist.Dagum(2.0, 3.0, jnp.exp(x)),
    "Levy": lambda x: dist.Levy(0.0, jnp.exp(x)),
    "Pareto": lambda x: dist.Pareto(1.0, jnp.exp(1 + x / 2)),
    "DoublyTruncatedPowerLaw": lambda x: dist.DoublyTruncatedPowerLaw(x, 1.0, 10.0),
    "HalfNormal": lambda x: dist.HalfNormal(jnp.exp(x)),
    "HalfCauchy": lambda x: dist.HalfCauchy(jnp.exp(x)),
    "Beta": lambda x: dist.BetaProportion(jax.nn.sigmoid(x), 6.0),
    "Kumaraswamy": lambda x: dist.Kumaraswamy(jnp.exp(x), 2.0),
    "RelaxedBernoulli": lambda x: dist.RelaxedBernoulliLogits(0.5, x),
    "TruncatedNormal": lambda x: dist.TruncatedNormal(x, 1.0, low=0.0),
    "TruncatedCauchy": lambda x: dist.TruncatedCauchy(x, 1.0, low=0.0),
    "LeftTruncatedGamma": lambda x: dist.LeftTruncatedGamma(
        dist.Gamma(2.0, jnp.exp(x)), jnp.full_like(x, 0.5)
    ),
    "RightCensored": lambda x: dist.RightCensoredDistribution(dist.Normal(x, 1.0), censored(x)),
    "LeftCensored": lambda x: dist.LeftCensoredDistribution(dist.Normal(x, 1.0), censored(x)),
    "VonMises": lambda x: dist.VonMises(x, 2.0),
    "SineSkewed": lambda x: dist.SineSkewed(
        dist.VonMises(x[..., None], 2.0).to_event(1), jnp.array([0.3])
    ),
    "ProjectedNormal": lambda x: dist.ProjectedNormal(jnp.stack([x, jnp.ones_like(x)], -1)),
    "Poisson": lambda x: dist.Poisson(jnp.exp(x)),
    "Bernoulli": lambda x: dist.Bernoulli(logits=x),
    "Binomial": lambda x: dist.Binomial(5, logits=x),
    "BetaBinomial": lambda x: dist.BetaBinomial(3 * jax.nn.sigmoid(x), 3 * jax.nn.sigmoid(-x), 5),
    "NegativeBinomial2": lambda x: dist.NegativeBinomial2(jnp.exp(x), 3.0),
    "NegativeBinomialLogits": lambda x: dist.NegativeBinomialLogits(3.0, x),
    "BetaNegativeBinomial": lambda x: dist.BetaNegativeBinomial(5.0, jnp.exp(x), 3.0),
    "Geometric": lambda x: dist.Geometric(logits=x),
    "ZeroInflatedPoisson": lambda x: dist.ZeroInflatedPoisson(0.2, jnp.exp(x + 1)),
    "ZeroInflatedPoisson, gate": lambda x: dist.ZeroInflatedPoisson(jax.nn.sigmoid(x), 3.0),
    "HurdlePoisson": lambda x: dist.HurdlePoisson(0.2, jnp.exp(x + 1)),
    "HurdlePoisson, gate": lambda x: dist.HurdlePoisson(jax.nn.sigmoid(x), 3.0),
    "HurdleGamma": lambda x: dist.HurdleGamma(0.2, 2.0, jnp.exp(x)),
    "HurdleLogNormal": lambda x: dist.HurdleLogNormal(0.2, x, 0.7),
    "Categorical": lambda x: dist.Categorical(logits=times(x, LOADINGS)),
    "OrderedLogistic": lambda x: dist.OrderedLogistic(x, CUTS),
    "MixtureSameFamily": lambda x: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.8, 0.2])),
        dist.Normal(x[..., None], jnp.array([0.5, 2.0])),
    ),
    "MixtureGeneral": lambda x: dist.MixtureGeneral(
        dist.Categorical(jnp.array([0.8, 0.2])),
        [dist.Normal(x, 0.5), dist.Normal(jnp.zeros_like(x), 2.0)],
    ),
    "Multinomial": lambda x: dist.Multinomial(5, logits=times(x, LOADINGS), total_count_max=5),
    "Dirichlet": lambda x: dist.Dirichlet(6 * jax.nn.softmax(times(x, LOADINGS))),
    "DirichletMultinomial": lambda x: dist.DirichletMultinomial(
        6 * jax.nn.softmax(times(x, LOADINGS)), 5, total_count_max=5
    ),
    "MultivariateNormal": lambda x: dist.MultivariateNormal(times(x, ONES), COV),
    "MultivariateNormal, scale": lambda x: dist.MultivariateNormal(
        jnp.zeros(3), scale_tril=scaled(x, TRIL)
    ),
    "LowRankMultivariateNormal": lambda x: dist.LowRankMultivariateNormal(
        times(x, ONES), 0.8 * ONES[:, None], ONES
    ),
    "MultivariateStudentT": lambda x: dist.MultivariateStudentT(4.0, times(x, ONES), TRIL),
    "GaussianCopula": lambda x: dist.GaussianCopula(
        dist.Exponential(jnp.exp(times(x, ONES))), COV
    ),
    "GaussianRandomWalk": lambda x: dist.GaussianRandomWalk(jnp.exp(x), 5),
    "GaussianStateSpace": lambda x: dist.GaussianStateSpace(
        4, 0.5 * jnp.eye(2), jnp.eye(2), initial_value=times(x, jnp.ones(2))
    ),
    "CAR": lambda x: dist.CAR(times(x, ONES), 0.5, 2.0, ADJACENCY),
    "CirculantNormal": lambda x: dist.CirculantNormal(times(x, jnp.ones(4)), RING),
    "MatrixNormal": lambda x: dist.MatrixNormal(
        times(x, jnp.ones(4)).reshape(*x.shape, 2, 2), TRIL[:2, :2], TRIL[:2, :2]
    ),
}
MAX_VALUES = 32_000  # at once; see docs/distributions.md on larger sums
MAX_EVENTS = 16  # of ten values, with 200 particles
PRIORS = {
    "Gaussian": ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros(1), jnp.eye(1))),
    "two modes": ndp.DiffusionPrior(
        ndp.MixtureDenoiser(
            jnp.full(2, 0.5), jnp.array([[-1.2], [1.2]]), Isotropic(jnp.asarray(0.25), 1)
        )
    ),
}
METHODS = {
    "1 iteration": {"guidance": ndp.MMPS(num_iterations=1)},
    "MMPS": {},
    "200 particles": {"num_particles": 200, "independent": False, "guidance": ndp.MMPS()},
}


def model(prior, family, num_events, num_values, y=None):
    with numpyro.plate("n", num_events):
        y = None if y is None else numpyro.subsample(y, event_dim=y.ndim - 1)
        x = numpyro.sample("x", prior)
        fn = family(jnp.broadcast_to(x, (*x.shape[:-1], num_values)))
        numpyro.sample("y", fn.to_event(1), obs=y)


def simulate(rng_key, prior, family, num_events, num_values):
    """Data of unknowns drawn from the prior; censored values are what censoring leaves."""
    predictive = numpyro.infer.Predictive(model, num_samples=1)
    draws = predictive(rng_key, prior, family, num_events, num_values)
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
        x = jnp.broadcast_to(GRID[:, None], (len(GRID), len(y)))
        y = jnp.broadcast_to(y, (len(GRID), *y.shape))
        # Rounding makes the density of a `ProjectedNormal` NaN far from a value.
        log_likelihood = jnp.nan_to_num(family(x).log_prob(y).sum(-1), nan=-jnp.inf)
        weights = jax.nn.softmax(log_prior + log_likelihood)
        mean = weights @ GRID
        return mean, jnp.sqrt(weights @ (GRID - mean) ** 2)

    return jax.lax.map(one, y)


def evaluate(rng_key, prior, family, options, args):
    key_data, key_draw = jax.random.split(rng_key)
    y = simulate(key_data, prior, family, args.num_events, args.num_values)
    mean, deviation = quadrature(prior, family, y)
    draws = [
        ndp.sample_posterior(
            jax.random.fold_in(key_draw, start),
            model,
            prior,
            family,
            min(MAX_EVENTS, args.num_events - start),
            args.num_values,
            y[start : start + MAX_EVENTS],
            num_samples=args.num_samples,
            sampler=ndp.samplers.MultistepSDE(args.num_steps),
            max_batch_size=MAX_VALUES // args.num_values,
            **options,
        )
        for start in range(0, args.num_events, MAX_EVENTS)
    ]
    x = jnp.concatenate([d.samples["x"] for d in draws], axis=1)[..., 0]
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
    parser.add_argument("--num-values", type=int, default=10)
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
