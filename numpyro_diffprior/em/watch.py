"""What a run of EM shows of its progress, and what of it is saved."""

import math
from collections.abc import Callable
from typing import Any

from numpyro_diffprior._compile.bars import make_bar
from numpyro_diffprior.em.checkpoints import Checkpoints
from numpyro_diffprior.em.state import Progress
from numpyro_diffprior.infer.progress import Division, Monitor

__all__ = ["Watch"]


class Watch(Monitor):
    """Follows a run: a bar of its iterations, and its checkpoints.

    Args:
        show: Whether to show a bar.
        num_iterations: The number of iterations.
        checkpoints: Where to save, or None.
    """

    def __init__(
        self,
        show: bool = False,
        num_iterations: int | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self._bar = make_bar("EM", show, num_iterations)
        self._checkpoints = checkpoints
        self._progress: Progress | None = None
        self._known: dict[int, tuple[Division, list[Any]]] = {}
        self._num_drawn = 0
        self._metrics = ""
        self._entered: set[str] = set()

    def start(self, progress: Progress) -> None:
        """Begin, or go on, from here."""
        self._progress = progress
        self._bar.update(len(progress.history))
        if self._checkpoints is not None:
            self._checkpoints.save(progress)
            self._checkpoints.save_history(progress)
            self._known = self._checkpoints.load_draws(progress)

    def enter(self, phase: str) -> None:
        """Begin a phase of an iteration, which compiles its programs the first time."""
        self._num_drawn = 0
        compiling = "" if phase in self._entered else ", compiling"
        self._entered.add(phase)
        self._bar.set_postfix_str(phase + compiling + self._metrics)

    def steps_of(self, num_steps: int) -> Callable[[int], None] | None:
        """Return a function that takes the number of steps of an M-step so far; None if unseen."""
        if self._bar.disable:
            return None
        return lambda done: self._bar.set_postfix_str(f"M-step {done}/{num_steps}{self._metrics}")

    def drawn(self, group: int, division: Division) -> list[Any]:
        known_division, known = self._known.pop(group, (division, []))
        known = known if known_division == division else []
        self._num_drawn = len(known)
        return known

    def finish(self, group: int, part: Any, division: Division) -> None:
        self._num_drawn += 1
        self._bar.set_postfix_str(f"E-step {self._num_drawn}/{division.num_parts}{self._metrics}")
        if self._checkpoints is not None and self._progress is not None:
            self._checkpoints.add_draws(self._progress, group, part, division)

    def advance(self, progress: Progress) -> None:
        """Take the result of an iteration."""
        self._progress = progress
        metrics = progress.history[-1]
        self._metrics = (
            f", loss={metrics.loss:.3f}, chi2={metrics.reduced_chi_square:.2f}, "
            f"ess={metrics.ess:.1f}"
        )
        if not math.isnan(metrics.heldout_log_evidence):
            self._metrics += f", held out={metrics.heldout_log_evidence:.5g}"
        self._bar.update()
        if self._checkpoints is not None:
            self._checkpoints.forget_draws()
            self._checkpoints.save(progress)

    def close(self) -> None:
        """Save what is not saved yet, and wait until all is written."""
        if self._checkpoints is not None:
            if self._progress is not None:
                self._checkpoints.save(self._progress, now=True)
                self._checkpoints.save_draws(self._progress)
            self._checkpoints.close()
        self._bar.close()
