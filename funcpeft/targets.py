"""Choosing sites: which parameters of a model a method adapts.

peft's fields and meaning (a list entry is a whole path or a dotted suffix, a string is a regular expression that must match
the whole path, ``"all-linear"`` is every linear layer but the output head), but stricter: every entry must match something,
or the error says what is nearest. Imports functional, method, layers, errors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from funcpeft import errors, layers
from funcpeft.blocks import decoder_blocks
from funcpeft.functional import Model
from funcpeft.method import Method
from funcpeft.weights import Base, Site


def matches(rule: str | Sequence[str], path: str) -> bool:
    """Whether a rule names a path: a string by full regular-expression match, a list by equality or dotted suffix."""
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == entry or path.endswith(f".{entry}") for entry in rule)


def under(names: Iterable[str], path: str) -> bool:
    """Whether a path lies at or under a module of one of these names."""
    return any(re.search(rf"(^|\.){re.escape(name)}($|\.)", path) for name in names)


@functools.cache
def default_table() -> dict[str, Any]:
    """Returns the default targets of every architecture, as in peft 0.21.2."""
    text = resources.files("funcpeft.data").joinpath("default_targets.json").read_text()
    return json.loads(text)["entries"]


def default_targets(model: Model, family: str, where: str, field: str = "target_modules") -> Any:
    """Returns the default targets of a model's architecture for a peft type.

    Raises:
        ValueError: If the architecture is unknown, or has no default for this family.
    """
    if family == "TRAINABLE_TOKENS":
        return (_input_embedding(model, where),)
    if family == "SHADOW":
        return decoder_blocks(model.root)
    name = getattr(model.config, "model_type", "")
    for row in default_table().get(name, []):
        if family in row["methods"]:
            found = row["targets"]
            return tuple(found) if isinstance(found, list) else found
    raise ValueError(
        errors.say(where, f"{field} has no default for this model", f"model_type {name!r}", f"name the modules in {field}")
    )


def _input_embedding(model: Model, where: str) -> str:
    root: Any = model.root
    found = root.get_input_embeddings() if hasattr(root, "get_input_embeddings") else None
    for name, m in model.modules():
        if m is found:
            return name
    raise ValueError(
        errors.say(
            where, "target_modules has no default for this model", "no input embedding", "name the module in target_modules"
        )
    )


def all_linear(model: Model) -> tuple[str, ...]:
    """Lists the paths of all linear layers but the output head."""
    root: Any = model.root
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    if head is None and "SequenceClassification" in model.name:
        head = next((m for m in (getattr(root, n, None) for n in ("score", "classifier")) if m is not None), None)
    skipped = set(head.modules()) if isinstance(head, nn.Module) else set()
    return tuple(
        name
        for name, m in model.modules()
        if (isinstance(m, nn.Linear) or layers.is_conv1d_of_transformers(m)) and m not in skipped
    )


def _layer_index(path: str, patterns: Sequence[str]) -> int | None:
    if not patterns:
        found = re.search(r"\.[^.]*\.(\d+)\.", path) or re.search(r"^[^.]*\.(\d+)\.", path)
    else:
        tries = (re.search(rf"(?:^|\.){re.escape(p)}\.(\d+)\.", path) for p in patterns)
        found = next((t for t in tries if t), None)
    return int(found.group(1)) if found else None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _every_entry(where: str, field: str, rule: Any, paths: Sequence[str]) -> None:
    """Raises ``NoMatchError`` for the first entry of a rule that matches no path."""
    for entry in (rule,) if isinstance(rule, str) else rule:
        single = entry if isinstance(rule, str) else (entry,)
        try:
            hit = any(matches(single, p) for p in paths)
        except re.error as e:
            raise ValueError(errors.say(where, f"{field} must be a valid regular expression", f"{rule!r} ({e})")) from e
        if not hit:
            hint = errors.nearest(entry, _endings(entry, paths))
            if isinstance(rule, str) and any(matches((entry,), p) for p in paths):
                hint = f"a string is a regular expression for the whole path, so write [{entry!r}]"
            raise errors.NoMatchError(errors.say(where, f"every entry of {field} must match a module", repr(entry), hint))


def target_paths(model: Model, method: Method, allowed: Sequence[str] | None = None) -> tuple[str, ...]:
    """Lists the paths of the modules a method adapts, in module order.

    Args:
        model: The model whose modules are candidates.
        method: The method whose fields choose.
        allowed: The paths among which to choose; all modules of the model by default.

    Raises:
        NoMatchError: If an entry of a rule matches nothing, or everything that matched is excluded.
        ValueError: If ``layers_to_transform`` or ``layers_pattern`` do not fit the form of ``target_modules``.
    """
    where, paths = method.label, list(allowed or (name for name, _ in model.modules()))
    rule: Any = method.target_modules
    if rule == () or (rule is None and getattr(method, "target_parameters", None)):
        return ()
    if rule is None:  # a default is for every model of an architecture, of which this one may lack some layers
        rule = default_targets(model, method.peft_type, where)
        rule = rule if isinstance(rule, str) else tuple(n for n in rule if any(matches((n,), p) for p in paths)) or rule
    kept_layers, patterns = _as_tuple(method.layers_to_transform), _as_tuple(method.layers_pattern)
    if patterns and not kept_layers:
        raise ValueError(errors.say(where, "layers_pattern needs layers_to_transform", None))
    if kept_layers and isinstance(rule, str):
        raise ValueError(errors.say(where, "layers_to_transform needs a list of target_modules", f"the string {rule!r}"))
    if isinstance(rule, str) and rule.lower() == "all-linear":
        rule = all_linear(model)
        if not rule:
            raise errors.NoMatchError(errors.say(where, "'all-linear' must match a linear layer", "a model without any"))
    _every_entry(where, "target_modules", rule, paths)
    found = [p for p in paths if matches(rule, p)]
    excluded = method.exclude_modules
    if excluded:
        _every_entry(where, "exclude_modules", excluded, paths)
        found = [p for p in found if not matches(excluded, p)]
    found = [p for p in found if not under(_as_tuple(method.modules_to_save), p)]
    if kept_layers:
        index = {p: None if p in rule else _layer_index(p, patterns) for p in found}
        for layer in kept_layers:
            if layer not in index.values():
                seen = sorted({i for i in index.values() if i is not None})
                raise errors.NoMatchError(
                    errors.say(where, "every entry of layers_to_transform must be a layer", layer, f"layers are {seen}")
                )
        found = [p for p in found if p in rule or index[p] in kept_layers]
    if not found:
        raise errors.NoMatchError(
            errors.say(
                where,
                "target_modules must leave a module to adapt",
                f"{rule!r}, all of it excluded",
                "see exclude_modules and modules_to_save",
            )
        )
    return tuple(found)


def parameter_keys(model: Model, names: Sequence[str], where: str) -> tuple[str, ...]:
    """Lists the keys of parameters by name or dotted suffix, in the model's order; every name must match."""
    keys = [k for k in model.shapes if k not in model.buffers]
    for name in names:
        if not any(matches((name,), k) for k in keys):
            raise errors.NoMatchError(
                errors.say(
                    where, "every entry of target_parameters must match a parameter", repr(name), errors.nearest(name, keys)
                )
            )
    return tuple(k for k in keys if matches(names, k))


