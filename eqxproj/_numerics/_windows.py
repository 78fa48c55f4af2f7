"""How many windows of a convolution or a pooling read each element of its input.

In NumPy, from shapes alone. Limits: the count is a product over axes, as windows are boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def reads(
    shape: Sequence[int],
    windows: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> np.ndarray:
    """The number of windows that each element is in, as an array that broadcasts to `shape`.

    All arguments have one entry an axis: `windows` how many there are, `sizes` those of a window, the others as
    `jax.lax.reduce_window` has them.
    """
    found = np.ones((1,) * len(shape))
    axes = (shape, windows, sizes, strides, padding, base_dilation, window_dilation)
    for axis, (length, count, size, stride, (low, _), base, dilation) in enumerate(zip(*axes, strict=True)):
        at = stride * np.arange(count)[:, None] + dilation * np.arange(size) - low
        at = at[(at >= 0) & (at % base == 0)] // base
        times = np.bincount(at[at < length], minlength=length)
        found = found * times.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return found
