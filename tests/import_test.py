"""What importing the library does, seen from a fresh process."""

import os
import subprocess
import sys

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
