"""Merging: expressions into weights, measured.

Everything is computed in float64 (float32 on a device without it) and rounded once to the target dtype; the report says
what that rounding did.
Base params are never written, so keeping them is the exact undo. Imports weights, tree, errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.method import Method
from funcpeft.tree import Leaves, all_finite, register
from funcpeft.weights import Adapted, Base, Site, cast_leaves, dense, effective

_COLUMNS = {
    "update": "size of the update, |W' - W| / |W| (Frobenius)",
    "error": "largest rounding error of an entry of W'",
    "bound": "bound on |apply - merge| per unit of the largest |x|, bias aside: largest row sum of rounding errors",
    "realised": "fraction of the update that is in the stored W': <stored - W, W' - W> / |W' - W|^2",
    "swallowed": "fraction of changed entries that rounding put back to W",
}


@dataclass(frozen=True, eq=False)
class MergeReport:
    """What a merge did, per site; a tree of tensors, so that a merge under ``vmap`` gives one row per member.

    Attributes:
        sites: ``{path: {column: 0-d tensor}}``; the columns are ``update``, ``error``, ``bound``, ``realised``, ``swallowed``.
        notes: What a reader should know besides, such as tied weights that are no longer tied.
    """

    sites: dict[str, dict[str, Tensor]]
    notes: tuple[str, ...] = ()

    def worst(self, column: str) -> tuple[str, float]:
        """Returns the site with the largest (for ``realised`` the smallest) value of a column, and the value."""
        if column not in _COLUMNS:
            raise KeyError(errors.one_of("MergeReport", "column", column, _COLUMNS))
        pick = min if column == "realised" else max
        path = pick(self.sites, key=lambda p: float(self.sites[p][column]))
        return path, float(self.sites[path][column])

    def __str__(self) -> str:
        return report_table(self)


register(
    MergeReport,
    lambda r: ((r.sites,), r.notes),
    lambda notes, children: MergeReport(next(iter(children)), notes),
    lambda r: ("sites",),
)


def report_table(report: MergeReport) -> str:
    """Prints a report as a table, its columns explained below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("site", *_COLUMNS, title="merge", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for path, row in report.sites.items():
        table.add_row(path, *(_cell(row[c]) for c in _COLUMNS))
    console = Console(width=max(100, 60 + max(map(len, report.sites), default=0)), color_system=None)
    with console.capture() as text:
        console.print(table)
    lines = [text.get().rstrip(), *(f"  {name}: {meaning}" for name, meaning in _COLUMNS.items()), *report.notes]
    return "\n".join(lines)


def _cell(t: Tensor) -> str:
    values = t.reshape(-1)
    return f"{float(values[0]):.3g}" if len(values) == 1 else f"{float(values.min()):.3g} to {float(values.max()):.3g}"


def measure(base: Tensor, exact: Tensor, stored: Tensor) -> dict[str, Tensor]:
    """Compares the exact effective weight with its rounded form and with the base; all of one shape."""
    update, error = exact - base, (stored - exact).abs()
    size = update.square().sum()
    changed = update != 0
    one = torch.ones((), dtype=exact.dtype, device=exact.device)
    realised = torch.where(size > 0, ((stored - base) * update).sum() / torch.where(size > 0, size, one), one)
    rows = error.flatten(0, -2) if error.ndim > 1 else error[:, None] if error.ndim else error[None, None]
    norm = base.square().sum().sqrt()
    return {
        "update": size.sqrt() / torch.where(norm > 0, norm, one),
        "error": error.amax() if error.numel() else 0 * one,
        "bound": rows.sum(-1).amax() if rows.numel() else 0 * one,
        "realised": realised,
        "swallowed": (changed & (stored == base)).sum() / changed.sum().clamp(min=1),
    }


def stored_as(site: Site, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a matrix in the layout and dtype in which the site stores its weight."""
    return site.kind.stored(matrix, site.shape).to(dtype).contiguous()


def merge_site(
    expr: Adapted, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Merges one site: stored weight, bias (``None`` if it has none), and the measures.

    Raises:
        ValueError: If the merged weight or bias is not finite.
    """
    site, base = expr.site, innermost(expr)
    precise = _precise(expr.device)
    matrix, new_bias = effective(widened(expr, precise), site, None if bias is None else bias.to(precise))
    for name, value in (("weight", matrix), ("bias", new_bias)):
        if value is not None and not all_finite(value):
            raise ValueError(
                errors.say(
                    f"merge at {site.path!r}",
                    f"the merged {name} must be finite",
                    "NaN or infinity",
                    "the adapter or the base is broken there",
                )
            )
    stored = stored_as(site, matrix, dtype or expr.dtype)
    back = site.kind.matrix(stored).to(matrix.dtype)
    measures = measure(site.kind.matrix(dense(base)).to(matrix.dtype), matrix, back)
    return stored, None if new_bias is None else new_bias.to(dtype or expr.dtype), measures


def unmerge_site(
    method: Method, leaves: Leaves, site: Site, stored: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Inverts a merge at one site: the stored weight and the bias as they were, in their dtypes."""
    precise = _precise(stored.device)
    merged = Base(site, stored.to(precise), None if bias is None else bias.to(precise))
    base = method.unmerge(cast_leaves(leaves, precise), merged)
    back = base.bias if bias is not None else None
    return stored_as(site, base.weight, stored.dtype), None if back is None or bias is None else back.to(bias.dtype, copy=True)


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def widened(expr: Any, dtype: torch.dtype) -> Any:
    """Returns an expression whose base and leaves are in one dtype."""
    if isinstance(expr, Adapted):
        return replace(expr, base=widened(expr.base, dtype), leaves=cast_leaves(expr.leaves, dtype))
    return dense(expr).to(dtype)


def innermost(expr: Any) -> Any:
    """Returns the expression below every method."""
    while isinstance(expr, Adapted):
        expr = expr.base
    return expr


def merge_params(
    plain: Mapping[str, Any], attached: Mapping[str, Any], dtype: torch.dtype | None
) -> tuple[dict[str, Any], MergeReport]:
    """Merges a tree of params with expressions: every ``Adapted`` leaf becomes a tensor, all others are shared."""
    merged, rows, notes = dict(attached), {}, []
    untouched = {id(v) for v in plain.values()}
    for key, expr in attached.items():  # first what is replaced whole, since a weight's method may change its bias then
        if not isinstance(expr, Adapted) and id(expr) not in untouched:
            merged[key] = expr.to(dtype or expr.dtype, copy=True)
    for key, expr in attached.items():
        if not isinstance(expr, Adapted):
            continue
        site = expr.site
        bias = None if site.bias is None else dense(attached[site.bias])
        merged[key], new_bias, rows[site.path] = merge_site(expr, bias, dtype)
        if new_bias is not None and site.bias is not None:
            merged[site.bias] = new_bias
    for key in attached.keys() - plain.keys():
        notes.append(f"{key!r} was tied and now has a tensor of its own")
    return merged, MergeReport(rows, tuple(sorted(notes)))
