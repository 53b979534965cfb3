import gc
import os

# Most of the tests' time is compilation, and these flags more than halve it. A value that is set
# already is kept: an empty one selects XLA's default flags. The last flag makes runs repeatable:
# the last bits of large FFTs depend on the number of threads, which depends on what else runs.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_multi_thread_eigen=false",
)

import jax
import pytest


def pytest_configure(config):
    """Keep compiled programs on disk, since most of the tests' time is compilation."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Source locations in programs and frequent garbage collection take a tenth of the time.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    gc.set_threshold(200_000, 50, 100)


# The longest modules come first, so that no process waits for another one at the end.
LONGEST = (
    *("test_processes.py", "test_em.py", "test_potentials.py", "test_draws_in.py"),
    *("test_checkpoints.py", "test_units.py", "test_devices.py", "test_groups.py"),
)


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Free the programs that a module compiled: a process can map only a limited number."""
    yield
    jax.clear_caches()
