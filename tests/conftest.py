"""What all tests share: compiled programs are forgotten after each module, and read again from a folder.

Each compiled program maps some memory, and Linux gives a process 65,530 maps at most (`vm.max_map_count`); one that
runs many hundreds of tests reaches them, and its next compilation ends the process.
"""

from __future__ import annotations

import gc
import shutil
import tempfile

import jax
import jaxtyping
import pytest


def pytest_configure(config):
    """The fast tests leave most optimizations of XLA out: most of their time is compilation. The slow ones, which are
    chosen by name, compile as users do."""
    if config.option.markexpr == "not slow":
        jax.config.update("jax_disable_most_optimizations", True)
    remember_programs(config)


def remember_programs(config):
    """What one process or module has compiled, the others read from a folder, which is gone after the run."""
    is_worker = hasattr(config, "workerinput")
    config.programs = config.workerinput["programs"] if is_worker else tempfile.mkdtemp(prefix="eqxproj-tests-")
    if not is_worker:
        config.add_cleanup(lambda: shutil.rmtree(config.programs, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", config.programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure_node(node):
    node.workerinput["programs"] = node.config.programs


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def registry():
    """The rules that a test registers are gone after it."""
    from eqxproj.rules import RULES  # not at the top: types are checked in what is imported after the plugins start

    before = dict(RULES.maps[0])
    yield
    RULES.clear()
    RULES.update(before)


@pytest.fixture
def untyped():
    """The library as users have it, without the check of annotated types that these tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def full_precision():
    """For digits that are compared: a GPU rounds the operands of float32 products to 10 bits unless it is asked not to.

    Tests without it pass with such products, too: see `tensor_float.py`.
    """
    with jax.default_matmul_precision("highest"):
        yield


def compile_with(most_optimizations):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not most_optimizations)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compilation():
    """For slow tests too: their models are so small that slow code is fast enough."""
    yield from compile_with(most_optimizations=False)


@pytest.fixture
def optimized():
    """For fast tests too: what they measure depends on how the program is compiled."""
    yield from compile_with(most_optimizations=True)
