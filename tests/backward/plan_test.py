"""A plan as text: read as it is written, and one line for what is none."""

import re

import pytest

from jaxpeft.backward.plan import INPUT, Plan, parse
from jaxpeft.errors import InputError


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan("blocks", (("gate_proj", "save"), ("up_proj", "compress"))),
        Plan("offload", ((INPUT, "offload"),), 4096),
        Plan("blocks", tokens=1, tile=512),
        Plan("everything"),
        Plan("matmuls", (("norm_normalized", "prune"), ("other_normalized", "prune:0.25"))),
        Plan("compressed12", (("attention", "compress"), (INPUT, "compress12"))),
    ],
)
def test_a_plan_is_read_as_it_is_written(plan):
    assert parse(str(plan)) == plan == parse(plan)


def test_a_table_without_a_preset_recomputes_the_rest():
    assert parse("gate_proj=save, up_proj=compress") == Plan("blocks", (("gate_proj", "save"), ("up_proj", "compress")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "matmul",
            "unknown preset 'matmul'; known: everything, matmuls, blocks, offload, compressed, compressed12, "
            "compressed4, or NAME=",
        ),
        ("", "unknown preset ''"),
        (
            "matmuls,gate_proj=keep",
            "'gate_proj=keep' should be NAME=ACTION with one of save, recompute, compress, compress12",
        ),
        ("matmuls,gate_proj", "'gate_proj' should be NAME=ACTION"),
        ("matmuls,tile=1.5", "tile='1.5' should be a whole number above 0"),
        ("matmuls,tokens=0", "tokens='0' should be a whole number above 0"),
        ("tokens=-5", "tokens='-5' should be"),
        ("blocks,tokens=4,tokens=8", "tokens stands twice"),
        ("blocks,q_proj=save,q_proj=compress", "q_proj stands twice"),
        ("everything,gate_proj=save", "everything is plain autodiff and takes no more words"),
        ("blocks,block_input=recompute", "block_input is where recomputation starts"),
    ],
)
def test_a_bad_plan_is_one_line(text, says):
    with pytest.raises(InputError, match=re.escape(says)) as error:
        parse(text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)
