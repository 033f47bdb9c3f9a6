"""The contract of a quantization library: read this first of ``libraries/``.

A library is a reader and a writer of leaves, never a layer that gets called. ``take`` reads a layer of a model in memory,
``read`` the tensors that a checkpoint has for a layer, ``write`` makes such tensors and ``config`` the ``quantization_config``
under which transformers loads them. To add one: one file, one line in ``libraries/__init__.py``. The library itself is
imported inside the functions that need it, if at all; layers are known by the module and class names of their types.
Imports quant, storage, errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized

Tensors = Mapping[str, Tensor]

#: The dtypes of weights and scales.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Taken:
    """What a layer of a library computes, as leaves of a linear layer.

    Attributes:
        weight: The stored weight, of shape ``(out, in)``; its tensors share storage with the layer's where no conversion
            was needed.
        bias: ``(out,)`` or ``None``.
    """

    weight: Quantized
    bias: Tensor | None = None

    def plain(self) -> nn.Linear:
        """Makes the linear layer that stands for it in a skeleton; on the meta device."""
        out, in_ = self.weight.shape
        return nn.Linear(in_, out, self.bias is not None, device="meta", dtype=self.weight.dtype)


@dataclass(frozen=True)
class Library:
    """One quantization library or checkpoint layout."""

    #: Name in messages and in ``library=`` arguments.
    name: ClassVar[str] = ""
    #: Values of ``quant_method`` in a ``quantization_config`` that it reads.
    quant_methods: ClassVar[tuple[str, ...]] = ()
    #: Names of types of layers, as ``(start of the module's name, class name)``.
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = ()

    def owns(self, layer: nn.Module) -> bool:
        """Whether a layer in memory is of this library."""
        return any(
            t.__name__ == name and t.__module__.startswith(start)
            for t in type(layer).__mro__
            for start, name in self.layer_types
        )

    def take(self, layer: nn.Module, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        """Reads a layer in memory.

        Args:
            layer: The layer; not changed and not called.
            path: Its dotted name, for messages.
            dtype: Floating dtype of the model, for layers that do not record the weight's own.
            config: The model's ``quantization_config`` as a dict, ``{}`` if it has none.

        Raises:
            ValueError: If the layer has rewritten its weight; the message says what to do instead.
        """
        raise TypeError(f"{self.name}: this library has no layers in memory.")

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        """Reads what a checkpoint has for one linear layer.

        Args:
            tensors: The checkpoint's tensors under ``path``, by their names after it, the bias left out.
            path: The layer's dotted name.
            shape: ``(out, in)`` of the layer.
            dtype: Floating dtype of the model.
            config: The checkpoint's ``quantization_config``.
            metadata: The metadata of the file, ``{str: str}``.

        Returns:
            The leaf, or ``None`` if the layer is not quantized in this checkpoint.

        Raises:
            CheckpointError: If tensors are missing, or their shapes or dtypes do not fit.
        """
        raise TypeError(f"{self.name}: this library has no checkpoints.")

    def refuses(self, quantized: Quantized) -> str | None:
        """Says why a stored weight cannot be written in this layout, or ``None`` if it can."""
        return f"{self.name} has no writer"

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns a layer's tensors by their names after ``path``, and entries for the file's metadata."""
        raise TypeError(f"{self.name}: this library has no writer.")

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        """Returns the ``quantization_config`` for a model.

        Args:
            stored: The stored weights by the path of their layer.
            dense: Paths of the linear layers that are not stored.

        Raises:
            ValueError: If one configuration cannot describe them all; the message names two sites that differ.
        """
        raise TypeError(f"{self.name}: this library has no writer.")

    # -- for readers -----------------------------------------------------------------------------------------------------

    def pick(
        self,
        tensors: Tensors,
        path: str,
        name: str,
        shape: tuple[int, ...] | None = None,
        dtypes: tuple[torch.dtype, ...] = (),
    ) -> Tensor:
        """Returns a tensor by name, detached.

        Raises:
            CheckpointError: If it is missing, of another shape or dtype than those given, or not finite. Without dtypes the
                tensor may be bytes under the name of a float, and is not looked at.
        """
        where = f"{self.name} at {path!r}"
        if name not in tensors:
            raise CheckpointError(errors.say(where, f"tensor {name!r} is required", sorted(tensors)))
        t = tensors[name].detach()
        if shape is not None and tuple(t.shape) != shape:
            raise CheckpointError(errors.say(where, f"{name!r} must have shape {shape}", tuple(t.shape)))
        if dtypes and t.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(errors.say(where, f"{name!r} must be {wanted}", str(t.dtype).removeprefix("torch.")))
        if dtypes and t.dtype in FLOATS and not bool(t.isfinite().all()):
            raise CheckpointError(errors.say(where, f"{name!r} must be finite", "NaN or infinity"))
        return t

    def require_fit(self, fmt: Format, path: str, shape: torch.Size) -> None:
        """Raises ``CheckpointError`` if a weight of this shape cannot be stored in a format."""
        reason = fmt.misfit(shape)
        if reason is not None:
            raise CheckpointError(errors.say(f"{self.name} at {path!r}", reason, tuple(shape)))

    def same(self, stored: Mapping[str, Quantized], of: Any) -> Any:
        """Returns ``of(quantized)``, a hashable description that must be the same at every site.

        Raises:
            ValueError: If two sites differ.
        """
        found = {path: of(q) for path, q in stored.items()}
        first = next(iter(found))
        for path, value in found.items():
            if value != found[first]:
                raise ValueError(
                    errors.say(
                        f"{self.name} at {path!r}",
                        f"must be stored as {first!r} is, since one configuration describes all layers: {found[first]}",
                        value,
                    )
                )
        return found[first]


def require_sound(quantized: Quantized, where: str) -> Quantized:
    """Returns a stored weight that was read, if it decodes to finite numbers of its shape.

    Raises:
        CheckpointError: If a scale or a floating code is not finite, or the tensors do not fit each other.
    """
    for name, t in quantized.data.items():
        if t.is_floating_point() and not bool((t.to(torch.float32) if t.element_size() == 1 else t).isfinite().all()):
            raise CheckpointError(errors.say(where, f"{name} must be finite", "NaN or infinity"))
    if not decodes(quantized):
        shapes = {n: tuple(t.shape) for n, t in quantized.data.items()}
        raise CheckpointError(errors.say(where, f"the tensors must decode to {tuple(quantized.shape)}", shapes))
    return quantized


def decodes(quantized: Quantized) -> bool:
    """Whether the tensors of a stored weight fit its shape; found on the meta device."""
    try:
        return quantized.format.dequant(quantized.to(device="meta")).shape == quantized.shape
    except (RuntimeError, IndexError):
        return False


def copied(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a plain contiguous tensor of its own: no parameter, no subclass."""
    return t.detach().to(dtype or t.dtype, copy=True).contiguous()
