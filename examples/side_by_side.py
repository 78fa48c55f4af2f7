"""What the examples share: their command line, and a figure with the curves of several runs side by side."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Literal

import eqxproj

METHODS: tuple[Literal["projection"], Literal["gradient"]] = ("projection", "gradient")


def parser(description: str | None, name: str, steps: int, data: str) -> argparse.ArgumentParser:
    """The options of an example.

    **Arguments:**

    - `description`: the docstring of the example.
    - `name`: of the example; the figure is called after it.
    - `steps`: how many steps it takes by default.
    - `data`: what `--data-dir` is a folder of, and what is used without it.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    made.add_argument("--data-dir", metavar="DIR", help=data)
    made.add_argument(
        "--figure",
        metavar="FILE",
        type=pathlib.Path,
        default=pathlib.Path(f"{name}.png"),
        help="the picture; its suffix is its format (default: %(default)s)",
    )
    return made


def finals(results: Mapping[str, eqxproj.TrainResult], quantity: str) -> dict[str, float]:
    """What each run has reached in the end, printed and returned."""
    reached = {run: float(result.history[f"eval_{quantity}"][-1]) for run, result in results.items()}
    for run, value in reached.items():
        print(f"{run}: test {quantity} {value:.3f}, {results[run].history['seconds'][-1]:.1f} seconds of training")
    return reached


def draw(path: pathlib.Path, title: str, quantity: str, results: Mapping[str, eqxproj.TrainResult]) -> None:
    """A curve for each run, of what it was evaluated on over the steps. Without matplotlib, says so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no figure was drawn, since matplotlib is missing ({error}): pip install 'eqxproj[plot]'")
        return
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for run, result in results.items():
        values = result.history[f"eval_{quantity}"]
        axes.plot(result.history["step"], values, marker=".", label=f"{run}: {values[-1]:.3f}")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"test {quantity}")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")
