"""A net and an adapter as an ``nn.Module``: for transformers' Trainer, Accelerate, and the optimizers of torch.

The only stateful thing of the package. Imports adapt and everything below it, peft; transformers and accelerate are never
imported, a model that is one of transformers' brings its base class with it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from funcpeft import errors
from funcpeft.adapt import Net
from funcpeft.context import EVAL, Context
from funcpeft.functional import Params
from funcpeft.interop.peft import save_peft
from funcpeft.storage import Quantized
from funcpeft.tree import Adapter, Adapters, Tree, as_tuple, tree_map

#: The file that Trainer resumes from.
STATE = "model.safetensors"


def to_module(net: Net, params: Params, adapter: Adapters, *, seed: int = 0, task_type: str | None = None) -> AdapterModule:
    """Makes a module whose parameters are an adapter's, for code that trains modules.

    Args:
        net: The net.
        params: The base's leaves; shared, never written, and not in the state dict.
        adapter: What ``net.init`` made, or a tree of its form; its trained leaves are copied.
        seed: Determines the draws of dropout, with the count of calls made in training mode.
        task_type: peft's task type, for the files that ``save_pretrained`` writes.

    Returns:
        An ``AdapterModule``. If the net's model is one of transformers' and has a peft form, it is a ``PreTrainedModel`` too,
        with the signature and the name of the model's class: then Trainer writes peft's files into every checkpoint.

    Raises:
        KeyError: If ``params`` is not of this net's model.
        TypeError: If ``net`` is not a ``Net``, ``seed`` not an int, or the adapter was not made for this net or is stacked.

    Example:
        >>> import torch
        >>> from funcpeft import LoRA, adapt, functionalize
        >>> model, params = functionalize(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> net = adapt(model, LoRA(r=2, target_modules=["0"]))
        >>> module = to_module(net, params, net.init(params, seed=0))
        >>> sorted(module.state_dict())
        ['leaves.0.A', 'leaves.0.B', 'step']
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> module(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> module.adapter
        Adapter(14 trainable numbers at 1 paths)
    """
    if not isinstance(net, Net):
        raise TypeError(errors.say("to_module", "a Net is required", type(net).__name__, "make it with adapt"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(errors.say("to_module", "seed must be an int", type(seed).__name__))
    net._check(params)
    net._matched(adapter)
    root = type(net.model.root)
    own = [e.method for e in net.entries if e.role == "method"]
    pretrained = next((c for c in root.__mro__ if _is_pretrained(c)), None)
    saved = len(own) == 1 and own[0].peft_type
    return _class_for(root, pretrained if saved else None)(net, params, adapter, seed, task_type)


def _is_pretrained(cls: type) -> bool:
    return cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")


@functools.cache
def _class_for(root: type, pretrained: type | None) -> type[AdapterModule]:
    """Returns the class of modules that stand for a model of class ``root``.

    Trainer reads the labels and columns that a model takes off the signature of its class, and how to shift labels off its
    name. Those with a base class of transformers are saved with ``save_pretrained``.
    """

    def forward(self: AdapterModule, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    forward.__signature__ = inspect.signature(root.forward)  # what inspect looks for first
    members: dict[str, Any] = {"forward": forward, "__module__": __name__}
    if callable(getattr(root, "generate", None)):
        members["generate"] = AdapterModule._generate
    facts = ("main_input_name", "accepts_loss_kwargs", "input_modalities")
    members |= {name: getattr(root, name) for name in facts if hasattr(root, name)}
    return type(root.__name__, (AdapterModule,) if pretrained is None else (AdapterModule, pretrained), members)


@dataclass(frozen=True, eq=False)
class _Frozen:
    """What is not trained: the base, and the adapter with its trained leaves left out. Copies share it; nothing writes it."""

    params: Params
    adapter: Adapters

    def __deepcopy__(self, memo: Any) -> _Frozen:
        return self

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> _Frozen:
        """Applies what ``Module.to`` and its like do to every tensor; codes and scales keep their dtype."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Quantized):
                return fn(leaf)
            like = fn(torch.empty(0, dtype=leaf.dtype, device=leaf.device))
            return leaf.to(device=like.device, dtype=like.dtype)

        moved = {key: move(leaf) for key, leaf in self.params.items()}
        return _Frozen(moved, tree_map(fn, self.adapter))


class AdapterModule(nn.Module):
    """A net whose trained leaves are parameters; made by ``to_module``.

    The parameter of the leaf ``A`` at ``layers.0.q_proj`` is ``leaves.layers.0.q_proj.A``; for several methods their positions
    come first, ``leaves.0.layers.0.q_proj.A``. A leaf that has the name of a module inside its own gets a ``_``. The state dict
    has them and ``step``, the count of calls in training mode, which seeds the draws of the next; so a run that is resumed from
    it draws what it would have drawn. The base and the leaves that are not trained are no parameters and no buffers, and move
    with ``to``, ``half`` and the like. Deep copies share them. A module cannot be pickled: save its state dict.

    Attributes:
        net: The net.
        config: A copy of the model's config. Of changes to it only ``use_cache`` is heard, which Trainer sets.
        step: Calls in training mode so far, 0-d int64.
        seed: The seed.
        task_type: peft's task type, or ``None``.
    """

    supports_gradient_checkpointing: ClassVar[bool] = True
    _keys_to_ignore_on_save: ClassVar[Any] = None
    step: Tensor

    def __init__(self, net: Net, params: Params, adapter: Adapters, seed: int, task_type: str | None) -> None:
        nn.Module.__init__(self)  # a model of transformers would make its layers
        root: Any = net.model.root
        for name in ("name_or_path", "loss_type", "generation_config"):  # plain values that transformers gives a model
            if name in vars(root):
                setattr(self, name, copy.deepcopy(getattr(root, name)))
        self.net, self.seed, self.task_type = net, seed, task_type
        self.config = copy.deepcopy(net.model.config)
        self.leaves = nn.Module()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        given = as_tuple(adapter)
        self._names = _names(given, several=isinstance(adapter, tuple))
        for name, (position, path, leaf) in self._names.items():
            _place(self.leaves, name, given[position].params[path][leaf])
        rest = tuple(one.replace(params={path: {} for path in one.params}) for one in given)
        self._frozen = _Frozen(dict(params), rest if isinstance(adapter, tuple) else rest[0])

    def extra_repr(self) -> str:
        return repr(self.net)

    # -- the adapter -------------------------------------------------------------------------------------------------------

    @property
    def adapter(self) -> Adapters:
        """The adapter as it is now, in the form that was given: fresh tensors, without gradients."""
        return self._adapter(lambda name, p: p.detach().clone())

    @property
    def params(self) -> Params:
        """The base's leaves where the module is now, in a new dict."""
        return dict(self._frozen.params)

    def _adapter(self, value: Callable[[str, Tensor], Tensor]) -> Adapters:
        rest = as_tuple(self._frozen.adapter)
        trees: list[Tree] = [{path: {} for path in one.params} for one in rest]
        live = dict(self.leaves.named_parameters(remove_duplicate=False))
        for name, (position, path, leaf) in self._names.items():
            trees[position][path][leaf] = value(name, live[name])
        made = tuple(one.replace(params=tree) for one, tree in zip(rest, trees, strict=True))
        return made if isinstance(self._frozen.adapter, tuple) else made[0]

    # -- the call ----------------------------------------------------------------------------------------------------------

    @property
    def context(self) -> Context:
        """The context of the next call in training mode."""
        return Context(training=True, seed=self.step.clone()).at(self.seed & 0xFFFFFFFF, self.seed >> 32)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        context = self.context if self.training else EVAL
        if self.training:
            self.step = self.step + 1
        adapter = self._adapter(lambda name, p: p)
        return self.net(self._frozen.params, adapter, *args, context=context, **self._cached(kwargs))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's own ``generate``, in evaluation."""
        return self.net.call("generate", self._frozen.params, self.adapter, *args, **kwargs)

    def _cached(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds ``use_cache`` if the config here says otherwise than the model's."""
        asked, default = (getattr(c, "use_cache", None) for c in (self.config, self.net.model.config))
        if asked == default or "use_cache" not in inspect.signature(type(self).forward).parameters:
            return kwargs
        return {"use_cache": asked, **kwargs}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._frozen = self._frozen.mapped(fn)
        return self

    # -- what Trainer calls -------------------------------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Any = None, *, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recomputes every block in the backward pass, by ``model.replace(remat=True)``.

        ``gradient_checkpointing_kwargs`` are those of ``torch.utils.checkpoint``, which has no part in it.

        Raises:
            ValueError: If only some layers, or activations in another memory, are asked for.
        """
        if every_n_layers != 1 or offload:
            found = f"every_n_layers={every_n_layers}, offload={offload}"
            raise ValueError(errors.say("gradient_checkpointing_enable", "every layer must be recomputed in place", found))
        self._remat(True)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """The newer name of ``gradient_checkpointing_enable``."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations for the backward pass again."""
        self._remat(False)

    def activation_checkpointing_disable(self) -> None:
        """The newer name of ``gradient_checkpointing_disable``."""
        self._remat(False)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return bool(self.net.model.remat)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of ``is_activation_checkpointing``."""
        return self.is_activation_checkpointing

    def _remat(self, on: bool) -> None:
        self.net = Net(self.net.model.replace(remat=on), self.net.methods, self.net.entries)
        self.net.model.prepare(self.net._expression_keys(self._frozen.params))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **_: Any,
    ) -> None:
        """Writes the adapter as peft's files, and the state dict, which Trainer resumes from.

        Args:
            save_directory: The folder; made if it is not there.
            state_dict: Save this state instead of the module's own.
            is_main_process: Whether this process writes at all.
            _: Options of ``PreTrainedModel.save_pretrained``, which are about a model's weights.

        Raises:
            ValueError: If the net has no peft form, or a leaf is not finite.
        """
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        adapter = self._adapter(lambda name, p: state[f"leaves.{name}"].detach())
        save_peft(self.net, adapter, save_directory, params=self.params, task_type=self.task_type)
        tensors = {key: t.detach().to("cpu").contiguous().clone() for key, t in state.items()}
        save_file(tensors, Path(save_directory) / STATE, metadata={"format": "pt"})


def _names(adapters: tuple[Adapter, ...], *, several: bool) -> dict[str, tuple[int, str, str]]:
    """Returns ``(position, path, leaf)`` of every trained leaf by the dotted name of its parameter."""
    places = [(i, path, leaf) for i, one in enumerate(adapters) for path, leaves in one.params.items() for leaf in leaves]
    owners = [f"{i}." * several + f"{path}." * bool(path) for i, path, _ in places]
    inner = {owner[:end] for owner in owners for end in _dots(owner)}
    names: dict[str, tuple[int, str, str]] = {}
    for owner, place in zip(owners, places, strict=True):
        name = owner + place[2]
        while name in inner or name in names or hasattr(_EMPTY, name.rpartition(".")[2]):
            name += "_"
        names[name] = place
    return names


_EMPTY = nn.Module()


def _dots(owner: str) -> Iterator[int]:
    return (i for i, c in enumerate(owner) if c == ".")


def _place(root: nn.Module, name: str, value: Tensor) -> None:
    """Registers a copy of a tensor as a parameter, in modules made on the way."""
    *parts, last = name.split(".")
    for part in parts:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, nn.Parameter(value.detach().clone()))
