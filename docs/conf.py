"""Sphinx configuration: notebooks are copied and executed, the pages of the registries are generated, warnings are errors."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
# for the kernels that execute notebooks
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import method_pages
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from method_pages import about, heading, link, list_table, math_blocks

import funcpeft
from funcpeft import quant
from funcpeft.interop import libraries, options
from funcpeft.interop.library import Library
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized

project = "funcpeft"
author = "the funcpeft authors"
copyright = author
version = release = funcpeft.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build", "generated/*.rst", "**/.ipynb_checkpoints"]
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
    (r"py:class", r"funcpeft\.(entries\.Entry|fold\.Places)"),
    (r"py:class", r"funcpeft\.quant\.(lookup|minifloat)\.\w+"),  # families of formats
    (r"py:.*", r".*\._\w+"),
]


# -- the pages of the registries ------------------------------------------------------------------------------------------


def math_of(cls: type) -> list[str]:
    return list(math_blocks(sys.modules[cls.__module__].__doc__ or ""))


def sections(module: Any, classes: list[Any]) -> list[str]:
    lines: list[str] = []
    for cls in classes:
        name = cls.__name__
        lines += [f".. _{module}-{name.lower()}:", "", *heading(name)]
        lines += [f".. automodule:: {cls.__module__}", "   :no-index:", ""]
        lines += [f".. autoclass:: funcpeft.{name}", "   :members:", "   :show-inheritance:", ""]
    return lines


def formats_page() -> str:
    classes = [getattr(quant, n) for n in quant.__all__]
    rows = [[link(c), about(c), "\n".join(f":math:`{m}`\n" for m in math_of(c))] for c in classes]
    return "\n".join([*list_table(["format", "what it is", "decoded weight"], rows), *sections("format", classes)])


# -- who stores what ------------------------------------------------------------------------------------------------------

FORMATS: list[type[Format]] = [getattr(quant, n) for n in sorted(quant.__all__, key=str.lower)]
LIBRARIES: list[type[Library]] = [getattr(libraries, n) for n in libraries.__all__]


def acts(function: Callable[..., Any]) -> bool:
    """Whether a function does anything but raise."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    return not all(isinstance(line, ast.Expr | ast.Raise) for line in node.body)


def made_by(cls: type[Library]) -> list[type[Format]]:
    """Returns the formats that a library's file calls or keeps in a table; without any, those of the file it draws on."""
    module = sys.modules[cls.__module__]
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    used = [n.func for n in nodes if isinstance(n, ast.Call)] + [v for n in nodes if isinstance(n, ast.Dict) for v in n.values]
    names = {n.id for n in used if isinstance(n, ast.Name)}
    own = [f for f in FORMATS if f.__name__ in names]
    drawn_on = [c for c in LIBRARIES if c is not cls and sys.modules[c.__module__] in vars(module).values()]
    return own or [f for c in drawn_on for f in made_by(c)]


def backends() -> Iterator[tuple[str, str, Format]]:
    """Yields every backend and dtype that ``choose_format`` knows, and the format."""
    for backend, dtypes in options._BACKENDS.items():
        for dtype in dtypes:
            yield backend, dtype, options.choose_format({"backend": backend, "weight_dtype": dtype})


