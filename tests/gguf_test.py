"""GGUF files, made here with the `gguf` package: read as PyTorch's transformers does, refused in one line, written."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

import jaxpeft as jp
from jaxpeft import assets, hf, models, tree
from jaxpeft.cli import merge
from jaxpeft.gguf import architecture, container, tokenizer, write
from jaxpeft.models import geometries
from jaxpeft.train.base import load
from tests import runs
from tests.peft import reference

WORDS = "a the cat sat on mat 12 and it's 2024, dog! naïve café über 日本\n\n  if x:\n\treturn y"
SIZES = {"heads": 4, "kv": 2, "head_dim": 8, "hidden": 32, "inner": 64, "layers": 2, "vocab": 300}


def byte_level(cut):
    """A transformers tokenizer of 300 tokens, learnt on a few words that are cut as `cut` does."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=cut.whole))
    made.pre_tokenizer, made.decoder = cut.pre_tokenizer(), tokenizers.decoders.ByteLevel()
    if cut.nfc:
        made.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZES["vocab"],
        special_tokens=["<|end|>", "<|user|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([WORDS] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
    )


def interleaved(rows, heads):
    """Rows of a head as the pairs that llama.cpp's llama rotates."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + j * half + i for h in range(heads) for i in range(half) for j in range(2)]
    return rows[np.array(order)]


def make(file, arch="llama", kinds="F32", tied=True, seed=0, fields=None, extra=()):
    """Writes a random model; the tensors' types take turns. Returns {Hugging Face's name: array} as dequantized."""
    s, rng = SIZES, np.random.default_rng(seed)
    q, kv = s["heads"] * s["head_dim"], s["kv"] * s["head_dim"]
    layer = {
        "attn_norm.weight": ("input_layernorm.weight", (s["hidden"],)),
        "attn_q.weight": ("self_attn.q_proj.weight", (q, s["hidden"])),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv, s["hidden"])),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv, s["hidden"])),
        "attn_output.weight": ("self_attn.o_proj.weight", (s["hidden"], q)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (s["hidden"],)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (s["inner"], s["hidden"])),
        "ffn_up.weight": ("mlp.up_proj.weight", (s["inner"], s["hidden"])),
        "ffn_down.weight": ("mlp.down_proj.weight", (s["hidden"], s["inner"])),
    }
    if arch == "qwen2":
        layer |= {f"attn_{x}.bias": (f"self_attn.{x}_proj.bias", (q if x == "q" else kv,)) for x in "qkv"}
    if arch == "qwen3":
        layer |= {f"attn_{x}_norm.weight": (f"self_attn.{x}_norm.weight", (s["head_dim"],)) for x in "qk"}
    names = {"token_embd.weight": ("model.embed_tokens.weight", (s["vocab"], s["hidden"]))}
    names |= {
        f"blk.{i}.{there}": (f"model.layers.{i}.{here}", shape)
        for i in range(s["layers"])
        for there, (here, shape) in layer.items()
    }
    names |= {"output_norm.weight": ("model.norm.weight", (s["hidden"],))}
    names |= {} if tied else {"output.weight": ("lm_head.weight", (s["vocab"], s["hidden"]))}
    writer = gguf.GGUFWriter(file, arch)
    own = tokenizer.fields_of_tokenizer("", byte_level(tokenizer.CUTS["smollm"]), s["vocab"])
    numbers = {
        "context_length": 128,
        "embedding_length": s["hidden"],
        "block_count": s["layers"],
        "feed_forward_length": s["inner"],
        "attention.head_count": s["heads"],
        "attention.head_count_kv": s["kv"],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    everything = {**own, "general.name": "tiny", **{f"{arch}.{key}": x for key, x in numbers.items()}, **(fields or {})}
    for key, value in everything.items():
        writer.add_key_value(key, value, *write._types(value))
    made = {}
    for i, (there, (here, shape)) in enumerate(names.items()):
        rows = rng.normal(size=shape).astype(np.float32) * (0.3 if len(shape) > 1 else 1)
        kind = gguf.GGMLQuantizationType[kinds.split()[i % len(kinds.split())] if len(shape) > 1 else "F32"]
        made[here] = gguf.dequantize(gguf.quantize(rows, kind), kind)
        heads = {"attn_q": s["heads"], "attn_k": s["kv"]}.get(there.split(".")[-2], 0) if arch == "llama" else 0
        stored = gguf.quantize(interleaved(rows, heads) if heads else rows, kind)
        writer.add_tensor(there, stored, raw_dtype=kind)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def logits(path, ids):
    model, params = jp.load_pretrained(path, jnp.float32)
    return np.asarray(jax.jit(model.apply)(params, {"tokens": ids}))


IDS = np.arange(3, 15, dtype=np.int32)[None]


@pytest.mark.parametrize(
    "arch, kinds, tied",
    [("llama", "Q8_0 Q4_0 F16 Q4_1 BF16", True), ("qwen2", "Q5_0 Q5_1", False), ("qwen3", "F32", True)],
)
def test_logits_are_those_of_transformers(tmp_path, arch, kinds, tied):
    tensors = make(tmp_path / "m.gguf", arch, kinds, tied, fields={f"{arch}.attention.key_length": 8})
    flat = tree.flatten(jp.load_pretrained(tmp_path / "m.gguf", jnp.float32)[1])
    for name in ("q_proj", "k_proj", "o_proj"):
        there = np.stack([tensors[f"model.layers.{i}.self_attn.{name}.weight"].T for i in range(2)])
        np.testing.assert_array_equal(flat[f"layers/self_attn/{name}/kernel"], there)
    # It takes Qwen3's heads to have 128 rows, whatever the file says.
    own = {"config": transformers.Qwen3Config(**hf.load_config(tmp_path / "m.gguf"))} if arch == "qwen3" else {}
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **own)
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "m.gguf", IDS), expected, atol=2e-5)


@pytest.mark.slow
def test_smollm2_is_what_transformers_makes_of_it():
    file, text = assets.smollm2(), "The capital of France is 1234.\n\ndef f(x):\n    return x + 1  # 日本"
    ours = hf.load_tokenizer(file)
    tokenized = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = np.array([ours(text).input_ids], np.int32)
    assert ids[0].tolist() == tokenized(text).input_ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(file, ids), expected, atol=1e-3)


@pytest.mark.parametrize("kind", "F32 F16 BF16 F64 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_XS".split())
def test_every_kind_is_dequantized_as_gguf_does(tmp_path, kind):
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    stored = np.random.default_rng(0).integers(0, 60, (3, 512 // block * size)).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("first", np.ones(5, np.float32))
    writer.add_tensor("second", stored, raw_dtype=type_)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = container.read_header(tmp_path / "t.gguf").tensors["second"]
    expected = stored.view(np.float64) if kind == "F64" else gguf.dequantize(stored, type_)
    assert found.kind == kind and found.shape == expected.shape == (3, 512)
    np.testing.assert_array_equal(found.read(), expected)


def test_a_method_packs_while_the_file_is_read(tmp_path):
    tensors = make(tmp_path / "m.gguf", kinds="Q4_0")
    _, params = jp.load_pretrained(tmp_path / "m.gguf", jnp.float32)
    hf.save_pretrained(tmp_path / "folder", tmp_path / "m.gguf", params)
    method = jp.chain(jp.quantize(format="int8"), jp.lora(rank=2))
    _, packed, digest = load(str(tmp_path / "m.gguf"), "float32", method)
    _, expected, same = load(str(tmp_path / "folder"), "float32", method)
    assert digest == same and len(tensors) == 20
    jax.tree.map(np.testing.assert_array_equal, packed, expected)


# Tokenizers.

TEXTS = [
    "Hello world, it's 12345 o'clock",
    "  spaces \t and\n\n\nlines ",
    "naïve cafe\u0301 日本語 🐍 ½",
    "a<|user|>b<|end|>",
    "def f(x):\n    return x**2  # c",
    "DON'T iPhone we'LL",
    "",
]


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_a_tokenizer_is_the_same_from_its_fields(name):
    original = byte_level(tokenizer.CUTS[name])
    fields = tokenizer.fields_of_tokenizer("here", original, 310)
    assert fields["tokenizer.ggml.pre"] == name and len(fields["tokenizer.ggml.tokens"]) == 310
    read = tokenizer.tokenizer_of("here", fields)
    for text in TEXTS:
        assert read(text).input_ids == original(text).input_ids
        assert read.decode(original(text).input_ids) == original.decode(original(text).input_ids)
    assert (read.eos_token, read.pad_token, read.chat_template) == ("<|end|>", "<pad>", original.chat_template)
    assert read("x")[0].offsets[0] == (0, 1)


def test_sentencepiece_follows_from_the_scores():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "▁a▁"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    read = tokenizer.tokenizer_of("here", fields)
    assert read.tokenize("ab") == ["▁ab"] and read.tokenize("a  é") == ["▁a▁", "▁", "<0xC3>", "<0xA9>"]
    assert read("ab").input_ids == [1, pieces.index("▁ab")]  # a text begins with BOS
    assert read.decode(read("ab a").input_ids, skip_special_tokens=True) == "ab a"
    again = tokenizer.tokenizer_of("here", tokenizer.fields_of_tokenizer("here", read, len(pieces)))
    for text in ("ab ab", "a  é", "bab</s>a"):
        assert again(text).input_ids == read(text).input_ids


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "checkpoints/stories260K"])
def test_real_tokenizers_come_back(shared_data, name):
    if name == "tokenizers/gpt2":
        files = (str(shared_data / name / file) for file in ("vocab.json", "merges.txt"))
        made = tokenizers.ByteLevelBPETokenizer(*files)._tokenizer
        original = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    else:
        original = transformers.AutoTokenizer.from_pretrained(shared_data / name)
    read = tokenizer.tokenizer_of("here", tokenizer.fields_of_tokenizer("here", original, len(original)))
    for text in TEXTS:
        assert read(text).input_ids == original(text).input_ids


# What a header says.


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        {"model_type": "mistral", "sliding_window": 64, "head_dim": 16},
        {
            "head_dim": 64,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ],
)
def test_a_configuration_comes_back(tmp_path, fields):
    config = runs.CONFIG | {"rope_theta": 10000.0, "rms_norm_eps": 1e-6} | fields
    own = models.family(config).from_hf(config).config
    header = architecture.fields_of(config, own)
    tensors = {"token_embd.weight": np.zeros((own.vocab_size, own.hidden_size), np.float32)}
    tensors |= {f"blk.{i}.attn_norm.weight": np.zeros(own.hidden_size, np.float32) for i in range(2)}
    if (divisors := architecture.rope_freqs(own)) is not None:
        tensors[architecture.ROPE_FREQS] = divisors
    write._write(
        tmp_path / "m.gguf",
        {**header, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1},
        [write.Outgoing(name, "F32", x.shape, lambda x=x: x) for name, x in tensors.items()],
    )
    back = geometries.load(tmp_path / "m.gguf")
    assert models.family(back).from_hf(back).config == own


def test_a_rotation_that_llama_cpp_does_not_know_is_one_line():
    config = runs.CONFIG | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(jp.InputError, match="'dynamic' has no GGUF form"):
        architecture.fields_of(config, models.family(config).from_hf(config).config)


# Mistakes.


def damaged(tmp_path, change):
    make(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    (tmp_path / "m.gguf").write_bytes(change(data))
    return tmp_path / "m.gguf"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"", "empty"),
        (lambda data: b"PK\x03\x04" + data[4:], "does not begin with GGUF"),
        (lambda data: data[:4] + b"\x09" + data[5:], "GGUF version 9"),
        (lambda data: data[:4] + b"\0\0\0\x03" + data[8:], "big-endian"),
        (lambda data: data[:-100], "truncated or damaged.*ends at byte"),
        (lambda data: data[:3000], "truncated or damaged"),
        (lambda data: data.replace(b"llama", b"lambda"[:5]), "architecture 'lambd' is not supported"),
        (lambda data: data.replace(b"blk.1.attn_q", b"blk.1.attn_z"), r"do not fit its header.*missing.*attn_z"),
        (lambda data: data.replace(b"general.name", b"general.type"), "general.type is 'tiny'"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_xxxxx"), "block_count is missing"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, change, message):
    with pytest.raises(jp.InputError, match=message) as raised:
        jp.load_pretrained(damaged(tmp_path, change), jnp.float32)
    assert "\n" not in str(raised.value) and "m.gguf" in str(raised.value)


def test_whatever_byte_is_wrong_there_is_no_traceback(tmp_path):
    file = damaged(tmp_path, bytes)
    data = file.read_bytes()
    end = data.index(b"output_norm.weight") + 60
    rng = np.random.default_rng(0)
    for at in rng.integers(0, end, 150):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ (1 << rng.integers(8))]) + data[at + 1 :]):
            file.write_bytes(changed)
            try:
                header = container.read_header(file)
                architecture.config_of(header)
                tokenizer.tokenizer_of(file, header.fields)
            except jp.InputError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokenizer.ggml.pre": "jina-v9"}, "tokenizer.ggml.pre 'jina-v9' is not known"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"tokenizer.ggml.eos_token_id": 400}, "do not fit the 300 tokens"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_one_line(tmp_path, fields, message):
    make(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(jp.InputError, match=message):
        hf.load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"llama.expert_count": 8}, "expert_count 8"),
        ({"llama.expert_count": "8"}, "expert_count is '8'; should be of type int"),
        ({"llama.block_count": 10**9}, "block_count is 1000000000, of 20 tensors"),
        ({"llama.rope.dimension_count": 4}, "should be the same"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.attention.head_count_kv": [1, 2]}, "differs between layers"),
    ],
)
def test_what_is_not_supported_is_one_line(tmp_path, fields, message):
    make(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(jp.InputError, match=message):
        hf.load_config(tmp_path / "m.gguf")


def test_a_folder_of_gguf_files_says_to_name_one(tmp_path):
    make(tmp_path / "m.gguf")
    with pytest.raises(jp.InputError, match=r"give the GGUF file itself \(m.gguf\)"):
        hf.load_config(tmp_path)


# Out.


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(GGUF base, adapter): a LoRA whose modules differ in rank and alpha."""
    folder = tmp_path_factory.mktemp("gguf")
    make(folder / "base.gguf", kinds="Q8_0")
    base, params = jp.load_pretrained(folder / "base.gguf", jnp.float32)
    patterns = {"rank_pattern": {"layers/mlp/up_proj": 4}, "alpha_pattern": {"layers/self_attn/k_proj": 16}}
    method = jp.lora(rank=2, alpha=6, targets="all-linear", **patterns)
    _, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    params = tree.combine(reference.randomise(trainable), frozen)
    return folder / "base.gguf", jp.export_adapter(folder / "adapter", params, method, base.config)


