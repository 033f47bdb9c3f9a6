"""The site table of a net, and what its init makes in shapes alone. Imports facts, tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from funcpeft.facts import ModelFacts
from funcpeft.storage import Quantized
from funcpeft.tree import Adapter

if TYPE_CHECKING:
    from funcpeft.adapt import Net
    from funcpeft.entries import Entry


def net_table(net: Net, params: Mapping[str, Any] | None = None) -> str:
    """Prints the site table: path, kind, shape, method, how the weight is used and, given params, how it is stored."""
    from rich.console import Console
    from rich.table import Table

    table = Table("site", "kind", "shape", "dtype", "method", "trained", "weight is", title=repr(net), title_justify="left")
    if params is not None:
        table.add_column("stored as")
    total = 0
    for entry in net.entries:
        counts = trainable_counts(net, entry)
        for path, site in entry.sites.items():
            shape = " x ".join(map(str, site.shape))
            use = "met" if site.met else "replaced" if entry.method.takes_any else "read by its module"
            table.add_row(
                path,
                site.kind.name,
                shape,
                str(site.dtype).removeprefix("torch."),
                type(entry.method).__name__,
                _count(counts.get(path)),
                use,
                *stored_as(net, params, site.weight),
            )
        for scope in counts.keys() - entry.sites.keys():
            table.add_row(
                scope or "(shared)",
                "",
                "",
                "",
                type(entry.method).__name__,
                _count(counts[scope]),
                "wraps the call" if not entry.method.sited else "",
            )
        total += sum(counts.values())
    width = max(100, (70 if params is None else 120) + max((len(p) for e in net.entries for p in e.sites), default=0))
    console = Console(width=width, color_system=None, force_jupyter=False)
    with console.capture() as text:
        console.print(table)
    base = sum(s.numel() for k, s in net.model.shapes.items() if k not in net.model.buffers)
    return text.get().rstrip() + f"\n{total:,} trained numbers, {100 * total / max(base, 1):.3g}% of the base's {base:,}"


def stored_as(net: Net, params: Mapping[str, Any] | None, key: str) -> tuple[str, ...]:
    """Says how a leaf is stored; nothing without params."""
    if params is None:
        return ()
    leaf = params[key if key in params else net.model.ties[key]]
    return (str(leaf.format) if isinstance(leaf, Quantized) else "dense",)


def _count(n: int | None) -> str:
    return "shared" if n is None else f"{n:,}"


def trainable_counts(net: Net, entry: Entry) -> dict[str, int]:
    """Counts the trained numbers by path, from shapes alone."""
    return {path: sum(t.numel() for t in leaves.values()) for path, leaves in shapes_of(net, entry).params.items()}


def shapes_of(net: Net, entry: Entry, **needs: Any) -> Adapter:
    """Returns what init makes for an entry, without values: it runs on the meta device; ``needs`` as init takes them."""
    params = {k: torch.empty(s, dtype=net.model.dtypes[k], device="meta") for k, s in net.model.shapes.items()}
    with torch.device("meta"):
        extra: dict[str, Any] = {**needs, "facts": ModelFacts(net.model, params)} if entry.method.wraps else needs
        if entry.method.sited and entry.method.needs:  # data there is none here; shapes are those of a file
            extra = {**extra, "inference_mode": True}
        return entry.method.init(net.bases(entry, params), seed=0, **extra)