def stored_samples() -> list[Quantized]:
    """Returns a weight in every format that has an example or a backend."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    formats = [e for f in FORMATS for e in f.examples()] + [fmt for _, _, fmt in backends()]
    return [fmt.sample(weight) for fmt in formats if fmt.fits(weight.shape)]


def stores_table() -> str:
    samples, made = stored_samples(), {c: made_by(c) for c in LIBRARIES}
    written = {c: {type(q.format) for q in samples if c().refuses(q) is None} for c in LIBRARIES if acts(c.write)}

    def named(found: Iterator[Any]) -> str:
        return ", ".join(sorted(c.name for c in found))

    rows = [
        [
            link(fmt),
            named(c for c in LIBRARIES if acts(c.take) and fmt in made[c]),
            named(c for c in LIBRARIES if acts(c.read) and fmt in made[c]),
            named(c for c, formats in written.items() if fmt in formats),
        ]
        for fmt in FORMATS
        if any(fmt in formats for formats in made.values())
    ]
    return "\n".join(list_table(["format", "layers in memory", "checkpoints", "written"], rows, "16 30 30 24"))


def libraries_table() -> str:
    def literal(names: tuple[str, ...]) -> str:
        return ", ".join(f"``{n}``" for n in names)

    rows = [[f"``{c.name}``", literal(c.quant_methods), about(c)] for c in sorted(LIBRARIES, key=lambda c: c.name)]
    return "\n".join(list_table(["library", "``quant_method``", "what is read"], rows, "20 24 56"))


def backends_table() -> str:
    found: dict[str, dict[str, Format]] = {}
    for backend, dtype, fmt in backends():
        found.setdefault(backend, {})[dtype] = fmt
    rows = [
        [f"``{b}``", ", ".join(f"``{d}``" for d in dtypes), ", ".join(dict.fromkeys(link(type(f)) for f in dtypes.values()))]
        for b, dtypes in found.items()
    ]
    return "\n".join(list_table(["``backend``", "``weight_dtype``", "format"], rows, "22 48 30"))


# -- what survives requantizing -------------------------------------------------------------------------------------------

#: Formats of the picture with a colour (Okabe and Ito's, safe for the colour-blind) and a marker.
PICTURED: dict[str, tuple[Format, str, str]] = {
    "FP8": (quant.FP8(), "#666666", "s"),
    "Int8": (quant.Int8(), "#000000", "o"),
    "NF4": (quant.NF4(), "#0072B2", "o"),
    "FP4": (quant.FP4(), "#56B4E9", "s"),
    "NVFP4": (quant.NVFP4(), "#009E73", "^"),
    "MXFP4": (quant.MXFP4(), "#CC79A7", "v"),
    "AffineInt, 4 bits": (quant.AffineInt(), "#D55E00", "D"),
    "AffineInt, 2 bits": (quant.AffineInt(bits=2), "#E69F00", "P"),
    "Ternary": (quant.Ternary(), "#7A5200", "X"),
}
SEEDS = 4


def realised(fmt: Format, sizes: list[float], seed: int, refit: bool) -> list[float]:
    """Returns, per relative size of a rank-8 update of a weight on its grid, the fraction that requantizing leaves."""
    draws = torch.Generator().manual_seed(seed)
    stored = fmt.requant(0.02 * torch.randn(128, 128, generator=draws))
    base, found = fmt.dequant(stored), []
    direction = torch.randn(128, 8, generator=draws) @ torch.randn(8, 128, generator=draws)
    for size in sizes:
        update = direction * (size * base.norm() / direction.norm())
        again = fmt.dequant(fmt.requant(base + update, like=None if refit else stored))
        found.append(float(((again - base) * update).sum() / update.square().sum()))
    return found


def draw_realised(path: Path) -> None:
    """Draws the fraction of an update that requantizing leaves against the update's size."""
    sizes = torch.logspace(-3, 0, 25).tolist()
    panels = {"same grid: requantize": False, "scales fitted anew: refit": True}
    with rc_context({"svg.hashsalt": "realised", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        for axes, (title, refit) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for label, (fmt, colour, marker) in PICTURED.items():
                mean = torch.tensor([realised(fmt, sizes, seed, refit) for seed in range(SEEDS)]).mean(0).tolist()
                dash = (0, (4, 2)) if refit and not fmt.refits_exactly else "-"
                axes.plot(sizes, mean, color=colour, marker=marker, markevery=3, markersize=5, linestyle=dash, label=label)
            axes.axhline(0.9, color="#888888", linewidth=1, linestyle=":", label="default limit of merge")
            axes.set(xscale="log", ylim=(-0.05, 1.25), title=title, xlabel="size of the update, relative to the weight")
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("realised fraction of the update")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


# -- how members share a batch --------------------------------------------------------------------------------------------

#: A colour for each member of the picture (Okabe and Ito's).
MEMBERS = ("#0072B2", "#E69F00", "#009E73")


def draw_fold(path: Path) -> None:
    """Draws how the rows of three members go through a model in one batch, and part only at an adapted site."""
    with rc_context({"svg.hashsalt": "fold", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(9.6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.set(xlim=(-0.4, 17.0), ylim=(-1.4, 4.8), aspect="equal")
        axes.axis("off")

        def box(x: float, y: float, width: float, height: float, colour: str, text: str = "", ink: str = "black") -> None:
            axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1))
            axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, linespacing=1.4)

        def arrow(x: float, y: float, to_x: float, to_y: float) -> None:
            style = {"arrowstyle": "->", "color": "#444444", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)

        def rows(x: float, gap: float) -> None:
            for i, colour in enumerate(MEMBERS):
                for j in range(2):
                    box(x, 2.75 - gap * (i - 1) - (2 * i + j) * 0.5 + 0.5, 1.1, 0.5, colour)

        rows(0, 0.35)
        arrow(1.25, 2.0, 2.05, 2.0)
        rows(2.2, 0)
        arrow(3.45, 2.0, 4.05, 2.0)
        box(4.2, 0.5, 2.7, 3, "#DDDDDD", "embedding,\nnorms, masks,\nattention:\n6 plain rows")
        arrow(7.0, 2.0, 7.6, 2.0)
        box(7.7, 3.2, 4.4, 1.3, "#DDDDDD", "$x\\,W^\\top$, all 6 rows at once")
        for i, colour in enumerate(MEMBERS):
            y = 1.95 - 0.95 * i
            for j in range(2):
                box(7.7, y - 0.4 * j, 0.75, 0.4, colour)
            update = f"$s_{i + 1}\\,(x A_{i + 1}^\\top) B_{i + 1}^\\top$"
            box(8.6, y - 0.4, 3.5, 0.8, colour, update, "black" if i == 1 else "white")
        axes.text(9.9, 2.76, "+", ha="center", va="center", fontsize=14)
        axes.add_patch(Rectangle((7.5, -0.55), 4.8, 5.2, fill=False, edgecolor="#444444", linestyle=(0, (4, 3))))
        arrow(12.4, 2.0, 13.0, 2.0)
        rows(13.15, 0)
        arrow(14.4, 2.0, 15.2, 2.0)
        rows(15.35, 0.35)
        labels = {0.55: "3 members,\n2 rows each", 2.75: "one batch", 5.55: "the model's own code", 9.9: "an adapted site"}
        labels |= {13.7: "one batch", 15.9: "(3, 2, ...)"}
        for x, text in labels.items():
            axes.text(x, -0.95, text, ha="center", va="center")
        figure.savefig(path, format="svg", metadata={"Date": None})


def generate(app: Any) -> None:
    """Writes the generated parts and copies the notebooks, before Sphinx looks for sources."""
    out = DOCS / "generated"
    out.mkdir(exist_ok=True)
    pages = {
        "formats.rst": formats_page,
        "stores.rst": stores_table,
        "libraries.rst": libraries_table,
        "backends.rst": backends_table,
    }
    for name, make in pages.items():
        write(out / name, make())
    method_pages.generate(out, write)
    draw_realised(out / "realised.svg")
    draw_fold(out / "fold.svg")
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
