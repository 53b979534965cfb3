import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Free what a module compiled: a process may map only so many programs into memory."""
    yield
    jax.clear_caches()
