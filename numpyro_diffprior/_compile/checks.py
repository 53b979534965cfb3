"""Validation of numeric options: return a Python number or raise a `ValueError`."""

import math
from typing import Any

import jax
import numpy as np

__all__ = ["check_count", "check_number", "set_fields"]


def check_count(owner: str, name: str, value: Any, least: int = 1) -> int:
    """Return the option ``name`` of ``owner`` as an ``int``, or raise if it is below ``least``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise ValueError(f"{owner}: expected {name} to be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{owner}: expected {name} >= {least}, got {value}.")
    return int(value)


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    inclusive: bool = False,
) -> float:
    """Return the option ``name`` of ``owner`` as a ``float``, or raise if it is not in the limits.

    The upper limit is inclusive, the lower one only if ``inclusive``.
    """
    if isinstance(value, jax.Array | np.ndarray) and not isinstance(value, jax.core.Tracer):
        value = value.item() if value.ndim == 0 else value
    kinds = int | float | np.integer | np.floating
    if isinstance(value, bool | np.bool_) or not isinstance(value, kinds):
        raise ValueError(f"{owner}: expected {name} to be a number, got {value!r}.")
    number = float(value)
    is_above = number >= low if inclusive else number > low
    if not (math.isfinite(number) and is_above and number <= high):
        least = f"{name} {'>=' if inclusive else '>'} {low:g}"
        limits = least if math.isinf(high) else f"{least} and <= {high:g}"
        raise ValueError(f"{owner}: expected {limits}, got {value}.")
    return number


def set_fields(instance: Any, **fields: Any) -> None:
    """Set fields of a frozen dataclass, in its ``__init__`` or ``__post_init__``."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
