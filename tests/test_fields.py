"""Fields of methods: every value of a wrong type, size or form is refused by ``ValueError``, never by what it would break."""

import dataclasses
import json
import re
from enum import Enum
from typing import Literal, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from funcpeft import methods
from funcpeft.adapt import adapt
from funcpeft.errors import CheckpointError
from funcpeft.fields import described, finite, fits, freeze
from funcpeft.functional import functionalize
from funcpeft.interop.peft import CONFIG, WEIGHTS, load_peft, save_peft
from funcpeft.method import Method
from funcpeft.methods import HRA, FRoD, LoRA, Poly, RandLoRA, SHiRA, SuperTuning, UniLoRA, VBLoRA

CLASSES = [cls for cls in map(methods.__dict__.__getitem__, methods.__all__) if isinstance(cls, type) and cls.peft_type]
Mode = Enum("Mode", ["ON", "OFF"])
ODD = [
    "abc",
    "",
    -1,
    0,
    1.5,
    True,
    None,
    [],
    [1],
    ["a"],
    {"a": "b"},
    {"(": 3},
    [[0]],
    [[0, -1]],
    "(",
    2**40,
    2**70,
    float("nan"),
]


def base():
    torch.manual_seed(0)
    return functionalize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12)))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_field_of_any_value_makes_a_method_or_a_value_error(cls):
    model, _ = base()
    example = cls.examples()[0]
    targets = {"target_modules": ("0",)} if cls.kinds else {}
    refused = 0
    for f in dataclasses.fields(cls):
        for value in ODD:
            try:
                adapt(model, dataclasses.replace(example, **{**targets, f.name: value}))
            except ValueError:
                refused += 1
    assert refused >= len(dataclasses.fields(cls))


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (int, 3, (True, 3.0, "3", None), "an integer"),
        (float, (3, 2.5), (True, "3", None), "a number"),
        (bool, (True, False), (1, "True", None), "True or False"),
        (str | None, ("a", None), (1, ["a"]), "a string or None"),
        (tuple[str, ...] | list[str] | str, ("a", ["a"], []), (1, [1], {"a": 1}, None), "a list of strings or a string"),
        (tuple[tuple[int, int], ...], ([[0, 1]], []), ([0, 1], [[0]], [[0, 1, 2]], "ab"), "a list of pairs"),
        (dict[str, int], ({"a": 1}, {}), (["a"], 1, {"a": "b"}, {1: 1}), "a dict of integers"),
        (set[int], ({1, 2}, [1], ()), ({"a"}, 1), "a list of integers"),
        (tuple[int, str], ((1, "a"),), ((1,), ("a", 1), 1), "a list of an integer and a string"),
        (Literal["a", 1] | None, ("a", 1, None), ("b", True, 2), "one of 'a', 1 or None"),
        (Mode, (Mode.ON,), ("on", 1), "a Mode"),
        (TypeVar("Any"), (1, "a", None), (), "a Any"),
        (list, ([], [1, "a"]), (1, {}), "a list"),
    ],
)
def test_values_fit_their_annotations(hint, good, bad, words):
    assert all(fits(freeze(value), hint) for value in (good if isinstance(good, tuple) else (good,)))
    assert not any(fits(freeze(value), hint) for value in bad)
    assert described(hint) == words


def test_numbers_are_finite_at_any_depth_and_of_64_bits():
    nan, inf = float("nan"), float("inf")
    assert all(map(finite, (1.0, 2**63 - 1, -(2**63), "nan", None, freeze({"a": [1, {"b": 2.0}]}))))
    assert not any(map(finite, (nan, -inf, 2**63, freeze([1.0, [nan]]), freeze({"a": {"b": inf}}))))


def test_a_field_whose_annotation_cannot_be_evaluated_is_taken_as_it_is():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Local(Method):
        odd: "Nowhere" = 3  # noqa: F821  # the point

    assert Local(odd="any").odd == "any"


# -- files -------------------------------------------------------------------------------------------------------------------


def written(folder, method):
    """Writes an adapter whose trained leaves are not zero; returns the model and params."""
    model, params = base()
    net = adapt(model, dataclasses.replace(method, target_modules=("0", "1")))
    save_peft(net, net.init(params, seed=1), folder)
    return model, params


