r"""Curves of diagnostics: metrics of EM, effective sample sizes, coverage of intervals."""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffprior.em.state import EMMetrics
from numpyro_diffprior.metrics.ranks import coverage as empirical_coverage
from numpyro_diffprior.plot.figures import make_axes

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

__all__ = ["coverage", "ess_path", "history"]

_REFERENCE: dict[str, Any] = {"color": "0.5", "ls": "--", "lw": 1}


def history(
    history: "EMMetrics | xr.Dataset", *, metrics: Sequence[str] | None = None, axes: Any = None
) -> np.ndarray:
    """Plot metrics of EM by iteration, each on axes of its own.

    A dashed line marks the iteration with the largest held-out log-evidence, if there is any; a
    band shows the standard error of this evidence.

    Args:
        history: The metrics of a run, or their dataset (`EMMetrics.to_dataset`, or the file
            ``history.nc`` beside checkpoints).
        metrics: Names of `EMMetrics` (default: those of which any value is neither NaN nor zero).
        axes: The axes to draw on, as many as metrics (default: those of a new figure).

    Returns:
        The axes, with shape ``(len(metrics),)``.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no iteration, a metric is unknown, or the number of axes differs.
    """
    data = history.to_dataset() if isinstance(history, EMMetrics) else history
    if not data.sizes.get("iteration"):
        raise ValueError("plot.history: expected the metrics of one iteration or more, got none.")
    evidence, error = data["heldout_log_evidence"], data["heldout_standard_error"]
    if metrics is None:
        metrics = [str(name) for name, x in data.items() if (x.fillna(0) != 0).any()]
        metrics = [name for name in metrics if name != error.name]
    if unknown := sorted(set(metrics) - set(map(str, data))):
        raise ValueError(f"plot.history: expected names of {list(data)}, got {unknown}.")
    axes = make_axes("plot.history", axes, (len(metrics),), 3, (3.2, 2.4))
    iteration = data["iteration"].values
    for ax, name in zip(axes, metrics, strict=True):
        (line,) = ax.plot(iteration, data[name], marker=".")
        if name == evidence.name:
            low, high = evidence - error, evidence + error
            ax.fill_between(iteration, low, high, color=line.get_color(), alpha=0.3, lw=0)
        if evidence.notnull().any():
            best = int(evidence.idxmax())
            ax.axvline(best, **_REFERENCE, label=f"best: iteration {best}")
        ax.set(xlabel="iteration", ylabel=_label(data[name]))
        ax.xaxis.get_major_locator().set_params(integer=True)
    if evidence.notnull().any():
        axes[0].legend()
    return axes


