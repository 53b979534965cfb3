"""Forecast a field that drifts with an unknown wind, with a prior that never saw a whole field.

A tracer on a periodic grid drifts with a constant wind, another one in each window of six frames,
while new anomalies replace old ones slowly. Neither the wind nor that there is one is known:
expectation maximization learns a prior of windows from a quarter of the pixels, in noise. The
prior then restores the first four frames of other windows from a quarter of their pixels, and
forecasts the last two. Given the wind the field is Gaussian, so that the exact posterior is a
mixture over winds, by quadrature; the best Gaussian prior, which has the true mean and covariance,
averages over winds.

    python examples/advection.py --output out          # two cores
    python examples/advection.py --gpu --output out
"""

import argparse
import json
import time
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

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NUM_FRAMES, NUM_SEEN = 6, 4
WIND = 0.7  # the standard deviation of either component, in cells per frame
MEMORY = 0.98  # the correlation of a drifting field with the one a frame before
SCALE = 1.5  # the wavenumber beyond which the power falls
NUM_DIVIDED = 64  # winds of a coarse grid that are divided into 25
PRIORS = ("learned", "clean")

SMALL = {
    "size": 12,
    "num_windows": 4096,
    "num_gaussian_iterations": 16,
    "num_iterations": 16,
    "num_events": 512,
    "num_sgd_steps": 128,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "ema_decay": 0.99,
    "channels": (16, 32),
    "num_blocks": 1,
    "num_steps": 32,
    "num_judged": 24,
    "num_samples": 19,
    "num_winds": 33,
}
GPU = SMALL | {
    "size": 32,
    "num_windows": 16_384,
    "num_iterations": 32,
    "num_events": 4096,
    "num_sgd_steps": 1024,
    "batch_size": 256,
    "ema_decay": 0.999,
    "channels": (64, 128, 256),
    "num_judged": 128,
    "num_winds": 65,
}


class Windows(NamedTuple):
    """Windows of the field, which of their pixels are seen, and what is seen of them."""

    truth: jax.Array  # (n, size, size, frames)
    mask: jax.Array
    y: jax.Array
    wind: jax.Array  # (n, 2), in cells per frame


