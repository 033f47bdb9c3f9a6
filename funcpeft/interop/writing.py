"""``write_quantized``: params as the folder that transformers loads, quantized layers in a library's layout.

Imports transformers, modules, library, files, functional, errors.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from funcpeft import errors
from funcpeft.functional import Model, Params
from funcpeft.interop.files import CONFIG, INDEX, WEIGHTS
from funcpeft.interop.library import Library, decodes
from funcpeft.interop.modules import LIBRARIES
from funcpeft.interop.transformers import is_linear, structure_of, without_quantization
from funcpeft.skeleton import tensors_of
from funcpeft.weights import Adapted, Quantized


def write_quantized(
    model: Model,
    params: Params,
    folder: str | os.PathLike[str],
    *,
    library: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a checkpoint that transformers' ``from_pretrained`` loads and that computes the same.

    Args:
        model: A model of transformers.
        params: Its leaves, dense or ``Quantized``; without a ``Quantized`` one the checkpoint is an ordinary one.
        folder: The directory; made if it is not there. The files are written beside it and then renamed into it, and older
            files of weights are removed last, so that a failure loses nothing.
        library: Name of the library whose layout the stored weights get. Default: the only one that takes them all.
        max_shard_size: Most bytes of a file, a number or such as ``"5GB"``.

    Raises:
        TypeError: If the model is not one of transformers, or a leaf is neither a tensor nor ``Quantized``.
        ValueError: If no library takes the stored weights, several do, or transformers would not load them in this place; the
            message names the site.

    Note:
        transformers loads all dense tensors in one dtype, that of the first parameter.
    """
    config = _written_config(model, params)
    stored = _stored_layers(model, params)
    reference = structure_of(without_quantization(config), type(model.root), torch.float32, "write_quantized")
    tensors = _dense_tensors(model, params, reference)
    metadata: dict[str, str] = {"format": "pt"}
    if stored:
        layout = _layout(stored, library)
        dense = tuple(path for path, m in model.modules() if is_linear(m) and path not in stored)
        for path, quantized in stored.items():
            made, entries = layout.write(quantized, path)
            tensors |= {f"{path}.{name}": t for name, t in made.items()}
            metadata = _joined(metadata, entries)
        config.quantization_config = layout.config(stored, dense)
        _require_kept(model, stored, dense)
    elif library is not None:
        rule = "the library of stored weights can be chosen if params have some"
        raise ValueError(errors.say("write_quantized", rule, f"library={library!r} and no Quantized leaf", "leave it out"))
    _write(Path(folder), model, config, tensors, metadata, max_shard_size)


def _written_config(model: Any, params: Params) -> Any:
    if not isinstance(model, Model) or not hasattr(model.config, "to_json_file"):
        rule, found = "a model of transformers is required", getattr(model, "name", type(model).__name__)
        raise TypeError(errors.say("write_quantized", rule, found, "functionalize one that has a config"))
    model.check(params)
    for key, leaf in params.items():
        if isinstance(leaf, Adapted):
            rule, remedy = "weights as they are stored are required", "call net.merge first"
            raise TypeError(errors.say(f"write_quantized at {key!r}", rule, "an adapted one", remedy))
        if not isinstance(leaf, Tensor | Quantized):
            rule = "a leaf must be a tensor or Quantized"
            raise TypeError(errors.say(f"write_quantized at {key!r}", rule, type(leaf).__name__))
        shape = model.shapes[model.ties.get(key, key)]
        if leaf.shape != shape:
            rule, remedy = f"shape must be {tuple(shape)}", "unstack stacked params"
            raise ValueError(errors.say(f"write_quantized at {key!r}", rule, tuple(leaf.shape), remedy))
        if isinstance(leaf, Quantized) and not decodes(leaf):
            rule, found = f"the tensors must decode to {tuple(shape)}", {n: tuple(t.shape) for n, t in leaf.data.items()}
            raise ValueError(errors.say(f"write_quantized at {key!r}", rule, found, "unstack stacked params"))
    config = without_quantization(model.config)
    config.architectures = [type(model.root).__name__]
    config.dtype = next(t.dtype for k, t in params.items() if k not in model.buffers)
    if any(key in model.ties for key in params):
        config.tie_word_embeddings = False
    return config


def _stored_layers(model: Model, params: Params) -> dict[str, Quantized]:
    modules, found = dict(model.modules()), {}
    for key, leaf in params.items():
        if isinstance(leaf, Quantized):
            path = key.removesuffix(".weight")
            layer = type(modules.get(path)).__name__ if path != key else "a parameter of another name"
            if path == key or not isinstance(modules.get(path), nn.Linear):
                rule, remedy = "stored weights must be those of linear layers", "call dequantize, or leave it dense"
                raise ValueError(errors.say(f"write_quantized at {key!r}", rule, layer, remedy))
            found[path] = leaf
    return found


