"""A tokenizer from a header's fields and back. Needs `tokenizers` and transformers, no torch.

Two kinds, by tokenizer.ggml.model:

    gpt2    BPE on bytes; tokenizer.ggml.pre names how text is cut before, as the vocabulary's merges were learnt
    llama   SentencePiece's BPE: a space is ▁, one is put before a text, unknown characters fall back to bytes. Merges
            follow from the scores: of two pieces of the vocabulary that join to a third, the best third first

tokenizer.ggml.token_type: control tokens are special, user-defined ones are found before a text is cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxpeft.errors import InputError, in_one_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "\u2581"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


class Cut(NamedTuple):
    """How a byte-level tokenizer cuts text before its merges.

    regex: of the pieces; None: GPT-2's.
    digits: each digit is cut off first.
    nfc: text is brought into Unicode's normal form C first.
    whole: a piece that is in the vocabulary is taken as it is, without merges.
    bos: a text begins with BOS where the header does not say.
    """

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> Any:
        """For `tokenizers`."""
        first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.regex is not None:
            first.append(pre_tokenizers.Split(Regex(self.regex), "isolated"))
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.regex is None)
        return pre_tokenizers.Sequence([*first, last]) if first else last


GPT2 = Cut()
CUTS = {
    "gpt-2": GPT2,
    "smollm": Cut(digits=True),
    "llama-bpe": Cut(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole=True, bos=True),
    "smaug-bpe": Cut(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": Cut(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True),
    "tekken": Cut(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        whole=True,
        bos=True,
    ),
}
_ALIASES = {
    "gpt-2": "gpt2 phi-2 mpt olmo jais trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "smaug-bpe": "dbrx",
    "qwen2": "deepseek-r1-qwen stablelm2 megrez hunyuan",
}
CUTS |= {alias: CUTS[name] for name, aliases in _ALIASES.items() for alias in aliases.split()}


# In.


def tokenizer_of(where: Any, fields: Mapping[str, Any]) -> Any:
    """The tokenizer of a header, a transformers `PreTrainedTokenizerFast` with the chat template if there is one.

    Args:
      where: the file, for messages.
      fields: of the header.

    Raises:
      InputError: for a header without a tokenizer, or one of a kind that is not known here.
    """
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"{where}: has no tokenizer (tokenizer.ggml.tokens)")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{where}: tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    try:
        return _tokenizer(where, fields, kind, tokens)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for merges that do not fit the vocabulary
        raise InputError(f"{where}: the tokenizer's fields cannot be used: {in_one_line(error)}") from error


def _tokenizer(where: Any, fields: Mapping[str, Any], kind: str, tokens: Sequence[str]) -> Any:
    import transformers

    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    keys = {name: f"tokenizer.ggml.{field}_token_id" for name, field in _SPECIAL.items()}
    ids = {name: fields[key] for name, key in keys.items() if key in fields}
    if kind == "llama":
        ids.setdefault("unk_token", types.index(UNKNOWN) if UNKNOWN in types else 0)
    if len(types) != len(tokens) or any(i >= len(tokens) for i in ids.values()):
        raise InputError(f"{where}: token types or special tokens do not fit the {len(tokens)} tokens")
    special = {name: tokens[i] for name, i in ids.items()}
    if kind == "gpt2":
        made, bos = _byte_level(where, fields, tokens)
    else:
        made, bos = _sentencepiece(fields, tokens, special["unk_token"]), True
    pairs = list(zip(tokens, types, strict=True))
    made.add_special_tokens([AddedToken(x, normalized=False, special=True) for x, t in pairs if t == CONTROL])
    made.add_tokens([AddedToken(x, normalized=False, special=False) for x, t in pairs if t == USER_DEFINED])
    ends = {
        "bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", bos)),
        "eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
    }
    made.post_processor = _ends({name: on and name in special for name, on in ends.items()}, special, ids, kind)
    template = fields.get("tokenizer.chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **special,
        **({"chat_template": template} if template else {}),
        clean_up_tokenization_spaces=False,
        model_max_length=fields.get(f"{fields.get('general.architecture')}.context_length", int(1e30)),
    )


def _byte_level(where: Any, fields: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Any, bool]:
    """(tokenizer, whether BOS begins a text by default)."""
    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in CUTS:
        raise InputError(
            f"{where}: tokenizer.ggml.pre {name!r} is not known here, so that text would be cut wrongly; known: "
            f"{', '.join(sorted(CUTS))}"
        )
    cut = CUTS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=cut.whole))
    if cut.nfc:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = cut.pre_tokenizer()
    made.decoder = decoders.ByteLevel()
    return made, cut.bos


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str], unknown: str) -> Any:
    scores = fields["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges_of(tokens, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces = [normalizers.Prepend(_SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that join to a token, the joined one with the highest score first."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        joined = [(vocabulary[a], vocabulary[b], a, b) for a, b in parts if a in vocabulary and b in vocabulary]
        found += [(-score, a, b) for _, _, a, b in sorted(joined)]
    return [(a, b) for _, a, b in sorted(found, key=lambda pair: pair[0])]


def _ends(on: Mapping[str, bool], special: Mapping[str, str], ids: Mapping[str, int], kind: str) -> Any:
    """The post-processor that puts BOS before a text and EOS behind it."""
    if not any(on.values()):
        return processors.ByteLevel(trim_offsets=False) if kind == "gpt2" else None
    first, last = (f"{special[name]}:0 " if on[name] else "" for name in ("bos_token", "eos_token"))
    second = "".join(x.replace(":0", ":1") for x in (first, "$B:1 ", last))
    return processors.TemplateProcessing(
        single=f"{first}$A:0 {last}".strip(),
        pair=f"{first}$A:0 {last}{second}".strip(),
        special_tokens=[(special[name], ids[name]) for name, used in on.items() if used],
    )


# Out.

# Text that every cut takes apart in another way.
_PROBE = "It's 12345 GLM-4's café\u0301\u00a0\u3000\t  x\n\n  if(a//b)/c!=_Zed:\r\n\tÄÖ日本語 don'T iPhone ½ ^^ ...  "


def fields_of_tokenizer(where: Any, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The fields of a header for a tokenizer.

    Args:
      where: the checkpoint, for messages.
      tokenizer: a fast tokenizer of transformers.
      vocab_size: rows of the model's embeddings; ids that the tokenizer lacks become unused tokens.

    Raises:
      InputError: for a tokenizer that llama.cpp has no form of.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{where}: the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json and no GGUF form")
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parsed["model"]
    if model.get("type") != "BPE":
        raise InputError(f"{where}: a tokenizer of type {model.get('type')!r} has no GGUF form here; BPE has one")
    by_id = {i: token for token, i in model["vocab"].items()}
    added = {token["id"]: token for token in parsed.get("added_tokens", [])}
    by_id |= {i: token["content"] for i, token in added.items()}
    tokens, types = [], []
    for i in range(max(vocab_size, len(by_id))):
        token = by_id.get(i, f"[PAD{i}]")
        if i in added:
            type_ = CONTROL if added[i]["special"] else USER_DEFINED
        elif i not in by_id:
            type_ = UNUSED
        else:
            type_ = BYTE if model.get("byte_fallback") and _is_byte(token) else NORMAL
        tokens.append(token)
        types.append(UNKNOWN if token == model.get("unk_token") else type_)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ids = tokenizer("x").input_ids
    fields: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }
    for name, field in _SPECIAL.items():
        if (i := getattr(tokenizer, f"{name}_id")) is not None:
            fields[f"tokenizer.ggml.{field}_token_id"] = i
    if isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        return fields | {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [-float(ranks.get(token, len(merges))) for token in tokens],
            "tokenizer.ggml.add_space_prefix": tokenizer.tokenize("x")[0].startswith(_SPACE),
        }
    return fields | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _cut_of(where, tokenizer.backend_tokenizer),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _cut_of(where: Any, tokenizer: Any) -> str:
    """The name of the cut that takes a text apart as the tokenizer does."""
    if tokenizer.pre_tokenizer is not None:
        pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(_PROBE)]
        whole = bool(getattr(tokenizer.model, "ignore_merges", False))
        alike = [
            (cut.whole != whole, name)
            for name, cut in CUTS.items()
            if [piece for piece, _ in cut.pre_tokenizer().pre_tokenize_str(_PROBE)] == pieces
        ]
        if alike:
            return min(alike, key=lambda found: found[0])[1]
    raise InputError(f"{where}: the tokenizer cuts text as none of {', '.join(CUTS)} does, so it has no GGUF form here")


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
