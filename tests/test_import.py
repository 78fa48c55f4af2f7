"""What `import eqxproj` brings with it, each time in a fresh process."""

import compileall
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import eqxproj

PACKAGE = pathlib.Path(eqxproj.__file__).parent
HEAVY = ("datasets", "pandas", "pyarrow", "PIL", "flax", "matplotlib", "networkx")


def fresh(code: str, folder: pathlib.Path = PACKAGE.parent):
    """What a program prints as JSON that imports the package from a folder."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_heavy_packages_are_not_imported():
    found = fresh("import json, sys, eqxproj; print(json.dumps([eqxproj.__file__, sorted(sys.modules)]))")
    assert pathlib.Path(found[0]).parent == PACKAGE
    assert [name for name in HEAVY if name in found[1]] == []


@pytest.mark.skipif(importlib.util.find_spec("flax") is None, reason="needs Flax")
def test_flax_without_an_import_of_its_own():
    code = "import json, eqxproj; print(json.dumps(['flax' in dir(eqxproj), eqxproj.flax.from_linen.__name__]))"
    assert fresh(code) == [True, "from_linen"]


MISSING = """
import importlib.metadata, json, sys

def version(name, found=importlib.metadata.version):
    if name == "eqxproj":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.version = version
sys.modules["flax"] = None
import eqxproj
try:
    eqxproj.flax
except ImportError as error:
    print(json.dumps([eqxproj.__version__, str(error)]))
"""


def test_without_flax_and_not_installed():
    version, message = fresh(MISSING)
    assert version == "0.0.0+unknown"
    assert "`eqxproj.flax` needs Flax" in message and "pip install 'eqxproj[flax]'" in message


def test_version():
    assert isinstance(eqxproj.__version__, str) and eqxproj.__version__[0].isdigit()


def test_other_names_are_errors():
    with pytest.raises(AttributeError, match="module 'eqxproj' has no attribute 'flux'"):
        eqxproj.flux  # noqa: B018


# The time of the processor: unlike that of the clock, it hardly depends on what else runs on the machine.
TIMES = """
import json, time
start = time.process_time()
import jax, equinox, optax
middle = time.process_time()
import eqxproj
print(json.dumps([middle - start, time.process_time() - middle]))
"""


def test_import_takes_little_longer_than_that_of_jax(tmp_path):
    """With compiled bytecode, as an installed package has it, which the environment of the tests may not write."""
    shutil.copytree(PACKAGE, tmp_path / "eqxproj", ignore=shutil.ignore_patterns("__pycache__", "data"))
    assert compileall.compile_dir(tmp_path, quiet=2)
    times = []
    for _ in range(10):
        times.append(fresh(TIMES, tmp_path))
        base, own = map(min, zip(*times))
        if len(times) >= 3 and base + own <= 1.15 * base:
            return
    pytest.fail(f"`import eqxproj` takes {1 + own / base:.2f} times as long as that of JAX, Equinox and Optax")
