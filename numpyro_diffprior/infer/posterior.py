"""Posterior draws of a NumPyro model's diffusion site.

The model's trace gives the likelihood (`numpyro_diffprior.reading`), guided sampling or the
twisted SMC the draws (`numpyro_diffprior.particles.smc`), in compiled blocks of bounded size.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaincc
from jax.sharding import Mesh

from numpyro_diffprior._compile.arguments import (
    replicate_arguments,
)
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.covariances import GaussianCovariance
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.guidance.likelihood import Likelihood
from numpyro_diffprior.guidance.mmps import MMPS
from numpyro_diffprior.infer.blocks import PosteriorSamples, sample_blocks
from numpyro_diffprior.particles.system import Settings
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.latent import LatentSite, read_latent
from numpyro_diffprior.reading.likelihood import read_likelihood
from numpyro_diffprior.reading.tracing import Model, bind_whole_plates

__all__ = ["read_whole_plates", "resolve_settings", "sample_posterior"]


def resolve_settings(
    prior: DiffusionPrior,
    num_particles: int = 1,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    independent: bool = True,
) -> Settings:
    """Fill in the defaults: the prior's sampler, and `MMPS`.

    MMPS takes Tweedie's covariance for one particle; more look ahead with the Gaussian one.

    Raises:
        ValueError: If sampler or guidance is none, the number of particles is not positive, or
            there are several and the sampler is deterministic or evaluates the denoiser more than
            once per step.
    """
    if sampler is None:
        sampler = prior.sampler
    if guidance is None:
        guidance = MMPS() if num_particles == 1 else MMPS(GaussianCovariance(), look_ahead=True)
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"expected an instance of Sampler, got {sampler!r}; pass an object such as "
            "MultistepSDE(num_steps=64)."
        )
    if not isinstance(guidance, Guidance):
        raise ValueError(
            f"expected an instance of Guidance, got {guidance!r}; pass an object such as MMPS()."
        )
    if num_particles < 1:
        raise ValueError(f"expected num_particles >= 1, got {num_particles}.")
    if num_particles > 1 and not (sampler.eta > 0 and sampler.is_single):
        raise ValueError(
            f"{num_particles} particles need a stochastic sampler of one evaluation per step, "
            f"such as MultistepSDE() or DDPM(); got {sampler}."
        )
    return Settings(num_particles, sampler, guidance, independent)


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
    max_batch_size: int = 256,
    mesh: Mesh | None = None,
    **kwargs: Any,
) -> PosteriorSamples:
    """Draw from the posterior of a model's diffusion sites, for all events of their plate.

    Args:
        rng_key: A random key.
        model: A NumPyro model; its observed sites are the likelihood.
        prior: The model's first argument: a prior, or several in a dict. Sites in one plate are
            drawn together.
        *args: The model's other arguments.
        num_samples: The number of draws per event.
        num_particles: Particles of a system: one is MMPS, more correct its approximation.
        sampler: The sampler (default: the prior's).
        guidance: The guidance (default: `MMPS`, with Tweedie's covariance for one particle; more
            look ahead with the Gaussian one).
        independent: Whether every draw is one of a particle system of its own. Otherwise each
            system gives as many draws as it has particles, at a fraction of the cost: a thousand
            draws of one system of a thousand particles, say. They are exact in the limit of many
            particles, but not independent: an event may be drawn more than once.
        max_batch_size: How many draws are made at once on one device; bounds the memory. Only the
            largest of several plates is divided.
        mesh: Devices to spread the work over (`jax.make_mesh`), by the elements of the largest
            plate; where they are fewer than the devices, by the draws. Data and prior are copied
            to each. Other meshes give other draws.
        **kwargs: The model's keyword arguments.

    Returns:
        The draws and their statistics, see `PosteriorSamples`. A warning says where draws do not
        fit what was observed.

    Raises:
        ValueError: If the model cannot be read (see `numpyro_diffprior.reading`), a number is not
            positive, or particles and sampler do not fit.
    """
    for name, number in (("num_samples", num_samples), ("max_batch_size", max_batch_size)):
        if number < 1:
            raise ValueError(f"sample_posterior: expected {name} >= 1, got {number}.")
    arguments = replicate_arguments(((prior, *args), kwargs), mesh)
    latent, likelihood = read_whole_plates(model, *arguments)
    settings = resolve_settings(latent.prior, num_particles, sampler, guidance, independent)
    samples, stats = sample_blocks(
        rng_key,
        model,
        *arguments,
        settings,
        num_draws=num_samples,
        batch_size=max_batch_size,
        mesh=mesh,
    )
    _warn_of_misfit(stats["chi_square"], likelihood.num_visible)
    per_draw = num_particles if independent else 1
    num_evaluations = jnp.asarray(per_draw * settings.sampler.num_evaluations)
    return PosteriorSamples(samples, stats | {"num_evaluations": num_evaluations})


def read_whole_plates(
    model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[LatentSite, Likelihood]:
    """Read a model, so that its errors come before anything is compiled."""
    bound = bind_whole_plates(model, args, kwargs)
    latent = read_latent(bound)
    return latent, read_likelihood(bound, latent)


def _warn_of_misfit(chi_square: jax.Array, num_visible: jax.Array) -> None:
    """Warn where draws are far from what was observed, by size and by significance."""
    if isinstance(chi_square, jax.core.Tracer):
        return
    pvalue = gammaincc(num_visible / 2, num_visible * chi_square / 2)
    fits = (chi_square < _LARGE_CHI_SQUARE) | (pvalue > _SMALL_PVALUE / chi_square.size)
    count = int(jnp.sum(~fits))
    if count:
        warnings.warn(
            f"{count} of {chi_square.size} posterior draws do not fit what was observed: their "
            f"stats['chi_square'] goes up to {float(jnp.max(chi_square)):.3g} and should be near "
            "1. Either guidance failed (more steps of the sampler, or more particles, may help), "
            "or the model and its prior cannot explain these data. (Rare counts and other values "
            "far from Gaussian may look so in the best of draws.)",
            stacklevel=3,
        )


_LARGE_CHI_SQUARE = 2.0
_SMALL_PVALUE = 1e-6
