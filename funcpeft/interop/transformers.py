"""Reading transformers' checkpoints: ``config.json`` and safetensors, quantized or not.

Builds the model's structure without its weights, opens the files and takes every tensor where it is needed: a dense leaf that
needs no cast is a view of the mapped file, a quantized layer is read by its library as a leaf. No library's layer is built, so
a checkpoint loads without the library, and without a second copy of the weights. Imports files, modules, library, functional,
skeleton, errors.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from tqdm import tqdm

from funcpeft import errors, layers
from funcpeft.caches import register_caches
from funcpeft.errors import CheckpointError
from funcpeft.functional import Model, Params
from funcpeft.interop.files import CONFIG, INDEX, Files, Layer, read_json
from funcpeft.interop.library import Library, require_sound
from funcpeft.interop.modules import LIBRARIES
from funcpeft.skeleton import tensors_of
from funcpeft.weights import Quantized

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
    return quantization_of(read_json(_folder(str(folder), None) / CONFIG))


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
    files = Files(folder)
    config = without_quantization(config)
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
    read_json(folder / CONFIG)  # says what is wrong with the file, where transformers names the hub
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


def without_quantization(config: Any) -> Any:
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
    module: nn.Module, library: Library | None, files: Files, quantization: Mapping[str, Any]
) -> tuple[dict[str, Quantized], list[str]]:
    """Returns the stored weights by the path of their layer, and the keys of all tensors that are not theirs."""
    if library is None:
        return {}, list(files)
    names, found = _Names(module), {path: m for path, m in module.named_modules() if is_linear(m)}
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
        leaf = library.read(Layer(files, keys), path, torch.Size(shape), weight.dtype, quantization, metadata)
        if leaf is not None:
            stored[path] = require_sound(leaf.to(dtype=weight.dtype), f"{library.name} at {path!r}")
            taken |= {*keys.values()}
    return stored, [key for key in files if key not in taken]


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is one that quantization libraries take the place of."""
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


def _read_dense(module: nn.Module, files: Files, keys: Iterable[str], where: str) -> dict[str, Tensor]:
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
