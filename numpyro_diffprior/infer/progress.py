"""Progress of draws: a bar, and parts that were drawn before."""

from types import TracebackType
from typing import Any, NamedTuple, Self

from numpyro_diffprior._compile.bars import make_bar

__all__ = ["Division", "Monitor", "ProgressBar"]


class Division(NamedTuple):
    """How the events of a group of sites are divided: two runs have the same parts if this agrees.

    Attributes:
        num_parts: The number of parts.
        num_devices: The number of devices that share each of them.
    """

    num_parts: int
    num_devices: int


class Monitor:
    """Follows the draws of a model, part by part; this one neither shows nor keeps anything."""

    def drawn(self, group: int, division: Division) -> list[Any]:
        """Return the first parts of a group of sites that need not be drawn again."""
        return []

    def finish(self, group: int, part: Any, division: Division) -> None:
        """Take a part of a group of sites that was drawn."""

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

    def finish(self, group: int, part: Any, division: Division) -> None:
        if self._bar.total is None or self._bar.n >= self._bar.total:
            self._bar.total = (self._bar.total or 0) + division.num_parts  # the next group's
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
