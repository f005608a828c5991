"""jaxpeft: the memory of fine-tuning, visible, predictable and controllable in JAX."""

from jaxpeft.errors import InputError
from jaxpeft.hf import load_pretrained, save_pretrained
from jaxpeft.method import Method, Objective, Spec, chain, setup
from jaxpeft.methods.full import full
from jaxpeft.methods.lora import lora
from jaxpeft.methods.lora_fa import lora_fa
from jaxpeft.model import Model, Stack, from_linen, from_nnx
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.state import TrainState, init_state
from jaxpeft.train.step import make_train_step
from jaxpeft.tree import combine, split

__all__ = [
    "InputError",
    "Method",
    "Model",
    "Objective",
    "Spec",
    "Stack",
    "TrainState",
    "chain",
    "combine",
    "completion_loss",
    "from_linen",
    "from_nnx",
    "full",
    "init_state",
    "load_pretrained",
    "lora",
    "lora_fa",
    "make_train_step",
    "save_pretrained",
    "setup",
    "split",
]
