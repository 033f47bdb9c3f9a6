"""Gradients and norms of single examples: closed form, vmap and a loop; ``python tests/benchmarks/per_example.py``.

A Llama with LoRA on all linear layers, next-token loss. Columns are median milliseconds of interleaved rounds and the most
bytes allocated at once during a call. The limit is the gradient of the whole batch; opacus, where it is installed, runs on
the same layers as peft makes them (hooks on lora_A and lora_B). Ratios are what to read, since machines differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import medians
from quantized import llama, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

import funcpeft as fp
from funcpeft.perexample import clipped_grads, per_example_grads, per_example_norms

warnings.filterwarnings("ignore")

Call = Callable[[], Any]


def losses(out: Any, ids: Tensor) -> Tensor:
    """Returns the mean cross-entropy of every row."""
    logits = out.logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)


def calls(hidden: int, layers: int, batch: int, tokens: int, r: int) -> dict[str, Call]:
    """Returns the ways to get them, the whole batch's gradient first."""
    ids = torch.randint(512, (batch, tokens), generator=torch.Generator().manual_seed(1))
    model, params = fp.functionalize(llama(hidden, layers))
    net = fp.adapt(model, fp.LoRA(r=r, target_modules="all-linear", init_lora_weights=False))
    adapter = net.init(params, seed=0)
    whole = fp.value_and_grad(lambda a: losses(net(params, a, input_ids=ids, use_cache=False), ids).sum())

    def by(function: Callable[..., Any], **options: Any) -> Call:
        return lambda: function(net, params, adapter, losses, targets=ids, input_ids=ids, use_cache=False, **options)

    return {
        "whole batch": lambda: whole(adapter),
        "grads, closed": by(per_example_grads, method="closed"),
        "grads, vmap": by(per_example_grads, method="vmap"),
        "grads, loop": by(per_example_grads, method="loop"),
        "norms, closed": by(per_example_norms, method="closed"),
        "norms, vmap": by(per_example_norms, method="vmap"),
        "clipped sum, closed": by(clipped_grads, method="closed", max_norm=1.0),
        **opacus_calls(hidden, layers, ids, r),
    }


def opacus_calls(hidden: int, layers: int, ids: Tensor, r: int) -> dict[str, Call]:
    """Returns opacus' ways, on the LoRA layers that peft makes; none where it is not installed."""
    if importlib.util.find_spec("opacus") is None:
        return {}
    import peft
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    def wrapped() -> Any:
        config = peft.LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(llama(hidden, layers), config).train()

    by_hooks = GradSampleModule(wrapped(), loss_reduction="sum")
    ghost = GradSampleModuleFastGradientClipping(wrapped(), max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum")

    def grads() -> list[Tensor]:
        by_hooks.zero_grad(set_to_none=True)
        losses(by_hooks(input_ids=ids, use_cache=False), ids).sum().backward()
        found = [p.grad_sample for p in by_hooks.parameters() if p.requires_grad]
        for p in by_hooks.parameters():
            p.grad_sample = None
        return found

    def norms() -> Tensor:
        ghost.zero_grad(set_to_none=True)
        losses(ghost(input_ids=ids, use_cache=False), ids).sum().backward()
        return ghost.get_norm_sample()

    return {"grads, opacus": grads, "norms, opacus ghost": norms}


def main() -> None:
    """Prints the table, and writes the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    shapes = [(128, 4, 16, 32, 8), (256, 4, 8, 128, 8), (512, 6, 8, 128, 8)]
    table = Table("hidden, layers, batch, tokens, r", "", "ms", "/ whole", "peak MiB", "/ whole", title="per-example gradients")
    figures = []
    for shape in shapes[:1] if given.quick else shapes:
        ways = calls(*shape)
        ms = medians(ways, given.rounds)
        peaks = {name: peak_bytes(call) for name, call in ways.items()}
        for i, name in enumerate(ways):
            ratios = ms[name] / ms["whole batch"], peaks[name] / peaks["whole batch"]
            row = [", ".join(map(str, shape)) if i == 0 else "", name, f"{ms[name]:.0f}", f"{ratios[0]:.2f}"]
            table.add_row(*row, f"{peaks[name] / 2**20:.1f}", f"{ratios[1]:.2f}")
            figures.append({"shape": shape, "way": name, "ms": ms[name], "peak_bytes": peaks[name]})
        table.add_section()
    Console(width=120).print(table)
    if given.json:
        given.json.write_text(json.dumps({"torch": torch.__version__, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
