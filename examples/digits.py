"""Restore handwritten digits of which most pixels are hidden, without ever seeing a whole one.

Half of the pixels of every digit (`--hidden` for more) are hidden at random, the rest are noisy.
Expectation maximization learns a diffusion prior from these observations alone; with it the hidden
pixels are drawn from their posterior. The result is judged beside the Gaussian prior that the same
observations give, and beside a diffusion prior of the same network trained on the clean digits.

    python examples/digits.py --output out
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import MCMC, Predictive
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

import numpyro_diffprior as ndp
from numpyro_diffprior.metrics.frechet import frechet_distance
from numpyro_diffprior.metrics.ranks import coverage

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

GRAY = matplotlib.colormaps["gray"].with_extremes(bad="#3a5a8c")  # hidden pixels are blue
NOISE = 0.1
NUM_TRAIN = 1536


class Data(NamedTuple):
    """Digits on a scale from -1 to 1, and what is seen of those to learn from."""

    clean: jax.Array
    test: jax.Array
    mask: jax.Array
    y: jax.Array


def model(prior, mask, y=None):
    with numpyro.plate("images", mask.shape[0]):
        mask = numpyro.subsample(mask, event_dim=2)
        y = None if y is None else numpyro.subsample(y, event_dim=2)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).mask(mask).to_event(2), obs=y)


def hide(key_mask, key_noise, clean, hidden):
    """What is seen of digits, and where; hidden pixels are NaN."""
    mask = jax.random.bernoulli(key_mask, 1 - hidden, clean.shape)
    noise = NOISE * jax.random.normal(key_noise, clean.shape)
    return mask, jnp.where(mask, clean + noise, jnp.nan)


def make_data(rng_key, hidden, num_train=NUM_TRAIN):
    """Scikit-learn's digits in random order."""
    key_order, key_mask, key_noise = jax.random.split(rng_key, 3)
    digits = jax.random.permutation(
        key_order, jnp.asarray(load_digits().images / 8 - 1, "float32")
    )
    clean, test = digits[:num_train], digits[num_train:]
    return Data(clean, test, *hide(key_mask, key_noise, clean, hidden))


def make_features(seed=0):
    """The hidden layer of a small classifier of clean digits."""
    images, labels = load_digits(return_X_y=True)
    classifier = MLPClassifier((64,), alpha=1e-2, max_iter=300, random_state=seed)
    classifier.fit(images / 8 - 1, labels)
    weights, bias = jnp.asarray(classifier.coefs_[0]), jnp.asarray(classifier.intercepts_[0])
    return jax.jit(lambda x: jax.nn.relu(x.reshape(len(x), -1) @ weights + bias))


def make_prior(rng_key, width=512, dropout=0.0):
    net = ndp.MLP((8, 8), features=(width,) * 3, dropout=dropout, rngs=nnx.Rngs(rng_key))
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net))


