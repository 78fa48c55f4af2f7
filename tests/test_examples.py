"""The examples run, and reach what they claim."""

import importlib.util
import pathlib
import sys

import pytest

_EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
_PNG = b"\x89PNG\r\n\x1a\n"


def _load(name):
    path = _EXAMPLES / f"{name}.py"
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


def _run(name, arguments, folder, monkeypatch):
    """What the example returns; that it writes its figure is checked on the way."""
    monkeypatch.syspath_prepend(_EXAMPLES)  # where Python looks first when an example is run as a script
    figure = folder / f"{name}.png"
    reached = _load(name).main([*arguments, "--figure", str(figure)])
    assert figure.read_bytes().startswith(_PNG)
    return reached


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "floor"),
    [
        ("cnn_mnist", ["--steps", "60"], 0.75),
        ("flax_model", ["--steps", "60"], 0.7),
        ("vision_transformer", ["--steps", "200", "--depth", "1"], 0.5),
    ],
)
def test_an_image_example_learns_by_projections_and_draws_its_figure(name, arguments, floor, tmp_path, monkeypatch):
    reached = _run(name, arguments, tmp_path, monkeypatch)
    assert floor <= reached["projection"] <= 1.0
    assert all(0.0 <= value <= 1.0 for value in reached.values())


def test_signs_train_by_projections_as_well_as_with_an_estimator_and_better_than_by_gradients(tmp_path, monkeypatch):
    reached = _run("sign_network", ["--steps", "200"], tmp_path, monkeypatch)
    assert reached["projection"] > reached["gradient"] + 0.05
    assert abs(reached["projection"] - reached["straight-through gradient"]) < 0.04


def test_a_hard_gate_trains_better_by_projections_than_by_gradients(tmp_path, monkeypatch):
    reached = _run("hard_gate", ["--steps", "1000"], tmp_path, monkeypatch)
    assert reached["projection"] > reached["gradient"] + 0.03


@pytest.mark.slow
def test_the_character_network_learns_and_writes_text(tmp_path, monkeypatch, capsys):
    reached = _run("character_gru", ["--steps", "20"], tmp_path, monkeypatch)
    assert all(2.0 < value < 5.0 for value in reached.values())  # bits a character, of more than six in the beginning
    assert "--- written by the network" in capsys.readouterr().out


@pytest.mark.slow
def test_solvers_train_a_network_and_one_finds_a_point_by_hand(tmp_path, monkeypatch, capsys):
    names = ["CyclicProjections", "AlternatingReflections"]
    reached = _run("solvers", ["--steps", "6", "--solvers", *names], tmp_path, monkeypatch)
    assert reached["by hand"] == 1.0
    assert reached["defaults"] >= 0.9 and all(reached[name] >= 0.4 for name in names)
    assert (tmp_path / "solvers_graph.png").read_bytes().startswith(_PNG)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert all(float(rows[name][2]) == pytest.approx(reached[name], abs=1e-3) for name in names)


def test_without_matplotlib_an_example_says_so_and_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(_EXAMPLES)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    side_by_side = _load("side_by_side")
    side_by_side.draw(tmp_path / "none.png", "title", "accuracy", {})
    assert "matplotlib is missing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_projections_find_a_circuit_from_its_table():
    assert _load("boolean").main(["--steps", "4000"]) >= 1
