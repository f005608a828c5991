"""What does not fit a kernel's width is refused with what fits, and that is taken."""

import jax
import pytest

import jaxpeft as jp
from jaxpeft import widths
from tests import tiny

KEY = jax.random.key(0)
OTHERS = "gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj"
LEFT_OUT = f"leave it out: targets {OTHERS}"
CHAINED = lambda **options: jp.chain(jp.quantize(**options), jp.lora(2))


@pytest.mark.parametrize(
    ("make", "options", "advice", "taken"),
    [
        (jp.lq_lora, {"rank": 2, "bits": 3.0}, LEFT_OUT, []),
        (jp.lq_lora, {"rank": 2, "format": "nf3"}, f"use nf4 or nf2 .*, or {LEFT_OUT}", [{"format": "nf4"}]),
        (jp.lq_lora, {"rank": 2, "group": 16}, f"4 and its divisors .*, or {LEFT_OUT}", [{"group": 4}]),
        (jp.llm_qfa, {"rank": 2}, rf"use widths \[2, 4\], or {LEFT_OUT}", [{"widths": [2, 4]}]),
        (jp.int21, {"rank": 2, "bits": 3}, f"use bits 2 or bits 4 .*, or {LEFT_OUT}", [{"bits": 2}, {"bits": 8}]),
        (jp.int21, {"rank": 2, "group": 16}, f"4 and its divisors .*, or {LEFT_OUT}", [{"group": 4}]),
        (jp.peqa, {"bits": 3}, f"use bits 2 or bits 4 or bits 8, or {LEFT_OUT}", [{"bits": 4}]),
        (jp.peqa, {"group": 16}, f"4 and its divisors .*, or {LEFT_OUT}", [{"group": 2}]),
        (CHAINED, {"format": "nf3"}, f"use nf4 or .*, or {LEFT_OUT}", [{"format": "int8"}]),
        (CHAINED, {"group": 16}, f"4 and its divisors .*, or {LEFT_OUT}", [{"group": 4}]),
    ],
)
def test_what_a_refusal_advises_is_taken(make, options, advice, taken):
    base, params = tiny.model(intermediate_size=60)
    with pytest.raises(jp.InputError, match=f"layers/mlp/down_proj.*; {advice}$"):
        jp.setup(make(**options), base, params, KEY)
    for instead in ({"targets": OTHERS}, *taken):
        method = make(**{**options, **instead})
        jax.eval_shape(lambda params, method=method: jp.setup(method, base, params, KEY)[1:], params)


def test_targets_are_named_where_a_name_tells_sites_apart():
    even = lambda n: n % 2 == 0
    assert widths.left_out({"layers/0/up": 4, "layers/0/down": 3}, even) == "leave it out: targets up,"
    assert widths.left_out({"layers/0/up": 4, "layers/1/up": 3}, even) == "leave it out of targets"
    assert widths.left_out({f"layers/{i}": 4 for i in range(50)} | {"layers/up": 3}, even) == "leave it out of targets"
    assert widths.left_out({"layers/up": 3}, even) == ""


def test_a_refusal_without_anything_that_fits_says_no_more():
    with pytest.raises(jp.InputError, match="m: s has 3 inputs, which f packs in 2s$"):
        widths.check_packs("m", "f packs", 2, {"s": 3})
    with pytest.raises(jp.InputError, match="group 2 does not divide the 3 inputs of s; 3 and its divisors .* of all$"):
        widths.check_group("m", 2, {"s": 3})
    with pytest.raises(jp.InputError, match="the 3 inputs of s; no number above 1 divides those of all$"):
        widths.check_group("m", 2, {"s": 3, "t": 5})