def _layout(stored: Mapping[str, Quantized], name: str | None) -> Library:
    """Returns the library that takes all stored weights: the named one, or the only one."""
    known = {library.name: library for library in LIBRARIES}
    if name is not None and name not in known:
        raise ValueError(errors.say("write_quantized", "library must be known", repr(name), errors.nearest(name, known)))
    refusals: dict[str, str] = {}
    able: list[Library] = []
    for library in LIBRARIES if name is None else (known[name],):
        reasons = ((path, library.refuses(quantized)) for path, quantized in stored.items())
        refused = next(((path, reason) for path, reason in reasons if reason), None)
        if refused is None:
            able.append(library)
        else:
            refusals.setdefault(library.name, f"{refused[0]!r}: {refused[1]}")
    if len(able) == 1:
        return able[0]
    if able:
        names = errors.listed([library.name for library in able], 20)
        raise ValueError(errors.say("write_quantized", "one library must be chosen", names, "pass library="))
    text, remedy = "; ".join(refusals.values()), "call dequantize, or quantize in another format"
    raise ValueError(errors.say("write_quantized", "a library must have this layout", text, remedy))


def _dense_tensors(model: Model, params: Params, reference: nn.Module) -> dict[str, Tensor]:
    """Returns what a checkpoint keeps of the dense leaves, by transformers' names; each has storage of its own.

    Raises:
        ValueError: If the config makes a model with other tensors, as after resized embeddings.
    """
    wanted, untied = reference.state_dict(keep_vars=True), any(key in model.ties for key in params)
    mine = model.root.state_dict(keep_vars=True)
    owner = {id(t): key for key, t in tensors_of(model.root).items() if key in model.shapes}
    flipped = _transposed(model.root, reference)
    tensors: dict[str, Tensor] = {}
    for key in dict.fromkeys([*mine, *wanted]):
        ours, theirs = mine.get(key), wanted.get(key)
        if ours is None or theirs is None or ours.shape != (theirs.shape[::-1] if key in flipped else theirs.shape):
            shapes = [None if t is None else tuple(t.shape) for t in (theirs, ours)]
            rule, found = f"the model must be the one of its config, where it is {shapes[0]}", shapes[1]
            raise ValueError(errors.say(f"write_quantized at {key!r}", rule, found, "update model.config"))
        leaf = params.get(key, params.get(owner[id(ours)])) if untied or key in params else None
        if isinstance(leaf, Tensor):
            tensors[key] = leaf.mT if key in flipped else leaf
    return tensors


def _transposed(root: nn.Module, reference: nn.Module) -> set[str]:
    """Returns the weights of layers that transformers builds transposed and that are linear here (a quantized GPT-2's)."""
    theirs = dict(reference.named_modules())
    linear = [path for path, m in root.named_modules() if isinstance(m, nn.Linear)]
    return {f"{path}.weight" for path in linear if path in theirs and not isinstance(theirs[path], nn.Linear)}


def _joined(metadata: dict[str, str], entries: Mapping[str, str]) -> dict[str, str]:
    """Adds entries of one layer; where two layers have the same entry, both are JSON lists and are put together."""
    joined = dict(metadata)
    for name, text in entries.items():
        same = name not in joined or joined[name] == text
        joined[name] = text if same else json.dumps([*json.loads(joined[name]), *json.loads(text)])
    return joined


def _require_kept(model: Model, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> None:
    """Raises ``ValueError`` where transformers would build a dense layer for a stored weight."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    always: Any = getattr(model.root, "_keep_in_fp32_modules", None) or ()
    for path in stored:
        for pattern in (*always, *dense):
            if not should_convert_module(path, [pattern]):
                rule = f"transformers leaves dense what {pattern!r} matches"
                remedy = "call dequantize for this layer, or quantize all that it matches"
                raise ValueError(errors.say(f"write_quantized at {path!r}", rule, "a Quantized leaf", remedy))


def _write(
    folder: Path, model: Model, config: Any, tensors: dict[str, Tensor], metadata: dict[str, str], size: int | str
) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    if folder.exists() and not folder.is_dir():
        raise ValueError(errors.say("write_quantized", "folder must be a directory", f"the file {str(folder)!r}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = _owned({key: t.detach().cpu() for key, t in tensors.items()})
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda t: t.nbytes,
        filename_pattern=WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=size,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        beside = Path(temporary)
        for name, keys in tqdm(split.filename_to_tensors.items(), desc="Writing files", disable=None):
            save_file({key: tensors[key].contiguous() for key in keys}, beside / name, metadata=metadata)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (beside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
        generation: Any = getattr(model.root, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(beside))
        config.to_json_file(str(beside / CONFIG))
        folder.mkdir(exist_ok=True)
        written = sorted(p.name for p in beside.iterdir())
        for name in sorted(written, key=lambda name: (name == CONFIG, name == INDEX)):
            os.replace(beside / name, folder / name)
    for old in folder.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name) and old.name not in written:
            old.unlink()


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors that share memory: safetensors refuses them."""
    seen: set[int] = set()
    owned: dict[str, Tensor] = {}
    for key, t in tensors.items():
        owned[key] = t.clone() if t.data_ptr() in seen else t
        seen.add(t.data_ptr())
    return owned
