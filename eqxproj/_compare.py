"""`python -m eqxproj compare`: one network trained by projections and by gradients, side by side.

Both start from the same parameters and see the same batches, and `eqxproj.train` runs both. It prints a table, and
writes a picture and a JSON file. Limits: a multilayer perceptron on images, one seed.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import eqxproj
from eqxproj import datasets

# The defaults of each data set: (steps, batch size).
_DEFAULTS = {"digits": (600, 128), "mnist": (1200, 256), "cifar10": (1200, 256)}

# The values of `--solver`, and the class of `eqxproj` that each stands for.
_SOLVERS = {
    "cyclic": "CyclicProjections",
    "alternating": "AlternatingProjections",
    "alternating-reflections": "AlternatingReflections",
    "douglas-rachford": "DouglasRachford",
    "difference-map": "DifferenceMap",
    "relaxed-reflect-reflect": "RelaxedReflectReflect",
    "cyclic-douglas-rachford": "CyclicDouglasRachford",
}

_EVALUATIONS = 20  # how many points a curve has


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The result of one method. Without `history`, it was interrupted, and `accuracy` is that of the last report."""

    method: str
    accuracy: float
    seconds: float = math.nan
    compile_seconds: float = math.nan
    steps: int | None = None
    history: dict[str, list[float]] | None = None


class _Interrupted(Exception):
    """The user has stopped the comparison; `outcomes` holds the results until then."""

    def __init__(self, outcomes: list[_Outcome]):
        super().__init__()
        self.outcomes = outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: `arguments` are the words after the name of the program, by default the process's.

    **Returns:** The exit status: 0, 1 after an error that has been printed, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    steps, batch_size = _DEFAULTS[options.dataset]
    options.steps, options.batch_size = options.steps or steps, options.batch_size or batch_size
    try:
        data = datasets.load(options.dataset, options.data_dir).flatten()
    except (OSError, ValueError) as error:
        return _fail(str(error))
    if options.batch_size > len(data.train[0]):
        return _fail(
            f"--batch-size: got {options.batch_size}; {options.dataset!r} has {len(data.train[0])} samples to train on."
        )
    print(_headline(options, data), flush=True)
    try:
        outcomes = _compare(options, data)
    except _Interrupted as interruption:
        print("\nStopped by Ctrl-C. Reached so far:")
        print(_table(interruption.outcomes))
        return 130
    print(_table(outcomes), flush=True)
    return _write_files(options, data, outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eqxproj", description="Train JAX models by projections instead of gradients."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare")
    compare = commands.add_parser(
        "compare",
        help="train one network by projections and by gradients, side by side",
        description="Train the same multilayer perceptron from the same parameters on the same batches, once by "
        "projections (eqxproj.train with its defaults, hence preconditioned) and once by gradients, with the same "
        "optimizer. Print a table and draw test accuracy over steps and over seconds.",
    )
    every = "; ".join(f"{name} {steps:,}, {batch}" for name, (steps, batch) in _DEFAULTS.items())
    shown = "(default: %(default)s)"
    compare.add_argument("--dataset", choices=list(_DEFAULTS), default="digits", help=f"what to train on {shown}")
    folder_help = (
        "local folder with the data, in the layout of the Hugging Face hub; without it, mnist and cifar10 are "
        "downloaded (digits comes with the package)"
    )
    compare.add_argument("--data-dir", metavar="DIR", help=folder_help)
    for name, text in (("--steps", "training steps"), ("--batch-size", "samples in a step")):
        help_text = f"{text} (default: by data set; steps, batch size: {every})"
        compare.add_argument(name, type=_positive, metavar="N", help=help_text)
    seed_help = f"seed of the parameters and of the batches {shown}"
    compare.add_argument("--seed", type=_natural, metavar="N", default=0, help=seed_help)
    compare.add_argument("--width", type=_positive, metavar="N", default=128, help=f"units in a hidden layer {shown}")
    compare.add_argument("--depth", type=_natural, metavar="N", default=2, help=f"number of hidden layers {shown}")
    solver_help = f"projection algorithm, one of {', '.join(_SOLVERS)} (default: that of eqxproj.train)"
    compare.add_argument("--solver", choices=list(_SOLVERS), metavar="NAME", help=solver_help)
    output_help = f"the picture; its suffix is its format {shown}"
    compare.add_argument("--output", metavar="FILE", default="compare.png", help=output_help)
    compare.add_argument("--json", metavar="FILE", help="write the settings and the curves there as well")
    compare.add_argument("--no-progress", action="store_true", help="draw no progress bars")
    return parser


