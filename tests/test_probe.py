"""The probe: what a batch does beyond its rows is found, named, and called in another way with the right values."""

import copy
import functools
import warnings

import pytest
import torch
import zoo
from herds import agree, at, each, population
from torch import nn

import funcpeft as fp
from funcpeft.population import PopulationWarning


class Lin(nn.Module):
    """A linear layer between two functions."""

    def __init__(self, before=lambda x: x, after=lambda x: x, twice=False):
        super().__init__()
        self.lin, self.before, self.after, self.twice = nn.Linear(6, 4), before, after, twice

    def forward(self, x):
        y = self.after(self.lin(self.before(x)))
        return y + self.lin(x[None])[0] if self.twice else y


class RowByRow(Lin):
    """Meets its layer once for every row."""

    def forward(self, x):
        return torch.cat([self.lin(row[None]) for row in x])


def normed(x):
    return (x - x.mean(0, keepdim=True)) / (x.var(0, keepdim=True) + 1e-5).sqrt()


def contrast(y):
    return y @ y.transpose(0, -1) if y.ndim == 2 else y


class TimeMajor(nn.Module):
    """Flattens time before rows on the way to its layer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 4)

    def forward(self, x):
        b, t, d = x.shape
        return self.lin(x.transpose(0, 1).reshape(t * b, d)).reshape(t, b, -1).transpose(0, 1)


def batch_norm(features):
    return nn.BatchNorm1d(features, track_running_stats=False)


# -- what mixes rows ---------------------------------------------------------------------------------------------------------

MIXING = {
    "batch norm after": (lambda: Lin(after=batch_norm(4)), "output .*depends on the others"),
    "batch norm before": (lambda: Lin(batch_norm(6)), "output .*depends on the others"),
    "statistics": (lambda: Lin(normed), "output .*depends on the others"),
    "contrastive": (lambda: Lin(after=contrast), "output"),
    "scalar": (lambda: Lin(after=lambda y: y.square().mean()), "output .*take losses from logits"),
    "scalar in a dict": (lambda: Lin(after=lambda y: {"y": y, "loss": y.sum()}), r"output \['loss'\] carries no rows"),
    "time-major": (TimeMajor, "depends on the others"),
    "no rows at a site": (lambda: Lin(before=lambda x: x.mean(0)), "the input of 'lin' carries no rows"),
    "one row more": (lambda: Lin(before=lambda x: torch.cat([x, x[:1]])), "does not carry the rows"),
    "shuffled": (lambda: Lin(before=lambda x: x.flip(0)), "depends on the others"),
    "row by row": (lambda: RowByRow(), "sites are met by other rows"),
    "several axes": (lambda: Lin(after=lambda y: y, twice=True), "rows are on several axes at 'lin'"),
    "in several outputs": (lambda: Lin(after=lambda y: dict(enumerate(y))), "the output has another structure with more rows"),
    "cumulative": (lambda: Lin(after=lambda y: y.cumsum(0)), "depends on the others"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_rows_are_found_and_called_right(name):
    make, reason = MIXING[name]
    torch.manual_seed(0)
    p = population(make().double())
    x = zoo.noise(3, 4, 5, 6).double() if name == "time-major" else zoo.noise(3, 4, 6).double()
    with pytest.warns(
        PopulationWarning, match=rf"members run by (vmap|loop), which is slower than the fold, got .*{reason}"
    ) as seen:
        out = fp.apply_many(p.net, p.params, p.many, x)
    assert len(seen) == 1
    assert f"pass strategy='{fp.plan_many(p.net, p.params, p.many, x).strategy}'" in str(seen[0].message)
    for i, want in enumerate(each(p, x)):
        agree(at(out, i), want)
    agree(fp.apply_many(p.net, p.params, p.many, x), out)  # says it once
    with pytest.raises(ValueError, match=f"apply_many of {p.model.name}: the members must fold, got .*{reason}"):
        fp.apply_many(p.net, p.params, p.many, x, strategy="fold")
    for strategy in ("vmap", "loop"):
        agree(fp.apply_many(p.net, p.params, p.many, x, strategy=strategy), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["batch norm after", "batch norm before", "statistics", "cumulative", "shuffled"])
def test_mixed_rows_are_found_in_every_dtype(name, dtype):
    torch.manual_seed(0)
    p = population(MIXING[name][0]().to(dtype))
    assert fp.plan_many(p.net, p.params, p.many, zoo.noise(3, 4, 6).to(dtype)).strategy != "fold"


@pytest.mark.parametrize("name", ["batch norm before", "statistics", "cumulative"])
def test_a_probe_of_equal_inputs_says_what_holds_for_others(name):
    torch.manual_seed(0)
    p, x = population(MIXING[name][0]().double()), zoo.noise(3, 4, 6).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PopulationWarning)
        fp.apply_many(p.net, p.params, p.many, x[:1].expand(3, 4, 6))  # members whose inputs happen to be the same
        out = fp.apply_many(p.net, p.params, p.many, x)
    for i, want in enumerate(each(p, x)):
        agree(out[i], want)


@pytest.mark.parametrize("name", ["batch norm before", "statistics"])
def test_routed_rows_of_different_inputs_are_found_to_mix(name):
    torch.manual_seed(0)
    p, x, index = population(MIXING[name][0]().double()), zoo.noise(6, 6).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PopulationWarning)
        out = fp.apply_routed(p.net, p.params, p.many, index, x)
    for m in range(3):
        agree(out[index == m], p.net(p.params, p.ads[m], x[index == m]))


def test_a_probe_of_one_step_says_what_holds_for_several():
    torch.manual_seed(0)
    p, x = population(TimeMajor().double()), zoo.noise(3, 4, 5, 6).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PopulationWarning)
        fp.apply_many(p.net, p.params, p.many, x[:, :, :1])
        out = fp.apply_many(p.net, p.params, p.many, x)
    for i, want in enumerate(each(p, x)):
        agree(out[i], want)


def test_an_input_that_loses_an_axis_with_one_row():
    p = population(Lin(before=lambda x: x.squeeze(0), after=lambda y: y.reshape(-1, 4)).double())
    plan = fp.plan_many(p.net, p.params, p.many, zoo.noise(3, 1, 6).double())
    assert plan.strategy == "vmap"
    assert "the input of 'lin' has another form with more rows: (6,), then (2, 6)" in plan.reason


def test_a_routed_loop_names_outputs_that_depend_on_the_number_of_rows():
    p = population(Lin(after=contrast).double())
    with pytest.raises(ValueError, match="apply_routed: output : must carry the rows of the batch, got"):
        fp.apply_routed(p.net, p.params, p.many, [0, 0, 1], zoo.noise(3, 6).double(), strategy="loop")


def test_an_index_without_values_is_no_loop():
    p, x = population(Lin().double()), zoo.noise(3, 6).double()
    index = torch.tensor([[0, 1, -1], [2, 2, 0]])
    call = lambda i, **kw: fp.apply_routed(p.net, p.params, p.many, i, x, **kw)  # noqa: E731
    want = torch.stack([call(i) for i in index])
    agree(torch.func.vmap(call)(index), want)
    with pytest.raises(ValueError, match="apply_routed: the values of index must be known to a loop; call it outside"):
        torch.func.vmap(lambda i: call(i, strategy="loop"))(index)


@pytest.mark.parametrize("strategy", ["fold", "loop"])
@pytest.mark.parametrize("method", [fp.PromptTuning, fp.PrefixTuning])
def test_prompted_and_bare_rows_return_other_outputs(method, strategy):
    p = population(double("llama"), method(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    kw = {"input_ids": zoo.ids(3, 5), "use_cache": False}
    for index in ([-1, -1, -1], [2, 0, 1]):
        assert fp.apply_routed(p.net, p.params, p.many, index, strategy=strategy, **kw).logits.shape[0] == 3
    with pytest.raises(ValueError, match=r"must carry the rows|outputs of one shape|must return the same outputs"):
        fp.apply_routed(p.net, p.params, p.many, [0, -1, 1], strategy=strategy, **kw)


@pytest.mark.parametrize("strategy", ["fold", "loop"])
def test_prefixed_and_bare_rows_share_a_call_where_outputs_agree(strategy):
    p = population(double("gpt2"), fp.PrefixTuning(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    kw = {"input_ids": zoo.ids(3, 5), "use_cache": False}
    out = fp.apply_routed(p.net, p.params, p.many, [0, -1, 1], strategy=strategy, **kw).logits
    for r, m in enumerate([0, -1, 1]):
        one = {**kw, "input_ids": kw["input_ids"][r : r + 1]}
        agree(out[r : r + 1], (p.model(p.params, **one) if m < 0 else p.net(p.params, p.ads[m], **one)).logits)


def test_an_empty_batch_is_refused_and_says_nothing_about_others():
    p = population(Lin().double())
    with pytest.raises(ValueError, match="apply_many: inputs must have at least one row"):
        fp.apply_many(p.net, p.params, p.many, torch.zeros(3, 0, 6).double())
    for rows in (1, 2):
        assert fp.plan_many(p.net, p.params, p.many, zoo.noise(3, rows, 6).double()).strategy == "fold"
        fp.apply_many(p.net, p.params, p.many, zoo.noise(3, rows, 6).double(), strategy="fold")


# -- transformers' models ----------------------------------------------------------------------------------------------------


@functools.cache
def double(name):
    return copy.deepcopy(zoo.model(name)).double()


@functools.cache
def switch():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "num_decoder_layers": 2}
    sparse = {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    config = SwitchTransformersConfig(vocab_size=zoo.VOCAB, router_dtype="float32", **shape, **sparse, **tokens)
    return SwitchTransformersForConditionalGeneration(config).eval()


def check_model(p, kw, tolerance, reason, field=lambda out: out.logits):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", PopulationWarning)
        for _ in range(2):
            out = fp.apply_many(p.net, p.params, p.many, in_dims=None, **kw)
    seen = [str(w.message) for w in seen if w.category is PopulationWarning]
    assert len(seen) == 1
    assert reason in seen[0]
    for i, a in enumerate(p.ads):
        agree(field(out)[i], field(p.net(p.params, a, **kw)), tolerance)
    with pytest.raises(ValueError, match="the members must fold"):
        fp.apply_many(p.net, p.params, p.many, in_dims=None, strategy="fold", **kw)


@pytest.mark.parametrize("target", ["wi", "wo"])
def test_experts_that_take_some_tokens_only(target):
    p = population(switch(), fp.LoRA(r=2, target_modules=rf".*experts\.expert_\d+\.{target}"))
    kw = {"input_ids": zoo.ids(2, 6), "decoder_input_ids": zoo.ids(2, 4), "output_router_logits": False}
    check_model(p, kw, 1e-5, "expert")


def test_relative_biases_are_shared_by_rows():
    p = population(double("t5"), fp.LoRA(r=2, target_modules=["relative_attention_bias"]))
    check_model(p, {**zoo.inputs("t5"), "use_cache": False}, 1e-10, "relative_attention_bias' carries no rows")


def test_contrastive_logits():
    p = population(double("clip"), fp.LoRA(r=2, target_modules=["q_proj", "fc2"]))
    kw = {k: v.double() if v.is_floating_point() else v for k, v in zoo.inputs("clip").items()}
    check_model(p, kw, 1e-10, "logits_per_image", lambda out: out.logits_per_image)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_losses_of_labels_do_not_fold(name):
    p = population(double(name), fp.LoRA(r=2, target_modules=zoo.targets(name)))
    kw = {**zoo.inputs(name), "use_cache": False}
    check_model(p, {**kw, "labels": zoo.ids(2, 4 if name == "t5" else 6)}, 1e-6, "loss", lambda out: out.loss)


def test_a_module_that_fills_a_cache_by_itself():
    p = population(double("mamba"), fp.LoRA(r=2, target_modules=["dt_proj"]))
    check_model(p, zoo.inputs("mamba"), 1e-10, "cannot fill a cache; pass use_cache=False")


def test_a_plan_says_why():
    p, x = population(Lin().double()), zoo.noise(3, 2, 6).double()
    assert str(fp.plan_many(p.net, p.params, p.many, x)) == "fold: rows are independent"
    p = population(Lin(after=lambda y: y.sum()).double())
    assert str(fp.plan_many(p.net, p.params, p.many, x)).startswith("vmap: output  carries no rows")


def test_what_neither_folds_nor_maps_is_looped():
    p, x = population(Lin(after=lambda y: y - float(y.detach().mean())).double()), zoo.noise(3, 2, 6).double()
    with pytest.warns(PopulationWarning, match="members run by loop, .*; under vmap RuntimeError"):
        out = fp.apply_many(p.net, p.params, p.many, x)
    agree(list(out), each(p, x))


def test_an_error_of_the_model_is_its_own():
    p = population(Lin().double())
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|expand|shape"):
        fp.apply_many(p.net, p.params, p.many, zoo.noise(3, 2, 5).double())
    with pytest.raises(TypeError, match="unexpected keyword"):
        fp.apply_many(p.net, p.params, p.many, zoo.noise(3, 2, 6).double(), y=torch.zeros(3, 2))


# -- what the batch as a whole decides ---------------------------------------------------------------------------------------


def test_lengths_that_choose_a_rotary_embedding():
    p, ids = population(double("llama_dynamic"), fp.LoRA(r=2, target_modules=["q_proj"])), zoo.ids(2, 6)
    assert fp.plan_many(p.net, p.params, p.many, input_ids=ids, in_dims=None).strategy == "fold"
    plan = fp.plan_many(p.net, p.params, p.many, input_ids=torch.stack([ids] * 3))
    assert plan.strategy != "fold"
    assert "'model.rotary_emb' chooses its frequencies by the longest row" in plan.reason


class Scaled(nn.Module):
    """Doubles the whole batch where any entry is large, and returns a number of it."""

    def __init__(self, number):
        super().__init__()
        self.lin, self.number = nn.Linear(6, 4), number

    def forward(self, x):
        y = self.lin(x)
        return (y, float(y.mean())) if self.number else y * (2 if bool(x.abs().max() > 50) else 1)


def test_values_that_decide_for_the_whole_batch():
    p, x = population(Scaled(False).double()), zoo.noise(3, 2, 6).double()
    x[0] *= 1000
    with pytest.warns(PopulationWarning, match="rows act on each other"):
        out = fp.apply_many(p.net, p.params, p.many, x)
    agree(out, torch.stack([p.net(p.params, a, x[i]) for i, a in enumerate(p.ads)]))


def test_numbers_that_differ_between_members_are_refused():
    p, x = population(Scaled(True).double()), zoo.noise(3, 2, 6).double()
    with (
        pytest.warns(PopulationWarning, match="depends on the others"),
        pytest.raises(ValueError, match="a number must be the same for all"),
    ):
        fp.apply_many(p.net, p.params, p.many, x)


class Mean(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 4)

    def forward(self, x):
        y = self.lin(x)
        return y - y.mean(0, keepdim=True)


def test_a_plan_made_where_values_are_hidden_is_not_kept():
    p, x = population(Mean().double()), zoo.noise(3, 2, 6).double()
    with pytest.warns(PopulationWarning, match="a transform hides the values"):
        torch.func.vmap(lambda x: fp.apply_many(p.net, p.params, p.many, x))(torch.stack([x, x]))
    with pytest.warns(PopulationWarning, match="rows act on each other"):
        out = fp.apply_many(p.net, p.params, p.many, x)
    agree(out, torch.stack([p.net(p.params, a, x[i]) for i, a in enumerate(p.ads)]))