def sites_of(model: Model, method: Method) -> dict[str, Site]:
    """Returns the sites of a method, by path, in module order.

    Raises:
        NoMatchError: If no site is found, or a key of a pattern names none; the message names the nearest.
        TypeError: If a targeted module is of a kind that the method does not take.
        ValueError: If the method's fields do not fit a site.
    """
    modules = dict(model.root.named_modules(remove_duplicate=False))
    found: list[Site] = []
    for path in target_paths(model, method):
        found += _module_sites(model, method, path, modules[path])
    for key in parameter_keys(model, _as_tuple(getattr(method, "target_parameters", None)), method.label):
        found.append(_parameter_site(model, method, key))
    if method.bound:  # a tied tensor is adapted once, at the module that holds it
        found = [_untied(model, method, s) for s in found]
    unique = {s.path: s for s in found}
    sites = {path: dataclasses.replace(site, index=i) for i, (path, site) in enumerate(unique.items())}
    if not sites:
        raise errors.NoMatchError(errors.say(method.label, "a method must adapt something", "no target", "see target_modules"))
    _every_pattern(method, list(sites))
    for site in sites.values():
        _check(method, site)
    return sites


def _untied(model: Model, method: Method, site: Site) -> Site:
    """Returns the site of the tensor's first module, for one whose weight is tied to it."""
    key = model.ties.get(site.weight)
    return site if key is None else _parameter_site(model, method, key)


