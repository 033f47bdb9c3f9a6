"""Safetensors checkpoints as mappings: shards opened lazily, names checked, nothing read that is not asked for.

Imports errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RESAVE = "load it with transformers' from_pretrained and save_pretrained it, which writes safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: If the file holds no JSON, or another kind of value.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(errors.say(str(path), "JSON is required", str(e))) from e
    if not isinstance(data, dict):
        raise CheckpointError(errors.say(str(path), "a JSON object is required", type(data).__name__))
    return data


class Files(Mapping[str, Tensor]):
    """The tensors of a checkpoint's safetensors files; opened, and read one by one."""

    def __init__(self, folder: Path) -> None:
        listed = shards(folder)
        self.handles: dict[str, Any] = {}
        for name in dict.fromkeys(listed.values()):
            try:
                handle = safetensors.safe_open(folder / name, framework="pt")
                keys = list(handle.keys())
            except (safetensors.SafetensorError, OSError, ValueError) as e:
                rule, remedy = "a whole safetensors file is required", "it is corrupt or truncated"
                raise CheckpointError(errors.say(str(folder / name), rule, str(e), remedy)) from e
            self.handles |= {key: handle for key in keys if listed.get(key, name) == name}
        absent = sorted(key for key in listed.keys() - self.handles.keys() if key)
        if absent:
            rule, found = "the files must hold what the index lists", f"none of {errors.listed(absent)}"
            raise CheckpointError(errors.say(str(folder / INDEX), rule, found))

    def __getitem__(self, key: str) -> Tensor:
        return self.handles[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.handles)

    def __len__(self) -> int:
        return len(self.handles)

    @property
    def dtype(self) -> torch.dtype:
        """The first floating dtype."""
        found = (FLOATS.get(handle.get_slice(key).get_dtype()) for key, handle in self.handles.items())
        return next((dtype for dtype in found if dtype is not None), torch.float32)

    def metadata(self, keys: Iterable[str]) -> dict[str, str]:
        """The metadata of the files that hold some tensors."""
        handles = {id(self.handles[key]): self.handles[key] for key in keys}
        return {name: text for handle in handles.values() for name, text in (handle.metadata() or {}).items()}


class Layer(Mapping[str, Tensor]):
    """The tensors of one layer by their names after its path."""

    def __init__(self, files: Files, keys: Mapping[str, str]) -> None:
        self.files, self.keys_ = files, keys

    def __getitem__(self, name: str) -> Tensor:
        return self.files[self.keys_[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def shards(folder: Path) -> dict[str, str]:
    """Returns file names by the tensors that the index lists; ``{"": name}`` of a checkpoint in one file."""
    if (folder / WEIGHTS).is_file():
        return {"": WEIGHTS}
    if not (folder / INDEX).is_file():
        binary = sorted(p.name for p in folder.glob("*.bin"))
        if binary:
            raise CheckpointError(errors.say(str(folder), "only safetensors are read", errors.listed(binary), _RESAVE))
        raise FileNotFoundError(errors.say(str(folder), f"{WEIGHTS} or {INDEX} must be there", None, _RESAVE))
    where, found = str(folder / INDEX), read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(errors.say(where, "weight_map must map tensors to files", type(found).__name__))
    for name in dict.fromkeys(map(str, found.values())):
        if not re.fullmatch(r"[\w\-.+]+\.safetensors", name):
            raise CheckpointError(errors.say(where, "weight_map must name safetensors files in the same folder", repr(name)))
        if not (folder / name).is_file():
            raise CheckpointError(errors.say(where, "every file of weight_map must be there", f"no {name!r}"))
    return found
