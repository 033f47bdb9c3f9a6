"""Differential tests against peft in float64: forward, merged weights, init under one seed, files both ways.

Every row builds peft's model, moves its parameters away from init, saves it, and reads the file here. Where peft computes in
float32 inside (``single=True``), the tolerance is float32's. What peft gets wrong is not here: see test_peft_differences.py.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings

import peft
import pytest
import torch
from rows import ELSEWHERE, MODELS, ROWS, Row
from safetensors.torch import load_file

from funcpeft import methods
from funcpeft.adapt import adapt, peft_init
from funcpeft.context import Context
from funcpeft.functional import functionalize
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.interop.peftconfig import method_of, read_config, registered
from funcpeft.tree import as_tuple

#: What peft warns of when it reads a file that is as it should be.
EXPECTED = (
    "fan_in_fan_out",
    "Specified to not",
    "load p?vera_A",
    "load basis",
    "recomputed from base",
    "projection tensors",
    "Sparse invariant",
    "Unsupported layer type",
    "Failed to load the CUDA",
    "Setting boft_n",
    "Adjusted `(r|oft_block_size)`",
    "symmetric initialization",
    "has no bias term",
)
#: Warnings of peft about what a config asks for.
QUIET = pytest.mark.filterwarnings(
    "ignore:Specified to not save", "ignore:Sparse invariant checks", "ignore:save_precomputed_indices=False"
)


def base_of(row):
    torch.manual_seed(1)
    make, draw = MODELS[row.model]
    dtype, x = getattr(torch, row.dtype), draw()
    return make().to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x


def oracle(row, seed=5):
    """Returns peft's model of a row, freshly initialised under a seed."""
    module, x = base_of(row)
    config = getattr(peft, row.config)(**copy.deepcopy(row.kwargs))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, config).eval(), x


def perturb(model):
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:  # which no file holds, see test_differences_adalora_osf_adamss.py
                p.add_(0.2 * torch.randn_like(p))


def saved(row, folder):
    model, x = oracle(row)
    perturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model, x


def called(model, row, x):
    """Calls peft's model; values of the call get past the outer class only with a task type."""
    return model.base_model(x, **row.values) if row.values else model(x)


def tolerance(row, reference):
    eps = torch.finfo(torch.float32 if row.single else getattr(torch, row.dtype)).eps
    return 500 * eps * (1 + float(reference.abs().max()))


@QUIET
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_peft_file_computes_the_same_here(row, tmp_path):
    theirs, x = saved(row, tmp_path)
    model, params = functionalize(base_of(row)[0])
    net, adapter = load_peft(model, params, tmp_path)
    with torch.no_grad():
        want, got = called(theirs, row, x), net(params, adapter, x, context=Context(values=row.values))
        plain = model(params, x)
    assert (got - want).abs().max() <= tolerance(row, want)
    assert (want - plain).abs().max() > 100 * tolerance(row, want)
    if row.merges:
        merged, report = net.merge(params, adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = theirs.merge_and_unload().state_dict()
        for key, w in state.items():
            assert (merged[key] - w).abs().max() <= tolerance(row, w), key
        assert all(float(v["realised"]) > 0.999 for v in report.sites.values())


@QUIET
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_file_written_here_computes_the_same_in_peft(row, tmp_path):
    theirs, x = saved(row, tmp_path / "theirs")
    model, params = functionalize(base_of(row)[0])
    net, adapter = load_peft(model, params, tmp_path / "theirs")
    save_peft(net, adapter, tmp_path / "ours")
    wrote, read = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    surplus = {k for k in read.keys() - wrote.keys() if not k.endswith("base_layer.weight")}
    assert not surplus
    assert wrote.keys() <= read.keys()
    assert all(torch.equal(wrote[k], read[k]) and wrote[k].dtype == read[k].dtype for k in wrote)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore",
            message=f".*({'|'.join(EXPECTED)}).*",
        )
        back = peft.PeftModel.from_pretrained(base_of(row)[0], tmp_path / "ours").eval()
    with torch.no_grad():
        want = called(theirs, row, x)
        assert (called(back, row, x) - want).abs().max() <= tolerance(row, want)


@QUIET
@pytest.mark.parametrize("row", [r for r in ROWS if r.init], ids=str)
def test_init_under_one_seed_is_bit_for_bit_peft(row, tmp_path):
    theirs, _ = oracle(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    model, params = functionalize(base_of(row)[0])
    net = adapt(model, method_of(read_config(tmp_path / "adapter_config.json")))
    ours = peft_init(net, params, seed=5)
    save_peft(net, ours, tmp_path / "ours")
    want, got = load_file(tmp_path / "adapter_model.safetensors"), load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for key, t in got.items():
        assert torch.equal(t, want[key]), f"{key}: differs by {(t.double() - want[key].double()).abs().max()}"


def test_every_config_key_written_is_one_of_pefts(tmp_path):
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for kind, classes in registered().items():
        for cls in classes:
            names = {f.name for f in dataclasses.fields(mapping[kind])}
            shared = (
                {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
                if hasattr(cls, "wrap")
                else set()
            )
            own = {f.name for f in dataclasses.fields(cls)} - set(cls.peft_lacks) - set(cls.peft_implied) - shared
            assert own <= names, f"{cls.__name__}: {sorted(own - names)} are not fields of {kind}"
            assert set(cls.peft_fixed) <= names, f"{cls.__name__}: {sorted(set(cls.peft_fixed) - names)}"


def test_defaults_are_pefts():
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for kind, classes in registered().items():
        for cls in classes:
            for f in dataclasses.fields(cls):
                theirs = next((g for g in dataclasses.fields(mapping[kind]) if g.name == f.name), None)
                if theirs is None or theirs.default is dataclasses.MISSING or f.name == "token_indices":
                    continue
                assert (f.default or None) == (theirs.default or None), (
                    f"{cls.__name__}.{f.name}: {f.default} against {theirs.default}"
                )


def test_rows_cover_every_method_with_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = [getattr(peft, r.config)(**copy.deepcopy(r.kwargs)).to_dict() for r in ROWS]
    covered = {type(method_of(config)) for config in configs}
    for name in methods.__all__:
        cls = getattr(methods, name)
        if (
            cls.peft_type and not hasattr(cls, "wrap") and not cls.file_needs
        ):  # files that are not whole have tests of their own
            assert cls in covered or name in ELSEWHERE, name


def test_half_precision_init_is_rounded_as_peft_rounds(tmp_path):
    row = Row("LoraConfig", "mlp", {"target_modules": ["lin0", "lin1", "lin2"], "r": 4, "lora_alpha": 6})
    module, _ = base_of(row)
    config = peft.LoraConfig(**copy.deepcopy(row.kwargs))
    torch.manual_seed(5)
    theirs = peft.get_peft_model(module.bfloat16(), config)
    theirs.save_pretrained(tmp_path)
    model, params = functionalize(base_of(row)[0].bfloat16())
    net = adapt(model, method_of(read_config(tmp_path / "adapter_config.json")))
    ours = as_tuple(peft_init(net, params, seed=5))[0]
    for key, t in load_file(tmp_path / "adapter_model.safetensors").items():
        path, leaf = key.removeprefix("base_model.model.").split(".lora_")
        assert t.dtype == torch.float32
        assert torch.equal(ours.params[path][leaf[0]], t)
