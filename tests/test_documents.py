"""The code of the README, of the documentation and of its notebooks runs as it stands there; the reference is whole."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest

import eqxproj

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
NOTEBOOKS = {path.name: path for path in sorted((DOCS / "notebooks").glob("*.ipynb"))}

# Pages that take longer than a few seconds: their solvers are compiled.
SLOW = {f"docs/{name}.md" for name in ("constraints", "discrete", "problems", "sequences")}


def python_of(text):
    """The blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def cells_of(path):
    """The cells of a notebook of one kind each: pairs of the kind and the text."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text("utf-8"))["cells"]]


def run(blocks, name):
    """Runs blocks of Python one after another, and returns the names that they have made."""
    names = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


def with_code():
    for name, path in PAGES.items():
        if python_of(path.read_text(encoding="utf-8")):
            yield pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))


@pytest.mark.parametrize("name", [*with_code()])
def test_the_code_of_a_page_runs(name, registry, quick_compilation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGES[name].read_text(encoding="utf-8")
    names = run(python_of(text), name)
    if name == "README.md":  # it defines a step of training, and takes none
        x, y = names["data"].train
        model, state, value = names["step"](names["model"], names["state"], x[:32], y[:32])
        assert value > 0
    if "result" in names:
        losses = names["result"].history["loss"]
        assert losses[-1] < losses[1]
    for figure in re.findall(r"\]\((?:\.\./)*(figures/[^)]*)\)", text):
        assert (tmp_path / pathlib.Path(figure).name).exists(), f"{figure} is not made by the code of {name}"
        assert (DOCS / figure).exists(), f"{figure} is missing: python docs/figures/make.py"


def test_no_code_of_a_page_is_left_out():
    """Each fence opens at the start of a line, and is of a kind that is run, or that is no Python."""
    for name, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        fences = re.findall(r"^([ \t]*)(```+|~~~+)(.*)$", text, flags=re.M)
        assert {fence[:2] for fence in fences} <= {("", "```")}, name
        assert {fence[2] for fence in fences} <= {"", "python", "bash"}, name
        assert [fence[2] for fence in fences[1::2]] == [""] * (len(fences) // 2), f"{name}: a block is not closed"
        assert all(fence[2] for fence in fences[::2]), f"{name}: a block says no language"


def test_every_figure_is_shown_on_a_page():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    assert {path.name for path in (DOCS / "figures").glob("*.png")} == set(re.findall(r"\]\(.*figures/(.*?)\)", text))


@pytest.mark.slow
def test_the_figures_are_made(tmp_path):
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "docs" / "page.md").write_text(
        "```python\nimport pathlib\n```\n![a](figures/a.png)\n"
        "```python\npathlib.Path('a.png').write_text('made')\n```\n"
    )
    (tmp_path / "docs" / "other.md").write_text("```python\nraise ValueError\n```\n")
    script = tmp_path / "docs" / "figures" / "make.py"
    script.write_text((DOCS / "figures" / "make.py").read_text(encoding="utf-8"))
    before = os.getcwd()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        os.chdir(before)
    assert (script.parent / "a.png").read_text() == "made"


@pytest.mark.slow
def test_the_code_on_many_devices_runs_on_four():
    text = PAGES["docs/devices.md"].read_text(encoding="utf-8")
    code = "\n".join([*python_of(text), "assert jax.device_count() == 4", "print('all')"])
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0 and done.stdout.strip().endswith("all"), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run([text for kind, text in cells_of(NOTEBOOKS[name]) if kind == "code"], name)
    losses = names["result"].history["loss"]
    assert losses[-1] < losses[1]


def test_there_are_notebooks_and_they_are_kept_without_outputs():
    assert len(NOTEBOOKS) >= 2
    for path in NOTEBOOKS.values():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
        assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells), path.name


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 500
    assert len(text[: text.index("```")].split()) <= 120


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(name):
    """Those of the pages are checked by `mkdocs build --strict`."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_parts_of_the_results_that_a_page_shows_are_there():
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    shown = re.findall(r'^--8<-- "benchmarks/RESULTS.md:(.*)"$', (DOCS / "results.md").read_text("utf-8"), flags=re.M)
    assert len(shown) >= 5
    for part in shown:
        (found,) = re.findall(rf"\[start:{part}\] -->\n(.*?)<!-- --8<-- \[end:{part}\]", text, flags=re.S)
        assert "| --- |" in found, f"{part} has no table"


def test_the_reference_names_all_that_is_public():
    modules = {"datasets", "flax", "losses", "readers", "sets"}
    packages = {f"eqxproj.{name}": getattr(eqxproj, name) for name in ("readers", "rules", "sets", "solvers")}
    public = {"eqxproj": eqxproj, **packages}
    names = {f"eqxproj.{name}" for name in modules}
    for prefix, module in public.items():
        found = {n: x for n, x in vars(module).items() if not n.startswith("_") and not isinstance(x, types.ModuleType)}
        names |= {f"{prefix}.{n}" for n in found if prefix == "eqxproj" or n not in vars(eqxproj)}
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
    named = re.findall(r"^::: ([\w.]+)$", text, flags=re.M)
    # `sets` has a page of its own, which names its members one by one.
    assert sorted(named) == sorted(names), "docs/api has one line `::: NAME` for each public name"
