"""Trains the byte-level Llama that the demo adapts, on the source of the Python standard library of this machine.

``python -m funcpeft.data.train_base`` writes ``config.json`` and ``model.safetensors`` (float16) to ``byte_llama`` beside
this file. Token ids are bytes. The corpus is every ``.py`` file of the standard library but its tests, third-party packages
and ``pydoc_data``, so that the reference prose and the HTML on which the demo trains adapters are new to the model. One
file in twenty, chosen by its name, is held out; the demo's source domain is made of those.

Matrices inside the layers are trained by Muon, everything else by AdamW, both under one cosine schedule. A seed fixes the
result on one machine, Python version and number of threads. The model in the package was made by the defaults with
``--compile --threads 1`` on Python 3.11.

References:
    Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    Liu et al., Muon is scalable for LLM training, 2025, arXiv 2502.16982, eq. (4), for the size of the step.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from funcpeft import errors

#: Where the trained model is, and where it is written by default.
BASE = Path(__file__).parent / "byte_llama"

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "ensurepip", "__pycache__"}


def source_files(*, held_out: bool, root: Path | None = None) -> list[Path]:
    """Lists the source files of the standard library in order of name: the twentieth held out, or all others.

    Args:
        held_out: Which of the two parts. A file's part depends on its path inside the library alone.
        root: The library; by default this interpreter's.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = (p.relative_to(root) for p in root.rglob("*.py"))
    kept = sorted(p for p in found if not _LEFT_OUT & set(p.parts))
    return [root / p for p in kept if (zlib.crc32(p.as_posix().encode()) % 20 == 0) == held_out]


def read_bytes(paths: Sequence[Path]) -> Tensor:
    """Reads files one after the other as one tensor of bytes ``(n,)``."""
    data = bytearray(b"\n".join(p.read_bytes() for p in paths))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def windows(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Draws windows of consecutive bytes: ids ``(count, length + 1)``, the last of which is only predicted.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    if len(data) <= length:
        raise ValueError(errors.say("text", f"at least {length + 1} bytes are needed", f"{len(data)}", "give more text"))
    starts = torch.randint(len(data) - length, (count,), generator=generator)
    return data[starts[:, None] + torch.arange(length + 1)].long()


def bits(logits: Tensor, ids: Tensor) -> Tensor:
    """Computes the mean bits per byte: logits ``(rows, length, 256)`` predict ``ids[:, 1:]`` of ``(rows, length + 1)``."""
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()) / math.log(2)