def test_a_merged_model_is_written_as_gguf(adapted, tmp_path):
    base, adapter = adapted
    for out, kind in (("m.gguf", None), ("f16.gguf", "float16"), ("q8.gguf", "q8_0"), ("folder", None)):
        args = merge.Merge(adapter=adapter, out=tmp_path / out, model=str(base), gguf_type=kind)
        assert merge.run(args)["dtype"] == (kind or "float32")
    params = {name: jp.load_pretrained(tmp_path / name, jnp.float32)[1] for name in ("folder", "m.gguf", "f16.gguf")}
    kernel = lambda params: params["layers"]["self_attn"]["k_proj"]["kernel"]
    before = kernel(jp.load_pretrained(base, jnp.float32)[1])
    assert np.abs(kernel(params["folder"]) - before).max() > 0.01  # it has learnt something
    jax.tree.map(np.testing.assert_array_equal, params["m.gguf"], params["folder"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), params["f16.gguf"], params["folder"]
    )
    assert hf.load_config(tmp_path / "f16.gguf")["torch_dtype"] == "float16"
    assert container.read_header(tmp_path / "q8.gguf").tensors["blk.0.attn_q.weight"].kind == "Q8_0"
    for path in ("m.gguf", "folder"):
        for text in TEXTS:
            assert hf.load_tokenizer(tmp_path / path)(text).input_ids == hf.load_tokenizer(base)(text).input_ids
    for name, value in hf.load_config(base).items():
        assert hf.load_config(tmp_path / "m.gguf")[name] == value


