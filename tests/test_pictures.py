"""The pictures of a graph, a solution and a training run: what they show, where they are written, what is an error."""

import collections
import dataclasses
import functools
import importlib.util
import os
import re
import xml.etree.ElementTree

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.optimize

import eqxproj
from eqxproj._problem import _problem as problem_module
from eqxproj._problem._folding import picture_of
from eqxproj._problem._layout import _GAP, Sizes, _crossings, _nearest, laid_out


class Model(eqx.Module):
    """A parameter that two layers share, and one that one layer has alone."""

    shared: jax.Array
    own: jax.Array

    def __call__(self, x):
        h = jnp.tanh(x @ self.shared + self.own)
        return jnp.tanh(h @ self.shared)


def loss(model, x, y):
    return jnp.mean(jnp.square(model(x) - y))


@pytest.fixture
def problem():
    key = jax.random.key(0)
    model = Model(jax.random.normal(key, (3, 3)), jnp.ones(3))
    return eqxproj.feasibility_problem(loss, model, jnp.ones((2, 3)), jnp.zeros((2, 3)))


def recurrence():
    def run(w, x):
        def body(h, _):
            h = jnp.tanh(h * w)
            return h, h

        return jnp.mean(jax.lax.scan(body, x, None, length=5)[1] ** 2)

    return eqxproj.feasibility_problem(run, jnp.ones(3), jnp.ones(3))


def chain(length, width=1):
    """As many layers, and as many branches side by side before their sum."""

    def run(parameters, x):
        total = 0.0
        for branch in parameters:
            h = x
            for w in branch:
                h = jnp.tanh(h * w)
            total = total + h
        return jnp.mean(jnp.square(jnp.sin(total)))

    parameters = [[jnp.full(3, 0.5) for _ in range(length)] for _ in range(width)]
    return eqxproj.feasibility_problem(run, parameters, jnp.ones(3))


def text_of(path):
    return [element.text for element in xml.etree.ElementTree.parse(path).iter() if element.tag.endswith("}text")]


# --- what is shown of a graph ---


@pytest.mark.parametrize("make", [lambda problem: problem, lambda _: recurrence()], ids=["shared", "recurrence"])
def test_a_small_graph_is_shown_node_by_node_and_edge_by_edge(make, problem):
    graph = make(problem).graph
    picture = picture_of(graph)
    shown = [one for box in picture.boxes for one in (box, *box.beside)]
    assert len(shown) == len(graph.nodes) and picture.blocks == ()
    assert collections.Counter(box.color for box in shown) == collections.Counter(graph.colors)
    pairs = {(graph.producers[v], e.consumer, v in e.delayed) for e in graph.edges for v in e.sources}
    assert len(picture.edges) + sum(len(box.beside) for box in picture.boxes) == len(pairs)
    late = [(u, v) for u, v, link in picture.edges if link == "delayed"]
    assert len(late) == sum(is_late for *_, is_late in pairs)
    for u, v, link in picture.edges:
        assert link == "delayed" or picture.boxes[u].row < picture.boxes[v].row


def test_a_parameter_of_one_layer_stands_beside_it_and_a_shared_one_does_not(problem):
    boxes = picture_of(problem.graph).boxes
    assert [one.title for box in boxes for one in box.beside] == ["own"]
    assert sum(box.title == "shared" for box in boxes) == 1
    (objective,) = [box for box in boxes if box.kind == "objective"]
    assert objective.row == max(box.row for box in boxes) and objective.color == 0


def test_layers_that_repeat_are_shown_once():
    graph = chain(40).graph
    picture = picture_of(graph)
    (block,) = picture.blocks
    times = [block.times if block.first <= box.row <= block.last else 1 for box in picture.boxes]
    assert sum(n * (1 + len(box.beside)) for n, box in zip(times, picture.boxes)) == len(graph.nodes)
    assert len(picture.boxes) < 8 < block.times <= 40
    assert any(link == "next" for *_, link in picture.edges)
    names = [one.title for box in picture.boxes for one in box.beside]
    assert any(re.fullmatch(r"\[0\]\[\*\]", name) for name in names), names


