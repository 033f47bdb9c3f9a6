"""peft's checkpoints, both ways: folders with ``adapter_config.json`` and ``adapter_model.safetensors``, or ids of the hub.

With peftconfig and pefttensors the only place that knows peft's conventions (peft 0.21). Writing is atomic; peft itself is
never imported. Imports both, and adapt.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from funcpeft import errors
from funcpeft.adapt import Net, adapt
from funcpeft.entries import Entry
from funcpeft.functional import Model, Params
from funcpeft.interop.peftconfig import TASKS, config_of, method_of, read_config, require_heads, without_absent_parts
from funcpeft.interop.pefttensors import ROOT, buffers_of, fill, read_tensors, tensors_of
from funcpeft.tree import Adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
        CheckpointError: If a file is corrupt or truncated, is no adapter config, is of a layer under two names, has a field
            that is not known here and is not at its default, or lacks, adds or misshapes tensors; the message lists them.
        NoMatchError: If the config's targets match nothing in this model.
    """
    folder = _folder(str(path), revision, subfolder)
    config = read_config(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    method = method_of(config, str(folder / CONFIG)).completed(needs)
    try:
        method = method.as_written({key.removeprefix(ROOT): t.shape for key, t in tensors.items()})
    except IndexError as e:
        rule = f"tensors must have the axes of {method.label}"
        raise errors.CheckpointError(errors.say(str(folder / WEIGHTS), rule, "fewer")) from e
    net = adapt(model, without_absent_parts(model, method, config))
    _require_one_name(net, str(folder / WEIGHTS))
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


# -- writing ---------------------------------------------------------------------------------------------------------------


def save_peft(
    net: Net,
    adapter: Adapters,
    path: str | os.PathLike[str],
    *,
    params: Params | None = None,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes an adapter so that peft, and what reads peft's files, loads it.

    Args:
        net: The net that the adapter is for.
        adapter: One adapter; a stacked one must be unstacked first.
        path: The directory; made if it is not there. Both files are written beside their places and then renamed.
        params: The base's leaves; needed where ``modules_to_save`` names a module with buffers, which peft's files hold too.
        task_type: peft's task type, or ``None``.
        base_model_name_or_path: Where the base comes from, for readers that load it.

    Raises:
        ValueError: If the net has several methods, a field has no place in peft's config, a leaf is not finite, or ``params``
            are needed.
        TypeError: If the adapter was not made for this net, or is stacked.
    """
    entry = _single(net)
    require_heads(net, entry, task_type)
    if task_type is not None and task_type not in TASKS:
        raise ValueError(errors.one_of("save_peft", "task_type", task_type, TASKS))
    _require_one_name(net, "save_peft")
    given = net._matched(adapter)
    net._require_finite(adapter)
    tensors = {**tensors_of(net, given), **buffers_of(net, entry.method, params)}
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


def _require_one_name(net: Net, where: str) -> None:
    """Raises ``CheckpointError`` for a layer that stands in the model under two names, which are two layers to peft."""
    names: dict[int, list[str]] = {}
    modules = dict(net.model.root.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
    for entry in net.entries:
        for site in entry.sites.values():
            known = names[id(modules[site.weight.rpartition(".")[0]])]
            if len(known) > 1:
                rule, found = "a layer under two names is two to peft, of which it adapts one", errors.listed(known)
                raise errors.CheckpointError(errors.say(where, rule, found, "leave it out, or keep it in train.save's files"))


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
