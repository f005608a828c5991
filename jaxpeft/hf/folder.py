"""A checkpoint's folder but for its weights: where it is, its configuration, its tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from jaxpeft import documents, files, gguf, models, template, tokenizing
from jaxpeft.errors import InputError, first_line, in_one_line

WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
COPIED = (*TOKENIZER_FILES, GENERATION, template.FILE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


_Texts = dict[documents.Text, documents.Text]
_Token = documents.Text | dict[documents.Text, Any] | None


class _TokenizerConfig(TypedDict, total=False):
    """tokenizer_config.json, as far as transformers takes it as it is."""

    tokenizer_class: documents.Text | None
    model_max_length: documents.Number | None
    padding_side: Literal["left", "right"] | None
    truncation_side: Literal["left", "right"] | None
    add_bos_token: documents.Flag | None
    add_eos_token: documents.Flag | None
    add_prefix_space: documents.Flag | None
    clean_up_tokenization_spaces: documents.Flag | None
    bos_token: _Token
    eos_token: _Token
    unk_token: _Token
    pad_token: _Token
    added_tokens_decoder: dict[documents.Text, dict[documents.Text, Any]] | None
    additional_special_tokens: list[documents.Text | dict[documents.Text, Any]] | None
    chat_template: (
        documents.Text | list[dict[documents.Text, documents.Text]] | dict[documents.Text, documents.Text] | None
    )


def resolve(path_or_hub_id: str | os.PathLike[str], patterns: Sequence[str] = ()) -> Path:
    """The local folder of a checkpoint, or its GGUF file; a hub id is downloaded first: `patterns`, configuration and
    tokenizer.

    What looks like a path is never sent to the hub: an id is `owner/name`, where no folder `owner` lies here.

    Raises:
      InputError: if there is no such folder, or the hub cannot be reached or has no such repository.
    """
    given = os.fspath(path_or_hub_id)
    folder = files.expanded(given)
    if given and (folder.is_dir() or gguf.is_gguf(folder)):
        return folder
    if given and folder.exists():
        raise InputError(
            f"{given}: is a file; a checkpoint is a directory with config.json and {WEIGHTS}, or a GGUF file"
        )
    if not _HUB_ID.fullmatch(given) or Path(given).parts[0] in (".", "..") or folder.parent.is_dir():
        what = "file" if folder.suffix == gguf.SUFFIX else "directory"
        raise InputError(f"{given or repr(given)}: no such {what} (and not a hub id, which reads owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(given, allow_patterns=["config.json", *COPIED, *patterns]))
    except Exception as error:  # whatever the hub's client and its transport raise, one line serves the user
        raise InputError(
            f"{given}: no such directory, and it could not be fetched from the hub: {first_line(error)}"
        ) from error


def load_config(path_or_hub_id: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed config.json of a checkpoint; what it would be of a GGUF file.

    Raises:
      InputError: for no such checkpoint, no config.json, or one that is not a JSON object.
    """
    folder = resolve(path_or_hub_id)
    if folder.is_file():
        return gguf.config_of(gguf.read_header(folder))
    others = sorted(file.name for file in folder.glob(f"*{gguf.SUFFIX}"))
    why = f"give the GGUF file itself ({others[0]})" if others else "is it a model checkpoint?"
    return documents.read_json(folder / "config.json", missing=f"{folder}: has no config.json; {why}")


def load_generation_config(path_or_hub_id: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed generation_config.json of a checkpoint, {} where it has none.

    Raises:
      InputError: for no such checkpoint, or a file that is not a JSON object.
    """
    file = resolve(path_or_hub_id) / GENERATION
    return documents.read_json(file, missing=f"{file}: no such file") if file.is_file() else {}


def load_tokenizer(path_or_hub_id: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint, a transformers `PreTrainedTokenizerBase`. No code of the checkpoint is run.

    Raises:
      InputError: for no such checkpoint, or one whose tokenizer is missing or not readable.
    """
    folder = resolve(path_or_hub_id)
    if folder.is_file():
        from jaxpeft.gguf.tokenizer import tokenizer_of

        return tokenizer_of(folder, gguf.read_header(folder).fields)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(f"{folder}: has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt)")
    config: Mapping[str, Any] = {}
    if (folder / "config.json").is_file():  # which transformers reads too, and says less of what is wrong in it
        config = load_config(folder)
        models.family(config).from_hf(config)
    if (file := folder / "tokenizer_config.json").is_file():
        documents.read_json(file, f"{file}: no such file", _TokenizerConfig)
    if (file := folder / "tokenizer.json").is_file():  # before its rules are applied to the added tokens
        tokenizing.check_rules(file, documents.read_json(file, f"{file}: no such file"))
    import transformers

    how: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if config.get("hidden_size", 0) % config.get("num_attention_heads", 1):  # which transformers refuses in any model
        how["config"] = transformers.PretrainedConfig()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
        ids = tokenizing.tokenize(tokenizer, ["a"])["input_ids"]  # damage may show in the use alone
        tokenizer.decode(ids[0], skip_special_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception for a damaged file, and panics at some
        if "trust_remote_code" in str(error):
            raise InputError(f"{folder}: the tokenizer needs Python code of its own, which is never run") from None
        raise InputError(f"{folder}: the tokenizer cannot be read: {in_one_line(error)}") from error
    tokenizing.check_rules(folder, tokenizing.rules_of(tokenizer))
    return tokenizer
