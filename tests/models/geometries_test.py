"""Built-in geometries: the number of parameters is the published one."""

import json

import pytest

from jaxpeft import models, tree
from jaxpeft.errors import InputError
from jaxpeft.models import decoder, geometries

# The totals of the checkpoints' safetensors on the hub (tied embeddings once).
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "tinyllama-1.1b": 1_100_048_384,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "vit-b-16": 86_567_656,
    "vit-l-16": 304_326_632,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    # Those of BERT hold a pooler and a head that tells whether two sentences follow each other, MiniLM's a pooler.
    "bert-base": 110_106_428 - (768 * 768 + 768) - (2 * 768 + 2),
    "bert-large": 336_226_108 - (1024 * 1024 + 1024) - (2 * 1024 + 2),
    "minilm": 22_713_216 - (384 * 384 + 384),
}
DECODERS = [name for name, raw in geometries.GEOMETRIES.items() if raw["model_type"] in decoder.MODEL_TYPES]


def configuration(name):
    raw = geometries.load(name)
    return models.family(raw).from_hf(raw).config


@pytest.mark.parametrize("name", geometries.GEOMETRIES)
def test_the_number_of_parameters_is_the_published_one(name):
    config = configuration(name)
    assert tree.size(models.FAMILIES[config.model_type].shapes(config)) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in geometries.GEOMETRIES if name not in DECODERS])
def test_transformers_makes_as_many_parameters(name):
    """Of the architecture that config.json names, but for a pooler that no head reads."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    raw = geometries.load(name)
    (architecture,) = raw["architectures"]
    read = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(read)
    count = sum(parameter.numel() for name, parameter in theirs.named_parameters() if not name.startswith("pooler."))
    assert count == PARAMETERS[name]


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_reads_each(name):
    transformers = pytest.importorskip("transformers")
    raw = geometries.load(name)
    read = transformers.AutoConfig.for_model(**raw)
    config = decoder.DecoderConfig.from_hf(raw)
    assert read.vocab_size == config.vocab_size
    assert (getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads) == config.head_dim
    assert read.max_position_embeddings == config.max_position_embeddings
    assert read.rope_parameters["rope_theta"] == config.rope_theta
    assert read.rope_parameters.get("factor", 1) == dict(config.rope_scaling).get("factor", 1)


def test_only_mistral_has_a_window():
    windows = {name: configuration(name).windows for name in DECODERS}
    assert {name for name, window in windows.items() if window} == {"mistral-7b"}
    assert windows["mistral-7b"] == (4096,) * 32


def test_a_folder_or_a_file_is_read(tmp_path):
    config = geometries.load("llama3.2-1b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert geometries.load(tmp_path) == geometries.load(str(tmp_path / "config.json")) == config


def test_what_is_loaded_can_be_changed():
    geometries.load("llama3.1-8b")["rope_scaling"]["factor"] = 1
    assert geometries.load("llama3.1-8b")["rope_scaling"]["factor"] == 8


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("llama3-8b", "llama3.1-8b"),
        ("", "tinyllama-1.1b"),
        ("meta-llama/Llama-2-7b-hf", "llama2-7b"),
    ],
)
def test_an_unknown_name_is_one_line(given, says):
    with pytest.raises(InputError) as error:
        geometries.load(given)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_config_and_a_damaged_file(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        geometries.load(tmp_path)
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="JSON object"):
        geometries.load(tmp_path / "bad.json")
