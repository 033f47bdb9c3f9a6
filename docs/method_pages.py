"""The generated pages of the methods: one each, with formula, figure, sizes, laws, formats and differences, and one table.

Everything is read from the registry, from a run of the method, or from the marks of the tests; nothing is written by hand.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

import funcpeft as fp
from funcpeft import methods
from funcpeft.method import Method
from funcpeft.testing import LAWS
from funcpeft.testing.cases import perturbed

ROOT = Path(__file__).parents[1]

#: Shapes (out, in) of linear layers whose sizes are listed.
SHAPES = {"768 x 768": (768, 768), "3072 x 768": (3072, 768), "4096 x 4096": (4096, 4096), "14336 x 4096": (14336, 4096)}
#: Size of the layer of a figure.
PICTURED = 24
_ARITHMETIC = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor, "round": round, "sqrt": math.sqrt}


def classes() -> list[type[Method]]:
    return sorted((getattr(methods, n) for n in methods.__all__), key=lambda c: c.__name__.lower())


def about(cls: type) -> str:
    """Returns what the first line of a file's docstring says after the name."""
    return (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")


def math_blocks(doc: str) -> Iterator[str]:
    """Yields the ``.. math::`` blocks of a docstring, each on one line."""
    lines = iter(doc.splitlines())
    for line in lines:
        if line.lstrip().startswith(".. math::"):
            parts = [line.partition("::")[2].strip()]
            for following in lines:
                if not following.startswith("   "):
                    break
                parts.append(following.strip())
            yield " ".join(parts).strip()


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


def heading(text: str, under: str = "-") -> list[str]:
    return [text, under * len(text), ""]


# -- facts -----------------------------------------------------------------------------------------------------------------


def is_own(cls: type[Method], name: str) -> bool:
    return getattr(cls, name) is not getattr(Method, name)


def kinds_of(cls: type[Method]) -> str:
    if not cls.kinds:
        return "the call"
    return "any parameter" if cls.takes_any else ", ".join(sorted(cls.kinds))


def lean(cls: type[Method]) -> str:
    """Says at which kinds of layers a call makes no dense base weight."""
    free = cls.weight_free
    if isinstance(free, bool):
        return "yes" if free else ""
    return ", ".join(sorted(free))


FACTS = {
    "adds": lambda c: c.additive,
    "no dense base": lean,
    "merges": lambda c: is_own(c, "merge"),
    "unmerges": lambda c: is_own(c, "unmerge"),
    "neutral at init": lambda c: c.identity_at_init,
    "ranks may differ in a stack": lambda c: bool(c.rank_axes),
    "sites independent": lambda c: not c.depends_on_sites,
    "peft files": lambda c: bool(c.peft_type),
}


def fact(cls: type[Method], name: str) -> str:
    found = FACTS[name](cls)
    return found if isinstance(found, str) else "yes" if found else ""


def table_page() -> str:
    """Returns the one table of all methods, and the waived laws."""
    rows = [[f":doc:`{c.__name__} </generated/methods/{c.__name__.lower()}>`", about(c), kinds_of(c)] for c in classes()]
    facts = [[link(c), *(fact(c, name) for name in FACTS)] for c in classes()]
    waived = [[link(c), f"``{law}``", reason] for c in classes() for law, reason in sorted(c.waived.items())]
    return "\n".join(
        [
            *heading("All methods"),
            *list_table(["method", "what it is", "layer kinds"], rows, "16 56 28"),
            *heading("Facts"),
            *list_table(["method", *FACTS], facts),
            *heading("Waived laws"),
            "Every other law holds for every method; a waiver is in the method's file, with its reason.",
            "",
            *list_table(["method", "law", "reason"], waived),
        ]
    )


# -- one page ----------------------------------------------------------------------------------------------------------------


def page(cls: type[Method]) -> str:
    name = cls.__name__
    lines = [f".. _method-{name.lower()}:", "", *heading(name, "=")]
    lines += [f".. automodule:: {cls.__module__}", "   :no-index:", ""]
    if (ROOT / "docs/generated/methods" / f"{name.lower()}.svg").exists():
        lines += [f".. image:: {name.lower()}.svg", f"   :alt: weight, update and spectrum of {name}", ""]
    elif cls.kinds and not is_own(cls, "merge"):
        lines += ["There is no merged form: the update depends on the inputs, so there is no one weight to draw.", ""]
    lines += [
        *heading("Facts"),
        *list_table(["fact", ""], [[f, fact(cls, f) or "no"] for f in FACTS] + extra_facts(cls), "40 60"),
    ]
    lines += sizes(cls)
    lines += [*heading("Laws"), laws(cls), ""]
    lines += [*heading("On stored weights"), stored(cls), ""]
    lines += differences(cls)
    lines += [*heading("Reference"), f".. autoclass:: funcpeft.{name}", "   :members:", f"   :exclude-members: {_CONTRACT}"]
    return "\n".join([*lines, "   :show-inheritance:", ""])


#: What every method overrides; documented once, in the contract.
_CONTRACT = (
    "across_tie, apply, apply_rows, as_written, call_leaves, check_model, check_site, check_tie, completed, delta, derived, "
    "examples, factors, from_peft, from_peft_shared, init, init_shared, init_site, merge, merges_at, names_site, neutral, "
    "pair, penalty, project_grads, resolve, sample_needs, sample_values, scopes, to_peft, to_peft_config, to_peft_shared, "
    "unmerge, unmerge_gain, wrap"
)


def extra_facts(cls: type[Method]) -> list[list[str]]:
    found = [["layer kinds", kinds_of(cls)]]
    if cls.needs:
        found.append(["init takes besides the base", ", ".join(f"``{n}``" for n in cls.needs)])
    if cls.context_names:
        found.append(["reads from the context", ", ".join(f"``{n}``" for n in cls.context_names)])
    if is_own(cls, "penalty"):
        found.append(["regulariser", "``net.penalty(adapter)``"])
    if is_own(cls, "project_grads"):
        found.append(["gradient projection", "``net.project_grads(params, grads, adapter)``"])
    return found


def laws(cls: type[Method]) -> str:
    names = ", ".join(f"``{law}``" for law in LAWS if law not in cls.waived)
    waived = "".join(f" Waived: ``{law}``, {reason.rstrip('.')}." for law, reason in sorted(cls.waived.items()))
    return f"Checked on generated cases: {names}.{waived}"


def stored(cls: type[Method]) -> str:
    """Says what the method does on a base in a quantized format."""
    if not cls.kinds:
        return "The method acts on the call: the base may be stored in any format."
    if cls.takes_any:
        return "The method replaces whole parameters; what it replaces is not stored in a format."
    free = cls.weight_free
    if free is True:
        text = "Every format of :doc:`/formats` works, and a call never decodes the weight outside of the base's own product."
    elif free is False:
        text = "Every format of :doc:`/formats` works; a call decodes the weight and is computed with the dense one."
    else:
        kinds = ", ".join(sorted(free))
        text = f"Every format of :doc:`/formats` works; a call decodes the weight except at layers of kind {kinds}."
    return f"{text} {'Merging gives dense weights, or codes again where asked.' if is_own(cls, 'merge') else ''}".strip()


# -- sizes -------------------------------------------------------------------------------------------------------------------


def sizes(cls: type[Method]) -> list[str]:
    """Returns how many numbers are trained: the formula, and counts at some shapes with default fields."""
    method = default(cls)
    if method is None or not cls.size:
        return []
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}

    def value(text: str, **sizes: int) -> int:
        return int(eval(text, {"__builtins__": {}}, {**_ARITHMETIC, **fields, **sizes}))

    try:
        rows = [[name, f"{value(cls.size, out=out, in_=in_):,}"] for name, (out, in_) in SHAPES.items()]
    except TypeError:  # a default that is computed from the layer
        rows = []
    used = {n.id for n in ast.walk(ast.parse(cls.size)) if isinstance(n, ast.Name)}
    shown = ", ".join(f"``{k}={v!r}``" for k, v in fields.items() if k in used)
    lines = [*heading("Trained numbers"), f"At a linear layer: ``{cls.size}``." + (f" With {shown}:" if shown else ""), ""]
    lines += list_table(["out x in", "trained"], rows, "40 60") if rows else []
    if cls.size_shared not in ("0", ""):
        lines += [f"Shared by all sites: ``{cls.size_shared}`` = {value(cls.size_shared):,}.", ""]
    return lines