def altered(folder, change):
    """Changes tensors of a file; ``change`` maps the end of a key to a function of the tensor."""
    tensors = load_file(folder / WEIGHTS)
    for end, f in change.items():
        keys = [k for k in tensors if k.endswith(end)]
        assert keys
        tensors |= {k: f(tensors[k].clone()) for k in keys}
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS)


def put(value, *place):
    def change(t):
        t[place] = value
        return t

    return change


def again(t):
    t[..., 1] = t[..., 0]
    return t


SHIRA, SUPER = SHiRA(r=1), SuperTuning(sparsity=0.5)
FROD, UNI = FRoD(sparse_rate=0.2), UniLoRA(r=2, theta_d_length=7, save_indices=True)
BANK = VBLoRA(r=2, num_vectors=5, vector_length=4, topk=2, save_only_topk_weights=True)
BAD = [
    (SHIRA, {"shira_indices": put(8, 1, 0)}, "columns of shira_indices must be whole numbers from 0 to 7, got"),
    (SHIRA, {"shira_indices": put(-1, 0, 0)}, "rows of shira_indices must be whole numbers from 0 to"),
    (SHIRA, {"shira_indices": lambda t: put(0.5, 0, 0)(t.double())}, "rows of shira_indices must be whole numbers"),
    (SHIRA, {"shira_indices": again}, "shira_indices must be different from each other"),
    (SUPER, {"supertuning_indices": put(10**6, 0)}, "supertuning_indices must be whole numbers from 0 to"),
    (SUPER, {"supertuning_indices": again}, "supertuning_indices must be different from each other"),
    (FROD, {"frod_s_indices.0": put(8, 1, 0)}, "frod_s_indices must be whole numbers from 0 to 7"),
    (FROD, {"frod_s_indices.0": again}, "frod_s_indices must be different from each other"),
    (FROD, {"frod_s_indices.0": lambda t: put(t[0, 0].clone(), 1, 0)(t)}, "frod_s_indices must be off the diagonal"),
    (FROD, {"frod_s_size.0": put(9, 0)}, r"frod_s_size must be that of V, \[8, 8\], got \[9, 8\]"),
    (UNI, {"unilora_indices_A": put(-1, 0, 0)}, "unilora_indices_A must be whole numbers from 0 to 6, got \\[-1\\]"),
    (UNI, {"unilora_indices_B": put(7, 0, 0)}, "unilora_indices_B must be whole numbers from 0 to 6"),
    (HRA(r=2), {"hra_u": lambda t: t * 0}, r"hra_u must be vectors that are not zero, got 'norms \[0.0, 0.0\]'"),
    (BANK, {"logits_A_topk_indices": put(5, 0, 0, 0)}, "vblora_logits_A_topk_indices must be whole numbers from 0 to 4"),
    (BANK, {"logits_B_topk_indices": again}, "vblora_logits_B_topk_indices must be different from each other"),
    (BANK, {"logits_A_topk_weights": put(1.5, 0, 0, 0)}, "vblora_logits_A_topk_weights must be shares of 1, got 'one of -0.5'"),
    (BANK, {"logits_B_topk_weights": put(-0.5, 0, 0, 0)}, "vblora_logits_B_topk_weights must be shares of 1"),
]


@pytest.mark.parametrize(("method", "change", "message"), BAD)
def test_places_that_a_file_holds_are_checked(method, change, message, tmp_path):
    model, params = written(tmp_path, method)
    load_peft(model, params, tmp_path)  # as it was written
    altered(tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"{re.escape(WEIGHTS)} at '.*': .*{message}"):
        load_peft(model, params, tmp_path)


@pytest.mark.parametrize("size", [2**40, 2**62])
@pytest.mark.parametrize(
    ("method", "field"),
    [
        (LoRA(r=2), "r"),
        (RandLoRA(r=2), "r"),
        (UNI, "r"),
        (UNI, "theta_d_length"),
        (BANK, "num_vectors"),
        (Poly(r=2), "n_skills"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_a_size_that_a_config_claims_is_compared_before_anything_is_made(method, field, size, tmp_path):
    model, params = written(tmp_path, method)
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), field: size}))
    with pytest.raises(CheckpointError, match=r"the tensors must be those of the config's sites|must give tensors of possible"):
        load_peft(model, params, tmp_path)
