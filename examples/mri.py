"""Learn a prior of magnetic resonance images from undersampled k-space alone.

Axial slices of a T1-weighted volume, turned, shifted and scaled at random, times a smooth random
phase, are seen in a quarter of the columns of k-space, in noise. Expectation maximization learns
a prior of the complex images from these observations. It restores slices of other parts of the
volume: from masks as learned, from other masks, and from four coils. It is compared with
zero-filled images, total variation, the Gaussian that EM starts from, and the same network
trained on the complete images.

    python examples/mri.py --output out                      # two cores
    python examples/mri.py --gpu --data volumes --output out # NIfTI files, or fastMRI's .h5 files
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import h5py
import jax
import jax.numpy as jnp
import matplotlib
import nibabel
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import MCMC, NUTS, Gibbs
from scipy import ndimage
from skimage.metrics import structural_similarity
from skimage.restoration import denoise_tv_chambolle

import numpyro_diffprior as ndp
from numpyro_diffprior.metrics.ranks import coverage

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HEAD = 0.1  # magnitudes of the head are larger, of a maximum of one
TV_WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Case(NamedTuple):
    """How slices are seen: the pattern of the mask, the acceleration and the number of coils."""

    pattern: str
    acceleration: float
    num_coils: int = 1


LEARNED = "columns, R = 4"
CASES = {
    LEARNED: Case("columns", 4),
    "columns, R = 6": Case("columns", 6),
    "variable density, R = 4": Case("density", 4),
    "radial, R = 4": Case("radial", 4),
    "columns, R = 6, four coils": Case("columns", 6, 4),
}
SUMMARIES = ("low-rank", "stationary", "stationary-low-rank")
LABELS = {
    "gaussian": "Gaussian",
    "learned": "learned",
    "clean": "clean prior",
    "complete": "Gaussian of complete images",
}

# `num_sgd_steps` is per iteration; the prior of clean images takes as many in all.
SMALL = {
    "size": 32,
    "num_slices": 512,
    "num_gaussian_iterations": 8,
    "num_iterations": 6,
    "num_events": 128,
    "num_particles": 1,
    "max_steps": 2,
    "num_sgd_steps": 256,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "ema_decay": 0.99,
    "channels": (8, 16, 32),
    "num_blocks": 1,
    "rank": 64,
    "num_steps": 32,
    "max_batch_size": 32,
    "num_tuned": 8,
    "num_judged": 8,
    "num_samples": 19,
    "num_sweeps": 40,
}
GPU = SMALL | {
    "size": 128,
    "num_slices": 8192,
    "num_iterations": 32,
    "num_events": 2048,
    "num_sgd_steps": 2048,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "ema_decay": 0.999,
    "channels": (32, 64, 128),
    "num_blocks": 2,
    "max_batch_size": 256,
    "num_judged": 64,
    "num_samples": 39,
}


class Scans(NamedTuple):
    """Slices, and what is seen of their k-space."""

    image: jax.Array  # (n, size, size, 2), real and imaginary part
    mask: jax.Array  # (n, size, size)
    coils: jax.Array  # (coils, size, size), complex
    y: jax.Array  # (n, coils, size, size), complex


def to_complex(x):
    return jax.lax.complex(x[..., 0], x[..., 1])


def to_pairs(z):
    return jnp.stack([z.real, z.imag], axis=-1)


def model(prior, mask, coils, noise, y=None):
    with numpyro.plate("slices", len(mask)):
        mask = numpyro.subsample(mask, event_dim=2)[..., None, :, :]
        y = None if y is None else numpyro.subsample(y, event_dim=3)
        image = to_complex(numpyro.sample("x", prior))
        k = jnp.fft.fft2(coils * image[..., None, :, :], norm="ortho")
        numpyro.sample("y", dist.Normal(k, noise).mask(mask).to_event(3), obs=y)


def model_of_noise(prior, mask, coils, y=None):
    """The same with an unknown noise level, one for all slices."""
    noise = numpyro.sample("noise", dist.LogNormal(np.log(0.03), 1.0))
    model(prior, mask, coils, noise, y)


def find_template():
    """Return the T1-weighted template that nilearn is distributed with."""
    import nilearn

    name = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    return Path(nilearn.__file__).parent / name


def read_volumes(data):
    """Read volumes as arrays of slices, with shape ``(slices, height, width)``.

    Args:
        data: A file .nii, .nii.gz or .h5 (of single-coil fastMRI), a folder of them, or None for
            the template of nilearn.

    Raises:
        ValueError: If there is no such file, or if its content is not what is expected.
    """
    path = find_template() if data is None else Path(data)
    readers = {".nii": _read_nifti, ".nii.gz": _read_nifti, ".h5": _read_fastmri}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    known = [(file, end) for file in files for end in readers if file.name.endswith(end)]
    if not known or not path.exists():
        raise ValueError(
            f"--data: expected a file .nii, .nii.gz or .h5, or a folder of them, got {path}."
        )
    return [readers[end](file) for file, end in known]


def _read_nifti(path):
    try:
        volume = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj, "float32")
    except nibabel.filebasedimages.ImageFileError as error:
        raise ValueError(f"--data: {path} is no NIfTI file: {error}") from error
    if volume.ndim != 3:
        raise ValueError(
            f"--data: expected a volume of three axes in {path}, got shape {volume.shape}; "
            "choose one volume of a series."
        )
    return volume.transpose(2, 1, 0)[:, ::-1]  # axial slices, the nose up


def _read_fastmri(path):
    with h5py.File(path) as file:
        if "kspace" not in file or file["kspace"].ndim != 3:
            raise ValueError(
                f"--data: expected 'kspace' of shape (slices, height, width) in {path}, as in "
                f"single-coil fastMRI; it contains {dict(file.items())}."
            )
        kspace = file["kspace"][:]
    axes = -2, -1
    centered = np.fft.ifft2(np.fft.ifftshift(kspace, axes), norm="ortho")
    return np.fft.fftshift(centered, axes).astype("complex64")


def crop(volume):
    """Keep slices of which a seventh is head, in a square about the head, maximum one.

    Images of fastMRI have twice the height, which the square cuts.
    """
    volume = volume / np.abs(volume).max()
    side = min(volume.shape[1:])
    head = np.abs(volume) > HEAD
    volume = volume[head.mean((1, 2)) > 1 / 7]
    places = np.argwhere(head.any(0))
    center = places.mean(0)
    side = min(side, int(1.15 * np.ptp(places, axis=0).max()))
    rows, columns = (
        np.clip(np.arange(side) + round(c - side / 2), 0, n - 1)
        for c, n in zip(center, volume.shape[1:], strict=True)
    )
    return volume[:, rows[:, None], columns]


def split(volume, num_slabs=12):
    """Return slices to learn from, and test slices: of the middles of every third slab."""
    place = np.arange(len(volume)) * num_slabs / len(volume)
    in_test = np.floor(place) % 3 == 1
    return volume[~in_test], volume[in_test & (np.abs(place % 1 - 0.5) <= 0.25)]


def make_images(rng, slices, num_images, size):
    """Turn, shift and scale slices, taken in random order again and again; add a phase.

    Complex slices have a phase already.
    """
    ratio = slices.shape[1] / size
    blurred = ndimage.gaussian_filter(slices, (0, ratio / 3, ratio / 3))
    order = np.concatenate(
        [rng.permutation(len(slices)) for _ in range(-(-num_images // len(slices)))]
    )[:num_images]
    images = np.stack([move(rng, blurred[i], size) for i in order])
    if np.iscomplexobj(images):
        return images.astype("complex64")
    phase = np.stack([make_phase(rng, size) for _ in order])
    return (np.maximum(images, 0) * np.exp(1j * phase)).astype("complex64")


def move(rng, image, size):
    """Resample an image after a small rotation, shift and scaling."""
    angle = np.deg2rad(rng.uniform(-15, 15))
    zoom = len(image) / size * rng.uniform(0.9, 1.15)
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center = np.full(2, (len(image) - 1) / 2) + len(image) * rng.uniform(-0.04, 0.04, 2)
    offset = center - turn @ np.full(2, (size - 1) / 2)
    return ndimage.affine_transform(image, turn, offset, (size, size), order=1)


def make_phase(rng, size, deviation=0.5):
    """A Gaussian field of which the correlation length is a quarter of the image."""
    noise = rng.standard_normal((2 * size, 2 * size))
    smooth = ndimage.gaussian_filter(noise, size / 4, mode="wrap")
    return deviation * smooth[:size, :size] / smooth.std()


def make_masks(rng, case, num_masks, size):
    """Which frequencies are seen, in the order of `fft2`: their share is `1 / acceleration`."""
    masks = [PATTERNS[case.pattern](rng, size, case.acceleration) for _ in range(num_masks)]
    return np.fft.ifftshift(np.stack(masks), (1, 2))


def choose_columns(rng, size, acceleration):
    """Random columns, about half of them next to the center."""
    num_columns = round(size / acceleration)
    distance = np.abs(np.arange(size) - size // 2 + 0.5)
    score = np.where(distance <= max(num_columns / 4, 0.5), -1, rng.random(size))
    return np.broadcast_to(np.isin(np.arange(size), np.argsort(score)[:num_columns]), (size, size))


def choose_density(rng, size, acceleration):
    """Random points, of which the density falls with the distance from the center."""
    distance = _distance(size)
    weight = np.where(distance < size / 16, np.inf, (1 + 8 * distance / size) ** -3)
    score = rng.exponential(size=(size, size)) / weight
    return score <= np.sort(score, axis=None)[round(size**2 / acceleration) - 1]


def choose_spokes(rng, size, acceleration):
    """Lines through the center, each turned against the last by the golden angle."""
    mask, angle = np.zeros((size, size), bool), rng.uniform(0, np.pi)
    radius = np.arange(-size, size + 1) / 2
    while mask.mean() < 1 / acceleration:
        points = np.rint(radius * np.array([[np.sin(angle)], [np.cos(angle)]])) + size // 2
        inside = ((points >= 0) & (points < size)).all(0)
        mask[tuple(points[:, inside].astype(int))] = True
        angle += np.pi * (np.sqrt(5) - 1) / 2
    return mask


def _distance(size):
    place = np.arange(size) - size // 2
    return np.hypot(place[:, None], place)


PATTERNS = {"columns": choose_columns, "density": choose_density, "radial": choose_spokes}


def make_coils(num_coils, size):
    """Smooth complex sensitivities around the image, whose squares sum to one."""
    if num_coils == 1:
        return np.ones((1, size, size), "complex64")
    angle = 2 * np.pi * np.arange(num_coils)[:, None, None] / num_coils
    rows, columns = np.meshgrid(*2 * [np.linspace(-1, 1, size)], indexing="ij")
    away = np.hypot(rows - 1.2 * np.sin(angle), columns - 1.2 * np.cos(angle))
    turn = np.exp(1j * (angle + rows * np.cos(angle) + columns * np.sin(angle)))
    coils = np.exp(-(away**2) / 2) * turn
    return (coils / np.sqrt(np.sum(np.abs(coils) ** 2, axis=0))).astype("complex64")


def scan(rng, images, case, noise):
    """Observe complex images in k-space; real and imaginary part have the noise each."""
    size = images.shape[-1]
    mask = make_masks(rng, case, len(images), size)
    coils = make_coils(case.num_coils, size)
    k = np.fft.fft2(coils * images[:, None], norm="ortho")
    y = k + noise * (rng.standard_normal(k.shape) + 1j * rng.standard_normal(k.shape))
    y = np.where(mask[:, None], y, np.nan).astype("complex64")
    return Scans(to_pairs(jnp.asarray(images)), *map(jnp.asarray, (mask, coils, y)))


def make_data(rng, args):
    """Complex images to learn from, and to restore."""
    parts = [split(crop(volume)) for volume in read_volumes(args.data)]
    if min(len(part) for pair in parts for part in pair) == 0:
        raise ValueError("--data: expected a dozen slices with a head in each volume.")
    counts = np.array([args.num_slices, args.num_judged]) / len(parts)
    made = [
        [
            make_images(rng, part, n, args.size)
            for part, n in zip(pair, np.ceil(counts).astype(int))
        ]
        for pair in parts
    ]
    train, test = (np.concatenate(images) for images in zip(*made))
    return rng.permutation(train)[: args.num_slices], rng.permutation(test)[: args.num_judged]


def make_prior(rng_key, scans, args):
    net = ndp.UNet(
        (args.size, args.size, 2),
        spatial_dims=2,
        channels=args.channels,
        num_blocks=args.num_blocks,
        rngs=nnx.Rngs(rng_key),
    )
    sampler = ndp.samplers.MultistepSDE(args.num_steps)
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=sampler)


def make_optimizer(args):
    """Adam with a learning rate that falls to zero in the last third of the training."""
    num_steps = args.num_iterations * args.num_sgd_steps
    constant = optax.constant_schedule(args.learning_rate)
    falling = optax.cosine_decay_schedule(args.learning_rate, -(-num_steps // 3))
    schedule = optax.join_schedules([constant, falling], [num_steps - num_steps // 3])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def make_em(args):
    return ndp.EM(
        model,
        make_optimizer(args),
        e_step=ndp.EStep(
            args.num_particles,
            guidance=make_guidance(args),
            max_batch_size=args.max_batch_size,
            num_events=args.num_events,
        ),
        m_step=ndp.MStep(
            num_steps=args.num_sgd_steps, batch_size=args.batch_size, ema_decay=args.ema_decay
        ),
        start=ndp.GaussianStart(args.num_gaussian_iterations, make_summary(args), 256),
    )


def make_summary(args):
    if args.summary == "low-rank":
        return ndp.linalg.LowRankSummary(args.rank)
    if args.summary == "stationary":
        return ndp.linalg.StationarySummary()
    return ndp.linalg.StationaryLowRankSummary(args.rank)


def make_guidance(args):
    if args.num_particles == 1:
        return ndp.MMPS(max_steps=args.max_steps)
    return ndp.MMPS(ndp.guidance.GaussianCovariance())


def learn(rng_key, em, start, scans, args):
    """Run EM from its start; return the prior, and a row of metrics per iteration."""
    rows = []

    def record(state, metrics):
        row = {key: float(value) for key, value in metrics._asdict().items()}
        rows.append({"iteration": state.num_iterations} | row)
        print(
            f"{state.num_iterations:3d}  loss {row['loss']:.3f}"
            f"  chi-square {row['reduced_chi_square']:.2f}"
            f"  E {row['e_step_seconds']:.0f} s  M {row['m_step_seconds']:.0f} s",
            flush=True,
        )

    result = em.run(
        rng_key,
        args.num_iterations,
        start.prior,
        scans.mask,
        scans.coils,
        args.noise,
        scans.y,
        progress_bar=False,
        callback=record,
        init_state=start,
    )
    return result.prior, rows


def train_on_clean(rng_key, prior, scans, args):
    """The same network, trained on the complete images in as many steps."""
    fit = ndp.fit_denoiser(
        rng_key,
        prior.denoiser,
        scans.image,
        optimizer=make_optimizer(args),
        num_steps=args.num_iterations * args.num_sgd_steps,
        batch_size=args.batch_size,
        ema_decay=args.ema_decay,
        summary=make_summary(args),
    )
    return prior.replace_denoiser(fit.denoiser)


def to_gaussian(prior):
    """The Gaussian that a network starts from, without the network."""
    net = prior.denoiser
    return prior.replace_denoiser(ndp.GaussianDenoiser(net.mean, net.cov, unit=net.unit))


def fit_to_clean(prior, scans, args):
    """The Gaussian of the complete images."""
    mean, cov = jax.jit(make_summary(args))(scans.image)
    return prior.replace_denoiser(ndp.GaussianDenoiser(mean, cov))


def restore(rng_key, prior, scans, args):
    """Draw images from their posteriors, with shape ``(draws, n, size, size, 2)``."""
    gaussian = isinstance(prior.denoiser, ndp.GaussianDenoiser)
    # Exact for a Gaussian.
    guidance = ndp.MMPS(ndp.guidance.GaussianCovariance()) if gaussian else make_guidance(args)
    return ndp.sample_posterior(
        rng_key,
        model,
        prior,
        scans.mask,
        scans.coils,
        args.noise,
        scans.y,
        num_samples=args.num_samples,
        num_particles=1 if gaussian else args.num_particles,
        guidance=guidance,
        max_batch_size=args.max_batch_size,
    ).samples["x"]


def fill_with_zeros(scans):
    """Return the adjoint of the observation: complex images of what is seen of k-space."""
    return _adjoint(np.nan_to_num(scans.y), np.asarray(scans.coils))


def _adjoint(k, coils):
    return np.sum(coils.conj() * np.fft.ifft2(k, norm="ortho"), axis=-3)


def minimize_total_variation(scans, weight, num_steps=50):
    """Minimize squared residuals plus total variation, by accelerated proximal gradient steps."""
    coils, mask, y = np.asarray(scans.coils), scans.mask[:, None], np.nan_to_num(scans.y)
    mask, x = np.asarray(mask), fill_with_zeros(scans)
    last = x
    for step in range(num_steps):
        ahead = x + step / (step + 3) * (x - last)
        residual = y - mask * np.fft.fft2(coils * ahead[:, None], norm="ortho")
        last, x = x, smooth(ahead + _adjoint(residual, coils), weight)
    return x


def smooth(images, weight):
    """The proximal operator of total variation, of real and imaginary parts."""
    options = {"weight": weight, "max_num_iter": 20, "channel_axis": -1}
    pairs = [denoise_tv_chambolle(np.stack([z.real, z.imag], -1), **options) for z in images]
    return np.stack([pair[..., 0] + 1j * pair[..., 1] for pair in pairs])


def choose_weight(scans):
    """Return the weight of the best PSNR, for images that are known."""
    truth = to_complex(scans.image)
    psnr = [compare(minimize_total_variation(scans, w), truth)["psnr"] for w in TV_WEIGHTS]
    return TV_WEIGHTS[int(np.argmax(psnr))]


def compare(images, truth):
    """Peak signal-to-noise ratio and structural similarity of magnitudes, means over images."""
    pairs = list(zip(np.abs(np.asarray(images)), np.abs(np.asarray(truth)), strict=True))
    psnr = [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in pairs]
    ssim = [structural_similarity(a, b, data_range=1.0) for a, b in pairs]
    return {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}


def judge(draws, truth):
    """Scores of the posterior mean, and coverage in the head, of real and imaginary parts."""
    mean, complete = to_complex(draws.mean(0)), to_complex(truth)
    head = np.stack([ndimage.binary_fill_holes(z) for z in np.abs(complete) > HEAD])
    inside = coverage(draws, truth, levels=(0.5, 0.9), where=head[..., None])
    scores = compare(mean, complete)
    return scores | {"cover50": float(inside[0]), "cover90": float(inside[1])}


def infer_noise(rng_key, rng, prior, images, args):
    """Sample noise levels beside the images; return the true ones, means and deviations.

    MMPS draws the images given the noise level, an approximation; NUTS draws the noise level.
    """
    masked = ndp.mask_priors(ndp.complex_noise(model_of_noise))
    mcmc = MCMC(
        Gibbs(
            [(ndp.MMPSKernel(masked, guidance=make_guidance(args)), ["x"]), (NUTS(masked), None)]
        ),
        num_warmup=args.num_sweeps // 2,
        num_samples=args.num_sweeps,
        progress_bar=False,
        jit_model_args=True,
    )
    rows = []
    for key, noise in zip(jax.random.split(rng_key, 3), args.noise * np.array([1, 2, 5])):
        scans = scan(rng, images, CASES[LEARNED], noise)
        mcmc.run(key, prior, scans.mask, scans.coils, scans.y)
        draws = mcmc.get_samples()["noise"]
        rows.append({"true": noise, "mean": float(draws.mean()), "deviation": float(draws.std())})
        print("noise level {true:.3f}: {mean:.4f} +- {deviation:.4f}".format(**rows[-1]))
    return rows


def show_rows(rows, path, num_images=8):
    """Plot a row of images for each name; those of magnitudes in gray."""
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(8, len(rows) * 8 / num_images), layout="constrained"
    )
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        images = np.abs(np.asarray(images))[:num_images]
        spread = name in ("deviation", "error of the mean")
        options = {"cmap": "magma", "vmax": 0.3} if spread else {"cmap": "gray", "vmax": 1}
        axis.imshow(np.concatenate(images, axis=1), vmin=0, interpolation="nearest", **options)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show_restored(draws, baselines, truth, path):
    """Plot truth, baselines, draws, means, and deviations next to the errors of the means."""
    rows = {"truth": to_complex(truth)} | baselines
    rows |= {LABELS[name] + " mean": to_complex(x.mean(0)) for name, x in draws.items()}
    name = "learned" if "learned" in draws else next(iter(draws))
    rows |= {f"{LABELS[name]}, draw {i + 1}": to_complex(draws[name][i]) for i in range(2)}
    # Over real and imaginary part.
    rows["deviation"] = jnp.sqrt(jnp.sum(draws[name].var(0), axis=-1))
    rows["error of the mean"] = to_complex(draws[name].mean(0) - truth)
    show_rows(rows, path)


def show_table(table):
    for case, rows in table.items():
        print(f"\n{case:26s}   PSNR   SSIM   50 %   90 %")
        for name, row in rows.items():
            cells = " ".join(f"{value:6.3f}" for value in row.values())
            print(f"{LABELS.get(name, name):26s} {cells}", flush=True)


def make_baselines(rng, train, scans, args):
    """Return the restored images of both baselines, the weight tuned on images to learn from."""
    results = {}
    for name, seen in scans.items():
        weight = choose_weight(scan(rng, train[: args.num_tuned], CASES[name], args.noise))
        tv = minimize_total_variation(seen, weight)
        results[name] = {"zero-filled": fill_with_zeros(seen), "total variation": tv}
    return results


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    keys = jax.random.split(jax.random.key(args.seed), 6)
    train, test = make_data(rng, args)
    scans = scan(rng, train, CASES[LEARNED], args.noise)
    tests = {name: scan(rng, test, CASES[name], args.noise) for name in args.cases}
    baselines = make_baselines(rng, train, tests, args)
    table = {
        case: {name: compare(x, test) for name, x in rows.items()}
        for case, rows in baselines.items()
    }
    began = time.process_time()
    untrained, em = make_prior(keys[0], scans, args), make_em(args)
    start = em.init(keys[1], untrained, scans.mask, scans.coils, args.noise, scans.y)
    seconds = {"start": time.process_time() - began}
    result = {"args": vars(args), "table": table, "seconds": seconds}
    draws, priors = {}, {}
    for name in args.priors:
        began = time.process_time()
        if name == "gaussian":
            prior = to_gaussian(start.prior)
        elif name == "learned":
            prior, result["em"] = learn(keys[2], em, start, scans, args)
        elif name == "complete":
            prior = fit_to_clean(untrained, scans, args)
        else:
            prior = train_on_clean(keys[3], untrained, scans, args)
        priors[name] = prior
        prior.save(output / f"mri_{name}")
        seconds[name] = time.process_time() - began
        for case, seen in tests.items():
            x = restore(keys[4], prior, seen, args)
            table[case][name] = judge(x, seen.image)
            draws.setdefault(case, {})[name] = x
            # After every case, since a later one may take hours.
            (output / "mri.json").write_text(json.dumps(result, indent=1))
            path = output / f"mri_{list(CASES).index(case)}.png"
            show_restored(draws[case], baselines[case], seen.image, path)
        show_table(table)
    if args.num_noisy and "learned" in priors:
        result["noise"] = infer_noise(
            keys[5], rng, priors["learned"], test[: args.num_noisy], args
        )
        (output / "mri.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="out", help="folder of the results")
    parser.add_argument("--data", help="NIfTI or fastMRI file, or folder (default: nilearn's T1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="defaults for a GPU; not yet measured")
    parser.add_argument("--priors", nargs="+", choices=LABELS, default=list(LABELS)[:3])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--noise", type=float, default=1e-2, help="for magnitudes up to one")
    parser.add_argument("--summary", choices=SUMMARIES, default=SUMMARIES[-1])
    parser.add_argument("--num-noisy", type=int, default=4, help="slices of unknown noise, or 0")
    parser.add_argument("--channels", type=int, nargs="+", help="widths of the U-Net's levels")
    for name, value in SMALL.items():
        if name != "channels":
            parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    if args.gpu:
        parser.set_defaults(**GPU)
        args = parser.parse_args(argv)
    return args


if __name__ == "__main__":
    main(parse_args())
