"""peft's checkpoints, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

The only file that knows their conventions (peft 0.21): where a site's tensors are in the file, which fields a config has,
and what peft adds by itself. Reading is strict: a field that would change the result and is not known is refused by name,
and so is every missing, extra or misshapen tensor. Writing is atomic. peft itself is never imported. Imports adapt and
everything below it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from funcpeft import errors, methods
from funcpeft.adapt import Net, adapt
from funcpeft.entries import Entry
from funcpeft.facts import ModelFacts
from funcpeft.functional import Model, Params
from funcpeft.method import Method
from funcpeft.sitetable import shapes_of
from funcpeft.tree import Adapter, Adapters, Leaves, all_finite, as_tuple
from funcpeft.weights import Base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The peft release whose format is written.
PEFT_VERSION = "0.21.2"
_ROOT = "base_model.model."
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_HEADED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_HEADS = ("classifier", "score", "qa_outputs")  # peft adds these to modules_to_save whether or not the model has them
_COMMON = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",  # a fact of the layer, not of the adapter
    "progressbar",  # facts of the run
    "runtime_offload_base_weight",
}


# -- where tensors are ---------------------------------------------------------------------------------------------------


def file_prefixes(net: Net, entry: Entry) -> dict[str, str]:
    """Returns, by site path, what stands before a site's keys in the file, ending in a dot."""
    prefixes: dict[str, str] = {}
    levels: dict[str, list[str]] = {}
    for path, site in entry.sites.items():
        owner, _, name = site.weight.rpartition(".")
        if entry.role == "bias":
            targeted = {s.bias for e in net.entries if e.role == "method" for s in e.sites.values()}
            prefixes[path] = f"{owner}.base_layer.{name}" if site.weight in targeted else site.weight
        elif entry.method.takes_any:
            prefixes[path] = ".".join(part for part in (owner, entry.method.file_infix, name) if part)
        elif entry.role == "trainable_token_indices":
            prefixes[path] = f"{path}.token_adapter."
        elif site.kind.name == "raw":
            levels.setdefault(owner, []).append(path)  # one wrapper per parameter: the first registered is innermost
        else:
            parent, _, last = path.rpartition(".")
            inside = last == "out_proj" and f"{parent}.in_proj_weight" in entry.sites
            prefixes[path] = f"{parent}.base_layer.{last}." if inside else f"{path}."
    for owner, paths in levels.items():
        for depth, path in enumerate(reversed(paths)):
            prefixes[path] = (f"{owner}." if owner else "") + "base_layer." * depth
    return prefixes


def _entry_tensors(net: Net, entry: Entry, adapter: Adapter) -> Iterator[tuple[str, str, str, Tensor]]:
    """Yields ``(file key, path, peft key after the prefix, tensor)`` of every tensor an entry keeps in a file."""
    if entry.method.wraps and adapter.leaves(""):
        for key, t in entry.method.to_peft(None, adapter.leaves("")).items():
            yield key, "", key, t
    prefixes = file_prefixes(net, entry)
    root = _ROOT if _injected(net) else "base_model."  # beside a prompt, modules_to_save stand one level higher
    for path, site in entry.sites.items():
        prefix = prefixes[path]
        for key, t in entry.method.to_peft(Base(site, _meta(site)), entry.leaves(adapter, path)).items():
            yield root + prefix + key, path, key, t
    for scope in sorted({*adapter.params, *adapter.consts} - entry.sites.keys()):
        for key, t in entry.method.to_peft_shared(scope, adapter.leaves(scope)).items():
            yield f"base_model.{key}", scope, key, t


