r"""Pictures of events.

Events of shape ``(height, width)`` and ``(height, width, channels)``, with one or three channels,
are images; three channels are red, green and blue. Events of shape ``(length,)`` are curves, and
with ``spatial_dims=1`` so are those of shape ``(length, channels)``. Complex events are shown by
their magnitude. Pixels that are NaN are gray.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from numpyro_diffprior.plot.figures import add_colorbar, make_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Scale", "arrange", "draw_event", "panel_size", "samples"]

_HIDDEN = "0.8"


class Scale(NamedTuple):
    """What values mean: the limits and the color map of images.

    Attributes:
        vmin: The smallest value.
        vmax: The largest value.
        cmap: The color map; None for that of matplotlib's style.
    """

    vmin: float
    vmax: float
    cmap: Any

    @classmethod
    def of(
        cls, arrays: Iterable[np.ndarray], vmin: float | None, vmax: float | None, cmap: Any
    ) -> "Scale":
        """Return a scale with the limits of all finite values where none are given."""
        values = np.concatenate([x[np.isfinite(x)] for x in arrays])
        low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
        return cls(
            float(low if vmin is None else vmin), float(high if vmax is None else vmax), cmap
        )


def samples(
    x: ArrayLike,
    *,
    num_columns: int = 8,
    num_rows: int = 4,
    spatial_dims: int | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: Any = None,
    axes: Any = None,
) -> np.ndarray:
    """Plot a grid of samples, on one scale.

    Args:
        x: Samples of a prior, with shape ``(num_samples, *event)``. An event is an image, with
            shape ``(height, width)``, ``(height, width, 1)`` or ``(height, width, 3)``, or a
            curve, with shape ``(length,)`` or ``(length, channels)``. Complex events are shown by
            their magnitude.
        num_columns: The largest number of columns.
        num_rows: The largest number of rows; further samples are not shown.
        spatial_dims: The number of axes before the channels: 2 for images, 1 for curves (default:
            1 for events with one axis, else 2).
        vmin: The lower limit of the scale (default: the smallest value shown).
        vmax: The upper limit of the scale (default: the largest value shown).
        cmap: The color map of images (default: that of matplotlib's style). Pixels that are NaN
            have its color of bad values, or are gray if that is transparent.
        axes: The axes to draw on, one per sample; the numbers of rows and columns are then unused
            (default: those of a new figure, with a color bar).

    Returns:
        The axes, with shape ``(num_shown,)``.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the events are neither images nor curves, there are none, or their number is
            not that of the axes.
    """
    x = np.asarray(x)
    shown = x[: num_rows * num_columns] if axes is None else x
    events = arrange("plot.samples", shown, spatial_dims)
    if not len(events):
        raise ValueError("plot.samples: expected one sample or more, got none.")
    is_curve = events.ndim == 3
    made = make_axes(
        "plot.samples",
        axes,
        (len(events),),
        num_columns,
        panel_size(events),
        sharex=is_curve,
        sharey=is_curve,
    )
    scale = Scale.of([events], vmin, vmax, cmap)
    images = [draw_event(ax, event, scale) for ax, event in zip(made, events, strict=True)]
    if axes is None:
        add_colorbar(images[0], made)
    if is_curve and (vmin, vmax) != (None, None):
        for ax in made:
            ax.set_ylim(vmin, vmax)
    return made


def arrange(name: str, x: Any, spatial_dims: int | None) -> np.ndarray:
    """Return real events with a last axis of channels.

    Args:
        name: The function that draws, for messages.
        x: Events with shape ``(num_events, *event)``.
        spatial_dims: The number of axes of an event before its channels, or None.

    Returns:
        Curves with shape ``(num_events, length, channels)``, or images with shape
        ``(num_events, height, width, channels)``.

    Raises:
        ValueError: If the events are neither.
    """
    x = np.asarray(x)
    num_axes = x.ndim - 1
    if spatial_dims is None:
        spatial_dims = min(max(num_axes, 1), 2)
    if spatial_dims not in (1, 2):
        raise ValueError(f"{name}: spatial_dims must be 1 or 2, got {spatial_dims!r}.")
    if num_axes not in (spatial_dims, spatial_dims + 1):
        layout = ("length", "height, width")[spatial_dims - 1]
        raise ValueError(
            f"{name}: with spatial_dims={spatial_dims}, events must have shape ({layout}) or "
            f"({layout}, channels), got {x.shape[1:]}; select a part of them, or change "
            "spatial_dims (1 or 2)."
        )
    x = x if num_axes > spatial_dims else x[..., None]
    if spatial_dims == 2 and x.shape[-1] not in (1, 3):
        raise ValueError(
            f"{name}: images must have 1 or 3 channels, got {x.shape[-1]}; select a channel, or "
            "pass spatial_dims=1 for curves."
        )
    return np.abs(x) if np.iscomplexobj(x) else x


def panel_size(events: np.ndarray) -> tuple[float, float]:
    """Return width and height of the axes of one event, in inches."""
    if events.ndim == 3:
        return 1.8, 1.4
    _, height, width, _ = events.shape
    return 1.2, 1.2 * min(max(height / width, 0.3), 3.0)


def draw_event(ax: "Axes", event: np.ndarray, scale: Scale) -> Any:
    """Draw an event of `arrange`; return the image if it has a color map, else None."""
    if event.ndim == 2:
        ax.plot(event)
        return None
    ax.set(xticks=[], yticks=[], facecolor=_HIDDEN)  # seen where pixels are NaN
    low, high, cmap = scale
    if event.shape[-1] == 1:
        return ax.imshow(event[..., 0], vmin=low, vmax=high, cmap=cmap)
    is_known = np.isfinite(event).all(-1, keepdims=True)
    colors = np.clip((event - low) / max(high - low, np.finfo(float).tiny), 0, 1)
    ax.imshow(np.concatenate([np.where(is_known, colors, 0), is_known], axis=-1))
    return None
