"""Methods and chains in words, and the specs that they leave."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import method as contract
from jaxpeft import recipe
from jaxpeft.errors import InputError
from jaxpeft.method import Spec


def configs(method, *names):
    """The named arguments of each member."""
    return [(spec.name, *(spec.config.get(name) for name in names)) for spec in method.specs]


def test_one_method_is_itself():
    assert recipe.parse("lora").specs == jp.lora().specs
    assert recipe.parse(" lora_fa ", ["lora-fa.store-a=true"], rank=2).specs == jp.lora_fa(2, store_a=True).specs


@pytest.mark.parametrize(
    ("options", "common"),
    [
        (["meft.width=16", "lora.rank=4"], {}),
        (["width=16", "rank=4"], {}),
        (["width=16"], {"rank": 4, "alpha": None}),
        (["meft={width: 16}", "lora={rank: 4}"], {}),
        ({"meft": {"width": 16}, "lora.rank": 4}, {}),
        ({"lora": {"rank": 4}, "width": 16}, {}),
    ],
)
def test_an_option_finds_its_member(options, common):
    method = recipe.parse("meft+lora", options, **common)
    assert method.specs == jp.chain(jp.meft(width=16), jp.lora(rank=4)).specs
    assert recipe.spell(method.specs) == "meft+lora"


def test_members_apply_in_order():
    assert [spec.name for spec in recipe.parse("lora + meft").specs] == ["lora", "meft"]


def test_common_settings_go_to_all_that_take_them():
    found = recipe.parse("lora+full+lora_fa", {"lora_fa.alpha": 1}, rank=2, targets="mlp")
    assert configs(found, "rank", "targets", "alpha") == [
        ("lora", 2, "mlp", None),
        ("full", None, None, None),
        ("lora_fa", 2, "mlp", 1),
    ]


def test_a_nested_mapping_may_be_an_options_value():
    found = recipe.parse("meft+lora", ["rank_pattern={q_proj: 2}"])
    assert configs(found, "rank_pattern") == [("meft", None), ("lora", {"q_proj": 2})]


def test_several_chains_each_get_what_they_take():
    found = recipe.several("full, lora, meft+lora_fa", ["width=16", "lora.dropout=0.5"], rank=2)
    assert [words for words, _ in found] == ["full", "lora", "meft+lora_fa"]
    assert [configs(method, "rank", "width", "dropout") for _, method in found] == [
        [("full", None, None, None)],
        [("lora", 2, None, 0.5)],
        [("meft", None, 16, 0.0), ("lora_fa", 2, None, 0.0)],
    ]


@pytest.mark.parametrize(
    ("text", "options", "common", "said"),
    [
        ("lorra", [], {}, "unknown method 'lorra'; nearest: lora"),
        ("meft+lorra", [], {}, "unknown method 'lorra'; nearest: lora"),
        ("lora+", [], {}, "method 'lora+': a name is missing beside +"),
        ("", [], {}, "name at least one"),
        ("lora,full", [], {}, "give one, or a chain joined by +"),
        ("lora+lora", [], {}, "lora stands twice; to give different targets or names is not possible yet"),
        ("full+full", [], {}, "a name stands twice"),
        ("full", [], {"rank": 2}, "it takes which (dept, direft, dora, galore, "),
        ("full+vqt", [], {"rank": 2}, "method full+vqt takes no rank; known: full.which, vqt.queries, vqt.normalize"),
        ("lora", ["rnk=3"], {}, "method lora takes no rnk; it takes rank, alpha"),
        ("lora", ["rnk=3"], {}, "did you mean rank?"),
        ("meft+lora", ["rnk=3"], {}, "method meft+lora takes no rnk; did you mean lora.rank?"),
        ("meft+lora", ["queries=3"], {}, "method meft+lora takes no queries"),
        ("meft+lora", ["queries=3"], {}, "(vqt takes it)"),
        ("meft+lora", ["lora.width=3"], {}, "method lora takes no width; it takes rank"),
        ("meft+lora", ["vqt.queries=3"], {}, "option vqt.queries: the methods are lora, meft, not vqt"),
        ("meft+lora", ["vqt={queries: 3}"], {}, "option vqt: the methods are lora, meft, not vqt"),
        ("meft+lora", ["lroa.rank=3"], {}, "not lroa; did you mean lora"),
        ("meft+lora", ["dropout=0.1"], {}, "meft and lora take it; write meft.dropout or lora.dropout"),
        ("lora+lora_fa", ["rank=2"], {}, "write lora.rank or lora_fa.rank"),
        ("meft+lora", ["lora.rank=2"], {"rank": 3}, "lora's rank is given twice"),
        ("meft+lora", ["lora.rank=2", "rank=3"], {}, "lora's rank is given twice"),
        ("meft+lora", ["lora.rank=2", "lora={rank: 2}"], {}, "lora's rank is given twice"),
        ("lora", ["rank-pattern=1", "rank_pattern=1"], {}, "rank_pattern is given twice"),
        ("meft+lora", ["lora=3"], {}, "should be a mapping of lora's options"),
        ("meft+lora", ["lora={a.b: 3}"], {}, "option lora: 'a.b' is no option's name"),
        ("lora", ["a.b.c=3"], {}, "'a.b.c=3': must be NAME=VALUE or METHOD.NAME=VALUE"),
        ("lora", ["lora.=3"], {}, "'lora.=3': must be NAME=VALUE or METHOD.NAME=VALUE"),
        ("lora", {3: 4}, {}, "3: must be named NAME or METHOD.NAME"),
        ("lora", ["rank=[1"], {}, "is not YAML"),
        ("lora", ["dropout=high"], {}, "method lora: dropout 'high' should be a number"),
        ("meft+lora", ["lora.alpha=high"], {}, "method lora: alpha 'high' should be a number or null"),
        ("lora", ["rank=4.5"], {}, "method lora: rank 4.5 should be a whole number"),
        ("lora", ["rank=true"], {}, "method lora: rank True should be a whole number"),
        ("lora", ["rslora=3"], {}, "method lora: rslora 3 should be true or false"),
        ("lora", ["targets=[q_proj, 3]"], {}, "targets ['q_proj', 3] should be text or a list, each of it text"),
        (
            "lora",
            ["rank_pattern={q_proj: two}"],
            {},
            "a mapping, each name in it text and each value a whole number, or null",
        ),
    ],
)
def test_a_mistake_is_one_line(text, options, common, said):
    with pytest.raises(InputError) as caught:
        recipe.parse(text, options, **common)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_of_several_chains_none_takes_it():
    with pytest.raises(InputError, match="method full, meft takes no rank"):
        recipe.several("full,meft", rank=2)
    with pytest.raises(InputError, match="the methods are full, meft, not lora"):
        recipe.several("full,meft", {"lora.rank": 2})
    with pytest.raises(InputError, match="write meft.dropout or lora.dropout"):
        recipe.several("full,meft+lora", {"dropout": 0.5})


# Specs


def example(name):
    file = contract.module(name)
    return getattr(file, name)(**file.ABOUT.example)


@pytest.mark.parametrize("name", contract.names())
def test_specs_survive_json(name):
    """As a file has them they make an equal method, as does their spelling with their arguments as options."""
    for method in (example(name), jp.chain(example(name), jp.full("^classifier/"))):
        as_read = json.loads(json.dumps(method.specs))
        assert contract.from_specs(as_read).specs == method.specs
        assert tuple(Spec(*pair) for pair in as_read) == method.specs
    method = example(name)
    assert recipe.parse(recipe.spell(method.specs), {s.name: s.config for s in method.specs}).specs == method.specs


def test_a_spec_holds_json_types_alone():
    given = {"a": ("q", ("v",)), "b": {"x": (1,)}, "c": np.int64(3), "d": jnp.float32(0.5), "e": range(2), "f": None}
    spec = Spec("lora", given)
    assert spec.config == {"a": ["q", ["v"]], "b": {"x": [1]}, "c": 3, "d": 0.5, "e": [0, 1], "f": None}
    assert Spec(*json.loads(json.dumps(spec))) == spec
    given["b"]["x"] = 0
    assert spec.config["b"] == {"x": [1]}
    assert jp.lora(targets=("q_proj", "v_proj")).specs == jp.lora(targets=["q_proj", "v_proj"]).specs


@pytest.mark.parametrize("value", [object(), float("nan"), {1: 2}, {"q"}, b"x", np.zeros(2), [float("inf")], jnp.int8])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(InputError, match="^lora: alpha_pattern: JSON cannot hold"):
        Spec("lora", {"alpha_pattern": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**31, "galore: every 2147483648: is too large; whole numbers are at most 2147483647"),
        (-(10**60), "galore: every -1000.*: is too large"),
        (1e-50, "galore: every 1e-50: is none of float32's numbers, 1.2e-38 to 3.4e.38"),
        (1e300, "galore: every 1e.300: is none of float32's numbers"),
    ],
)
def test_numbers_that_a_step_cannot_hold_are_refused(value, message):
    with pytest.raises(InputError, match=message):
        Spec("galore", {"every": value})
    assert Spec("galore", {"every": [2**31 - 1, 1e-30, 0.0]}).config == {"every": [2**31 - 1, 1e-30, 0.0]}


def test_a_chain_holds_a_method_once():
    with pytest.raises(InputError, match=r"^lora\+meft\+lora: lora stands twice"):
        jp.chain(jp.lora(alpha=1), jp.chain(jp.meft(), jp.lora(alpha=2)))
    both = jp.chain(jp.full("norms"), jp.full("biases"))  # names of leaves of the base
    assert both.trainable("norm/scale") and both.trainable("layers/x/bias") and not both.trainable("x/kernel")
