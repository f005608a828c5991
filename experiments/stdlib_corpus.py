"""Text and a task from the Python standard library: what the embedded tiny Llama is made from.

Every Python installation carries some ten megabytes of source code and documentation under the PSF licence. This module
cuts it, in a fixed order and without any random number, into parts that are disjoint by *module* (top-level file or
package):

* pretraining text: the sources of every module outside `TASK_TRAIN_MODULES` and `TASK_VALIDATION_MODULES`, and the
  language-reference topics that `help()` prints (`pydoc_data.topics`). Tests, demos and the code tables of `encodings`
  are left out, and long runs of literal table rows are cut.
* the task, "write the first sentence of the docstring for this function's source": training rows from
  `TASK_TRAIN_MODULES`, validation rows from `TASK_VALIDATION_MODULES`. Nothing of these modules is pretraining text,
  neither code nor docstrings.

A function is left out of the task when the same body (whatever its name, layout and comments), or the same name with
the same summary, also occurs in the pretraining modules; validation leaves out in the same way what occurs in the
task's training rows. Another Python version has other sources and therefore gives slightly different text and rows.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TASK_TRAIN_MODULES = frozenset(
    """_collections_abc bdb calendar collections datetime email ftplib http imaplib importlib ipaddress logging mailbox
    nntplib numbers operator random tkinter turtle urllib xml""".split()
)
TASK_VALIDATION_MODULES = frozenset(
    "codecs configparser heapq pathlib shutil statistics tarfile textwrap threading".split()
)
HELD_OUT = TASK_TRAIN_MODULES | TASK_VALIDATION_MODULES
EXCLUDED_FOLDERS = frozenset(
    """test tests idle_test turtledemo encodings pydoc_data __phello__ lib-dynload site-packages dist-packages
    __pycache__""".split()
)
MAX_TABLE_LINES = 16  # a longer run of literal table rows is cut here
MAX_SOURCE_CHARACTERS = 600  # with the tokenizer of this model: below 256 tokens with the summary
MIN_SUMMARY_WORDS, MAX_SUMMARY_CHARACTERS = 3, 120
SUMMARY_CUE = "\nSummary:\n"

_TABLE_ROW = re.compile(r"""^\s*[bru]?['"(\[{\d-].*,\s*(#.*)?$""")


class Document(NamedTuple):
    """One text: `name` is the path inside the standard library (or `topics/NAME`)."""

    name: str
    text: str


class Function(NamedTuple):
    """A function with a documented summary.

    source: its dedented source without the docstring.
    body: that source's statements, normalised by `ast.unparse`, for comparing functions.
    """

    module: str
    name: str
    source: str
    body: str
    summary: str


def module_files() -> Iterator[tuple[str, Path]]:
    """Yields (path inside the library with forward slashes, path) of every source file kept, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(files.items()):
        folders = name.split("/")[:-1]
        if not any(f in EXCLUDED_FOLDERS or f.startswith("config-") for f in folders):
            yield name, path


def module_of(name: str) -> str:
    """The top-level module a file belongs to: `email/message.py` -> `email`, `ast.py` -> `ast`."""
    return name.split("/")[0].removesuffix(".py")


def read_source(path: Path) -> str:
    """The file's text, its line ends and tabs made uniform."""
    return path.read_text(encoding="utf-8").expandtabs(8)


def cut_tables(text: str) -> str:
    """Shortens every run of more than `MAX_TABLE_LINES` lines that look like rows of a literal table."""
    kept: list[str] = []
    run = 0
    for line in text.split("\n"):
        run = run + 1 if _TABLE_ROW.match(line) else 0
        if run <= MAX_TABLE_LINES:
            kept.append(line)
    return "\n".join(kept)


def pretraining_documents() -> list[Document]:
    """The sources of the pretraining modules, then the topics of `help()`, each sorted by name."""
    sources = [
        Document(name, cut_tables(read_source(path)))
        for name, path in module_files()
        if module_of(name) not in HELD_OUT
    ]
    return [d for d in sources if d.text.strip()] + topic_documents()


def topic_documents() -> list[Document]:
    """The language-reference chapters that `help("TOPIC")` prints, as plain text."""
    from pydoc_data.topics import topics

    return [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]


def functions(source: str, module: str) -> Iterator[Function]:
    """Yields every documented function and method of a module's source, in order of appearance.

    Skipped: a function that consists of its docstring, and a docstring that shares a line with code.
    """
    lines = source.split("\n")
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(nodes, key=lambda n: n.lineno):
        docstring = ast.get_docstring(node)
        if not docstring or len(node.body) < 2:
            continue
        statement, after = node.body[0], node.body[1]
        if not node.lineno < statement.lineno <= (statement.end_lineno or 0) < after.lineno:
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        without = lines[first : statement.lineno - 1] + lines[statement.end_lineno : node.end_lineno]
        indent = len(lines[first]) - len(lines[first].lstrip())
        text = "\n".join(line[indent:] if not line[:indent].strip() else line for line in without)
        body = "\n".join(ast.unparse(s) for s in node.body[1:])
        yield Function(module, node.name, text.rstrip() + "\n", body, first_sentence(docstring))


def first_sentence(docstring: str) -> str:
    """The summary: the first sentence of the docstring's first paragraph, on one line."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0].removesuffix(":")


def is_task_row(function: Function) -> bool:
    """Whether a function fits the task: short, ASCII, with a summary that is a sentence and not a signature."""
    summary = function.summary
    return (
        len(function.source) <= MAX_SOURCE_CHARACTERS
        and len(summary) <= MAX_SUMMARY_CHARACTERS
        and len(summary.split()) >= MIN_SUMMARY_WORDS
        and summary[0].isalpha()
        and summary[0].isupper()
        and "(" not in summary.split(" ")[0]
        and (function.source + summary).isascii()
    )


def module_functions(modules: frozenset[str] | None = None) -> list[Function]:
    """The documented functions of the given top-level modules; of every *pretraining* module when None."""
    return [
        function
        for name, path in module_files()
        if (module_of(name) in modules if modules is not None else module_of(name) not in HELD_OUT)
        for function in functions(read_source(path), module_of(name))
    ]


def task_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The task as (training rows, validation rows), each row `{"prompt", "completion"}`.

    Rows are ordered by a hash of the prompt, so that the first n are a fair sample of all modules.
    """
    seen_bodies = pretraining_bodies()
    seen_names = {(f.name, f.summary) for f in module_functions()}
    splits: list[list[dict[str, str]]] = []
    for modules in (TASK_TRAIN_MODULES, TASK_VALIDATION_MODULES):
        rows = []
        for function in filter(is_task_row, module_functions(modules)):
            name = (function.name, function.summary)
            if function.body not in seen_bodies and name not in seen_names:
                rows.append({"prompt": function.source + SUMMARY_CUE, "completion": function.summary})
                seen_bodies.add(function.body)
                seen_names.add(name)
        splits.append(sorted(rows, key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest()))
    return splits[0], splits[1]


def pretraining_bodies() -> set[str]:
    """The normalised bodies of *all* functions in the pretraining modules, documented or not."""
    bodies = set()
    for name, path in module_files():
        if module_of(name) not in HELD_OUT:
            for node in ast.walk(ast.parse(read_source(path))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    statements = node.body[1:] if ast.get_docstring(node) else node.body
                    bodies.add("\n".join(ast.unparse(s) for s in statements))
    return bodies
