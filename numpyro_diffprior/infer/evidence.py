r"""The evidence (marginal likelihood) of observations under a prior.

The twisted SMC (`numpyro_diffprior.particles.smc`) estimates :math:`p(y)` of every event without
bias, under the prior that the sampler draws. Independent estimates are averaged; their spread
gives the standard error. The log of the average has a bias of minus half its squared error.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from numpyro_diffprior._compile.checks import check_count
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.diffusion.samplers import Sampler
from numpyro_diffprior.guidance.guidance import Guidance
from numpyro_diffprior.infer.blocks import block_size, sample_blocks
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.infer.progress import Monitor, ProgressBar
from numpyro_diffprior.prior import DiffusionPrior
from numpyro_diffprior.reading.checks import check_data
from numpyro_diffprior.reading.reader import read
from numpyro_diffprior.reading.tracing import Model, check_names

if TYPE_CHECKING:
    import arviz as az

__all__ = ["LogEvidence", "estimate_evidence", "log_evidence"]


class LogEvidence(NamedTuple):
    r"""Log-evidences of independent events, which add up.

    Attributes:
        value: The estimates of :math:`\log p(y)`, with the shape of the plates.
        standard_error: Their standard errors, with the same shape.
    """

    value: jax.Array
    standard_error: jax.Array

    @property
    def total(self) -> jax.Array:
        """The log-evidence of all events."""
        return jnp.sum(self.value)

    @property
    def total_standard_error(self) -> jax.Array:
        """The standard error of `total`."""
        return jnp.sqrt(jnp.sum(self.standard_error**2))

    def to_elpd(self) -> "az.ELPDData":
        """Return the evidences as ArviZ's expected log predictive density, for `arviz.compare`.

        For observations that the prior was not learned from, the log-evidence is the log
        predictive density. ArviZ's standard error is that of the choice of events; the estimates'
        own error (`total_standard_error`) adds to it.
        """
        import arviz as az  # slow to import, and warns before 1.0
        import xarray as xr

        value = np.asarray(self.value, float).ravel()
        pointwise = xr.DataArray(value, dims="event", name="loo_i")
        elpd, se = value.sum(), np.sqrt(value.size * np.var(value))
        fields = {
            "n_samples": 1,
            "n_data_points": value.size,
            "warning": False,
            "scale": "log",
            "good_k": 0.7,
        }
        # ArviZ has leave-one-out and similar results only; nothing is left out here, so p = 0.
        if hasattr(az, "ELPDDataLOO"):
            return az.ELPDDataLOO(elpd=elpd, se=se, p=0.0, elpd_i=pointwise, **fields)
        # Before ArviZ 1.0: a series, whose first three entries are printed.
        first = {"elpd_loo": elpd, "se": se, "p_loo": 0.0}
        return az.ELPDData(first | fields | {"loo_i": pointwise})


def log_evidence(
    rng_key: jax.Array,
    model: Model,
    prior: DiffusionPrior | Mapping[str, DiffusionPrior],
    *args: Any,
    num_estimates: int = 4,
    num_particles: int = 16,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    max_batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LogEvidence:
    r"""Estimate :math:`\log p(y)` for every event of the plate of a model's diffusion site.

    Args:
        rng_key: A random key.
        model: A NumPyro model; its observed sites are the likelihood.
        prior: The model's first argument.
        *args: The model's other arguments.
        num_estimates: The number of independent estimates, at least two: their spread is the
            standard error.
        num_particles: Particles per estimate, at least two. More particles reduce the error
            faster than more estimates do.
        sampler: The sampler (default: the prior's). With hundreds of observed values per event,
            estimates need 64 to 128 steps; with fewer, they are many nats too small.
        guidance: The guidance (default: `MMPS` with the Gaussian covariance, looking ahead).
        max_batch_size: The number of particles in memory at once on one device (default: 1,024,
            or fewer with 2^18 elements in all).
        mesh: Devices to spread the work over, see `sample_posterior`.
        progress_bar: Whether to show a bar in a terminal or a notebook, after a second.
        **kwargs: The model's keyword arguments.

    Returns:
        The estimates and their standard errors. A standard error that is not much smaller than
        one is itself unreliable: use more particles.

    Raises:
        ValueError: If there are fewer than two estimates or particles, or the model cannot be
            read; see `sample_posterior`.
        MemoryError: If the compiled program needs more memory than is free.
    """
    check_names(log_evidence, model, 1 + len(args), locals())
    with ProgressBar("log_evidence", progress_bar) as bar:
        return estimate_evidence(
            rng_key,
            model,
            (prior, *args),
            kwargs,
            num_estimates=num_estimates,
            num_particles=num_particles,
            sampler=sampler,
            guidance=guidance,
            max_batch_size=max_batch_size,
            mesh=mesh,
            monitor=bar,
        )


def estimate_evidence(
    rng_key: jax.Array,
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_estimates: int,
    num_particles: int,
    sampler: Sampler | None,
    guidance: Guidance | None,
    max_batch_size: int | None,
    mesh: Mesh | None,
    params: Mapping[str, jax.Array] | None = None,
    monitor: Monitor = Monitor(),
) -> LogEvidence:
    """Estimate log-evidences, with values of the model's parameters; see `log_evidence`."""
    num_estimates = check_count("log_evidence", "num_estimates", num_estimates, 2)
    num_particles = check_count("log_evidence", "num_particles", num_particles, 2)
    limit = BatchLimit.of("log_evidence", max_batch_size, default=1024)
    bound = read(
        model,
        args,
        kwargs,
        block_size=block_size(num_particles, num_estimates, limit, mesh),
        mesh=mesh,
        params=params,
    )
    options = resolve_options(bound.reading.sampler, num_particles, sampler, guidance)
    check_data(bound, options.sampler, mesh)
    draws = sample_blocks(
        rng_key,
        bound,
        options,
        num_draws=num_estimates,
        limit=limit,
        mesh=mesh,
        monitor=monitor,
        only="log_evidence",
    )
    estimates = draws.stats["log_evidence"]
    value = jax.nn.logsumexp(estimates, axis=0) - jnp.log(num_estimates)
    relative = jnp.exp(estimates - value)
    return LogEvidence(value, jnp.std(relative, axis=0, ddof=1) / jnp.sqrt(num_estimates))
