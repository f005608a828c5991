"""The steps behind the LoRA-FA paper's tables: which are compiled, and how they are looked up."""

from __future__ import annotations

from collections.abc import Callable

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import tree
from jaxpeft.method import Method, View, chain

NAME = "lora_fa_tables"
METHODS: dict[str, Callable[..., Method]] = {"lora": jp.lora, "lora_fa": jp.lora_fa}
PLANS = ("everything", "matmuls")
PAIRS = [(plan, method) for plan in PLANS for method in METHODS]
OURS = [f"{label}, {plan}" for plan in PLANS for label in ("LoRA", "FA")]
LAYERS = {"llama2-7b": 32, "llama2-13b": 40}


def method_of(key: common.Row) -> Method:
    """The method of a figure; layers "a:b" restrict it to those, by cutting the stack and aiming at one segment."""
    first, end = map(int, key["layers"].split(":"))
    whole = LAYERS[key["geometry"]]
    make, rank = METHODS[key["method"]], key["rank"]
    if (first, end) == (0, whole):
        return make(rank=rank, targets=key["targets"])

    def cut(params: tree.Params, view: View) -> tree.Params:
        return tree.cut_layers(params, end if first == 0 else first)

    return chain(Method(prepare=cut), make(rank=rank, targets=rf"^layers_{first}_{end}/"))


def without(module: str) -> str:
    """Targets: every linear map but one."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    return ",".join(f"{name}_proj" for name in names if name != module)


class Sizes:
    """Figures of the tables, with what is usual left out."""

    def __init__(self, figures: common.Figures, target: str):
        self.figures, self.target = figures, target

    def __call__(
        self, method, save, geometry="llama2-7b", batch=16, seq=1024, rank=64, targets="all-linear", layers=""
    ):
        return self.figures(
            geometry=geometry,
            batch_size=batch,
            seq_len=seq,
            dtype="bfloat16",
            target=self.target,
            method=method,
            rank=rank,
            targets=targets,
            layers=layers or f"0:{LAYERS[geometry]}",
            save=save,
        )

    def total(self, *args, **kwargs) -> float:
        return self(*args, **kwargs)["bytes"]["total"] / GIB

    def slope(self, method: str, save: str) -> float:
        """Bytes of temporaries that one more token costs in one layer: from 4 x 1024 to 4 x 2048 tokens of 7B."""
        short, long = (self(method, save, batch=4, seq=seq)["bytes"]["temporaries"] for seq in (1024, 2048))
        return (long - short) / (4 * 1024 * LAYERS["llama2-7b"])


def measure(key: common.Row) -> common.Row:
    return common.train_step(key, method_of(key))
