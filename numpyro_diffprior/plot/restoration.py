r"""Pictures of events restored from observations."""

from typing import Any

import numpy as np
from jax.typing import ArrayLike

from numpyro_diffprior.plot.events import Scale, arrange, draw_event, panel_size
from numpyro_diffprior.plot.figures import add_colorbar, add_legend, make_axes

__all__ = ["restored"]


def restored(
    y: ArrayLike | None,
    samples: ArrayLike,
    *,
    truth: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    num_events: int = 8,
    num_draws: int = 2,
    spatial_dims: int | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: Any = None,
    axes: Any = None,
) -> np.ndarray:
    """Plot observations, posterior draws of their events, and the truth; a column per event.

    The rows of images are the observation, the truth, the posterior mean and some draws on one
    scale, then the posterior deviation and the error of the mean. Deviation and error of colors
    are root mean squares over the channels; the error of complex images is a magnitude. Curves
    have a row per channel, with all of these but the deviation and the error, and the central 90 %
    interval.

    Args:
        y: The observations, with shape ``(num_events, *observed)``, NaN where nothing is observed;
            None leaves them out. Complex images (Fourier coefficients, say), and images of another
            shape than the events, have a scale of their own. With curves, y must have the shape of
            the events.
        samples: Posterior draws, with shape ``(num_samples, num_events, *event)``. See
            `numpyro_diffprior.plot.samples` for the shapes of events.
        truth: The true events, with shape ``(num_events, *event)``.
        mask: Which elements are observed, booleans broadcastable to the shape of ``y``.
        num_events: The largest number of events; further ones are not shown.
        num_draws: The largest number of draws.
        spatial_dims: The number of axes of an event before its channels.
        vmin: The lower limit of the scale (default: the smallest value of truth, mean and draws).
        vmax: The upper limit of the scale (default: the largest value of truth, mean and draws).
        cmap: The color map of images (default: that of matplotlib's style). Pixels that are NaN
            have its color of bad values, or are gray if that is transparent.
        axes: The axes to draw on, in rows (default: those of a new figure, with color bars or a
            legend).

    Returns:
        The axes, with shape ``(num_rows, num_shown)``.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the shapes do not fit, the events are neither images nor curves, or the
            number of axes is another one.
    """
    draws, observed = np.asarray(samples), None if y is None else np.asarray(y)
    if draws.ndim < 3:
        raise ValueError(
            "plot.restored: expected samples with shape (num_samples, num_events, *event), got "
            f"{draws.shape}."
        )
    num = draws.shape[1]
    if observed is not None and observed.shape[:1] != (num,):
        raise ValueError(
            f"plot.restored: expected y with shape ({num}, *observed) for samples with shape "
            f"{draws.shape}, got {observed.shape}."
        )
    if truth is not None and np.shape(truth) != draws.shape[1:]:
        raise ValueError(
            f"plot.restored: expected truth with shape {draws.shape[1:]}, got {np.shape(truth)}."
        )
    if observed is not None and mask is not None:
        observed = np.where(mask, observed, np.nan)
    draws = draws[:, :num_events]
    observed = None if observed is None else observed[:num_events]
    true = None if truth is None else np.asarray(truth)[:num_events]
    if arrange(_NAME, draws[0], spatial_dims).ndim == 3:
        return _draw_curves(observed, draws, true, num_draws, spatial_dims, (vmin, vmax), axes)
    groups = _group_rows(observed, draws, true, num_draws, spatial_dims, (vmin, vmax), cmap)
    num_shown, num_rows = draws.shape[1], sum(len(rows) for rows, _ in groups)
    size = panel_size(groups[-1][0]["deviation" if true is None else "error"])
    made = make_axes(_NAME, axes, (num_rows, num_shown), num_shown, size)
    position = 0
    for rows, scale in groups:
        own = made[position : position + len(rows)]
        position += len(rows)
        for row, (label, events) in zip(own, rows.items(), strict=True):
            images = [draw_event(ax, x, scale) for ax, x in zip(row, events, strict=True)]
            row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        if axes is None:
            add_colorbar(images[0], own)
    return made


