"""Learn a prior of galaxies from gravitationally lensed images alone, then infer unknown lenses.

Galaxies are seen through lenses (a singular isothermal ellipsoid with external shear), blurred by
a point spread function, in noise. Expectation maximization learns a prior of the galaxies from
images of which the lenses are known. It restores galaxies behind other lenses, and is compared
with semilinear inversion, with the Gaussian that EM starts from, and with a prior of clean
galaxies. Then lens and galaxy of new images are inferred together, by particle marginal
Metropolis-Hastings, and the evidence tells whether a lens has shear.

    python examples/lensing.py --output out                     # two cores
    python examples/lensing.py --gpu --data galaxies.npy --output out
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
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC
from scipy.linalg import eigh
from scipy.stats import binom, kstest

import numpyro_diffprior as ndp
from numpyro_diffprior.metrics.ranks import coverage, sbc_ranks

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Widths of fields and of the point spread function (full width at half maximum), in arcseconds.
SOURCE_FIELD, IMAGE_FIELD, SEEING = 1.56, 3.36, 0.2
CENTRAL = 0.5  # the radius within which pixels of sources are judged

# `num_sgd_steps` is per iteration; the prior of clean sources takes as many in all.
SMALL = {
    "source_size": 12,
    "image_size": 24,
    "num_systems": 1024,
    "num_gaussian_iterations": 24,
    "num_iterations": 16,
    "num_events": 128,
    "num_particles": 4,
    "num_sgd_steps": 128,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "ema_decay": 0.99,
    "network": "mlp",
    "width": 256,
    "num_steps": 20,
    "num_judged": 24,
    "num_samples": 19,
    "num_blind": 16,
    "num_simulated": 0,
    "num_chains": 2,
    "num_warmup": 20,
    "num_updates": 200,
    "num_blind_particles": 64,
    "num_blind_steps": 32,
    "num_at_once": 8,
    "num_compared": 2,
    "num_lenses": 32,
    "num_evidence_steps": 64,
}
GPU = SMALL | {
    "source_size": 32,
    "image_size": 64,
    "num_systems": 16_384,
    "num_iterations": 64,
    "num_events": 2048,
    "num_sgd_steps": 1024,
    "batch_size": 256,
    "ema_decay": 0.999,
    "network": "unet",
    "width": 64,
    "num_steps": 32,
    "num_judged": 256,
    "num_blind": 256,
    "num_simulated": 256,
    "num_updates": 500,
    "num_blind_steps": 64,
    "num_compared": 16,
    "num_lenses": 256,
    "num_evidence_steps": 128,
}
LABELS = {"gaussian": "Gaussian", "learned": "learned", "clean": "clean prior"}
BASELINE = "semilinear"
SHEARS = (0.0, 0.03, 0.1)  # of the systems of which evidences are compared


class Lens(NamedTuple):
    """A singular isothermal ellipsoid with external shear.

    Attributes:
        center: Its position in arcseconds, with shape ``(*batch, 2)``.
        einstein_radius: In arcseconds, on the intermediate axis, with shape ``(*batch,)``.
        ellipticity: (1 - q) / (1 + q) for an axis ratio q, times cosine and sine of twice the
            position angle, with shape ``(*batch, 2)``.
        shear: The external shear, with shape ``(*batch, 2)``.
    """

    center: jax.Array
    einstein_radius: jax.Array
    ellipticity: jax.Array
    shear: jax.Array


# The prior of lenses: an Einstein radius about one, and no direction that is preferred.
WIDTHS = Lens(0.05, 0.1, 0.15, 0.05)


class Optics(NamedTuple):
    """A camera.

    Attributes:
        x: The positions of rays in arcseconds, several to a pixel, with shape ``(rays, rays)``.
        y: The same along the other axis.
        blur: The point spread function and the binning of rays, along one axis, with shape
            ``(pixels, rays)``.
    """

    x: jax.Array
    y: jax.Array
    blur: jax.Array


class Systems(NamedTuple):
    """Lensed galaxies: what there is, and what is seen."""

    source: jax.Array  # (n, source_size, source_size)
    lens: Lens
    y: jax.Array  # (n, image_size, image_size)


def deflect(lens, x, y):
    """The deflection at positions, a pair of arrays with shape ``(*batch, *x.shape)``.

    Kormann, Schneider and Bartelmann (1994); Keeton (2001), astro-ph/0102341.
    """
    (x0, y0), (e1, e2), (g1, g2) = (
        jnp.moveaxis(jnp.expand_dims(v, tuple(range(-x.ndim, 0))), lens.einstein_radius.ndim, 0)
        for v in (lens.center, lens.ellipticity, lens.shear)
    )
    radius = jnp.expand_dims(lens.einstein_radius, tuple(range(-x.ndim, 0)))
    x, y = x - x0, y - y0
    # Small terms make the derivatives finite for circular lenses and in the center.
    ellipticity = jnp.minimum(jnp.sqrt(e1**2 + e2**2 + 1e-8), 0.95)
    ratio = (1 - ellipticity) / (1 + ellipticity)
    angle = jnp.arctan2(e2, e1 + 1e-12) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    f = jnp.sqrt(1 - ratio**2)
    psi = jnp.sqrt(ratio**2 * u**2 + v**2 + 1e-8)
    scale = radius * jnp.sqrt(ratio) / f
    a, b = scale * jnp.arctan(f * u / psi), scale * jnp.arctanh(f * v / psi)
    return cos * a - sin * b + g1 * x + g2 * y, sin * a + cos * b + g2 * x - g1 * y


def interpolate(position, size):
    """Weights of the pixels along an axis of the source, ``(*position.shape, size)``.

    Cubic convolution (Keys, 1981), whose derivative is continuous, unlike that of linear
    interpolation: leapfrog steps are not disturbed where a ray passes a pixel.
    """
    place = position * size / SOURCE_FIELD + (size - 1) / 2
    t = jnp.abs(place[..., None] - jnp.arange(size))
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((2.5 - 0.5 * t) * t - 4) * t + 2
    return jnp.where(t < 1, near, jnp.where(t < 2, far, 0))


def trace_rays(lens, optics, size):
    """Weights of the pixels of a source, with shape ``(*batch, rays, rays, size**2)``."""
    x, y = deflect(lens, optics.x, optics.y)
    rows, columns = interpolate(optics.y - y, size), interpolate(optics.x - x, size)
    weights = rows[..., :, None] * columns[..., None, :]
    return weights.reshape(*x.shape, size * size)


def render(lens, source, optics):
    """The image of sources behind lenses, with shape ``(*batch, pixels, pixels)``."""
    weights = trace_rays(lens, optics, source.shape[-1])
    flat = source.reshape(*source.shape[:-2], -1)
    weights = weights.reshape(*weights.shape[:-3], -1, weights.shape[-1])
    rays = jnp.einsum("...ij,...j->...i", weights, flat)
    return optics.blur @ rays.reshape(*rays.shape[:-1], *optics.x.shape) @ optics.blur.T


def model(prior, lens, optics, noise, y=None):
    """Images of sources behind known lenses."""
    with numpyro.plate("systems", len(lens.center)):
        lens = Lens(*(numpyro.subsample(v, event_dim=v.ndim - 1) for v in lens))
        y = None if y is None else numpyro.subsample(y, event_dim=2)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(render(lens, x, optics), noise).to_event(2), obs=y)


def blind_model(prior, optics, noise, y=None):
    """The image of a source behind an unknown lens."""
    lens = Lens(
        numpyro.sample("center", dist.Normal(jnp.zeros(2), WIDTHS.center).to_event(1)),
        numpyro.sample("einstein_radius", dist.Normal(1, WIDTHS.einstein_radius)),
        numpyro.sample("ellipticity", dist.Normal(jnp.zeros(2), WIDTHS.ellipticity).to_event(1)),
        numpyro.sample("shear", dist.Normal(jnp.zeros(2), WIDTHS.shear).to_event(1)),
    )
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(render(lens, x, optics), noise).to_event(2), obs=y)


SCALES = np.array([WIDTHS.center] * 2 + [WIDTHS.einstein_radius] + 2 * [WIDTHS.ellipticity])
SCALES = np.append(SCALES, 2 * [WIDTHS.shear]).astype("float32")


def to_lens(z):
    """The lenses of standard normal vectors of seven elements, or of five without shear."""
    values = SCALES[: z.shape[-1]] * z
    shear = values[..., 5:] if z.shape[-1] == 7 else jnp.zeros_like(values[..., :2])
    return Lens(values[..., :2], 1 + values[..., 2], values[..., 3:5], shear)


def to_vector(lens):
    """Center, Einstein radius, ellipticity and shear in one vector, ``(*batch, 7)``."""
    radius = jnp.asarray(lens.einstein_radius)[..., None]
    return jnp.concatenate([lens.center, radius, lens.ellipticity, lens.shear], axis=-1)


def from_vector(vector):
    """The lenses of vectors that `to_vector` returns."""
    return Lens(vector[..., :2], vector[..., 2], vector[..., 3:5], vector[..., 5:])


PARAMETERS = (
    "center, x",
    "center, y",
    "Einstein radius",
    "ellipticity 1",
    "ellipticity 2",
    "shear 1",
    "shear 2",
)


def make_optics(image_size, rays_per_pixel=2):
    num = image_size * rays_per_pixel
    place = (np.arange(num) - (num - 1) / 2) * IMAGE_FIELD / num
    x, y = np.meshgrid(place, place)
    deviation = SEEING / np.sqrt(8 * np.log(2))
    kernel = np.exp(-(((place[:, None] - place) / deviation) ** 2) / 2)
    kernel /= kernel.sum(1).max()  # light is lost at the borders
    blur = kernel.reshape(image_size, rays_per_pixel, num).mean(1)
    return Optics(*(jnp.asarray(a, "float32") for a in (x, y, blur)))


def make_galaxy(rng, size, rays_per_pixel=4):
    """An inclined exponential disk with spiral arms, a bulge and star-forming clumps."""
    num = size * rays_per_pixel
    place = (np.arange(num) - (num - 1) / 2) * SOURCE_FIELD / num
    x, y = np.meshgrid(place, place)
    x, y = x - rng.normal(0, 0.06), y - rng.normal(0, 0.06)
    angle, ratio = rng.uniform(0, np.pi), rng.uniform(0.4, 1)
    u = np.cos(angle) * x + np.sin(angle) * y
    v = (np.cos(angle) * y - np.sin(angle) * x) / ratio
    radius, length = np.hypot(u, v) + 1e-3, rng.uniform(0.15, 0.28)
    phase = 2 * np.arctan2(v, u) + rng.choice([-2, 2]) * np.log(radius) / rng.uniform(0.25, 0.6)
    strength = rng.uniform(0, 0.9) * radius / (radius + 0.08)
    light = np.exp(-radius / length) * (1 + strength * np.cos(phase - rng.uniform(0, 2 * np.pi)))
    light += rng.uniform(0, 3) * np.exp(-3 * np.sqrt(radius / 0.15))
    for _ in range(rng.integers(2, 9)):
        distance, turn, width = length * rng.gamma(2), rng.uniform(0, 2 * np.pi), 0.06
        a, b = u - distance * np.cos(turn), v - distance * np.sin(turn)
        square = (a**2 + (ratio * b) ** 2) / width**2
        light += rng.uniform(0.1, 0.7) * np.exp(-square / 2)
    light = light.reshape(size, rays_per_pixel, size, rays_per_pixel).mean((1, 3))
    return light / light.max() * rng.lognormal(0, 0.2)


def read_galaxies(path, size):
    """Read images of galaxies from a file .npy, and average them to pixels of the source.

    Raises:
        ValueError: If the file does not hold square images that can be averaged.
    """
    images = np.load(path)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.shape[1] % size:
        raise ValueError(
            f"--data: expected an array of shape (galaxies, n, n) with a multiple n of {size} in "
            f"{path}, got shape {images.shape}; crop or resample the images."
        )
    blocks = images.shape[1] // size
    images = images.reshape(len(images), size, blocks, size, blocks).mean((2, 4))
    return images / np.median(images.max((1, 2)))


def make_galaxies(rng, num, args):
    if args.data is None:
        return np.stack([make_galaxy(rng, args.source_size) for _ in range(num)])
    galaxies = read_galaxies(args.data, args.source_size)
    if len(galaxies) < num:
        raise ValueError(f"--data: expected {num} galaxies or more, got {len(galaxies)}.")
    return galaxies[rng.permutation(len(galaxies))[:num]]


@partial(jax.jit, static_argnames="shear")
def observe(rng_key, source, optics, noise, shear=None):
    """See sources behind random lenses; all lenses have the given shear, if there is one."""
    key_lens, key_angle, key_noise = jax.random.split(rng_key, 3)
    lens = to_lens(jax.random.normal(key_lens, (len(source), 7)))
    if shear is not None:
        angle = jax.random.uniform(key_angle, (len(source),), maxval=2 * jnp.pi)
        lens = lens._replace(shear=shear * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1))
    y = render(lens, source, optics)
    return Systems(source, lens, y + noise * jax.random.normal(key_noise, y.shape))


def make_prior(rng_key, args):
    """An untrained network; EM and `fit_denoiser` give it the mean and covariance of sources."""
    shape, rngs = (args.source_size,) * 2, nnx.Rngs(rng_key)
    if args.network == "mlp":
        net = ndp.MLP(shape, features=(args.width,) * 3, rngs=rngs)
    else:
        channels = (args.width // 4, args.width // 2, args.width)
        net = ndp.UNet(shape, channels=channels, num_blocks=1, rngs=rngs)
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
    """Turn an image by quarters, at random, or reflect it: galaxies have no direction."""
    key_turn, key_reflect = jax.random.split(rng_key)
    x = jnp.where(jax.random.bernoulli(key_reflect), x, x.T)
    quarters = jnp.stack([jnp.rot90(x, i) for i in range(4)])
    return quarters[jax.random.randint(key_turn, (), 0, 4)]


def make_em(args):
    return ndp.EM(
        model,
        make_optimizer(args),
        e_step=ndp.EStep(
            args.num_particles,
            guidance=ndp.MMPS(ndp.guidance.GaussianCovariance(), look_ahead=True),
            num_events=args.num_events,
        ),
        m_step=ndp.MStep(
            num_steps=args.num_sgd_steps,
            batch_size=args.batch_size,
            ema_decay=args.ema_decay,
            augment=turn,
        ),
        start=ndp.GaussianStart(args.num_gaussian_iterations),
    )


def learn(rng_key, em, start, systems, optics, args):
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
        systems.lens,
        optics,
        args.noise,
        systems.y,
        progress_bar=False,
        callback=record,
        init_state=start,
    )
    return result.prior, rows


def train_on_clean(rng_key, prior, sources, args):
    """The same network, trained on clean sources in as many steps."""
    fit = ndp.fit_denoiser(
        rng_key,
        prior.denoiser,
        sources,
        optimizer=make_optimizer(args),
        num_steps=args.num_iterations * args.num_sgd_steps,
        batch_size=args.batch_size,
        ema_decay=args.ema_decay,
        augment=turn,
    )
    return prior.replace_denoiser(fit.denoiser)


def to_gaussian(prior):
    """The Gaussian that a network starts from, without the network."""
    net = prior.denoiser
    return prior.replace_denoiser(ndp.GaussianDenoiser(net.mean, net.cov, unit=net.unit))


def restore(rng_key, prior, systems, optics, args):
    """Draw sources behind known lenses, with shape ``(draws, n, size, size)``."""
    # One particle is exact for a Gaussian.
    gaussian = isinstance(prior.denoiser, ndp.GaussianDenoiser)
    return ndp.sample_posterior(
        rng_key,
        model,
        prior,
        systems.lens,
        optics,
        args.noise,
        systems.y,
        num_samples=args.num_samples,
        num_particles=1 if gaussian else args.num_posterior_particles,
        guidance=ndp.MMPS(ndp.guidance.GaussianCovariance(), look_ahead=not gaussian),
    ).samples["x"]


@partial(jax.jit, static_argnames="size")
def make_operator(lens, optics, size):
    """The matrix from sources to images, with shape ``(*batch, pixels, size**2)``."""
    rays = trace_rays(lens, optics, size)
    rows = jnp.einsum("pi,...ijk->...pjk", optics.blur, rays)
    pixels = jnp.einsum("qj,...pjk->...pqk", optics.blur, rows)
    return pixels.reshape(*pixels.shape[:-3], -1, size * size)


def make_curvature(size):
    """The quadratic form of squared second differences along both axes; zero outside."""
    second = np.diff(np.eye(size + 2), n=2, axis=0)[:, 1:-1]
    square = second.T @ second
    return np.kron(square, np.eye(size)) + np.kron(np.eye(size), square)


def invert_semilinear(rng, systems, optics, noise, num_samples):
    """Draws under a Gaussian prior of curvature, of the strength of greatest evidence.

    Warren and Dye (2003), Suyu et al. (2006). Each system has a strength of its own.
    """
    n, size = systems.source.shape[:2]
    curvature, strengths = make_curvature(size), np.logspace(-2, 6, 161)
    draws = np.empty((num_samples, n, size, size))
    operators = np.asarray(make_operator(systems.lens, optics, size), float)
    for i, (operator, y) in enumerate(zip(operators, np.asarray(systems.y, float), strict=True)):
        fisher = operator.T @ operator / noise**2
        # Both quadratic forms are diagonal in these directions, the curvature's one.
        values, directions = eigh(fisher, curvature)
        score = directions.T @ (operator.T @ y.ravel()) / noise**2
        total = np.maximum(values, 0) + strengths[:, None]
        evidence = np.sum(score**2 / total - np.log(total) + np.log(strengths)[:, None], axis=1)
        total = total[np.argmax(evidence)]
        x = score / total + rng.standard_normal((num_samples, len(score))) / np.sqrt(total)
        draws[:, i] = (x @ directions.T).reshape(num_samples, size, size)
    return jnp.asarray(draws, "float32")


def find_center(size):
    """The pixels of a source next to its center."""
    place = (np.arange(size) - (size - 1) / 2) * SOURCE_FIELD / size
    return np.hypot(place[:, None], place) < CENTRAL


def judge(draws, systems, optics, noise):
    """Scores of draws of sources, with shape ``(draws, n, size, size)``."""
    truth, where = systems.source, find_center(systems.source.shape[-1])
    rmse = jnp.sqrt(jnp.mean((draws.mean(0) - truth) ** 2))
    inside = coverage(draws, truth, levels=(0.5, 0.9), where=where)
    residual = systems.y - jax.lax.map(lambda x: render(systems.lens, x, optics), draws)
    scores = {
        "psnr": -20 * jnp.log10(rmse),
        "rmse": rmse,
        "cover50": inside[0],
        "cover90": inside[1],
        "chi_square": jnp.mean((residual / noise) ** 2),
    }
    return {name: float(value) for name, value in scores.items()}


class LensFit(NamedTuple):
    """A Gaussian approximation of the posterior of a lens, in units of the prior's widths."""

    mode: jax.Array
    cov: jax.Array


