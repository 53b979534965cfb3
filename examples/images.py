"""Learn a prior of images from images of which most pixels are hidden, with several guidances.

The experiment with corrupted images of the paper (Rozet et al., NeurIPS 2024, arXiv 2405.13712,
section 5.2), on Fashion-MNIST or CIFAR-10: pixels from -2 to 2, of which `--hidden` are hidden at
random, in noise of 0.001. Expectation maximization learns a prior for each guidance of its
E-steps: MMPS with Tweedie's covariance and `--max-steps` of conjugate gradients (one in the
paper, three by default in this package), the paper's two heuristics for the covariance, and four
particles with the Gaussian covariance. They are compared with the Gaussian prior that they start
from, and with the same network trained on the clean images.

    python examples/images.py --output out                     # two cores
    python examples/images.py --gpu --output out               # all 60,000 images
    python examples/images.py --paper --data cifar-10-batches-bin --output out
"""

import argparse
import gzip
import json
import time
from dataclasses import replace
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
from numpyro_diffprior.metrics.frechet import frechet_distance
from numpyro_diffprior.metrics.ranks import coverage
from numpyro_diffprior.metrics.scores import crps

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = "/usr/share/datasets/fashion-mnist"
SCALE = 2.0
SAMPLERS = {"multistep": ndp.samplers.MultistepSDE, "ddpm": ndp.samplers.DDPM}
E_STEPS = {
    "tweedie": ndp.EStep(num_particles=1, guidance=ndp.MMPS()),
    "identity": ndp.EStep(1, guidance=ndp.MMPS(ndp.guidance.IsotropicPriorCovariance())),
    "flat": ndp.EStep(1, guidance=ndp.MMPS(ndp.guidance.FlatPriorCovariance())),
    "particles": ndp.EStep(4, guidance=ndp.MMPS(ndp.guidance.GaussianCovariance())),
}
SUMMARIES = {
    "low-rank": ndp.linalg.LowRankSummary,
    "stationary-low-rank": ndp.linalg.StationaryLowRankSummary,
}
LABELS = {
    "gaussian": "Gaussian",
    "tweedie": "Tweedie",
    "identity": "(I + 1/\u03c3\u00b2)\u207b\u00b9",
    "flat": "\u03c3\u00b2 I",
    "particles": "Gaussian, 4 particles",
    "clean": "clean prior",
}

# `num_sgd_steps` is per iteration; the prior of clean images takes as many in all.
SMALL = {
    "num_images": 1024,
    "num_iterations": 5,
    "num_sgd_steps": 256,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "ema_decay": 0.99,
    "channels": (8, 16, 32),
    "num_blocks": 1,
    "attention": (),
    "dropout": 0.0,
    "summary": "stationary-low-rank",
    "rank": 32,
    "num_gaussian_iterations": 16,
    "sampler": "multistep",
    "num_steps": 32,
    "max_steps": 2,
    "max_batch_size": 8,
    "num_generated": 512,
    "num_judged": 32,
    "num_samples": 20,
}
GPU = SMALL | {
    "num_images": 60_000,
    "num_iterations": 8,
    "num_sgd_steps": 1024,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "ema_decay": 0.999,
    "channels": (32, 64, 128),
    "max_batch_size": 4096,
    "num_generated": 8192,
    "num_judged": 512,
}
# The network and the training of the published script, without its augmentation of images.
PAPER = GPU | {
    "num_images": 50_000,
    "num_iterations": 32,
    "num_sgd_steps": 50_000,
    "learning_rate": 2e-4,
    "ema_decay": 0.9999,
    "channels": (128, 256, 384),
    "num_blocks": 5,
    "attention": (1,),
    "dropout": 0.1,
    "summary": "low-rank",
    "rank": 64,
    "sampler": "ddpm",
    "num_steps": 256,
    "max_steps": 1,
    "max_batch_size": 256,
}


