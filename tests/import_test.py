"""What importing the library does, seen from a fresh process, and which way its imports point."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpeft

ROOT = Path(jaxpeft.__file__).parent.parent

SCRIPT = """
import importlib, pkgutil
import jaxpeft
for found in pkgutil.walk_packages(jaxpeft.__path__, "jaxpeft."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
from jax._src import xla_bridge
assert not xla_bridge._backends, list(xla_bridge._backends)
"""


def test_imports_leave_the_devices_alone():
    """An array made at import would choose the backend before the user, or `plan`, can."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at its top or inside functions; `from a import b` may be the module a.b."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("jaxpeft."):
            found.add(node.value)  # for importlib
    return found


def test_imports_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "jaxpeft" / "a" / "b.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import jaxpeft.x\nfrom .. import cli\ndef f():\n    from jaxpeft import memory as m\n    from . import c"
    )
    assert {"jaxpeft.x", "jaxpeft.cli", "jaxpeft.memory", "jaxpeft.a.c"} <= imported(file)


@pytest.mark.parametrize(
    ("package", "importers"),
    [("cli", ("cli/", "__main__.py")), ("memory", ("memory/", "cli/", "__init__.py"))],
    ids=("cli", "memory"),
)
def test_imports_run_one_way(package, importers):
    """The command line is imported by nothing; what plans by it and, on demand, the package's door alone."""
    files = [*(ROOT / "jaxpeft").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")]
    assert len(files) > 80
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        if not str(file.relative_to(ROOT)).startswith(tuple(f"jaxpeft/{name}" for name in importers))
        for name in imported(file)
        if f"{name}.".startswith(f"jaxpeft.{package}.")
    ]
    assert not wrong
    lazy = {f"jaxpeft.{module}." for module in jaxpeft._MODULE_OF.values()}
    assert package == "memory" or not [module for module in lazy if module.startswith(f"jaxpeft.{package}.")]
