"""transformers' checkpoints, both ways: ``config.json`` and safetensors, quantized or not.

Reading builds the model's structure without its weights, opens the files and takes every tensor where it is needed: a dense
leaf that needs no cast is a view of the mapped file, a quantized layer is read by its library as a leaf. No library's layer is
built, so a checkpoint loads without the library, and without a second copy of the weights. Writing gives the folder that
transformers' ``from_pretrained`` loads. Imports modules, library, functional, skeleton, errors.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from tqdm import tqdm

from funcpeft import errors, layers
from funcpeft.caches import register_caches
from funcpeft.errors import CheckpointError
from funcpeft.functional import Model, Params
from funcpeft.interop.library import Library
from funcpeft.interop.modules import LIBRARIES
from funcpeft.skeleton import tensors_of
from funcpeft.weights import Adapted, Quantized

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RESAVE = "load it with transformers' from_pretrained and save_pretrained it, which writes safetensors"


# -- the quantization that a config names ------------------------------------------------------------------------------------


def quantization_of(config: Any) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint as a dict, ``{}`` if it has none.

    Args:
        config: A transformers config, or the content of a ``config.json``.
    """
    data = config if isinstance(config, Mapping) else config.to_dict()
    parts = [data, *(part for part in data.values() if isinstance(part, Mapping))]  # several models in one nest their configs
    for part in parts:
        for key in ("quantization_config", "compression_config"):  # the second is compressed-tensors' older name
            found = part.get(key)
            if found:
                return dict(found) if isinstance(found, Mapping) else found.to_dict()
    return {}