def test_equal_branches_are_shown_once():
    graph = chain(3, width=12).graph
    picture = picture_of(graph)
    counts = [int((re.match(r"(\d+) × ", box.title) or [0, 1])[1]) for box in picture.boxes]
    beside = [int((re.match(r"(\d+) × ", one.title) or [0, 1])[1]) for box in picture.boxes for one in box.beside]
    assert 12 in counts and not picture.blocks
    assert sum(counts) + sum(beside) == len(graph.nodes)


# --- where it is drawn ---


@pytest.mark.parametrize("seed", range(5))
def test_nothing_overlaps(seed):
    rng = np.random.default_rng(seed)
    rows = [*range(6), *rng.integers(0, 6, 14).tolist()]
    sizes = [Sizes(*map(float, rng.uniform(0.2, 1.5, 2))) for _ in rows]
    pairs = [(a, b) for a in range(20) for b in range(20) if rows[a] < rows[b] and rng.random() < 0.1]
    layout = laid_out(rows, sizes, pairs)
    assert [len(points) for points in layout.points] == [rows[b] - rows[a] - 1 for a, b in pairs]
    room = [(row, x - s.left, x + s.right) for row, x, s in zip(rows, layout.places, sizes)]
    room += [(rows[a] + 1 + k, x, x) for (a, _), xs in zip(pairs, layout.points) for k, x in enumerate(xs)]
    assert min(left for _, left, _ in room) >= -1e-6
    for row in range(6):
        spans = sorted((left, right) for r, left, right in room if r == row)
        assert all(after[0] >= before[1] - 1e-6 for before, after in zip(spans[:-1], spans[1:]))


def test_places_are_the_nearest_in_order():
    rng = np.random.default_rng(0)
    sizes = [Sizes(0.5, 0.25)] * 9
    wanted, weights = rng.normal(size=9), rng.uniform(0.1, 3.0, 9)
    found = _nearest(range(9), sizes, lambda i: wanted[i], lambda i: weights[i])
    offsets = np.arange(9) * (0.75 + _GAP)
    expected = scipy.optimize.isotonic_regression(wanted - offsets, weights=weights).x + offsets
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_crossings_are_counted_and_avoided():
    down = [[5, 7], [4], [6], [4], *[[]] * 4]
    ends = [(0, 5), (0, 7), (1, 4), (2, 6), (3, 4)]
    crossed = sum((a - c) * (b - d) < 0 for k, (a, b) in enumerate(ends) for c, d in ends[k + 1 :])
    assert _crossings([[0, 1, 2, 3], [4, 5, 6, 7]], down) == crossed > 0
    ladder = [(i, 7 - i) for i in range(4)]  # all of which cross, if both rows stand in the order of their numbers
    places = laid_out([0] * 4 + [1] * 4, [Sizes(0.5, 0.5)] * 8, ladder).places
    assert np.argsort(places[:4]).tolist() == [3 - i for i in np.argsort(places[4:])]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_a_graph_is_drawn(suffix, start, problem, tmp_path):
    target = tmp_path / f"graph{suffix}"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        assert problem.draw(target) is None
    assert target.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [target]
    if suffix == ".svg":
        text = text_of(target)
        assert {node.operation for node in problem.graph.nodes if node.kind != "objective"} <= set(text)
        assert "[2, 3], [3, 3] → [2, 3]" in text
        assert "stroke-dasharray" not in target.read_text()


def test_what_is_shown_late_is_dashed(tmp_path):
    target = str(tmp_path / "graph.svg")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        recurrence().draw(target)
    assert "one time step late" in text_of(target)
    assert "stroke-dasharray" in (tmp_path / "graph.svg").read_text()


def test_pinned_data_are_drawn(tmp_path):
    made = eqxproj.feasibility_problem(loss, Model(jnp.eye(3), jnp.ones(3)), *jnp.ones((2, 2, 3)), data="pinned")
    assert any(one.kind == "data" for box in picture_of(made.graph).boxes for one in (box, *box.beside))
    made.draw(tmp_path / "graph.png")


# --- a solution ---


def with_stats(solution, stats):
    return eqxproj.Solution(solution.model, solution.state, stats, solution.result)


@pytest.fixture(scope="module")
def solved():
    def run(w, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ w)))

    made = eqxproj.feasibility_problem(run, jnp.ones(3), jnp.ones((2, 3)))
    return made, eqxproj.solve(made, eqxproj.DouglasRachford(), steps=20, every=3)


