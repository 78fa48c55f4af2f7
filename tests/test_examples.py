"""The examples run, and reach what they claim."""

import importlib.util
import pathlib

import pytest


def _load(name):
    path = pathlib.Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arguments", [[], ["--gradient"]], ids=["projection", "gradient"])
def test_one_line_changes_a_gradient_script_into_a_projection_script(arguments, capsys):
    accuracy = _load("one_line").main(["--epochs", "12", *arguments])
    assert accuracy >= 0.93
    assert f"{accuracy:.3f}" in capsys.readouterr().out