def make_optimizer(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def anneal(learning_rate, num_steps):
    """A learning rate that falls to zero over the whole of a training."""
    return optax.cosine_decay_schedule(learning_rate, num_steps)


def train_on_clean(rng_key, data, features, args, round_steps=1000):
    """The upper bound: the same network, trained on clean digits; the best of its training."""
    clean = data.clean[: round(args.clean_part * len(data.clean))]
    optimizer = make_optimizer(anneal(args.learning_rate, args.clean_rounds * round_steps))
    keys = jax.random.split(rng_key, args.clean_rounds + 1)
    denoiser = make_prior(keys[0], args.width, args.dropout).denoiser
    mean, cov = ndp.linalg.empirical_gaussian(clean.reshape(len(clean), -1))
    denoiser = denoiser.with_gaussian(mean.reshape(8, 8), cov)
    state = ndp.training.init_training(denoiser, optimizer)
    best, distances = None, []
    for key in keys[1:]:
        key_train, key_judge = jax.random.split(key)
        state, _ = ndp.training.train(
            key_train, state, clean, optimizer, num_steps=round_steps, batch_size=256
        )
        prior = ndp.DiffusionPrior(state.averaged)
        distances.append(judge_prior(key_judge, prior, data, features))
        if distances[-1] == min(distances):
            best = prior
    return best, distances


def judge_prior(rng_key, prior, data, features):
    """Fréchet distance of fresh samples to the clean digits."""
    (distance,) = compare(rng_key, prior, features, data.clean)
    return distance


def compare(rng_key, prior, features, *sets, num_samples=8192):
    """Fréchet distances of fresh samples to sets of digits."""
    x = features(prior.sample(rng_key, (num_samples,)))
    return [float(frechet_distance(x, features(digits))) for digits in sets]


def judge_posterior(rng_key, prior, data, num_images=256, num_samples=64, num_particles=4):
    """Error and coverage of the hidden pixels of some digits."""
    mask, y, truth = data.mask[:num_images], data.y[:num_images], data.clean[:num_images]
    draws = ndp.sample_posterior(
        rng_key, model, prior, mask, y, num_samples=num_samples, num_particles=num_particles
    )
    x = draws.samples["x"]
    error = jnp.where(mask, 0, x.mean(0) - truth)
    rmse = jnp.sqrt(jnp.sum(error**2) / jnp.sum(~mask))
    # Pixels that are the same in nearly all digits would count as covered or not by chance.
    inside = coverage(x, truth, levels=(0.5, 0.9), where=~mask & (truth.std(0) > 0.1))
    scores = {"rmse": float(rmse), "cover50": float(inside[0]), "cover90": float(inside[1])}
    return scores, draws


def make_em(args, model=model, *, optimizer=None, num_particles=None, **m_step):
    """EM as the arguments have it, or with another optimizer, number of particles or M-step."""
    if optimizer is None:
        num_steps = args.num_iterations * args.num_sgd_steps
        optimizer = make_optimizer(anneal(args.learning_rate, num_steps))
    num_particles = args.num_particles if num_particles is None else num_particles
    e_step = ndp.EStep(
        num_particles=num_particles,
        num_draws=args.num_draws,
        guidance=ndp.MMPS(ndp.guidance.CalibratedCovariance()),
        max_batch_size=args.batch_size * num_particles,
    )
    m_step = ndp.MStep(num_steps=args.num_sgd_steps, batch_size=args.batch_size, **m_step)
    return ndp.EM(model, optimizer, e_step=e_step, m_step=m_step)


def is_judged(iteration, args):
    return iteration % args.judge_every == 0 or iteration == args.num_iterations


def learn(rng_key, data, features, args):
    """Run EM, and judge the prior every so many iterations, and in the end."""
    key_net, key_em, key_judge = jax.random.split(rng_key, 3)
    em = make_em(args)
    rows = []

    def record(state, metrics):
        if not is_judged(state.num_iterations, args):
            return
        row = {name: float(value) for name, value in metrics._asdict().items()}
        row["iteration"] = state.num_iterations
        row["frechet"] = judge_prior(key_judge, state.prior, data, features)
        rows.append(row)
        print(
            f"{row['iteration']:3d}  loss {row['loss']:.3f}"
            f"  chi-square {row['reduced_chi_square']:.2f}"
            f"  frechet {row['frechet']:.3f}"
            f"  E {row['e_step_seconds']:.1f} s  M {row['m_step_seconds']:.1f} s",
            flush=True,
        )

    prior = make_prior(key_net, args.width, args.dropout)
    start = em.init(key_em, prior, data.mask, data.y)
    result = em.run(
        key_em,
        args.num_iterations,
        prior,
        data.mask,
        data.y,
        progress_bar=False,
        callback=record,
        init_state=start,
    )
    return start.prior, result.prior, rows


def summarize_in_arviz(rng_key, prior, data, output, num_samples):
    """One digit in MCMC: a summary of hidden pixels and a posterior predictive check."""
    key_mcmc, key_predict = jax.random.split(rng_key)
    kernel = ndp.MMPSKernel(model, num_particles=4)
    mcmc = MCMC(
        kernel,
        num_warmup=0,
        num_samples=num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mask, y = data.mask[:1], data.y[:1]
    mcmc.run(key_mcmc, prior, mask, y, extra_fields=("info.ess", "info.residual"))
    predicted = Predictive(model, mcmc.get_samples())(key_predict, prior, mask)["y"][:, 0]
    idata = az.from_numpyro(mcmc, log_likelihood=False)
    summary = az.summary(idata, var_names=["x"])
    summary.to_csv(output / "arviz_summary.csv")
    seen = np.asarray(mask[0])
    observed = np.asarray(y[0])[seen]
    low, high = np.quantile(np.asarray(predicted)[:, seen], [0.05, 0.95], axis=0)
    order = np.argsort(observed)
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.vlines(np.arange(len(order)), low[order], high[order], color="0.7", lw=4)
    axis.plot(observed[order], "k.", label="observed")
    axis.set(xlabel="observed pixel, by value", ylabel="value")
    inside = np.mean((observed > low) & (observed < high))
    axis.set_title(f"90 % predictive intervals hold {inside:.0%} of the observed pixels")
    axis.legend()
    figure.savefig(output / "digits_predictive_check.png", dpi=120)
    plt.close(figure)
    return summary


def show_rows(rows, path, num_images=12):
    """A row of images for each name, on a scale from -1 to 1 or as ``(images, limits, cmap)``."""
    figure, axes = plt.subplots(
        len(rows), num_images, figsize=(0.8 * num_images, 0.1 + 0.86 * len(rows))
    )
    for axis_row, (name, row) in zip(axes, rows.items(), strict=True):
        images, (low, high), cmap = row if isinstance(row, tuple) else (row, (-1, 1), GRAY)
        for axis, image in zip(axis_row, np.asarray(images), strict=False):
            axis.imshow(image, cmap=cmap, vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_restored(draws, data, path, num_images=12):
    """Observation, truth, draws and their mean, deviation and error, a column per digit."""
    x = draws.samples["x"]
    y, truth = data.y[: x.shape[1]], data.clean[: x.shape[1]]
    axes = ndp.plot.restored(
        y, x, truth=truth, num_events=num_images, num_draws=1, vmin=-1, vmax=1, cmap=GRAY
    )
    axes[0, 0].figure.savefig(path, dpi=120)
    plt.close(axes[0, 0].figure)


def show_samples(rng_key, priors, path, num_images=16):
    """Fresh samples of each prior, a row each."""
    rows = {name: prior.sample(rng_key, (num_images,)) for name, prior in priors.items()}
    show_rows(rows, path, num_images)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(args.seed), 6)
    data = make_data(keys[0], args.hidden, args.num_images)
    features = make_features()
    floor = float(frechet_distance(features(data.test), features(data.clean)))
    gaussian, learned, rows = learn(keys[1], data, features, args)
    clean, clean_distances = train_on_clean(keys[2], data, features, args)
    priors = {"Gaussian": gaussian, "learned": learned, "clean": clean}
    table, draws = {}, {}
    for name, prior in priors.items():
        scores, draws[name] = judge_posterior(
            keys[3], prior, data, args.num_judged, args.num_samples
        )
        frechet, heldout = compare(keys[4], prior, features, data.clean, data.test)
        table[name] = {"frechet": frechet, "heldout": heldout} | scores
    show_restored(draws["learned"], data, output / "digits_restored.png")
    show_samples(keys[5], priors, output / "digits_samples.png")
    print(summarize_in_arviz(keys[5], learned, data, output, args.num_samples).head(8))
    print(f"\n{args.hidden:.0%} of the pixels hidden; test against training digits: {floor:.2f}")
    print(f"{'prior':10s} {'Frechet':>8s} {'held out':>8s} {'RMSE':>8s} {'50 %':>8s} {'90 %':>8s}")
    for name, row in table.items():
        print(f"{name:10s} " + " ".join(f"{value:8.3f}" for value in row.values()))
    result = {"iterations": rows, "table": table, "clean": clean_distances, "floor": floor}
    (output / "digits.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=float, default=0.5, help="fraction of hidden pixels")
    parser.add_argument("--num-images", type=int, default=NUM_TRAIN)
    parser.add_argument("--num-iterations", type=int, default=6)
    parser.add_argument("--num-sgd-steps", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-particles", type=int, default=1, help="per draw of the E-step")
    parser.add_argument("--num-draws", type=int, default=4, help="per digit in the E-step")
    parser.add_argument("--judge-every", type=int, default=3, help="of so many iterations")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clean-rounds", type=int, default=2, help="of 1,000 steps each")
    parser.add_argument(
        "--clean-part", type=float, default=1.0, help="part of the digits for the clean prior"
    )
    parser.add_argument("--num-judged", type=int, default=32, help="digits to restore")
    parser.add_argument("--num-samples", type=int, default=32, help="draws per digit")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