def fit_lens(prior, optics, noise, y, num_parameters=7):
    """Fit a lens, the source integrated out as if the prior were its Gaussian (Laplace).

    Steps of Fisher scoring from the middle of the prior, none of them longer than the prior is
    wide. The noise of the first steps is larger, since the posterior has other modes.
    """
    denoiser, size = prior.denoiser, prior.event_shape[0]
    basis = jnp.eye(size * size)
    factor = denoiser.to_data(jax.vmap(denoiser.cov.sqrt_matvec, out_axes=-1)(basis))
    mean = prior.mean.ravel()

    def energy(z, noise):
        """Minus the log-density of lens and image, and the factors of the image's covariance."""
        operator = make_operator(to_lens(z), optics, size) / noise
        gain, residual = operator @ factor, y.ravel() / noise - operator @ mean
        lower = jnp.linalg.cholesky(basis + gain.T @ gain)
        w = jax.scipy.linalg.cho_solve((lower, True), gain.T @ residual)
        square = z @ z + residual @ residual - w @ (gain.T @ residual)
        logdet = jnp.sum(jnp.log(jnp.diagonal(lower)))
        return square / 2 + logdet, (gain, lower, mean + factor @ w)

    def step(z, noise):
        slope, (gain, lower, source) = jax.grad(energy, has_aux=True)(z, noise)
        source = source.reshape(size, size)
        slopes = jax.jacfwd(lambda z: render(to_lens(z), source, optics).ravel() / noise)(z)
        shared = jax.scipy.linalg.cho_solve((lower, True), gain.T @ slopes)
        fisher = jnp.eye(len(z)) + slopes.T @ (slopes - gain @ shared)
        cov = jnp.linalg.inv((fisher + fisher.T) / 2)
        move = -cov @ slope
        return z + move / jnp.maximum(jnp.linalg.norm(move), 1), cov

    noises = noise * jnp.concatenate([jnp.geomspace(20, 1, 16), jnp.ones(8)])
    mode, covs = jax.lax.scan(step, jnp.zeros(num_parameters), noises)
    return LensFit(mode, covs[-1])


