"""What the README and docs/ show holds: examples run, links lead somewhere, names and messages are the library's."""

import ast
import functools
import itertools
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp
from docs.generate import methods as pages
from docs.generate import tables
from jaxpeft import data, tree
from jaxpeft import method as contract
from jaxpeft.backward.flops import count_flops
from jaxpeft.models import FAMILIES, geometries
from jaxpeft.train.report import MEMORY, SCORES, print_report
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def examples(page):
    """The blocks of Python in a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def example(page, word):
    """The one block of Python in a page that has a word in it."""
    (code,) = [code for code in examples(page) if word in code]
    return code


def run_all(page, namespace=None):
    """What all blocks of a page leave behind, one after another."""
    namespace = {} if namespace is None else namespace
    exec(compile("\n".join(examples(page)), page, "exec"), namespace)
    return namespace


def figures(page, first):
    """The numbers in the row of a page's table whose first cell is `first`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(first)} \| (.*) \|$", text, re.MULTILINE)
    return [float(cell) for cell in row.split(" | ")]


def run(page, word, namespace=None):
    """What the block leaves behind."""
    namespace = {} if namespace is None else namespace
    exec(compile(example(page, word), page, "exec"), namespace)
    return namespace


def test_the_kernels():
    namespace = run("kernels.md", "quant_lora_matmul")
    # W is all ones: the largest value of its groups, which NF4 holds exactly, the scale to its 8 bits.
    np.testing.assert_allclose(np.asarray(namespace["y"], np.float32), 512, rtol=0.01)


def test_the_training_loop(tmp_path, monkeypatch):
    """Ten lines on the embedded model; a few steps of it leave an adapter that has learnt and fits that model."""
    code = example("quickstart.md", "make_train_step")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(lines) <= 10
    whole = data.make_batches
    monkeypatch.setattr(data, "make_batches", lambda *args, **options: itertools.islice(whole(*args, **options), 3))
    monkeypatch.chdir(tmp_path)
    namespace = run("quickstart.md", "make_train_step")
    assert int(namespace["state"].step) == 3
    model, _ = jp.load_pretrained(namespace["assets"].MODEL)
    method, leaves = jp.import_adapter(tmp_path / "adapter", model.config)
    assert method.specs[0].name == "lora_fa"
    assert all(np.any(leaf) for path, leaf in leaves.items() if path.endswith("/b"))


def test_the_mesh():
    found = run("pods.md", "make_mesh")
    assert int(found["state"].step) == 1


def test_models_of_ones_own():
    namespace = run("models.md", "from_linen")
    module, merged, batch = namespace["Tower"](), namespace["merged"], namespace["batch"]
    adapted = namespace["model"].apply(namespace["state"].params, {"x": batch["x"]})
    np.testing.assert_allclose(module.apply({"params": merged}, batch["x"]), adapted, atol=1e-5)
    namespace = run("models.md", "from_nnx", namespace)
    assert {path.rsplit("/", 2)[0] for path in namespace["trainable"]} == {"hidden", "output"}
    x = batch["x"]
    adapted, merged = namespace["adapted"], namespace["merged"]
    assert isinstance(adapted.hidden.lora.a, namespace["nnx"].Param) and not hasattr(merged.hidden, "lora")
    assert np.any(adapted.norm.mean[...])  # it has moved
    adapted.eval(), merged.eval()
    np.testing.assert_allclose(merged(x), adapted(x), atol=1e-5)


# Loops of the user's own.


def moved(params, before):
    """The paths whose leaves are no longer what they were."""
    return {path for path, leaf in tree.flatten(params).items() if not np.array_equal(leaf, before[path])}


def demo(page):
    """The blocks in a page of what `make demo` prints, up to its first other words, as one text."""
    text = (DOCS / page).read_text(encoding="utf-8").partition("task](")[2].partition("\n\n")[2]
    return textwrap.dedent(re.match(r"(?:(?: {4}.*)?\n)+", text)[0]).strip()


