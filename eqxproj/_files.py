"""Files that are written whole or not at all: under another name first, which is then renamed.

Transforms nothing. Limits: a device or a pipe is written to as it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ._errors import described

SUFFIXES = (".png", ".svg", ".pdf")
"""Of the pictures that methods draw."""


def check_picture(path: Any) -> pathlib.Path:
    """Where a picture is to be written.

    **Raises:** `TypeError` for what is no path, `ValueError` for a suffix that is not of a picture or for a folder,
    `FileNotFoundError` where the folder that it is to lie in is missing.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f'`path` must be the name of a file such as "problem.png", got {described(path)}.')
    target = pathlib.Path(os.fsdecode(path)).expanduser()
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"`path` must end in one of {', '.join(SUFFIXES)}, got {str(target)!r}.")
    if target.is_dir():
        raise ValueError(f"`path` must be the name of a file, got {str(target)!r}, which is a folder.")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"`path` is {str(target)!r}, but there is no folder {str(target.parent)!r}. Make it first, or name another."
        )
    return target


def check_packages(who: str, packages: Sequence[str]) -> None:
    """Raises an `ImportError` for packages of the extra `plot` that are missing; `who` needs them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{who} needs {' and '.join(missing)}, which is missing: pip install 'eqxproj[plot]'.")


def write_figure(target: pathlib.Path, figure: Any) -> None:
    """Writes a figure of matplotlib to a path that `check_picture` has seen."""
    content = io.BytesIO()
    figure.savefig(content, format=target.suffix.removeprefix(".").lower(), dpi=150)
    write_whole(target, content.getvalue())


def is_replaced(target: pathlib.Path) -> bool:
    """Whether a path is a file, or may become one: not a device or a pipe."""
    return target.is_file() or not target.exists()


def write_whole(target: pathlib.Path, content: bytes) -> None:
    """Writes a file. Where that fails, what was there before is there still."""
    if not is_replaced(target):
        target.write_bytes(content)
        return
    with replacing(target) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(target: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of another when all is written."""
    target = target.resolve()  # what a link leads to is replaced, not the link
    with _beside(target) as (temporary, descriptor):
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a full disk may show itself here only
        os.chmod(temporary, target.stat().st_mode if target.exists() else 0o666 & ~_umask())
        os.replace(temporary, target)


@contextlib.contextmanager
def _beside(target: pathlib.Path) -> Iterator[tuple[str, int]]:
    """A temporary file in the folder of another, which is gone afterwards, unless it was renamed."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        yield temporary, descriptor
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
