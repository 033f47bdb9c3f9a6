"""Layer kinds: what the weight is as a matrix, and that inputs meet it as the module computes."""

import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from funcpeft import layers


def _transposed():
    module = Conv1D(6, 4)  # 4 features in, 6 out
    return module.requires_grad_(False), (zoo.noise(2, 3, 4),)


CASES = {n: c for n, c in zoo.plain().items() if n.startswith(("linear", "conv", "embedding")) and "max_norm" not in n}
CASES["transposed"] = _transposed()
CASES["linear_1x1"] = nn.Linear(1, 1), (zoo.noise(2, 1),)
CASES["linear_square"] = nn.Linear(5, 5), (zoo.noise(2, 5),)
CASES["conv1d_unbatched"] = nn.Conv1d(4, 6, 3), (zoo.noise(4, 9),)
FLOATS = [n for n, (m, _) in CASES.items() if not isinstance(m, nn.Embedding)]


def _of(name):
    module, (x,) = CASES[name]
    found = layers.kind_of(module)
    assert found is not None
    return module, x, found[0]


@pytest.mark.parametrize("name", CASES)
def test_stored_inverts_matrix(name):
    module, _, kind = _of(name)
    matrix = kind.matrix(module.weight)
    assert matrix.ndim == 2
    assert torch.equal(kind.stored(matrix, module.weight.shape), module.weight)


@pytest.mark.parametrize("name", CASES)
def test_product_is_the_modules_forward_bitwise(name):
    module, x, kind = _of(name)
    assert torch.equal(kind.product(x, module.weight, getattr(module, "bias", None)), module(x))


@pytest.mark.parametrize("name", CASES)
def test_map_meets_a_matrix_at_the_layers_geometry(name):
    module, x, kind = _of(name)
    want = kind.product(x, module.weight, None)
    torch.testing.assert_close(kind.map(x, kind.matrix(module.weight), module.weight.shape), want)
    if kind.groups == 1:  # fewer rows: the first features of the output
        few = kind.map(x, kind.matrix(module.weight)[:1], module.weight.shape)
        torch.testing.assert_close(few, want.narrow(kind.feature_axis(), 0, 1))


@pytest.mark.parametrize("name", FLOATS)
def test_over_columns_scales_what_meets_each_input_feature(name):
    module, x, kind = _of(name)
    axis = kind.feature_axis()
    scale = zoo.noise(kind.channels(module.weight.shape), seed=3)
    assert kind.channels(module.weight.shape) == x.shape[axis]
    matrix = kind.matrix(module.weight) * kind.over_columns(scale, module.weight.shape)
    scaled = (x.movedim(axis, -1) * scale).movedim(-1, axis)
    got = kind.product(x, kind.stored(matrix, module.weight.shape), None)
    torch.testing.assert_close(got, kind.product(scaled, module.weight, None))


def test_padding_row_gets_no_gradient_from_any_matrix():
    module, x, kind = _of("embedding_padding")
    matrix = zoo.noise(3, 7).requires_grad_()
    kind.map(x, matrix, module.weight.shape).sum().backward()
    assert matrix.grad is not None
    assert not matrix.grad[:, 1].any()
    assert matrix.grad[:, 2].any()


def test_kinds_hash_by_geometry():
    one, two = nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(4, 6, 3)
    assert layers.kind_of(one) == layers.kind_of(nn.Conv2d(4, 6, 3, stride=2))
    assert layers.kind_of(one) != layers.kind_of(two)
    assert len({layers.kind_of(m) for m in (one, two, nn.Conv2d(8, 2, 3))}) == 2


class _Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_have_the_kind_of_their_base():
    kind, base = layers.kind_of(_Scaled(2, 3)) or (None, None)
    assert kind == layers.Linear()
    assert base is nn.Linear


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.Embedding(5, 3, max_norm=1.0),
        nn.ConvTranspose1d(2, 3, 3),
        parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.utils.parametrize.register_parametrization(nn.Linear(3, 4), "bias", nn.Identity()),
        nn.MultiheadAttention(8, 2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_modules_that_are_no_linear_map_of_one_parameter_have_no_kind(module):
    assert layers.kind_of(module) is None


def test_a_packed_weight_has_no_kind():
    module = nn.Linear(4, 3)
    module.weight = nn.Parameter(torch.zeros(6, 1), requires_grad=False)  # as quantized checkpoints store it
    assert layers.kind_of(module) is None


def test_weights_that_attention_reads():
    names = [n for n, _, _ in layers.read_weights(nn.MultiheadAttention(8, 2))]
    assert names == ["in_proj_weight", "out_proj.weight"]
    names = [n for n, _, _ in layers.read_weights(nn.MultiheadAttention(8, 2, kdim=4))]
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert [b for _, b, _ in layers.read_weights(nn.MultiheadAttention(8, 2, bias=False))] == [None, None]
    assert list(layers.read_weights(nn.Linear(2, 2))) == []


def test_kind_of_a_parameter_by_name():
    experts = nn.Module()
    experts.gate = nn.Parameter(torch.zeros(4, 6, 3))
    experts.scale = nn.Parameter(torch.zeros(3))
    assert layers.parameter_kind(experts, "gate") == layers.Raw()
    assert layers.parameter_kind(experts, "scale") == layers.Vector()
    experts.is_transposed = True
    assert layers.parameter_kind(experts, "gate") == layers.Raw(transposed=True)
    assert layers.parameter_kind(experts, "gate").matrix(experts.gate).shape == (4, 3, 6)
    assert layers.parameter_kind(nn.Linear(2, 3), "bias") == layers.Vector()
    assert layers.parameter_kind(nn.Linear(2, 3), "weight") == layers.Linear()


@pytest.mark.parametrize("kind", [layers.Raw(), layers.Vector()])
def test_a_weight_that_its_module_reads_meets_no_input(kind):
    with pytest.raises(TypeError, match="is read by its module and never meets an input"):
        kind.product(torch.zeros(2, 3), torch.zeros(4, 3), None)
    with pytest.raises(TypeError, match="is read by its module and never meets an input"):
        kind.map(torch.zeros(2, 3), torch.zeros(4, 3), torch.Size((4, 3)))


def test_a_kind_must_be_complete():
    with pytest.raises(TypeError, match="how its weight becomes a matrix"):
        _Nameless().matrix(torch.zeros(1))
    with pytest.raises(TypeError, match="how a matrix becomes its weight"):
        _Nameless().stored(torch.zeros(1), torch.Size((1,)))


class _Nameless(layers.Kind):
    name = "nameless"