def test_the_plot_shows_the_measures(solved, tmp_path):
    _, solution = solved
    plt.switch_backend("agg")
    mine = plt.figure()
    figure = solution.plot(tmp_path / "run.png")
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(lines) == {"gap", "violation"} and axes.get_yscale() == "log"
    for name, line in lines.items():
        np.testing.assert_array_equal(line[:, 0], solution.stats["step"])
        np.testing.assert_allclose(line[:, 1], solution.stats[name])
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_kinds_of_nodes(solved):
    made, solution = solved
    axes = solution.plot(problem=made).axes[1]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    widths = {names[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in axes.patches}
    assert max(widths.values()) == pytest.approx(float(eqxproj.readers.violation(made, solution.state)), rel=1e-5)
    assert set(names) <= {node.operation for node in made.graph.nodes}
    assert list(widths.values()) == sorted(widths.values(), reverse=True) and "dot_general" in widths


def test_measures_of_zero_and_several_runs_are_plotted(solved):
    _, solution = solved
    stats = {name: np.asarray(x).copy() for name, x in solution.stats.items()}
    stats["gap"][:] = 0.0
    with_stats(solution, stats).plot()
    several = {name: np.stack([x, x]) for name, x in stats.items()}
    several["step"][1, -2:], several["violation"][1, -2:] = -1, np.nan  # the second run took fewer steps
    lines = with_stats(solution, several).plot().axes[0].lines
    assert [len(line.get_xydata()) for line in lines[2:]] == [len(stats["step"]), len(stats["step"]) - 2]


# --- training ---


def history(steps, **curves):
    step = np.arange(0, steps + 1, 2)
    loss = np.where(step == 0, np.nan, 0.9**step)
    return {"step": step, "loss": loss, "seconds": step * 0.5, "compile_seconds": 2.0, "learning_rate": step * 0.1} | {
        f"eval_{name}": np.linspace(*ends, len(step)) for name, ends in curves.items()
    }


def result(steps, **curves):
    return dataclasses.replace(trained_once(), history=history(steps, **curves))


@functools.cache
def trained_once():
    def fit(w, x, y):
        return jnp.mean(jnp.square(x @ w - y))

    evaluate = {"loss": fit, "size": lambda w, x, y: jnp.sum(w) - 100.0}
    data = (jnp.ones((8, 3)), jnp.zeros(8))
    return eqxproj.train(jnp.ones(3), data, fit, steps=6, batch_size=4, eval_every=2, eval_data=data, evaluate=evaluate)


@pytest.fixture
def trained():
    return trained_once()


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_a_run_is_plotted_over_steps_and_seconds(trained, tmp_path):
    plt.switch_backend("agg")
    before = plt.get_fignums()
    figure = trained.plot(tmp_path / "run.svg")
    assert plt.get_fignums() == before and (tmp_path / "run.svg").read_text().startswith("<?xml")
    assert len(figure.axes) == 6 and not figure.legends
    measured = trained.history
    for row, name in enumerate(("loss", "eval_loss", "eval_size")):
        for axes, over in zip(figure.axes[2 * row : 2 * row + 2], ("step", "seconds")):
            np.testing.assert_allclose(*[np.c_[measured[over], measured[name]], lines_of(axes)["this run"]])
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 4 + ["linear"] * 2
    assert [axes.get_xlabel() for axes in figure.axes] == [""] * 4 + ["steps", "seconds of training"]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["loss", "loss (evaluated)", "size (evaluated)"]


def test_runs_are_plotted_beside_one_another():
    others = {"Adam": result(8, accuracy=(0.1, 0.8), error=(0.0, 1.0)), "stopped": history(4)}
    figure = result(6, accuracy=(0.1, 0.9)).plot(others=others, name="projections")
    shown = [set(lines_of(axes)) for axes in figure.axes]
    assert shown == [{"projections", "Adam", "stopped"}] * 2 + [{"projections", "Adam"}] * 2 + [{"Adam"}] * 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["projections", "Adam", "stopped"]
    colors = {line.get_label(): {line.get_color()} for line in figure.axes[0].lines}
    for axes in figure.axes:
        for line in axes.lines:
            colors[line.get_label()].add(line.get_color())
    assert all(len(found) == 1 for found in colors.values()) and len(set.union(*colors.values())) == 3
    np.testing.assert_array_equal(lines_of(figure.axes[1])["stopped"][:, 0], [0.0, 1.0, 2.0])


def test_a_loss_that_is_not_positive_or_not_finite_is_plotted():
    run = result(6)
    run.history["loss"][:] = [np.nan, 1.0, np.inf, -1.0]
    axes = run.plot().axes[0]
    assert axes.get_yscale() == "linear"
    np.testing.assert_array_equal(lines_of(axes)["this run"][:, 1], [np.nan, 1.0, np.nan, -1.0])
    run.history["loss"][:] = np.nan
    assert run.plot().axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"others": {"this run": history(2)}}, ValueError, "'this run'.*`name`"),
        ({"others": {"a": 3}}, TypeError, "'a' must be a `TrainResult`.*3"),
        ({"others": {"a": {"loss": [1.0]}}}, TypeError, "'a' must be a `TrainResult`"),
        ({"others": {"a": history(2) | {"loss": ["x", "y"]}}}, TypeError, "'a'.*real numbers"),
        ({"others": {"a": history(2) | {"eval_b": [1.0]}}}, ValueError, r"'a'.*step \[2\].*eval_b \[1\]"),
        ({"others": {"a": history(2) | {"loss": 1.0}}}, ValueError, r"'a'.*loss \[\]"),
        ({"others": {"a": history(-2)}}, ValueError, "'a' has no records"),
    ],
)
def test_an_unusable_run(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        result(2).plot(tmp_path / "run.png", **options)
    assert not list(tmp_path.iterdir())


def test_unusable_arguments_of_a_plot_of_runs(untyped):
    run = result(2)
    for wrong in (run, [run], "Adam"):
        with pytest.raises(TypeError, match="`others` must map names to results"):
            run.plot(others=wrong)
    for wrong in ({"name": 3}, {"others": {3: run}}):
        with pytest.raises(TypeError, match="names of runs.*3"):
            run.plot(**wrong)
    with pytest.raises(ValueError, match="outside of `jit`"):
        jax.jit(lambda loss: dataclasses.replace(run, history=run.history | {"loss": loss}).plot())(jnp.ones(2))


# --- errors ---


@pytest.fixture
def undrawn(monkeypatch):
    def fail(*_):
        raise AssertionError("something is drawn")

    monkeypatch.setattr(problem_module, "drawn", fail)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("graph.jpg", ValueError, r"\.png, \.svg, \.pdf.*graph\.jpg"),
        ("graph", ValueError, r"\.png"),
        ("none/graph.png", FileNotFoundError, "no folder"),
        ("folder.png", ValueError, "is a folder"),
        (3, TypeError, "path"),  # whose message is that of the checker of types, while the tests run
    ],
)
def test_an_unusable_path(name, error, words, problem, solved, undrawn, tmp_path):
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / name if isinstance(name, str) else name
    for draw in (problem.draw, solved[1].plot, result(2).plot):
        with pytest.raises(error, match=words):
            draw(path)
    assert [found.name for found in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("missing", ["matplotlib", "networkx"])
def test_a_missing_package(missing, problem, solved, undrawn, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'eqxproj\[plot\]'"):
        problem.draw(tmp_path / "graph.png")
    if missing == "matplotlib":
        for plot in (solved[1].plot, result(2).plot):
            with pytest.raises(ImportError, match=rf"{missing}.*pip install"):
                plot()
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_the_one_that_was_there(problem, monkeypatch, tmp_path):
    target = tmp_path / "graph.png"
    target.write_bytes(b"of before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        problem.draw(target)
    assert target.read_bytes() == b"of before" and list(tmp_path.iterdir()) == [target]


def test_an_unusable_problem(solved):
    _, solution = solved
    with pytest.raises(TypeError, match="problem"):
        solution.plot(problem=3)
    with pytest.raises(ValueError, match="not that of the solution's state"):
        solution.plot(problem=recurrence())
    several = with_stats(solution, solution.stats | {"steps": np.array([20, 20])})
    with pytest.raises(ValueError, match="for one run.*has 2"):
        several.plot(problem=solved[0])


def test_no_plot_inside_of_a_jit(solved):
    _, solution = solved
    with pytest.raises(ValueError, match="outside of `jit`"):
        jax.jit(lambda gap: with_stats(solution, solution.stats | {"gap": gap}).plot())(solution.stats["gap"])
