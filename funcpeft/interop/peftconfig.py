"""``adapter_config.json`` of peft, both ways: the method that a config describes, and the config of a method.

Strict: a field that would change the result and is not known is refused by name. Imports methods, entries, facts, adapt.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funcpeft import errors, methods
from funcpeft.adapt import Net
from funcpeft.entries import Entry, bias_keys, resolved
from funcpeft.facts import ModelFacts
from funcpeft.functional import Model
from funcpeft.method import Method
from funcpeft.tree import Adapter

#: The peft release whose format is written.
PEFT_VERSION = "0.21.2"
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_HEADED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_HEADS = ("classifier", "score", "qa_outputs")  # peft adds these to modules_to_save whether or not the model has them
#: The names of modules that peft ties; of others it ties none, without a word.
TIED = ("embed_tokens", "lm_head")
#: Where peft finds a layer's index in a path, without a ``layers_pattern``.
_INDEXED = re.compile(r".*?\.[^.]*\.\d+\.")
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


# -- reading ---------------------------------------------------------------------------------------------------------------


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
    if task is not None and task not in TASKS:
        raise errors.CheckpointError(errors.one_of(str(path), "task_type", task, TASKS))
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


def without_absent_parts(model: Model, method: Method, config: Mapping[str, Any]) -> Method:
    """Drops what peft takes without a word: head names that it adds for a task, and biases, that this model does not have."""
    if getattr(method, "bias", "none") != "none" and not bias_keys(model, resolved(model, method)):
        method = dataclasses.replace(method, bias="none")
    if not method.modules_to_save or config.get("task_type") not in _HEADED:
        return method
    paths = [p for p, _ in model.modules()]
    kept = [n for n in method.modules_to_save if n not in _HEADS or any(p == n or p.endswith(f".{n}") for p in paths)]
    return dataclasses.replace(method, modules_to_save=kept or None)


# -- writing ---------------------------------------------------------------------------------------------------------------


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
    config = _untied(net, _layers_of(method, entry, config))
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


def _layers_of(method: Method, entry: Entry, config: dict[str, Any]) -> dict[str, Any]:
    """Names every module where peft would not find its layer: of a list at the top of a model, it sees no indices."""
    if method.layers_to_transform is None or method.layers_pattern or all(_INDEXED.match(p) for p in entry.sites):
        return config
    return {**config, "target_modules": sorted(s.path for s in entry.sites.values()), "layers_to_transform": None}


def _untied(net: Net, config: dict[str, Any]) -> dict[str, Any]:
    """Names every module of a tie that peft would not tie, whose copies in the file then do the same as one tensor."""
    out = dict(config)
    for entry in net.entries:
        ties = {s.weight: net.bound_keys(entry.method, s) for s in entry.sites.values()}
        modules = [key.rpartition(".")[0] for owner, others in ties.items() if others for key in (owner, *others)]
        if entry.role not in ("method", "modules_to_save") or not out.get("ensure_weight_tying"):
            continue
        if any(m.rpartition(".")[2] not in TIED for m in modules):
            field = "target_modules" if entry.role == "method" else entry.role
            known = out[field] if isinstance(out[field], list) else [s.path for s in entry.sites.values()]
            out |= {"ensure_weight_tying": False, field: list(dict.fromkeys((*known, *modules)))}
    return out


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


def require_heads(net: Net, entry: Entry, task_type: str | None) -> None:
    """Raises ``ValueError`` where peft would look for a trained head of the task that this net does not train."""
    task = task_type or getattr(entry.method, "task_type", None)
    saved = entry.method.modules_to_save or ()
    heads = _HEADED.get(task or "", ())
    for name, _ in net.model.modules():
        if name in heads and name not in saved:
            rule = f"peft's {task} files hold the head {name!r}, so it must be in modules_to_save"
            raise ValueError(errors.say("save_peft", rule, list(saved), "add it, or save with task_type='FEATURE_EXTRACTION'"))