def make_model(hidden: int, layers: int, heads: int, context: int) -> nn.Module:
    """Makes an untrained Llama over bytes with tied embeddings; draws from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=int(2.7 * hidden) // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def orthogonalized(m: Tensor) -> Tensor:
    """Returns matrices ``(n, rows, columns)`` with their singular values brought near 1 by five Newton-Schulz steps."""
    x = m.mT if m.shape[-2] > m.shape[-1] else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if m.shape[-2] > m.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with steps of AdamW's size (0.2 root mean square per entry times ``lr``).

    torch's own computes in bfloat16, which a processor without instructions for it does a hundred times slower than float32.

    Args:
        groups: Lists of matrices of one shape, which are orthogonalized together.
        lr: Learning rate.
    """

    def __init__(self, groups: Sequence[list[Tensor]], lr: float) -> None:
        super().__init__([{"params": g} for g in groups], {"lr": lr, "momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes one step."""
        for group in self.param_groups:
            grads = torch.stack([p.grad for p in group["params"]])
            held = self.state.setdefault(group["params"][0], {"momentum": torch.zeros_like(grads)})
            held["momentum"].lerp_(grads, 1 - group["momentum"])
            update = orthogonalized(grads.lerp(held["momentum"], group["momentum"]))
            size = 0.2 * math.sqrt(max(grads.shape[-2:]))
            for p, u in zip(group["params"], update, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"] * size)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Makes Muon for the matrices of the layers and AdamW for the embedding and the norms."""
    groups: dict[torch.Size, list[Tensor]] = {}
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        (groups.setdefault(p.shape, []) if p.ndim == 2 and ".layers." in name else rest).append(p)
    return [Muon(list(groups.values()), lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def cosine(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: linear from 0 over the first 4%, then a cosine down to 2%."""
    warm = max(1, steps // 25)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model: nn.Module, draw: Callable[[], Tensor], steps: int, lr: float, *, compiled: bool, progress: bool) -> None:
    """Trains a model in place for some steps on the windows that ``draw`` returns."""
    forward: Any = torch.compile(model) if compiled else model
    optimizers = make_optimizers(model, lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: cosine(s, steps)) for o in optimizers]
    bar = tqdm(range(steps), desc="byte Llama", unit="step", disable=not progress, mininterval=1.0)
    mean = 8.0
    for step in bar:
        ids = draw()
        loss = bits(forward(input_ids=ids[:, :-1], use_cache=False).logits, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad(set_to_none=True)
        mean += (loss.item() - mean) * max(0.02, 1 / (step + 1))
        bar.set_postfix_str(f"{mean:.3f} bits per byte", refresh=False)


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, count: int, length: int) -> float:
    """Computes the bits per byte on windows evenly spaced over a text."""
    starts = torch.linspace(0, len(data) - length - 1, count).long()
    rows = data[starts[:, None] + torch.arange(length + 1)].long().split(16)
    return sum(len(ids) * float(bits(model(input_ids=ids[:, :-1], use_cache=False).logits, ids)) for ids in rows) / count


def save(model: nn.Module, out: Path) -> None:
    """Writes ``config.json`` and ``model.safetensors`` in float16; a reader never sees a half-written file."""
    config: Any = model.config
    config.architectures, config.dtype = [type(model).__name__], "float16"
    state = {name: t.detach().half() for name, t in model.named_parameters()}
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "model.safetensors", safetensors.torch.save(state, {"format": "pt"}))
    _replace(out / "config.json", config.to_json_string().encode())


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m funcpeft.data.train_base", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--out", type=Path, default=BASE, help="directory to write (default: %(default)s)")
    p.add_argument("--steps", type=int, default=1600, help="optimizer steps (default: %(default)s)")
    p.add_argument("--batch", type=int, default=12, help="windows per step (default: %(default)s)")
    p.add_argument("--context", type=int, default=256, help="bytes per window (default: %(default)s)")
    p.add_argument("--hidden", type=int, default=160, help="width (default: %(default)s)")
    p.add_argument("--layers", type=int, default=4, help="depth (default: %(default)s)")
    p.add_argument("--heads", type=int, default=5, help="attention heads; must divide the width (default: %(default)s)")
    p.add_argument("--lr", type=float, default=8e-3, help="peak learning rate (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of weights and windows (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    p.add_argument("--compile", action="store_true", help="compile the model; about 1.5 times faster, needs a C++ compiler")
    p.add_argument("--no-progress", action="store_true", help="no progress bar")
    return p


def _check(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    for name in ("steps", "batch", "context", "hidden", "layers", "heads", "threads"):
        if getattr(a, name) < 1:
            p.error(errors.say(f"--{name}", "a positive number is required", getattr(a, name)))
    if a.hidden % a.heads or a.hidden // a.heads % 2:
        p.error(errors.say("--heads", f"must divide the width {a.hidden} into parts of even size", a.heads))
    if not source_files(held_out=False):
        p.error(errors.say("corpus", "the source of the standard library is needed", f"none in {sysconfig.get_path('stdlib')}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the held-out bits per byte, writes the model."""
    p = parser()
    a = p.parse_args(argv)
    _check(p, a)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    draws = torch.Generator().manual_seed(a.seed)
    data, held = (read_bytes(source_files(held_out=h)) for h in (False, True))
    model = make_model(a.hidden, a.layers, a.heads, a.context)
    count = sum(t.numel() for t in model.parameters())
    print(f"{count:,} parameters, {len(data):,} bytes to train on, {len(held):,} held out")
    draw: Callable[[], Tensor] = lambda: windows(data, a.batch, a.context, draws)  # noqa: E731
    train(model, draw, a.steps, a.lr, compiled=a.compile, progress=not a.no_progress)
    print(f"held-out source: {evaluate(model.eval(), held, 256, a.context):.3f} bits per byte")
    save(model, a.out)
    print(f"written: {a.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
