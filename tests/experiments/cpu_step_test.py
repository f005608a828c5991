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
    for name in cpu_step.MODELS:
        assert MEDIAN[name, "jaxpeft", "float32"] < MEDIAN[name, "jaxpeft", "bfloat16"]


def test_docstring_says_what_the_data_says():
    text = " ".join(cpu_step.__doc__.split())
    small, middle, large = cpu_step.MODELS
    of_torch = lambda name, side, dtype: MEDIAN[name, side, dtype] / MEDIAN[name, "torch", dtype]
    first, second, third = (of_torch(name, "jaxpeft", "float32") for name in (large, small, middle))
    products = [of_torch(name, cpu_step.PRODUCTS, "float32") for name in (large, middle)]
    assert f"float32: {MEDIAN[large, 'jaxpeft', 'float32']:.1f} CPU seconds" in text
    assert f"bfloat16 takes {MEDIAN[large, 'jaxpeft', 'bfloat16']:.1f}" in text
    assert f"{MEDIAN[small, 'jaxpeft', 'float32']:.2f} and {MEDIAN[small, 'jaxpeft', 'bfloat16']:.2f}" in text
    assert f"that is {first:.2f} and {second:.2f} of its time, {third:.2f} for 30M" in text
    assert f"instructions, {of_torch(middle, 'jaxpeft', 'bfloat16'):.2f} (30M)" in text
    assert f"take {products[0]:.2f} of torch's whole step ({products[1]:.2f} for 30M)" in text
    assert min(products) > 0.5


def test_both_sides_take_steps_that_lower_the_loss():
    assert cpu_step.products(str(assets.MODEL), "float32", 1, 16)()
    for side in (cpu_step.ours, cpu_step.theirs):
        once = side(str(assets.MODEL), "float32", 1, 16)
        losses = [once() for _ in range(3)]
        assert losses[2] < losses[0]