def infer_lens(rng_key, prior, optics, noise, y, args):
    """Chains of lens and source of one image, from the fit of the lens."""
    key_start, key_run = jax.random.split(rng_key)
    fit = fit_lens(prior, optics, noise, y)
    # The sites of the lens, in the order of their names.
    root = SCALES[:, None] * jnp.linalg.cholesky(fit.cov)
    proposal = dist.MultivariateStudentT(5, to_vector(to_lens(fit.mode)), root)
    start = from_vector(proposal.sample(key_start, (args.num_chains,)))
    kernel = ndp.PMMH(
        blind_model,
        num_particles=args.num_blind_particles,
        sampler=ndp.samplers.MultistepSDE(args.num_blind_steps),
        proposal=proposal,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=args.num_warmup,
        num_samples=args.num_updates,
        num_chains=args.num_chains,
        chain_method=jax.vmap,
        progress_bar=False,
    )
    mcmc.run(key_run, prior, optics, noise, y, init_params=start._asdict())
    draws = mcmc.get_samples(group_by_chain=True)
    return draws["x"], to_vector(Lens(*(draws[name] for name in Lens._fields))), fit


def infer_lenses(rng_key, prior, systems, optics, args):
    """Chains of all systems, some of them at once."""

    @jax.jit
    def infer(prior, optics, keys, y):
        return jax.lax.map(
            lambda inputs: infer_lens(inputs[0], prior, optics, args.noise, inputs[1], args),
            (keys, y),
            batch_size=args.num_at_once,
        )

    keys = jax.random.split(rng_key, len(systems.y))
    return jax.block_until_ready(infer(prior, optics, keys, systems.y))


