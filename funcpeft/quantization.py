"""Quantizing a tree of params and back: chosen leaves become ``Quantized``, all others are shared.

Imports targets, functional, quant, storage, tree, errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from tqdm import tqdm

from funcpeft import errors, layers, targets
from funcpeft.functional import Model, Params
from funcpeft.method import Method, pattern_matches
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized
from funcpeft.tree import NAMESPACE, register
from funcpeft.weights import dense

Formats = Format | Mapping[str, Format | None]


def quantize(
    model: Model,
    params: Params,
    format: Formats,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    misfits: str = "raise",
    progress: bool | None = None,
) -> Params:
    """Stores the weights of chosen layers in a format.

    Args:
        model: The model that the params are for.
        params: Its leaves; not changed.
        format: A format such as ``NF4()``; or formats by pattern of the module path, as in ``rank_pattern``: the first that
            matches wins, ``None`` leaves a layer dense, and every target must have one.
        target_modules: Which layers, by peft's rules.
        exclude_modules: Which of them to leave dense.
        misfits: ``"raise"``, or ``"dense"`` to leave weights dense whose shape does not fit the format.
        progress: Whether to show a bar on stderr; by default on a terminal.

    Returns:
        New params; leaves that stay dense are shared with the argument. ``quantization_report(params, new)`` has the bytes
        and the error of each.

    Raises:
        CannotRequantizeError: If the format cannot be made from a weight.
        NoMatchError: If a rule or a pattern matches nothing.
        TypeError: If a target is not a layer with a matrix, or its leaf is already ``Quantized``.
        ValueError: If a weight does not fit the format; the message names the site.
    """
    _require_arguments(model, format, misfits)
    model.check(params)
    chosen = _chosen(model, _rule(target_modules, exclude_modules), format)
    plan = _by_leaf(model, params, chosen)
    fitting = [(path, key, fmt) for path, key, fmt in plan if _takes(path, params[key], fmt, misfits)]
    out = dict(params)
    for path, key, fmt in tqdm(fitting, desc="quantize", unit="weight", disable=None if progress is None else not progress):
        try:
            out[key] = fmt.requant(params[key])
        except ValueError as e:
            raise type(e)(f"quantize at {path!r}: {e}") from e
    model.prepare(frozenset(k for k, v in out.items() if isinstance(v, Quantized)))
    return out


def _require_arguments(model: Model, format: Formats, misfits: str) -> None:
    formats = list(format.values()) if isinstance(format, Mapping) else [format]
    for one in formats:
        if not (isinstance(one, Format) or (one is None and isinstance(format, Mapping))):
            raise TypeError(
                errors.say("quantize", "a format is required", type(one).__name__, "pass an instance such as NF4()")
            )
    if not isinstance(model, Model):
        found, remedy = type(model).__name__, "the model comes first, then params"
        raise TypeError(errors.say("quantize", "a Model is required", found, remedy))
    if misfits not in ("raise", "dense"):
        raise ValueError(errors.one_of("quantize", "misfits", misfits, ("raise", "dense")))


def _rule(target_modules: str | Sequence[str], exclude_modules: str | Sequence[str] | None) -> Method:
    def frozen(names: Any) -> Any:
        return names if names is None or isinstance(names, str) else tuple(names)

    return Method(target_modules=frozen(target_modules), exclude_modules=frozen(exclude_modules))


def _by_leaf(model: Model, params: Params, chosen: Mapping[str, Format | None]) -> list[tuple[str, str, Format]]:
    """Returns path, key and format of every leaf that is to be stored, once where several layers share it.

    Raises:
        ValueError: If layers that share a leaf are to be stored differently.
    """
    first: dict[str, str] = {}
    for path, fmt in chosen.items():
        same = first.setdefault(_key(model, params, path), path)
        if chosen[same] != fmt:
            rule = f"must be stored as {same!r} is, to whose weight it is tied: {chosen[same] or 'dense'}"
            raise ValueError(errors.say(f"quantize at {path!r}", rule, fmt or "dense", "or untie it with a leaf of its own"))
    return [(path, key, fmt) for key, path in first.items() if (fmt := chosen[path]) is not None]


def _chosen(model: Model, rule: Method, format: Formats) -> dict[str, Format | None]:
    """Returns the format of every target by path, ``None`` where it stays dense."""
    paths = list(targets.target_paths(model, rule))
    if isinstance(format, Format):
        return dict.fromkeys(paths, format)
    for pattern in format:
        if not any(pattern_matches(pattern, path) for path in paths):
            raise errors.NoMatchError(
                errors.say("quantize", "every pattern must match a target", repr(pattern), errors.nearest(pattern, paths))
            )
    found: dict[str, Format | None] = {}
    winners: set[str] = set()
    for path in paths:
        pattern = next((p for p in format if pattern_matches(p, path)), None)
        if pattern is None:
            rule_, remedy = "a pattern must name every target", "add '.*' with the format of all others, or None"
            raise errors.NoMatchError(errors.say(f"quantize at {path!r}", rule_, errors.listed(format), remedy))
        winners.add(pattern)
        found[path] = format[pattern]
    for pattern in format:
        if pattern not in winners:
            rule_, remedy = "every pattern must be the first that matches some target", "put it before the more general one"
            raise errors.NoMatchError(errors.say("quantize", rule_, repr(pattern), remedy))
    return found


def _key(model: Model, params: Params, path: str) -> str:
    module = model.root.get_submodule(path)
    if layers.kind_of(module) is None:
        found = type(module).__name__
        raise TypeError(errors.say(f"quantize at {path!r}", "a layer with a matrix is required", found))
    key = f"{path}.weight"
    return key if key in params else model.ties[key]  # params may carry an alias, which unties it


def _takes(path: str, leaf: Any, fmt: Format, misfits: str) -> bool:
    """Whether a leaf is to be stored; checks it before any work."""
    if isinstance(leaf, Quantized):
        remedy = "call dequantize first"
        raise TypeError(errors.say(f"quantize at {path!r}", "a dense weight is required", "a Quantized leaf", remedy))
    reason = fmt.misfit(leaf.shape)
    if reason is None:
        return True
    if misfits == "raise":
        remedy = "leave it out with exclude_modules, or pass misfits='dense'"
        raise ValueError(errors.say(f"quantize at {path!r}: {fmt.label}", reason, tuple(leaf.shape), remedy))
    return False


def dequantize(params: Params) -> Params:
    """Returns params in which every ``Quantized`` leaf is the dense weight it stands for; others are shared."""
    return {k: dense(v) if isinstance(v, Quantized) else v for k, v in params.items()}


# -- what it did ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QuantizationReport:
    """What storing weights as codes saved and cost, per leaf.

    Attributes:
        sites: ``{key of the leaf: {column: 0-d tensor}}``; the columns are ``before`` and ``after``, in bytes, ``rel_error``,
            ``|stored - W| / |W|`` (Frobenius), ``max_error``, the largest error of an entry, and ``steps``, that error in units
            of ``step``, its bound.
        formats: The format of each, as text.
        rest: Bytes of the leaves that are not stored, once each.
    """

    sites: dict[str, dict[str, Tensor]]
    formats: tuple[str, ...]
    rest: int

    def total(self, column: str) -> int:
        """Returns the bytes of all leaves, ``"before"`` or ``"after"``, those that are not stored included."""
        if column not in ("before", "after"):
            raise KeyError(errors.one_of("QuantizationReport", "column", column, ("before", "after")))
        return self.rest + sum(int(row[column]) for row in self.sites.values())

    def __str__(self) -> str:
        return _report_table(self)


register(
    QuantizationReport,
    lambda r: ((r.sites,), (r.formats, r.rest)),
    lambda static, children: QuantizationReport(next(iter(children)), *static),
    lambda r: ("sites",),
)


def quantization_report(before: Params, after: Params) -> QuantizationReport:
    """Compares params with their quantized form.

    Args:
        before: Dense params.
        after: What ``quantize`` made of them, or params of the same keys and shapes from anywhere.

    Raises:
        KeyError: If the keys differ.
        ValueError: If a leaf has another shape.
    """
    if before.keys() != after.keys():
        apart = errors.listed(sorted(before.keys() ^ after.keys()))
        raise errors.NameMissingError(errors.say("quantization_report", "both params must have the same keys", apart))
    rows: dict[str, dict[str, Tensor]] = {}
    formats: list[str] = []
    for key, leaf in after.items():
        if isinstance(leaf, Quantized):
            rows[key] = _row(key, before[key], leaf)
            formats.append(str(leaf.format))
    rest = {id(v): v.nbytes for k, v in after.items() if k not in rows}
    return QuantizationReport(rows, tuple(formats), sum(rest.values()))


def _row(key: str, weight: Any, leaf: Quantized) -> dict[str, Tensor]:
    if weight.shape != leaf.shape:
        rule = f"the shape must be {tuple(leaf.shape)}"
        raise ValueError(errors.say(f"quantization_report at {key!r}", rule, tuple(weight.shape)))
    was = dense(weight).to(torch.float64)
    error, norm = dense(leaf).to(torch.float64) - was, was.square().sum().sqrt()
    largest = error.abs().amax() if error.numel() else torch.zeros((), dtype=torch.float64)
    row = {
        "before": torch.tensor(weight.nbytes),
        "after": torch.tensor(leaf.nbytes),
        "rel_error": error.square().sum().sqrt() / norm.where(norm > 0, 1),
        "max_error": largest,
    }
    if not leaf.format.decode_only and error.numel():
        step = leaf.format.step(leaf).to(torch.float64)
        row["steps"] = (error.abs() / step.where(step > 0, torch.inf)).amax()
    return row


def _report_table(report: QuantizationReport) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table("leaf", "format", "bytes before", "after", "rel. error", "max. error", "in steps", title="quantization")
    for column in table.columns[2:]:
        column.justify = "right"
    for (key, row), fmt in zip(report.sites.items(), report.formats, strict=True):
        errors_ = (f"{float(row[c]):.3g}" if c in row else "" for c in ("rel_error", "max_error", "steps"))
        table.add_row(key, fmt, f"{int(row['before']):,}", f"{int(row['after']):,}", *errors_)
    if report.rest:
        table.add_row("(all others)", "dense", f"{report.rest:,}", f"{report.rest:,}", "", "", "")
    before, after = report.total("before"), report.total("after")
    wide = max([100, *(90 + len(k) + len(f) for k, f in zip(report.sites, report.formats, strict=True))])
    console = Console(width=wide, color_system=None, force_jupyter=False)
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip() + f"\n{before:,} bytes before, {after:,} after, {before / max(after, 1):.2f} times smaller"


# -- devices and dtypes --------------------------------------------------------------------------------------------------------


def to(
    tree: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, model: Model | None = None
) -> Any:
    """Returns a tree on another device and or in another floating dtype.

    Args:
        tree: Params, an adapter, or any tree of tensors and ``Quantized`` leaves; not changed.
        device: Where every tensor goes.
        dtype: Floating dtype.
        model: If the tree is its params, buffers (the frequencies of rotary embeddings, say) keep their dtype, as they do
            when transformers loads a model in a dtype.

    A device maps over every tensor. A dtype casts floating tensors and leaves integers alone; of a ``Quantized`` leaf it
    changes the dtype of the decoded weight and none of the codes and scales, which would move the weight.

    Raises:
        ValueError: If ``dtype`` is not floating.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(errors.say("to", "dtype must be a floating dtype", dtype))

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return leaf.to(device=device, dtype=dtype)
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    moved = optree.tree_map(move, tree, is_leaf=lambda x: isinstance(x, Quantized), namespace=NAMESPACE)
    kept = () if model is None else model.buffers & moved.keys()
    return moved if not kept else {**moved, **{key: tree[key].to(device=device) for key in kept}}
