"""Loading and merging 1, 10 and 100 adapters against peft: ``python tests/benchmarks/adapters.py``.

The adapters are LoRA r=8 on all linear layers of a four-layer Llama, saved by peft. Loading is ``fp.load_peft`` of every
folder against ``PeftModel.from_pretrained`` for the first and ``load_adapter`` for the others, on a fresh copy of the module
that is made untimed. Merging gives the base with every adapter merged in turn: ``net.merge``, which sums in float64 and reports
what rounding did, against ``merge_adapter`` and ``unmerge_adapter``, without which peft's next merge would add to the last; the
bare sum ``W + s B A`` in float32 is the limit. Both merges are compared before anything is timed. Writes adapters.json.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Call, Figures, interleaved, machine, options, parser, quiet, summary, write_json
from quantized import llama
from rich.console import Console
from rich.table import Table

import funcpeft as fp


def saved(module: Any, count: int, folder: Path) -> list[str]:
    """Saves adapters with peft, and returns their folders."""
    import peft

    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    paths = []
    for i in range(count):
        torch.manual_seed(i)
        paths.append(str(folder / str(i)))
        peft.get_peft_model(copy.deepcopy(module), config).save_pretrained(paths[-1])
    return paths


class Loaded:
    """The same adapters loaded by both, and the ways to load and to merge them."""

    def __init__(self, module: Any, paths: Sequence[str]) -> None:
        self.module, self.paths, self.names = module, list(paths), [f"adapter{i}" for i in range(len(paths))]
        self.model, self.params = fp.functionalize(module)
        self.copied()
        self.theirs = self.load_theirs()
        self.ours = self.load_ours()

    def copied(self) -> None:
        """Makes the copy of the module that peft's next loading will change."""
        self.fresh = copy.deepcopy(self.module)

    def load_theirs(self) -> Any:
        """Loads with peft."""
        import peft

        wrapped = peft.PeftModel.from_pretrained(self.fresh, self.paths[0], adapter_name=self.names[0])
        for path, name in zip(self.paths[1:], self.names[1:], strict=True):
            wrapped.load_adapter(path, adapter_name=name)
        return wrapped

    def load_ours(self) -> list[tuple[fp.Net, Any]]:
        """Loads with this package."""
        return [fp.load_peft(self.model, self.params, path) for path in self.paths]

    def merge_theirs(self) -> None:
        """Merges every adapter and takes it out again."""
        for name in self.names:
            self.theirs.merge_adapter([name])
            self.theirs.unmerge_adapter()

    def merge_ours(self) -> None:
        """Merges every adapter, one result at a time."""
        for net, adapter in self.ours:
            net.merge(self.params, adapter)

    def merge_barely(self) -> None:
        """Sums what a merge has to sum, and no more."""
        for net, adapter in self.ours:
            for path, site in net.entries[0].sites.items():
                leaves = adapter.leaves(path)
                torch.addmm(self.params[site.weight], leaves["B"], leaves["A"], alpha=float(leaves["scaling"]))

    def require_equal(self) -> None:
        """Raises ``AssertionError`` unless both merge the last adapter to the same weights."""
        net, adapter = self.ours[-1]
        merged = net.merge(self.params, adapter)[0]
        self.theirs.merge_adapter([self.names[-1]])
        for path, site in net.entries[0].sites.items():
            want = self.theirs.base_model.model.get_submodule(path).base_layer.weight
            torch.testing.assert_close(merged[site.weight], want.detach(), rtol=1e-5, atol=1e-6)
        self.theirs.unmerge_adapter()


def measured(module: Any, paths: Sequence[str], rounds: int) -> Figures:
    """Measures loading and merging of these adapters."""
    both = Loaded(module, paths)
    both.require_equal()
    found: Figures = {"adapters": len(paths)}
    loading: dict[str, Call] = {"peft": both.load_theirs, "funcpeft": both.load_ours}
    merging: dict[str, Call] = {"peft": both.merge_theirs, "funcpeft": both.merge_ours, "bare sum": both.merge_barely}
    with torch.no_grad():
        samples = {"load": interleaved(loading, rounds, {"peft": both.copied}), "merge": interleaved(merging, rounds)}
    for what, each in samples.items():
        found[what] = {name: summary(s) for name, s in each.items()}
        for way in found[what].values():
            way["over_peft"] = found[what]["peft"]["ms"] / way["ms"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes the figures."""
    given = options(parser(__doc__, 5), argv)
    counts, hidden = ((1, 2), 16) if given.quick else ((1, 10, 100), 256)
    figures: Figures = {"machine": machine(), "hidden": hidden, "counts": []}
    table = Table("adapters", "", "", "ms", "ms each", "peft /", title=f"load and merge, Llama of hidden size {hidden}")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        module = llama(hidden, 4)
        paths = saved(module, max(counts), Path(folder))
        for count in counts:
            found = measured(module, paths[:count], given.rounds)
            figures["counts"].append(found)
            for what in ("load", "merge"):
                for i, (name, way) in enumerate(found[what].items()):
                    where = (str(count) if what == "load" else "", what) if i == 0 else ("", "")
                    table.add_row(*where, name, f"{way['ms']:.1f}", f"{way['ms'] / count:.2f}", f"{way['over_peft']:.2f}")
            table.add_section()
    Console(width=128).print(table)
    write_json(given.out / "adapters.json", figures)


if __name__ == "__main__":
    main()