def judge_lenses(x, lens, systems, optics, args):
    """Scores of chains, with shapes ``(n, chains, updates, ...)``, and the lenses' ranks."""
    truth = np.asarray(to_vector(systems.lens))
    draws, sources = (jnp.swapaxes(a.reshape(len(a), -1, *a.shape[3:]), 0, 1) for a in (lens, x))
    values = np.asarray(lens, float)
    r_hat = np.stack([split_gelman_rubin(chains) for chains in values])
    ess = np.stack([effective_sample_size(chains) for chains in values])
    inside = jnp.stack(
        [coverage(draws[..., i], truth[:, i], levels=(0.5, 0.9)) for i in range(truth.shape[1])]
    )
    where = find_center(systems.source.shape[-1])
    covered = coverage(sources, systems.source, levels=(0.5, 0.9), where=where)

    def residual(inputs):
        vector, source = inputs
        return jnp.mean(
            ((systems.y - render(from_vector(vector), source, optics)) / args.noise) ** 2
        )

    ranks = sbc_ranks(jnp.swapaxes(draws, 0, 1), truth, rng_key=jax.random.key(0))
    uniform = (np.asarray(ranks) + 0.5) / (len(draws) + 1)
    scores = {
        "cover50": inside[:, 0].tolist(),
        "cover90": inside[:, 1].tolist(),
        "pvalue": [float(kstest(u, "uniform").pvalue) for u in uniform.T],
        "deviation": np.median(np.asarray(draws).std(0), axis=0).tolist(),
        "rmse": np.sqrt(np.mean((np.asarray(draws.mean(0)) - truth) ** 2, axis=0)).tolist(),
        "r_hat": np.median(r_hat, axis=0).tolist(),
        "r_hat_large": float(np.mean(r_hat.max(1) > 1.1)),
        "ess": np.median(ess, axis=0).tolist(),
        "source_cover50": float(covered[0]),
        "source_cover90": float(covered[1]),
        "source_psnr": float(-10 * jnp.log10(jnp.mean((sources.mean(0) - systems.source) ** 2))),
        "chi_square": float(jnp.mean(jax.lax.map(residual, (draws, sources)))),
    }
    return scores, uniform