class Data(NamedTuple):
    """Clean images and their observations, to learn from and to restore."""

    clean: jax.Array
    mask: jax.Array
    y: jax.Array
    test: jax.Array
    test_mask: jax.Array
    test_y: jax.Array


def model(prior, mask, noise, y=None):
    event_dim = mask.ndim - 1
    with numpyro.plate("images", mask.shape[0]):
        mask = numpyro.subsample(mask, event_dim=event_dim)
        y = None if y is None else numpyro.subsample(y, event_dim=event_dim)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).mask(mask).to_event(event_dim), obs=y)


def read_images(folder, part):
    """Read pixels, with shape ``(n, height, width[, channels])``, and labels, all as bytes.

    Args:
        folder: A folder with the idx files of Fashion-MNIST (or MNIST), gzipped or not, or with
            the binary version of CIFAR-10.
        part: ``"train"`` or ``"test"``.

    Raises:
        ValueError: If there are no such files, or if one is not what its name says.
    """
    folder = Path(folder)
    batches = sorted(folder.glob({"train": "data_batch_*.bin", "test": "test_batch.bin"}[part]))
    if batches:
        rows = np.concatenate([_read_cifar(path) for path in batches])
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
    prefix = {"train": "train", "test": "t10k"}[part]
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte")
    return pixels, _read_idx(folder / f"{prefix}-labels-idx1-ubyte")


def _read_cifar(path):
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % 3073:
        raise ValueError(
            f"--data: expected rows of 3,073 bytes in {path} (a label, 3 x 32 x 32 pixels), got "
            f"{content.size:,} bytes; take the binary version of CIFAR-10."
        )
    return content.reshape(-1, 3073)


def _read_idx(path):
    zipped = path.with_name(path.name + ".gz")
    if zipped.exists():
        content = gzip.decompress(zipped.read_bytes())
    elif path.exists():
        content = path.read_bytes()
    else:
        raise ValueError(
            f"--data: expected {path.name}[.gz] of Fashion-MNIST, or CIFAR-10's data_batch_*.bin "
            f"and test_batch.bin, in {path.parent}; found neither. Debian's package "
            f"dataset-fashion-mnist installs the former to {DATA}; for files in another folder, "
            "pass --data."
        )
    num_axes = content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * num_axes], ">i4")
    if content[:3] != b"\0\0\x08" or len(content) != 4 + 4 * num_axes + shape.prod():
        raise ValueError(
            f"--data: expected bytes in the idx format in {path}, got another header or length; "
            "copy the file anew."
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def scale(pixels, white=SCALE):
    """Return bytes as numbers; black is ``-white``."""
    return jnp.asarray(white * (pixels / 127.5 - 1), "float32")


def hide(rng_key, clean, hidden, noise):
    """Return which pixels are seen, in all channels at once, and their values, else NaN."""
    key_mask, key_noise = jax.random.split(rng_key)
    seen = jax.random.bernoulli(key_mask, 1 - hidden, clean.shape[:3])
    mask = jnp.broadcast_to(seen.reshape(seen.shape + (1,) * (clean.ndim - 3)), clean.shape)
    y = clean + noise * jax.random.normal(key_noise, clean.shape)
    return mask, jnp.where(mask, y, jnp.nan)


def make_data(rng_key, train, test, args):
    """Hide pixels of the first training images, and of the first test images."""
    key_train, key_test = jax.random.split(rng_key)
    clean, test = scale(train[: args.num_images]), scale(test)
    judged = test[: args.num_judged]
    return Data(
        clean,
        *hide(key_train, clean, args.hidden, args.noise),
        test,
        *hide(key_test, judged, args.hidden, args.noise),
    )


class Classifier(nnx.Module):
    """A small convolutional network; its last hidden layer has 64 features."""

    def __init__(self, shape, num_classes, *, rngs):
        self.shape = (*shape, 1)[:3]
        options = {"kernel_size": (3, 3), "strides": 2, "rngs": rngs}
        self.first = nnx.Conv(self.shape[-1], 16, **options)
        self.second = nnx.Conv(16, 32, **options)
        size = 32 * -(-shape[0] // 4) * -(-shape[1] // 4)
        self.hidden = nnx.Linear(size, 64, rngs=rngs)
        self.last = nnx.Linear(64, num_classes, rngs=rngs)

    def features(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x.reshape(-1, *self.shape)))))
        return nnx.relu(self.hidden(x.reshape(len(x), -1)))

    def __call__(self, x):
        return self.last(self.features(x))


