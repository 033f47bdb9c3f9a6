"""Quantized bases against the libraries that define them and against peft: ``python tests/benchmarks/quantized.py``.

1. Decoding 1024 x 1024 with one thread: this package's plain torch against the library's own kernel; bytes per parameter.
2. One QLoRA step: peft on bitsandbytes' 4-bit layers against ``torch.func.grad`` and ``fp.value_and_grad`` on the same
   codes, in milliseconds and in peak bytes allocated during the step. The bare quantized base's forward is the limit.

Medians of interleaved rounds; ratios are what to read, since machines differ.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest import mock

import torch
from measure import Call, Figures, medians, memory_table, quiet, time_and_peak
from measure import peak_bytes as peak_bytes
from rich.console import Console
from rich.table import Table

import funcpeft as fp
from funcpeft.quant.lookup import Lookup

# -- decoding --------------------------------------------------------------------------------------------------------------


def library_decoders(weight: torch.Tensor) -> dict[str, tuple[fp.Quantized, Call]]:
    """Returns, by name, what this package stores and the library's own decoding of the same weight."""
    import bitsandbytes.functional as bnb
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def four_bit(kind: str, double: bool) -> Call:
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
        return lambda: bnb.dequantize_4bit(packed, state)

    def torchao(config: Any) -> Call:
        layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight = torch.nn.Parameter(weight)
        quantize_(layer, config)
        return lambda: layer.weight.dequantize()

    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return {
        "NF4": (fp.NF4().requant(weight), four_bit("nf4", False)),
        "NF4 double": (fp.NF4(double_quant=True).requant(weight), four_bit("nf4", True)),
        "FP4": (fp.FP4().requant(weight), four_bit("fp4", False)),
        "Int8 (bitsandbytes)": (fp.Int8().requant(weight), lambda: bnb.int8_vectorwise_dequant(codes, scale)),
        "int8 row (torchao)": (fp.AffineInt(bits=8, block_size="row").requant(weight), torchao(Int8WeightOnlyConfig())),
        "int4 g32 (torchao)": (fp.AffineInt(bits=4, block_size=32).requant(weight), torchao(int4)),
        "FP8 row (torchao)": (fp.FP8().requant(weight), torchao(Float8WeightOnlyConfig())),
    }


def without_kernel(call: Call) -> Any:
    """Calls with bitsandbytes' kernel out of reach, which formats take where it is right once that library is loaded."""
    with mock.patch.object(Lookup, "_kernel_is_right", return_value=False):
        return call()


def decode_table(rounds: int) -> Table:
    """Compares decoding with each library's own; formats without one here are timed alone."""
    weight = 0.02 * torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    table = Table(
        "format",
        "bytes per parameter",
        "plain torch ms",
        "as called ms",
        "library ms",
        "plain / library",
        "called / library",
        title="decoding 1024 x 1024, one thread",
    )
    rows = library_decoders(weight)
    alone = [
        fp.MXFP4(),
        fp.MXFP8(),
        fp.NVFP4(),
        fp.Ternary(),
        *(fp.AffineInt(bits=4, packing=p) for p in ("gptq", "awq", "hqq")),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, (stored, library) in rows.items():
            called: Call = functools.partial(stored.format.dequant, stored)
            ms = medians({"plain": lambda f=called: without_kernel(f), "called": called, "library": library}, rounds)
            size = f"{stored.nbytes / weight.numel():.4f}"
            ratios = (f"{ms[n] / ms['library']:.2f}" for n in ("plain", "called"))
            table.add_row(name, size, *(f"{ms[n]:.2f}" for n in ms), *ratios)
        for fmt in alone:
            stored = fmt.requant(weight)
            ms = medians({"ours": lambda q=stored: q.format.dequant(q)}, rounds)
            table.add_row(str(fmt), f"{stored.nbytes / weight.numel():.4f}", f"{ms['ours']:.2f}", "", "", "", "")
    torch.set_num_threads(threads)
    return table


# -- a QLoRA step -----------------------------------------------------------------------------------------------------------


def llama(hidden: int, layers: int) -> Any:
    """Makes a Llama, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=512,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def four_bit_module(hidden: int, layers: int) -> Any:
    """Returns the Llama with bitsandbytes' 4-bit layers in the place of its linear layers, the head left out."""
    import bitsandbytes as bnb

    module = llama(hidden, layers)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            made = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, made.to("cpu"))
    module.is_loaded_in_4bit = True  # how peft tells that the layers are quantized
    return module


def steps(hidden: int, layers: int, batch: int, tokens: int) -> tuple[dict[str, Call], dict[str, Call]]:
    """Returns one step (loss and gradients of all LoRA leaves) by each library, and the bare base's forward."""
    import peft

    ids = torch.randint(512, (batch, tokens), generator=torch.Generator().manual_seed(1))
    model, params = fp.functionalize(four_bit_module(hidden, layers))
    net = fp.adapt(model, fp.LoRA(r=8, target_modules="all-linear"))
    adapter = net.init(params, seed=0)
    config = peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)
    wrapped = peft.get_peft_model(four_bit_module(hidden, layers), config).train()

    def loss(p: Any) -> torch.Tensor:
        return net(params, adapter.replace(params=p), input_ids=ids, labels=ids, use_cache=False).loss

    def by_peft() -> None:
        wrapped.zero_grad(set_to_none=True)
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    vag = fp.value_and_grad(lambda a: loss(a.params))
    calls = {
        "peft + bitsandbytes": by_peft,
        "torch.func.grad": lambda: torch.func.grad(loss)(adapter.params),
        "fp.value_and_grad": lambda: vag(adapter),
    }

    @torch.no_grad()
    def base() -> None:
        model(params, input_ids=ids, use_cache=False)

    return calls, {"bare base, forward": base}


def step_figures(shapes: list[tuple[int, int, int, int]], rounds: int) -> list[Figures]:
    """Measures one QLoRA step at several shapes, every way over peft's."""
    figures: list[Figures] = []
    for shape in shapes:
        calls, bare = steps(*shape)
        where = dict(zip(("hidden", "layers", "batch", "tokens"), shape, strict=True))
        figures.append({"shape": where, "ways": time_and_peak({**calls, **bare}, rounds)})
    return figures


def step_table(figures: list[Figures]) -> Table:
    """Compares one QLoRA step at several shapes."""
    return memory_table(figures, "one QLoRA step, NF4, LoRA r=8 on all linears")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    given = parser.parse_args()
    console = Console(width=120)
    shapes = [(256, 4, 1, 64), (512, 6, 2, 64), (1024, 4, 1, 256)]
    with quiet():
        console.print(decode_table(3 * given.rounds))
        console.print(step_table(step_figures(shapes[:1] if given.quick else shapes, given.rounds)))


if __name__ == "__main__":
    main()