def wavenumbers(size):
    """Wavenumbers along both axes, in radians per cell, and the power, which sums to one."""
    k = np.fft.fftfreq(size) * size
    square = k[:, None] ** 2 + k**2
    power = (1 + square / SCALE**2) ** -2.5
    # A shift by a fraction of a cell would not keep the highest frequency real.
    power[size // 2] = power[:, size // 2] = power[0, 0] = 0
    return 2 * np.pi * k / size, power / power.sum()


def drift(waves, wind):
    """Move fields, given by their Fourier coefficients ``(*batch, size, size)``, by one frame."""
    k, _ = wavenumbers(waves.shape[-1])
    phase = wind[..., 0, None, None] * k[:, None] + wind[..., 1, None, None] * k
    return jnp.exp(-1j * phase) * waves


def simulate_with(rng_key, wind, size):
    """Windows with shape ``(num, size, size, frames)``, one for each wind."""
    root = size * jnp.sqrt(wavenumbers(size)[1])

    def fresh(key):
        return root * jnp.fft.fft2(jax.random.normal(key, (len(wind), size, size)))

    def advance(waves, key):
        waves = MEMORY * drift(waves, wind) + (1 - MEMORY**2) ** 0.5 * fresh(key)
        return waves, waves

    first, *rest = jax.random.split(rng_key, NUM_FRAMES)
    waves = fresh(first)
    _, later = jax.lax.scan(advance, waves, jnp.stack(rest))
    return jnp.moveaxis(jnp.fft.ifft2(jnp.concatenate([waves[None], later])).real, 0, -1)


@partial(jax.jit, static_argnums=(1, 2))
def simulate(rng_key, num, size):
    """Windows and their winds."""
    key_wind, key_field = jax.random.split(rng_key)
    wind = WIND * jax.random.normal(key_wind, (num, 2))
    return simulate_with(key_field, wind, size), wind


def correlations(wind, size):
    """The covariance of two pixels given the wind, by frames of both and their distance.

    The shape is ``(frames, frames, size, size)``.
    """
    k, power = wavenumbers(size)
    frames = jnp.arange(NUM_FRAMES)
    lag = (frames[:, None] - frames)[..., None, None]
    phase = wind[0] * k[:, None] + wind[1] * k
    return (
        size**2 * MEMORY ** jnp.abs(lag) * jnp.fft.ifft2(power * jnp.exp(-1j * lag * phase)).real
    )


def between(correlation, first, second):
    """The covariance of pixels of a flattened window, given by their indices."""
    size = correlation.shape[-1]
    (i, j, s), (k, m, t) = (
        jnp.unravel_index(index, (size, size, NUM_FRAMES)) for index in (first, second)
    )
    i, j, s = i[:, None], j[:, None], s[:, None]
    return correlation[s, t, (i - k) % size, (j - m) % size]


def covariance(wind, size):
    """The covariance of flattened windows given the wind."""
    index = jnp.arange(size**2 * NUM_FRAMES)
    return between(correlations(wind, size), index, index)


def square_of(half_width, num):
    """Points of a square of so many to a side, with shape ``(num^2, 2)``."""
    points = half_width * jnp.linspace(-1, 1, num)
    return jnp.stack(jnp.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)


def observe(rng_key, truth, wind, frames, fraction, noise):
    """Observe a random fraction of the pixels of the first frames."""
    key_mask, key_noise = jax.random.split(rng_key)
    mask = jax.random.bernoulli(key_mask, fraction, truth.shape)
    mask &= jnp.arange(NUM_FRAMES) < frames
    y = truth + noise * jax.random.normal(key_noise, truth.shape)
    return Windows(truth, mask, jnp.where(mask, y, jnp.nan), wind)


def model(prior, noise, mask, y=None):
    with numpyro.plate("windows", len(mask)):
        mask = numpyro.subsample(mask, event_dim=3)
        y = None if y is None else numpyro.subsample(y, event_dim=3)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).mask(mask).to_event(3), obs=y)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def draw_exactly(rng_key, mask, y, noise, num_seen, num_samples, num_winds):
    """Draw from the exact posterior of a window, a mixture over winds.

    The mixture is summed over a square of winds, whose most probable points are then divided.
    At most ``num_seen`` pixels are seen.
    """
    size = mask.shape[0]
    # Seen pixels first; the same number of rows for every window, of which the rest tell nothing.
    order = jnp.argsort(~mask.ravel(), stable=True)[:num_seen]
    seen = mask.ravel()[order]
    values = jnp.where(seen, y.ravel()[order], 0)

    def factor(wind):
        """The Cholesky factor of the covariance of what is seen."""
        gram = between(correlations(wind, size), order, order)
        gram = jnp.where(seen[:, None] & seen, gram, 0)
        return jnp.linalg.cholesky(gram + jnp.diag(jnp.where(seen, noise**2, 1)))

    def log_joint(wind):
        lower = factor(wind)
        white = jax.scipy.linalg.solve_triangular(lower, values, lower=True)
        log_evidence = -0.5 * jnp.square(white).sum() - jnp.log(jnp.diagonal(lower)).sum()
        return log_evidence - 0.5 * jnp.square(wind / WIND).sum()

    coarse, width = square_of(3.2 * WIND, num_winds), 6.4 * WIND / (num_winds - 1)
    _, best = jax.lax.top_k(jax.lax.map(log_joint, coarse), NUM_DIVIDED)
    fine = (coarse[best][:, None] + square_of(0.4 * width, 5)).reshape(-1, 2)
    key_wind, key_draw = jax.random.split(rng_key)
    log_weights = jax.lax.map(log_joint, fine)
    winds = fine[jax.random.categorical(key_wind, log_weights, shape=(num_samples,))]

    def draw(inputs):
        """Draw a window and what is seen of it, and correct it by the true values (Matheron)."""
        key, wind = inputs
        key_field, key_noise = jax.random.split(key)
        field = simulate_with(key_field, wind[None], size)[0].ravel()
        simulated = field[order] + noise * jax.random.normal(key_noise, values.shape)
        innovation = jnp.where(seen, values - simulated, 0)
        weights = jax.scipy.linalg.cho_solve((factor(wind), True), innovation)
        gain = between(correlations(wind, size), jnp.arange(mask.size), order)
        return field + gain @ jnp.where(seen, weights, 0)

    draws = jax.lax.map(draw, (jax.random.split(key_draw, num_samples), winds))
    return draws.reshape(num_samples, *mask.shape)


