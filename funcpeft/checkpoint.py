"""Checkpoints of training: any tree of tensors in one safetensors file, written whole or not at all.

The file's metadata holds the structure as JSON and a digest of everything, so a file that is truncated, altered or of
another origin is refused. Nothing is pickled. Imports result, optim, schedules, tree, errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.optim import Optimizer, State
from funcpeft.result import Result
from funcpeft.schedules import Schedule
from funcpeft.tree import Adapter

_VERSION = 1
_KEY = "funcpeft.checkpoint"
_FOREIGN = "give a file that train.save wrote"
_BROKEN = "it was changed or damaged after it was written: go back to an earlier one"

#: What safetensors stores.
_DTYPES = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
_DTYPES |= {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
}

#: Nodes with named children, in the order of their constructors.
_NODES: dict[str, tuple[type, tuple[str, ...]]] = {
    "Adapter": (Adapter, ("params", "consts")),
    "State": (State, ("step", "hyper", "memory")),
    "Result": (Result, ("adapters", "state", "history", "seeds", "status", "stopping")),
}


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a tree to a file that ``load`` reads back, bit for bit.

    The file appears under its name when it is complete and on the disk, in place of one that was there; a run that is killed
    while it writes leaves the old one. What a stack of adapters keeps once is written once.

    Args:
        path: The file, ``.safetensors`` by convention; directories above it are made.
        tree: Tensors in dicts, tuples, lists, ``Adapter``, ``optim.State`` or ``train.Result``. Of a schedule the values are
            kept; its formula is a function, which ``load`` takes from the optimizer.

    Raises:
        TypeError: If something else is in the tree; the message names where.
        ValueError: If the path is a directory.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "adapter.safetensors"
        >>> save(file, Adapter({"site": {"A": torch.ones(2)}}))
        >>> load(file).params
        {'site': {'A': tensor([1., 1.])}}
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(errors.say(f"train.save to {str(target)!r}", "a file is required", "a directory"))
    tensors: list[Tensor] = []
    structure = _encoded(tree, "tree", tensors)
    named = {str(i): t for i, t in enumerate(tensors)}
    about = {"version": _VERSION, "tree": structure}
    metadata = json.dumps({**about, "digest": _digest(about, named)})
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, for a rename between file systems is no rename.
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as f:
            f.write(safetensors.torch.save(named, {_KEY: metadata}))
            f.flush()
            os.fsync(f.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    _sync_directory(target.parent)


def _sync_directory(folder: Path) -> None:
    """Makes a rename last through a loss of power, where directories can be opened (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: str | os.PathLike[str], *, optimizer: Optimizer | None = None, device: torch.device | str | None = None) -> Any:
    """Reads what ``save`` wrote.

    Args:
        path: The file.
        optimizer: Gives the formulas of schedules in an ``optim.State``, for they are functions and not in the file.
        device: Where tensors go, by default the CPU.

    Raises:
        CheckpointError: If the file is truncated, altered, of another origin or of a later version.
        FileNotFoundError: If there is none.
        ValueError: If ``optimizer`` is not that of a state in the file.
    """
    where = str(Path(path))
    if not Path(path).is_file():
        raise FileNotFoundError(errors.say(where, "a checkpoint must be there", "no file", _FOREIGN))
    tensors, metadata = _read(where)
    about = _about(where, metadata)
    digest = about.pop("digest", None)
    if digest != _digest(about, tensors):
        raise CheckpointError(errors.say(where, "content must have the digest that was written with it", digest, _BROKEN))
    placed = {name: t.clone() if device is None else t.to(device, copy=True) for name, t in tensors.items()}
    try:
        tree = _decoded(about["tree"], placed)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, RuntimeError) as e:
        rule = "its structure must be one that train.save writes"
        raise CheckpointError(errors.say(where, rule, f"{type(e).__name__}: {e}", _FOREIGN)) from e
    return tree if optimizer is None else bind(where, tree, optimizer)


