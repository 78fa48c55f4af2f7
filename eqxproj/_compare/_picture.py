"""The picture of a comparison: test error over steps and over seconds, on a scale that shows most of the run.

The first tenth of a run, in which the error falls from chance, would flatten all that comes after it. So the error has
a logarithmic scale that begins where that tenth ends. Limits: of a model without accuracy the test loss is drawn in its
place, on a plain scale where it is not positive.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Curve(NamedTuple):
    """One line of the picture: `history` has `"step"`, `"seconds"`, and `"eval_accuracy"` or `"eval_loss"`."""

    label: str
    history: Mapping[str, Sequence[float]]


_HIDDEN = 0.1  # the part of a run whose errors the scale need not show
_STYLES = (("tab:blue", "-"), ("tab:orange", "--"))


def errors_of(curve: Curve, samples: int) -> list[float]:
    """The test errors of a curve, or its losses. A logarithm has no zero: half a sample stands for no error."""
    if "eval_accuracy" not in curve.history:
        return list(curve.history["eval_loss"])
    return [max(1.0 - accuracy, 0.5 / samples) for accuracy in curve.history["eval_accuracy"]]


def limits(curves: Sequence[Curve], samples: int) -> tuple[float, float]:
    """The least and the largest error that the scale shows: all errors after the first tenth of the steps."""
    last = max(curve.history["step"][-1] for curve in curves)
    pairs = [p for c in curves for p in zip(c.history["step"], errors_of(c, samples), strict=True)]
    late = [error for step, error in pairs if step >= _HIDDEN * last]
    low, high = min(late), max(late)
    room = 0.05 * (high - low) or 1.0
    return (low / 1.15, high * 1.15) if low > 0 else (low - room, high + room)


def draw(title: str, curves: Sequence[Curve], samples: int, suffix: str) -> bytes:
    """The picture in the format of a suffix such as `".png"`. `samples` is the number of test samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, over in zip(axes, ("step", "seconds"), strict=True):
        for curve, (color, line) in zip(curves, _STYLES, strict=False):
            errors = errors_of(curve, samples)
            axis.plot(curve.history[over], errors, line, marker=".", color=color, label=curve.label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_xlabel("steps")
    axes[1].set_xlabel("seconds of training, without compilation")
    low, high = limits(curves, samples)
    has_accuracy = all("eval_accuracy" in curve.history for curve in curves)
    if low > 0:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
        percent = FuncFormatter(lambda error, _: f"{100 * error:g} %")
        axes[0].yaxis.set_major_formatter(percent if has_accuracy else FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes[0].set_ylim(low, high)
    axes[0].set_ylabel("test error" if has_accuracy else "test loss")
    axes[0].legend(loc="upper right", fontsize="small")  # its lines are as wide as the axes
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix(".") or "png", dpi=150)
    return content.getvalue()