def estimate_lens_evidence(rng_key, prior, optics, y, num_parameters, args):
    """The log-evidence of an image, and its error, with source and lens integrated out.

    Lenses are drawn about the fit; the evidence given each of them is an unbiased estimate, so
    that their weighted mean is one, too.
    """
    key_draw, key_evidence = jax.random.split(rng_key)
    fit = _fit_lens(prior, optics, args.noise, y, num_parameters)
    proposal = dist.MultivariateStudentT(5, fit.mode, jnp.linalg.cholesky(fit.cov))
    z = proposal.sample(key_draw, (args.num_lenses,))
    given = ndp.log_evidence(
        key_evidence,
        model,
        prior,
        to_lens(z),
        optics,
        args.noise,
        jnp.broadcast_to(y, (len(z), *y.shape)),
        num_estimates=2,
        num_particles=args.num_posterior_particles,
        sampler=ndp.samplers.MultistepSDE(args.num_evidence_steps),
        progress_bar=False,
    ).value
    prior_of_lens = dist.Normal(jnp.zeros(num_parameters), 1).to_event(1)
    weights = given + prior_of_lens.log_prob(z) - proposal.log_prob(z)
    value = jax.nn.logsumexp(weights) - jnp.log(len(z))
    error = jnp.std(jnp.exp(weights - value), ddof=1) / jnp.sqrt(len(z))
    return float(value), float(error)


