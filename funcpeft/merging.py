"""Merging: expressions into weights, measured.

Everything is computed in float64 (float32 on a device without it) and rounded once, to the target dtype or to a format; the
report says what that rounding did. Storing a merged weight as codes again can lose most of a small update, so it happens on
request alone and a loss beyond a threshold is an error. Base params are never written, so keeping them is the exact undo.
Imports quant, weights, tree, errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.method import Method
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized
from funcpeft.tree import Leaves, all_finite, register
from funcpeft.weights import Adapted, Base, Site, cast_leaves, dense, effective

_COLUMNS = {
    "update": "size of the update, |W' - W| / |W| (Frobenius)",
    "error": "largest rounding error of an entry of W'",
    "bound": "bound on |apply - merge| per unit of the largest |x|, bias aside: largest row sum of rounding errors",
    "realised": "fraction of the update that is in the stored W': <stored - W, W' - W> / |W' - W|^2",
    "swallowed": "fraction of changed entries that rounding put back to W",
}
_STORED_COLUMNS = {
    "rel_error": "|stored - W'| / |W'| (Frobenius) of a weight stored as codes",
    "changed_codes": "fraction of entries whose stored value changed; on the same grid, whose code did",
    "clipped": "fraction of entries beyond the grid",
}
_ALL_COLUMNS = {**_COLUMNS, **_STORED_COLUMNS}

#: What ``target`` may be besides a format, and what becomes of a site that would lose too much.
TARGETS = ("dense", "requantize", "refit")
BELOW = ("raise", "dense")


@dataclass(frozen=True)
class Target:
    """How merged weights are stored.

    Attributes:
        form: ``"dense"``; ``"requantize"``, a quantized base's own grid; ``"refit"``, its format with a new grid; or a format.
        min_realised: The least fraction of the update that must survive, ``None`` for no limit.
        below: What to do at a site below it: ``"raise"`` or ``"dense"``.
        dtype: dtype of dense results, ``None`` for each weight's own.
    """

    form: str | Format = "dense"
    min_realised: float | None = 0.9
    below: str = "raise"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.form, Format) and self.form not in TARGETS:
            raise ValueError(
                errors.say("merge", f"target must be one of {errors.listed(TARGETS)} or a format", repr(self.form))
            )
        least = self.min_realised
        if least is not None and (isinstance(least, bool) or not isinstance(least, int | float) or not math.isfinite(least)):
            raise ValueError(errors.say("merge", "min_realised must be a finite number or None", repr(least)))
        if self.below not in BELOW:
            raise ValueError(errors.one_of("merge", "below", self.below, BELOW))

    def store(self, exact: Tensor, base: Any) -> Quantized | None:
        """Stores a weight as this target says; ``None`` where that is a dense tensor."""
        if isinstance(self.form, Format):
            made = self.form.requant(exact)
            return replace(made, dtype=base.dtype)
        if self.form == "dense" or not isinstance(base, Quantized):
            return None
        if self.form == "requantize":
            return base.format.requant(exact, like=base)
        return replace(base.format.requant(exact), dtype=base.dtype)


@dataclass(frozen=True, eq=False)
class MergeReport:
    """What a merge did, per site; a tree of tensors, so that a merge under ``vmap`` gives one row per member.

    Attributes:
        sites: ``{path: {column: 0-d tensor}}``; the columns are ``update``, ``error``, ``bound``, ``realised``, ``swallowed``,
            and where the result is stored as codes ``rel_error``, ``changed_codes``, ``clipped``.
        notes: What a reader should know besides, such as tied weights that are no longer tied.
    """

    sites: dict[str, dict[str, Tensor]]
    notes: tuple[str, ...] = ()

    def worst(self, column: str) -> tuple[str, float]:
        """Returns the site with the largest (for ``realised`` the smallest) value of a column, and the value."""
        if column not in _ALL_COLUMNS:
            raise KeyError(errors.one_of("MergeReport", "column", column, _ALL_COLUMNS))
        having = [p for p, row in self.sites.items() if column in row]
        if not having:
            raise ValueError(errors.say("MergeReport", f"a site with column {column!r} is required", "none"))
        pick = min if column == "realised" else max
        path = pick(having, key=lambda p: float(self.sites[p][column]))
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

    columns = {n: m for n, m in _ALL_COLUMNS.items() if n in _COLUMNS or any(n in row for row in report.sites.values())}
    table = Table("site", *columns, title="merge", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for path, row in report.sites.items():
        table.add_row(path, *(_cell(row[c]) if c in row else "" for c in columns))
    wide = max(100, 20 + 11 * len(columns) + max(map(len, report.sites), default=0))
    console = Console(width=wide, color_system=None, force_jupyter=False)
    with console.capture() as text:
        console.print(table)
    lines = [text.get().rstrip(), *(f"  {name}: {meaning}" for name, meaning in columns.items()), *report.notes]
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


@dataclass(frozen=True, eq=False)
class Merged:
    """One merged site: its leaf, its bias (``None`` if it has none), the measures, and a note if there is one."""

    leaf: Any
    bias: Tensor | None
    measures: dict[str, Tensor]
    note: str = ""


def merge_site(expr: Adapted, bias: Tensor | None, target: Target) -> Merged:
    """Merges one site.

    Raises:
        CannotRequantizeError: If its format cannot be made from a weight.
        LostUpdateError: If storing it loses more of the update than the target allows.
        ValueError: If the merged weight or bias is not finite, or does not fit the target's format.
    """
    site, base = expr.site, innermost(expr)
    precise = _precise(expr.device)
    matrix, new_bias = effective(widened(expr, precise), site, None if bias is None else bias.to(precise))
    _require_finite(site, matrix, new_bias)
    dtype = target.dtype or expr.dtype
    if new_bias is not None:
        new_bias = new_bias.to(dtype)
        _require_held(site, "bias", new_bias)
    before = site.kind.matrix(dense(base)).to(matrix.dtype)
    stored = _store(site, matrix, base, target)
    note = ""
    if stored is not None:
        stored = replace(stored, dtype=dtype)
        decoded = dense(stored)
        _require_held(site, "weight", decoded)
        back = site.kind.matrix(decoded).to(matrix.dtype)
        clipped = stored.format.clipped(site.kind.stored(matrix, site.shape), stored)
        measures = {**measure(before, matrix, back), **_stored_measures(matrix, before, back), "clipped": clipped}
        lost = _loss(measures["realised"], target)
        if lost is None:
            return Merged(stored, new_bias, measures)
        if target.below == "raise":
            raise errors.LostUpdateError(_lost(site, stored, lost, target))
        note = f"{site.path!r} is dense: stored as {stored.format} it would realise {lost:.3g} of its update"
    leaf = stored_as(site, matrix, dtype)
    _require_held(site, "weight", leaf)
    return Merged(leaf, new_bias, measure(before, matrix, site.kind.matrix(leaf).to(matrix.dtype)), note)


def _require_finite(site: Site, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not all_finite(value):
            raise ValueError(
                errors.say(
                    f"merge at {site.path!r}",
                    f"the merged {name} must be finite",
                    "NaN or infinity",
                    "the adapter or the base is broken there",
                )
            )


def _require_held(site: Site, name: str, stored: Tensor) -> None:
    if not all_finite(stored):
        rule, found = f"the merged {name} must be within the range of {stored.dtype}", "a larger one"
        raise ValueError(errors.say(f"merge at {site.path!r}", rule, found, "pass dtype=torch.float32 or bfloat16"))


def _store(site: Site, matrix: Tensor, base: Any, target: Target) -> Quantized | None:
    try:
        return target.store(site.kind.stored(matrix, site.shape), base)
    except ValueError as e:
        raise type(e)(f"merge at {site.path!r}: {e}") from e


def _stored_measures(matrix: Tensor, before: Tensor, back: Tensor) -> dict[str, Tensor]:
    norm = matrix.square().sum().sqrt()
    return {
        "rel_error": (back - matrix).square().sum().sqrt() / norm.where(norm > 0, 1),
        "changed_codes": (back != before).to(matrix.dtype).mean(),
    }


def _loss(realised: Tensor, target: Target) -> float | None:
    """Returns the realised fraction if it is below the target's limit.

    Raises:
        TypeError: Under ``vmap``, where it cannot be looked at.
    """
    if target.min_realised is None:
        return None
    try:
        value = float(realised)
    except RuntimeError as e:
        rule = "whether an update survives requantizing cannot be seen under a transform"
        remedy = "merge member by member, merge dense, or pass min_realised=None and read report.sites[...]['realised']"
        raise TypeError(errors.say("merge", rule, None, remedy)) from e
    return None if value >= target.min_realised else value  # NaN is a loss


def _lost(site: Site, stored: Quantized, realised: float, target: Target) -> str:
    rule = f"at least {target.min_realised} of the update must survive being stored as {stored.format}"
    remedy = "merge with target='dense', let such sites be dense with below='dense', or lower min_realised"
    return errors.say(f"merge at {site.path!r}", rule, f"{realised:.3g}", remedy)


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
    plain: Mapping[str, Any], attached: Mapping[str, Any], ties: Mapping[str, str], target: Target
) -> tuple[dict[str, Any], MergeReport]:
    """Merges a tree of params with expressions: every ``Adapted`` leaf becomes a stored weight, all others are shared."""
    merged, rows, notes = dict(attached), {}, []
    untouched = {id(v) for v in plain.values()}
    for key, expr in attached.items():  # first what is replaced whole, since a weight's method may change its bias then
        if not isinstance(expr, Adapted) and id(expr) not in untouched:
            merged[key] = expr.to(target.dtype or expr.dtype, copy=True)
    for key, expr in attached.items():
        if not isinstance(expr, Adapted):
            continue
        site = expr.site
        held = site.bias if site.bias in attached else ties.get(site.bias or "")
        bias = None if held is None else dense(attached[held])
        one = merge_site(expr, bias, target)
        kept = isinstance(one.leaf, Tensor) and one.leaf._base is expr.base  # a method of biases returns a view of the weight
        merged[key], rows[site.path] = expr.base if kept else one.leaf, one.measures
        if one.bias is not None and bias is not None and site.bias is not None:
            tied = held != site.bias and torch.equal(one.bias, bias.to(one.bias.dtype))  # then its owner's tensor serves it too
            merged |= {} if tied else {site.bias: one.bias}
        if one.note:
            notes.append(one.note)
    for key in attached.keys() - plain.keys():
        notes.append(f"{key!r} was tied and now has a tensor of its own")
    return merged, MergeReport(rows, tuple(sorted(notes)))