def train_classifier(rng_key, pixels, labels, args, batch_size=128):
    """Train a classifier of clean images."""
    x, labels, num_steps = scale(pixels), jnp.asarray(labels), args.num_features_steps
    key_net, key_train = jax.random.split(rng_key)
    net = Classifier(x.shape[1:], int(labels.max()) + 1, rngs=nnx.Rngs(key_net))
    graph, weights = nnx.split(net)
    optimizer = make_optimizer(optax.cosine_decay_schedule(2e-3, num_steps))

    @jax.jit
    def fit(weights, x, labels):
        def loss(weights, index):
            logits = nnx.merge(graph, weights)(x[index])
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, labels[index]
            ).mean()

        def step(carry, key):
            weights, state = carry
            index = jax.random.randint(key, (batch_size,), 0, len(x))
            update, state = optimizer.update(jax.grad(loss)(weights, index), state)
            return (optax.apply_updates(weights, update), state), None

        start = weights, optimizer.init(weights)
        return jax.lax.scan(step, start, jax.random.split(key_train, num_steps))[0][0]

    return nnx.merge(graph, fit(weights, x, labels))


def make_prior(rng_key, shape, args):
    net = ndp.UNet(
        shape,
        spatial_dims=2,
        channels=args.channels,
        num_blocks=args.num_blocks,
        attention=args.attention,
        dropout=args.dropout,
        rngs=nnx.Rngs(rng_key),
    )
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=make_sampler(args))


def make_sampler(args):
    return SAMPLERS[args.sampler](args.num_steps)


