"""What all tests share: compiled programs are forgotten after each module.

Each compiled program maps some memory, and Linux gives a process 65,530 maps at most (`vm.max_map_count`); one that
runs many hundreds of tests reaches them, and its next compilation ends the process.
"""

from __future__ import annotations

import gc

import jax
import jaxtyping
import pytest


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


@pytest.fixture(scope="module")
def quick_compilation():
    """Nearly all of the time is compilation, and these models are so small that slow code is fast enough."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
