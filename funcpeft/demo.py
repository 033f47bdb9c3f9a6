"""The demo: many adapters trained at once on real text, on any machine, offline.

A small byte-level Llama is the frozen base. The members of a population differ in seed and learning rate, see the same
bytes, and take every step in one ``torch.func.vmap`` of one pure loss. The best is merged, saved as a peft checkpoint and
read back, and each of these is compared with the adapted model. Imports interop, train, quantization and what is below.
"""

from __future__ import annotations

import codecs
import difflib
import importlib.util
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from funcpeft import errors, methods, optim, quant
from funcpeft.adapt import Net, adapt
from funcpeft.context import EVAL, Context
from funcpeft.data.train_base import BASE, bits, read_bytes, source_files, windows
from funcpeft.functional import Model, Params, functionalize
from funcpeft.gradients import value_and_grad
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.quantization import dequantize, quantization_report, quantize
from funcpeft.stacking import stack, unstack

DOMAINS = ("prose", "source", "html")

_MOST_BYTES = 8_000_000
_HELD_OUT_WINDOWS = 32
_POINTS = 8  # evaluations of a population after the first
_TOLERANCE = 1e-4  # of the largest logit, in float32


class UserError(ValueError):
    """A mistake in what the user asked for; its text is all that the command line prints."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the demo is to do.

    Args:
        members: Number of adapters trained at once.
        steps: Optimizer steps.
        method: Name of a method of the registry, in any case.
        fields: Fields of the method by name; the others keep their defaults.
        quantize: Format of the frozen base's linear layers by name, in any case, or ``"none"``.
        text: Directory with text to train on instead of a domain.
        domain: ``"prose"``, ``"source"`` or ``"html"`` of the Python standard library.
        out: Directory for the checkpoint and the picture.
        seed: Determines adapters and windows.
        batch: Windows per step; every member sees the same.
        tokens: Bytes per window.
        lr: Lowest and highest learning rate of the population, which is spaced evenly between their logarithms.
        progress: Whether to show a progress bar.
    """

    members: int = 8
    steps: int = 250
    method: str = "LoRA"
    fields: Mapping[str, Any] = field(default_factory=dict)
    quantize: str = "none"
    text: Path | None = None
    domain: str = "prose"
    out: Path = Path("demo-out")
    seed: int = 0
    batch: int = 2
    tokens: int = 64
    lr: tuple[float, float] = (3e-4, 3e-2)
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the demo measured.

    Attributes:
        lrs: Learning rate of every member ``(members,)``.
        curve_steps: Steps at which the members were evaluated; the first is 0, the last all steps.
        curves: Held-out bits per byte at those steps ``(points, members)``.
        best: Index of the member with the lowest last value.
        together: Seconds of one step of the whole population, vmapped.
        singly: Seconds of one step of every member, one after the other.
        differences: Largest difference of logits from the adapted model's, over the largest logit, of the merged model, of
            the reloaded checkpoint, and of peft's own reading of it, by name; those that could not be made are absent.
        picture: Path of the picture, ``None`` without matplotlib.
    """

    lrs: Tensor
    curve_steps: list[int]
    curves: Tensor
    best: int
    together: float
    singly: float
    differences: dict[str, float]
    picture: Path | None

    @property
    def agree(self) -> bool:
        """Whether every form of the best adapter computes the same, up to rounding in float32."""
        return all(d <= _TOLERANCE for d in self.differences.values())


# -- text ------------------------------------------------------------------------------------------------------------------


def domain_text(domain: str) -> Tensor:
    """Reads text of the Python standard library that the base has not seen, as bytes ``(n,)``.

    Raises:
        UserError: If this Python comes without it.
    """
    if domain == "source":
        data = read_bytes(source_files(held_out=True))
    elif domain == "prose":
        data = _as_bytes(_topics())
    else:
        found = importlib.util.find_spec("idlelib")
        page = Path(found.origin or "").with_name("help.html") if found else None
        data = read_bytes([page] if page and page.is_file() else [])
    if not len(data):
        remedy = f"choose another of {errors.listed(DOMAINS)} or pass --text DIR"
        raise UserError(errors.say("--domain", f"this Python's standard library must come with its {domain}", None, remedy))
    return data


def _topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ""
    return "\n".join(topics[name] for name in sorted(topics))


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def directory_text(folder: Path) -> Tensor:
    """Reads all UTF-8 files under a directory in order of path, up to 8 MB, as bytes ``(n,)``.

    Raises:
        UserError: If it is no directory or holds no text.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UserError(errors.say(f"--text {folder}", "a directory with text files is required", found))
    parts: list[bytes] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        parts.append(_file_text(path, _MOST_BYTES - sum(map(len, parts))))
    data = bytearray(b"\n".join(p for p in parts if p))
    if not data:
        raise UserError(errors.say(f"--text {folder}", "at least one UTF-8 text file is required", "none"))
    return torch.frombuffer(data, dtype=torch.uint8)


