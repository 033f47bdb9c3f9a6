"""An adapter as the parameters of a module: torch's optimizers, Accelerate, and transformers' Trainer, saves included."""

import copy
import inspect
import json

import peft
import pytest
import safetensors.torch
import torch
import zoo
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from funcpeft import optim
from funcpeft.adapt import adapt
from funcpeft.context import Context
from funcpeft.functional import functionalize
from funcpeft.gradients import value_and_grad
from funcpeft.interop.peft import load_peft
from funcpeft.interop.trainer import AdapterModule, _names, to_module
from funcpeft.kbit import prepare_kbit
from funcpeft.methods import FourierFT, LoRA, PrefixTuning, PromptTuning, VeRA
from funcpeft.quant import NF4, Int8
from funcpeft.quantization import quantize, to
from funcpeft.stacking import stack
from funcpeft.storage import Quantized
from funcpeft.tree import Adapter, as_tuple, tree_leaves, tree_map

IDS = zoo.ids(8, 6)
DATA = [{"input_ids": row, "labels": row} for row in IDS]
LORA = LoRA(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])


def made(method=LORA, name="llama", params=None, **options):
    """Returns ``(net, params, adapter, module)``, the adapter moved away from init."""
    model, own = zoo.functional(name)
    params = own if params is None else params
    net = adapt(model, method)
    gen = torch.Generator().manual_seed(7)
    init = net.init(params, seed=0)
    moved = tree_map(lambda t: t + 0.02 * torch.randn(t.shape, generator=gen).to(t.dtype), [a.params for a in as_tuple(init)])
    adapter = tuple(a.replace(params=p) for a, p in zip(as_tuple(init), moved, strict=True))
    adapter = adapter if isinstance(init, tuple) else adapter[0]
    return net, params, adapter, to_module(net, params, adapter, **options)


def same(a, b):
    """Whether two adapters are bitwise equal, form included."""
    if isinstance(a, tuple) != isinstance(b, tuple) or len(as_tuple(a)) != len(as_tuple(b)):
        return False
    pairs = zip(as_tuple(a), as_tuple(b), strict=True)
    return all(
        x.rank_axes == y.rank_axes
        and all(
            s.keys() == t.keys()
            and all(s[p].keys() == t[p].keys() and all(torch.equal(s[p][n], t[p][n]) for n in s[p]) for p in s)
            for s, t in ((x.params, y.params), (x.consts, y.consts))
        )
        for x, y in pairs
    )


# -- what a module is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        LORA,
        [LORA, LoRA(r=2, target_modules=["q_proj"])],
        VeRA(r=4, target_modules=["q_proj"]),
        LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        PromptTuning(num_virtual_tokens=3),
        PrefixTuning(num_virtual_tokens=2),
        FourierFT(n_frequency=9, target_modules=["down_proj"]),
    ],
    ids=["lora", "two", "vera", "saved", "prompt", "prefix", "fourier"],
)
def test_a_module_computes_what_the_net_does(method):
    net, params, adapter, module = made(method)
    module.eval()
    assert same(module.adapter, adapter)
    inputs = {"input_ids": IDS[:2], "labels": IDS[:2]}
    expected = value_and_grad(lambda a: net(params, a, **inputs).loss)(adapter)
    out = module(**inputs)
    assert torch.equal(out.logits, net(params, adapter, **inputs).logits)
    out.loss.backward()
    assert torch.equal(out.loss, expected[0])
    trees = expected[1] if isinstance(expected[1], tuple) else (expected[1],)
    grads = dict(module.leaves.named_parameters())
    assert len(grads) == len(tree_leaves(trees)), "one parameter per trained leaf"
    for name, (position, path, leaf) in module._names.items():
        assert torch.allclose(grads[name].grad, trees[position][path][leaf], rtol=1e-6, atol=1e-9), name


