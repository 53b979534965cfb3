"""Assimilate observations of a chaotic system with a prior that never saw its equations.

Expectation maximization learns a prior of windows of 32 steps of Lorenz-63 (or Lorenz-96) from
windows of which three quarters of the values are hidden, at random, and the others noisy. The
prior then assimilates sparser observations of other windows: of the state, of its arctangent, of
its square, and censored ones; and observations of trajectories eight times as long, by
`WindowDenoiser`. It is compared with the same network trained on clean windows, and with two
methods that know the equations: a particle smoother and an ensemble Kalman smoother.

    python examples/assimilation.py --output out                      # two cores
    python examples/assimilation.py --system lorenz96 --output out
    python examples/assimilation.py --gpu --output out
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
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

import numpyro_diffprior as ndp
from numpyro_diffprior.metrics.ranks import coverage
from numpyro_diffprior.metrics.scores import crps
from numpyro_diffprior.metrics.transport import sliced_wasserstein

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LENGTH = 32
LIMIT = 0.5
SPIN_UP = 1000
# More of the training is at low noise than by default: trajectories are smooth.
LEVELS = ndp.noise.LogNormal(-1.5, 1.5)
LIKELIHOODS = ("linear", "arctan", "squared", "censored")

# `num_sgd_steps` is per iteration; the prior of clean windows takes as many in all.
SMALL = {
    "num_windows": 4096,
    "num_gaussian_iterations": 64,
    "num_iterations": 96,
    "num_events": 512,
    "num_sgd_steps": 256,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "ema_decay": 0.99,
    "network": "mlp",
    "width": 256,
    "num_particles": 1,
    "num_steps": 32,
    "num_linearizations": 1,
    "num_judged": 24,
    "num_samples": 20,
    "num_members": 512,
    "num_filtered": 65_536,
    "long": 256,
    "num_long": 4,
    "stride": 4,
}
GPU = SMALL | {
    "num_windows": 65_536,
    "num_iterations": 256,
    "num_events": 8192,
    "num_sgd_steps": 256,
    "batch_size": 1024,
    "network": "unet",
    "width": 512,
    "num_linearizations": 4,
    "num_judged": 256,
    "num_samples": 128,
    "num_long": 32,
}


class System(NamedTuple):
    """A stochastic dynamical system, in units of its climate's mean and deviation.

    Attributes:
        size: The number of variables.
        tendency: The time derivative of states, in the unit of the equations.
        time_step: The time between steps.
        mean: The mean of the climate, a number or one per variable.
        deviation: Its standard deviation.
        noise: The standard deviation of the noise that every step adds.
    """

    size: int
    tendency: Callable
    time_step: float
    mean: tuple
    deviation: tuple
    noise: float


class Observations(NamedTuple):
    """Trajectories, which of their values are seen, and what is seen of them; else NaN."""

    truth: jax.Array
    mask: jax.Array
    y: jax.Array


def lorenz63(x):
    """The tendency of Lorenz (1963)."""
    x, y, z = jnp.moveaxis(x, -1, 0)
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)


def lorenz96(x):
    """The tendency of Lorenz (1996), with a forcing of 8."""
    return (jnp.roll(x, -1, -1) - jnp.roll(x, 2, -1)) * jnp.roll(x, 1, -1) - x + 8


SYSTEMS = {
    "lorenz63": System(3, lorenz63, 0.025, (0.0, 0.0, 23.5), (7.9, 9.0, 8.6), 0.02),
    "lorenz96": System(8, lorenz96, 0.025, (2.3,) * 8, (3.6,) * 8, 0.02),
}


def step(system, x):
    """Advance states by one step of the classical Runge-Kutta method, without noise."""
    h, mean, deviation = system.time_step, jnp.array(system.mean), jnp.array(system.deviation)
    state = mean + deviation * x
    first = system.tendency(state)
    second = system.tendency(state + h / 2 * first)
    third = system.tendency(state + h / 2 * second)
    fourth = system.tendency(state + h * third)
    state = state + h / 6 * (first + 2 * second + 2 * third + fourth)
    return (state - mean) / deviation


def step_with_noise(rng_key, system, x):
    return step(system, x) + system.noise * jax.random.normal(rng_key, x.shape)


@partial(jax.jit, static_argnums=(1, 2, 3))
def simulate(rng_key, system, num, length):
    """Trajectories of the stationary process, with shape ``(num, length, size)``."""
    key_start, key_steps = jax.random.split(rng_key)
    start = jax.random.normal(key_start, (num, system.size))

    def advance(x, key):
        x = step_with_noise(key, system, x)
        return x, x

    keys = jax.random.split(key_steps, SPIN_UP + length)
    x, _ = jax.lax.scan(lambda x, key: (advance(x, key)[0], None), start, keys[:SPIN_UP])
    _, x = jax.lax.scan(advance, x, keys[SPIN_UP:])
    return jnp.moveaxis(x, 0, 1)


def likelihood(kind, x, noise, censored=False):
    """The distribution of the observed values of states ``x``."""
    match kind:
        case "linear":
            return dist.Normal(x, noise)
        case "arctan":
            return dist.Normal(jnp.arctan(x), noise)
        case "squared":
            return dist.Normal(x**2, noise)
        case "censored":
            return dist.RightCensoredDistribution(dist.Normal(x, noise), censored)


def model(prior, kind, noise, mask, y=None):
    with numpyro.plate("windows", len(mask)):
        mask = numpyro.subsample(mask, event_dim=2)
        y = None if y is None else numpyro.subsample(y, event_dim=2)
        x = numpyro.sample("x", prior)
        censored = False if y is None else y >= LIMIT
        seen = likelihood(kind, x, noise, censored).mask(mask).to_event(2)
        numpyro.sample("y", seen, obs=y)


def observe(rng_key, kind, truth, fraction, noise):
    """Observe a random fraction of the values."""
    key_mask, key_noise = jax.random.split(rng_key)
    mask = jax.random.bernoulli(key_mask, fraction, truth.shape)
    y = likelihood(kind, truth, noise).sample(key_noise)
    if kind == "censored":
        y = jnp.minimum(y, LIMIT)
    return Observations(truth, mask, jnp.where(mask, y, jnp.nan))


def log_likelihood(kind, noise, x, mask, y):
    """The log-density of what is seen at one time, with the shape of the batch of states."""
    y = jnp.where(mask, y, 0.0)
    values = likelihood(kind, x, noise, y >= LIMIT).log_prob(y)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)


def systematic(rng_key, log_weights):
    """Indices of particles resampled in proportion to their weights."""
    num = len(log_weights)
    edges = jnp.cumsum(jax.nn.softmax(log_weights))
    points = (jax.random.uniform(rng_key) + jnp.arange(num)) / num
    return jnp.minimum(jnp.searchsorted(edges, points * edges[-1]), num - 1)


def smooth_by_particles(rng_key, advance, log_weight, start, mask, y, num_samples):
    """Trajectories from the posterior by a bootstrap particle filter and its ancestral lines.

    Args:
        rng_key: A random key.
        advance: A function ``(key, states) -> states`` that takes a step.
        log_weight: A function ``(states, mask, y)`` that returns log-likelihoods.
        start: Particles of the first step, with shape ``(num, size)``.
        mask: Which values are seen, with shape ``(length, size)``.
        y: The seen values.
        num_samples: The number of trajectories to return.
    """
    key_first, key_steps, key_last = jax.random.split(rng_key, 3)
    num = len(start)

    def select(key, x, mask, y):
        """Weight and resample particles, unless nothing is seen."""
        index = jax.lax.cond(
            mask.any(),
            lambda: systematic(key, log_weight(x, mask, y)),
            lambda: jnp.arange(num),
        )
        return x[index], index

    def body(x, inputs):
        key, mask, y = inputs
        key_noise, key_select = jax.random.split(key)
        x, index = select(key_select, advance(key_noise, x), mask, y)
        return x, (x, index)

    first, _ = select(key_first, start, mask[0], y[0])
    keys = jax.random.split(key_steps, len(mask) - 1)
    _, (x, parents) = jax.lax.scan(body, first, (keys, mask[1:], y[1:]))
    x = jnp.concatenate([first[None], x])
    last = jax.random.choice(key_last, num, (num_samples,), replace=False)

    def trace(index, inputs):
        x, parents = inputs
        index = parents[index]
        return index, x[index]

    _, lines = jax.lax.scan(trace, last, (x[:-1], parents), reverse=True)
    return jnp.moveaxis(jnp.concatenate([lines, x[-1][last][None]]), 0, 1)


def smooth_by_ensemble(rng_key, advance, predict, noise, start, mask, y):
    """The ensemble Kalman smoother with perturbed observations (Evensen and van Leeuwen, 2000).

    At every step, the members at all steps so far are updated with the observations of the step.

    Args:
        rng_key: A random key.
        advance: A function ``(key, states) -> states`` that takes a step.
        predict: A function from states to the means of their observations.
        noise: The standard deviation of the observations.
        start: Members at the first step, with shape ``(num, size)``.
        mask: Which values are seen, with shape ``(length, size)``.
        y: The seen values.

    Returns:
        The members' trajectories, with shape ``(num, length, size)``.
    """
    num, size = start.shape
    y = jnp.where(mask, y, 0.0)

    def update(key, past, x, mask, y):
        # What is not seen has no anomalies, and no effect.
        predicted = jnp.where(mask, predict(x), 0.0)
        anomalies = predicted - predicted.mean(0)
        cov = anomalies.T @ anomalies / (num - 1) + noise**2 * jnp.eye(size)
        innovation = y - predicted - noise * jax.random.normal(key, predicted.shape)
        weights = jnp.linalg.solve(cov, jnp.where(mask, innovation, 0.0).T).T
        centered = past - past.mean(0)
        gain = jnp.einsum("ntd,nk->tdk", centered, anomalies) / (num - 1)
        return past + jnp.einsum("tdk,nk->ntd", gain, weights)

    def body(past, inputs):
        time, key, mask, y = inputs
        key_noise, key_update = jax.random.split(key)
        previous = past[:, jnp.maximum(time - 1, 0)]
        x = jnp.where(time == 0, start, advance(key_noise, previous))
        return update(key_update, past.at[:, time].set(x), x, mask, y), None

    keys = jax.random.split(rng_key, len(mask))
    past = jnp.zeros((num, len(mask), size))
    return jax.lax.scan(body, past, (jnp.arange(len(mask)), keys, mask, y))[0]


def make_prior(rng_key, shape, args):
    width, rngs = args.width, nnx.Rngs(rng_key)
    if args.network == "mlp":
        net = ndp.MLP(shape, features=(width,) * 3, rngs=rngs)
    else:
        channels = (width // 8, width // 4, width // 2)
        net = ndp.UNet(shape, spatial_dims=1, channels=channels, num_blocks=1, rngs=rngs)
    return ndp.DiffusionPrior(
        ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(args.num_steps)
    )


def make_optimizer(args):
    """Adam with a learning rate that falls to zero in the last third of the training."""
    num_steps = args.num_iterations * args.num_sgd_steps
    constant = optax.constant_schedule(args.learning_rate)
    falling = optax.cosine_decay_schedule(args.learning_rate, -(-num_steps // 3))
    schedule = optax.join_schedules([constant, falling], [num_steps - num_steps // 3])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def learn(rng_key, system, prior, data, args):
    """Run EM on observations of windows; return the prior, and a row of metrics per iteration."""
    em = ndp.EM(
        model,
        make_optimizer(args),
        e_step=ndp.EStep(args.num_particles, num_events=args.num_events),
        m_step=ndp.MStep(
            num_steps=args.num_sgd_steps,
            batch_size=args.batch_size,
            noise=LEVELS,
            ema_decay=args.ema_decay,
        ),
        # Draws of a Gaussian after few iterations are rough, and EM is slow to smooth them.
        start=ndp.GaussianStart(num_iterations=args.num_gaussian_iterations, max_events=1024),
    )
    rows = []

    def record(state, metrics):
        row = {key: float(value) for key, value in metrics._asdict().items()}
        # Windows that have not been drawn yet are NaN.
        draws = state.draws["x"].reshape(-1, *prior.event_shape)
        row |= {"residual": residual(system, draws[jnp.isfinite(draws).all((1, 2))])}
        rows.append({"iteration": state.num_iterations} | row)
        print(
            f"{state.num_iterations:3d}  loss {row['loss']:.3f}  residual {row['residual']:.3f}"
            f"  E {row['e_step_seconds']:.0f} s  M {row['m_step_seconds']:.0f} s",
            flush=True,
        )

    result = em.run(
        rng_key,
        args.num_iterations,
        prior,
        "linear",
        args.noise,
        data.mask,
        data.y,
        progress_bar=False,
        callback=record,
    )
    return result.prior, rows


def train_on_clean(rng_key, prior, clean, args):
    """The same network, trained on clean windows in as many steps."""
    fit = ndp.fit_denoiser(
        rng_key,
        prior.denoiser,
        clean,
        optimizer=make_optimizer(args),
        num_steps=args.num_iterations * args.num_sgd_steps,
        batch_size=args.batch_size,
        noise=LEVELS,
        ema_decay=args.ema_decay,
    )
    return prior.replace_denoiser(fit.denoiser)


def residual(system, x):
    """The root mean square of what the equations do not explain; of true windows, the noise."""
    return float(jnp.sqrt(jnp.mean((x[:, 1:] - step(system, x[:, :-1])) ** 2)))


def judge_prior(rng_key, system, prior, clean):
    """Scores of windows that the prior draws, as many as there are clean ones."""
    key_draw, key_directions = jax.random.split(rng_key)
    x = prior.sample(key_draw, (len(clean),))
    return {
        "residual": residual(system, x),
        "sliced_w2": float(sliced_wasserstein(key_directions, x, clean)),
    }


def judge(draws, truth):
    """Scores of posterior draws, with shape ``(num_samples, *truth.shape)``."""
    # The mean of few draws has an error of its own: calibrated draws have a ratio of one.
    rmse = jnp.sqrt(jnp.mean((draws.mean(0) - truth) ** 2))
    spread = jnp.sqrt(jnp.mean(draws.var(0, ddof=1)) * (1 + 1 / len(draws)))
    inside = coverage(draws, truth, levels=(0.5, 0.9))
    scores = {"rmse": rmse, "spread": spread / rmse, "crps": jnp.mean(crps(draws, truth))}
    scores |= {"cover50": inside[0], "cover90": inside[1]}
    return {name: float(score) for name, score in scores.items()}


def assimilate(rng_key, kind, prior, seen, num_particles, args):
    """Posterior draws under a diffusion prior."""
    # A linearization factors a matrix per particle and step; particles correct what one leaves.
    covariance = ndp.guidance.GaussianCovariance()
    guidance = ndp.MMPS(covariance, look_ahead=True, num_iterations=args.num_linearizations)
    return ndp.sample_posterior(
        rng_key,
        model,
        prior,
        kind,
        args.sparse_noise,
        seen.mask,
        seen.y,
        num_samples=args.num_samples,
        num_particles=num_particles,
        guidance=guidance if num_particles > 1 else None,
    ).samples["x"]


@partial(jax.jit, static_argnums=(1, 2, 6))
def filter_particles(rng_key, kind, system, noise, climate, seen, num_samples):
    """Posterior draws by particles that know the equations, a trajectory at a time."""

    def smooth(inputs):
        key, mask, y = inputs
        return smooth_by_particles(
            key,
            lambda key, x: step_with_noise(key, system, x),
            partial(log_likelihood, kind, noise),
            climate,
            mask,
            y,
            num_samples,
        )

    keys = jax.random.split(rng_key, len(seen.mask))
    return jnp.moveaxis(jax.lax.map(smooth, (keys, seen.mask, seen.y)), 0, 1)


@partial(jax.jit, static_argnums=(1, 2, 6))
def filter_ensemble(rng_key, kind, system, noise, climate, seen, num_samples):
    """Members of the ensemble Kalman smoother, which leaves censored values out."""
    mask = seen.mask & (seen.y < LIMIT) if kind == "censored" else seen.mask

    def smooth(inputs):
        key, mask, y = inputs
        return smooth_by_ensemble(
            key,
            lambda key, x: step_with_noise(key, system, x),
            lambda x: likelihood("linear" if kind == "censored" else kind, x, noise).mean,
            noise,
            climate,
            mask,
            y,
        )[:num_samples]

    keys = jax.random.split(rng_key, len(mask))
    return jnp.moveaxis(jax.lax.map(smooth, (keys, mask, seen.y)), 0, 1)


def compare(rng_key, kind, priors, system, climate, seen, args):
    """Posterior draws of every method, with shape ``(num_samples, *truth.shape)``."""
    known = (rng_key, kind, system, args.sparse_noise)
    methods = {
        f"{name}, {num}": partial(assimilate, rng_key, kind, prior, seen, num, args)
        for name, prior in priors.items()
        for num in args.particles
    }
    methods["particle smoother"] = partial(
        filter_particles, *known, climate, seen, args.num_samples
    )
    methods["ensemble smoother"] = partial(
        filter_ensemble, *known, climate[: args.num_members], seen, args.num_samples
    )
    draws, rows = {}, {}
    for name, method in methods.items():
        began = time.perf_counter()
        draws[name] = jax.block_until_ready(method())
        rows[name] = judge(draws[name], seen.truth)
        rows[name] |= {"seconds": time.perf_counter() - began}
        show_row(name, rows[name])
    return draws, rows


def show_row(name, row):
    print(
        f"{name:20s} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True
    )


def show_table(tables):
    """Print the scores of all methods, as a table in Markdown."""
    columns = ("rmse", "spread", "crps", "cover50", "cover90", "seconds")
    print("\n| | method |", " | ".join(columns), "|")
    print("| --- |" + " --- |" * (1 + len(columns)))
    for kind, rows in tables.items():
        for name, row in rows.items():
            values = " | ".join(f"{row[column]:.3f}" for column in columns)
            print(f"| {kind} | {name} | {values} |", flush=True)


def draw_bands(axis, draws, color, label):
    """The 90 % intervals and the mean of draws with shape ``(num_samples, length)``."""
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    axis.fill_between(np.arange(len(low)), low, high, color=color, alpha=0.3, lw=0)
    axis.plot(draws.mean(0), color=color, lw=1, label=label)


def draw_trajectory(axis, shown, seen, variable, index=0):
    """One variable of a trajectory: the methods' bands, the truth and what is seen of it."""
    for (label, draws), color in zip(shown.items(), ("C0", "C3"), strict=True):
        draw_bands(axis, np.asarray(draws[:, index, :, variable]), color, label)
    axis.plot(seen.truth[index, :, variable], "k", lw=0.8, label="truth")
    steps = np.flatnonzero(seen.mask[index, :, variable])
    axis.plot(steps, seen.truth[index, steps, variable], "k.", ms=5, label="truth where observed")


