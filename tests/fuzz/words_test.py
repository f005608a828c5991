"""What stands on a command line or in a --config file: YAML, plans, methods, sizes, patterns, names."""

import typing

import pytest
from hypothesis import strategies as st

from jaxpeft import recipe, sites
from jaxpeft.backward import plan
from jaxpeft.cli import arguments
from jaxpeft.cli.config import config_arguments
from jaxpeft.files import from_yaml, to_yaml
from jaxpeft.memory import targets
from jaxpeft.models import geometries, rotary
from jaxpeft.train.run import Run
from tests import tiny
from tests.fuzz.damage import amounts, broken, holds

PATTERNS = (
    "q_proj",
    "(a+)+$",
    "(.*)*(.*)*(.*)*x",
    "(?:(?:(?:l?a?y?)*)*)*!",
    "a{99999999999}",
    "((((x{1000}){1000}){1000}){1000})",
    "(" * 5000,
    "(" * 500 + "x" + ")" * 500,
    "[",
    "\\",
    "(?P<n>x)(?P=n)",
    "^(?!.*up).*_proj$",
    "(?<=(x+))y",
    "x" * 100_000,
    "\0",
    "",
)


def words(*good: str) -> st.SearchStrategy[str]:
    """A text that is nearly right, or not at all."""
    nearly = (
        st.sampled_from(good).flatmap(lambda text: broken(text.encode())).map(lambda x: x.decode("utf-8", "replace"))
    )
    joined = st.lists(st.sampled_from(good), min_size=1, max_size=4).flatmap(
        lambda parts: st.sampled_from(("+", ",", "=", ":", " ", ".")).map(lambda mark: mark.join(parts))
    )
    return st.one_of(nearly, nearly, joined, st.text(max_size=40), st.sampled_from(("9" * 400, "x" * 5000, "-" * 50)))


SPELT = {
    "plan": (plan.parse, ("blocks", "matmuls", "q_proj=8", "tokens=2048,offload", "mlp=compress", "everything")),
    "method": (recipe.parse, ("lora", "meft+lora", "lst", "quantize+lora", "mezo", "ia3+lora")),
    "methods": (recipe.several, ("lora,lst", "meft+lora,dora", "full")),
    "target": (targets.target, ("h200", "v5p:4x4x4", "tpu7x", "cpu", "v4:2x2x1")),
    "size": (lambda text: arguments.parse_bytes("--budget", text), ("24GiB", "1.5 GB", "25769803776", "1e3MiB")),
    "rope": (rotary.parse, ("yarn=4", "linear=2.0", "dynamic=1e3")),
    "geometry": (geometries.load, ("llama2-7b", "qwen3-8b", "tinyllama-1.1b")),
}


@amounts
@pytest.mark.parametrize("kind", SPELT)
def test_a(kind, amount):
    read, good = SPELT[kind]
    holds(words(*good), amount, read)


@amounts
def test_options_of_a_method(amount):
    good = ("rank=4", "lora.rank=4", "targets=q_proj", "init={a: 1}", "alpha_pattern={q_proj: 2}", "dropout=.nan")
    holds(st.lists(words(*good), min_size=1, max_size=3), amount, lambda options: recipe.parse("lora", options))


@amounts
def test_a_pattern(amount):
    params = tiny.model()[1]
    patterns = st.one_of(words(*PATTERNS[:5]), st.sampled_from(PATTERNS))

    def read(pattern):
        sites.chooses(pattern, "layers/self_attn/q_proj")
        sites.first_match({pattern: 1}, "layers/self_attn/" + "a" * 30, 0)
        sites.find(params, pattern)

    holds(patterns, amount, read)


YAML = """\
model: some/folder
steps: 20
lr: 1e-4
buckets: [64, 128]
pack: no
method_options: {meft: {width: 16}, lora.rank: 4}
"""
BOMBS = (
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nsteps: [*c, *c]\n",
    "a: &a {x: 1}\nsteps: {<<: *a}\n",
    "steps: &a [*a]\n",
    "steps: " + "[" * 5000 + "]" * 5000,
    "steps: " + "{a: " * 5000 + "1" + "}" * 5000,
    "- " * 5000,
    "steps: !!python/object/apply:os.system [true]\n",
    "steps: 2026-99-99\n",
    "steps: " + "9" * 10_000 + "\n",
    "steps: 0x" + "f" * 10_000 + "\n",
    "steps: 1:99:99:99:99\n",
    "? [a, b]\n: 1\n",
    "steps: .inf\n",
    "steps: !!binary x\n",
    "steps: !!timestamp x\n",
    "steps: !!int x\n",
    "%YAML 9.9\n---\nsteps: 1\n",
    "steps: 1\n---\nsteps: 2\n",
    "\x00",
    "steps: \x1b[2J",
    "steps: \ud800",
)


@amounts
def test_a_configuration(amount, tmp_path):
    file = tmp_path / "run.yaml"
    known = typing.get_type_hints(Run)

    def read(data):
        file.write_bytes(data)
        config_arguments(file, known)

    bombs = st.sampled_from(BOMBS).map(lambda text: text.encode("utf-8", "surrogatepass"))
    holds(st.one_of(broken(YAML.encode()), bombs), amount, read)


@amounts
def test_yaml_that_is_read_is_written_and_read_again(amount):
    values = st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text(max_size=8)
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    )

    def read(value):
        assert from_yaml("text", to_yaml("value", value)) == value

    holds(values, amount, read)