def test_what_the_demo_prints_has_the_programs_form(capsys):
    """The numbers are of a run; a report of them is shown so, to the space."""
    printed = demo("quickstart.md")
    numbers = lambda label: re.search(rf"^{re.escape(label)} +(.*)$", printed, re.MULTILINE)[1].replace(",", "").split()
    said = {
        f"{name}_{when}": x
        for name in ("eval_loss", "overlap")
        for when, x in zip(("before", "after"), map(float, numbers(SCORES[name])), strict=True)
    }
    counts = {f"{name}_parameters": int(numbers(name)[0]) for name in ("trainable", "frozen", "total")}
    sizes = re.findall(r"^(\w+) +([\d.]+) (KiB|MiB)$", printed, re.MULTILINE)
    memory = {name: float(size) * {"KiB": 2**10, "MiB": 2**20}[unit] for name, size, unit in sizes}
    assert list(memory) == [*MEMORY, "total"]
    parts = re.split(r"^(prompt|reference|before|after):\n", printed.rpartition("\n\n")[0], flags=re.MULTILINE)[1:]
    sample = {name: textwrap.dedent(words).strip() for name, words in zip(parts[::2], parts[1::2], strict=True)}
    steps, tokens, loss = re.search(r"lora: (\S+) steps, (\S+) tokens .* loss (\S+)$", printed, re.MULTILINE).groups()
    run = {"method": "lora", "steps": int(steps), "tokens": int(tokens.replace(",", "")), "train_loss": float(loss)}
    run |= {"dtype": "float32", "optimizer": "adam", "out": "out/run-1"}
    run |= {"compile_cache": "~/.cache/jaxpeft/compiled/..."}
    print_report({**said, **counts, "memory_bytes": memory, "sample": sample, **run})
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
    assert shown == printed
    assert shown.startswith(demo("../README.md"))


FALLBACK = pytest.mark.filterwarnings("ignore::pallas_kernels.platform.KernelFallback")  # of float32 on a GPU


@FALLBACK
def test_the_loop_of_the_readme():
    found = run_all("../README.md")
    model, params, batch = found["model"], found["params"], {"x": found["x"]}
    before = {**found["frozen"], **found["trainable"]}
    assert moved(params, before) == found["trainable"].keys()
    assert found["loss"] < np.mean(model.apply(tree.unflatten(before), batch, None) ** 2)
    merged = found["layer"].apply({"params": found["merged"]}, **batch)
    np.testing.assert_allclose(merged, model.apply(params, batch, None), atol=1e-5)


def test_plans_in_a_loop_of_ones_own():
    """The blocks of the page, given what they speak of."""
    base, params = tiny.model()
    found = {"jp": jp, "jax": jax, "optax": optax, "method": jp.lora(2), "base": base, "params": params}
    found |= {"key": jax.random.key(0), "layer": jnp.ones((8, 8)), "x": jnp.ones((4, 8))}
    found["block"] = lambda layer, x: jnp.tanh(checkpoint_name(x @ layer, "up")) @ layer
    found["loss"] = lambda params: jp.completion_loss(found["model"], params, tiny.batch())[0]
    run_all("plans.md", found)
    trained = moved(found["params"], {**found["rest"], **found["trainable"]})
    assert trained and trained <= found["trainable"].keys()
    np.testing.assert_allclose(found["block"](found["layer"], found["x"]), np.full((4, 8), 8 * np.tanh(8)), rtol=1e-6)


@FALLBACK
def test_models_and_loops_of_ones_own(tmp_path, monkeypatch):
    """What is saved is what was trained, and the compiler says what the tables say."""
    page = "own_model.md"
    monkeypatch.chdir(tmp_path)
    found = run_all(page)
    x, frozen = found["x"], found["frozen"]

    losses, nnx_losses = found["losses"], found["nnx_losses"]
    assert losses[-1] < losses[0] / 2 and nnx_losses[-1] < nnx_losses[0]
    adapted = found["model"].apply(jp.combine(found["restored"], frozen), {"x": x}, None)
    np.testing.assert_allclose(found["logits"], adapted, atol=1e-4)
    with found["ocp"].StandardCheckpointer() as saver:
        state = saver.restore(tmp_path / "nnx/merged", found["state"])
    logits = found["nnx"].merge(found["graph"], state)(x)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, found["batch"]["y"]).mean()
    np.testing.assert_allclose(value, nnx_losses[0], rtol=1e-4)  # the adapters' before they were trained once more

    needs = found["needs"]
    rows = {"as it is": "as it is", **{f"`{plan}`": plan for plan in ("up=save", "up=offload", "blocks")}}
    rows |= {f'`"{plan}"`': f"remat {plan}" for plan in ("matmuls", "blocks")}
    rows |= {"`trainable` alone": "blocks", "`jp.masked`": "quiet", "`jp.masked`, one norm logged": "logged"}
    for words, name in rows.items():
        sizes = [needs[name]["temporaries"] / 2**20, needs[name]["host"] / 2**20, needs[name]["flops"] / 1e9]
        shown = figures(page, words)
        np.testing.assert_allclose(shown, sizes[: len(shown)], rtol=0.1, atol=0.1, err_msg=words)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(found["grads"]))
    assert needs["logged"]["temporaries"] - needs["quiet"]["temporaries"] > tree.num_bytes(frozen)  # its gradients

    mask = tree.flatten(found["mask"])
    assert {path for path, trains in mask.items() if trains} == found["trainable"].keys()
    gradient = lambda block: jax.make_jaxpr(jax.grad(lambda w: block(w, jnp.ones((64, 256))).sum()))(found["w"])
    assert count_flops(gradient(found["run"])) == count_flops(gradient(found["block"]))  # no product twice