def show_windows(cases, path):
    """The first window: a row of axes for each of three variables, a column per likelihood."""
    figure, axes = plt.subplots(
        3,
        len(cases),
        figsize=(3 * len(cases), 6),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for column, (kind, (shown, seen)) in zip(axes.T, cases.items(), strict=True):
        column[0].set_title(kind)
        column[-1].set_xlabel("step")
        for variable, axis in enumerate(column):
            draw_trajectory(axis, shown, seen, variable)
    for variable, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(f"$x_{variable + 1}$")
    save_with_legend(figure, axes[0, 0], path)


def show_long(shown, seen, path):
    """Three variables of the first long trajectory."""
    figure, axes = plt.subplots(3, 1, figsize=(10, 6), sharex=True, layout="constrained")
    for variable, axis in enumerate(axes):
        draw_trajectory(axis, shown, seen, variable)
        axis.set_ylabel(f"$x_{variable + 1}$")
    axes[-1].set_xlabel("step")
    save_with_legend(figure, axes[0], path)


def save_with_legend(figure, axis, path):
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def choose_shown(draws, args):
    """The draws of the learned prior with the most particles, and of the particle smoother."""
    num = args.particles[-1]
    label = f"learned prior, {num} particle{'s' if num > 1 else ''}"
    return {
        label: draws[f"learned, {num}"],
        "particle smoother": draws["particle smoother"],
    }


def make_priors(rng_key, system, clean, args):
    """A prior learned from observations, one trained on clean windows, and EM's metrics."""
    key_seen, key_net, key_learn, key_clean = jax.random.split(rng_key, 4)
    data = observe(key_seen, "linear", clean, args.seen, args.noise)
    untrained = make_prior(key_net, clean.shape[1:], args)
    learned, rows = learn(key_learn, system, untrained, data, args)
    return {"learned": learned, "clean": train_on_clean(key_clean, untrained, clean, args)}, rows


def lengthen(prior, args):
    """The prior of long trajectories, from that of windows."""
    denoiser = ndp.WindowDenoiser(prior.denoiser, args.long, stride=args.stride)
    return ndp.DiffusionPrior(denoiser, sampler=prior.sampler)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    system, stem = SYSTEMS[args.system], f"assimilation_{args.system}"
    keys = jax.random.split(jax.random.key(args.seed), 7)
    clean = simulate(keys[0], system, args.num_windows, LENGTH)
    fresh = simulate(keys[1], system, max(args.num_judged, 1024), LENGTH)
    climate = simulate(keys[2], system, args.num_filtered, 1)[:, 0]
    result = {"args": vars(args), "priors": {}, "windows": {}}

    priors, result["em"] = make_priors(keys[3], system, clean, args)
    for name, prior in priors.items():
        prior.save(output / f"{stem}_{name}")
        result["priors"][name] = judge_prior(keys[4], system, prior, fresh)
        show_row(name, result["priors"][name])

    cases = {}
    for i, kind in enumerate(args.likelihoods):
        print(f"\n{kind}", flush=True)
        key_seen, key_draws = jax.random.split(jax.random.fold_in(keys[5], i))
        truth = fresh[: args.num_judged]
        seen = observe(key_seen, kind, truth, args.sparse_seen, args.sparse_noise)
        draws, result["windows"][kind] = compare(
            key_draws, kind, priors, system, climate, seen, args
        )
        cases[kind] = choose_shown(draws, args), seen
    show_windows(cases, output / f"{stem}_windows.png")

    print(f"\n{args.long} steps", flush=True)
    key_truth, key_seen, key_draws = jax.random.split(keys[6], 3)
    truth = simulate(key_truth, system, args.num_long, args.long)
    seen = observe(key_seen, "linear", truth, args.sparse_seen, args.sparse_noise)
    priors = {name: lengthen(prior, args) for name, prior in priors.items()}
    draws, result["long"] = compare(key_draws, "linear", priors, system, climate, seen, args)
    show_long(choose_shown(draws, args), seen, output / f"{stem}_long.png")
    show_table(result["windows"] | {f"linear, {args.long} steps": result["long"]})
    (output / f"{stem}.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="out", help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="defaults for a GPU (not measured)")
    parser.add_argument("--system", choices=SYSTEMS, default="lorenz63")
    parser.add_argument("--seen", type=float, default=0.25, help="fraction seen in training")
    parser.add_argument("--noise", type=float, default=0.05, help="of what is seen in training")
    parser.add_argument("--sparse-seen", type=float, default=0.125, help="fraction assimilated")
    parser.add_argument("--sparse-noise", type=float, default=0.25, help="of what is assimilated")
    parser.add_argument(
        "--particles", type=int, nargs="+", default=[1, 16], help="numbers in assimilation"
    )
    parser.add_argument("--likelihoods", nargs="+", choices=LIKELIHOODS, default=LIKELIHOODS)
    parser.add_argument("--network", choices=("mlp", "unet"))
    for name, value in SMALL.items():
        if name != "network":
            parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    if args.gpu:
        parser.set_defaults(**GPU)
        args = parser.parse_args(argv)
    return args


if __name__ == "__main__":
    main(parse_args())