def _tied_tensors(net: Net, entry: Entry, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yields the further copies that peft's files hold of what acts on a tied tensor, for the other modules that read it."""
    if not getattr(entry.method, "ensure_weight_tying", False):
        return
    for path, site in entry.sites.items():
        for alias in net.bound_keys(entry.method, site):
            other = net.model.site(alias)
            leaves = net.tied_leaves(entry.method, entry.leaves(adapter, path), site, other)
            prefix = alias if entry.method.takes_any else f"{other.path}."
            for key, t in entry.method.to_peft(Base(other, _meta(other)), leaves).items():
                yield _ROOT + prefix + key, t


def _meta(site: Any) -> Tensor:
    return torch.empty(site.shape, dtype=site.dtype, device="meta")


# -- reading ---------------------------------------------------------------------------------------------------------------


def load_peft(
    model: Model,
    params: Params,
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    **needs: Any,
) -> tuple[Net, Any]:
    """Reads an adapter that peft (or ``save_peft``) wrote.

    Args:
        model: The base, from ``functionalize``.
        params: The base's leaves; some methods re-make frozen tensors from them.
        path: A directory, or an id of the Hugging Face hub.
        revision: Revision on the hub.
        subfolder: Folder inside the directory or repository.
        needs: What the method's files do not hold, by name, as ``net.init`` takes it (``Method.file_needs``): the experts that
            a router is for.

    Returns:
        ``(net, adapter)``.

    Raises:
        FileNotFoundError: If there is no adapter config or no safetensors file.
        CheckpointError: If a file is corrupt or truncated, is no adapter config, has a field that is not known here and is
            not at its default, or lacks, adds or misshapes tensors; the message lists them.
        NoMatchError: If the config's targets match nothing in this model.
    """
    folder = _folder(str(path), revision, subfolder)
    config = read_config(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    method = method_of(config, str(folder / CONFIG)).completed(needs)
    try:
        method = method.as_written({key.removeprefix(_ROOT): t.shape for key, t in tensors.items()})
    except IndexError as e:
        rule = f"tensors must have the axes of {method.label}"
        raise errors.CheckpointError(errors.say(str(folder / WEIGHTS), rule, "fewer")) from e
    net = adapt(model, _without_absent_heads(model, method, config))
    return net, fill(net, params, tensors, str(folder / WEIGHTS), **needs)


def _folder(path: str, revision: str | None, subfolder: str) -> Path:
    local = Path(path) / subfolder
    if Path(path).is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (local / name).is_file():
                there = sorted(p.name for p in local.glob("*")) if local.is_dir() else []
                hint = "only safetensors are read, convert the .bin file with peft" if "adapter_model.bin" in there else ""
                raise FileNotFoundError(errors.say(f"load_peft({path!r})", f"{name} must be there", f"{there}", hint))
        return local
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    absent = (
        hub.EntryNotFoundError,
        hub.HFValidationError,
        hub.LocalEntryNotFoundError,
        hub.OfflineModeIsEnabled,
        hub.RepositoryNotFoundError,
        hub.RevisionNotFoundError,
    )
    try:
        found = [hf_hub_download(path, name, subfolder=subfolder or None, revision=revision) for name in (CONFIG, WEIGHTS)]
    except absent as e:
        reason = f"no such directory, and from the hub {type(e).__name__}: {e}"
        raise FileNotFoundError(
            errors.say(f"load_peft({path!r})", "an existing directory or a hub id is required", reason)
        ) from e
    return Path(found[0]).parent


def read_config(path: Path) -> dict[str, Any]:
    """Reads an adapter config; raises ``CheckpointError`` unless it is a JSON object with a known ``peft_type``."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise errors.CheckpointError(errors.say(str(path), "an adapter config must be JSON", str(e))) from e
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        found = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise errors.CheckpointError(errors.say(str(path), "an adapter config must be an object with a peft_type", found))
    task = config.get("task_type")
    if task is not None and task not in _TASKS:
        raise errors.CheckpointError(errors.one_of(str(path), "task_type", task, _TASKS))
    return config


def registered() -> dict[str, list[type[Method]]]:
    """Returns the registered methods by peft type."""
    by_type: dict[str, list[type[Method]]] = {}
    for name in methods.__all__:
        cls = getattr(methods, name)
        if cls.peft_type:
            by_type.setdefault(cls.peft_type, []).append(cls)
    return by_type


def method_of(config: Mapping[str, Any], where: str = "adapter config") -> Method:
    """Makes the method that a peft config describes; raises ``CheckpointError`` naming what it cannot stand for."""
    classes = registered().get(config["peft_type"])
    if not classes:
        raise errors.CheckpointError(
            errors.say(
                where,
                "peft_type must be a registered method",
                repr(config["peft_type"]),
                errors.nearest(config["peft_type"], registered()),
            )
        )
    cls = min(classes, key=lambda c: len(_refused(c, config)))
    refused = _refused(cls, config)
    if refused:
        text = ", ".join(f"{k}={config.get(k)!r}" for k in refused)
        raise errors.CheckpointError(
            errors.say(where, f"{cls.__name__} must know every field that is not at its default", text)
        )
    names = {f.name for f in dataclasses.fields(cls)}
    given = {k: v for k, v in config.items() if k in names and not (v is None and _never_none(cls, k))}
    saved = given.get("modules_to_save")
    if isinstance(saved, list):
        given["modules_to_save"] = list(dict.fromkeys(saved))  # peft repeats names
    try:
        return cls(**{**cls.peft_implied, **given})
    except (AttributeError, TypeError, ValueError) as e:
        raise errors.CheckpointError(errors.say(where, f"the fields must make a {cls.__name__}", str(e))) from e


def _never_none(cls: type[Method], name: str) -> bool:
    return "None" not in next(str(f.type) for f in dataclasses.fields(cls) if f.name == name)


def _refused(cls: type[Method], config: Mapping[str, Any]) -> list[str]:
    """Lists the fields of a config that would change the result and for which a method has no field."""
    names = {f.name for f in dataclasses.fields(cls)} | _COMMON
    wrong = []
    for k, v in cls.peft_fixed.items():
        found = config.get(k, False if v is True else v)  # a switch that is absent is off
        if k not in _COMMON and found != v and (found or v):
            wrong.append(k)
    if cls.peft_switch and not config.get(cls.peft_switch):
        wrong.append(cls.peft_switch)
    unknown = [
        k
        for k, v in config.items()
        if k not in names and k not in cls.peft_fixed and v not in (None, False, [], {}, "", "none")
    ]
    return sorted({*wrong, *unknown})


def _without_absent_heads(model: Model, method: Method, config: Mapping[str, Any]) -> Method:
    """Drops the head names that peft adds for a task and that this model does not have."""
    if not method.modules_to_save or config.get("task_type") not in _HEADED:
        return method
    paths = [p for p, _ in model.modules()]
    kept = [n for n in method.modules_to_save if n not in _HEADS or any(p == n or p.endswith(f".{n}") for p in paths)]
    return dataclasses.replace(method, modules_to_save=kept or None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file; raises ``CheckpointError`` if it is corrupt, truncated, or holds NaN."""
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # not a dict
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise errors.CheckpointError(
            errors.say(str(path), "a whole safetensors file is required", str(e), "it is corrupt or truncated")
        ) from e
    broken = [k for k, t in tensors.items() if not all_finite(t.float() if t.is_floating_point() else t)]
    if broken:
        raise errors.CheckpointError(
            errors.say(str(path), "every tensor must be finite", f"NaN or infinity in {errors.listed(broken)}")
        )
    return {k: t.float() if t.is_floating_point() and t.itemsize == 1 else t for k, t in tensors.items()}


def fill(net: Net, params: Params, tensors: Mapping[str, Tensor], where: str, **needs: Any) -> Any:
    """Returns an adapter of a net whose saved leaves are a file's; what the file does not hold is made as at init."""
    named = {key if key.startswith("base_model.") or not _injected(net) else _ROOT + key: t for key, t in tensors.items()}
    named = _without_wrappers(named)
    _require_those_of(net, params, named, needs, where)
    made: list[Adapter] = []
    wrong, left = _Wrong(), dict(named)
    for entry, fresh in zip(net.entries, as_tuple(net.init(params, seed=0, inference_mode=True, **needs)), strict=True):
        found = _found(net, entry, fresh, left, wrong)
        right = not any(wrong.keys.values())
        made.append(_with_derived(net, entry, _filled(entry, fresh, found, where), params) if right else fresh)
        for key, t in _tied_tensors(net, entry, made[-1]):
            _require_equal(left.pop(key, t), t, f"{where} at {key!r}")
    wrong.keys["extra"] += [k for k in left if not _tolerated(net, params, k, left[k], where)]
    wrong.raise_if_any(where)
    return made[0] if len(made) == 1 else tuple(made)


class _Wrong:
    """Collects what is wrong with a file's tensors, so that one error lists all of it."""

    def __init__(self) -> None:
        self.keys: dict[str, list[str]] = {"missing": [], "misshapen": [], "of another type": [], "extra": []}

    def raise_if_any(self, where: str) -> None:
        if any(self.keys.values()):
            parts = [f"{how} {errors.listed(keys)}" for how, keys in self.keys.items() if keys]
            rule = "the tensors must be those of the config's sites in this model"
            raise errors.CheckpointError(errors.say(where, rule, "; ".join(parts)))


def _require_those_of(net: Net, params: Params, tensors: Mapping[str, Tensor], needs: Mapping[str, Any], where: str) -> None:
    """Raises ``CheckpointError`` unless tensors are those of the sites, by shapes alone: a config may claim any size."""
    wrong, left = _Wrong(), dict(tensors)
    for entry in net.entries:
        try:
            fresh = shapes_of(net, entry, inference_mode=True, **needs)
            _found(net, entry, fresh, left, wrong)
            tied = [key for key, _ in _tied_tensors(net, entry, fresh)]
        except NotImplementedError:  # which tensors there are depends on values; they are compared once those are made
            return
        except RuntimeError as e:  # torch counts no further
            rule = f"the config of {entry.method.label} must give tensors of possible sizes"
            raise errors.CheckpointError(errors.say(where, rule, str(e).splitlines()[0])) from e
        for key in tied:
            left.pop(key, None)
    wrong.keys["extra"] += [k for k in left if not _tolerated(net, params, k, left[k], where)]
    wrong.raise_if_any(where)


def _found(net: Net, entry: Entry, fresh: Adapter, left: dict[str, Tensor], wrong: _Wrong) -> dict[str, dict[str, Tensor]]:
    """Takes from a file's tensors those of an entry, by path and peft's key."""
    found: dict[str, dict[str, Tensor]] = {}
    for file_key, path, key, t in _entry_tensors(net, entry, fresh):
        given = left.pop(file_key, None)
        if given is None:
            wrong.keys["missing"].extend([] if path in entry.sites and key in entry.method.optional_keys else [file_key])
        elif given.shape != t.shape:
            wrong.keys["misshapen"].append(f"{file_key} {tuple(given.shape)}, not {tuple(t.shape)}")
        elif not _same_type(given, t):
            wrong.keys["of another type"].append(f"{file_key} {given.dtype}, not {t.dtype}")
        else:
            found.setdefault(path, {})[key] = given
    return found


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes the names under which peft keeps biases of saved modules: the frozen original, and the trained copy."""
    plain = {k: t for k, t in tensors.items() if ".original_module." not in k}
    renamed = {k.replace(".modules_to_save.", "."): t for k, t in plain.items() if ".modules_to_save." in k}
    return {**renamed, **{k: t for k, t in plain.items() if ".modules_to_save." not in k}}


def _injected(net: Net) -> bool:
    return all(e.method.sited or e.method.injected for e in net.entries)


def _filled(entry: Entry, fresh: Adapter, found: Mapping[str, Mapping[str, Tensor]], where: str) -> Adapter:
    """Returns an entry's adapter with the leaves that a file gave, by path and peft's key, in place of fresh ones."""
    params, consts = ({p: dict(v) for p, v in tree.items()} for tree in (fresh.params, fresh.consts))
    placed: dict[tuple[str, str], Tensor] = {}
    for path, given in sorted(found.items(), key=lambda item: item[0] not in entry.sites):  # sites' copies first
        for name, t in _leaves_of(entry, path, given, where).items():
            place = _place_of(entry, fresh, path, name)
            before = placed.setdefault((place, name), t)
            if before is not t and path in entry.sites and (before.shape != t.shape or not torch.equal(before, t)):
                rule = f"every site's copy of {name!r}, which sites share, must be the same"
                raise errors.CheckpointError(errors.say(f"{where}: {entry.method.label} at {path!r}", rule, "another one"))
            tree = params if name in params.get(place, {}) else consts
            old = tree.setdefault(place, {}).get(name)
            tree[place][name] = t.clone() if old is None else t.to(dtype=old.dtype, device=old.device, copy=True)
    return fresh.replace(params=params, consts=consts)


def _same_type(given: Tensor, wanted: Tensor) -> bool:
    """Whether a cast keeps the numbers: floats are floats, whatever their width; indices may be stored as floats."""
    kinds = [(t.is_complex(), t.dtype is torch.bool) for t in (given, wanted)]
    return kinds[0] == kinds[1] and (given.is_floating_point() or not wanted.is_floating_point())


def _with_derived(net: Net, entry: Entry, adapter: Adapter, params: Params) -> Adapter:
    """Returns the adapter with the frozen leaves that follow from what was read."""
    if type(entry.method).derived is Method.derived:
        return adapter
    consts = dict(adapter.consts)
    for path, base in net.bases(entry, params).items():
        made, old = entry.method.derived(entry.leaves(adapter, path), base), consts.get(path, {})
        consts[path] = {**old, **{n: t.to(old[n].dtype) if n in old else t for n, t in made.items()}}
    return adapter.replace(consts=consts)


def _require_equal(found: Tensor, wanted: Tensor, where: str) -> None:
    """Raises ``CheckpointError`` where two modules that read one tensor were trained apart."""
    if found.shape != wanted.shape or not torch.equal(found.to(wanted.dtype), wanted):
        rule, remedy = "what acts on a tied weight must be the same at all its modules", "set ensure_weight_tying to false"
        raise errors.CheckpointError(errors.say(where, rule, "two that were trained apart", remedy))


def _place_of(entry: Entry, fresh: Adapter, path: str, name: str) -> str:
    """Returns the path at which an adapter keeps a leaf of a site: the site's, or that of a scope it shares."""
    if path not in entry.sites or name in fresh.leaves(path):
        return path
    return next((s for s in entry.scopes.get(path, ()) if name in fresh.leaves(s)), path)


def _leaves_of(entry: Entry, path: str, given: Mapping[str, Tensor], where: str) -> Leaves:
    try:
        if path in entry.sites:
            return entry.method.from_peft(Base(entry.sites[path], _meta(entry.sites[path])), given)
        if entry.method.wraps and not path:
            return entry.method.from_peft(None, given)
        return entry.method.from_peft_shared(path, given)
    except ValueError as e:
        raise errors.CheckpointError(f"{where} at {path!r}: {e}") from e


def _tolerated(net: Net, params: Params, key: str, tensor: Tensor, where: str) -> bool:
    """Whether a surplus tensor is one that peft writes beside: a frozen base weight, or a tied or shared copy."""
    plain = key.removeprefix(_ROOT)
    base = plain.replace(".base_layer.", ".")
    base = net.model.ties.get(base, base)
    if base in params and isinstance(params[base], Tensor):
        if params[base].shape != tensor.shape or not torch.equal(params[base].to(tensor.dtype), tensor):
            raise errors.CheckpointError(
                errors.say(
                    f"{where} at {key!r}",
                    "the file's base weight must be this model's",
                    "another one",
                    "load the base that the adapter was trained on",
                )
            )
        return True
    owner, _, last = plain.rpartition(".")
    return last == "trainable_tokens_delta" and f"{owner}.weight" in net.model.ties


# -- writing ---------------------------------------------------------------------------------------------------------------


def save_peft(
    net: Net,
    adapter: Adapters,
    path: str | os.PathLike[str],
    *,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes an adapter so that peft, and what reads peft's files, loads it.

    Args:
        net: The net that the adapter is for.
        adapter: One adapter; a stacked one must be unstacked first.
        path: The directory; made if it is not there. Both files are written beside their places and then renamed.
        task_type: peft's task type, or ``None``.
        base_model_name_or_path: Where the base comes from, for readers that load it.

    Raises:
        ValueError: If the net has several methods, a field has no place in peft's config, or a leaf is not finite.
        TypeError: If the adapter was not made for this net, or is stacked.
    """
    entry = _single(net)
    _require_heads(net, entry, task_type)
    if task_type is not None and task_type not in _TASKS:
        raise ValueError(errors.one_of("save_peft", "task_type", task_type, _TASKS))
    given = net._matched(adapter)
    net._require_finite(adapter)
    tensors: dict[str, Tensor] = {}
    for one_entry, one in zip(net.entries, given, strict=True):
        for key, _, _, t in _entry_tensors(net, one_entry, one):
            tensors[key] = t.detach().to("cpu").contiguous().clone()
        for key, t in _tied_tensors(net, one_entry, one):
            tensors[key] = t.detach().to("cpu").contiguous().clone()
    config = config_of(net, entry, given[net.entries.index(entry)], task_type, base_model_name_or_path)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(errors.say("save_peft", "path must be a directory", f"the file {str(folder)!r}"))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    writers = {
        folder / WEIGHTS: lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}),
        folder / CONFIG: lambda temporary: Path(temporary).write_text(text, encoding="utf-8"),
    }
    _replace(writers)


def _require_heads(net: Net, entry: Entry, task_type: str | None) -> None:
    """Raises ``ValueError`` where peft would look for a trained head of the task that this net does not train."""
    task = task_type or getattr(entry.method, "task_type", None)
    saved = entry.method.modules_to_save or ()
    heads = _HEADED.get(task or "", ())
    for name, _ in net.model.modules():
        if name in heads and name not in saved:
            rule = f"peft's {task} files hold the head {name!r}, so it must be in modules_to_save"
            raise ValueError(errors.say("save_peft", rule, list(saved), "add it, or save with task_type='FEATURE_EXTRACTION'"))


def _single(net: Net) -> Entry:
    own = [e for e in net.entries if e.role == "method"]
    if len(own) != 1 or not own[0].method.peft_type:
        names = [type(e.method).__name__ for e in own]
        raise ValueError(
            errors.say(
                "save_peft",
                "a net with one method that peft has is required",
                f"{names}",
                "save each method's adapter by itself, or merge",
            )
        )
    return own[0]


def config_of(net: Net, entry: Entry, adapter: Adapter, task_type: str | None, name: str | None) -> dict[str, Any]:
    """Returns the content of ``adapter_config.json``."""
    method = entry.method
    config = method.to_peft_config({p: adapter.leaves(p) for p in dict.fromkeys((*entry.sites, ""))})
    if hasattr(method, "peft_resolved"):
        config |= method.peft_resolved(ModelFacts(net.model, {}))  # type: ignore[attr-defined]
    if not (method.sited or method.injected):
        config = {
            k: v
            for k, v in config.items()
            if k not in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        }
    elif method.sited and "target_modules" in config:
        config["target_modules"] = _targets(method, entry)
    task = task_type or config.get("task_type")
    cls = type(net.model.root)
    return {
        **config,
        "peft_type": method.peft_type,
        "task_type": task,
        "peft_version": PEFT_VERSION,
        "inference_mode": True,
        "revision": None,
        "base_model_name_or_path": name or getattr(net.model.config, "_name_or_path", None) or None,
        "auto_mapping": None if task else {"base_model_class": cls.__name__, "parent_library": cls.__module__},
    }


def _targets(method: Method, entry: Entry) -> Any:
    rule = method.target_modules
    if isinstance(rule, str) and rule.lower() != "all-linear":
        return rule
    if isinstance(rule, tuple):
        return list(rule)
    if getattr(method, "target_parameters", None):
        return []
    return sorted(
        {s.path for s in entry.sites.values()}
        if not method.takes_any
        else {s.weight.rpartition(".")[0] for s in entry.sites.values()}
    )


def _replace(writers: Mapping[Path, Callable[[str], Any]]) -> None:
    """Writes every file beside its place, then renames them all, so that a failing write leaves the old ones whole."""
    written: dict[Path, str] = {}
    try:
        for path, write in writers.items():
            descriptor, written[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(descriptor)
            write(written[path])
            os.chmod(written[path], 0o644)
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            Path(temporary).unlink(missing_ok=True)
