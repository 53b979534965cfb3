"""Who finds the modes: samplers of a multimodal posterior against its exact draws.

The Gaussian mixture of MCGDiff (Cardoso et al., arXiv 2308.07983): 25 components with means
(-8 i, -8 j, -8 i, ...), seen through a few noisy projections, so that the posterior is a mixture
in closed form. The denoiser is exact, and all error is the sampler's; or, with `--learned`, a
network trained on draws of the mixture, whose error comes on top.

    python benchmarks/mixture.py --dim 8 --output out
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import MCMC, NUTS

import numpyro_diffprior as ndp
from numpyro_diffprior.linalg.covariances import Isotropic
from numpyro_diffprior.metrics.transport import max_sliced_wasserstein, sliced_wasserstein

SPACING = 8
NUM_CHAINS = 50
LOOKING_AHEAD = ndp.MMPS(ndp.guidance.GaussianCovariance(), look_ahead=True)


class Problem(NamedTuple):
    """A prior, what is seen of a draw of it, and the mixture that its posterior is."""

    prior: ndp.DiffusionPrior
    operator: jax.Array
    scale: jax.Array
    y: jax.Array
    weights: jax.Array
    means: jax.Array
    cov: jax.Array


def model(prior, operator, scale, y=None):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(operator @ x, scale).to_event(1), obs=y)


@partial(jax.jit, static_argnums=(1, 2))
def make_problem(rng_key, dim, num_observed):
    """Random weights, singular values and noise, as in the paper's published script."""
    keys = jax.random.split(rng_key, 6)
    i, j = (x.ravel() for x in jnp.meshgrid(*[jnp.arange(-2, 3)] * 2, indexing="ij"))
    means = -SPACING * jnp.tile(jnp.stack([i, j], -1), (1, dim // 2)).astype(float)
    weights = jax.random.normal(keys[0], i.shape) ** 2
    weights = weights / weights.sum()
    left = jax.random.orthogonal(keys[1], num_observed)
    right = jax.random.orthogonal(keys[2], dim)[:num_observed]
    values = jax.random.uniform(keys[3], (num_observed,))
    operator = left * values @ right
    scale = jax.random.uniform(keys[4]) * values.max()
    key_k, key_x, key_y = jax.random.split(keys[5], 3)
    x = means[jax.random.categorical(key_k, jnp.log(weights))]
    y = operator @ (x + jax.random.normal(key_x, x.shape))
    y = y + scale * jax.random.normal(key_y, y.shape)

    prior = ndp.DiffusionPrior(ndp.MixtureDenoiser(weights, means, Isotropic(jnp.ones(()), dim)))
    cov_y = operator @ operator.T + scale**2 * jnp.eye(num_observed)
    gain = jnp.linalg.solve(cov_y, operator).T
    residual = y - means @ operator.T
    log_weights = dist.MultivariateNormal(0, cov_y).log_prob(residual) + jnp.log(weights)
    cov = jnp.eye(dim) - gain @ operator
    posterior = jax.nn.softmax(log_weights), means + residual @ gain.T, (cov + cov.T) / 2
    return Problem(prior, operator, scale, y, *posterior)


@partial(jax.jit, static_argnums=2)
def draw_exactly(rng_key, problem, num_samples):
    key_k, key_x = jax.random.split(rng_key)
    k = jax.random.categorical(key_k, jnp.log(problem.weights), shape=(num_samples,))
    noise = jax.random.multivariate_normal(
        key_x, jnp.zeros(len(problem.cov)), problem.cov, (num_samples,), method="eigh"
    )
    return problem.means[k] + noise


@partial(jax.jit, static_argnums=(2, 3))
def learn_prior(rng_key, problem, num_steps, num_samples=100_000):
    """The prior as a network learns it from draws of it."""
    key_data, key_net, key_fit = jax.random.split(rng_key, 3)
    denoiser = problem.prior.denoiser
    key_k, key_x = jax.random.split(key_data)
    k = jax.random.categorical(key_k, jnp.log(denoiser.weights), shape=(num_samples,))
    x = denoiser.means[k] + jax.random.normal(key_x, (num_samples, denoiser.event_size))
    net = ndp.MLP(denoiser.event_shape, features=(256,) * 3, rngs=nnx.Rngs(key_net))
    learned = ndp.fit_denoiser(
        key_fit,
        ndp.NetworkDenoiser(net),
        x,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, num_steps)),
        num_steps=num_steps,
        batch_size=512,
    )
    return problem._replace(prior=ndp.DiffusionPrior(learned.denoiser))


