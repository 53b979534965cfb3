"""Posterior draws of a NumPyro model's diffusion site.

The likelihood is read from the model's trace (`numpyro_diffprior.reading`). Guided sampling or the
twisted SMC makes the draws (`numpyro_diffprior.particles.smc`), in blocks of bounded size.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaincc
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import (
    PosteriorSamples,
    block_size,
    merge_stats,
    sample_blocks,
)
from numpyro_diffprior.infer.diagnostics import warn_of_bias
from numpyro_diffprior.infer.folder import DrawsFolder
from numpyro_diffprior.infer.progress import ProgressBar
from numpyro_diffprior.particles.system import SamplingOptions
from numpyro_diffprior.prior import DiffusionPrior, check_sampler
from numpyro_diffprior.reading.checks import check_data
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import Model, check_names

__all__ = ["resolve_options", "sample_posterior"]


def resolve_options(
    default: Sampler,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    independent: bool = True,
) -> SamplingOptions:
    """Fill in the defaults: the prior's sampler, and `MMPS`.

    MMPS uses Tweedie's covariance for one particle, and the Gaussian covariance with look-ahead
    proposals for more.

    Raises:
        ValueError: If ``sampler`` is not a hashable `Sampler` or ``guidance`` not a `Guidance`, or
            if there are several particles and the sampler is deterministic or evaluates the
            denoiser more than once per step.
    """
    if sampler is None:
        sampler = default
    if guidance is None:
        guidance = MMPS() if num_particles == 1 else MMPS(GaussianCovariance(), look_ahead=True)
    check_sampler(sampler)
    if not isinstance(guidance, Guidance):
        raise ValueError(
            f"expected an instance of Guidance, got {guidance!r}; pass an object such as MMPS()."
        )
    if num_particles > 1 and not (sampler.eta > 0 and sampler.is_single_evaluation):
        raise ValueError(
            f"{num_particles} particles need a stochastic sampler of one evaluation per step, "
            f"such as MultistepSDE() or DDPM(); got {sampler}."
        )
    return SamplingOptions(num_particles, sampler, guidance, independent)


def sample_posterior(
    rng_key: jax.Array,
    model: Model,
    prior: DiffusionPrior | Mapping[str, DiffusionPrior],
    *args: Any,
    num_samples: int = 1,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    independent: bool = True,
    max_batch_size: int | None = None,
    mesh: Mesh | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> PosteriorSamples:
    """Draw from the posterior of a model's diffusion sites, for all events of their plate.

    Args:
        rng_key: A random key.
        model: A NumPyro model; its observed sites are the likelihood.
        prior: The model's first argument: a prior, or several in a dict. Sites on which the same
            observed site depends are drawn jointly.
        *args: The model's other arguments.
        num_samples: The number of draws per event.
        num_particles: Particles per system; one is guided sampling, more correct its bias.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle, and
            with the Gaussian covariance for more, which look ahead if the model is linear).
        independent: Whether every draw comes from a particle system of its own. Otherwise each
            system yields as many draws as it has particles, at a fraction of the cost: a thousand
            draws from one system of a thousand particles, say. They are exact in the limit of
            many particles, but not independent: an event may be drawn more than once.
        max_batch_size: The number of particles (with one particle: draws) in memory at once on
            one device (default: 256, or fewer with 2^18 elements in all). Only the largest of
            several plates is divided.
        mesh: Devices to spread the work over (`jax.make_mesh`): by elements of the largest plate,
            or by draws if these elements are fewer than the devices. Each device has a copy of
            the prior, and the data of the elements that it draws. Draws depend on the mesh.
        folder: A new folder for the draws, if they do not fit into memory: they are written part
            by part in the format of Zarr, with the statistics in the group ``stats``, and
            ``xarray.open_zarr`` opens them. The draws of the result are then arrays of Zarr. (Of
            several processes, all of which must see the folder, the first one writes.)
        progress_bar: Whether to show a bar in a terminal or a notebook, after a second.
        **kwargs: The model's keyword arguments.

    Returns:
        The draws and their statistics, see `PosteriorSamples`. A warning is given if draws do not
        fit the observations. From 128 draws of one particle on, some are compared with draws of
        particle systems, once per model, and a warning is given if they are biased.

    Raises:
        ValueError: If the model cannot be read (see `numpyro_diffprior.reading`), a number is not
            positive, or particles and sampler do not fit.
        FileExistsError: If the folder exists.
        MemoryError: If the compiled program needs more memory than is free.
    """
    check_names(sample_posterior, model, 1 + len(args), locals())
    num_samples = check_count("sample_posterior", "num_samples", num_samples)
    num_particles = check_count("sample_posterior", "num_particles", num_particles)
    limit = BatchLimit.of("sample_posterior", max_batch_size, default=256)
    bound = read(
        model,
        (prior, *args),
        kwargs,
        block_size=block_size(num_particles, num_samples, limit, mesh),
        mesh=mesh,
    )
    options = resolve_options(bound.reading.sampler, num_particles, sampler, guidance, independent)
    num_residuals = check_data(bound, options.sampler, mesh)
    written = None if folder is None else DrawsFolder(folder, bound.reading, mesh)
    with ProgressBar("sample_posterior", progress_bar) as bar:
        samples, stats = sample_blocks(
            rng_key,
            bound,
            options,
            num_draws=num_samples,
            limit=limit,
            mesh=mesh,
            monitor=bar,
            folder=written,
        )
    if written is not None:
        samples = written.finish()
    _warn_of_misfit(stats["reduced_chi_square"], num_residuals)
    if num_particles == 1:
        key = jax.random.fold_in(rng_key, 1)
        warn_of_bias(key, model, ((prior, *args), kwargs), bound, options, samples, mesh)
    per_draw = num_particles if independent else 1
    num_evaluations = jnp.asarray(per_draw * options.sampler.num_evaluations)
    stats = stats | {"num_evaluations": num_evaluations}
    if written is not None:
        written.write_stats(stats)
    return PosteriorSamples(samples, stats)


def _warn_of_misfit(reduced_chi_square: jax.Array, counts: Sequence[jax.Array]) -> None:
    """Warn if residuals of draws are large and significantly so."""
    if isinstance(reduced_chi_square, jax.core.Tracer):
        return
    if not int(_num_large(reduced_chi_square)):
        return
    num_residuals = merge_stats([{"num_residuals": count} for count in counts])["num_residuals"]
    misfits, largest = _misfits(reduced_chi_square, num_residuals)
    if count := int(misfits):
        warnings.warn(
            f"{count} of {reduced_chi_square.size} posterior draws do not fit what was observed: "
            f"their stats['reduced_chi_square'] goes up to {largest:.3g} and should be near 1. "
            "Either guidance failed (more steps of the sampler, or more particles, may help), or "
            "the model and its prior cannot explain these data. (For rare counts and other values "
            "far from Gaussian, exact draws may look so, too.)",
            stacklevel=3,
        )


@jax.jit
def _num_large(reduced_chi_square: jax.Array) -> jax.Array:
    return jnp.sum(reduced_chi_square >= _LARGE_CHI_SQUARE)


@jax.jit
def _misfits(
    reduced_chi_square: jax.Array, num_residuals: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the number of draws with large and significant residuals, and the largest of all.

    Only compiled where some are large: the incomplete gamma function takes seconds to compile.
    """
    pvalue = gammaincc(num_residuals / 2, num_residuals * reduced_chi_square / 2)
    # A draw whose p-value is NaN, because its residuals are infinite, counts as a misfit.
    significant = ~(pvalue > _SMALL_PVALUE / reduced_chi_square.size)
    misfits = (reduced_chi_square >= _LARGE_CHI_SQUARE) & significant
    return jnp.sum(misfits), jnp.nanmax(reduced_chi_square)


_LARGE_CHI_SQUARE = 2.0
_SMALL_PVALUE = 1e-6