def ess_path(
    stats: Mapping[str, jax.Array],
    *,
    num_particles: int | None = None,
    sigma: ArrayLike | None = None,
    ax: Any = None,
) -> "Axes":
    """Plot the effective sample size of particle systems against the noise level.

    The median over all draws and events is a line, the central 50 % and 90 % are bands. Levels
    run from the largest noise to the smallest; at the last one, particles have their exact
    weights.

    Args:
        stats: The statistics of `sample_posterior`, of which ``ess_path`` is shown.
        num_particles: The number of particles; sample sizes are then relative to it.
        sigma: The sampler's noise levels, with shape ``(num_levels,)``, as
            ``prior.sampler.sigmas(prior.denoiser)`` returns them in the unit of the denoiser
            (default: levels are numbered).
        ax: The axes to draw on (default: those of a new figure).

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the number of noise levels is not that of the statistics.
    """
    path = np.asarray(stats["ess_path"])
    path = path.reshape(-1, path.shape[-1]) / (num_particles or 1)
    num_levels = path.shape[-1]
    level = np.arange(1, num_levels + 1) if sigma is None else np.asarray(sigma, float)
    if level.shape != (num_levels,):
        raise ValueError(
            f"plot.ess_path: expected sigma with shape ({num_levels},), got {level.shape}; take "
            "the levels of the sampler that drew."
        )
    (ax,) = make_axes("plot.ess_path", ax, (1,), 1, (4.8, 3.2))
    low, lower, median, upper, high = np.nanquantile(path, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    (line,) = ax.plot(level, median, label="median")
    band: dict[str, Any] = {"color": line.get_color(), "lw": 0}
    ax.fill_between(level, lower, upper, alpha=0.4, label="50 %", **band)
    ax.fill_between(level, low, high, alpha=0.2, label="90 %", **band)
    relative = "" if num_particles is None else "relative "
    ax.set(ylabel=f"{relative}effective sample size")
    ax.set_ylim(0, None if num_particles is None else 1.05)
    if sigma is None:
        ax.set(xlabel="noise level, from the largest")
        ax.xaxis.get_major_locator().set_params(integer=True)
    else:
        ax.set(xlabel=r"noise level $\sigma$", xscale="log")
        ax.invert_xaxis()
    ax.legend()
    return ax


def coverage(
    samples: ArrayLike,
    truth: ArrayLike,
    *,
    levels: Sequence[float] | None = None,
    where: ArrayLike | None = None,
    ax: Any = None,
) -> "Axes":
    r"""Plot the empirical against the nominal coverage of central credible intervals.

    The band holds 95 % of the empirical coverages of exact draws: its half-width is 1.96 times the
    binomial standard error :math:`\sqrt{\alpha (1 - \alpha) / n}`. Events are independent, but
    their elements are not, so :math:`n` is the number of elements over Kish's design effect: the
    variance of the coverage between events, relative to that of independent elements, pooled over
    the levels and at least one. A curve below the diagonal shows intervals that are too narrow.

    Args:
        samples: Posterior draws with shape ``(num_samples, num_events, *event)``.
        truth: The true events, with shape ``(num_events, *event)``.
        levels: Probabilities of the intervals (default: 19, equally spaced up to the largest that
            the number of draws allows).
        where: Boolean mask of the elements to count, broadcastable to the shape of ``truth``.
        ax: The axes to draw on (default: those of a new figure).

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the shapes do not fit, ``where`` selects nothing, there is only one draw, or
            a level is outside (0, 1) or too high for so few draws.

    References:
        Kish, *Survey Sampling*, Wiley 1965 (the design effect, section 8.2).
    """
    samples, truth = jnp.asarray(samples), jnp.asarray(truth)
    if samples.ndim < 2 or len(samples) < 2 or samples.shape[1:] != truth.shape:
        raise ValueError(
            "plot.coverage: expected two or more samples, with shape (num_samples, num_events, "
            f"*event), and truth with shape (num_events, *event), got {samples.shape} and "
            f"{truth.shape}."
        )
    if levels is None:
        highest = (len(samples) - 1) / (len(samples) + 1)
        levels = np.linspace(0, min(highest, 0.95), 20)[1:].tolist()
    counted = jnp.broadcast_to(True if where is None else where, truth.shape)
    if not counted.any():
        raise ValueError("plot.coverage: expected `where` to select an element, got none.")
    covered = jax.vmap(partial(empirical_coverage, levels=levels), in_axes=(1, 0))
    fractions = np.asarray(covered(samples, truth, where=counted))
    sizes = np.asarray(counted.reshape(len(truth), -1).sum(-1))[:, None]
    hits = np.where(sizes > 0, fractions, 0) * sizes
    empirical, num = hits.sum(0) / sizes.sum(), _effective_size(hits, sizes)
    (ax,) = make_axes("plot.coverage", ax, (1,), 1, (4.0, 3.6))
    ends = np.linspace(0, 1, 101)
    width = 1.96 * np.sqrt(ends * (1 - ends) / num)
    ax.fill_between(
        ends, ends - width, ends + width, color="0.5", alpha=0.25, lw=0, label="exact draws, 95 %"
    )
    ax.plot((0, 1), (0, 1), **_REFERENCE)
    ax.plot(levels, empirical, marker=".", label="samples")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="empirical coverage")
    ax.legend(loc="upper left")
    return ax


def _effective_size(hits: np.ndarray, sizes: np.ndarray) -> float:
    """Return the number of independent elements with the same variance between events.

    Args:
        hits: The numbers of covered elements, with shape ``(num_events, num_levels)``.
        sizes: The numbers of elements, with shape ``(num_events, 1)``.
    """
    num_events, num_elements = np.count_nonzero(sizes), sizes.sum()
    fraction = hits.sum(0) / num_elements
    expected = num_elements * (fraction * (1 - fraction)).sum()
    if num_events < 2 or expected == 0:
        return float(num_events)
    found = ((hits - fraction * sizes) ** 2).sum() * num_events / (num_events - 1)
    return float(num_elements * expected / max(found, expected))


def _label(x: "xr.DataArray") -> str:
    """Return the long name and the unit of a metric, on lines that fit small axes."""
    units = x.attrs.get("units", "1")
    return textwrap.fill(x.attrs["long_name"] + ("" if units == "1" else f" [{units}]"), 22)
