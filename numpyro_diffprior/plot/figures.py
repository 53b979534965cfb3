r"""The axes of a plot: those that are given, or those of a new figure."""

import math
from typing import Any

import numpy as np

__all__ = ["add_colorbar", "add_legend", "make_axes"]


def make_axes(
    name: str,
    axes: Any,
    shape: tuple[int, ...],
    num_columns: int,
    size: tuple[float, float],
    **options: Any,
) -> np.ndarray:
    """Return axes in an array, one row of the figure after the other.

    Args:
        name: The function that draws, for messages.
        axes: The axes to use, or None for those of a new figure.
        shape: The shape of the array.
        num_columns: The largest number of columns of a new figure.
        size: The width and the height of each of its axes, in inches.
        **options: Options of ``matplotlib.pyplot.subplots``.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If another number of axes is given.
    """
    try:
        import matplotlib.pyplot as plt  # optional
    except ImportError as error:
        raise ImportError(
            f"{name}: plots need matplotlib: pip install 'numpyro_diffprior[plot]'"
        ) from error

    number = math.prod(shape)
    if axes is not None:
        given: np.ndarray = np.asarray(axes, dtype=object)
        if given.size != number:
            raise ValueError(f"{name}: expected {number} axes, got {given.size}.")
        return given.reshape(shape)
    num_columns = min(num_columns, number)
    num_rows = -(-number // num_columns)
    figsize = (size[0] * num_columns, size[1] * num_rows)
    _, grid = plt.subplots(
        num_rows, num_columns, figsize=figsize, squeeze=False, layout="constrained", **options
    )
    for unused in grid.flat[number:]:
        unused.remove()
    for lowest in grid.flat[number - num_columns : number]:
        lowest.tick_params(labelbottom=True)  # also above those removed
    made: np.ndarray = grid.reshape(-1)[:number].reshape(shape)
    return made


def add_colorbar(image: Any, axes: np.ndarray) -> None:
    """Add the color bar of an image beside axes that share its scale; None has no color bar."""
    if image is not None:
        image.figure.colorbar(image, ax=list(axes.flat))


def add_legend(axes: np.ndarray) -> None:
    """Add the legend of the first of some axes above all of them."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure = axes.flat[0].figure
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
