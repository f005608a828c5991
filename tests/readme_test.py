"""The README's examples run as they stand there."""

import itertools
import re
from pathlib import Path

import numpy as np

import jaxpeft as jp
from jaxpeft import data

README = Path(__file__).resolve().parent.parent / "README.md"


def example(word):
    """The one block of Python that has a word in it."""
    found = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [code for code in found if word in code]
    return code


def test_the_kernels():
    namespace = {}
    exec(compile(example("quant_lora_matmul"), str(README), "exec"), namespace)
    # W is all ones: the largest value of its groups, which NF4 holds exactly, the scale to its 8 bits.
    np.testing.assert_allclose(np.asarray(namespace["y"], np.float32), 512, rtol=0.01)


def test_the_training_loop(tmp_path, monkeypatch):
    """Ten lines on the embedded model; a few steps of it leave an adapter that has learnt and fits that model."""
    code = example("make_train_step")
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