def test_an_adapter_is_written_as_llama_cpp_reads_it(adapted, tmp_path):
    """Added to the file's own tensors by llama.cpp's rule, W + alpha / rank B A, it is the merged model."""
    base, adapter = adapted
    write.save_adapter(tmp_path / "lora.gguf", adapter, jp.load_pretrained(base)[0].config)
    read = gguf.GGUFReader(tmp_path / "lora.gguf")
    field = lambda name: read.fields[name].contents()
    assert [field(f"general.{x}") for x in ("architecture", "type")] == ["llama", "adapter"]
    assert field("adapter.type") == "lora"
    found = {tensor.name: tensor.data for tensor in read.tensors}
    args = merge.Merge(adapter=adapter, out=tmp_path / "merged.gguf", model=str(base))
    merge.run(args)
    before, after = (container.read_header(file).tensors for file in (base, tmp_path / "merged.gguf"))
    changed = {name for name in after if not np.array_equal(before[name].read(), after[name].read())}
    assert {f"{name}.lora_{x}" for name in changed for x in "ab"} == found.keys() and len(changed) == 14
    for name in changed:
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        summed = before[name].read() + field("adapter.lora.alpha") / a.shape[0] * b @ a
        np.testing.assert_allclose(summed, after[name].read(), atol=1e-6)
