"""All rows, group by group."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from . import rows_control, rows_discrete, rows_equinox, rows_jax, rows_losses

ROWS = [*rows_equinox.ROWS, *rows_jax.ROWS, *rows_losses.ROWS, *rows_control.ROWS, *rows_discrete.ROWS]

if (Path(__file__).parent / "rows_flax.py").exists() and importlib.util.find_spec("flax") is not None:
    from . import rows_flax

    ROWS += rows_flax.ROWS
