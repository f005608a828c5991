"""Every field of a config.json, missing or of another type: it is read as transformers means it, or one line."""

import pytest

from jaxpeft import models
from jaxpeft.errors import InputError
from jaxpeft.models import geometries
from jaxpeft.models.labels import names
from tests import tiny

ROPE = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "truncate": True, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GOOD = {
    "llama": {**tiny.CONFIG, "hidden_act": "silu", "rope_parameters": {**ROPE, "rope_theta": 1e4}, "mlp_bias": False},
    "llama3": {**tiny.CONFIG, "rope_theta": 5e5, "rope_scaling": LLAMA3, "eos_token_id": [1, 2], "bos_token_id": 0},
    "qwen2": {
        **tiny.CONFIG,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "architectures": ["Qwen2ForSequenceClassification"],
        "id2label": {"0": "a", "1": "b"},
        "num_labels": 2,
    },
    "mistral": {**geometries.GEOMETRIES["mistral-7b"], "head_dim": 128, "attention_bias": None},
    **{name: geometries.GEOMETRIES[name] for name in ("bert-base", "roberta-base", "opt-1.3b", "vit-b-16")},
}
ODD = ("x", "", -1, 0, 1, 2.5, True, [], {}, [None], [["x"]], {"rope_type": ["yarn"]}, {"factor": "4"}, None)
MISSING = object()


def changed(raw, path, value):
    """The configuration with another value at a path of keys; MISSING: without one."""
    key, *rest = path
    if rest:
        return {**raw, key: changed(raw[key], rest, value)}
    return {name: x for name, x in {**raw, key: value}.items() if x is not MISSING}


@pytest.mark.parametrize("name", GOOD)
def test_each_field_is_read_or_refused_in_one_line(name):
    raw = GOOD[name]
    models.family(raw).from_hf(raw)
    inside = [(key, inner) for key in ("rope_parameters", "rope_scaling") for inner in raw.get(key) or ()]
    for path in [
        *((key,) for key in raw),
        *inside,
        ("quantization_config",),
        ("dtype",),
        ("pad_token_id",),
        ("rope_scaling",),
    ]:
        for value in (*ODD, MISSING):
            config = changed(raw, path, value)
            try:
                models.family(config).from_hf(config)
                names(config)
                models.compute_dtype(config, None, "cuda")
            except InputError as error:
                assert "\n" not in str(error) and str(error).startswith("config.json: "), (path, value, error)


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("llama", ("rms_norm_eps",), "1e-5", 'rms_norm_eps "1e-5" should be a number'),
        (
            "llama",
            ("rope_parameters", "factor"),
            MISSING,
            "the field 'factor' is missing .in rope_parameters, of .*yarn",
        ),
        ("llama3", ("rope_scaling", "low_freq_factor"), MISSING, "the field 'low_freq_factor' is missing"),
        ("llama3", ("rope_scaling", "factor"), "8", 'factor "8" should be a number .in rope_scaling'),
        ("llama3", ("rope_scaling",), "linear", 'rope_scaling "linear" should be an object'),
        (
            "llama3",
            ("rope_scaling", "rope_type"),
            "longrope",
            "'longrope' is not supported; supported: default, linear",
        ),
        ("llama3", ("rope_theta",), -1, "rope_theta -1 should be above 0"),
        ("llama3", ("eos_token_id",), "</s>", 'eos_token_id "</s>" should be a whole number or a list'),
        ("llama3", ("tie_word_embeddings",), "false", 'tie_word_embeddings "false" should be true or false'),
        ("qwen2", ("layer_types",), ["full_attention"], "layer_types names 1 layers, num_hidden_layers 3"),
        ("qwen2", ("architectures",), "Qwen2ForCausalLM", 'architectures "Qwen2ForCausalLM" should be a list'),
        ("bert-base", ("layer_norm_eps",), [], r"layer_norm_eps \[\] should be a number"),
        ("opt-1.3b", ("ffn_dim",), MISSING, "the field 'ffn_dim' is missing"),
        ("vit-b-16", ("id2label",), ["cat"], "id2label .* should be an object"),
        (
            "llama",
            ("quantization_config",),
            {"quant_method": "fp8"},
            "weights are quantized .*fp8.*only gptq and awq",
        ),
        ("llama", ("compression_config",), {"quant_method": "gptq"}, "the weights are quantized"),
        ("llama", ("quantization_config",), {"quant_method": "gptq", "bits": 5}, "bits 5 should be one of 2, 3, 4, 8"),
        ("llama", ("quantization_config",), {"quant_method": "awq", "bits": 8}, "bits 8 should be one of 4"),
        (
            "llama",
            ("quantization_config",),
            {"quant_method": "gptq", "group_size": "4"},
            'quantization_config.group_size "4" should be a whole number',
        ),
        (
            "llama",
            ("quantization_config",),
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' should be one of gptq, gptq_v2",
        ),
        (
            "llama",
            ("quantization_config",),
            {"quant_method": "awq", "version": "gemv"},
            "version 'gemv' should be",
        ),
        ("llama", ("quantization_config",), {"quant_method": "awq", "zero_point": False}, "zero_point False should be"),
        ("llama", ("quantization_config",), {"quant_method": "gptq", "dynamic": {"a": {}}}, "dynamic .* left out"),
        (
            "llama",
            ("quantization_config",),
            {"quant_method": "gptq", "group_size": 0},
            "group_size 0 should be",
        ),
        ("llama", ("quantization_config",), {"quant_method": "gptq", "group_size": "a"}, 'group_size "a" should be'),
        ("bert-base", ("quantization_config",), {"load_in_4bit": True}, "the weights are quantized"),
        ("llama", ("model_type",), ["llama"], "unsupported model_type"),
        ("llama", ("head_dim",), 7, "head_dim 7 is odd"),
    ],
)
def test_what_is_wrong_is_said(name, path, value, said):
    config = changed(GOOD[name], path, value)
    with pytest.raises(InputError, match=said):
        models.family(config).from_hf(config)


@pytest.mark.parametrize(
    ("config", "given", "platform", "expected"),
    [
        ({"dtype": "bfloat16"}, None, "cpu", "float32"),
        ({"torch_dtype": "float16"}, None, "cpu", "float32"),
        ({}, None, "cpu", "float32"),
        ({"dtype": "bfloat16"}, None, None, "float32"),  # the tests run on a CPU
        ({"dtype": "bfloat16"}, "bfloat16", "cpu", "bfloat16"),
        ({"dtype": "bfloat16"}, None, "cuda", "bfloat16"),
        ({"torch_dtype": "float32"}, None, "tpu", "float32"),
        ({"dtype": "torch.float32", "torch_dtype": "bfloat16"}, None, "tpu", "float32"),
        ({"torch_dtype": "float16"}, None, "cuda", "bfloat16"),
        ({"dtype": None}, None, "cuda", "bfloat16"),
        ({"dtype": "bfloat16"}, "float32", "cuda", "float32"),
    ],
)
def test_what_a_model_computes_in(config, given, platform, expected):
    assert models.compute_dtype(config, given, platform) == expected


def test_null_is_what_goes_without_saying():
    raw = GOOD["llama"]
    for name in (
        "quantization_config",
        "hidden_act",
        "rms_norm_eps",
        "attention_bias",
        "rope_scaling",
        "architectures",
    ):
        assert models.family(raw).from_hf({**raw, name: None}).config.hidden_size == 32
