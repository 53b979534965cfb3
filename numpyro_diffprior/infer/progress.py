"""Progress of draws: bars that are quiet in logs, and parts that were drawn before."""

import sys
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

__all__ = ["Monitor", "ProgressBar", "make_bar"]


class Monitor:
    """Follows the draws of a model, part by part; this one neither shows nor keeps anything."""

    def drawn(self, group: int) -> list[Any]:
        """Return the first parts of a group of sites that need not be drawn again."""
        return []

    def finish(self, group: int, part: Any, num_parts: int) -> None:
        """Take a part that was drawn, of ``num_parts`` of its group."""

    def close(self) -> None:
        """End, after all parts or after an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ProgressBar(Monitor):
    """A bar of the events that are drawn; shown after a second.

    Args:
        name: What is computed.
        show: Whether there is a bar at all.
    """

    def __init__(self, name: str, show: bool) -> None:
        self._bar = make_bar(name, show, delay=1)

    def finish(self, group: int, part: Any, num_parts: int) -> None:
        if self._bar.total is None or self._bar.n >= self._bar.total:
            self._bar.total = (self._bar.total or 0) + num_parts  # the next group's
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def make_bar(name: str, show: bool, total: int | None = None, **options: Any) -> Any:
    """Return a bar of tqdm, which is quiet unless it is shown in a terminal or a notebook."""
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    is_seen = in_notebook or (sys.stderr is not None and sys.stderr.isatty())
    return tqdm(total=total, desc=name, disable=not (show and is_seen), **options)