def arguments(problem):
    return problem.prior, problem.operator, problem.scale, problem.y


def guided(guidance, num_particles=1):
    """Draws by guided sampling or the twisted SMC, and their network evaluations.

    Without a number of particles, all are draws of one system.
    """

    def draw(rng_key, problem, args):
        draws = ndp.sample_posterior(
            rng_key,
            model,
            *arguments(problem),
            num_samples=args.num_samples,
            num_particles=num_particles or args.num_samples,
            independent=num_particles is not None,
            sampler=ndp.samplers.MultistepSDE(args.num_steps),
            guidance=guidance,
            max_batch_size=args.num_samples,
        )
        return draws.samples["x"], int(draws.stats["num_evaluations"])

    return draw


@partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def run_chains(make_kernel, rng_key, problem, num_steps, num_draws, num_warmup, extra_field):
    """Run a kernel in as many chains as are drawn at once; its draws and one of its fields."""
    mcmc = MCMC(
        make_kernel(num_steps),
        num_warmup=num_warmup,
        num_samples=num_draws // NUM_CHAINS,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(rng_key, *arguments(problem), extra_fields=(extra_field,))
    return mcmc.get_samples()["x"], mcmc.get_extra_fields()[extra_field].mean()


def chains(make_kernel, num_warmup, extra_field, num_steps=None):
    """Chains of a kernel, compiled once for all problems, and their evaluations per draw."""

    def draw(rng_key, problem, args):
        steps = num_steps or args.num_steps
        x, count = run_chains(
            make_kernel, rng_key, problem, steps, args.num_samples, num_warmup, extra_field
        )
        evaluations = float(count) * (steps if extra_field == "num_steps" else 1)
        return x, round(evaluations * (1 + num_warmup * NUM_CHAINS / args.num_samples))

    return draw


def particle_gibbs(num_steps):
    """Conditional SMC with Tweedie's covariance."""
    sampler = ndp.samplers.MultistepSDE(num_steps)
    return ndp.ParticleGibbs(model, num_particles=16, sampler=sampler, guidance=ndp.MMPS())


def nuts(num_steps):
    """NUTS in the space of the deterministic sampler's noise."""
    config = {"x": ndp.DiffusionReparam(num_steps)}
    return NUTS(numpyro.handlers.reparam(model, config=config), max_tree_depth=5)


METHODS = {
    "MMPS": guided(ndp.MMPS()),
    "DPS": guided(ndp.guidance.DPS()),
    "PiGDM": guided(ndp.guidance.PiGDM()),
    "TMPD": guided(ndp.guidance.TMPD()),
    "SMC, K = 4": guided(ndp.MMPS(), 4),
    "SMC, K = 16": guided(ndp.MMPS(), 16),
    "SMC, K = 64": guided(ndp.MMPS(), 64),
    "SMC, K = 16, tempered": guided(ndp.guidance.Tempered(power=0.5), 16),
    "SMC, K = 16, Gaussian": guided(ndp.MMPS(ndp.guidance.GaussianCovariance()), 16),
    "SMC, K = 16, Gaussian, then Tweedie": guided(ndp.guidance.Piecewise(), 16),
    "one SMC": guided(ndp.MMPS(), None),
    "looking ahead, K = 16": guided(LOOKING_AHEAD, 16),
    "looking ahead, one SMC": guided(LOOKING_AHEAD, None),
    "particle Gibbs": chains(particle_gibbs, 10, "num_evaluations"),
    "NUTS": chains(nuts, 100, "num_steps", num_steps=32),
}


@partial(jax.jit, static_argnums=3)
def judge(rng_key, problem, x, num_projections):
    """Distances to exact draws, and the error of the modes' masses (total variation)."""
    key_exact, key_sliced, key_max = jax.random.split(rng_key, 3)
    exact = draw_exactly(key_exact, problem, len(x))
    distance = jnp.square(x[:, None] - problem.means).sum(-1)
    masses = jax.nn.one_hot(distance.argmin(-1), len(problem.means)).mean(0)
    masses = jnp.where(jnp.isfinite(x).all(), masses, jnp.nan)
    return {
        "sliced": sliced_wasserstein(key_sliced, x, exact, num_projections=num_projections),
        "max_sliced": max_sliced_wasserstein(key_max, x, exact, num_steps=0),
        "mass_error": jnp.abs(masses - problem.weights).sum() / 2,
    }


def evaluate(name, problems, args):
    """Run one method on all problems: its scores, evaluations per draw and seconds."""
    key_draw, key_judge = jax.random.split(jax.random.key(args.seed + 1))
    scores, evaluations, seconds = [], [], []
    for index, problem in enumerate(problems):
        start = time.perf_counter()
        key = jax.random.fold_in(key_draw, index)
        if name == "exact":
            x, count = draw_exactly(key, problem, args.num_samples), 0
        else:
            x, count = METHODS[name](key, problem, args)
        jax.block_until_ready(x)
        seconds.append(time.perf_counter() - start)
        evaluations.append(count)
        key = jax.random.fold_in(key_judge, index)
        scores.append(jax.device_get(judge(key, problem, x, args.num_projections)))
    table = {name: [float(score[name]) for score in scores] for name in scores[0]}
    return table | {"evaluations": evaluations, "seconds": seconds}


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for num_observed in args.num_observed:
        keys = jax.random.split(jax.random.key(args.seed), args.num_seeds)
        problems = [make_problem(key, args.dim, num_observed) for key in keys]
        if args.learned:
            keys = jax.random.split(jax.random.key(args.seed + 2), args.num_seeds)
            pairs = zip(keys, problems, strict=True)
            problems = [learn_prior(key, problem, args.learned) for key, problem in pairs]
        print(f"\nd = {args.dim}, d_y = {num_observed}")
        print(f"{'':36s} {'sliced W2':>14s} {'max-sliced':>14s} {'masses':>7s} {'NFE':>8s} s")
        for name in ["exact", *args.methods]:
            row = evaluate(name, problems, args)
            row |= {"dim": args.dim, "num_observed": num_observed, "method": name}
            results.append(row)
            num_diverged = int(np.isnan(row["sliced"]).sum())
            root = (len(problems) - num_diverged) ** 0.5
            cells = [
                f"{np.nanmean(row[k]):6.3f} +- {1.96 * np.nanstd(row[k]) / root:4.2f}"
                for k in ("sliced", "max_sliced")
            ]
            print(
                f"{name:36s} {cells[0]:>14s} {cells[1]:>14s} {np.nanmean(row['mass_error']):7.3f}"
                f" {np.mean(row['evaluations']):8.0f} {np.median(row['seconds']):.1f}"
                + f"  ({num_diverged} diverged)"
                * (num_diverged > 0),
                flush=True,
            )
            (output / f"mixture_{args.dim}.json").write_text(json.dumps(results, indent=1))
    return results


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=8, help="even")
    parser.add_argument("--num-observed", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num-seeds", type=int, default=20)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--num-projections", type=int, default=10_000)
    parser.add_argument(
        "--learned", type=int, default=0, metavar="STEPS", help="train a network so many steps"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args(argv)


if __name__ == "__main__":
    # An oracle needs exact products, which accelerators give when asked.
    with jax.default_matmul_precision("highest"):
        main(parse_args())