def make_prior(rng_key, args):
    """A network of the frames as channels, with periodic boundaries."""
    net = ndp.UNet(
        (args.size, args.size, NUM_FRAMES),
        spatial_dims=2,
        channels=args.channels,
        num_blocks=args.num_blocks,
        padding="periodic",
        rngs=nnx.Rngs(rng_key),
    )
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


def turn(rng_key, x):
    """Reflect a window or exchange its axes, at random: no direction of the wind is preferred."""
    flip_rows, flip_columns, exchange = jax.random.bernoulli(rng_key, shape=(3,))
    x = jnp.where(flip_rows, x[::-1], x)
    x = jnp.where(flip_columns, x[:, ::-1], x)
    return jnp.where(exchange, x.swapaxes(0, 1), x)


def learn(rng_key, prior, data, args):
    """Run EM on a part of the pixels of windows; return the prior, and a row per iteration."""
    em = ndp.EM(
        model,
        make_optimizer(args),
        e_step=ndp.EStep(num_events=args.num_events),
        m_step=ndp.MStep(
            args.num_sgd_steps, args.batch_size, ema_decay=args.ema_decay, augment=turn
        ),
        start=ndp.GaussianStart(
            args.num_gaussian_iterations, summary=ndp.linalg.StationaryLowRankSummary()
        ),
    )
    rows = []

    def record(state, metrics):
        row = {key: float(value) for key, value in metrics._asdict().items()}
        rows.append({"iteration": state.num_iterations} | row)
        print(
            f"{state.num_iterations:3d}  loss {row['loss']:.3f}"
            f"  E {row['e_step_seconds']:.0f} s  M {row['m_step_seconds']:.0f} s",
            flush=True,
        )

    result = em.run(
        rng_key,
        args.num_iterations,
        prior,
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
        ema_decay=args.ema_decay,
        augment=turn,
    )
    return prior.replace_denoiser(fit.denoiser)


def average_over_winds(prior, size, num_winds):
    """The Gaussian prior of the true covariance, a mean over winds."""
    winds = square_of(3.2 * WIND, num_winds)
    weights = jax.nn.softmax(-0.5 * jnp.square(winds / WIND).sum(-1))

    def add(total, inputs):
        wind, weight = inputs
        return total + weight * correlations(wind, size), None

    zero = jnp.zeros((NUM_FRAMES, NUM_FRAMES, size, size))
    mean, _ = jax.lax.scan(add, zero, (winds, weights))
    index = jnp.arange(size**2 * NUM_FRAMES)
    values, vectors = jnp.linalg.eigh(between(mean, index, index))
    cov = ndp.linalg.Dense(jnp.maximum(values, 1e-5), vectors)
    return prior.replace_denoiser(ndp.GaussianDenoiser(jnp.zeros(prior.event_shape), cov))


def judge(draws, truth):
    """Scores of posterior draws, with shape ``(num_samples, *truth.shape)``."""
    # The mean of few draws has an error of its own: calibrated draws have a ratio of one.
    rmse = jnp.sqrt(jnp.mean((draws.mean(0) - truth) ** 2))
    spread = jnp.sqrt(jnp.mean(draws.var(0, ddof=1)) * (1 + 1 / len(draws)))
    inside = coverage(draws, truth, levels=(0.5, 0.9))
    scores = {"rmse": rmse, "spread": spread / rmse, "crps": jnp.mean(crps(draws, truth))}
    scores |= {"cover50": inside[0], "cover90": inside[1]}
    return {name: float(score) for name, score in scores.items()}