def quant_method(quantization: Mapping[str, Any]) -> str:
    """Returns the ``quant_method`` of a quantization config; bitsandbytes' older ones have flags instead."""
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def checkpoint_quantization(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint's folder, ``{}`` if it has none.

    Raises:
        CheckpointError: If its config is no JSON object.
        FileNotFoundError: If it has no config.
    """
    return quantization_of(_json(_folder(str(folder), None) / CONFIG))


def _library(quantization: Mapping[str, Any], where: str) -> Library | None:
    if not quantization:
        return None
    known = {method: library for library in LIBRARIES for method in library.quant_methods}
    method = quant_method(quantization)
    if method not in known:
        raise CheckpointError(errors.one_of(where, "quant_method", method, sorted(known)))
    return known[method]


# -- reading -----------------------------------------------------------------------------------------------------------------


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    model_class: Any = None,
    revision: str | None = None,
    **overrides: Any,
) -> tuple[Model, Params]:
    """Reads a checkpoint of transformers, quantized or not, as a function and leaves.

    Args:
        path: A folder with ``config.json`` and safetensors, or an id of the Hugging Face hub.
        dtype: Floating dtype of dense leaves, and that to which quantized ones decode. Default: the config's, else the file's.
        model_class: A model class of transformers, or an Auto class. Default: the config's first architecture.
        revision: Revision on the hub.
        overrides: Fields of the config to change, such as ``attn_implementation="eager"``.

    Returns:
        ``(model, params)``, as ``functionalize`` of the module that ``from_pretrained`` makes, on the CPU. Weights that a
        quantization library stored are ``Quantized``, with the codes of the file.

    Raises:
        FileNotFoundError: If there is no config, or no weights.
        CheckpointError: If a file is corrupt or truncated or no safetensors, the model or its quantization is not known, or
            tensors are missing, unexpected or misshapen; the message names them.
        TypeError: If an override is no field of the config.

    Note:
        Leaves that need no cast stay in the mapped file until they are read; replacing the file (as ``write_quantized`` does)
        is safe, writing into it is not. A model whose head is not in the checkpoint is refused where ``from_pretrained`` would
        draw one: call that, and functionalize the module.
    """
    folder = _folder(str(path), revision)
    where = str(folder)
    config = _config(folder, model_class, overrides)
    quantization = quantization_of(config)
    library = _library(quantization, str(folder / CONFIG))
    files = _Files(folder)
    config = _without_quantization(config)
    config.name_or_path = str(path)
    module = structure_of(config, model_class, dtype or _named(config) or files.dtype, where)
    _set_generation(module, folder)
    stored, keys = _read_stored(module, library, files, quantization)
    for layer, leaf in stored.items():
        _settle(module, layer, leaf)
    _keep_in_float32(module)
    register_caches()
    model = Model(module)
    params = _assembled(model, module, stored, _read_dense(module, files, keys, where), where)
    model.prepare(frozenset(key for key, leaf in params.items() if isinstance(leaf, Quantized)))
    return model, params


def _folder(path: str, revision: str | None) -> Path:
    if not Path(path).is_dir():
        return _downloaded(path, revision)
    if not (Path(path) / CONFIG).is_file():
        there = sorted(p.name for p in Path(path).iterdir())
        raise FileNotFoundError(errors.say(f"load_pretrained({path!r})", f"{CONFIG} must be there", errors.listed(there)))
    return Path(path)


def _downloaded(path: str, revision: str | None) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    absent = (
        hub.HFValidationError,
        hub.LocalEntryNotFoundError,
        hub.OfflineModeIsEnabled,
        hub.RepositoryNotFoundError,
        hub.RevisionNotFoundError,
    )
    wanted = [CONFIG, "generation_config.json", INDEX, "model*.safetensors"]
    try:
        return _folder(snapshot_download(path, revision=revision, allow_patterns=wanted), None)
    except absent as e:
        reason = f"no such directory, and from the hub {type(e).__name__}: {e}"
        rule = "an existing directory or a hub id is required"
        raise FileNotFoundError(errors.say(f"load_pretrained({path!r})", rule, reason)) from e


def _config(folder: Path, model_class: Any, overrides: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    where = str(folder / CONFIG)
    _json(folder / CONFIG)  # says what is wrong with the file, where transformers names the hub
    reader = getattr(model_class, "config_class", None) or AutoConfig
    code = {"trust_remote_code": False} if reader is AutoConfig else {}
    try:
        made: Any = reader.from_pretrained(str(folder), return_unused_kwargs=True, **code, **overrides)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
        rule, found = "a config that this transformers knows is required", f"{type(e).__name__}: {e}"
        raise CheckpointError(errors.say(where, rule, found)) from e
    config, unused = made
    for name in unused:
        if name in overrides:
            rule, hint = "overrides must be fields of the config", errors.nearest(name, config.to_dict())
            raise TypeError(errors.say("load_pretrained", rule, repr(name), hint))
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(errors.say(str(path), "JSON is required", str(e))) from e
    if not isinstance(data, dict):
        raise CheckpointError(errors.say(str(path), "a JSON object is required", type(data).__name__))
    return data


def _without_quantization(config: Any) -> Any:
    """Returns a copy of a config under which transformers builds ordinary layers."""
    config = copy.deepcopy(config)
    nested: list[Any] = list(vars(config).values())
    for part in (config, *(value for value in nested if hasattr(value, "to_dict"))):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def _named(config: Any) -> torch.dtype | None:
    """Returns the dtype that a config names."""
    found = getattr(config, "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found


# -- the structure -----------------------------------------------------------------------------------------------------------


def structure_of(config: Any, model_class: Any, dtype: torch.dtype, where: str) -> nn.Module:
    """Builds a model with its parameters on the meta device and its buffers computed.

    Args:
        config: The config, without a quantization.
        model_class: A model class of transformers, an Auto class, or ``None`` for the config's first architecture.
        dtype: Floating dtype of the parameters.
        where: For messages.

    Raises:
        CheckpointError: If the class is not known, or refuses the config.
    """
    make = _maker(config, model_class, where)
    thread = threading.get_ident()

    def on_meta(owner: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return make(copy.deepcopy(config), dtype=dtype).eval()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        rule, found = "the config must make a model", f"{type(e).__name__}: {e}"
        raise CheckpointError(errors.say(where, rule, found, "pass model_class")) from e
    finally:
        hook.remove()


def _maker(config: Any, model_class: Any, where: str) -> Callable[..., Any]:
    import transformers

    if model_class is None:
        named = (getattr(config, "architectures", None) or [None])[0]
        model_class = getattr(transformers, str(named), None)
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            rule = "the config's architecture must be a model of transformers"
            raise CheckpointError(errors.say(where, rule, repr(named), "pass model_class"))
    return getattr(model_class, "from_config", None) or model_class._from_config


def _set_generation(module: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if module.can_generate() and (folder / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(str(folder))


def _keep_in_float32(module: Any) -> None:
    """Widens the parameters that the model's class wants in float32 whatever the dtype (T5's ``wo`` in float16)."""
    dtype = _named(module.config)
    patterns = {*(module._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    patterns |= {*(module._keep_in_fp32_modules_strict or ())} if dtype in (torch.float16, torch.bfloat16) else set()
    if not patterns:
        return
    wide = re.compile("|".join(f"({p.replace('*', '.*')})" for p in patterns))
    for key, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and wide.search(key):
            parameter.data = parameter.data.to(torch.float32)


def _settle(module: nn.Module, layer: str, leaf: Quantized) -> None:
    """Puts a plain linear layer where a stored weight ``(out, in)`` belongs to a transposed one (GPT-2's)."""
    old = module.get_submodule(layer)
    if not isinstance(old, nn.Linear):
        out, in_ = leaf.shape
        bias = getattr(old, "bias", None) is not None
        module.set_submodule(layer, nn.Linear(in_, out, bias, device="meta", dtype=leaf.dtype).eval())


# -- files -------------------------------------------------------------------------------------------------------------------


class _Files(Mapping[str, Tensor]):
    """The tensors of a checkpoint's safetensors files; opened, and read one by one."""

    def __init__(self, folder: Path) -> None:
        listed = _shards(folder)
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
        found = (_FLOATS.get(handle.get_slice(key).get_dtype()) for key, handle in self.handles.items())
        return next((dtype for dtype in found if dtype is not None), torch.float32)

    def metadata(self, keys: Iterable[str]) -> dict[str, str]:
        """The metadata of the files that hold some tensors."""
        handles = {id(self.handles[key]): self.handles[key] for key in keys}
        return {name: text for handle in handles.values() for name, text in (handle.metadata() or {}).items()}


class _Layer(Mapping[str, Tensor]):
    """The tensors of one layer by their names after its path."""

    def __init__(self, files: _Files, keys: Mapping[str, str]) -> None:
        self.files, self.keys_ = files, keys

    def __getitem__(self, name: str) -> Tensor:
        return self.files[self.keys_[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _shards(folder: Path) -> dict[str, str]:
    """Returns file names by the tensors that the index lists; ``{"": name}`` of a checkpoint in one file."""
    if (folder / WEIGHTS).is_file():
        return {"": WEIGHTS}
    if not (folder / INDEX).is_file():
        binary = sorted(p.name for p in folder.glob("*.bin"))
        if binary:
            raise CheckpointError(errors.say(str(folder), "only safetensors are read", errors.listed(binary), _RESAVE))
        raise FileNotFoundError(errors.say(str(folder), f"{WEIGHTS} or {INDEX} must be there", None, _RESAVE))
    where, found = str(folder / INDEX), _json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(errors.say(where, "weight_map must map tensors to files", type(found).__name__))
    for name in dict.fromkeys(map(str, found.values())):
        if not re.fullmatch(r"[\w\-.+]+\.safetensors", name):
            raise CheckpointError(errors.say(where, "weight_map must name safetensors files in the same folder", repr(name)))
        if not (folder / name).is_file():
            raise CheckpointError(errors.say(where, "every file of weight_map must be there", f"no {name!r}"))
    return found


# -- from tensors to leaves --------------------------------------------------------------------------------------------------


class _Names:
    """The module's names of a checkpoint's tensors, by transformers' own rules for older and for split-up layouts."""

    def __init__(self, module: Any) -> None:
        from transformers import conversion_mapping, core_model_loading

        found = conversion_mapping.get_model_conversion_mapping(module)
        self.renamings = [m for m in found if isinstance(m, core_model_loading.WeightRenaming)]
        self.converters = [m for m in found if isinstance(m, core_model_loading.WeightConverter)]
        self.state, self.prefix = module.state_dict(keep_vars=True), module.base_model_prefix
        self.rename = core_model_loading.rename_source_key
        self.order: Callable[[str], Any] = core_model_loading.dot_natural_key

    def of(self, key: str) -> tuple[str, str | None]:
        """Returns a tensor's name in the module, and the pattern of the converter that it is one input of, if any."""
        name, pattern = self.rename(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and key in self.state:
            return key, None
        return name, pattern

    def converter(self, pattern: str) -> Any:
        """Returns a fresh converter, which makes one tensor of several or several of one."""
        return copy.deepcopy(next(c for c in self.converters if pattern in c.source_patterns))


def _read_stored(
    module: nn.Module, library: Library | None, files: _Files, quantization: Mapping[str, Any]
) -> tuple[dict[str, Quantized], list[str]]:
    """Returns the stored weights by the path of their layer, and the keys of all tensors that are not theirs."""
    if library is None:
        return {}, list(files)
    names, found = _Names(module), {path: m for path, m in module.named_modules() if _is_linear(m)}
    by_layer: dict[str, dict[str, str]] = defaultdict(dict)
    for key in files:
        path, rest = _owner(key, names, found)
        if path and rest != "bias":
            by_layer[path][rest] = key
    stored: dict[str, Quantized] = {}
    taken: set[str] = set()
    for path, keys in tqdm(by_layer.items(), desc="Reading quantized layers", disable=None):
        weight: Any = found[path].weight
        shape = weight.shape if isinstance(found[path], nn.Linear) else weight.shape[::-1]
        metadata = files.metadata(keys.values())
        leaf = library.read(_Layer(files, keys), path, torch.Size(shape), weight.dtype, quantization, metadata)
        if leaf is not None:
            stored[path] = leaf.to(dtype=weight.dtype)
            taken |= {*keys.values()}
    return stored, [key for key in files if key not in taken]


def _is_linear(module: nn.Module) -> bool:
    known = layers.kind_of(module)
    return known is not None and known[0].name in ("linear", "transposed")


def _owner(key: str, names: _Names, found: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Returns the path of the linear layer that a tensor belongs to and what follows it in the key; ``""`` without one."""
    parts = key.split(".")
    for n in range(len(parts) - 1, 0, -1):
        path = names.of(".".join((*parts[:n], "weight")))[0].removesuffix(".weight")
        if path in found:
            return path, ".".join(parts[n:])
    return "", key


def _read_dense(module: nn.Module, files: _Files, keys: Iterable[str], where: str) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by their names in the module, in the dtypes that it has them in.

    Raises:
        CheckpointError: If a tensor is not the module's, or of another shape or kind of dtype.
    """
    names, surplus = _Names(module), []
    sources: dict[str, Any] = {}
    for key in sorted(keys, key=names.order):
        name, pattern = names.of(key)
        if name not in names.state or (name in sources and pattern is None):
            surplus += [] if _ignored(module, key) or _ignored(module, name) else [key]
        elif pattern is None:
            sources[name] = key
        else:
            sources.setdefault(name, names.converter(pattern)).add_tensor(name, key, pattern, lambda key=key: files[key])
    found: dict[str, Tensor] = {}
    misshapen: list[str] = []
    for name, source in tqdm(sources.items(), desc="Reading tensors", disable=None):
        made = {name: files[source]} if isinstance(source, str) else _converted(module, name, source, where)
        for target, t in made.items():
            held = names.state[target]
            if t.shape != held.shape or t.is_floating_point() != held.is_floating_point():
                misshapen.append(f"{target} {tuple(t.shape)} {t.dtype}, not {tuple(held.shape)} {held.dtype}")
            found[target] = t.to(held.dtype)
    _require(module, where, {"unexpected": surplus, "misshapen": misshapen}, names.state)
    return found


def _converted(module: Any, name: str, converter: Any, where: str) -> dict[str, Tensor]:
    try:
        made = converter.convert(name, model=module, config=module.config)
    except (IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as e:
        rule, found = f"the tensors for {name!r} must fit together", f"{type(e).__name__}: {e}"
        raise CheckpointError(errors.say(where, rule, found)) from e
    return {target: t[0] if isinstance(t, list) else t for target, t in made.items()}


def _ignored(module: Any, key: str) -> bool:
    """Whether a surplus tensor is one that older transformers wrote: by the class's own list, or a buffer kept no more."""
    patterns = [*(module._keys_to_ignore_on_load_unexpected or ())]
    patterns += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    return any(re.search(p, key) for p in patterns)


def _require(module: nn.Module, where: str, wrong: Mapping[str, list[str]], known: Iterable[str]) -> None:
    if not any(wrong.values()):
        return
    text = "; ".join(f"{how} {errors.listed(keys)}" for how, keys in wrong.items() if keys)
    first = wrong.get("unexpected")
    remedy = errors.nearest(first[0], known) if first else ""
    if wrong.get("missing"):
        remedy = "for a new head, functionalize what transformers' from_pretrained makes"
    raise CheckpointError(errors.say(where, f"the tensors must be those of {type(module).__name__}", text, remedy))


def _assembled(model: Model, module: Any, stored: Mapping[str, Quantized], dense: dict[str, Tensor], where: str) -> Params:
    """Returns the leaves in the model's order; an alias of a tied tensor that has a value of its own comes last."""
    first = {id(t): key for key, t in tensors_of(module).items() if key in model.shapes}
    every: Params = {**dense, **{f"{path}.weight": leaf for path, leaf in stored.items()}}
    state = module.state_dict(keep_vars=True)
    found: Params = {}
    aliases: Params = {}
    for key in sorted(every, key=lambda key: key != first[id(state[key])]):  # aliases last
        held = first[id(state[key])]
        if not _equal(every[key], found.setdefault(held, every[key])):
            aliases[key] = every[key]
    for key in aliases.keys() - model.ties.keys():
        rule = f"a module under two names must have one value, that of {first[id(state[key])]!r}"
        raise CheckpointError(errors.say(f"{where} at {key!r}", rule, "another one"))
    optional = module._keys_to_ignore_on_load_missing or ()
    for key, t in module.named_buffers():  # computed with the structure
        if key in model.shapes and key not in found and (key not in state or any(re.search(p, key) for p in optional)):
            found[key] = t.detach()
    _require(module, where, {"missing": [key for key in model.shapes if key not in found]}, state)
    return {**{key: found[key] for key in model.shapes}, **aliases}


def _equal(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other))


# -- writing -----------------------------------------------------------------------------------------------------------------


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
    reference = structure_of(_without_quantization(config), type(model.root), torch.float32, "write_quantized")
    tensors = _dense_tensors(model, params, reference)
    metadata: dict[str, str] = {"format": "pt"}
    if stored:
        layout = _layout(stored, library)
        dense = tuple(path for path, m in model.modules() if _is_linear(m) and path not in stored)
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
    config = _without_quantization(model.config)
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
