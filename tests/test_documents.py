"""The code of the README and of the documentation runs as it stands there; the reference names all that is public."""

import pathlib
import re
import types

import jax
import pytest

import eqxproj

ROOT = pathlib.Path(__file__).parent.parent


def python_of(name):
    """The Python of a document, without what is indented."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def quick_compilation():
    """Most of the time is compilation, and for networks so small slow code is fast enough."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", ["README.md", "docs/pieces.md"])
def test_the_code_of_a_document_runs(name, registry, quick_compilation):
    names = {}
    for block in python_of(name):
        exec(compile(block, name, "exec"), names)
    if "step" in names:  # the README defines a step of training, and takes none
        x, y = names["data"].train
        model, state, value = names["step"](names["model"], names["state"], x[:32], y[:32])
        assert value > 0
    losses = names["result"].history["loss"]
    assert losses[-1] < losses[1]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 500
    assert len(text[: text.index("```")].split()) <= 120


def test_the_reference_names_all_that_is_public():
    modules = {"datasets", "flax", "losses", "readers", "sets"}
    packages = {f"eqxproj.{name}": getattr(eqxproj, name) for name in ("readers", "rules", "sets", "solvers")}
    public = {"eqxproj": eqxproj, **packages}
    names = {f"eqxproj.{name}" for name in modules}
    for prefix, module in public.items():
        found = {n: x for n, x in vars(module).items() if not n.startswith("_") and not isinstance(x, types.ModuleType)}
        names |= {f"{prefix}.{n}" for n in found if prefix == "eqxproj" or n not in vars(eqxproj)}
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(named) == sorted(names), "docs/api.md has one line `::: NAME` for each public name"