def test_names_are_readable_stable_and_unique():
    _, _, _, one = made()
    _, _, _, two = made([LORA, LoRA(r=2, target_modules=["q_proj"])])
    assert "leaves.model.layers.0.self_attn.q_proj.A" in dict(one.named_parameters())
    assert "leaves.1.model.layers.1.self_attn.q_proj.B" in dict(two.named_parameters())
    assert list(made()[3].state_dict()) == list(one.state_dict())
    assert set(one.state_dict()) == {"step", *dict(one.named_parameters())}
    assert all(p.requires_grad and p.is_leaf for p in one.parameters())


class Odd(nn.Module):
    """Modules that are called what leaves are, one inside another."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.lin.A = nn.Linear(4, 4)
        self.lin.A.B = nn.Linear(4, 4)

    def forward(self, x):
        return self.lin.A.B(self.lin.A(self.lin(x)))


def test_a_leaf_that_is_called_like_a_module():
    torch.manual_seed(0)
    model, params = functionalize(Odd())
    net = adapt(model, LoRA(r=2, target_modules=["lin", "lin.A", "lin.A.B"]))
    adapter = net.init(params, seed=0)
    module = to_module(net, params, adapter)
    assert {"leaves.lin.A_", "leaves.lin.B", "leaves.lin.A.A", "leaves.lin.A.B_", "leaves.lin.A.B.A", "leaves.lin.A.B.B"} == {
        name for name, _ in module.named_parameters()
    }
    assert same(module.adapter, adapter)
    again = to_module(net, params, net.init(params, seed=1))
    again.load_state_dict(module.state_dict())
    assert same(again.adapter, adapter)


def test_a_leaf_that_is_called_like_an_attribute_of_modules():
    odd = Adapter({"layer": {"type": torch.ones(1), "A": torch.ones(1)}})
    assert list(_names((odd,), several=False)) == ["layer.type_", "layer.A"]
    assert list(_names((odd, odd), several=True))[-1] == "1.layer.A"


def test_nothing_of_the_caller_is_written_or_handed_out():
    _, params, adapter, module = made()
    before = tree_map(torch.clone, adapter), {k: v.clone() for k, v in params.items()}
    taken = module.adapter
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert same(adapter, before[0])
    assert all(torch.equal(params[k], v) for k, v in before[1].items())
    assert same(taken, adapter), "what was read back does not follow"
    assert not same(module.adapter, adapter)
    assert not any(t.requires_grad for t in tree_leaves(module.adapter))
    tree_map(torch.zero_, [a.params for a in as_tuple(module.adapter)])
    assert any(p.abs().max() > 0 for p in module.parameters())


def test_the_base_is_no_state_and_shares_storage():
    _, params, _, module = made()
    assert [n for n, _ in module.named_buffers()] == ["step"]
    assert all(module.params[k] is v for k, v in params.items())
    twin = copy.deepcopy(module)
    assert all(twin.params[k] is v for k, v in params.items())
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not same(twin.adapter, module.adapter)
    assert same(copy.deepcopy(module).adapter, module.adapter)


def test_dtypes_and_devices_move_the_base_and_leave_codes():
    model, params = zoo.functional("llama")
    stored = quantize(model, params, {"q_proj": Int8(), ".*": NF4(block_size=16)}, progress=False)
    _, _, _, module = made(params=stored)
    kept = {k: v for k, v in module.params.items() if isinstance(v, Quantized)}
    assert module.bfloat16() is module
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    for key, leaf in module.params.items():
        assert leaf.dtype == torch.bfloat16
        if key in kept:
            assert all(leaf.data[n] is t for n, t in kept[key].data.items()), "codes and scales are the very tensors"
    assert module.step.dtype == torch.int64
    assert module(input_ids=IDS).logits.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for v in stored.values()), "the caller's params are as they were"
    assert module.to("meta").params["lm_head.weight"].is_meta
    assert all(t.is_meta for k in kept for t in module.params[k].data.values())


def test_classes_signatures_and_generation_are_the_models():
    net, params, adapter, module = made()
    assert isinstance(module, AdapterModule)
    assert isinstance(module, PreTrainedModel)
    assert type(module).__name__ == "LlamaForCausalLM"
    assert type(module) is type(made()[3])
    wanted = inspect.signature(type(zoo.model("llama")).forward)
    assert inspect.signature(type(module).forward) == wanted
    assert module.config is not net.model.config
    assert module.config.to_dict() == net.model.config.to_dict()
    expected = net.call("generate", params, adapter, input_ids=IDS[:2], max_new_tokens=3)
    assert torch.equal(module.generate(input_ids=IDS[:2], max_new_tokens=3), expected)
    assert repr(net) in repr(module)

    model, plain = functionalize(nn.Sequential(nn.Linear(4, 3)))
    net = adapt(model, LoRA(r=2, target_modules=["0"]))
    other = to_module(net, plain, net.init(plain, seed=0))
    assert not isinstance(other, PreTrainedModel)
    assert not hasattr(other, "generate")
    assert other.config is None


def test_use_cache_of_the_config_is_heard():
    net, _, _, module = made()
    assert module(input_ids=IDS).past_key_values is not None
    module.config.use_cache = False
    assert module(input_ids=IDS).past_key_values is None
    assert module(input_ids=IDS, use_cache=True).past_key_values is not None
    assert net.model.config.use_cache, "the model's own config is not touched"


# -- draws ---------------------------------------------------------------------------------------------------------------------

DROPPED = LoRA(r=4, target_modules=["q_proj"], lora_dropout=0.5)


def test_draws_follow_seed_and_step():
    net, params, adapter, module = made(DROPPED, seed=3)
    context = module.context
    first, second = module(input_ids=IDS).logits, module(input_ids=IDS).logits
    assert int(module.step) == 2
    assert not torch.equal(first, second)
    assert torch.equal(first, net(params, adapter, input_ids=IDS, context=context).logits)
    assert int(context.seed) == 0, "a context that was read keeps its step"
    module.eval()
    assert torch.equal(module(input_ids=IDS).logits, net(params, adapter, input_ids=IDS).logits)
    assert int(module.step) == 2, "an evaluation is no step"

    again = to_module(net, params, adapter, seed=3)
    again.load_state_dict({**module.state_dict(), "step": torch.tensor(1)})
    assert torch.equal(again(input_ids=IDS).logits, second), "resuming replays"
    others = [to_module(net, params, adapter, seed=s)(input_ids=IDS).logits.detach() for s in (-1, 2**32 + 3, 4)]
    assert len({float(t.sum()) for t in (first.detach(), *others)}) == 4, "every seed has draws of its own"


# -- optimizers of torch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_torch_optim_equals_a_functional_loop(several):
    method = [LORA, LoRA(r=2, target_modules=["q_proj"])] if several else LORA
    params = zoo.functional("llama")[1]
    wide = to(params, dtype=torch.float64)
    net, _, adapter, module = made(method, params=wide)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    opt = optim.adamw(lr=1e-2, weight_decay=0.1)
    state = opt.init(adapter)

    def loss_fn(a):
        return net(wide, a, input_ids=IDS).logits.square().mean()

    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = module(input_ids=IDS).logits.square().mean()
        loss.backward()
        optimizer.step()
        value, grads = value_and_grad(loss_fn)(adapter)
        adapter, state = opt.update(grads, state, adapter)
        losses.append(float(value))
        assert torch.allclose(loss, value, rtol=1e-12)
    assert losses[-1] < losses[0]
    for a, b in zip(tree_leaves(module.adapter), tree_leaves(adapter), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_accelerate_prepares_and_saves_a_module(tmp_path):
    _, _, adapter, module = made(DROPPED)
    _, _, _, alone = made(DROPPED)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    prepared, optimizer, loader = accelerator.prepare(module, optimizer, torch.utils.data.DataLoader(DATA, batch_size=4))
    other = torch.optim.SGD(alone.parameters(), lr=0.5)
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        other.zero_grad()
        alone(**batch).loss.backward()
        other.step()
    assert same(accelerator.unwrap_model(prepared).adapter, alone.adapter)
    assert not same(alone.adapter, adapter)
    accelerator.save_state(str(tmp_path), safe_serialization=True)
    trained = module.adapter
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    assert same(module.adapter, trained)
    assert int(module.step) == 2


@pytest.fixture
def _fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_mixed_precision_of_accelerate():
    _, _, _, module = made()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(module)
    out = prepared(input_ids=IDS, labels=IDS)
    exact = made()[3](input_ids=IDS)
    assert out.logits.dtype == torch.float32
    error = (out.logits - exact.logits).abs().max() / exact.logits.abs().max()
    assert 0 < error < 32 * torch.finfo(torch.bfloat16).eps
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.slow
def test_compiled_modules_equal_eager():
    _, _, _, module = made(DROPPED)
    _, _, _, compiled = made(DROPPED)
    fast = torch.compile(compiled, backend="aot_eager")
    for _ in range(2):
        a, b = module(input_ids=IDS, labels=IDS, use_cache=False), fast(input_ids=IDS, labels=IDS, use_cache=False)
        assert torch.allclose(a.loss, b.loss, rtol=1e-5)
        a.loss.backward()
        b.loss.backward()
    assert int(compiled.step) == 2
    for p, q in zip(module.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6)


# -- Trainer -------------------------------------------------------------------------------------------------------------------


def arguments(folder, **options):
    plain = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "adamw_torch",
    }
    return TrainingArguments(str(folder), **{**plain, **options})


@pytest.fixture(autouse=True)
def _silent(capsys):
    yield
    capsys.readouterr()  # Trainer prints


@pytest.mark.parametrize("method", [LORA, DROPPED], ids=["lora", "dropout"])
def test_trainer_equals_a_functional_loop(method, tmp_path):
    net, params, adapter, module = made(method, seed=5)
    contexts = made(method, seed=5)[3]
    trainer = Trainer(module, arguments(tmp_path, max_steps=6), train_dataset=DATA)
    assert trainer.label_names == ["labels"]
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] + losses[-2] < losses[0] + losses[1]
    assert int(module.step) == 6

    opt = optim.adamw(lr=1e-2, weight_decay=0.0)
    state = opt.init(adapter)
    for step in range(6):
        contexts.step.fill_(step)
        ids = IDS[4 * (step % 2) :][:4]

        def loss_fn(a, ids=ids, context=contexts.context):
            return net(params, a, input_ids=ids, labels=ids, context=context).loss

        loss, grads = value_and_grad(loss_fn)(adapter)
        assert abs(float(loss) - losses[step]) < 1e-4 * losses[0]
        adapter, state = opt.update(grads, state, adapter)
    for a, b in zip(tree_leaves(module.adapter), tree_leaves(adapter), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_trainer_saves_what_peft_and_load_peft_read_and_resumes(tmp_path):
    net, params, adapter, module = made(DROPPED, task_type="CAUSAL_LM")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = Trainer(module, arguments(tmp_path, **options), train_dataset=DATA, eval_dataset=DATA)
    trainer.train()
    assert {"eval_loss"} < set(trainer.evaluate())
    folder = tmp_path / "checkpoint-4"
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors", "optimizer.pt"} < {
        p.name for p in folder.iterdir()
    }
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == set(module.state_dict())

    again, loaded = load_peft(net.model, params, folder)
    expected = net(params, module.adapter, input_ids=IDS).logits
    assert torch.equal(again(params, loaded, input_ids=IDS).logits, expected)
    oracle = peft.PeftModel.from_pretrained(copy.deepcopy(zoo.model("llama")), folder).eval()
    assert torch.allclose(oracle(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)

    resumed = to_module(net, params, adapter)
    second = Trainer(resumed, arguments(tmp_path / "other", **options), train_dataset=DATA, eval_dataset=DATA)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(resumed.adapter, module.adapter), "dropout included"
    assert int(resumed.step) == 4

    trainer.save_model(str(tmp_path / "final"))
    assert same(load_peft(net.model, params, tmp_path / "final")[1], loaded)


def test_trainer_loads_the_best_checkpoint(tmp_path):
    net, params, adapter, module = made()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    trainer = Trainer(module, arguments(tmp_path, **options, **best), train_dataset=DATA, eval_dataset=DATA)
    trainer.train()
    expected = load_peft(net.model, params, trainer.state.best_model_checkpoint)[1]
    assert same(module.adapter, adapter.replace(params=expected.params))


def test_trainer_on_a_prepared_base_in_bfloat16(tmp_path):
    model, params = zoo.functional("llama")
    stored = quantize(model, to(params, dtype=torch.bfloat16, model=model), NF4(block_size=16), progress=False)
    model, params = prepare_kbit(model, stored, remat=False)
    net = adapt(model, LORA)
    module = to_module(net, params, net.init(params, seed=0))
    trainer = Trainer(module, arguments(tmp_path, max_steps=6, bf16=True, learning_rate=3e-2), train_dataset=DATA)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_net_that_peft_has_no_form_of_is_saved_as_its_state(tmp_path):
    net, params, adapter, module = made([LORA, LoRA(r=2, target_modules=["q_proj"])])
    assert not isinstance(module, PreTrainedModel)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    Trainer(module, arguments(tmp_path, **options), train_dataset=DATA).train()
    assert not (tmp_path / "checkpoint-1" / "adapter_config.json").exists()
    resumed = to_module(net, params, adapter)
    Trainer(resumed, arguments(tmp_path, **options), train_dataset=DATA).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert same(resumed.adapter, module.adapter)
    with pytest.raises(ValueError, match="save_peft: a net with one method that peft has is required"):
        module.save_pretrained(tmp_path / "none")


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "vit"])
def test_other_architectures_save_and_load(name, tmp_path):
    net, params, _, module = made(LoRA(r=2, target_modules=zoo.targets(name)), name)
    inputs = zoo.inputs(name)
    module.eval()
    module.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    module.save_pretrained(tmp_path)
    again, loaded = load_peft(net.model, params, tmp_path)
    out = zoo.leading(again(params, loaded, **inputs))
    assert torch.allclose(out, zoo.leading(module(**inputs)), rtol=1e-5, atol=1e-6)
    zeros = {key: torch.zeros_like(t) for key, t in module.state_dict().items()}
    module.save_pretrained(tmp_path, state_dict=zeros)
    assert not any(t.any() for t in tree_leaves(load_peft(net.model, params, tmp_path)[1].params))


# -- recomputation and arguments -----------------------------------------------------------------------------------------------


def test_checkpointing_recomputes_and_changes_no_value(tmp_path):
    net, _, _, module = made(DROPPED)
    twin = made(DROPPED)[3]
    module.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert module.net.model is not net.model
    assert module.is_activation_checkpointing
    assert module.is_gradient_checkpointing
    for m in (module, twin):
        m(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-8)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True)
    )
    module.activation_checkpointing_disable()
    assert not module.is_activation_checkpointing
    module.gradient_checkpointing_enable()
    module.gradient_checkpointing_disable()
    assert not module.is_gradient_checkpointing
    trainer = Trainer(module, arguments(tmp_path, max_steps=1, activation_checkpointing=True), train_dataset=DATA)
    trainer.train()
    assert module.is_activation_checkpointing


def test_what_is_no_net_or_adapter_is_refused():
    net, params, adapter, module = made()
    with pytest.raises(TypeError, match="to_module: a Net is required, got Model; make it with adapt"):
        to_module(net.model, params, adapter)
    for wrong in (1.0, True, None):
        with pytest.raises(TypeError, match="to_module: seed must be an int, got"):
            to_module(net, params, adapter, seed=wrong)
    with pytest.raises(KeyError, match="params must hold every leaf"):
        to_module(net, {}, adapter)
    with pytest.raises(TypeError, match="must have shape"):
        to_module(net, params, stack([adapter, adapter]))
    with pytest.raises(
        ValueError, match=r"gradient_checkpointing_enable: every layer must be recomputed in place, got every_n"
    ):
        module.gradient_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="every_n_layers=1, offload=True"):
        module.activation_checkpointing_enable(offload=True)
    assert isinstance(module.context, Context)
