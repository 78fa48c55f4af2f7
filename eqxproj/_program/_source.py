"""Where in the user's code an equation comes from.

Transforms the source information of a jaxpr's equation into one line of text. Limits: what a library does in functions
of its own is shown where the user calls it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax.extend as jex

_LIBRARIES = [os.sep + name + os.sep for name in "jax jaxlib equinox optax flax jaxtyping beartype".split()]
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def source_of(source_info: Any, outer: str | None = None) -> str:
    """The innermost frame in the user's own code; else `outer`, where the function that is inlined is called."""
    traceback = getattr(source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()) or ():
        if "trace_to_jaxpr" in frame.function_name and outer is not None:
            break  # what follows is the place of the function's first call, of which later ones reuse the trace
        if _is_users(frame.file_name):
            function = frame.function_name.rpartition("<locals>.")[2]
            return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({function})"
    return jex.source_info_util.summarize(source_info) if outer is None else outer


@functools.lru_cache(4096)
def _is_users(file: str) -> bool:
    """Whether a file belongs to none of the libraries of the stack, nor to the standard library."""
    if file.startswith("<") or os.path.abspath(file).startswith(_HERE):
        return False
    if "site-packages" in file:
        return not any(part in file for part in _LIBRARIES)
    return f"{os.sep}lib{os.sep}python" not in file
