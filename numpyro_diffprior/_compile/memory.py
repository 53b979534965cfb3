"""Memory: how many events to compute at once, and whether a compiled program fits.

XLA plans the memory of a program when it compiles it, so that a program which does not fit can be
refused before it runs. Otherwise the operating system would end the process without a message.
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffprior._compile.checks import check_count

__all__ = ["BatchLimit", "advise", "check_memory", "free_bytes"]


class BatchLimit(NamedTuple):
    """How many events (or particles) are in memory at once on one device; static.

    Attributes:
        num_events: Their number.
        num_elements: The number of elements of all of them together, or None for no such limit.
    """

    num_events: int
    num_elements: int | None = None

    @classmethod
    def of(cls, owner: str, max_batch_size: int | None, default: int) -> "BatchLimit":
        """Return the limit that a user gave, or the default.

        Raises:
            ValueError: If the limit is not a positive integer.
        """
        if max_batch_size is None:
            return cls(default, _MAX_ELEMENTS)
        return cls(check_count(owner, "max_batch_size", max_batch_size))

    def num_groups(self, event_size: int, group_size: int = 1) -> int:
        """Return how many groups of events, of the same size each, are in memory at once."""
        limit = self.num_events
        if self.num_elements is not None:
            limit = min(limit, self.num_elements // event_size)
        return max(1, limit // group_size)


# Per pixel, a U-Net of the default widths takes 3 kB in a forward evaluation, 11 kB with a
# vector-Jacobian product and 25 kB in training (`benchmarks/memory.py`).
_MAX_ELEMENTS = 2**18


def check_memory(
    task: str, remedy: Callable[..., str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a jitted function: raise unless the program's memory is free when it is called.

    Nothing is compiled twice, because ``jax.jit`` caches what is compiled ahead of time. Inside of
    another compiled function there is no check.

    Args:
        task: What the function computes, for the message; a plural noun.
        remedy: Returns advice, given the factor by which the batch must shrink and the function's
            arguments.

    Raises:
        MemoryError: If the program needs more memory than is free.
    """

    def decorate(function: Any) -> Callable[..., Any]:
        @wraps(function)
        def checked(*args: Any) -> Any:
            if not _is_traced(args) and not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
                executable = function.lower(*args).compile().runtime_executable()
                _check(executable, task, lambda factor: remedy(factor, *args))
            return function(*args)

        return checked

    return decorate


def advise(option: str, factor: float, batch_size: int, least: int = 1) -> str:
    """Return the advice to multiply the batch size by a factor below one, if that is possible."""
    smaller = int(factor * batch_size / least) * least
    if smaller:
        return f"pass {option}={smaller} (now {batch_size}) or less"
    return f"{option}={least} does not suffice; use a network of fewer channels or smaller events"


def _is_traced(args: Any) -> bool:
    # Arrays made inside of a compiled function are tracers, even if no argument is.
    leaves = (*jax.tree.leaves(args), jnp.zeros(()))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


class _Plan(NamedTuple):
    """The memory that a program needs besides what is in use, in bytes.

    Attributes:
        fixed: The size of results (and of arguments, where `free_bytes` counts them as free).
        temporary: The size of all intermediate arrays at their peak.
    """

    fixed: int
    temporary: int


def _check(executable: Any, task: str, remedy: Callable[[float], str]) -> None:
    """Raise a `MemoryError` if a compiled program needs more memory than is free."""
    (device, *_), plan = executable.local_devices(), _plan(executable)
    free = free_bytes(device)
    if plan is None or free is None or sum(plan) <= free:
        return
    if 2 * plan.fixed < free:  # results of several batches are copied when they are put together
        advice = remedy(0.9 * (free - 2 * plan.fixed) / max(plan.temporary - plan.fixed, 1))
    else:
        advice = "the results alone do not fit, so that fewer must be computed per call"
    raise MemoryError(
        f"{task} need {_gibibytes(sum(plan))} of memory on {device}, where {_gibibytes(free)} are "
        f"free: {advice}."
    )


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


@lru_cache(maxsize=32)  # of executables, which are kept: reading a plan takes many milliseconds
def _plan(executable: Any) -> _Plan | None:
    """Return what XLA planned, or None if it does not tell."""
    try:
        stats = executable.get_compiled_memory_stats()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    devices = executable.local_devices()
    fixed, temporary = stats.output_size_in_bytes, stats.temp_size_in_bytes
    if devices[0].platform == "cpu":
        # The devices share the host's memory.
        return _Plan(fixed * len(devices), temporary * len(devices))
    return _Plan(fixed + stats.argument_size_in_bytes, temporary)


def free_bytes(device: jax.Device) -> int | None:
    """Return the memory that a program on a device can use, or None if that is not known.

    On accelerators it is all memory that JAX manages, since programs that still run asynchronously
    may hold memory that they are about to free.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = [*_available_bytes(), *_unused_limits(_lines(Path("/proc/self/cgroup")))]
    return min(found, default=None)


def _available_bytes() -> list[int]:
    """Return the host's memory that is free or can be freed; all memory outside of Linux."""
    for line in _lines(Path("/proc/meminfo")):
        name, _, size = line.partition(":")
        if name == "MemAvailable":
            return [int(size.split()[0]) * 1024]
    try:
        return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Windows
        return []


def _unused_limits(groups: Sequence[str]) -> list[int]:
    """Return what is left of the limits of control groups (of containers and jobs).

    Args:
        groups: Lines of ``/proc/self/cgroup``; those of version 2 start with ``0::``.
    """
    unused = []
    for line in groups:
        number, _, path = line.partition("::/")
        if number != "0":
            continue
        own = _CGROUPS / path
        for group in (own, *own.parents[: len(Path(path).parts)]):
            limit = "".join(_lines(group / "memory.max"))
            used = "".join(_lines(group / "memory.current"))
            if limit.isdigit() and used.isdigit():
                stats = dict(line.split() for line in _lines(group / "memory.stat"))
                cached = int(stats.get("inactive_file", 0))
                unused.append(max(0, int(limit) - int(used) + cached))
    return unused


_CGROUPS = Path("/sys/fs/cgroup")


def _lines(path: Path) -> list[str]:
    """Return the lines of a file, none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