_fit_lens = jax.jit(fit_lens, static_argnums=4)


def compare_evidence(rng_key, prior, sources, optics, args):
    """Log Bayes factors of lenses with shear against lenses without, by the true shear."""
    rows = []
    for shear, part in zip(SHEARS, np.split(sources, len(SHEARS)), strict=True):
        key, rng_key = jax.random.split(rng_key)
        systems = observe(key, part, optics, args.noise, shear=shear)
        for y in systems.y:
            keys = jax.random.split(rng_key, 3)
            rng_key = keys[0]
            (with_shear, a), (without, b) = (
                estimate_lens_evidence(key, prior, optics, y, num, args)
                for key, num in zip(keys[1:], (7, 5), strict=True)
            )
            rows.append(
                {"shear": shear, "log_bayes": with_shear - without, "error": float(np.hypot(a, b))}
            )
            print(
                "shear {shear:.2f}: log Bayes factor {log_bayes:.1f} +- {error:.1f}".format(
                    **rows[-1]
                ),
                flush=True,
            )
    return rows


def show_rows(rows, path, num_images=8):
    """Plot a row of images for each name; deviations and residuals have colors of their own."""
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(9, len(rows) * 7.5 / num_images), layout="constrained"
    )
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        options = {"cmap": "inferno", "vmin": 0, "vmax": 1}
        if name in ("deviation", "error of the mean"):
            options = {"cmap": "magma", "vmin": 0, "vmax": 0.15}
        elif name == "residual":
            options = {"cmap": "RdBu", "vmin": -4, "vmax": 4}
        images = np.pad(np.asarray(images)[:num_images], ((0, 0), (0, 0), (0, 1)))
        axis.imshow(np.concatenate(images, axis=1), interpolation="nearest", **options)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def show_restored(draws, systems, path):
    """Plot images, true sources, means, draws, and deviations next to errors of the means."""
    rows = {"image": systems.y, "truth": systems.source}
    rows |= {f"{LABELS.get(name, name)} mean": x.mean(0) for name, x in draws.items()}
    name = "learned" if "learned" in draws else next(iter(draws))
    rows |= {f"{LABELS.get(name, name)}, draw {i + 1}": draws[name][i] for i in range(2)}
    rows["deviation"] = draws[name].std(0)
    rows["error of the mean"] = np.abs(draws[name].mean(0) - systems.source)
    show_rows(rows, path)


