"""The experiment on the kernels' memory: what it says is what its figures say."""

import re

from experiments.kernels import memory
from experiments.memory import common


def test_the_kernels_cost_no_memory():
    """The committed figures: a document drawn from them, the docstring's numbers, kernels never above plain JAX."""
    rows = memory.collect(common.Figures(memory.NAME), ["h200", "v5p"])
    assert memory.document(rows) == (common.RESULTS / f"{memory.NAME}.md").read_text()
    figures = {(row["target"], row["base"], row["products"]): row["temporaries"] / common.GIB for row in rows}
    text = " ".join(memory.__doc__.split())
    for target in ("h200", "v5p"):
        for base in ("bfloat16", "nf4"):
            ours, plain = (figures[target, base, products] for products in ("kernels", "xla"))
            assert ours <= plain
            assert re.search(rf"{ours:.2f}( GiB with the kernels)? and {plain:.2f}", text), (target, base)
