"""A model, a tokenizer and data so small that whole runs take seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import tokenizers
import transformers

import jaxpeft as jp
from jaxpeft import hf
from jaxpeft.cli.train import Train
from jaxpeft.models import decoder

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz .?=+0123456"


def make_files(folder: Path) -> Path:
    """FOLDER/model (a random Llama and a tokenizer of letters), FOLDER/train.jsonl, FOLDER/eval.jsonl."""
    import jax.numpy as jnp

    model = decoder.decoder(decoder.DecoderConfig.from_hf(CONFIG, jnp.float32))
    hf.save_pretrained(folder / "model", CONFIG, model.init(jax.random.key(0), {}))
    vocabulary = {token: i for i, token in enumerate(("<s>", "</s>", *LETTERS))}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    for name, start, count in (("train", 0, 60), ("eval", 60, 12)):
        rows = [
            {"prompt": f"{i % 7}+{i % 5}=", "completion": "ab " * (i % 4) + str(i % 6)}
            for i in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(files: Path, out: Path, **changes) -> Train:
    """The arguments of a short run."""
    settings = {
        "model": str(files / "model"),
        "data": str(files / "train.jsonl"),
        "eval_data": str(files / "eval.jsonl"),
        "out": out,
        "method": "lora",
        "rank": 2,
        "steps": 6,
        "batch_size": 4,
        "seq_len": 16,
        "lr": 1e-2,
        "warmup": 2,
        "weight_decay": 0.0,
        "dtype": "float32",
        "eval_every": 3,
        "checkpoint_every": 2,
        "samples": 2,
    }
    return Train(**{**settings, **changes})


def flags(args: Train) -> list[str]:
    """The command line of the arguments."""
    words = []
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if value == getattr(Train(), name):
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def command(args: Train, cache: Path | None = None) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of a train process; `cache` keeps what XLA compiles, for other processes."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return [sys.executable, "-m", "jaxpeft", "train", *flags(args)], environment


def run(args: Train, cache: Path | None = None, **options) -> subprocess.CompletedProcess[str]:
    """A whole train process."""
    argv, environment = command(args, cache)
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, **options)


def assert_continues(folder: Path, **fields) -> dict:
    """The report of a run of full fine-tuning; one that ends after two steps and goes on leaves the same bytes."""
    whole = jp.run(**fields, out=folder / "whole")
    jp.run(**{**fields, "steps": 2}, out=folder / "parts")
    parts = jp.run(**fields, out=folder / "parts", resume=True)
    assert (parts["resumed_from"], parts["train_loss"]) == (2, whole["train_loss"])
    left = sorted((folder / "whole" / "model").glob("*.safetensors"))
    assert left
    for path in left:
        assert path.read_bytes() == (folder / "parts" / "model" / path.name).read_bytes()
    return whole
