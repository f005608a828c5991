"""BitFit: the biases train, and nothing else.

    y = x W + b                                         of a linear map: b (m,) trained
    y = s * (x - mean(x)) / sqrt(var(x) + epsilon) + c  of a LayerNorm: c (d,) trained

A module gets a float32 copy of its bias beside it, `<module>/bitfit/bias`, which is read in its place: the base stays
as it is, and the copies are an adapter that is saved alone. They start at the base's values, the adapted model at the
base. (`full` with which="biases" trains the base's own, and a run with it leaves a whole checkpoint.)

Which models have biases is their families' matter: BERT, RoBERTa, ViT and OPT at every linear map and norm, Qwen2 at
q, k and v; Llama, Mistral and Qwen3 have none, and are refused.

Kept for the backward pass: nothing. A bias's gradient is the sum of dy, which is there. While a layer is
differentiated one more vector per token is at work.

Merging puts the copies in the place of the base's biases, in the base's dtype: exact up to that rounding. Kernels are
not touched, so it trains beside packed ones.

Paper: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", arXiv:2106.10199. Its smaller form trains the biases of q and of the map into the MLP's inner space:
targets=["q_proj", "up_proj"]. A classifier of rows is none of the modules here: as in the paper it trains whole, with
`--task classify`. PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.ln_tuning import merge, on_copies
from jaxpeft.models import labels
from jaxpeft.targets import among

SCOPE = "bitfit"


def block_bytes(config: Any, itemsize: int, **_) -> float:
    """Bytes per token kept in one layer beyond what a frozen backbone keeps: none.

    This counts each layer's share of the one vector per token that a layer has at work while it is differentiated.
    """
    return config.hidden_size * itemsize / config.num_hidden_layers


def bitfit(targets: str | Sequence[str] = "all") -> Method:
    """BitFit.

    Args:
      targets: the modules whose biases train: "all", a regular expression found in a module's path (`re.search`), or
        names that paths end with (["q_proj", "v_proj"], or "q_proj,v_proj").

    Returns:
      The method; it trains `<module>/bitfit/bias` (L, m).

    Raises:
      InputError: for a model without biases, a target that matches none, or a norm whose bias `ln_tuning` trains.
    """
    config = {"targets": targets if isinstance(targets, str) else list(targets)}
    return Method(
        forward=lambda model, view: on_copies(model, view, SCOPE, lambda paths: find(paths, targets)),
        roles=trains(lambda path: path.endswith(f"/{SCOPE}/bias")),
        merge=lambda params: merge(params, SCOPE),
        specs=(Spec("bitfit", config),),
    )


def find(paths: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The biases of the modules that `targets` chooses among the paths of a model's leaves.

    Raises:
      InputError: if there are none, or a target matches none, with the nearest names.
    """
    biases = sorted(path for path in paths if path.endswith("/bias") and not path.startswith(labels.SCOPE))
    if not biases:
        raise InputError("bitfit: the model has no biases; ln_tuning trains the norms' scales, ia3 scales of its own")
    chosen = among((path.removesuffix("/bias") for path in biases), targets, "bitfit", "module with a bias")
    return [f"{module}/bias" for module in chosen]


ABOUT = About(
    summary="the biases alone, on copies that are saved alone",
    level="module",
    trains="every bias: m numbers per linear map, d per norm, where the model has them",
    saves="gradients and optimizer state of all but the biases, and the matrices' weight-gradient inputs",
    reference="Ben Zaken et al. 2022, arXiv:2106.10199",
    example={},
    promises=Promises(block_bytes=block_bytes, config={"attention_bias": True, "mlp_bias": True}),
    defaults=Defaults(lr=1e-3),
)
