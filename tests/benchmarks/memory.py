"""Memory of a training step against peft: ``python tests/benchmarks/memory.py``.

1. Recomputed blocks: ``functionalize(module, remat=True)`` under ``value_and_grad`` and ``torch.func.grad`` against peft with
   ``gradient_checkpointing_enable()``, the same Llama, adapter and batch; all of them without it too. Gradients are compared
   before anything is measured.
2. A QLoRA step against peft on bitsandbytes' layers (``quantized.py``).

Peaks are the most bytes allocated at once during a step, over what was before it. Writes memory.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from measure import Call, Figures, goal, goal_rows, machine, memory_table, options, parser, quiet, time_and_peak, write_json
from quantized import llama, step_figures, step_table
from rich.console import Console
from rich.table import Table
from torch import Tensor

import funcpeft as fp

#: Hidden size, layers, batch, tokens.
Shape = tuple[int, int, int, int]

KEPT, RECOMPUTED = "peft", "peft, checkpointing"


def remat_calls(hidden: int, layers: int, batch: int, tokens: int) -> dict[str, Call]:
    """Returns one step (loss and gradients of all LoRA leaves) of peft and of this package, recomputing or not."""
    import peft

    ids = torch.randint(512, (batch, tokens), generator=torch.Generator().manual_seed(1))
    calls: dict[str, Call] = {}
    weights: dict[str, Tensor] = {}
    config = peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)

    def theirs(recompute: bool) -> Call:
        torch.manual_seed(1)
        wrapped: Any = peft.get_peft_model(llama(hidden, layers), config).train()
        if recompute:  # only a model in training mode recomputes, and only what has an input that requires a gradient
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            wrapped.enable_input_require_grads()
        trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}

        def step() -> dict[str, Tensor]:
            wrapped.zero_grad(set_to_none=True)
            wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return {n.removeprefix("base_model.model."): p.grad for n, p in trained.items() if p.grad is not None}

        weights.update({n.removeprefix("base_model.model."): p.detach() for n, p in trained.items()})
        return step

    def ours(remat: bool, functional: bool) -> Call:
        model, params = fp.functionalize(llama(hidden, layers), remat=remat)
        net = fp.adapt(model, fp.LoRA(r=8, target_modules="all-linear"))
        trained = {p: {n: weights[f"{p}.lora_{n}.default.weight"].clone() for n in "AB"} for p in net.entries[0].sites}
        adapter = net.init(params, seed=0).replace(params=trained)

        def loss(p: Any) -> Tensor:
            return net(params, adapter.replace(params=p), input_ids=ids, labels=ids, use_cache=False).loss

        vag = fp.value_and_grad(lambda a: loss(a.params))
        return (lambda: torch.func.grad(loss)(adapter.params)) if functional else (lambda: vag(adapter)[1])

    calls[KEPT], calls[RECOMPUTED] = theirs(False), theirs(True)
    for remat in (False, True):
        after = ", remat" if remat else ""
        calls[f"value_and_grad{after}"], calls[f"torch.func.grad{after}"] = ours(remat, False), ours(remat, True)
    return calls


def require_equal(calls: Mapping[str, Call]) -> None:
    """Raises ``AssertionError`` unless all steps give peft's gradients."""
    want = calls[KEPT]()
    for name, call in calls.items():
        got = call()
        if name not in (KEPT, RECOMPUTED):
            got = {f"{p}.lora_{n}.default.weight": t for p, leaves in got.items() for n, t in leaves.items()}
        assert got.keys() == want.keys(), f"{name} has gradients of other leaves than peft"
        for key, t in want.items():
            error, size = float((got[key] - t).abs().max()), float(t.abs().max())
            assert error <= 1e-3 * size + 1e-7, f"{name} differs from peft at {key} by {error:.1e}, of {size:.1e}"


def remat_figures(shapes: Sequence[Shape], rounds: int) -> list[Figures]:
    """Measures steps that keep or recompute what is inside of blocks."""
    figures: list[Figures] = []
    for shape in shapes:
        calls = remat_calls(*shape)
        require_equal(calls)
        ways = time_and_peak(calls, rounds)
        figures.append({"shape": dict(zip(("hidden", "layers", "batch", "tokens"), shape, strict=True)), "ways": ways})
        peaks = {name: w["peak_bytes"] for name, w in ways.items()}
        figures[-1]["goals"] = [
            goal(f"{name}: peak over peft's, checkpointing", peaks[name] / peaks[RECOMPUTED], at_most=1.1)
            for name in ("value_and_grad, remat", "torch.func.grad, remat")
        ]
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the figures."""
    given = options(parser(__doc__, 7), argv)
    remat: list[Shape] = [(16, 2, 1, 8)] if given.quick else [(256, 8, 4, 128), (512, 6, 8, 128)]
    qlora: list[Shape] = [(64, 1, 1, 8)] if given.quick else [(256, 4, 1, 64), (512, 6, 2, 64), (1024, 4, 1, 256)]
    console = Console(width=128)
    with quiet():
        figures: Figures = {"machine": machine(), "remat": remat_figures(remat, given.rounds)}
        console.print(memory_table(figures["remat"], "one step, LoRA r=8 on all linears, blocks recomputed or not"))
        table = Table("ratio", "goal", "found", "met")
        for row in goal_rows([g for one in figures["remat"] for g in one["goals"]]):
            table.add_row(*row)
        console.print(table)
        figures["qlora"] = step_figures(qlora, given.rounds)
        console.print(step_table(figures["qlora"]))
    write_json(given.out / "memory.json", figures)


if __name__ == "__main__":
    main()