def test_models_and_sizes_are_those_of_the_library():
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    sizes = text.partition("<!-- geometries -->")[2].partition("<!-- end of geometries -->")[0]
    assert re.findall(r"`([^`]+)`", sizes) == list(geometries.GEOMETRIES)
    assert set(FAMILIES) == set(re.findall(r"^\| [^|]+ \| `(\w+)` \| (?:de|en)coder", text, re.MULTILINE))


# A page for each method.


@pytest.mark.parametrize("name", contract.names())
def test_a_page_for_each_method(name):
    """Its essential fields, from the method's file alone."""
    page, about = pages.page(name), contract.about(name)
    for heading in ("Equations", "What a step keeps", "Arguments", "Merging and PEFT", "Caveats", "Measured"):
        section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        assert section.strip(), heading
    for words in (about.summary[1:], about.trains, about.saves, about.reference, f"--method {about.within or name}"):
        assert words.replace("|", "\\|") in page
    assert f"::: jaxpeft.methods.{name}.{name}\n" in page
    assert f"[{name}]({name}.md)" in pages.index()
    if about.promises.backward and not about.within:
        assert "bytes per token" in page


def test_what_a_page_says_is_kept():
    """By hand: LoRA of rank 8 at a map of 2048 inputs in bfloat16, and MEFT's 3 bits of 2048 numbers."""
    assert "| `self_attn/q_proj` | 2048 x 2048 | 4,112 |" in pages.page("lora")
    assert "**768 bytes per token**" in pages.page("meft")
    assert "5.71 | 1.00 |" in pages.measured("lora") and "Not yet" in pages.measured("no such method")


def test_rows_of_a_method(tmp_path):
    (tmp_path / "some.md").write_text("# T\n\n| m | x |\n|---|---|\n| a+b | 1 |\n| ab | 2 |\n\n| h200, a, `s` | 3 |\n")
    found = tables.tables(tmp_path)
    assert [tables.rows_of(table, "a") for table in found] == [("| a+b | 1 |",), ()]
    assert found[0].title == "T" and found[0].header == "| m | x |\n|---|---|"


def test_docstrings_as_pages():
    text = "x_j * <W>\n    a_j * b\nthen `c_j`"
    assert pages.prose(text) == "x\\_j \\* \\<W\\>\n\n    a_j * b\n\nthen `c_j`"


# Links, claims, messages.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page):
    made = {f"methods/{name}.md" for name in [*contract.names(), "index"]} | {"api/names.md"}
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            path = (page.parent / target).resolve()
            assert path.exists() or path.relative_to(DOCS).as_posix() in made, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_called_by_the_librarys_name_is_in_it(page):
    names = set(re.findall(r"\b(?:jp|jaxpeft)\.([A-Za-z_]\w*)\(", page.read_text(encoding="utf-8")))
    assert names <= set(jp.__all__), names - set(jp.__all__)


def test_every_verdict_has_its_evidence():
    tried = (DOCS / "claims.md").read_text(encoding="utf-8").partition("## Not yet tried")[0]
    rows = [line for line in tried.splitlines() if line.startswith("| ") and not line.startswith("| source")]
    assert len(rows) > 20
    for row in rows:
        evidence = row.strip("| ").rsplit("|", 1)[1]
        assert re.search(r"\]\(\.\./(experiments/results|tests)/", evidence), row


@functools.cache
def messages():
    """Every text in the library's code, with … where a value is put in."""
    found = []
    for file in sorted((ROOT / "jaxpeft").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "")


def test_the_errors_are_the_librarys_own():
    """Every part of a line that is quoted, between its values, is in one of our messages."""
    read = lambda page: (DOCS / page).read_text(encoding="utf-8")
    lines = re.findall(r"^\| (`.+?`) \| ", read("troubleshooting.md"), re.MULTILINE)
    assert len(lines) > 20
    refused = read("own_model.md").partition("## What is refused")[2]
    lines += re.findall(r"^\| .+ \| (`.+?`) \| ", refused, re.MULTILINE)
    for line in lines:
        for part in line.replace("`", "").replace("\\|", "|").split("…"):
            assert part.strip() in messages(), line