def _read(where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(where, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as e:
        rule, remedy = "a whole safetensors file is required", f"it is truncated, damaged or no checkpoint: {_FOREIGN}"
        raise CheckpointError(errors.say(where, rule, str(e), remedy)) from e


def _about(where: str, metadata: dict[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        found = f"metadata {sorted(metadata)}"
        remedy = f"{_FOREIGN}; adapters in peft's format are read by load_peft"
        raise CheckpointError(errors.say(where, "a checkpoint of funcpeft is required", found, remedy))
    try:
        about = json.loads(metadata[_KEY])
    except (json.JSONDecodeError, RecursionError) as e:
        raise CheckpointError(errors.say(where, "its structure must be JSON", str(e), _BROKEN)) from e
    version = about.get("version") if isinstance(about, dict) else None
    if version != _VERSION:
        remedy = "read it with the release that wrote it"
        raise CheckpointError(errors.say(where, f"version {_VERSION} is required", version, remedy))
    return about


def _digest(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hashes structure, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        found.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _encoded(node: Any, where: str, tensors: list[Tensor]) -> Any:
    """Describes a tree as JSON, and lists its tensors."""
    if isinstance(node, Tensor):
        return _encoded_tensor(node, where, tensors)
    if isinstance(node, dict):
        odd = [k for k in node if not isinstance(k, str)]
        if odd:
            raise TypeError(errors.say(f"train.save: {where}", "keys must be strings", repr(odd[0])))
        return {"dict": {k: _encoded(v, f"{where}[{k!r}]", tensors) for k, v in node.items()}}
    if type(node) in (tuple, list):
        return {type(node).__name__: [_encoded(v, f"{where}[{i}]", tensors) for i, v in enumerate(node)]}
    if isinstance(node, Schedule):
        return {"Schedule": _encoded(dict(node.values), f"{where}.values", tensors), "formula": _name(node.formula)}
    for name, (cls, fields) in _NODES.items():
        if type(node) is cls:
            made = {name: {f: _encoded(getattr(node, f), f"{where}.{f}", tensors) for f in fields}}
            return {**made, "rank_axes": node.rank_axes} if isinstance(node, Adapter) else made
    rule = "a tensor, dict, tuple, list, Adapter, optim.State or Result is required"
    raise TypeError(errors.say(f"train.save: {where}", rule, type(node).__name__))


def _encoded_tensor(t: Tensor, where: str, tensors: list[Tensor]) -> dict[str, Any]:
    if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
        raise TypeError(errors.say(f"train.save: {where}", "a plain tensor is required", type(t).__name__))
    if t.layout != torch.strided or t.is_meta or t.dtype not in _DTYPES:
        found = f"{t.dtype}, {t.layout}, on {t.device}"
        raise TypeError(errors.say(f"train.save: {where}", "a dense tensor with values is required", found))
    once = t.ndim > 0 and t.shape[0] > 1 and t.stride(0) == 0
    tensors.append((t[0] if once else t).detach().cpu().clone(memory_format=torch.contiguous_format))
    made = {"tensor": str(len(tensors) - 1)}
    return {**made, "times": t.shape[0]} if once else made


def _decoded(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    match node:
        case {"tensor": str(name), "times": int(times)}:
            return tensors[name].expand(times, *tensors[name].shape)
        case {"tensor": str(name)}:
            return tensors[name]
        case {"dict": children}:
            return {k: _decoded(v, tensors) for k, v in children.items()}
        case {"tuple": children}:
            return tuple(_decoded(v, tensors) for v in children)
        case {"list": children}:
            return [_decoded(v, tensors) for v in children]
        case {"Schedule": values, "formula": str(name)}:
            return Schedule(Unbound(name), _decoded(values, tensors))
        case {"Adapter": children, "rank_axes": axes}:
            params, consts = (_decoded(children[f], tensors) for f in ("params", "consts"))
            return Adapter(params, consts, tuple((str(name), int(axis)) for name, axis in axes))
        case {"State": children} | {"Result": children}:
            cls, fields = _NODES[next(iter(node))]
            return cls(*(_decoded(children[f], tensors) for f in fields))
        case _:
            raise ValueError(f"unknown node {sorted(node)}")


# -- schedules ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unbound:
    """Stands for a schedule's formula after loading, until the optimizer gives it."""

    name: str

    def __call__(self, step: Tensor, **values: Any) -> Tensor:
        rule = f"the formula {self.name!r} is a function and not in the checkpoint"
        raise ValueError(errors.say("schedule", rule, None, "call load(path, optimizer=...) with the optimizer it is of"))


def _name(formula: Any) -> str:
    if isinstance(formula, Unbound):
        return formula.name
    return getattr(formula, "__qualname__", type(formula).__qualname__)  # its module may be __main__ today, another tomorrow


def bind(where: str, tree: Any, optimizer: Optimizer) -> Any:
    """Returns a tree in which the schedules of every ``State`` have the formulas of an optimizer.

    Raises:
        ValueError: If the optimizer has other transforms, hyperparameters or schedules.
    """
    if isinstance(tree, State):
        return _bound(where, tree, optimizer)
    if isinstance(tree, Result):
        return tree.replace(state=_bound(where, tree.state, optimizer))
    if isinstance(tree, dict):
        return {k: bind(where, v, optimizer) for k, v in tree.items()}
    return type(tree)(bind(where, v, optimizer) for v in tree) if type(tree) in (tuple, list) else tree


def _bound(where: str, state: State, optimizer: Optimizer) -> State:
    own = {key: dict(t.hyper) for key, t in optimizer.transforms.items()}
    for key in sorted(own.keys() | state.hyper.keys()):
        if own.get(key, {}).keys() != state.hyper.get(key, {}).keys():
            found = f"{sorted(state.hyper)}, and of {key!r} the hyperparameters {sorted(state.hyper.get(key, {}))}"
            raise ValueError(errors.say(where, f"the optimizer must be that of the state, {found}", repr(optimizer)))
    hyper = {k: {n: _rebound(f"{where}: {k}: {n}", h, own[k][n]) for n, h in hs.items()} for k, hs in state.hyper.items()}
    return State(state.step, hyper, state.memory)


def _rebound(where: str, held: Any, own: Any) -> Any:
    names = [_name(h.formula) if isinstance(h, Schedule) else "no schedule" for h in (held, own)]
    if names[0] != names[1]:
        rule = f"the optimizer's schedule must be that of the state, {names[0]}"
        raise ValueError(errors.say(where, rule, names[1], "pass the optimizer that it was made with"))
    return Schedule(own.formula, held.values) if isinstance(held, Schedule) else held