def assimilate(rng_key, priors, seen, args):
    """Posterior draws of every method, with shape ``(num_samples, *truth.shape)``."""
    keys = jax.random.split(rng_key, len(seen.mask))
    num_seen = int(seen.mask.sum((1, 2, 3)).max())
    exact = jax.lax.map(
        lambda inputs: draw_exactly(
            *inputs, args.noise, num_seen, args.num_samples, args.num_winds
        ),
        (keys, seen.mask, seen.y),
    )
    draws = {"exact": jnp.moveaxis(exact, 0, 1)}
    for name, prior in priors.items():
        gaussian = isinstance(prior.denoiser, ndp.GaussianDenoiser)
        for num in (1,) if gaussian else args.particles:
            found = ndp.sample_posterior(
                rng_key,
                model,
                prior,
                args.noise,
                seen.mask,
                seen.y,
                num_samples=args.num_samples,
                num_particles=num,
            )
            label = name if gaussian else f"{name}, {num}"
            draws[label] = found.samples["x"]
    return draws


def show(draws, seen, path):
    """Plot what is seen of a window, the truth, means and a draw, frame by frame."""
    truth, mask = np.asarray(seen.truth[0]), np.asarray(seen.mask[0])
    rows = {"seen": np.where(mask, seen.y[0], np.nan), "truth": truth}
    for name, x in draws.items():
        rows[f"{name}: mean"] = np.asarray(x[:, 0].mean(0))
    last = list(draws)[-1]
    rows[f"{last}: a draw"] = np.asarray(draws[last][0, 0])
    figure, axes = plt.subplots(
        len(rows), NUM_FRAMES, figsize=(1.3 * NUM_FRAMES + 2, 1.35 * len(rows)), squeeze=False
    )
    limit = np.abs(truth).max()
    for line, (name, frames) in zip(axes, rows.items(), strict=True):
        for t, axis in enumerate(line):
            axis.imshow(frames[..., t], vmin=-limit, vmax=limit, cmap="RdBu_r")
            axis.set(xticks=[], yticks=[], facecolor="0.9")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for t, axis in enumerate(axes[0]):
        axis.set_title("forecast" if t >= NUM_SEEN else f"frame {t + 1}", fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show_table(table):
    """Print the scores of all methods, as a table in Markdown."""
    columns = ("rmse", "spread", "crps", "cover50", "cover90")
    print("\n| | prior |", " | ".join(columns), "|")
    print("| --- |" + " --- |" * (1 + len(columns)))
    for part, rows in table.items():
        for name, row in rows.items():
            values = " | ".join(f"{row[column]:.3f}" for column in columns)
            print(f"| {part} | {name} | {values} |", flush=True)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(args.seed), 8)
    truth, wind = simulate(keys[0], args.num_windows, args.size)
    data = observe(keys[1], truth, wind, NUM_FRAMES, args.seen, args.noise)
    untrained = make_prior(keys[2], args)
    priors = {"Gaussian": average_over_winds(untrained, args.size, args.num_winds)}
    rows, seconds = [], {}
    for name in args.priors:
        began = time.process_time()
        if name == "learned":
            priors[name], rows = learn(keys[3], untrained, data, args)
        else:
            priors[name] = train_on_clean(keys[4], untrained, truth, args)
        priors[name].save(output / f"advection_{name}")
        seconds[name] = time.process_time() - began

    fresh, wind = simulate(keys[5], args.num_judged, args.size)
    seen = observe(keys[6], fresh, wind, NUM_SEEN, args.seen, args.noise)
    draws = assimilate(keys[7], priors, seen, args)
    parts = {"restored": slice(0, NUM_SEEN), "forecast": slice(NUM_SEEN, None)}
    table = {
        part: {name: judge(x[..., frames], fresh[..., frames]) for name, x in draws.items()}
        for part, frames in parts.items()
    }
    show_table(table)
    show(draws, seen, output / "advection.png")
    result = {"args": vars(args), "em": rows, "seconds": seconds, "table": table}
    (output / "advection.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out", help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="defaults for a GPU (not measured)")
    parser.add_argument("--seen", type=float, default=0.25, help="fraction of the pixels")
    parser.add_argument("--noise", type=float, default=0.1, help="of what is seen")
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--particles", type=int, nargs="+", default=[1])
    for name, value in SMALL.items():
        nargs = "+" if isinstance(value, tuple) else None
        kind = int if nargs else type(value)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, nargs=nargs)
    parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    if args.gpu:
        parser.set_defaults(**GPU)
        args = parser.parse_args(argv)
    return args


if __name__ == "__main__":
    main(parse_args())
