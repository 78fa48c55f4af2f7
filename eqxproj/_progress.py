"""Progress of training: a bar in a terminal or a notebook, and elsewhere, as in a log, a line every few seconds.

Limits: both go to standard error, and where that cannot be written to, training goes on without them.
"""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm.auto import tqdm

_SECONDS = 5.0
"""From one line to the next."""


class Lines:
    """A line every few seconds, and one at the end: how many steps are done, what was last reported, and seconds."""

    def __init__(self, total: int, name: str):
        self._total, self._name = total, name
        self._done, self._postfix = 0, ""
        self._start = self._last = time.monotonic()

    def update(self, steps: int = 1) -> None:
        self._done += steps
        if time.monotonic() - self._last >= _SECONDS:
            self._print()

    def set_postfix_str(self, s: str) -> None:
        self._postfix = f", {s}"

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        line = f"{self._name}: step {self._done:,} of {self._total:,}{self._postfix}, {self._last - self._start:.0f} s"
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def progress(total: int, name: str, shown: bool) -> Lines | tqdm:
    """Where the progress of `total` steps is shown, if it is."""
    is_seen = sys.stderr is not None and sys.stderr.isatty() or "ipykernel" in sys.modules
    return Lines(total, name) if shown and not is_seen else tqdm(total=total, desc=name, disable=not shown)