_NAME = "plot.restored"


def _group_rows(
    observed: np.ndarray | None,
    draws: np.ndarray,
    truth: np.ndarray | None,
    num_draws: int,
    spatial_dims: int | None,
    limits: tuple[float | None, float | None],
    cmap: Any,
) -> list[tuple[dict[str, np.ndarray], Scale]]:
    """Return the rows of images by label, in groups of one scale."""
    mean = draws.mean(0)
    values = {} if truth is None else {"truth": truth}
    values |= {"mean": mean} | {f"draw {i + 1}": x for i, x in enumerate(draws[:num_draws])}
    rows = {label: arrange(_NAME, x, spatial_dims) for label, x in values.items()}
    scale = Scale.of(rows.values(), *limits, cmap)
    groups = [(rows, scale)]
    if observed is not None:
        is_same = observed.shape == mean.shape
        row = {"observed": arrange(_NAME, observed, spatial_dims if is_same else None)}
        if is_same and not np.iscomplexobj(observed):
            groups = [(row | rows, scale)]
        else:
            groups.insert(0, (row, Scale.of(row.values(), None, None, cmap)))
    deviation = _over_channels(arrange(_NAME, draws.std(0), spatial_dims))
    groups.append(({"deviation": deviation}, Scale.of([deviation], 0.0, None, cmap)))
    if truth is not None:
        error = arrange(_NAME, mean - truth, spatial_dims)
        if error.shape[-1] == 1 and not np.iscomplexobj(mean - truth):
            largest = Scale.of([np.abs(error)], None, None, None).vmax
            groups.append(({"error": error}, Scale(-largest, largest, "RdBu_r")))
        else:
            error = _over_channels(error)
            groups.append(({"error": error}, Scale.of([error], 0.0, None, cmap)))
    return groups


def _over_channels(x: np.ndarray) -> np.ndarray:
    """Return the root mean square over the channels."""
    root: np.ndarray = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
    return root


def _draw_curves(
    observed: np.ndarray | None,
    draws: np.ndarray,
    truth: np.ndarray | None,
    num_draws: int,
    spatial_dims: int | None,
    limits: tuple[float | None, float | None],
    axes: Any,
) -> np.ndarray:
    """Draw curves, a row per channel and a column per event."""
    num_samples, num_shown = draws.shape[:2]
    if observed is not None and observed.shape != draws.shape[1:]:
        raise ValueError(
            f"plot.restored: expected y with the shape {draws.shape[1:]} of the curves, got "
            f"{observed.shape}; pass None to leave it out."
        )
    flat = arrange(_NAME, draws.reshape(-1, *draws.shape[2:]), spatial_dims)
    x = flat.reshape(num_samples, num_shown, *flat.shape[1:])
    mean, (low, high) = x.mean(0), np.quantile(x, (0.05, 0.95), axis=0)
    points, true = (
        None if own is None else arrange(_NAME, own, spatial_dims) for own in (observed, truth)
    )
    _, _, length, num_channels = x.shape
    place = np.arange(length)
    made = make_axes(
        _NAME, axes, (num_channels, num_shown), num_shown, (2.4, 1.8), sharex=True, sharey="row"
    )
    for channel, row in enumerate(made):
        for i, ax in enumerate(row):
            at = (i, slice(None), channel)
            (line,) = ax.plot(place, mean[at], label="mean")
            color = line.get_color()
            ax.fill_between(place, low[at], high[at], color=color, alpha=0.25, lw=0, label="90 %")
            for number, draw in enumerate(x[:num_draws]):
                label = None if number else "draws"
                ax.plot(place, draw[at], color=color, lw=0.6, alpha=0.7, label=label)
            if true is not None:
                ax.plot(place, true[at], "C1--", label="truth")
            if points is not None:
                ax.plot(place, points[at], ".", color="0.4", ms=4, label="observed")
            if limits != (None, None):
                ax.set_ylim(*limits)
    if axes is None:
        add_legend(made)
    return made
