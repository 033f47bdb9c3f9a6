"""What a pure call costs: model(...) and net(...) against the bare module, in one run; ``python tests/benchmarks/overhead.py``.

Calls are interleaved and medians reported, so that a noisy machine disturbs all columns alike; read the ratios. Also prints
what importing funcpeft adds to importing torch, and the lines of every method file.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from measure import medians
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import funcpeft as fp
from funcpeft import methods


def calls(hidden: int) -> dict[str, Callable[[], object]]:
    """Builds a four-layer Llama and the ways to call it on one row of 16 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    )
    module = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 256, (1, 16))
    model, params = fp.functionalize(module)
    net = fp.adapt(model, fp.LoRA(r=8, target_modules="all-linear"))
    adapter = net.init(params, seed=0)
    adapted = LlamaForCausalLM(config).eval()
    theirs = peft.get_peft_model(adapted, peft.LoraConfig(r=8, target_modules="all-linear")).eval()
    return {
        "module": lambda: module(input_ids=ids),
        "model(...)": lambda: model(params, input_ids=ids),
        "peft LoRA": lambda: theirs(input_ids=ids),
        "net(...) LoRA": lambda: net(params, adapter, input_ids=ids),
    }


def import_seconds(statement: str) -> float:
    """Returns the median of five fresh imports."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)
    ]
    return statistics.median(runs)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    console = Console()
    table = Table(
        "hidden", "module ms", "model(...) ms", "ratio", "peft LoRA ms", "net(...) LoRA ms", "net / module", "net / peft"
    )
    with torch.no_grad():
        for hidden in (64, 256, 1024):
            ms = medians(calls(hidden), rounds)
            row = [ms["module"], ms["model(...)"], ms["model(...)"] / ms["module"], ms["peft LoRA"], ms["net(...) LoRA"]]
            row += [ms["net(...) LoRA"] / ms["module"], ms["net(...) LoRA"] / ms["peft LoRA"]]
            table.add_row(str(hidden), *(f"{v:.2f}" for v in row))
    console.print(table)
    console.print(
        f"import torch {import_seconds('import torch'):.2f} s, import funcpeft {import_seconds('import funcpeft'):.2f} s"
    )
    folder = Path(methods.__file__).parent
    lines = {p.stem: len(p.read_text().splitlines()) for p in sorted(folder.glob("*.py")) if p.stem != "__init__"}
    console.print("lines per method file: " + ", ".join(f"{name} {n}" for name, n in lines.items()))


if __name__ == "__main__":
    main()
