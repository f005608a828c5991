"""What mkdocs asks for: the generated pages, and links out of docs/.

Added to the pages in docs/: a page per method and their index, the public names, and the tables and pictures of
experiments/results. Pages in docs/ link to files of the repository as they lie there (`../experiments/results/x.md`),
so that links work in the repository too; here they become links to the site's copy, and those to source files, which
the site lacks, become the file's path.
"""

import os
import posixpath
import re
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from mkdocs.structure.files import File

import jaxpeft
from docs.generate import methods, tables
from jaxpeft import method as contract

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
_RESULTS = "../experiments/results/"
_TOLD = ("jaxpeft.method", "jaxpeft.model")  # modules with a page of their own


def on_config(config):
    """Puts the methods' pages into the navigation, in place of the entry that stands for them."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for section in config.nav:
        if "Methods" in section:
            section["Methods"] += [f"methods/{name}.md" for name in methods.names()]
    return config


def on_files(files, config):
    """Adds what is made, and what lies outside of docs/."""
    pages = {"methods/index.md": methods.index(), "api/names.md": public_names()}
    pages |= {f"methods/{name}.md": methods.page(name) for name in methods.names()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in sorted([*tables.RESULTS.rglob("*.md"), *tables.RESULTS.rglob("*.png")]):
        uri = f"results/{path.relative_to(tables.RESULTS).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links that leave docs/ into links of the site."""
    here = posixpath.dirname(page.file.src_uri)

    def turn(found):
        mark, text, target, anchor = found.groups()
        if target.startswith(_RESULTS) and not here:
            return f"{mark}[{text}](results/{target.removeprefix(_RESULTS)}{anchor or ''})"
        if files.get_file_from_path(posixpath.normpath(posixpath.join(here, target))):
            return found[0]
        path = target.lstrip("./")
        return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"

    return _LINK.sub(turn, markdown)


def public_names() -> str:
    """The page of `jaxpeft.__all__`: each name by its module, methods by their own pages."""
    modules: dict[str, list[str]] = {}
    for name in jaxpeft.__all__:
        if name not in contract.names():
            module = getattr(jaxpeft, name).__module__
            modules.setdefault(module, []).append(name)
    parts = [
        "# The public names\n\nWhat `import jaxpeft as jp` has. The methods are functions too, each on its own page: "
        + ", ".join(f"[{name}](../methods/{name}.md)" for name in methods.names())
        + "."
    ]
    told = {module: modules.pop(module) for module in sorted(modules) if module in _TOLD}
    for module, names in told.items():
        parts.append(f"Of `{module}`, on [the contract's page](contract.md): {', '.join(names)}.")
    for module, names in sorted(modules.items()):
        parts.append(f"## `{module}`")
        parts += [f"::: {module}.{name}\n    options:\n      heading_level: 3" for name in names]
    return "\n\n".join(parts) + "\n"
