"""What the command line writes, and what ends it: standard output, files, Ctrl-C and SIGTERM.

Limits: signals are handled in the main thread alone.
"""

import contextlib
import importlib.util
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from .._files import is_replaced, write_whole


def say(text: str) -> None:
    """Print to standard output. Where nobody reads it any more, or it is full, go on without it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # a closed pipe, a full disk, a closed file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def fail(message: str) -> int:
    """Print an error, and return the exit status 1."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


# --- signals ---


class Stops:
    """Makes Ctrl-C and SIGTERM raise `KeyboardInterrupt`, inside of a `with`; `status` is the exit status for them.

    JAX may crash where an exception ends it halfway, so that a signal waits until no function of JAX is running; a
    second one does not. After `ignore`, none does anything: what is left to do is short, and leaves nothing half done.
    """

    def __init__(self):
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():  # handlers can be set from there alone
            self._before = {number: signal.getsignal(number) for number in (*_STOPPING, *_WAITING)}
            for number in self._before:
                signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self.ignore()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        may_wait = bool(_WAITING) and (self._number is None or number in _WAITING)
        if number in _STOPPING:
            self._number = number
        if may_wait and _is_inside_jax(frame):
            signal.setitimer(signal.ITIMER_REAL, _SECONDS)  # then this is called again
        else:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        if self._before and _WAITING:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    @property
    def name(self) -> str:
        return "SIGTERM" if self._number == signal.SIGTERM else "Ctrl-C"

    @property
    def status(self) -> int:
        return 128 + (self._number or signal.SIGINT)


_STOPPING = (signal.SIGINT, signal.SIGTERM)
_WAITING = (signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()  # Windows has no such timer
_SECONDS = 0.005


def _is_inside_jax(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib"):
            return True
        frame = frame.f_back
    return False


# --- files ---


def output_problem(argument: str, path: str) -> str | None:
    """Why a file cannot be written, found by making and removing one beside it; `None` where it can be."""
    target = pathlib.Path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{path!r} is a folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(f"{path!r} may not be written to")
        if is_replaced(target):
            with tempfile.NamedTemporaryFile(dir=target.resolve().parent):
                pass
    except OSError as error:
        return f"{argument}: {path!r} cannot be written ({error}). Name a file in a folder that is there."
    return None


def picture_problem(argument: str, path: str) -> str | None:
    """Why a picture cannot be drawn: matplotlib is missing, or does not know the suffix; `None` where it can be."""
    without = "or leave the picture out with --no-picture"
    if importlib.util.find_spec("matplotlib") is None:
        return f"a picture needs matplotlib, which is missing: pip install 'eqxproj[plot]', {without}."
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if (suffix := pathlib.Path(path).suffix) and suffix.removeprefix(".").lower() not in formats:
        known = ", ".join(f".{name}" for name in sorted(formats))
        return f"{argument}: got {path!r}; wanted a file name with one of the suffixes {known}, {without}."
    return None


def write(files: Sequence[tuple[str, str, bytes]]) -> int:
    """Write files, each `(argument, path, content)`; all of them, even if one fails. Returns the exit status."""
    status = 0
    for argument, path, content in files:
        try:
            write_whole(pathlib.Path(path), content)
        except OSError as error:
            status = fail(
                f"{argument}: {path!r} could not be written ({error}). Free some space, or name another file."
            )
        else:
            say(f"wrote {path}")
    return status