def make_optimizer(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def make_e_step(name, args):
    """Return the E-step of a guidance, or how draws under the other two priors are made."""
    e_step = replace(E_STEPS.get(name, E_STEPS["tweedie"]), max_batch_size=args.max_batch_size)
    if name == "gaussian":
        # Exact for a Gaussian.
        return replace(e_step, guidance=ndp.MMPS(ndp.guidance.GaussianCovariance()))
    if e_step.guidance == ndp.MMPS():
        return replace(e_step, guidance=ndp.MMPS(max_steps=args.max_steps))
    return e_step


def anneal(args):
    """A learning rate that falls to zero in the last third of the training."""
    num_steps = args.num_iterations * args.num_sgd_steps
    constant = optax.constant_schedule(args.learning_rate)
    falling = optax.cosine_decay_schedule(args.learning_rate, -(-num_steps // 3))
    return optax.join_schedules([constant, falling], [num_steps - num_steps // 3])


def make_em(name, optimizer, args):
    m_step = ndp.MStep(
        num_steps=args.num_sgd_steps, batch_size=args.batch_size, ema_decay=args.ema_decay
    )
    return ndp.EM(
        model,
        optimizer,
        e_step=make_e_step(name, args),
        m_step=m_step,
        start=ndp.GaussianStart(args.num_gaussian_iterations, SUMMARIES[args.summary](args.rank)),
    )


def learn(rng_key, name, start, data, optimizer, args):
    """Run EM with a guidance; return the prior, and a row of metrics per iteration."""
    rows = []

    def record(state, metrics):
        row = {key: float(value) for key, value in metrics._asdict().items()}
        rows.append({"iteration": state.num_iterations} | row)
        print(
            f"{name:9s} {state.num_iterations:3d}  loss {row['loss']:.3f}"
            f"  chi-square {row['reduced_chi_square']:.2f}"
            f"  E {row['e_step_seconds']:.0f} s  M {row['m_step_seconds']:.0f} s",
            flush=True,
        )

    result = make_em(name, optimizer, args).run(
        rng_key,
        args.num_iterations,
        start.prior,
        data.mask,
        args.noise,
        data.y,
        progress_bar=False,
        callback=record,
        init_state=start,
    )
    return result.prior, rows


def train_on_clean(rng_key, prior, clean, optimizer, args):
    """The same network, trained on the clean images in as many steps."""
    fit = ndp.fit_denoiser(
        rng_key,
        prior.denoiser,
        clean,
        optimizer=optimizer,
        num_steps=args.num_iterations * args.num_sgd_steps,
        batch_size=args.batch_size,
        ema_decay=args.ema_decay,
        summary=ndp.linalg.LowRankSummary(args.rank),
    )
    return prior.replace_denoiser(fit.denoiser)


def generate(rng_key, prior, args):
    """Draw samples of a prior, a batch at a time."""
    size = min(args.max_batch_size, args.num_generated)
    keys = jax.random.split(rng_key, -(-args.num_generated // size))
    return _generate(keys, prior, size)[: args.num_generated]


@partial(jax.jit, static_argnums=2)
def _generate(keys, prior, size):
    x = jax.lax.map(lambda key: prior.sample(key, (size,)), keys)
    return x.reshape(-1, *prior.event_shape)


def judge(draws, truth, mask):
    """Scores of the hidden pixels."""
    error = jnp.mean((draws.mean(0) - truth) ** 2, where=~mask)
    # Pixels that are the same in nearly all images would count as covered or not by chance.
    varies = truth.std(0) > 0.05 * SCALE
    inside = coverage(draws, truth, levels=(0.5, 0.9), where=~mask & varies)
    return {
        "crps": float(jnp.mean(crps(draws, truth), where=~mask)),
        "rmse": float(jnp.sqrt(error)),
        "cover50": float(inside[0]),
        "cover90": float(inside[1]),
    }


def restore(rng_key, name, prior, data, args):
    """Draw test images from their posteriors, with the guidance of the E-step."""
    e_step = make_e_step(name, args)
    options = e_step.options(prior.sampler)
    return ndp.sample_posterior(
        rng_key,
        model,
        prior,
        data.test_mask,
        args.noise,
        data.test_y,
        num_samples=args.num_samples,
        num_particles=options.num_particles,
        guidance=options.guidance,
        max_batch_size=args.max_batch_size,
    ).samples["x"]


def to_colors(images):
    """Return colors, with shape ``(n, height, width, 3)``; hidden pixels are blue."""
    x = np.asarray(images)
    x = x if x.ndim == 4 else np.repeat(x[..., None], 3, axis=-1)
    colors = np.clip((x / SCALE + 1) / 2, 0, 1)
    return np.where(np.isnan(x), np.array([0.23, 0.35, 0.55]), colors)


def show_rows(rows, path):
    """Plot a row of images for each name."""
    strips = []
    for images in rows.values():
        framed = np.pad(to_colors(images), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
        strips.append(np.concatenate(list(framed), axis=1))
    picture = np.concatenate(strips)
    height = len(strips[0])
    size = 8 / picture.shape[1] * picture.shape[0]
    figure = plt.figure(figsize=(8, size))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(picture, interpolation="nearest")
    axis.set_yticks(height * (np.arange(len(rows)) + 0.5), rows)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def show_table(result, args):
    print(
        f"\n{args.hidden:.0%} of the pixels hidden, noise {args.noise:g}; Frechet distance of"
        f" {args.num_generated} clean images: {result['floor']:.2f}"
    )
    columns = ("frechet", "crps", "rmse", "cover50", "cover90", "seconds")
    print(f"{'prior':16s} " + " ".join(f"{column:>8s}" for column in columns))
    for name, row in result["table"].items():
        values = " ".join(f"{row[column]:8.3f}" for column in columns)
        print(f"{LABELS[name]:16s} {values}", flush=True)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(args.seed), 6)
    (train, labels), (test, test_labels) = (read_images(args.data, p) for p in ("train", "test"))
    data = make_data(keys[0], train, test, args)
    classifier = train_classifier(keys[1], train[:20_000], labels[:20_000], args)
    accuracy = float(jnp.mean(classifier(data.test).argmax(-1) == test_labels))
    print(
        f"the classifier of the features is right for {accuracy:.0%} of the test images",
        flush=True,
    )
    features = partial(nnx.jit(Classifier.features), classifier)
    truth = features(data.test)
    floor = float(frechet_distance(features(data.clean[: args.num_generated]), truth))

    # One optimizer for all priors: with another one, the training would be compiled anew.
    optimizer = make_optimizer(anneal(args))
    untrained = make_prior(keys[2], data.clean.shape[1:], args)
    start = make_em("tweedie", optimizer, args).init(
        keys[3], untrained, data.mask, args.noise, data.y
    )
    num_shown = min(16, args.num_generated)
    restored = {"truth": data.test[: args.num_judged][:16], "observed": data.test_y[:16]}
    samples = {"truth": data.test[:num_shown]}
    result = {"args": vars(args), "accuracy": accuracy, "floor": floor, "table": {}, "em": {}}
    for name in args.priors:
        began = time.perf_counter()
        if name == "gaussian":
            prior = start.prior
        elif name == "clean":
            prior = train_on_clean(keys[4], untrained, data.clean, optimizer, args)
        else:
            prior, result["em"][name] = learn(keys[3], name, start, data, optimizer, args)
        seconds = time.perf_counter() - began
        prior.save(output / f"images_{name}")
        generated = generate(keys[5], prior, args)
        draws = restore(keys[5], name, prior, data, args)
        scores = {"frechet": float(frechet_distance(features(generated), truth))}
        scores |= judge(draws, data.test[: args.num_judged], data.test_mask)
        result["table"][name] = scores | {"seconds": seconds}
        restored[LABELS[name]] = draws[0, :16]
        samples[LABELS[name]] = generated[:num_shown]
        # After every prior, since a later one may take hours.
        (output / "images.json").write_text(json.dumps(result, indent=1))
        show_rows(restored, output / "images_restored.png")
        show_rows(samples, output / "images_samples.png")
        show_table(result, args)
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="out", help="folder of the results")
    parser.add_argument("--data", default=DATA, help="folder of Fashion-MNIST or binary CIFAR-10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="defaults for 60,000 images: estimated, not measured, to take about ten minutes per "
        "prior on an H100, and four times as long with particles",
    )
    parser.add_argument("--paper", action="store_true", help="defaults as in the paper")
    parser.add_argument("--priors", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--hidden", type=float, default=0.75, help="0.25, 0.5, 0.75 in the paper")
    parser.add_argument("--noise", type=float, default=1e-3, help="for pixels from -2 to 2")
    parser.add_argument(
        "--num-features-steps", type=int, default=1000, help="of the classifier of the features"
    )
    parser.add_argument("--channels", type=int, nargs="+", help="widths of the U-Net's levels")
    parser.add_argument("--attention", type=int, nargs="*", help="the levels that have it")
    parser.add_argument("--sampler", choices=SAMPLERS)
    parser.add_argument(
        "--summary", choices=SUMMARIES, help="what the Gaussians' factors are beside"
    )
    for name, value in SMALL.items():
        if name not in ("channels", "attention", "sampler", "summary"):
            parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    if args.gpu or args.paper:
        parser.set_defaults(**(PAPER if args.paper else GPU))
        args = parser.parse_args(argv)
    return args


if __name__ == "__main__":
    main(parse_args())
