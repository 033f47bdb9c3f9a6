"""Many adapters at once against peft's loop and the bare base: ``python tests/benchmarks/population.py``.

N LoRA adapters (r=8 on all linear layers) of one Llama, B rows of T tokens each. The ways, of which all give the same numbers
(checked before anything is timed):

- *peft loop*: ``set_adapter(name)``, forward (in training loss and backward too), member by member; peft's usual way.
- *peft adapter_names*: one mixed batch, the adapter named for every row; inference only.
- *loop*: ``net(...)`` or ``value_and_grad`` member by member.
- *vmap*: ``torch.func.vmap`` over the whole model; in training of ``torch.func.grad``.
- *apply_many*: the fold with the chunk of members that it chooses by itself. In training ``value_and_grad(..., in_dims=0)``,
  which chooses the chunk, around ``apply_many(..., chunk_size=None)``; *torch.func.grad* is that over the same fold.
- *compiled*: ``torch.compile(fullgraph=True)`` of ``apply_many``, in training of ``torch.func.grad`` over it.
- *base*: the limit, the bare module on one batch of N*B rows. In training one forward and one backward with a gradient of the
  input embeddings alone: every adapter's gradient needs the activations' gradients down to the first layer, and this is that
  much and no more. Also compiled.

With ``--members`` the crossover curve instead: peft's loop, the fold and the limit for 1 to 64 members at two shapes.
Writes population.json and population.png, or members.json and members.png.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Call, Figures, goal, goal_rows, interleaved, machine, options, parser, quiet, summary, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

import funcpeft as fp

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """A population: the Llama's size, and each member's rows and tokens."""

    hidden: int
    layers: int
    batch: int
    tokens: int
    members: int

    def __str__(self) -> str:
        return ", ".join(map(str, astuple(self)))


@dataclass(frozen=True)
class Goals:
    """By how much one mode must beat peft's loop, and how near it must come to the limit."""

    over_peft: float
    to_limit: float | None = None


SHAPES = (
    Shape(64, 4, 1, 16, 16),
    Shape(256, 4, 1, 16, 32),
    Shape(256, 4, 4, 64, 16),
    Shape(512, 6, 1, 32, 16),
    Shape(512, 6, 8, 128, 8),
)
GOALS: dict[Shape, dict[str, Goals]] = {
    SHAPES[0]: {"eval": Goals(30, 1.3), "train": Goals(16, 1.6)},
    SHAPES[1]: {"eval": Goals(22, 1.25), "train": Goals(15, 1.4)},
    SHAPES[2]: {"eval": Goals(2, 1.15), "train": Goals(1.75, 1.25)},
    SHAPES[3]: {"eval": Goals(4), "train": Goals(4)},
    SHAPES[4]: {"eval": Goals(1), "train": Goals(1)},
}
CURVES = (Shape(256, 4, 1, 16, 1), Shape(512, 6, 4, 64, 1))
TINY = Shape(16, 1, 1, 4, 3)

#: The ways that goals are about, by mode.
OURS = {"eval": "apply_many", "train": "apply_many"}
PEFT, BASE = "peft loop", "base"


# -- the setting -------------------------------------------------------------------------------------------------------------