def _natural(text: str, least: int = 0) -> int:
    """An argument that must be a whole number, `least` or more."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= least:
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number, {least} or more")


_positive = functools.partial(_natural, least=1)


def _headline(options: argparse.Namespace, data: datasets.Dataset) -> str:
    sizes = [data.input_shape[0], *[options.width] * options.depth, data.n_classes]
    return (
        f"{options.dataset}: {len(data.train[0]):,} samples to train on, {len(data.test[0]):,} to test; "
        f"relu network {'-'.join(map(str, sizes))}; {options.steps:,} steps of {options.batch_size:,} samples"
    )


# --- training ---


def _loss(model: Callable, x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Mean cross-entropy."""
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def _accuracy(model: Callable, x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Fraction of the samples whose largest logit is the right one."""
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def _compare(options: argparse.Namespace, data: datasets.Dataset) -> list[_Outcome]:
    """Train by both methods. Raises `_Interrupted` at Ctrl-C."""
    model_key, train_key = jax.random.split(jax.random.key(options.seed))
    model = eqx.nn.MLP(
        data.input_shape[0], data.n_classes, options.width, options.depth, activation=jax.nn.relu, key=model_key
    )
    solver = None if options.solver is None else getattr(eqxproj, _SOLVERS[options.solver])()
    outcomes = []
    for method, settings in (("projection", {"solver": solver}), ("gradient", {})):
        try:
            outcomes.append(_train(options, data, model, train_key, method=method, **settings))
        except eqxproj.TrainingInterrupted as stop:
            reached = stop.history["eval_accuracy"]
            last = float(reached[-1]) if len(reached) else math.nan
            raise _Interrupted([*outcomes, _Outcome(method, last)]) from None
        except KeyboardInterrupt:
            raise _Interrupted(outcomes) from None
    return outcomes


def _train(
    options: argparse.Namespace, data: datasets.Dataset, model: eqx.Module, key: jax.Array, **settings: Any
) -> _Outcome:
    """Train by one method, with these settings of `eqxproj.train`."""
    result = eqxproj.train(
        model,
        data.train,
        _loss,
        steps=options.steps,
        batch_size=options.batch_size,
        key=key,
        eval_data=data.test,
        eval_every=max(1, options.steps // _EVALUATIONS),
        evaluate={"accuracy": _accuracy},
        progress=not options.no_progress,
        **settings,
    )
    history = {name: np.asarray(values, float).ravel().tolist() for name, values in result.history.items()}
    (compile_seconds,) = history.pop("compile_seconds")
    accuracy, seconds = history["eval_accuracy"][-1], history["seconds"][-1]
    return _Outcome(settings["method"], accuracy, seconds, compile_seconds, options.steps, history)


# --- table, picture and report ---


def _table(outcomes: Sequence[_Outcome]) -> str:
    """The outcomes as text, one line for each method, with a dash for a missing number."""
    rows = [["method", "test accuracy", "seconds", "compile seconds", "steps"]]
    for outcome in outcomes:
        numbers = [f"{outcome.accuracy:.4f}", f"{outcome.seconds:.2f}", f"{outcome.compile_seconds:.2f}"]
        steps = "interrupted" if outcome.steps is None else f"{outcome.steps:,}"
        rows.append([outcome.method, *("-" if number == "nan" else number for number in numbers), steps])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _write_files(options: argparse.Namespace, data: datasets.Dataset, outcomes: Sequence[_Outcome]) -> int:
    """Write the JSON file, where one is wanted, and the picture; both, even if one fails. Returns the exit status."""
    status = 0
    if options.json is not None:
        text = json.dumps(_finite(_report(options, outcomes)), indent=1, allow_nan=False) + "\n"
        status |= _write(options.json, "--json", text.encode())
    try:
        picture = _picture(pathlib.Path(options.output), _headline(options, data), outcomes)
    except ImportError as error:
        return _fail(f"no picture was drawn, since matplotlib is missing ({error}): pip install 'eqxproj[plot]'")
    except ValueError as error:
        return _fail(f"--output: got {options.output!r}; wanted a file name with the suffix of a format. {error}")
    return status | _write(options.output, "--output", picture)


def _report(options: argparse.Namespace, outcomes: Sequence[_Outcome]) -> dict[str, Any]:
    """The contents of the JSON file."""
    device = jax.devices()[0]
    return {
        "settings": vars(options),
        "versions": {"eqxproj": eqxproj.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": f"{device.platform}: {device.device_kind}",
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def _finite(value: Any) -> Any:
    """The same nested value with `None` in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _picture(path: pathlib.Path, title: str, outcomes: Sequence[_Outcome]) -> bytes:
    """Test accuracy over steps and over seconds, in the format of the path's suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 2, sharey=True)
    labels = {"projection": "projection (eqxproj)", "gradient": "gradient (same optimizer)"}
    for axis, over, unit in zip(axes, ("step", "seconds"), ("steps", "seconds of training"), strict=True):
        for outcome, color, line in zip(outcomes, ("tab:blue", "tab:orange"), ("-", "--"), strict=True):
            history = outcome.history or {}
            label = f"{labels[outcome.method]}: {outcome.accuracy:.4f}"
            axis.plot(history[over], history["eval_accuracy"], linestyle=line, marker=".", color=color, label=label)
        axis.set_xlabel(unit)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".") or "png", dpi=150)
    return content.getvalue()


def _write(path: str, argument: str, content: bytes) -> int:
    """Write a file, or print why that failed and leave no half-written file behind."""
    target = pathlib.Path(path)
    try:
        file = target.open("wb")
    except OSError as error:
        return _fail(f"{argument}: {path!r} could not be opened for writing ({error}). Name a file that can be.")
    try:
        with file:
            file.write(content)
    except OSError as error:
        if target.is_file():  # and not a device such as /dev/full
            target.unlink(missing_ok=True)
        return _fail(f"{argument}: {path!r} could not be written ({error}). Free some space, or name another file.")
    print(f"wrote {path}")
    return 0


def _fail(message: str) -> int:
    """Print an error, and return the exit status 1."""
    print(f"error: {message}", file=sys.stderr)
    return 1
