"""JAX's name stacks, as XLA keeps them in `op_name`: whose an instruction is, and in which pass it runs.

jit(step)/jvp(loss)/while/body/layers/mlp/gate_proj/dot_general
"""

from __future__ import annotations

import re

SCOPE = re.compile(
    r"(?:^|/)(save|read|grad):([^\"]*?)(?=/(?:[a-z_0-9]+(?:\(|$)|cond/branch_|in_place/|save:|read:|$)|$)"
)
# Tokens of a name stack that say how something is computed, not whose it is.
HOW = re.compile(
    r"while|body|cond|grad|in_place|branch_\d+_fun|closed_call|core_call|eval_jaxpr|checkpoint|rematted_computation|remat\d?"
    r"|pjit|scan|custom_[jv][vj]p(_call)?(_jaxpr)?|shard_map|.*\.(linear|__call__)"
)
_WRAPPED = re.compile(r"(?:jvp|transpose|vmap|checkpoint|remat)\((.*)\)")


def words(op_name: str) -> list[str]:
    """The scopes of a name stack that name modules: jit(f)/jvp()/while/body/Block/mlp/tanh -> [Block, mlp]."""
    words: list[str] = []
    for token in op_name.split("/")[:-1]:  # the last is the primitive
        while found := _WRAPPED.fullmatch(token):
            token = found[1]
        again = words[-1:] == [token]  # a module that calls a method of its own
        if re.fullmatch(r"[A-Za-z_]\w*", token) and not HOW.fullmatch(token) and not again:
            words.append(token)
    return words


def without_root(op_name: str) -> str:
    """Without the leading jit(f), whose name is the user's."""
    return op_name.partition("/")[2] if op_name.startswith("jit(") else op_name


def phase(op_name: str) -> str:
    """forward, backward, or "" where the name does not say."""
    if "transpose(" in op_name or "read:" in op_name or "grad:" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name or "save:" in op_name else ""
