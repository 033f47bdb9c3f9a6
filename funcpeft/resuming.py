"""Where a run of ``train.population`` starts: anew, from a ``Result``, or from a file, after comparing it with what is given.

Imports checkpoint, result, schedules, adapt and below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.adapt import Net
from funcpeft.checkpoint import bind, load
from funcpeft.functional import Params
from funcpeft.optim import Optimizer, State
from funcpeft.result import RUNNING, Result, pick, require_result
from funcpeft.schedules import Schedule, evaluate
from funcpeft.stacking import members, stack, unstack
from funcpeft.tree import as_tuple, tree_leaves, tree_map

WHERE = "train.population"
_ANEW = "pass what that run was given, or its result.adapters to start anew"
_ON_CPU = ("history", "seeds", "status", "stopping")


def begin(
    net: Net, params: Params, adapters: Any, optimizer: Optimizer, seed: int | Sequence[int] | None, order: Any
) -> Result:
    """Makes the state of a run before its first step, or checks and copies that of a run which is continued."""
    if not isinstance(net, Net):
        raise TypeError(errors.say(WHERE, "a Net is required", type(net).__name__, "make it with adapt"))
    given = adapters.adapters if isinstance(adapters, Result) else adapters
    given = stack(given) if isinstance(given, list) else given
    try:
        count = members(given)
    except ValueError as e:
        raise ValueError(errors.say(WHERE, "adapters must be a list of them or a stack", f"({e})")) from e
    net.attach(params, unstack(pick(given, torch.tensor([0])))[0])  # says what differs from the net's
    fresh = optimizer.init(given, members=count)
    if isinstance(adapters, Result):
        if seed is not None or order is not None:
            _require_seeds(adapters.seeds, _seeds(count, adapters.seeds["dropout"].tolist() if seed is None else seed, order))
        return copied(adapters.replace(state=_continued(f"{WHERE}: optimizer", adapters.state, fresh, optimizer)))
    history = {name: torch.empty(0, count, dtype=torch.float64) for name in ("loss", "evaluation")}
    history |= {"active": torch.empty(0, count, dtype=torch.bool), "evaluated": torch.empty(0, dtype=torch.int64)}
    if rates(fresh) is not None:
        history["lr"] = torch.empty(0, count, dtype=torch.float64)
    stopping = {"best": torch.full((count,), math.inf, dtype=torch.float64), "waited": torch.zeros(count, dtype=torch.int64)}
    status = torch.full((count,), RUNNING)
    return copied(Result(given, fresh, history, _seeds(count, seed, order), status, stopping))


def resumed(file: Path, start: Result, optimizer: Optimizer, resume: bool | None) -> Result:
    """Returns the run in a file if it is to be continued, after comparing it with what was given."""
    if resume is None:
        remedy = "pass resume=True to go on from it, or resume=False to replace it"
        raise ValueError(errors.say(f"{WHERE}: checkpoint", "there is a file already", repr(str(file)), remedy))
    if not resume:
        return start
    where = f"{WHERE}: checkpoint {str(file)!r}"
    found = require_result(where, load(file, device=tree_leaves(start.adapters)[0].device))
    found = found.replace(**{k: tree_map(Tensor.cpu, getattr(found, k)) for k in _ON_CPU})
    if found.members != start.members:
        raise ValueError(errors.say(where, f"adapters must be {found.members} members, as in the file", start.members, _ANEW))
    if found.step < start.step:
        remedy = "give another file, or resume=False to replace it"
        raise ValueError(
            errors.say(where, f"the file must hold at least the {start.step} steps of the Result", found.step, remedy)
        )
    held, given = (as_tuple(r.adapters) for r in (found, start))
    _require_alike(where, "params", [a.params for a in held], [a.params for a in given], values=False)
    _require_alike(where, "consts", [a.consts for a in held], [a.consts for a in given], values=True)
    _require_seeds(found.seeds, start.seeds)
    return found.replace(state=_continued(where, found.state, start.state, optimizer))


def _continued(where: str, held: State, fresh: State, optimizer: Optimizer) -> State:
    """Returns a state that is continued, if it is one of this optimizer with these hyperparameters."""
    bound = bind(where, held, optimizer)
    for key, hyper in bound.hyper.items():
        for name, value in hyper.items():
            pairs = {name: (value, fresh.hyper[key][name])}
            if isinstance(value, Schedule):
                other = fresh.hyper[key][name].values
                pairs = {f"{name}: {k}": (value.values[k], other[k]) for k in value.values}
            for label, (was, now) in pairs.items():
                if not torch.equal(was.cpu(), now.cpu()):
                    rule = f"{key}: {label} must be that of the run to continue, {was.tolist()}"
                    raise ValueError(errors.say(where, rule, now.tolist(), _ANEW))
    _require_alike(where, "the optimizer's memory", bound.memory, fresh.memory, values=False)
    return bound


def _require_alike(where: str, what: str, held: Any, given: Any, *, values: bool) -> None:
    """Raises ``ValueError`` naming the first leaf at which two trees differ in shape or dtype, or in value."""
    was, now = (dict(pytree.tree_flatten_with_path(tree)[0]) for tree in (held, given))
    for path in dict.fromkeys([*was, *now]):
        a, b = was.get(path), now.get(path)
        name = f"{what}{pytree.keystr(path)}"
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            found, rule = (("none" if t is None else f"{t.dtype} {tuple(t.shape)}") for t in (b, a))
            raise ValueError(errors.say(where, f"{name} must be as in the run to continue, {rule}", found, _ANEW))
        if values and not torch.equal(a, b):
            rule = f"{name} is frozen and must equal that of the run to continue"
            raise ValueError(errors.say(where, rule, "other values", _ANEW))


def _seeds(count: int, seed: int | Sequence[int] | None, order: int | Sequence[int] | None) -> dict[str, Tensor]:
    """Returns the seeds of every member."""
    if seed is None:
        raise ValueError(errors.say(WHERE, "seed must be an int, or one int for each member", None, "pass seed=0"))
    own = _ints("seed", seed, count)
    own = [rng.fold_in(own[0], "member", i) for i in range(count)] if isinstance(seed, int) else own
    orders = [rng.fold_in(s, "order") for s in own] if order is None else _ints("order", order, count)
    return {"dropout": torch.tensor(own), "order": torch.tensor(orders)}


def _ints(name: str, given: int | Sequence[int] | Tensor, count: int) -> list[int]:
    found = [given] * count if isinstance(given, int) else given.tolist() if isinstance(given, Tensor) else list(given)
    if len(found) != count or not all(isinstance(s, int) and not isinstance(s, bool) and abs(s) < 2**63 for s in found):
        rule = f"{name} must be an int of 63 bits, or {count} of them, one for each member"
        raise ValueError(errors.say(WHERE, rule, given))
    return found


def _require_seeds(held: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for name, label in (("dropout", "seed"), ("order", "order")):
        if not torch.equal(held[name], given[name]):
            rule = f"{label} must be that of the run to continue"
            raise ValueError(errors.say(WHERE, rule, "another", "pass the same, or none with a Result"))


def rates(state: State) -> Tensor | None:
    """Returns the learning rates ``(n,)`` of the next step, if the optimizer has any."""
    for key, hyper in state.hyper.items():
        if "lr" in hyper:
            return evaluate(f"{key}: lr", hyper["lr"], state.step)
    return None


def copied(result: Result) -> Result:
    """Returns a copy that shares no tensor with the argument."""
    return result.select(range(result.members))