def show_samples(rng_key, priors, galaxies, path):
    """Plot galaxies and samples of every prior."""
    rows = {"galaxies": galaxies}
    rows |= {LABELS[name]: prior.sample(rng_key, (8,)) for name, prior in priors.items()}
    show_rows(rows, path)


def show_blind(x, lens, systems, optics, noise, path):
    """Plot images and sources that are inferred with their lenses, and residuals of a draw."""
    source, seen = x[:, 0, -1], render(from_vector(lens[:, 0, -1]), x[:, 0, -1], optics)
    flat = x.reshape(len(x), -1, *x.shape[3:])
    rows = {
        "image": systems.y,
        "residual": (systems.y - seen) / noise,
        "truth": systems.source,
        "mean": flat.mean(1),
        "one draw": source,
        "deviation": flat.std(1),
        "error of the mean": jnp.abs(flat.mean(1) - systems.source),
    }
    show_rows(rows, path)


def show_ranks(uniform, path):
    """Plot the distributions of the ranks of lens parameters, minus that of exact draws."""
    level = np.linspace(0, 1, 201)
    figure, axes = plt.subplots(
        1, len(uniform), figsize=(5 * len(uniform), 3.5), sharey=True, squeeze=False
    )
    for axis, (name, ranks) in zip(axes[0], uniform.items(), strict=True):
        num = len(ranks)
        band = np.stack([binom.ppf(q, num, level) / num - level for q in (0.025, 0.975)])
        axis.fill_between(level, *band, color="0.85", lw=0, label="95 % of exact draws")
        for parameter, u in zip(PARAMETERS, ranks.T, strict=True):
            cumulative = np.searchsorted(np.sort(u), level, side="right") / len(u)
            axis.plot(level, cumulative - level, lw=1, label=parameter)
        axis.set(title=name, xlabel="rank / draws")
    axes[0, 0].set_ylabel("cumulative distribution - uniform")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside center right", fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show_table(table):
    print(f"\n{'':14s}   PSNR   RMSE   50 %   90 %  chi-square")
    for name, row in table.items():
        cells = " ".join(f"{value:6.3f}" for value in row.values())
        print(f"{LABELS.get(name, name):14s} {cells}", flush=True)


def show_scores(name, scores):
    print(
        f"\n{name}: chi-square {scores['chi_square']:.3f}, source {scores['source_psnr']:.1f} dB,"
        f" within {scores['source_cover50']:.2f} and {scores['source_cover90']:.2f};"
        f" R-hat above 1.1 in {scores['r_hat_large']:.0%} of the systems\n"
        f"{'':16s} deviation   RMSE   50 %   90 %      p  R-hat    ESS"
    )
    columns = ("deviation", "rmse", "cover50", "cover90", "pvalue", "r_hat", "ess")
    for i, parameter in enumerate(PARAMETERS):
        cells = " ".join(f"{scores[column][i]:6.3f}" for column in columns)
        print(f"{parameter:16s}    {cells}", flush=True)


