"""The experiment on a CPU's step: the table is drawn from the data, and the data says what is claimed of it."""

import json
import statistics

from experiments import cpu_step
from jaxpeft import assets

ROWS = json.loads((cpu_step.RESULTS / "cpu_step.json").read_text())
MEDIAN = {(row["model"], row["library"], row["dtype"]): statistics.median(row["cpu_seconds"]) for row in ROWS}


def test_table_is_drawn_from_the_data():
    assert (cpu_step.RESULTS / "cpu_step.md").read_text().endswith(cpu_step.draw(ROWS))
    assert set(MEDIAN) == {(name, *side) for name in cpu_step.MODELS for side in cpu_step.SIDES} - cpu_step.LEFT_OUT


def test_float32_is_the_faster_type_on_a_cpu_without_bfloat16():
    for name in {row["model"] for row in ROWS if "load" not in row}:
        assert MEDIAN[name, "jaxpeft", "float32"] < MEDIAN[name, "jaxpeft", "bfloat16"]


def test_docstring_says_what_the_data_says():
    text = " ".join(cpu_step.__doc__.split())
    small, middle, large = cpu_step.MODELS
    of_torch = [MEDIAN[name, "jaxpeft", "float32"] / MEDIAN[name, "torch", "float32"] for name in (large, small)]
    assert f"float32: {MEDIAN[large, 'jaxpeft', 'float32']:.1f} CPU seconds" in text
    assert f"bfloat16 takes {MEDIAN[large, 'jaxpeft', 'bfloat16']:.1f}" in text
    assert f"{MEDIAN[small, 'jaxpeft', 'float32']:.2f} and {MEDIAN[small, 'jaxpeft', 'bfloat16']:.2f}" in text
    assert f"that is {of_torch[0]:.2f} and {of_torch[1]:.2f} of its time" in text
    assert (
        f"{MEDIAN[small, 'torch', 'bfloat16']:.0f} s where it takes us {MEDIAN[small, 'jaxpeft', 'bfloat16']:.1f}"
        in text
    )
    ours, theirs = ([MEDIAN[middle, side, dtype] for dtype in ("float32", "bfloat16")] for side in ("jaxpeft", "torch"))
    assert f"{ours[0]:.2f} s in float32 and {ours[1]:.2f} in bfloat16" in text
    assert (
        f"{ours[0] / theirs[0]:.2f} and {ours[1] / theirs[1]:.2f} of torch's {theirs[0]:.1f} and {theirs[1]:.1f}"
        in text
    )


def test_both_sides_take_steps_that_lower_the_loss():
    for side in (cpu_step.ours, cpu_step.theirs):
        once = side(str(assets.MODEL), "float32", 1, 16)
        losses = [once() for _ in range(3)]
        assert losses[2] < losses[0]
