"""Blocks: modules of a skeleton whose intermediates are recomputed in the backward pass.

A block's ``forward`` becomes a pure function of everything bound below it (tensors, expressions with their leaves, context
and layout) and of its inputs, which ``remat`` can call a second time, on a skeleton of its own. Imports remat, caches, slots,
errors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from funcpeft import errors
from funcpeft.caches import is_cache
from funcpeft.remat import remat
from funcpeft.slots import held, put

#: What lends a skeleton of the same form for one run: the part of it that belongs to a block.
Lend = Callable[[str], AbstractContextManager["Block"]]


class Block:
    """The part of a skeleton that belongs to one block."""

    def __init__(
        self, path: str, module: nn.Module, slots: Sequence[Any], bindings: Sequence[Any], units: Sequence[Any], lend: Lend
    ) -> None:
        self.path, self.module, self.slots = path, module, tuple(slots)
        self.bindings, self.units, self.lend = tuple(bindings), tuple(units), lend
        self.forward = functools.partial(type(module).forward, module)
        self.first = [held(holder, index) for holder, index in self.slots]
        self.record: Any = None  # of the module's collections, by which what a run wrote is put back

    def bound(self) -> dict[str, Any]:
        """Returns everything that a call has bound here, as a tree."""
        return {
            "slots": [held(holder, index) for holder, index in self.slots],
            "weights": [(b.expr, b.bias) for b in self.bindings],
            "units": [u.weights for u in self.units],
        }

    def bind(self, bound: Mapping[str, Any], counts: Sequence[int]) -> None:
        """Takes what another skeleton's block had bound."""
        for (holder, index), value in zip(self.slots, bound["slots"], strict=True):
            put(holder, index, value)
        for b, (expr, bias), count in zip(self.bindings, bound["weights"], counts, strict=True):
            b.bind(expr, bias)
            b.met = count
        for u, weights in zip(self.units, bound["units"], strict=True):
            u.weights = weights

    def let_go(self) -> None:
        """Puts back what was here before ``bind``, and what the run wrote."""
        for (holder, index), value in zip(self.slots, self.first, strict=True):
            put(holder, index, value)
        for b in self.bindings:
            b.bind(None, None)
        for u in self.units:
            u.bind(None)
        self.record.restore()

    def run(self, args: Any, kwargs: Any) -> Any:
        """Calls the block so that its intermediates are not kept."""
        cached = any(is_cache(a) for a in (*args, *kwargs.values()))  # which a second run would fill twice
        if cached or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        counts = tuple(b.met for b in self.bindings)
        out, met = remat(_Run(self.lend, self.path, counts))(self.bound(), args, kwargs)
        for b, count in zip(self.bindings, met, strict=True):
            b.met = count
        return out


class _Run:
    """A block as a pure function of what is bound in it and of its inputs."""

    __slots__ = ("counts", "lend", "path")

    def __init__(self, lend: Lend, path: str, counts: Sequence[int]) -> None:
        self.lend, self.path, self.counts = lend, path, counts

    def __call__(self, bound: Mapping[str, Any], args: Any, kwargs: Any) -> tuple[Any, tuple[int, ...]]:
        with self.lend(self.path) as block:
            block.bind(bound, self.counts)
            try:
                out = block.forward(*args, **kwargs)
                return out, tuple(b.met for b in block.bindings)
            finally:
                block.let_go()


@functools.cache
def _block_class(cls: type) -> type:
    """Returns a class whose ``forward`` runs the module as the block in its ``_block``."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_block"].run(args, kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def make_block(block: Block) -> None:
    """Turns a module of a skeleton into a block."""
    block.module.__class__ = _block_class(type(block.module))
    block.module.__dict__["_block"] = block


def block_paths(root: nn.Module, which: bool | str | Sequence[str]) -> tuple[str, ...]:
    """Returns the paths of the modules to recompute: outermost ones only.

    Args:
        root: The model's structure.
        which: ``True`` for transformers' blocks (``GradientCheckpointingLayer``), else names, dotted suffixes or regular
            expressions of them.

    Raises:
        NoMatchError: If nothing is found.
        TypeError: If a pattern is no regular expression.
    """
    if which is False:
        return ()
    patterns = () if which is True else (which,) if isinstance(which, str) else tuple(which)
    for p in patterns:
        try:
            re.compile(p)
        except (re.error, TypeError) as e:
            rule = "remat must be True, or names or regular expressions of modules"
            raise TypeError(errors.say(type(root).__name__, rule, repr(p))) from e
    found = [n for n, m in root.named_modules() if n and (_is_layer(m) if which is True else _named(n, patterns))]
    outer = [n for n in found if not any(n.startswith(f"{o}.") for o in found)]
    missing = [p for p in patterns if not any(_named(n, (p,)) for n in found)]
    if not outer or missing:
        rule = "remat must name modules of the model" if patterns else "remat=True needs transformers' layers"
        remedy = "" if patterns else "name the modules to recompute: remat=['layers.0', ...]"
        raise errors.NoMatchError(errors.say(type(root).__name__, rule, errors.listed(missing or ["none"]), remedy))
    return tuple(outer)


def decoder_of(root: nn.Module) -> tuple[str, Any]:
    """Returns the dotted name and the module of transformers' decoder: what holds the stack of blocks.

    Raises:
        ValueError: If there is none.
    """
    found: Any = root.get_decoder() if hasattr(root, "get_decoder") else None  # type: ignore[operator]
    name = next((n for n, m in root.named_modules() if m is found), None)
    if name is None or not _stack(found):
        rule = "the model must have a decoder with a list of blocks, 'layers' or 'h'"
        raise ValueError(errors.say(type(root).__name__, rule, type(found).__name__, "use a causal model of transformers"))
    return name, found


def decoder_blocks(root: nn.Module) -> tuple[str, ...]:
    """Returns the dotted names of the blocks of transformers' decoder, in order."""
    name, decoder = decoder_of(root)
    stack, count = _stack(decoder), len(getattr(decoder, _stack(decoder)))
    return tuple(f"{name}.{stack}.{i}" if name else f"{stack}.{i}" for i in range(count))


def _stack(decoder: Any) -> str:
    return next((n for n in ("layers", "h") if isinstance(getattr(decoder, n, None), nn.ModuleList)), "")


def _named(path: str, patterns: Sequence[str]) -> bool:
    return any(re.match(rf"(.*\.)?({p})$", path) for p in patterns)


def _is_layer(module: nn.Module) -> bool:  # by name, so that transformers is not imported
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def inside(path: str, root: str) -> bool:
    """Whether a dotted name is that of a module or below it."""
    return not root or path == root or path.startswith(f"{root}.")
