import os

# Compiling is what most tests cost, and these halve it. Another value of the variable is kept: an
# empty one gives XLA's own settings.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false",
)

import jax
import pytest


def pytest_configure(config):
    """Keep compiled programs on disk: most of the tests' time is XLA's."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Free what a module compiled: a process may map only so many programs into memory."""
    yield
    jax.clear_caches()
