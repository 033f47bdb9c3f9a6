"""Sphinx configuration: notebooks are copied and executed, the pages of the registries are generated, warnings are errors."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
# for the kernels that execute notebooks
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import funcpeft  # noqa: E402
from funcpeft import methods, quant  # noqa: E402
from funcpeft.method import Method  # noqa: E402

project = "funcpeft"
author = "the funcpeft authors"
copyright = author
version = release = funcpeft.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build", "generated", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"funcpeft {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Names of annotations that have no page: other projects' (builds are offline, so there is no intersphinx) and private ones.
# Everything that the pages themselves refer to must resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|typing|os|re|pathlib|transformers|numpy|hypothesis)\..*"),
    (r"py:class", r"(Tensor|nn\.Module|Any|Callable|Mapping|Sequence|Iterable|Self|optional|PathLike)"),
    (r"py:class", r"(Leaves|Params|Tree|Adapters|Hyper|Memory|Values|Law|Call)"),
    (r"py:class", r"funcpeft\.adapt\.Entry"),
    (r"py:.*", r".*\._\w+"),
]


# -- the pages of the registries ------------------------------------------------------------------------------------------


def math_blocks(doc: str) -> Iterator[str]:
    """Yields the ``.. math::`` blocks of a docstring, each on one line."""
    lines = iter(doc.splitlines())
    for line in lines:
        if line.lstrip().startswith(".. math::"):
            parts = [line.partition("::")[2].strip()]
            for following in lines:
                if not following.startswith("    "):
                    break
                parts.append(following.strip())
            yield " ".join(parts).strip()


def about(cls: type) -> str:
    """Returns what the first line of a file's docstring says after the name."""
    return (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")


def list_table(header: list[str], rows: list[list[str]], widths: str = "auto") -> list[str]:
    """Returns an RST table; a cell may have several lines."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in [header, *rows]:
        for i, cell in enumerate(row):
            first, *rest = cell.splitlines() or [""]
            lines.append(f"   {'* -' if i == 0 else '  -'} {first}".rstrip())
            lines += [f"       {x}".rstrip() for x in rest]
    return [*lines, ""]


def link(cls: type) -> str:
    return f":py:class:`~funcpeft.{cls.__name__}`"


def kinds_of(cls: type[Method]) -> str:
    if hasattr(cls, "wrap"):
        return "the call"
    return "any parameter" if cls.takes_any else ", ".join(sorted(cls.kinds))


def is_own(cls: type[Method], name: str) -> bool:
    return getattr(cls, name) is not getattr(Method, name)


FACTS = {
    "adds": lambda c: c.additive,
    "no dense base": lambda c: c.weight_free,
    "merges": lambda c: is_own(c, "merge"),
    "unmerges": lambda c: is_own(c, "unmerge"),
    "neutral at init": lambda c: c.identity_at_init,
    "ranks may differ in a stack": lambda c: bool(c.rank_axes),
    "sites independent": lambda c: not c.depends_on_sites,
    "peft files": lambda c: bool(c.peft_type),
}


#: What every method overrides; documented once, in the contract.
_CONTRACT = "apply, check_model, check_site, delta, examples, from_peft, merge, resolve, to_peft, to_peft_config, unmerge"


def sections(module: Any, classes: list[Any]) -> list[str]:
    lines: list[str] = []
    for cls in classes:
        name = cls.__name__
        lines += [f".. _{module}-{name.lower()}:", "", name, "-" * len(name), ""]
        lines += [f".. automodule:: {cls.__module__}", "   :no-index:", ""]
        lines += [
            f".. autoclass:: funcpeft.{name}",
            "   :members:",
            f"   :exclude-members: {_CONTRACT}",
            "   :show-inheritance:",
            "",
        ]
    return lines


def methods_page() -> str:
    classes = sorted((getattr(methods, n) for n in methods.__all__), key=lambda c: c.__name__.lower())
    formulas = [[link(c), about(c), "\n".join(f":math:`{m}`\n" for m in math_of(c)), kinds_of(c)] for c in classes]
    facts = [[link(c), *("yes" if f(c) else "" for f in FACTS.values())] for c in classes]
    waived = [[link(c), f"``{law}``", reason] for c in classes for law, reason in sorted(c.waived.items())]
    heading = lambda text: [text, "-" * len(text), ""]  # noqa: E731
    lines = [*heading("Formulas"), *list_table(["method", "what it is", "formula", "layer kinds"], formulas, "12 26 42 20")]
    lines += [*heading("Facts"), *list_table(["method", *FACTS], facts)]
    lines += [
        *heading("Waived laws"),
        "Every other law holds for every method; a waiver is in the method's file, with its reason.",
        "",
    ]
    lines += list_table(["method", "law", "reason"], waived)
    return "\n".join([*lines, *sections("method", classes)])


def math_of(cls: type) -> list[str]:
    return list(math_blocks(sys.modules[cls.__module__].__doc__ or ""))


def formats_page() -> str:
    classes = [getattr(quant, n) for n in quant.__all__]
    rows = [[link(c), about(c), "\n".join(f":math:`{m}`\n" for m in math_of(c))] for c in classes]
    return "\n".join([*list_table(["format", "what it is", "decoded weight"], rows), *sections("format", classes)])


def generate(app: Any) -> None:
    """Writes the generated parts and copies the notebooks, before Sphinx looks for sources."""
    out = DOCS / "generated"
    out.mkdir(exist_ok=True)
    for name, text in (("methods.rst", methods_page()), ("formats.rst", formats_page())):
        write(out / name, text)
    (DOCS / "notebooks").mkdir(exist_ok=True)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy2(notebook, DOCS / "notebooks" / notebook.name)


def write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def as_prose(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keeps napoleon from reading a first line ``Text: more`` of an attribute as its type."""
    if what in ("attribute", "data", "property") and ": " in lines[0]:
        lines[:1] = [f"{lines[0].partition(': ')[0]}:", lines[0].partition(": ")[2]]


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", as_prose, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": False}
