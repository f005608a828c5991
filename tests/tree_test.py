"""Flat paths: split and combine, segments, cutting and joining."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft import tree

PARAMS = {
    "embed_tokens": {"embedding": np.arange(6).reshape(3, 2)},
    "layers": {"mlp": {"up_proj": {"kernel": np.arange(24).reshape(4, 3, 2)}}, "norm": {"scale": np.ones((4, 3))}},
}


def test_flatten_joins_keys():
    assert [*tree.flatten(PARAMS)] == ["embed_tokens/embedding", "layers/mlp/up_proj/kernel", "layers/norm/scale"]


names = st.text("abc", min_size=1, max_size=2)
nested = st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda node: isinstance(node, dict))


@given(nested, st.sets(st.integers(0, 9)))
def test_split_and_combine_are_inverse(params, chosen):
    """Any partition of any tree comes back together."""
    order = {path: i for i, path in enumerate(tree.flatten(params))}
    trainable, frozen = tree.split(params, lambda path: order[path] in chosen)
    assert not trainable.keys() & frozen.keys()
    assert tree.combine(trainable, frozen) == params


def test_combine_refuses_a_path_in_both():
    with pytest.raises(ValueError, match="both trainable and frozen: a/b"):
        tree.combine({"a/b": 1}, {"a/b": 2})


def test_cut_and_join_layers():
    """A cut makes two segments, in order, that join to the same bits."""
    cut = tree.cut_layers(PARAMS, 3)
    assert tree.segments(cut) == [("layers_0_3", 0, 3), ("layers_3_4", 3, 4)]
    assert tree.segments(tree.cut_layers(cut, 1)) == [
        ("layers_0_1", 0, 1),
        ("layers_1_3", 1, 3),
        ("layers_3_4", 3, 4),
    ]
    joined = tree.flatten(tree.join_layers(tree.cut_layers(cut, 1)))
    for path, leaf in tree.flatten(PARAMS).items():
        np.testing.assert_array_equal(joined[path], leaf)


def test_paths_of_a_cut_stack_answer_to_the_whole_one():
    assert tree.canonical("layers_24_32/mlp/up_proj") == "layers/mlp/up_proj"
    assert tree.canonical("lm_head") == "lm_head"
    assert tree.stacked("layers_0_3/norm/scale") and not tree.stacked("norm/scale")


def test_sizes():
    leaves = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(5, jnp.int8)}
    assert (tree.size(leaves), tree.num_bytes(leaves)) == (11, 17)