def make_priors(rng_key, systems, optics, args):
    """Return the priors that were asked for by name, EM's metrics, and seconds."""
    keys = jax.random.split(rng_key, 4)
    began = time.process_time()
    untrained, em = make_prior(keys[0], args), make_em(args)
    start = em.init(keys[1], untrained, systems.lens, optics, args.noise, systems.y)
    priors, rows = {"gaussian": to_gaussian(start.prior)}, []
    seconds = {"gaussian": time.process_time() - began}
    for name in args.priors:
        began = time.process_time()
        if name == "learned":
            priors[name], rows = learn(keys[2], em, start, systems, optics, args)
        elif name == "clean":
            priors[name] = train_on_clean(keys[3], untrained, systems.source, args)
        seconds[name] = time.process_time() - began if name != "gaussian" else seconds[name]
    return {name: priors[name] for name in args.priors}, rows, seconds


def infer_blindly(rng_key, prior, sources, optics, args, output):
    """Infer lens and source of new images; return scores, and write pictures.

    Sources are new galaxies, which test sampler and prior, or draws of the prior, which test the
    sampler alone.
    """
    scores, uniform = {}, {}
    for i, (name, source) in enumerate(sources.items()):
        key_data, key_run = jax.random.split(jax.random.fold_in(rng_key, i))
        systems = observe(key_data, source, optics, args.noise)
        began = time.process_time()
        x, lens, fit = infer_lenses(key_run, prior, systems, optics, args)
        scores[name], uniform[name] = judge_lenses(x, lens, systems, optics, args)
        scores[name]["seconds"] = time.process_time() - began
        error = to_vector(to_lens(fit.mode)) - to_vector(systems.lens)
        scores[name]["rmse_of_fit"] = jnp.sqrt(jnp.mean(error**2, axis=0)).tolist()
        show_scores(name, scores[name])
        if name == "galaxies":
            show_blind(x, lens, systems, optics, args.noise, output / "lensing_blind.png")
    show_ranks(uniform, output / "lensing_ranks.png")
    return scores


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    keys = jax.random.split(jax.random.key(args.seed), 8)
    optics = make_optics(args.image_size)
    counts = (
        args.num_systems,
        args.num_judged,
        args.num_blind,
        len(SHEARS) * args.num_compared,
    )
    galaxies = jnp.asarray(make_galaxies(rng, sum(counts), args), "float32")
    train, test, fresh, compared = jnp.split(galaxies, np.cumsum(counts)[:-1])
    systems = observe(keys[0], train, optics, args.noise)
    seen = observe(keys[1], test, optics, args.noise)
    priors, rows, seconds = make_priors(keys[2], systems, optics, args)
    result = {"args": vars(args), "em": rows, "seconds": seconds, "table": {}}

    draws = {BASELINE: invert_semilinear(rng, seen, optics, args.noise, args.num_samples)}
    for name, prior in priors.items():
        prior.save(output / f"lensing_{name}")
        draws[name] = restore(keys[3], prior, seen, optics, args)
    for name, x in draws.items():
        result["table"][name] = judge(x, seen, optics, args.noise)
    show_table(result["table"])
    show_restored(draws, seen, output / "lensing_restored.png")
    show_samples(keys[4], priors, test, output / "lensing_samples.png")

    prior = priors.get("learned", next(iter(priors.values())))
    sources = {"galaxies": fresh} if args.num_blind else {}
    if args.num_simulated:
        sources["draws of the prior"] = prior.sample(keys[5], (args.num_simulated,))
    if sources:
        result["blind"] = infer_blindly(keys[6], prior, sources, optics, args, output)
    if args.num_compared:
        began = time.process_time()
        result["evidence"] = compare_evidence(keys[7], prior, compared, optics, args)
        seconds["evidence"] = time.process_time() - began
    (output / "lensing.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="out", help="folder of the results")
    parser.add_argument("--data", help="file .npy of square images of galaxies (default: drawn)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="defaults for a GPU; not yet measured")
    parser.add_argument("--priors", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--noise", type=float, default=0.05, help="for a brightness of about one")
    parser.add_argument("--network", choices=("mlp", "unet"))
    parser.add_argument("--num-posterior-particles", type=int, default=16, help="after EM")
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
