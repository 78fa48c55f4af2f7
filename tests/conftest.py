"""What all tests share: compiled programs are forgotten after each module.

Each compiled program maps some memory, and Linux gives a process 65,530 maps at most (`vm.max_map_count`); one that
runs many hundreds of tests reaches them, and its next compilation ends the process.
"""

from __future__ import annotations

import gc

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    yield
    jax.clear_caches()
    gc.collect()
