"""Metrics of EM in a CSV file, a line for each iteration."""

import os
import warnings
from pathlib import Path

import numpy as np

from numpyro_diffprior.em.state import EMMetrics, EMState

__all__ = ["CSVLogger"]

_HEADER = ",".join(["iteration", *EMMetrics._fields])


class CSVLogger:
    """A callback of `EM.run` that writes the metrics of each iteration to a CSV file.

    The first line has the names of the columns: ``iteration`` and those of `EMMetrics`. If the
    file exists, lines before the current iteration stay and later ones are replaced, so that a run
    that goes on from a checkpoint continues its file. If a line cannot be written, the run goes on
    and a warning says why, once.

    Args:
        path: The file.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file has other columns.

    Example:
        >>> em.run(..., checkpoint="run", callback=CSVLogger("metrics.csv"))  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._last: int | None = None  # the iteration of the last line, once that is known
        self._has_failed = False
        with self._path.open("a+") as file:
            file.seek(0)
            header = file.readline().rstrip("\n")
        if header not in ("", _HEADER):
            raise ValueError(
                f"CSVLogger: expected '{path}' to be empty or to begin with '{_HEADER}', got "
                f"'{header}'; choose another file."
            )

    def __call__(self, state: EMState, metrics: EMMetrics) -> None:
        """Write the line of an iteration."""
        iteration = state.num_iterations
        row = [str(iteration), *(str(np.asarray(x)) for x in metrics)]
        try:
            if self._last is None or iteration <= self._last:
                self._cut(iteration)
            with self._path.open("a") as file:
                file.write(",".join(row) + "\n")
            self._last = iteration
        except OSError as error:
            self._last = None  # the line may be incomplete
            if not self._has_failed:
                warnings.warn(
                    f"CSVLogger: a line could not be written to '{self._path}' ({error}); the run "
                    "goes on.",
                    stacklevel=3,
                )
            self._has_failed = True

    def _cut(self, iteration: int) -> None:
        """Keep the complete lines before an iteration."""
        text = self._path.read_text() if self._path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()[1:]
        kept = [line for line in lines if int(line.split(",", 1)[0]) < iteration]
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text("\n".join([_HEADER, *kept, ""]))
        os.replace(partial, self._path)
