"""What the two documents of an adapter may hold, and the reading of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le, Lt
from typing_extensions import TypedDict

from jaxpeft import documents
from jaxpeft.documents import Count, Flag, Index, Number, Text, Whole

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "jaxpeft.json"
FORMAT = 1  # of jaxpeft.json

_Rank = Annotated[Count, Le(2**20)]
_Alpha = Annotated[Number, Ge(-1e9), Le(1e9)]
_Names = list[Text] | Text | None  # of modules; a text is a regular expression


class AdapterConfig(TypedDict, total=False):
    """adapter_config.json: of PEFT's fields those that say what an adapter computes, or that decide how it is read."""

    peft_type: Text
    task_type: Text | None
    base_model_name_or_path: Text | None
    modules_to_save: list[Text] | None
    # LORA
    r: Annotated[Index, Le(2**20)]  # 0 where OFT's blocks have a size
    lora_alpha: _Alpha
    lora_dropout: Annotated[Number, Ge(0), Lt(1)] | None
    rank_pattern: dict[Text, _Rank] | None
    alpha_pattern: dict[Text, _Alpha] | None
    target_modules: _Names
    exclude_modules: _Names
    layers_to_transform: list[Index] | Index | None
    layers_pattern: _Names
    bias: Text
    fan_in_fan_out: Flag | None
    use_rslora: Flag | None
    use_dora: Flag | None
    init_lora_weights: Flag | Text | None
    # IA3
    feedforward_modules: _Names
    # LOHA, LOKR
    alpha: _Alpha
    decompose_factor: Annotated[Whole, Ge(-1), Le(2**20)] | None
    decompose_both: Flag | None
    # MISS
    init_weights: Flag | Text | None
    miss_dropout: Annotated[Number, Ge(0), Lt(1)] | None
    # OFT
    coft: Flag | None
    block_share: Flag | None
    use_cayley_neumann: Flag | None
    num_cayley_neumann_terms: Count | None
    # SHIRA
    mask_type: Text | None
    random_seed: Index | None
    # RANDLORA
    randlora_alpha: _Alpha | None
    randlora_dropout: Annotated[Number, Ge(0), Lt(1)] | None
    sparse: Flag | None
    very_sparse: Flag | None
    # VBLORA
    num_vectors: Count | None
    vector_length: Count | None
    topk: Count | None
    vblora_dropout: Annotated[Number, Ge(0), Lt(1)] | None
    init_vector_bank_bound: Number | None
    init_logits_std: Number | None
    save_only_topk_weights: Flag | None
    # VERA
    vera_dropout: Annotated[Number, Ge(0), Lt(1)] | None
    d_initial: Number | None
    projection_prng_key: Index | None
    save_projection: Flag | None
    # PREFIX_TUNING
    num_virtual_tokens: Count | None
    num_layers: Count | None
    num_attention_heads: Count | None
    num_transformer_submodules: Count | None
    token_dim: Count | None
    prefix_projection: Flag | None
    # PROMPT_TUNING
    prompt_tuning_init: Text | None


class Base(TypedDict):
    """A fingerprint, see `jaxpeft.peft.fingerprint`."""

    sizes: dict[Text, Any]
    samples: dict[Text, Text]


class Own(TypedDict, total=False):
    """jaxpeft.json."""

    format: Any  # compared before the rest is used
    sha256: Text
    method: documents.Specs
    base: Base
    labels: list[Text]
    rope_scaling: Text | None
    spec: Index
    ranks: dict[Text, Annotated[Count, Le(2**20)]]
    extra: dict[Text, dict[Text, Any]]


def adapter_config(folder: Path) -> AdapterConfig:
    """The adapter_config.json in a folder.

    Raises:
      InputError: if there is none, or for a field that is not what it should be.
    """
    missing, inside = f"{folder}: has no {CONFIG}; is it an adapter?", folder / "adapter"
    if (inside / CONFIG).is_file():  # a run's folder
        missing = f"{folder}: has no {CONFIG}; give {inside}"
    return documents.read_json(folder / CONFIG, missing, AdapterConfig)


def own_document(folder: Path) -> Own | None:
    """The jaxpeft.json in a folder, if there is one, whichever tensors it speaks of.

    Raises:
      InputError: for a field that is not what it should be.
    """
    file = folder / OWN
    return documents.read_json(file, "", Own) if file.is_file() else None
