"""Count what a call costs before any number is computed: programs compiled, models executed."""

from contextlib import contextmanager

import jax


class Count:
    """A number of compiled programs."""

    def __init__(self):
        self.compiled = 0


_COUNTS = []


def _listen(event, duration, **kwargs):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        for count in _COUNTS:
            count.compiled += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def compilations():
    """Count the programs that are lowered for the compiler inside of the context."""
    count = Count()
    _COUNTS.append(count)
    try:
        yield count
    finally:
        _COUNTS.remove(count)


def counted(model):
    """Return a model and a list that grows by one at each execution."""
    executions = []

    def wrapped(*args, **kwargs):
        executions.append(1)
        return model(*args, **kwargs)

    return wrapped, executions
