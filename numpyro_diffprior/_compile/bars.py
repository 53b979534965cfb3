"""Progress bars that are quiet in logs."""

import sys
from typing import Any

import jax
from tqdm.auto import tqdm

__all__ = ["make_bar"]


def make_bar(name: str, show: bool, total: int | None = None, **options: Any) -> Any:
    """Return a bar of tqdm, which is quiet unless it is shown in a terminal or a notebook.

    Of several processes, the first one shows it.
    """
    show = show and jax.process_index() == 0
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    is_seen = in_notebook or (sys.stderr is not None and sys.stderr.isatty())
    return tqdm(total=total, desc=name, disable=not (show and is_seen), **options)