def _file_text(path: Path, limit: int) -> bytes:
    """Reads the start of a file, nothing if it is no UTF-8 text."""
    try:
        with path.open("rb") as f:
            data = f.read(max(0, limit))
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # the limit may cut a character in two
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if "\0" in text else data


def split(data: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Splits a text into what is trained on and its last tenth, which is held out.

    Raises:
        UserError: If a part is shorter than one window.
    """
    need, cut = 10 * (tokens + 1), len(data) - len(data) // 10
    if len(data) < need:
        required = f"at least {need:,} bytes are needed for windows of {tokens}, a tenth of them held out"
        raise UserError(errors.say("text", required, f"{len(data):,}", "give more text or lower --tokens"))
    return data[:cut], data[cut:]


def spaced_windows(data: Tensor, count: int, tokens: int) -> Tensor:
    """Returns windows evenly spaced over a text: ids ``(count, tokens + 1)``."""
    starts = torch.linspace(0, len(data) - tokens - 1, count).long()
    return data[starts[:, None] + torch.arange(tokens + 1)].long()


# -- model and methods -------------------------------------------------------------------------------------------------------


def load_base(folder: Path = BASE) -> nn.Module:
    """Loads the byte-level Llama in float32.

    Raises:
        UserError: If it has not been trained; the message says how.
    """
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "model.safetensors").is_file():
        remedy = "train it with: python -m funcpeft.data.train_base"
        raise UserError(errors.say("demo", f"the base model is required in {folder}", "nothing there", remedy))
    # Written out, attention maps over members; torch's fused kernel has no batching rule.
    module = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32))
    module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # the tied head is stored once
    return module.eval()


def make_method(name: str, fields: Mapping[str, Any]) -> Any:
    """Makes a method of the registry by name, in any case.

    Raises:
        UserError: If there is none of that name, or a field is wrong.
    """
    known = {n.lower(): n for n in methods.__all__}
    if name.lower() not in known:
        close = [known[n] for n in difflib.get_close_matches(name.lower(), known)]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {errors.listed(methods.__all__, 99)}"
        raise UserError(errors.say("--method", "a method's name is required", repr(name), hint))
    try:
        return getattr(methods, known[name.lower()])(**fields)
    except (ValueError, TypeError) as e:
        raise UserError(f"{e} Fields are set by --set FIELD=VALUE.") from e


def make_net(model: Model, name: str, fields: Mapping[str, Any]) -> Net:
    """Chooses the sites of a method by name; where it has no default for Llama, all linear layers.

    Raises:
        UserError: If the method does not fit the base.
    """
    method = make_method(name, fields)
    try:
        return adapt(model, method)
    except (ValueError, TypeError, KeyError) as e:
        if "target_modules has no default" not in str(e):
            raise UserError(f"{e} Fields are set by --set FIELD=VALUE.") from e
    return make_net(model, name, {**fields, "target_modules": "all-linear"})


def make_format(name: str) -> Any:
    """Makes a format of the registry by name, in any case, with its defaults; ``None`` for ``"none"``.

    Raises:
        UserError: If there is none of that name, or it cannot be made from a weight.
    """
    known = {n.lower(): getattr(quant, n) for n in quant.__all__ if not getattr(quant, n).decode_only}
    if name.lower() not in ("none", *known):
        raise UserError(errors.one_of("--quantize", "the format", name, ("none", *known)))
    return None if name.lower() == "none" else known[name.lower()]()


def quantized(model: Model, params: Params, format: Any) -> Params:
    """Returns params with the linear layers in a format, or as they are."""
    return params if format is None else quantize(model, params, format, target_modules="all-linear", progress=False)


# -- training ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """The frozen side of training: a net, its base, and the loss of one member on one batch."""

    net: Net
    params: Params

    def logits(self, adapter: Any, ids: Tensor, context: Context = EVAL) -> Tensor:
        """Computes logits ``(rows, length, 256)`` for ids ``(rows, length)``; virtual tokens of a prompt are left out."""
        return self.net(self.params, adapter, input_ids=ids, use_cache=False, context=context).logits[:, -ids.shape[1] :]

    def loss(self, adapter: Any, ids: Tensor, seed: Tensor) -> Tensor:
        """Computes the bits per byte of one adapter, with its dropout on."""
        return bits(self.logits(adapter, ids[:, :-1], Context(training=True, seed=seed)), ids)

    def evaluate(self, many: Any, ids: Tensor) -> Tensor:
        """Computes the bits per byte of every member ``(members,)``."""
        each = torch.func.vmap(lambda adapter, rows: bits(self.logits(adapter, rows[:, :-1]), rows), in_dims=(0, None))
        with torch.no_grad():
            return torch.stack([each(many, rows) for rows in ids.split(8)]).mean(0)


Step = Callable[[Any, Any, Tensor, Tensor], tuple[Any, Any]]


def population_step(task: Task, optimizer: optim.Optimizer) -> Step:
    """Makes a step of all members at once: ``(many, state, ids, seed) -> (many, state)``."""

    def total(many: Any, ids: Tensor, seed: Tensor) -> Tensor:
        return torch.func.vmap(task.loss, in_dims=(0, None, None))(many, ids, seed).sum()

    # Members are independent, so the gradient of the sum holds every member's own; outside of vmap it is plain autograd,
    # which is faster than vmap of a gradient.
    return _step(value_and_grad(total), optimizer)


def member_step(task: Task, optimizer: optim.Optimizer) -> Step:
    """Makes the same step for one adapter."""
    return _step(value_and_grad(task.loss), optimizer)


def _step(gradient: Callable[..., Any], optimizer: optim.Optimizer) -> Step:
    def step(adapter: Any, state: Any, ids: Tensor, seed: Tensor) -> tuple[Any, Any]:
        _, grads = gradient(adapter, ids, seed)
        return optimizer.update(grads, state, adapter)

    return step


def train(task: Task, many: Any, lrs: Tensor, text: tuple[Tensor, Tensor], s: Settings) -> tuple[Any, list[int], Tensor]:
    """Trains a population.

    Returns:
        The population, the steps at which it was evaluated, and its held-out bits per byte then ``(points, members)``.
    """
    data, held = text
    draws, judged = torch.Generator().manual_seed(s.seed), spaced_windows(held, _HELD_OUT_WINDOWS, s.tokens)
    optimizer = optim.adamw(lr=lrs)
    step, state = population_step(task, optimizer), optimizer.init(many)
    at, curves = [0], [task.evaluate(many, judged)]
    bar = tqdm(range(1, s.steps + 1), desc=f"{s.members} x {_name(task.net)}", unit="step", disable=not s.progress)
    for now in bar:
        many, state = step(many, state, windows(data, s.batch, s.tokens, draws), torch.tensor(now))
        if _POINTS * now // s.steps > _POINTS * (now - 1) // s.steps:
            at.append(now)
            curves.append(task.evaluate(many, judged))
            bar.set_postfix_str(f"best {curves[-1].nan_to_num(math.inf).min():.3f} bits per byte held out")
    return many, at, torch.stack(curves)


def _name(net: Net) -> str:
    return type(net.methods[0]).__name__


def spaced_rates(low: float, high: float, count: int) -> Tensor:
    """Returns learning rates evenly spaced between the logarithms of two, the middle for one."""
    if count == 1:
        low = high = math.sqrt(low * high)
    return torch.logspace(math.log10(low), math.log10(high), count)


def seconds(f: Callable[[], object], repeats: int = 3) -> float:
    """Returns the shortest time of a few calls, after one that is not counted."""
    taken: list[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def efficiency(task: Task, many: Any, lrs: Tensor, ids: Tensor) -> tuple[float, float]:
    """Measures the seconds of one step of all members: vmapped, and one after the other."""
    seed, together = torch.tensor(0), optim.adamw(lr=lrs)
    step, state = population_step(task, together), together.init(many)
    singles = []
    for adapter, lr in zip(unstack(many), lrs.tolist(), strict=True):
        alone = optim.adamw(lr=lr)
        singles.append((member_step(task, alone), adapter, alone.init(adapter)))
    return (
        seconds(lambda: step(many, state, ids, seed)),
        seconds(lambda: [one(adapter, held, ids, seed) for one, adapter, held in singles]),
    )


# -- the best member ---------------------------------------------------------------------------------------------------------


def difference(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference of two tensors over the largest entry of the second."""
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def merged_difference(console: Console, task: Task, adapter: Any, ids: Tensor) -> float | None:
    """Merges an adapter, prints the report, and compares the merged model with the adapted one."""
    try:
        merged, report = task.net.merge(task.params, adapter)
    except errors.NoMergedFormError as e:
        console.print(f"not merged: {e}")
        return None
    console.print(str(report))
    return difference(task.net.model(merged, input_ids=ids, use_cache=False).logits, task.logits(adapter, ids))


@torch.no_grad()
def reloaded_differences(console: Console, task: Task, adapter: Any, ids: Tensor, path: Path) -> dict[str, float]:
    """Saves an adapter as a peft checkpoint, reads it back here and by peft, and compares with the adapted model."""
    try:
        save_peft(task.net, adapter, path, task_type="CAUSAL_LM")
    except ValueError as e:
        console.print(f"not saved: {e}")
        return {}
    wanted = task.logits(adapter, ids)
    net, read = load_peft(task.net.model, task.params, path)
    found = {"reloaded": difference(Task(net, task.params).logits(read, ids), wanted)}
    if importlib.util.find_spec("peft") is None:
        console.print("peft is not installed: the checkpoint was read back by funcpeft only")
        return found
    try:
        found["read by peft"] = difference(_peft_logits(task, ids, path), wanted)
    except RuntimeError as e:  # QA-LoRA, which peft has on GPTQ layers only
        console.print(f"not read by peft: {str(e).splitlines()[0]}")
    return found


def _peft_logits(task: Task, ids: Tensor, path: Path) -> Tensor:
    from peft import PeftModel

    base: Any = load_base()
    if any(not isinstance(v, Tensor) for v in task.params.values()):
        base.load_state_dict(dequantize(task.params), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says of its own calls and of methods that it calls untested
        read = PeftModel.from_pretrained(base, str(path)).eval()
    return read(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]


# -- output ------------------------------------------------------------------------------------------------------------------


def members_table(lrs: Tensor, curves: Tensor, best: int, seed: int) -> Table:
    """Makes the table of the members: learning rate, seed, held-out bits per byte before and after."""
    table = Table(title="held-out bits per byte", title_justify="left")
    for name in ("member", "lr", "seed", "before", "after", ""):
        table.add_column(name, justify="left" if not name else "right")
    for i, (lr, before, after) in enumerate(zip(lrs.tolist(), curves[0].tolist(), curves[-1].tolist(), strict=True)):
        note = "best" if i == best else "" if math.isfinite(after) else "diverged"
        table.add_row(str(i), f"{lr:.2g}", str(seed + i), f"{before:.3f}", f"{after:.3f}", note)
    return table


def checks_table(differences: Mapping[str, float]) -> Table:
    """Makes the table of the forms of the best adapter that were compared with it."""
    table = Table("the best adapter", "largest difference of logits / largest logit", "", title="checks", title_justify="left")
    for name, value in differences.items():
        table.add_row(name, f"{value:.1e}", "same" if value <= _TOLERANCE else "DIFFERS")
    return table


def draw_curves(result_steps: Sequence[int], curves: Tensor, lrs: Tensor, best: int, title: str, path: Path) -> Path | None:
    """Draws the learning curves; returns ``None`` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["viridis"](torch.linspace(0, 0.9, len(lrs)).tolist())
    for i, lr in enumerate(lrs.tolist()):
        width, label = (2.8, f"{lr:.2g} (best)") if i == best else (1.2, f"{lr:.2g}")
        axes.plot(result_steps, curves[:, i].tolist(), color=shades[i], linewidth=width, marker="o", markersize=3, label=label)
    low, start = float(curves[curves.isfinite()].min()), float(curves[0].max())
    axes.set_ylim(low - 0.1 * (start - low) - 0.01, start + 0.3 * (start - low) + 0.01)  # a diverged member leaves the picture
    axes.set(xlabel="step", ylabel="held-out bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="learning rate", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=150, format="png")
    os.replace(unfinished, path)
    return path


def output_directory(path: Path) -> Path:
    """Makes the output directory before any work.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(errors.say("--out", "a directory that can be written is required", f"{path} ({e.strerror})")) from e
    return path


# -- the whole ---------------------------------------------------------------------------------------------------------------


def make_task(s: Settings) -> Task:
    """Loads the base, quantizes it if asked, and puts the method on it."""
    model, params = functionalize(load_base())
    longest = int(getattr(model.config, "max_position_embeddings", 0))
    if s.tokens > longest:
        raise UserError(errors.say("--tokens", f"at most the base's context of {longest} is required", s.tokens))
    task = Task(make_net(model, s.method, s.fields), quantized(model, params, make_format(s.quantize)))
    try:  # what a start or a call needs beside the base and text is found before the work
        task.logits(task.net.init(task.params, s.seed), torch.zeros(1, 4, dtype=torch.int64))
    except (ValueError, TypeError) as e:
        raise UserError(errors.say("--method", "a method that needs the base and text alone is required", str(e))) from e
    return task


def run(s: Settings, console: Console | None = None) -> Result:
    """Runs the demo and prints what it finds.

    Raises:
        UserError: If the settings cannot be met; before any training.
    """
    console = console or Console(markup=False, highlight=False)
    data, held = split(domain_text(s.domain) if s.text is None else directory_text(s.text), s.tokens)
    out, task = output_directory(s.out), make_task(s)
    what = s.domain if s.text is None else str(s.text)
    console.print(f"base: {task.net.model}, {storage(task, s.quantize)}")
    console.print(f"text: {what}, {len(data):,} bytes to train on, {len(held):,} held out")
    console.print(f"net: {task.net!r}")

    lrs = spaced_rates(*s.lr, s.members)
    many = stack([task.net.init(task.params, seed=s.seed + i) for i in range(s.members)])
    start = time.perf_counter()
    many, at, curves = train(task, many, lrs, (data, held), s)
    console.print(f"{s.steps} steps of {s.members} members in {time.perf_counter() - start:.1f} s, evaluations included")
    best = int(curves[-1].nan_to_num(math.inf).argmin())
    console.print(members_table(lrs, curves, best, s.seed))

    together, singly = efficiency(task, many, lrs, spaced_windows(data, s.batch, s.tokens))
    times = f"{together * 1e3:.0f} ms vmapped, {singly * 1e3:.0f} ms one by one"
    console.print(f"one step of all {s.members}: {times}, {singly / together:.2f} times as fast")
    differences = check_best(console, task, unstack(many)[best], spaced_windows(held, 4, s.tokens)[:, :-1], out / "adapter")
    picture = draw_curves(
        at, curves, lrs, best, f"{s.members} {_name(task.net)} adapters trained at once on {what}", out / "curves.png"
    )
    console.print(f"picture: {picture}" if picture else "no picture: matplotlib is not installed (pip install funcpeft[plot])")
    return Result(
        lrs=lrs,
        curve_steps=at,
        curves=curves,
        best=best,
        together=together,
        singly=singly,
        differences=differences,
        picture=picture,
    )


def storage(task: Task, name: str) -> str:
    """Says how the base is stored, and how many bytes that takes."""
    if name.lower() == "none":
        return "float32"
    report = quantization_report(dequantize(task.params), task.params)
    return f"linear layers as {report.formats[0]}: {report.total('after'):,} bytes instead of {report.total('before'):,}"


def check_best(console: Console, task: Task, adapter: Any, ids: Tensor, path: Path) -> dict[str, float]:
    """Merges, saves and reloads the best adapter, and prints whether every form computes the same."""
    merged = merged_difference(console, task, adapter, ids)
    found = {} if merged is None else {"merged": merged}
    found |= reloaded_differences(console, task, adapter, ids, path)
    console.print(checks_table(found))
    if path.exists():
        console.print(f"checkpoint: {path}")
    return found