def _every_pattern(method: Method, paths: Sequence[str]) -> None:
    """Raises for the first key of ``rank_pattern``, ``alpha_pattern`` and the like that names no site."""
    patterns = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name.endswith("_pattern")}
    keys = [(field, key) for field, value in patterns.items() if isinstance(value, Mapping) for key in value]
    for field, key in keys:
        try:
            hit = any(method.names_site(key, p) for p in paths)
        except re.error as e:
            raise ValueError(
                errors.say(method.label, f"a key of {field} must be a valid regular expression", f"{key!r} ({e})")
            ) from e
        if not hit:
            hint = errors.nearest(key, _endings(key, paths))
            raise errors.NoMatchError(errors.say(method.label, f"every key of {field} must name a site", repr(key), hint))


def _endings(entry: str, paths: Sequence[str]) -> list[str]:
    """Returns what to compare a misspelt entry with: last components, or whole paths if it has a dot."""
    return list(paths) if "." in entry else [p.rsplit(".", 1)[-1] for p in paths]


def _check(method: Method, site: Site) -> None:
    if not site.dtype.is_floating_point:
        raise TypeError(
            errors.say(
                f"{method.label} at {site.path!r}",
                "a base weight must be floating point or Quantized",
                site.dtype,
                "dequantize it, or load it as a Quantized leaf",
            )
        )
    if len(site.shape) == 0:
        raise TypeError(errors.say(f"{method.label} at {site.path!r}", "a base weight must have an axis", "a 0-d tensor"))
    if not site.shape.numel() and not method.takes_any:
        where, remedy = f"{method.label} at {site.path!r}", "leave it out with exclude_modules"
        raise ValueError(errors.say(where, "a base weight must have entries", f"shape {tuple(site.shape)}", remedy))
    method.check_site(Base(site, shape_only(site)))


def shape_only(site: Site) -> Tensor:
    """Returns a weight without values, on which a method checks its fields against a site."""
    return torch.empty(site.shape, dtype=site.dtype, device="meta")


def _module_sites(model: Model, method: Method, path: str, module: nn.Module) -> list[Site]:
    prefix = f"{path}." if path else ""
    if method.takes_any:
        keys = [prefix + n for n, _ in module.named_parameters()]
        if not keys:
            raise TypeError(errors.say(f"{method.label} at {path!r}", "a target must have parameters", type(module).__name__))
        return [_parameter_site(model, method, k) for k in keys]
    read = [model.site(prefix + name) for name, _, _ in layers.read_weights(module)]
    if read and "raw" in method.kinds:
        return read
    key = f"{prefix}weight"
    known = layers.kind_of(module)
    if known is None and "vector" in method.kinds and getattr(module, "weight", None) is not None:
        return [model.site(key)]
    if known is None or known[0].name not in method.kinds:
        name = known[0].name if known else f"a {type(module).__name__}"
        raise TypeError(
            errors.say(
                f"{method.label} at {path!r}",
                f"a target must be one of the kinds {sorted(method.kinds)}",
                name,
                "narrow target_modules or exclude it",
            )
        )
    return [model.site(key)]


def _parameter_site(model: Model, method: Method, key: str) -> Site:
    site = model.site(key)
    if method.takes_any:
        return dataclasses.replace(site, path=key, kind=layers.Vector(), met=False, bias=None)
    if site.kind.name not in method.kinds:
        raise TypeError(
            errors.say(
                f"{method.label} at {key!r}",
                f"a target must be one of the kinds {sorted(method.kinds)}",
                site.kind.name,
                "narrow target_parameters",
            )
        )
    return site
