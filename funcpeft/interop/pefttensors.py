"""``adapter_model.safetensors`` of peft, both ways: which key holds which tensor of a site, and an adapter of a file's.

Strict: every missing, extra or misshapen tensor is refused, by shapes alone and before anything is made. Imports entries,
sitetable, adapt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from funcpeft import errors, targets
from funcpeft.adapt import Net
from funcpeft.entries import Entry
from funcpeft.functional import Params
from funcpeft.interop.peftconfig import TIED
from funcpeft.method import Method
from funcpeft.methods.trainabletokens import TrainableTokens
from funcpeft.sitetable import shapes_of
from funcpeft.tree import Adapter, Leaves, all_finite, as_tuple
from funcpeft.weights import Base

ROOT = "base_model.model."


# -- where tensors are -------------------------------------------------------------------------------------------------------


def file_prefixes(net: Net, entry: Entry) -> dict[str, str]:
    """Returns, by site path, what stands before a site's keys in the file, ending in a dot."""
    prefixes: dict[str, str] = {}
    levels: dict[str, list[str]] = {}
    for path, site in entry.sites.items():
        owner, _, name = site.weight.rpartition(".")
        if entry.role == "bias":
            prefixes[path] = _bias_key(net, site.weight)
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


def _bias_key(net: Net, key: str) -> str:
    targeted = {s.bias for e in net.entries if e.role == "method" for s in e.sites.values()}
    owner, _, name = key.rpartition(".")
    return f"{owner}.base_layer.{name}" if key in targeted else key


def _tied_prefix(net: Net, entry: Entry, alias: str) -> str:
    """Returns what stands before an entry's keys for another module that reads a tensor."""
    if entry.method.takes_any:
        return _bias_key(net, alias) if entry.role == "bias" else alias
    return f"{net.model.site(alias).path}." + "token_adapter." * (entry.role == "trainable_token_indices")


def _entry_tensors(net: Net, entry: Entry, adapter: Adapter) -> Iterator[tuple[str, str, str, Tensor]]:
    """Yields ``(file key, path, peft key after the prefix, tensor)`` of every tensor an entry keeps in a file."""
    if entry.method.wraps and adapter.leaves(""):
        for key, t in entry.method.to_peft(None, adapter.leaves("")).items():
            yield key, "", key, t
    prefixes = file_prefixes(net, entry)
    root = ROOT if _injected(net) else "base_model."  # beside a prompt, modules_to_save stand one level higher
    for path, site in entry.sites.items():
        prefix = prefixes[path]
        for key, t in entry.method.to_peft(Base(site, _meta(site)), entry.leaves(adapter, path)).items():
            yield root + prefix + key, path, key, t
    for scope in sorted({*adapter.params, *adapter.consts} - entry.sites.keys()):
        for key, t in entry.method.to_peft_shared(scope, adapter.leaves(scope)).items():
            yield f"base_model.{key}", scope, key, t


def _tied_tensors(net: Net, entry: Entry, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yields the further copies that peft's files hold of what acts on a tied tensor, for the other modules that read it."""
    tokens = isinstance(entry.method, TrainableTokens) and entry.role == "method"
    if not (tokens or getattr(entry.method, "ensure_weight_tying", False)):
        return
    for path, site in entry.sites.items():
        for alias in net.bound_keys(entry.method, site):
            other = net.model.site(alias)
            leaves = net.tied_leaves(entry.method, entry.leaves(adapter, path), site, other)
            for key, t in entry.method.to_peft(Base(other, _meta(other)), leaves).items():
                yield ROOT + _tied_prefix(net, entry, alias) + key, t


def _meta(site: Any) -> Tensor:
    return torch.empty(site.shape, dtype=site.dtype, device="meta")


def tensors_of(net: Net, adapters: tuple[Adapter, ...]) -> dict[str, Tensor]:
    """Returns the tensors of a file: copies on the CPU, by key."""
    found: dict[str, Tensor] = {}
    for entry, one in zip(net.entries, adapters, strict=True):
        own = [(key, t) for key, _, _, t in _entry_tensors(net, entry, one)]
        found |= {key: t.detach().to("cpu").contiguous().clone() for key, t in (*own, *_tied_tensors(net, entry, one))}
    return found


def buffers_of(net: Net, method: Method, params: Params | None) -> dict[str, Tensor]:
    """Returns the buffers of modules that are saved whole, which peft reads from a file as it does their parameters."""
    saved, modules = method.modules_to_save or (), dict(net.model.root.named_modules())
    keys = [key for key in sorted(net.model.buffers) if targets.under(saved, key.rpartition(".")[0])]
    keys = [key for key in keys if key.rpartition(".")[2] not in modules[key.rpartition(".")[0]]._non_persistent_buffers_set]
    if keys and params is None:
        rule, remedy = "files of saved modules hold their buffers too", "pass save_peft(..., params=params)"
        raise ValueError(errors.say("save_peft", rule, errors.listed(keys), remedy))
    root = ROOT if _injected(net) else "base_model."
    return {root + key: params[key].detach().to("cpu").contiguous().clone() for key in keys} if params else {}


# -- reading -----------------------------------------------------------------------------------------------------------------


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
    named = {key if key.startswith("base_model.") or not _injected(net) else ROOT + key: t for key, t in tensors.items()}
    named = _by_owner(net, _without_wrappers(named), where)
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
    wrong, left, untied = _Wrong(), dict(tensors), list[str]()
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
        ensured = entry.role in ("method", "modules_to_save") and not isinstance(entry.method, TrainableTokens)
        untied += [key for key in tied if key not in left and ensured]
        for key in tied:
            left.pop(key, None)
    wrong.keys["extra"] += [k for k in left if not _tolerated(net, params, k, left[k], where)]
    wrong.raise_if_any(where)
    if untied:
        rule = "with ensure_weight_tying a file must hold what acts on every module that reads a tied weight"
        remedy = f"peft ties {' and '.join(TIED)} alone: set ensure_weight_tying to false in the config"
        raise errors.CheckpointError(errors.say(where, rule, f"no {errors.listed(untied)}", remedy))


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
    named = {**renamed, **{k: t for k, t in plain.items() if ".modules_to_save." not in k}}
    again = {k: named.get(k.replace(".default.", ".", 1)) for k in named if ".default." in k}  # the name of peft's adapter
    return {k: t for k, t in named.items() if (other := again.get(k)) is None or not torch.equal(other, t)}


def _by_owner(net: Net, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Drops the copies for other modules of a tied bias, or of tokens of a tied embedding, once they are seen to be equal."""
    out = dict(tensors)
    for entry in net.entries:
        bias = entry.role == "bias"
        if not bias and not isinstance(entry.method, TrainableTokens):
            continue
        prefixes, keys = file_prefixes(net, entry), entry.method.keys.values()
        for path, site in entry.sites.items():
            for key in keys:
                owner = ROOT + prefixes[path] + key
                for alias in net.bound_keys(entry.method, site):
                    copy = out.pop(ROOT + _tied_prefix(net, entry, alias) + key, None)
                    if copy is not None and bias:  # a file of the targets' biases names the target
                        out.setdefault(owner, copy)
                    if copy is not None and owner in out:
                        _require_equal(copy, out[owner], f"{where} at {owner!r}")
    return out


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
    """Whether a surplus tensor is one that peft writes beside: a frozen base weight, or a buffer of a trained module."""
    base = key.removeprefix(ROOT)
    for infix in ("base_layer", *{e.method.file_infix for e in net.entries if e.method.file_infix}):
        base = base.replace(f".{infix}.", ".")
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
    return False
