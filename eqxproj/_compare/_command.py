"""`python -m eqxproj compare`: one network trained by projections and by gradients, side by side.

Both start from the same parameters and see the same batches, and `eqxproj.train` runs both. It prints a table, and
writes a picture and a JSON file. The network and the loss may be the user's own. Limits: images of a known data set,
one seed.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import platform
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import eqxproj
from eqxproj import datasets

from .._training._direction import ValueAlone
from . import _output
from ._own import function_of, own_model, parameter_count, without_accuracy
from ._picture import Curve, draw

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

# Width and depth of the network, where it is not the user's own.
_WIDTH, _DEPTH = 128, 2

_EVALUATIONS = 20  # how many points a curve has


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The result of one method. Where it was interrupted, accuracy, loss and history are those of its last report.

    `accuracy` is NaN of a model that has none, and `loss` that of the test set.
    """

    method: str
    accuracy: float = math.nan
    seconds: float = math.nan
    compile_seconds: float = math.nan
    steps: int = 0
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    is_complete: bool = True
    loss: float = math.nan


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What is trained: data, the model with its name, the loss, and what is evaluated on the test set."""

    data: datasets.Dataset
    model: Any
    model_name: str
    loss: Callable[..., Any]
    evaluate: dict[str, Callable[..., Any]]
    key: jax.Array


class _Interrupted(Exception):
    """The user has stopped the comparison; `outcomes` holds the results until then."""

    def __init__(self, outcomes: Sequence[_Outcome] = ()):
        super().__init__()
        self.outcomes = tuple(outcomes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: `arguments` are the words after the name of the program, by default the process's.

    **Returns:** The exit status: 0, 1 after an error that has been printed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = _parser().parse_args(arguments)
    steps, batch_size = _DEFAULTS[options.dataset]
    options.steps, options.batch_size = options.steps or steps, options.batch_size or batch_size
    if (problem := _problem(options)) is not None:
        return _output.fail(problem)
    if options.model is None:
        options.width = _WIDTH if options.width is None else options.width
        options.depth = _DEPTH if options.depth is None else options.depth
    with _output.Stops() as stops:
        try:
            setup = _setup(options)
            _output.say(_headline(options, setup))
            outcomes, status = _compare(options, setup), 0
        except (OSError, ValueError, TypeError, NotImplementedError, FloatingPointError) as error:
            is_own = options.model is not None or options.loss is not None
            if is_own and not _is_of_the_library(error.__traceback__):
                raise  # of the user's code, whose traceback says where
            return _output.fail(_in_words_of_the_command_line(error))
        except KeyboardInterrupt:
            outcomes, status = [], stops.status
        except _Interrupted as interruption:
            outcomes, status = interruption.outcomes, stops.status
        stops.ignore()
        if status:
            _output.say(f"\nStopped by {stops.name}. " + ("Reached so far:" if outcomes else "Nothing was trained."))
        if not outcomes:
            return status
        _output.say(_table(outcomes))
        return _output.write(_files(options, setup, outcomes)) or status


def _problem(options: argparse.Namespace) -> str | None:
    """What can be said to be wrong with options and files before anything is trained; `None` for nothing."""
    problems = []
    if options.model is not None:
        given = [name for name in ("width", "depth") if getattr(options, name) is not None]
        problems += [f"--{name}: leave it out, since --model replaces the network that has one." for name in given]
    elif options.flatten:
        problems.append("--flatten: the built-in network is given vectors anyway. It goes with --model.")
    if not options.no_picture:
        problems.append(_output.picture_problem("--output", options.output))
        problems.append(_output.output_problem("--output", options.output))
    if options.json is not None:
        problems.append(_output.output_problem("--json", options.json))
        same = pathlib.Path(options.json).resolve() == pathlib.Path(options.output).resolve()
        if same and not options.no_picture:
            problems.append(f"--json: got {options.json!r}, which is the picture too. Name another file.")
    return next((problem for problem in problems if problem is not None), None)


def _in_words_of_the_command_line(error: Exception) -> str:
    """The message of an error, with options in the place of arguments of Python."""
    message = str(error)
    for words, option in (("`data_dir=`", "--data-dir"), ("`data_dir`", "--data-dir"), ("`loss`", "--loss")):
        message = message.replace(words, option)
    return message


def _is_of_the_library(traceback: TracebackType | None) -> bool:
    """Whether an error was raised by this package itself, whose messages need no traceback."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    name = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == "eqxproj"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eqxproj", description="Train JAX models by projections instead of gradients."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare")
    compare = commands.add_parser(
        "compare",
        help="train one network by projections and by gradients, side by side",
        description="Train the same network from the same parameters on the same batches, once by projections "
        "(eqxproj.train with its defaults, hence preconditioned) and once by gradients, with the same optimizer. Print "
        "a table and draw test accuracy over steps and over seconds. The network is a multilayer perceptron, or your "
        "own; what your own code raises is shown with its traceback.",
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
    _add_network(compare)
    solver_help = f"projection algorithm, one of {', '.join(_SOLVERS)} (default: that of eqxproj.train)"
    compare.add_argument("--solver", choices=list(_SOLVERS), metavar="NAME", help=solver_help)
    output_help = f"the picture; its suffix is its format {shown}"
    compare.add_argument("--output", metavar="FILE", default="compare.png", help=output_help)
    compare.add_argument("--json", metavar="FILE", help="write the settings and the curves there as well")
    compare.add_argument("--no-picture", action="store_true", help="draw no picture, which needs matplotlib")
    compare.add_argument("--no-progress", action="store_true", help="report no progress")
    return parser


def _add_network(compare: argparse.ArgumentParser) -> None:
    """The options of the network and its loss."""
    compare.add_argument("--width", type=_positive, metavar="N", help=f"units in a hidden layer (default: {_WIDTH})")
    compare.add_argument("--depth", type=_natural, metavar="N", help=f"number of hidden layers (default: {_DEPTH})")
    model_help = (
        "your own network: a function that makes it, in a module of the current folder or an installed one; it is "
        "called with key=..., a PRNG key from the seed, if it has an argument of that name, else with nothing"
    )
    compare.add_argument("--model", metavar="MODULE:FUNCTION", help=model_help)
    loss_help = (
        "your own loss: a function loss(model, x, y) of a minibatch that returns one number; with an argument "
        "named key it gets a new PRNG key each step (default: the mean cross-entropy of jax.vmap(model)(x))"
    )
    compare.add_argument("--loss", metavar="MODULE:FUNCTION", help=loss_help)
    flatten_help = "give your own network each image as one vector (by default as channels, height, width)"
    compare.add_argument("--flatten", action="store_true", help=flatten_help)


def _natural(text: str, least: int = 0) -> int:
    """An argument that must be a whole number, `least` or more."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= least:
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number, {least} or more")


_positive = functools.partial(_natural, least=1)


def _headline(options: argparse.Namespace, setup: _Setup) -> str:
    data = setup.data
    return (
        f"{options.dataset}: {len(data.train[0]):,} samples to train on, {len(data.test[0]):,} to test; "
        f"{setup.model_name}; {options.steps:,} steps of {options.batch_size:,} samples"
    )


# --- training ---


def _loss(model: Callable, x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Mean cross-entropy."""
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def _accuracy(model: Callable, x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Fraction of the samples whose largest logit is the right one."""
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def _setup(options: argparse.Namespace) -> _Setup:
    """Data, model and loss.

    **Raises:** `ValueError` and `OSError` where they are not to be had, and whatever the user's own code raises.
    """
    model_key, train_key = jax.random.split(jax.random.key(options.seed))
    loss = _loss if options.loss is None else function_of("--loss", options.loss)
    own = None if options.model is None else own_model(options.model, model_key)
    data = datasets.load(options.dataset, options.data_dir)
    data = data.flatten() if own is None or options.flatten else data
    if options.batch_size > (samples := len(data.train[0])):
        wrong = f"--batch-size: got {options.batch_size}"
        raise ValueError(f"{wrong}; {options.dataset!r} has {samples} samples to train on.")
    if own is None:
        width, depth = options.width, options.depth
        shape = data.input_shape[0], data.n_classes
        model = eqx.nn.MLP(*shape, width, depth, activation=jax.nn.relu, key=model_key)
        name = f"relu network {'-'.join(map(str, [shape[0], *[width] * depth, shape[1]]))}"
    else:
        model, name = own, f"{options.model}, {parameter_count(own):,} parameters"
    evaluate = {"accuracy": _accuracy, "loss": ValueAlone(loss, False)}
    if why := without_accuracy(model, data.train[0], data.n_classes, may_raise=options.loss is None):
        if options.loss is None:
            raise ValueError(f"--model: {why}. Change it, or give a loss for it by --loss.")
        _output.say(f"The test loss alone is compared, and no accuracy: {why}.")
        del evaluate["accuracy"]
    return _Setup(data, model, name, loss, evaluate, train_key)


def _compare(options: argparse.Namespace, setup: _Setup) -> list[_Outcome]:
    """Train by both methods. Raises `_Interrupted` at Ctrl-C and SIGTERM."""
    outcomes: list[_Outcome] = []
    try:
        solver = None if options.solver is None else getattr(eqxproj, _SOLVERS[options.solver])()
        for method, settings in (("projection", {"solver": solver}), ("gradient", {})):
            outcomes.append(_train(options, setup, method=method, **settings))
    except eqxproj.TrainingInterrupted as stop:
        method = ("projection", "gradient")[len(outcomes)]
        raise _Interrupted([*outcomes, _outcome(method, stop.history, stop.step, is_complete=False)]) from None
    except KeyboardInterrupt:
        raise _Interrupted(outcomes) from None
    return outcomes


def _train(options: argparse.Namespace, setup: _Setup, **settings: Any) -> _Outcome:
    """Train by one method, with these settings of `eqxproj.train`."""
    result = eqxproj.train(
        setup.model,
        setup.data.train,
        setup.loss,
        steps=options.steps,
        batch_size=options.batch_size,
        key=setup.key,
        eval_data=setup.data.test,
        eval_every=max(1, options.steps // _EVALUATIONS),
        evaluate=setup.evaluate,
        progress=not options.no_progress,
        **settings,
    )
    return _outcome(settings["method"], result.history, options.steps)


def _outcome(method: str, history: dict[str, Any], steps: int, is_complete: bool = True) -> _Outcome:
    """An outcome from the history of a run, which is empty where that ended before the first report."""
    curves = {name: np.asarray(values, float).ravel().tolist() for name, values in history.items()}
    (compile_seconds,) = curves.pop("compile_seconds")
    if not curves["step"]:
        return _Outcome(method, steps=steps, is_complete=is_complete)
    accuracy = curves["eval_accuracy"][-1] if "eval_accuracy" in curves else math.nan
    seconds, loss = curves["seconds"][-1], curves["eval_loss"][-1]
    return _Outcome(method, accuracy, seconds, compile_seconds, steps, curves, is_complete, loss)


# --- table, picture and report ---


def _table(outcomes: Sequence[_Outcome]) -> str:
    """The outcomes as text, one line for each method, with a dash for a missing number."""
    rows = [["method", "test accuracy", "test loss", "seconds", "compile seconds", "steps"]]
    for outcome in outcomes:
        numbers = [f"{outcome.accuracy:.4f}", f"{outcome.loss:.4g}"]
        numbers += [f"{outcome.seconds:.2f}", f"{outcome.compile_seconds:.2f}"]
        steps = f"{outcome.steps:,}" if outcome.is_complete else f"{outcome.steps:,}, interrupted"
        rows.append([outcome.method, *("-" if number == "nan" else number for number in numbers), steps])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _files(options: argparse.Namespace, setup: _Setup, outcomes: Sequence[_Outcome]) -> list[tuple[str, str, bytes]]:
    """The JSON file, where one is wanted, and the picture: for each the argument, the path, and the content."""
    files = []
    if options.json is not None:
        text = json.dumps(_finite(_report(options, outcomes)), indent=1, allow_nan=False) + "\n"
        files.append(("--json", options.json, text.encode()))
    curves = [Curve(_label(outcome), outcome.history) for outcome in outcomes if outcome.history]
    if curves and not options.no_picture:
        suffix = pathlib.Path(options.output).suffix
        content = draw(_headline(options, setup), curves, len(setup.data.test[0]), suffix)
        files.append(("--output", options.output, content))
    return files


def _label(outcome: _Outcome) -> str:
    names = {"projection": "projection (eqxproj)", "gradient": "gradient (same optimizer)"}
    has_accuracy = "eval_accuracy" in outcome.history
    reached = f"accuracy {outcome.accuracy:.4f}" if has_accuracy else f"loss {outcome.loss:.4g}"
    return f"{names[outcome.method]}: {reached}, compiled in {outcome.compile_seconds:.1f} s"


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
