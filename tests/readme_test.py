"""The README's example runs as it stands there."""

import itertools
import re
from pathlib import Path

import numpy as np

import jaxpeft as jp
from jaxpeft import data

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_training_loop(tmp_path, monkeypatch):
    """Ten lines on the embedded model; a few steps of it leave an adapter that has learnt and fits that model."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(lines) <= 10
    whole = data.make_batches
    monkeypatch.setattr(data, "make_batches", lambda *args, **options: itertools.islice(whole(*args, **options), 3))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(code, str(README), "exec"), namespace)
    assert int(namespace["state"].step) == 3
    model, _ = jp.load_pretrained(namespace["assets"].MODEL)
    method, leaves = jp.import_adapter(tmp_path / "adapter", model.config)
    assert method.specs[0].name == "lora_fa"
    assert all(np.any(leaf) for path, leaf in leaves.items() if path.endswith("/b"))