def default(cls: type[Method]) -> Method | None:
    try:
        return cls()
    except (TypeError, ValueError):
        return None


# -- differences -------------------------------------------------------------------------------------------------------------


@cache
def marked() -> list[tuple[str, str, str, str]]:
    """Lists the differences that tests are marked with: method, peft, here, and the test."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "differs":
                    method, theirs, ours = (ast.literal_eval(a) for a in mark.args)
                    found.append((method, theirs, ours, f"tests/{path.name}::{node.name}"))
    return sorted(found, key=lambda row: row[0].lower())


def prose(text: str) -> str:
    """Turns markdown's single backquotes into RST's double ones."""
    return text.replace("`", "``")


def differences(cls: type[Method]) -> list[str]:
    rows = [[prose(theirs), prose(ours), f"``{test}``"] for name, theirs, ours, test in marked() if name == cls.__name__]
    if not rows:
        return []
    return [*heading("Differences from peft 0.21.2"), *list_table(["peft", "here", "checked by"], rows, "40 35 25")]


def differences_table() -> str:
    rows = [[name, prose(theirs), prose(ours), f"``{test}``"] for name, theirs, ours, test in marked()]
    return "\n".join(list_table(["where", "peft 0.21.2", "here", "checked by"], rows, "12 36 30 22"))


# -- figures -----------------------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(PICTURED, PICTURED) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def matrices(cls: type[Method]) -> tuple[Tensor, Tensor] | None:
    """Returns a weight and its update for an adapter moved away from its start; ``None`` where there is no merged matrix."""
    if not cls.kinds & {"linear"} or not is_own(cls, "merge") or hasattr(cls, "wrap"):
        return None
    torch.manual_seed(0)
    with torch.no_grad():
        module = _Layer().double()
        model, params = fp.functionalize(module)
        for method in (example(cls), *cls.examples()):
            try:
                fields = {
                    f.name: {} for f in dataclasses.fields(method) if f.name.endswith("_pattern") and "layers" not in f.name
                }
                fields = {k: v for k, v in fields.items() if getattr(method, k) is not None}
                net = fp.adapt(model, dataclasses.replace(method, target_modules=("first", "second"), **fields))
                needs = net.methods[0].sample_needs(net.bases(net.entries[0], params), 0)
                adapter = perturbed(net.init(params, 0, **needs), 1, 0.2)
                merged, _ = net.merge(params, adapter)
            except (ValueError, TypeError):
                continue
            weight = params["first.weight"]
            update = merged["first.weight"] - weight
            return (weight, update) if update.any() else None
    return None


def example(cls: type[Method]) -> Method:
    """Returns an instance whose structure shows at the size of the figure."""
    shown = {
        "r": 4,
        "block_size": 8,
        "oft_block_size": 6,
        "boft_block_size": 4,
        "n_frequency": 30,
        "gralora_k": 2,
        "group_size": 8,
    }
    names = {f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{k: v for k, v in shown.items() if k in names})
    except (TypeError, ValueError):
        return cls.examples()[0]


def draw(cls: type[Method], path: Path) -> bool:
    """Draws the weight, the update, the merged weight and the update's singular values; says whether there was one."""
    found = matrices(cls)
    if found is None:
        path.unlink(missing_ok=True)
        return False
    weight, update = found
    with rc_context({"svg.hashsalt": cls.__name__, "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(9.2, 2.7))
        axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.15))
        limit = float(weight.abs().max())
        for ax, title, matrix in zip(axes, ("$W$", "$W' - W$", "$W'$"), (weight, update, weight + update), strict=False):
            own = limit if title == "$W$" else float(matrix.abs().max()) or 1.0
            ax.imshow(matrix, cmap="RdBu_r", vmin=-own, vmax=own, interpolation="nearest")
            ax.set(title=title, xticks=[], yticks=[], xlabel=f"largest entry {own:.2g}")
        values = torch.linalg.svdvals(update)
        values = values / values.max().clamp(min=1e-300)
        rank = int((values > 1e-10).sum())
        axes[3].bar(range(1, len(values) + 1), values, color="#0072B2")
        axes[3].set(title=f"$W' - W$: rank {rank}", xlabel="singular values, the largest being 1", ylim=(0, 1.05))
        axes[3].spines[["top", "right"]].set_visible(False)
        figure.subplots_adjust(left=0.02, right=0.99, bottom=0.2, top=0.86, wspace=0.18)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def generate(out: Path, write: Any) -> None:
    """Writes the table, the pages and the figures below a folder."""
    folder = out / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    for cls in classes():
        draw(cls, folder / f"{cls.__name__.lower()}.svg")
        write(folder / f"{cls.__name__.lower()}.rst", page(cls))
    for old in folder.glob("*.rst"):
        if old.stem not in {c.__name__.lower() for c in classes()}:
            old.unlink()
    write(out / "methods.rst", table_page())
    write(out / "differences.rst", differences_table())
