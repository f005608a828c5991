"""The least that a LoRA step must move: bytes in the device's memory, counted from the geometry and the plan.

A step is a sequence of passes: matrix products, and attention. In each pass every array that it needs is read once and
every array that it makes is written once; elementwise work rides along (a norm, a rotation, SwiGLU and their
derivatives as a pass reads its inputs or writes its outputs), and so do the low-rank products that are added to a
frozen one. Layers work on a group of rows at a time, so a frozen kernel is read once per pass and group. With

    x  the stream before a layer   h  after attention   y  after the layer   d_...  gradients   n, m  of a norm's output

the passes are the rows of FORWARD and BACKWARD below, the gradients of A and B those of FACTORS. What the plan does not
keep is computed again by FORWARD's pass before the backward ones; what it keeps is written by the pass that makes it,
and read by those that need it, and costs nothing more; what it offloads is read and written once more.

The floor is of the device's memory: a pass that leaves its result on a TPU's chip for the next one, where it fits,
moves less.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

# Pass: (the arrays that it reads, those that it writes).
FORWARD = {
    "q_proj": ("x", "q"),
    "k_proj": ("x", "k"),
    "v_proj": ("x", "v"),
    "attention": ("q k v", "a lse"),
    "o_proj": ("a x", "h"),
    "gate_proj": ("h", "gate"),
    "up_proj": ("h", "up"),
    "down_proj": ("gate up h", "y"),
}
BACKWARD = {
    "down_proj": ("d_y gate up", "d_gate d_up"),
    "up_proj": ("d_up", "n"),
    "gate_proj": ("d_gate n h d_y", "d_h"),
    "o_proj": ("d_h", "d_a"),
    "attention": ("q k v a lse d_a", "d_q d_k d_v"),
    "v_proj": ("d_v", "m"),
    "k_proj": ("d_k m", "m"),
    "q_proj": ("d_q m x d_h", "d_x"),
}
# Of a map: (what d A reads, what d B reads), beside the low-rank products.
FACTORS = {
    "q_proj": ("x", "d_q"),
    "k_proj": ("x", "d_k"),
    "v_proj": ("x", "d_v"),
    "o_proj": ("a", "d_h"),
    "gate_proj": ("h", "d_gate"),
    "up_proj": ("h", "d_up"),
    "down_proj": ("gate up", "d_y"),
}
# The names under which a plan keeps what a pass makes; y is the next layer's x.
KEPT_AS = {
    "q_proj": ("q_proj", "q_rotary"),
    "k_proj": ("k_proj", "k_rotary"),
    "v_proj": ("v_proj",),
    "attention": ("attention",),
    "o_proj": ("o_proj", "after_attention"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
}
LOGITS = 256 << 20  # bytes of float32 logits that may exist at once, which says how often the head's kernel is read


class Work(NamedTuple):
    """What a step works on.

    tokens: of a batch.  group: tokens that a layer takes at a time.  rank: of LoRA on all seven maps.
    kept: names of what a plan keeps.  offloaded: bytes that it keeps in the host's memory.
    dtype: bytes of a number, weights' and activations'.  adapters: of one of A, B and their gradients.
    optimizer: whether Adam follows, with float32 moments.
    """

    tokens: int
    group: int
    rank: int
    kept: Collection[str] = ()
    offloaded: int = 0
    dtype: int = 2
    adapters: int = 2
    optimizer: bool = False


def widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Numbers per token of each array; of lse float32 ones, one per head, which no type makes smaller."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or d // heads
    q, kv = heads * size, (config.get("num_key_value_heads") or heads) * size
    own = {"x": d, "h": d, "y": d, "n": d, "m": d, "q": q, "k": kv, "v": kv, "a": q}
    own |= dict.fromkeys(("gate", "up"), config["intermediate_size"])
    return own | {f"d_{name}": width for name, width in own.items()} | {"lse": heads}


def maps(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{map: (inputs, outputs)} of a layer's seven linear maps."""
    w = widths(config)
    into = {"q_proj": "x", "k_proj": "x", "v_proj": "x", "o_proj": "a", "gate_proj": "h", "up_proj": "h"}
    out = {name: FORWARD[name][1] for name in FACTORS}
    return {name: (w[into.get(name, "gate")], w[out[name]]) for name in out}


def again(kept: Collection[str]) -> tuple[str, ...]:
    """The passes that the backward pass runs again: all whose result is not kept, but the last, which nothing needs."""
    return tuple(name for name, names in KEPT_AS.items() if not any(own in kept for own in names))


def floor(config: Mapping[str, Any], work: Work) -> dict[str, float]:
    """Bytes read and written in the device's memory by a step of LoRA on a decoder.

    Args:
      config: a parsed config.json of a Llama.
      work: batch, rank and plan.

    Returns:
      {"weights", "activations", "adapters", "loss", "optimizer", "offload", "total"}: frozen kernels of layers and
      head; arrays of tokens; A, B, their products with tokens and their gradients; embedding, logits, batch; Adam's;
      what goes to the host's memory and comes back.
    """
    w, linear, layers = widths(config), maps(config), config["num_hidden_layers"]
    groups = math.ceil(work.tokens / work.group)
    passes = [*FORWARD, *again(work.kept), *BACKWARD]
    arrays = [FORWARD[name] for name in (*FORWARD, *again(work.kept))] + [*BACKWARD.values(), *FACTORS.values()]

    def size(names: str) -> int:
        return sum(w[name] * (4 if name == "lse" else work.dtype) for name in names.split())

    through = [name for name in passes if name in linear]
    kernels = sum(math.prod(linear[name]) for name in through) * groups * layers
    factors = {name: work.rank * sum(sizes) for name, sizes in linear.items()}
    per_token = 4 * work.rank * len(linear)  # z = x A and e = d_y B^T, written and read
    trained = layers * sum(factors.values())
    d, words = config["hidden_size"], config["vocab_size"]
    chunks = math.ceil(4 * words * work.tokens / LOGITS)
    found = {
        "weights": work.dtype * (kernels + 2 * chunks * words * d),
        "activations": layers * work.tokens * sum(size(reads) + size(writes) for reads, writes in arrays),
        "adapters": work.dtype * layers * (groups * sum(factors[name] for name in through) + work.tokens * per_token)
        + work.adapters * trained,
        # Embedding: rows and the stream; head: the stream, logits and back.
        "loss": work.tokens * (work.dtype * (2 * d + 2 * d + 2 * words) + 12),
        "optimizer": 7 * 4 * trained if work.optimizer else 0,
        "offload": 2 * work.offloaded,
    }
    return {**found, "total": sum(found.values())}
