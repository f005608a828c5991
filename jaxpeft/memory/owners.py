"""Who can own a buffer: categories, arguments and results by path, and a buffer with its owner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxpeft import tree

CATEGORIES = (  # in the order of tables and pictures
    "weights",
    "adapters",
    "optimizer",
    "gradients",
    "saved activations",
    "loss",
    "workspace",
    "cache",
    "batch",
    "arguments",
    "outputs",
    "constants",
    "alignment",
    "fragmentation",
    "unattributed",
)

KINDS = ("buffers", "executables", "other")  # what is in use on a device, of a program or of none

LOSS = r"\b(Head|lm_head|logsumexp|log_softmax|softmax_cross_entropy|cross_entropy|take_along_axis|\w*loss)\b"
# op_name -> the activation's name, first match wins: what a linear map yields, alone or with its adapter added.
ACTIVATIONS = ((r"/(\w+)/\1\.linear/(?:\w+/)?add(?:_any)?$", r"\1"), (r"/(\w+)/(?:\1\.linear/)?dot_general$", r"\1"))


class Owner(NamedTuple):
    """What an argument or a result is.

    category: one of `CATEGORIES`.
    path: its path or name.
    moved: whether it is a parameter that a step changes without a gradient of its own.
    """

    category: str
    path: str = ""
    moved: bool = False


class Owners(NamedTuple):
    """What the caller of a compiled function knows about it.

    arguments: an Owner for each flat argument, in order.
    outputs: an Owner for each flat result, in order.
    names: what each argument's `op_name` ends with (`jax.tree_util.keystr` of its path); needed only if XLA's
      parameters are fewer than the arguments, because jit drops those that nothing reads.
    activations: (regular expression on op_name, activation) pairs, tried before `ACTIVATIONS`.
    loss: regular expression on op_name: belongs to the loss.
    """

    arguments: Sequence[Owner]
    outputs: Sequence[Owner]
    names: Sequence[str] = ()
    activations: Sequence[tuple[str, str]] = ()
    loss: str = LOSS


class Buffer(NamedTuple):
    """An array that is live at the peak.

    bytes: of device memory.
    instruction: name of the HLO instruction that writes it.
    shape: such as "bf16[32,4,1024,11008]".
    op_name: JAX's name stack of what computed it.
    first, last: positions in the schedule between which it is live.
    category: one of `CATEGORIES`, or of `KINDS` in what is in use.
    module: path such as layers/self_attn/q_proj, or "".
    activation: name such as gate_proj, or "".
    arrays: how many it stands for.
    """

    bytes: int
    instruction: str
    shape: str
    op_name: str
    first: int
    last: int
    category: str
    module: str = ""
    activation: str = ""
    arrays: int = 1

    @property
    def owner(self) -> str:
        """`module: activation`; an activation that has no name is called so, with its primitive and shape."""
        if self.category == "saved activations" and not self.activation:
            unnamed = f"unnamed {self.op_name.rsplit('/', 1)[-1]} {self.shape}"
            return f"{self.module}: {unnamed}" if self.module else unnamed
        if self.activation and self.activation != self.module.rsplit("/", 1)[-1]:
            return f"{self.module}: {self.activation}" if self.module else self.activation
        return self.module or self.shape


def step_owners(state: Any, batch: Mapping[str, Any], base: Iterable[str], metrics: Iterable[Any] = ()) -> Owners:
    """The owners of a train step as it is compiled (`jaxpeft.train.step.in_place`).

    Args:
      state: a `TrainState` of arrays or shapes.
      batch: likewise.
      base: the base model's paths; leaves at other paths are adapters.
      metrics: the step's second result (its leaves are counted; none: whatever follows the state).
    """
    known = {tree.canonical(path) for path in base}

    def owner(path: Any) -> Owner:
        field, *rest = (str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path)
        if field in ("trainable", "frozen", "moved"):
            category = "weights" if tree.canonical(rest[0]) in known else "adapters"
            return Owner(category, "/".join(rest), field == "moved")
        return Owner("optimizer", "/".join([field, *rest]))

    changing, frozen = state.parted
    leaves = jax.tree_util.tree_flatten_with_path(changing)[0]
    fixed = jax.tree_util.tree_flatten_with_path(frozen)[0]
    of_state = [owner(path) for path, _ in leaves]
    of_frozen = [owner((jax.tree_util.GetAttrKey("frozen"), *path)) for path, _ in fixed]
    rows = jax.tree_util.tree_flatten_with_path(dict(batch))[0]
    of_batch = [Owner("batch", str(path[0].key)) for path, _ in rows]
    of_metrics = [Owner("loss", "metrics") for _ in jax.tree.leaves(metrics)]
    names = [jax.tree_util.keystr(path) for path, _ in (*leaves, *fixed, *rows)]
    return Owners([*of_state, *of_frozen, *of_batch], [*of_state, *of_metrics], names)
