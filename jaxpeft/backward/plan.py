"""A memory plan: what is done with each named activation.

As text, which `--save` takes and `jaxpeft plan --budget` prints:

    matmuls                                    a preset
    matmuls,attention=recompute                a preset and what differs from it
    gate_proj=save,up_proj=compress            without a preset: all others are recomputed, as with `blocks`
    blocks,tile=8192                           the MLP by tiles of a long row (tiles.py)
    matmuls,mlp_norm_normalized=prune          of each row the largest tenth; `prune:0.25`: a quarter (pruned.py)

The presets:

    everything    whatever autodiff keeps; nothing is computed again
    matmuls       as little as possible so that no matrix product is computed again; all elementwise work is
    blocks        the inputs of the layers
    offload       as matmuls, the large ones in the host's memory
    compressed    as matmuls, the projections that attention and the MLP read in 8 bits; attention is computed again
                  from them, as its weights must be those of the rounded queries and keys
    compressed12  as matmuls, layers' inputs, projections and attention's output in 12 bits, a quarter fewer bytes than
                  bfloat16; nothing but elementwise work is computed again
    compressed4   as compressed, queries and keys in 8 bits, layers' inputs, the other projections and what is added to
                  the stream in 4; attention is computed again
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from jaxpeft.errors import InputError

ACTIONS = ("save", "recompute", "compress", "compress12", "compress4", "prune", "offload")
CODES = ("compress", "compress12", "compress4", "prune")  # of these, those that change what is stored
PRESETS = ("everything", "matmuls", "blocks", "offload", "compressed", "compressed12", "compressed4")
INPUT = "block_input"
NORMALIZED, RSTD = "_normalized", "_rstd"  # after a norm's name: what its derivative reads (norms.py)

PRUNED = 0.1  # the share of each row that is kept, where a plan says none

_SCORES = ("q_proj", "k_proj")  # whose products go through an exponential
_READ = ("gate_proj", "up_proj", "v_proj")
_ADDED = ("o_proj", "down_proj")
_AGAIN = ("attention", "attention_lse")
# Of presets that make codes, which of what.
_CODED = {
    "compressed": dict.fromkeys((*_SCORES, *_READ), "compress"),
    "compressed12": dict.fromkeys((INPUT, *_SCORES, *_READ, "attention", *_ADDED), "compress12"),
    "compressed4": dict.fromkeys(_SCORES, "compress") | dict.fromkeys((INPUT, *_READ, *_ADDED), "compress4"),
}
_ON_DEVICE = (INPUT, "lora_low", "attention_lse")  # small beside what they would save


class Plan(NamedTuple):
    """A memory plan.

    preset: one of PRESETS; what is done with the names that `actions` leaves out.
    actions: name -> action.
    tokens: tokens that a layer works on at a time; whole rows, at least one.
    tile: tokens of a row that a layer's MLP works on at a time (tiles.py), which keeps nothing of it; None: all.
    budget: bytes that the layers may keep on the device; then the preset says what else may be done with activations,
      and the names are chosen when the layers are traced. None: no choice is left.
    """

    preset: str = "matmuls"
    actions: tuple[tuple[str, str], ...] = ()
    tokens: int = 2048
    budget: int | None = None
    tile: int | None = None

    def __str__(self) -> str:
        """The text that `parse` reads."""
        words = [self.preset, *(f"{name}={action}" for name, action in self.actions)]
        words += [f"tokens={self.tokens}"] if self.tokens != Plan().tokens else []
        return ",".join(words + ([f"tile={self.tile}"] if self.tile is not None else []))


def parse(text: str | Plan) -> Plan:
    """`matmuls`, `blocks,gate_proj=save,tokens=4096`: a preset (`blocks` if left out), then name=action.

    Raises:
      InputError: for an unknown preset or action.
    """
    if isinstance(text, Plan):
        return text
    if not isinstance(text, str):
        raise InputError(f"--save {text!r}: a plan should be text, such as 'matmuls', or a Plan")
    first, *rest = [word.strip() for word in text.split(",")]
    if "=" in first:
        first, rest = "blocks", [first, *rest]
    if first not in PRESETS:
        raise InputError(f"--save {text!r}: unknown preset {first!r}; known: {', '.join(PRESETS)}, or NAME=ACTION,...")
    plan = Plan(first)
    actions: dict[str, str] = {}
    said: set[str] = set()
    for word in rest:
        name, _, action = word.partition("=")
        if name in said:
            raise InputError(f"--save {text!r}: {name} stands twice; say once what is done with it")
        said.add(name)
        if name in ("tokens", "tile"):
            if not re.fullmatch(r"[1-9]\d*", action):
                raise InputError(f"--save {text!r}: {name}={action!r} should be a whole number above 0")
            plan = plan._replace(tokens=int(action)) if name == "tokens" else plan._replace(tile=int(action))
            continue
        if not is_action(action):
            raise InputError(
                f"--save {text!r}: {word!r} should be NAME=ACTION with one of {', '.join(ACTIONS)}; prune:SHARE has a "
                "share above 0, at most 1"
            )
        actions[name] = action
    if actions.get(INPUT) == "recompute":
        raise InputError(f"--save {text!r}: {INPUT} is where recomputation starts; save, compress or offload it")
    if first == "everything" and rest:
        raise InputError(f"--save {text!r}: everything is plain autodiff and takes no more words; start from matmuls")
    return plan._replace(actions=tuple(actions.items()))


def is_action(action: str) -> bool:
    """Whether it is one of ACTIONS, or `prune:SHARE` with a share in (0, 1]."""
    word, colon, share = action.partition(":")
    if not colon:
        return word in ACTIONS
    return word == "prune" and bool(re.fullmatch(r"\d+(\.\d*)?|\.\d+", share)) and 0 < float(share) <= 1


def is_code(action: str) -> bool:
    """Whether it changes what is stored."""
    return action.partition(":")[0] in CODES


def share_of(action: str) -> float:
    """The share of each row that `prune` keeps."""
    return float(action.partition(":")[2] or PRUNED)


def reads_norms(plan: Plan) -> bool:
    """Whether a plan speaks of what the derivatives of norms read."""
    return any(name.endswith((NORMALIZED, RSTD)) for name, _ in plan.actions)


def keeps(plan: Plan) -> bool:
    """Whether a plan asks for more than that layers are computed again from their inputs, group of rows by group."""
    asked = [action for _, action in plan.actions if action != "recompute"]
    return plan.preset not in ("everything", "blocks") or bool(asked)


def without_codes(plan: Plan, names: Iterable[str]) -> bool:
    """Whether a plan's preset makes codes, and none of these is a name of which it does."""
    return plan.preset in _CODED and not {*names, *dict(plan.actions)}.intersection(_CODED[plan.preset])


def codes_of(preset: str) -> str | None:
    """The action of a preset that makes codes: that of most of them."""
    return _CODED[preset]["up_proj"] if preset in _CODED else None


def action_of(preset: str, name: str) -> str:
    """What a preset does with an activation, if the backward pass would read it."""
    if name in _CODED.get(preset, ()):
        return _CODED[preset][name]
    if preset in ("compressed", "compressed4") and name in _AGAIN:
        return "recompute"
    return "offload" if preset == "offload" and name not in _ON_DEVICE else "save"
