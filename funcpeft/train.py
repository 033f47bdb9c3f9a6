"""Training a population: one loop over stacked adapters, in which each member has its own hyperparameters and draws.

Every member's run is a function of its adapter, its seeds, its hyperparameters and the data: batches and dropout are derived
from (seed, step), a member that stops early leaves the computed stack, and one whose loss is not finite does so at once. So a
run continues bit for bit from a checkpoint. Imports batches, resuming, checkpoint, result, population, gradients and below.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from tqdm import tqdm

from funcpeft import errors, rng
from funcpeft.adapt import Net
from funcpeft.batches import Batch, Batches
from funcpeft.checkpoint import load, save
from funcpeft.chunks import chunk, tokens
from funcpeft.context import EVAL, Context
from funcpeft.functional import Params
from funcpeft.gradients import value_and_grad
from funcpeft.optim import Optimizer, State
from funcpeft.population import apply_many
from funcpeft.result import DIVERGED, RUNNING, STATUS, STOPPED, Result, pick
from funcpeft.resuming import WHERE, begin, copied, rates, resumed
from funcpeft.stacking import members
from funcpeft.tree import Adapters, as_tuple, tree_leaves, tree_map

__all__ = ["STATUS", "Result", "load", "population", "save"]


def population(
    net: Net,
    params: Params,
    adapters: Any,
    data: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    optimizer: Optimizer,
    steps: int,
    batch_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    order: int | Sequence[int] | None = None,
    inputs: Sequence[str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    training: bool = True,
    evaluate: Any = None,
    evaluate_every: int = 100,
    patience: int | None = None,
    min_delta: float = 0.0,
    stop: Callable[[int, Tensor], Tensor] | None = None,
    strategy: str = "auto",
    chunk_size: int | str | None = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    resume: bool | None = None,
    progress: bool | None = None,
) -> Result:
    """Trains all members of a population, each as if it were alone; nothing given is changed.

    Args:
        net: The net of all members. Members made by nets whose ranks or alphas differ stack, so one loop trains them.
        params: The frozen base.
        adapters: A stack of N members or a list of them; or a ``Result`` of N members, from which training goes on.
        data: Examples: tensors with one first axis (a tensor, a mapping or a tuple of them), another sequence of examples,
            which torch's ``default_collate`` makes batches of, or a function ``(step, seed) -> batch`` of two ints.
        loss_fn: ``loss_fn(output, batch)`` returns the 0-d loss of one member. It is called under ``torch.func.vmap``, where
            a mask cannot pick elements: multiply by it, or leave targets out with cross entropy's ``ignore_index``.
        optimizer: An optimizer; its hyperparameters are numbers, ``(N,)`` tensors with one for each member, or schedules.
        steps: Steps that the population shall have made in the end, those of a run that is continued included.
        batch_size: Examples per member and step; the rest of an epoch that does not fill a batch is left out.
        seed: Determines dropout, and the order of data unless ``order`` does: an int, from which members derive different
            seeds, or N ints. Members with equal seeds draw the same. A ``Result`` holds its own.
        order: Determines the order of data: N ints, or an int for the same batches in the same order for all members.
        inputs: Names of the tensors of a batch that the model takes, by default all but ``"labels"``. Of a tuple the model
            takes the first.
        model_kwargs: Further keyword inputs of the model, the same for all.
        training: Whether adapter dropout is on.
        evaluate: Held-out data (in the forms of ``data`` but a function), on which the mean of ``loss_fn`` is taken, or a
            function ``evaluate(stacked) -> (n,)`` losses of the members in that stack. No dropout.
        evaluate_every: Steps from one evaluation to the next.
        patience: Stops a member after so many evaluations in a row that are not below its lowest by more than ``min_delta``.
        min_delta: See ``patience``.
        stop: ``stop(step, losses)`` gets every evaluation ``(N,)``, NaN for members that run no more, and returns a mask
            ``(N,)`` of the members to stop.
        strategy: How members are computed together, see ``apply_many``.
        chunk_size: Members computed at once: an int, ``None`` for all, or ``"auto"`` for about 4096 tokens.
        checkpoint: File to which the run is saved every ``save_every`` steps and at the end, see ``save``.
        save_every: See ``checkpoint``.
        resume: Whether to go on from ``checkpoint`` if that file is there, or to start anew and replace it; if neither is
            said, a file that is there is an error.
        progress: Whether to show a bar on stderr; by default on a terminal.

    Returns:
        The population after training. A member whose loss or gradient is not finite stops with the adapter that had it,
        before the update, and ``result.outcomes`` says ``"diverged"``; the others do not notice.

    Raises:
        ValueError: If a value is out of range, numbers of members disagree, the data is empty, or a run that is continued
            had another optimizer, other seeds or another number of members.
        TypeError: If an argument is of another kind, or the adapters are not the net's.
        CheckpointError: If the file to go on from is none, or damaged.

    Note:
        Step t of a member with data seed s takes the t-th batch of ``torch.randperm``, seeded anew by s every epoch. A run
        that is continued, from a file or a ``Result``, gives the bits of one that was not interrupted, if it is given what
        the first part was given, on the same machine and number of threads. That includes ``params``, ``data``, functions,
        ``batch_size``, ``evaluate_every``, ``patience`` and ``training``, which are not in the file and not compared.

    Example:
        >>> import torch
        >>> from funcpeft import LoRA, adapt, functionalize, optim
        >>> model, params = functionalize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)))
        >>> net = adapt(model, LoRA(r=2, target_modules=["0", "1"]))
        >>> x = torch.linspace(-1, 1, 48).reshape(12, 4)
        >>> result = population(
        ...     net, params, [net.init(params, seed=s) for s in range(3)], (x, x.sum(1, keepdim=True)),
        ...     lambda output, batch: (output - batch[1]).square().mean(),
        ...     optimizer=optim.adamw(lr=torch.tensor([1e-3, 1e-2, 1e-1])), steps=20, batch_size=4, seed=0, progress=False,
        ... )
        >>> result, result.history["loss"].shape
        (Result(3 members after 20 steps: 3 running), torch.Size([20, 3]))
    """
    _require_counts(steps=steps, evaluate_every=evaluate_every, save_every=save_every, patience=patience)
    _require_kinds(optimizer, loss_fn, min_delta)
    if evaluate is None and not (patience is None and stop is None):
        raise ValueError(errors.say(WHERE, "patience and stop judge evaluations", "evaluate=None", "pass held-out data"))
    start = begin(net, params, adapters, optimizer, seed, order)
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None and file.exists():
        start = resumed(file, start, optimizer, resume)
    if start.step > steps:
        raise ValueError(errors.say(WHERE, f"steps must be at least the {start.step} that the run has made", steps))
    device = tree_leaves(start.adapters)[0].device
    batches = Batches(f"{WHERE}: data", data, batch_size, device)
    task = _Task(net, params, loss_fn, inputs, dict(model_kwargs or {}), training, strategy, chunk_size)
    judge = None if evaluate is None else _judge(task, evaluate, batch_size, device)
    run = _Run(task, optimizer, batches, start)
    bar = tqdm(
        range(start.step, steps),
        desc=f"{start.members} x {type(net.methods[0]).__name__}",
        unit="step",
        initial=start.step,
        total=steps,
        disable=None if progress is None else not progress,
    )
    with torch.no_grad(), bar:
        for step in bar:
            if not len(run.live):
                break
            run.advance(step)
            if judge is not None and (step + 1) % evaluate_every == 0:
                run.judge(step + 1, judge, patience, min_delta, stop)
            if file is not None and (step + 1) % save_every == 0 and step + 1 < steps:
                save(file, run.result())
            bar.set_postfix_str(run.news(), refresh=False)
    result = run.result()
    if file is not None:
        save(file, result)
    return result


@dataclass(frozen=True, eq=False)
class _Task:
    """What is the same at every step: the losses of members as a pure function."""

    net: Net
    params: Params
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Sequence[str] | None
    extra: Mapping[str, Any]
    training: bool
    strategy: str
    chunk_size: int | str | None

    def losses(self, stacked: Any, batch: Batch, axis: int | None, context: Context) -> Tensor:
        """Computes the losses ``(n,)`` of stacked members on their batches, or on one if ``axis`` is ``None``."""
        args, kwargs = self._inputs(batch)
        in_dims = (tuple(axis for _ in args), {**dict.fromkeys(kwargs, axis), **dict.fromkeys(self.extra)})
        outs = apply_many(
            self.net,
            self.params,
            stacked,
            *args,
            in_dims=in_dims,
            chunk_size=None,  # members are already few enough
            strategy=self.strategy,
            context=context,
            **kwargs,
            **self.extra,
        )
        mapped = pytree.tree_map(lambda t: 0 if isinstance(t, Tensor) else None, outs)
        found = torch.func.vmap(self.loss_fn, in_dims=(mapped, axis))(outs, batch)
        if not isinstance(found, Tensor) or found.ndim != 1 or not found.is_floating_point():
            shape = f"{found.dtype} {tuple(found.shape[1:])}" if isinstance(found, Tensor) else type(found).__name__
            rule, remedy = "loss_fn must return the 0-d loss of one member", "reduce it with mean or sum"
            raise ValueError(errors.say(WHERE, rule, shape, remedy))
        return found

    def gradients(self, stacked: Any, batch: Batch, axis: int | None, seeds: Tensor) -> tuple[Tensor, Any]:
        """Computes losses ``(n,)`` and their gradients."""

        def losses(stacked: Any, batch: Batch, seeds: Tensor) -> Tensor:
            return self.losses(stacked, batch, axis, Context(training=True, seed=seeds) if self.training else EVAL)

        return value_and_grad(losses, in_dims=(axis, 0), chunk_size=self.chunk_size)(stacked, batch, seeds)

    def evaluation(self, stacked: Any, batch: Batch) -> Tensor:
        """Computes losses ``(n,)`` on one batch for all, without dropout."""
        numbers = torch.arange(members(stacked))
        size = self.chunk_size
        if size == "auto":
            size = chunk(len(numbers), map(tokens, pytree.tree_leaves(batch)))
        parts = numbers.split(size or len(numbers))
        return torch.cat([self.losses(pick(stacked, part), batch, None, EVAL) for part in parts])

    def _inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not isinstance(batch, dict):
            return (batch[:1] if isinstance(batch, tuple) else (batch,)), {}
        names = [n for n in batch if n != "labels"] if self.inputs is None else self.inputs
        absent = [n for n in names if n not in batch]
        if absent:
            hint = errors.nearest(absent[0], map(str, batch))
            raise errors.NameMissingError(errors.say(WHERE, "inputs must be names of a batch's tensors", absent[0], hint))
        return (), {n: batch[n] for n in names}


def _judge(task: _Task, evaluate: Any, size: int | None, device: torch.device) -> Callable[[Any], Tensor]:
    """Returns the evaluation as a function of stacked members."""
    if not isinstance(evaluate, Tensor) and callable(evaluate):
        judge: Any = evaluate
        return judge
    held = Batches(f"{WHERE}: evaluate", evaluate, size, device, at_most=True)

    def mean(stacked: Any) -> Tensor:
        parts = [task.evaluation(stacked, batch).double() * (rows / held.count) for batch, rows in held.all()]
        return torch.stack(parts).sum(0)

    return mean


@dataclass(eq=False)
class _Run:
    """The state of the loop: all members in order, and of those that run a stack of their own."""

    task: _Task
    optimizer: Optimizer
    batches: Batches
    whole: Result
    live: Tensor = field(init=False)
    adapters: Any = field(init=False)
    state: State = field(init=False)
    rows: dict[str, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {name: [t] for name, t in self.whole.history.items()}
        self.live = (self.whole.status == RUNNING).nonzero()[:, 0]
        self.adapters, self.state = pick((self.whole.adapters, self.whole.state), self.live)

    def advance(self, step: int) -> None:
        """Makes one step of the members that run."""
        seeds = {name: t[self.live].tolist() for name, t in self.whole.seeds.items()}
        draws = torch.tensor([rng.fold_in(s, "dropout", step) for s in seeds["dropout"]], device=self.batches.device)
        batch, axis = self.batches.at(step, seeds["order"])
        lr = rates(self.state)
        losses, grads = self.task.gradients(self.adapters, batch, axis, draws)
        moved, state = self.optimizer.update(grads, self.state, self.adapters)
        self._record("loss", losses)
        self._record("active", torch.ones(len(self.live), dtype=torch.bool))
        if lr is not None:
            self._record("lr", lr)
        finite = torch.stack([losses.isfinite(), *(g.flatten(1).isfinite().all(1) for g in tree_leaves(grads))]).all(0).cpu()
        if not finite.all():
            self._leave(~finite, DIVERGED)  # before the update
            moved, state = pick((moved, state), finite.nonzero()[:, 0])
        # One layout whatever the gradients' was, for a run that is continued finds its tensors contiguous.
        self.adapters, self.state = (
            _with_params(self.adapters, tree_map(_contiguous, _params(moved))),
            tree_map(_contiguous, state),
        )

    def judge(
        self,
        step: int,
        judge: Callable[[Any], Tensor],
        patience: int | None,
        min_delta: float,
        stop: Callable[[int, Tensor], Tensor] | None,
    ) -> None:
        """Evaluates the members that run, and stops some."""
        if not len(self.live):
            return
        losses = torch.as_tensor(judge(self.adapters)).detach().double().cpu()
        if losses.shape != self.live.shape:
            rule = f"evaluate must return one loss for each of {len(self.live)} members"
            raise ValueError(errors.say(WHERE, rule, f"shape {tuple(losses.shape)}"))
        self.rows["evaluated"].append(torch.tensor([step]))
        self._record("evaluation", losses)
        now, (best, waited) = self.rows["evaluation"][-1][0], (self.whole.stopping[k] for k in ("best", "waited"))
        better = now < best - min_delta
        stopping = {"best": torch.where(better, now, best), "waited": torch.where(better, 0, waited + 1)}
        running = self.whole.status == RUNNING
        stopping = {k: torch.where(running, t, self.whole.stopping[k]) for k, t in stopping.items()}
        self.whole = self.whole.replace(stopping=stopping)
        ending = torch.zeros(len(running), dtype=torch.bool)
        if patience is not None:
            ending |= stopping["waited"] >= patience
        if stop is not None:
            ending |= _mask(stop(step, now.clone()), len(running))
        if ending[self.live].any():
            self._leave(ending[self.live], STOPPED)

    def result(self) -> Result:
        """Returns all members in order."""
        self._put_back()
        history = {name: torch.cat(parts) for name, parts in self.rows.items()}
        self.rows = {name: [t] for name, t in history.items()}
        return copied(self.whole.replace(history=history))

    def news(self) -> str:
        """Says the lowest loss, and how many members run."""
        loss = self.rows["loss"][-1]
        return f"lowest loss {loss.nan_to_num(math.inf).min():.4f}, {len(self.live)} running"

    def _record(self, name: str, values: Tensor) -> None:
        blank = torch.zeros(self.whole.members, dtype=torch.bool) if values.dtype == torch.bool else _nans(self.whole.members)
        self.rows[name].append(blank.index_copy(0, self.live, values.detach().cpu().to(blank.dtype))[None])

    def _put_back(self) -> None:
        adapters = _with_params(self.whole.adapters, _put(_params(self.whole.adapters), self.live, _params(self.adapters)))
        self.whole = self.whole.replace(adapters=adapters, state=_put(self.whole.state, self.live, self.state))

    def _leave(self, mask: Tensor, status: int) -> None:
        """Takes members, by a mask of those that run, out of the computed stack."""
        self._put_back()
        leaving, staying = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        self.whole = self.whole.replace(status=self.whole.status.index_fill(0, self.live[leaving], status))
        self.live = self.live[staying]
        self.adapters, self.state = pick((self.adapters, self.state), staying)


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _nans(count: int) -> Tensor:
    return torch.full((count,), torch.nan, dtype=torch.float64)


def _params(adapters: Adapters) -> tuple[Any, ...]:
    return tuple(one.params for one in as_tuple(adapters))


def _with_params(adapters: Adapters, params: tuple[Any, ...]) -> Any:
    made = tuple(one.replace(params=p) for one, p in zip(as_tuple(adapters), params, strict=True))
    return made if isinstance(adapters, tuple) else made[0]


def _put(whole: Any, index: Tensor, part: Any) -> Any:
    """Returns a tree with the entries of another put at an index of the leading axis."""
    return tree_map(lambda w, p: w.index_copy(0, index.to(w.device), p), whole, part)


def _mask(found: Any, count: int) -> Tensor:
    mask = torch.as_tensor(found)
    if mask.shape != (count,) or mask.dtype != torch.bool:
        found = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(errors.say(WHERE, f"stop must return a mask ({count},) of booleans", found))
    return mask.cpu()


def _require_counts(**counts: Any) -> None:
    for name, value in counts.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (value is None and name == "patience"):
            raise ValueError(errors.say(WHERE, f"{name} must be an int of at least 1", repr(value)))


def _require_kinds(optimizer: Any, loss_fn: Any, min_delta: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        found = type(optimizer).__name__
        raise TypeError(errors.say(WHERE, "optimizer must be an Optimizer of fp.optim", found, "use fp.optim.adamw(lr=1e-3)"))
    if not callable(loss_fn):
        raise TypeError(errors.say(WHERE, "loss_fn must be a function of (output, batch)", type(loss_fn).__name__))
    if isinstance(min_delta, bool) or not isinstance(min_delta, int | float) or not 0 <= min_delta < math.inf:
        raise ValueError(errors.say(WHERE, "min_delta must be a number in [0, inf)", repr(min_delta)))