class Population:
    """One model with N adapters, in this package and in peft, with equal numbers."""

    def __init__(self, shape: Shape) -> None:
        import peft
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=2 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
        )
        self.shape = shape
        self.module = LlamaForCausalLM(config).eval().requires_grad_(False)
        self.ids = torch.randint(VOCABULARY, (shape.members, shape.batch, shape.tokens))
        self.rows = self.ids.flatten(0, 1)
        self.names = [f"member{i}" for i in range(shape.members)]
        self.model, self.params = fp.functionalize(self.module)
        self.net = fp.adapt(self.model, fp.LoRA(r=8, lora_alpha=16, target_modules="all-linear"))
        theirs = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        self.theirs: Any = peft.get_peft_model(copy.deepcopy(self.module), theirs, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.theirs.add_adapter(name, theirs)
        self.theirs.eval()
        self.one = [self._taken(name) for name in self.names]
        self.many = fp.stack(self.one)

    def _leaves(self, name: str) -> dict[str, dict[str, Tensor]]:
        layers = {path: self.theirs.base_model.model.get_submodule(path) for path in self.net.entries[0].sites}
        return {path: {"A": x.lora_A[name].weight, "B": x.lora_B[name].weight} for path, x in layers.items()}

    def _taken(self, name: str) -> Any:
        leaves = {p: {n: t.detach().clone() for n, t in x.items()} for p, x in self._leaves(name).items()}
        return self.net.init(self.params, seed=0).replace(params=leaves)

    def trained(self, name: str) -> list[Tensor]:
        """Returns the parameters of one of peft's adapters."""
        return [t for x in self._leaves(name).values() for t in x.values()]

    # -- what all ways compute ------------------------------------------------------------------------------------------

    def logits(self, adapter: Any, ids: Tensor) -> Tensor:
        """Calls the net for one member."""
        return self.net(self.params, adapter, input_ids=ids, use_cache=False).logits

    def many_logits(self, many: Any, ids: Tensor, **how: Any) -> Tensor:
        """Calls the net for several."""
        return fp.apply_many(self.net, self.params, many, input_ids=ids, use_cache=False, **how).logits

    def summed(self, params: Any, ids: Tensor) -> Tensor:
        """Returns the sum of the members' losses as a function of the trained leaves."""
        return losses(self.many_logits(self.many.replace(params=params), ids, chunk_size=None), ids).sum()


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the next token; of several members ``(N, B, T)`` one each."""
    lead = ids.shape[:-2]
    each = F.cross_entropy(logits[..., :-1, :].flatten(0, -2), ids[..., 1:].flatten(), reduction="none")
    return each.view(*lead, -1).mean(-1)


# -- the ways ----------------------------------------------------------------------------------------------------------------


def eval_calls(p: Population) -> dict[str, Call]:
    """Returns the ways to compute all members' logits."""

    def peft_loop() -> list[Tensor]:
        outs = []
        for name, ids in zip(p.names, p.ids, strict=True):
            p.theirs.set_adapter(name)
            outs.append(p.theirs(input_ids=ids, use_cache=False).logits)
        return outs

    by_row = [name for name in p.names for _ in range(p.shape.batch)]
    over_members = torch.func.vmap(p.logits)
    return {
        PEFT: peft_loop,
        "peft adapter_names": lambda: p.theirs(input_ids=p.rows, adapter_names=by_row, use_cache=False).logits,
        "loop": lambda: [p.logits(one, ids) for one, ids in zip(p.one, p.ids, strict=True)],
        "vmap": lambda: over_members(p.many, p.ids),
        "apply_many": lambda: p.many_logits(p.many, p.ids),
        BASE: lambda: p.module(input_ids=p.rows, use_cache=False).logits,
    }


def train_calls(p: Population) -> dict[str, Call]:
    """Returns the ways to compute all members' gradients."""
    trained = {name: p.trained(name) for name in p.names}

    def peft_loop() -> list[list[Tensor]]:
        for name, ids in zip(p.names, p.ids, strict=True):
            for t in trained[name]:
                t.grad = None
            p.theirs.set_adapter(name)
            losses(p.theirs(input_ids=ids, use_cache=False).logits, ids).backward()
        return [[t.grad for t in trained[name]] for name in p.names]  # type: ignore[misc]  # backward has made them

    def loss(params: Any, adapter: Any, ids: Tensor) -> Tensor:
        return losses(p.logits(adapter.replace(params=params), ids), ids)

    step = fp.value_and_grad(lambda one, ids: losses(p.logits(one, ids), ids))
    steps = fp.value_and_grad(lambda many, ids: losses(p.many_logits(many, ids, chunk_size=None), ids), in_dims=0)
    over_members = torch.func.vmap(torch.func.grad(loss))
    return {
        PEFT: peft_loop,
        "loop": lambda: [step(one, ids)[1] for one, ids in zip(p.one, p.ids, strict=True)],
        "vmap": lambda: over_members(p.many.params, p.many, p.ids),
        "apply_many": lambda: steps(p.many, p.ids)[1],
        "torch.func.grad": lambda: torch.func.grad(p.summed)(p.many.params, p.ids),
        BASE: lambda: base_gradient(p),
    }


def base_loss(p: Population, embedded: Tensor) -> Tensor:
    """Returns the sum of the losses of the bare base."""
    logits = p.module(inputs_embeds=embedded, use_cache=False).logits
    return losses(logits.view(*p.ids.shape, -1), p.ids).sum()


def base_gradient(p: Population) -> Tensor:
    """Returns the gradient of the input embeddings."""
    embedded = p.module.get_input_embeddings()(p.rows).requires_grad_()
    return torch.autograd.grad(base_loss(p, embedded), embedded)[0]


def compiled_calls(p: Population, mode: str) -> dict[str, Call]:
    """Returns the ways that ``torch.compile`` makes; nothing is compiled before their first call."""

    def compiled(f: Callable[..., Any]) -> Any:
        return torch.compile(f, fullgraph=True, dynamic=False)

    if mode == "eval":
        ours, base = compiled(p.many_logits), compiled(lambda ids: p.module(input_ids=ids, use_cache=False).logits)
        return {"apply_many compiled": lambda: ours(p.many, p.ids), "base compiled": lambda: base(p.rows)}
    ours, base = compiled(torch.func.grad(p.summed)), compiled(torch.func.grad(lambda e: base_loss(p, e)))
    embed = p.module.get_input_embeddings()
    return {"apply_many compiled": lambda: ours(p.many.params, p.ids), "base compiled": lambda: base(embed(p.rows))}


def by_member(made: Any, members: int) -> Tensor:
    """Returns all numbers that a way computed as one matrix, a row for each member."""
    if isinstance(made, Tensor):
        return made.reshape(members, -1)
    if isinstance(made, dict):
        return torch.cat([t.reshape(members, -1) for leaves in made.values() for t in leaves.values()], 1)
    if len(made) == members:
        return torch.cat([by_member(one, 1) for one in made])
    return torch.cat([t.reshape(members, -1) for t in made], 1)


def require_equal(calls: Mapping[str, Call], members: int) -> None:
    """Raises ``AssertionError`` unless all ways but those of the base give the same numbers."""
    found = {name: by_member(call(), members) for name, call in calls.items() if not name.startswith(BASE)}
    first, want = next(iter(found.items()))
    for name, got in found.items():
        error, size = float((got - want).abs().max()), float(want.abs().max())
        assert error <= 1e-4 * size, f"{name} and {first} differ by {error:.1e}, of {size:.1e}"


# -- measuring ---------------------------------------------------------------------------------------------------------------


def first_calls(calls: Mapping[str, Call]) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """Calls every way once: those that work, the seconds that each took, and what the others raised."""
    kept, seconds, errors = {}, {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            call()
        except Exception as e:  # a compiler's errors are of any kind, and what is measured is whether it copes
            errors[name] = f"{type(e).__name__}: {e}"[:2000]
            continue
        kept[name], seconds[name] = call, time.perf_counter() - start
    return kept, seconds, errors


def measured(p: Population, mode: str, rounds: int, compiled: bool) -> Figures:
    """Measures one mode of one shape."""
    calls = eval_calls(p) if mode == "eval" else train_calls(p)
    with torch.set_grad_enabled(mode == "train"):
        require_equal(calls, p.shape.members)  # which probes too, before anything is compiled
        made, seconds, errors = first_calls(compiled_calls(p, mode)) if compiled else ({}, {}, {})
        calls = {**{n: c for n, c in calls.items() if n != BASE}, **made, BASE: calls[BASE]}
        require_equal({n: c for n, c in calls.items() if n in (PEFT, "apply_many compiled")}, p.shape.members)
        samples = interleaved(calls, rounds)
    ways = {name: summary(s) for name, s in samples.items()}
    for w in ways.values():
        w["to_limit"], w["over_peft"] = w["ms"] / ways[BASE]["ms"], ways[PEFT]["ms"] / w["ms"]
    return {"ways": ways, "compile_seconds": seconds, "errors": errors, "goals": goals_of(p.shape, mode, ways)}


def goals_of(shape: Shape, mode: str, ways: Mapping[str, Figures]) -> list[Figures]:
    """Compares with the goals of a shape."""
    ours, made = ways[OURS[mode]], []
    if (wanted := GOALS.get(shape, {}).get(mode)) is not None:
        made.append(goal(f"{mode}: speed over peft's loop", ours["over_peft"], at_least=wanted.over_peft))
        if wanted.to_limit is not None:
            made.append(goal(f"{mode}: time over the limit's", ours["to_limit"], at_most=wanted.to_limit))
    if "apply_many compiled" in ways and "base compiled" in ways:
        ratio = ways["apply_many compiled"]["ms"] / ways["base compiled"]["ms"]
        what = f"{mode}: compiled, time over the compiled base's; the goal is eager's over the base's"
        made.append(goal(what, ratio, at_most=ours["to_limit"]))
    return made


def table_of(shape: Figures, title: str) -> Table:
    """Makes the table of one shape."""
    table = Table("", "", "ms", "quartiles", "/ limit", "peft loop /", title=title, title_justify="left")
    for mode in ("eval", "train"):
        found = shape[mode]
        for i, (name, w) in enumerate(found["ways"].items()):
            spread = f"{w['q1']:.1f} to {w['q3']:.1f}"
            ratios = f"{w['to_limit']:.2f}", f"{w['over_peft']:.2f}"
            table.add_row(mode if i == 0 else "", name, f"{w['ms']:.1f}", spread, *ratios)
        for name, text in found["errors"].items():
            table.add_row("", name, "error", text.splitlines()[0][:40], "", "")
        table.add_section()
    return table


def picture(figures: Figures, path: Path) -> None:
    """Draws bars for every shape and mode on a logarithmic axis, with the limit as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = figures["shapes"]
    figure = Figure(figsize=(3.4 * len(shapes), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(shapes), squeeze=False)
    colours = {"peft": "#b0b7c3", "base": "#444444"}
    for (i, mode), (j, shape) in itertools.product(enumerate(("eval", "train")), enumerate(shapes)):
        ways, ax = shape[mode]["ways"], axes[i][j]
        names = list(ways)
        ms = [ways[n]["ms"] for n in names]
        ax.bar(range(len(names)), ms, color=[colours.get(n.split()[0], "#3b76c4") for n in names])
        ax.axhline(ways[BASE]["ms"], color="#c0392b", linewidth=1, linestyle="--")
        ax.set_yscale("log")
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        ax.set_title(f"{mode}: {', '.join(map(str, shape['shape'].values()))}", fontsize=8)
        if j == 0:
            ax.set_ylabel("milliseconds")
    figure.suptitle("hidden, layers, batch, tokens, members\ndashed: the bare base on all rows", fontsize=9)
    figure.savefig(path, dpi=120)


def shapes_main(shapes: Sequence[Shape], rounds: int, compiled: bool, out: Path, console: Console) -> None:
    """Measures the shapes, prints the tables, and writes the figures after each."""
    figures: Figures = {"machine": machine(), "shapes": []}
    for shape in shapes:
        torch.compiler.reset()
        p = Population(shape)
        found: Figures = {"shape": asdict(shape)}
        for mode in ("eval", "train"):
            found[mode] = measured(p, mode, rounds, compiled)
        figures["shapes"].append(found)
        console.print(table_of(found, f"hidden, layers, batch, tokens, members = {shape}"))
        write_json(out / "population.json", figures)
    table = Table("hidden, layers, batch, tokens, members", "ratio", "goal", "found", "met", title="goals")
    for found in figures["shapes"]:
        goals = [g for mode in ("eval", "train") for g in found[mode]["goals"]]
        for i, row in enumerate(goal_rows(goals)):
            table.add_row(", ".join(map(str, found["shape"].values())) if i == 0 else "", *row)
        table.add_section()
    console.print(table)
    picture(figures, out / "population.png")


# -- the crossover curve ----------------------------------------------------------------------------------------------------


def members_main(shapes: Sequence[Shape], counts: Sequence[int], rounds: int, out: Path, console: Console) -> None:
    """Measures peft's loop, the fold and the limit for several numbers of members."""
    figures: Figures = {"machine": machine(), "curves": []}
    for shape in shapes:
        curve: Figures = {"shape": {k: v for k, v in asdict(shape).items() if k != "members"}, "points": []}
        figures["curves"].append(curve)
        title = f"hidden, layers, batch, tokens = {', '.join(map(str, curve['shape'].values()))}; milliseconds per member"
        table = Table("members", "", PEFT, "apply_many", BASE, "/ limit", "peft loop /", title=title)
        for n in counts:
            p = Population(replace(shape, members=n))
            point: Figures = {"members": n}
            for mode in ("eval", "train"):
                calls = eval_calls(p) if mode == "eval" else train_calls(p)
                with torch.set_grad_enabled(mode == "train"):
                    samples = interleaved({w: calls[w] for w in (PEFT, "apply_many", BASE)}, rounds)
                ms = {w: statistics.median(s) for w, s in samples.items()}
                ratios = {"to_limit": ms["apply_many"] / ms[BASE], "over_peft": ms[PEFT] / ms["apply_many"]}
                point[mode] = {"ways": {w: summary(s) for w, s in samples.items()}, **ratios}
                table.add_row(str(n), mode, *(f"{t / n:.2f}" for t in ms.values()), *(f"{r:.2f}" for r in ratios.values()))
            curve["points"].append(point)
            write_json(out / "members.json", figures)
        console.print(table)
    members_picture(figures, out / "members.png")


def members_picture(figures: Figures, path: Path) -> None:
    """Draws milliseconds per member over the number of members."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = figures["curves"]
    figure = Figure(figsize=(4.5 * len(curves), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(curves), squeeze=False)
    for (i, mode), (j, curve) in itertools.product(enumerate(("eval", "train")), enumerate(curves)):
        ax, counts = axes[i][j], [point["members"] for point in curve["points"]]
        for name, style in ((PEFT, "o-"), ("apply_many", "s-"), (BASE, "k--")):
            ax.plot(counts, [p[mode]["ways"][name]["ms"] / p["members"] for p in curve["points"]], style, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, map(str, counts))
        ax.set_yscale("log")
        ax.set_xlabel("members")
        ax.set_ylabel("milliseconds per member")
        ax.set_title(f"{mode}: {', '.join(f'{k} {v}' for k, v in curve['shape'].items())}", fontsize=9)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, writes the figures and draws them."""
    made = parser(__doc__, 7)
    made.add_argument("--shapes", default="0,1,2,3,4", help="which of the five shapes, by position")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--members", action="store_true", help="the crossover curve instead")
    given = options(made, argv)
    console = Console(width=128)
    given.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        if given.members:
            shapes, counts = ((TINY,), (1, 2)) if given.quick else (CURVES, (1, 2, 4, 8, 16, 32, 64))
            members_main(shapes, counts, given.rounds, given.out, console)
        else:
            shapes = (TINY,) if given.quick else tuple(SHAPES[int(i)] for i in given.shapes.split(","))
            shapes_main(shapes, given.rounds, not given.no_compile, given.out, console)


if __name__ == "__main__":
    main()
