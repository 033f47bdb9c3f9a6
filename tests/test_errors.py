"""Every ``raise`` has a row: a call, the type, the text. The last test finds those that have none.

A row covers the statement that it makes run, found in its traceback; nothing is declared by hand. A new ``raise`` wants a row
here, or its file an entry in ``ELSEWHERE`` with the test file that has its rows.
"""

import ast
import dataclasses
import functools
import json
import re
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

from funcpeft import errors, testing
from funcpeft.adapt import adapt
from funcpeft.context import Context
from funcpeft.facts import ModelFacts
from funcpeft.functional import functionalize
from funcpeft.interop.libraries import BitsAndBytes
from funcpeft.interop.library import Library, require_sound
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.layers import Kind
from funcpeft.merging import MergeReport
from funcpeft.method import Additive, Method
from funcpeft.methods import IA3, OFT, AdaLoRA, DoRA, Full, HiRA, LoKr, LoRA, MiSS, PrefixTuning, RoAd, SHiRA, TrainableTokens
from funcpeft.quant import NF4, Codebook, Dense, Int8
from funcpeft.quant.format import Format
from funcpeft.quantization import quantize
from funcpeft.stacking import select, stack, unstack
from funcpeft.tree import Adapter, tree_map
from funcpeft.weights import dense

ROOT = Path(__file__).parents[1]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down, self.scale = (
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 6, bias=False),
            nn.Parameter(torch.tensor(2.0)),
        )
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.scale * self.down(torch.tanh(self.norm(self.up(x))))


@functools.cache
def made():
    torch.manual_seed(0)
    return functionalize(Mlp())


X = torch.ones(2, 8)
UP = LoRA(r=2, target_modules=["up"])


def model():
    return made()[0]


def params():
    return made()[1]


@functools.cache
def net(*given):
    return adapt(model(), list(given) if given else UP)


def adapter():
    return net().init(params(), 0)


def up(**fields):
    return lambda: adapt(model(), LoRA(**{"r": 2, "target_modules": ["up"], **fields}))


def without(name):
    one = adapter()
    return one.replace(params={p: {n: t for n, t in leaves.items() if n != name} for p, leaves in one.params.items()})


def changed(f):
    return adapter().replace(params=tree_map(f, adapter().params))


def facts():
    return ModelFacts(*made())


def in_folder(change, read=True):
    """Returns a call that writes an adapter, changes the folder, and reads it."""

    def call(folder):
        save_peft(net(), adapter(), folder)
        change(folder)
        return load_peft(model(), params(), folder) if read else None

    return call


def config(**fields):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return in_folder(change)


def tensors(change):
    def rewrite(folder):
        found = load_file(folder / "adapter_model.safetensors")
        save_file(change(found), folder / "adapter_model.safetensors")

    return in_folder(rewrite)


def raw(name, text):
    return in_folder(lambda folder: (folder / name).write_text(text))


def base():
    return net().bases(net().entries[0], params())["up"]


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise RuntimeError("no")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(Method):
    kinds = frozenset({"linear", "vector"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class BareSum(Additive):
    def init_site(self, base, gen):
        return {"A": torch.zeros(1)}, {}


class Recurrent(nn.Module):
    """A model whose config says that not every layer is attention."""

    def __init__(self):
        super().__init__()
        self.up, self.config = nn.Linear(2, 2), SimpleNamespace(layer_types=["full_attention", "mamba"])

    def forward(self, x, past_key_values=None):
        return self.up(x)


def read_without_axes(folder):
    hira = net(HiRA(r=1, target_modules=["up"]))
    save_peft(hira, hira.init(params(), 0), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: t.sum() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    load_peft(model(), params(), folder)


def saved_without_head(folder):
    headed, own = functionalize(nn.ModuleDict({"up": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)}))
    plain = adapt(headed, UP)
    save_peft(plain, plain.init(own, 0), folder, task_type="SEQ_CLS")


def ints():
    module = nn.ModuleDict({"up": nn.Linear(2, 2)})
    module["up"].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return functionalize(module)[0]


def read_after_a_call():
    """Keeps a weight's stand-in beyond the call that it stands in for."""
    kept = []

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            kept.append(self.up.weight)
            return self.up(x)

    keeps, own = functionalize(Keeps())
    attached = adapt(keeps, UP)
    attached(own, attached.init(own, 0), X)
    return kept[0] + 1


def traced_unprepared():
    """Runs what a tracer would: a real trace wraps the error in one of its own."""
    fresh, own = functionalize(Mlp())
    with mock.patch.object(torch.compiler, "is_dynamo_compiling", return_value=True):
        fresh({**own, "up.weight": Int8().requant(own["up.weight"])}, X)


N, V, T, K = errors.NoMatchError, ValueError, TypeError, errors.NameMissingError
C, M, F = errors.CheckpointError, errors.NoMergedFormError, FileNotFoundError

C = errors.CheckpointError

ROWS = [
    # choosing sites
    (up(target_modules=["upp"]), N, "lora: every entry of target_modules must match a module, got 'upp'; did you mean 'up'"),
    (up(target_modules="("), V, "lora: target_modules must be a valid regular expression"),
    (up(target_modules=None), V, "lora: target_modules has no default for this model, got model_type None|got model_type ''"),
    (lambda: adapt(model(), TrainableTokens()), V, "trainabletokens: .* no default for this model, got no input embedding"),
    (up(layers_pattern="x"), V, "lora: layers_pattern needs layers_to_transform"),
    (up(target_modules="up", layers_to_transform=1), V, "layers_to_transform needs a list of target_modules, got the string"),
    (up(layers_to_transform=[1]), N, r"every entry of layers_to_transform must be a layer, got 1; layers are \[\]"),
    (
        lambda: adapt(functionalize(nn.Sequential(nn.ReLU()))[0], LoRA(target_modules="all-linear")),
        N,
        "must match a linear layer",
    ),
    (up(exclude_modules=["up"]), N, "lora: target_modules must leave a module to adapt.*see exclude_modules"),
    (up(target_parameters=["u.weight"]), N, "every entry of target_parameters must match a parameter, got 'u.weight'"),
    (up(target_modules=[]), N, "lora: a method must adapt something, got no target"),
    (up(rank_pattern={"dwn": 2}), N, "lora: every key of rank_pattern must name a site, got 'dwn'; known are 'up'"),
    (up(rank_pattern={"(": 2}), V, r"lora: a key of rank_pattern must be a valid regular expression, got '\('"),
    (
        up(target_modules=["norm"]),
        T,
        "lora at 'norm': a target must be one of the kinds .*got a LayerNorm; narrow target_modules",
    ),
    (up(target_parameters=["norm.weight"]), T, "lora at 'norm.weight': .*got vector; narrow target_parameters"),
    (lambda: adapt(model(), Full(target_modules=["relu"])), T, "full at 'relu': a target must have parameters, got ReLU"),
    (lambda: adapt(ints(), UP), T, r"lora at 'up': a base weight must be floating point or Quantized, got torch\.int8"),
    (lambda: adapt(model(), Full(target_parameters=["scale"], target_modules=())), T, "full at 'scale': .*an axis, got a 0-d"),
    (up(bias="lora_only", target_modules=["down"]), N, "lora: bias must find a bias to train, got none; use bias='none'"),
    # nets
    (lambda: adapt(Mlp(), UP), T, r"adapt: a Model is required, got Mlp; call functionalize\(module\) first"),
    (lambda: adapt(model(), []), V, "adapt: a method is required, got an empty list"),
    (lambda: adapt(model(), [LoRA]), T, r"adapt: a method is required, got type; pass an instance such as LoRA\(r=8\)"),
    (lambda: net().init(params(), 1.0), T, "init: seed must be an int, got float"),
    (lambda: net().init(params(), 0, dtype=torch.int8), V, r"init: dtype must be a floating dtype, got torch\.int8"),
    (lambda: net()(adapter(), params(), X), T, "net: params must be a dict of leaves, got Adapter; params come first"),
    (lambda: net()(params(), (adapter(), adapter()), X), T, r"adapter: one Adapter for each of \(LoRA\) is required, got 2"),
    (lambda: net()(params(), Adapter({"dwn": {}}), X), T, "adapter for lora: paths must be the net's sites, got extra 'dwn'"),
    (
        lambda: net()(params(), net(DoRA(r=2, target_modules=["up"])).init(params(), 0), X),
        T,
        "adapter at 'up': leaves must be.*'m'",
    ),
    (lambda: net()(params(), changed(lambda t: t[..., :1]), X), T, r"adapter at 'up': leaf '\w' of lora must have shape"),
    (lambda: net()(params(), stack([adapter()] * 3), X), T, "a stack goes through apply_many or torch.func.vmap"),
    (lambda: net()(params(), without("A"), X), T, r"adapter at 'up': leaf 'A' of lora must have shape .*got only \['B'"),
    (lambda: net()(params(), adapter(), X, context={}), T, "net: context must be a Context, got dict; pass Context"),
    (lambda: net(UP, Full(target_modules=["up"])), V, "full at 'up.weight': must not replace the weight that lora adapts"),
    (lambda: quantize(params(), net().model, NF4()), T, "quantize: a Model is required, got dict; the model comes first"),
    (lambda: net().merge(params(), changed(lambda t: t * torch.nan)), V, "adapter at 'up': leaf 'A' must be finite, got NaN"),
    (
        lambda: net().merge({**params(), "up.weight": params()["up.weight"] / 0}, adapter()),
        V,
        "merge at 'up': the merged weight must",
    ),
    (lambda: prefixed("merge")(), M, "prefixtuning: the method acts on the call and has no merged form; keep it as an adapter"),
    (lambda: prefixed("call")(), V, "net.call: method must be one of 'forward', 'generate', got 'get_input_embeddings'"),
    (lambda: MergeReport({}).worst("size"), KeyError, "MergeReport: column must be one of 'update'.*got 'size'"),
    # methods
    (lambda: UP.rank_pattern.update(a=1), T, "FrozenDict: a method's fields do not change"),
    (lambda: Bare().init_site(base(), None), T, "Bare: a method must define init_site or init"),
    (lambda: Bare().merge({}, base()), M, "bare at 'up': the method has no merged form; keep it as an adapter"),
    (lambda: Bare().unmerge({}, base()), M, "bare at 'up': merging does not invert; keep the base params instead"),
    (lambda: BareSum().delta({}, base()), T, "BareSum: an additive method must define delta"),
    (lambda: LoRA.from_dict({"rr": 8}), T, "LoRA: fields must be known, got 'rr'; did you mean 'r'"),
    (lambda: LoRA(r=0), V, "lora: r must be a positive integer, got 0"),
    (up(r=9, init_lora_weights="pissa"), V, r"lora at 'up': rank must be at most min\(out, in\) = 8, got 9"),
    (lambda: LoRA(init_lora_weights="x"), V, "lora: init_lora_weights must be one of True, False, 'gaussian'.*got 'x'"),
    (
        lambda: IA3(target_modules=["up"]).unmerge({"l": torch.zeros(8)}, base()),
        M,
        "ia3 at 'up': unmerging divides by l, got an l with a zero",
    ),
    (lambda: LoKr(init_weights="x"), V, "lokr: init_weights must be one of True, False, 'lycoris', got 'x'"),
    (lambda: MiSS(init_weights="x"), V, "miss: init_weights must be one of .*got 'x'"),
    (
        lambda: OFT(r=2, oft_block_size=2),
        V,
        "oft: exactly one of r and oft_block_size must be nonzero, got r=2, oft_block_size=2",
    ),
    (lambda: RoAd(variant="x"), V, "road: variant must be one of 'road_1', 'road_2', 'road_4', got 'x'"),
    (
        lambda: net(SHiRA(r=1, target_modules=["up"])).init(params(), 0, masks={"dn": torch.ones(8, 8) > 0}),
        K,
        "shira: masks must be of sites, got 'dn'",
    ),
    (
        lambda: adapt(zoo.functional("llama")[0], TrainableTokens(token_indices=[99])),
        IndexError,
        "token_indices must be below 96, got 99",
    ),
    # calls
    (lambda: Context(values=[1]), TypeError, "context: values must be a mapping of tensors, got list"),
    (lambda: Context(values={"tasks": [1]}), TypeError, "context: value 'tasks' must be a tensor, got list"),
    (lambda: Context().value("tasks"), ValueError, "the call needs the value 'tasks', got none; pass context=Context"),
    (lambda: net()(params(), adapter(), X, context=Context(values={"tasks": X})), ValueError, "that the net's methods read"),
    (lambda: net().init(params(), 0, gradient={}), TypeError, "beyond the base, got 'gradient'"),
    (lambda: Context(training=True), V, "context: training needs a seed, got seed=None; pass Context"),
    (lambda: Context(seed=0.5), T, "context: seed must be an int or an integer tensor, got 0.5"),
    (lambda: Context(seed=2**64), V, "context: seed must have at most 64 bits"),
    (
        lambda: Context(training=True, seed=torch.ones(2).long()).dropout(X, 0.5),
        V,
        r"a seed tensor must be 0-d in a call, got shape \(2,\)",
    ),
    (lambda: dense(3), T, "dense: a Tensor, a Quantized or an Adapted is required, got int"),
    (lambda: functionalize(torch.tanh), T, "functionalize: an nn.Module is required, got builtin_function_or_method"),
    (lambda: functionalize(Uncopyable()), T, r"functionalize\(Uncopyable\): the module must be copyable, got RuntimeError: no"),
    (
        lambda: functionalize(nn.Linear(2, 2, device="meta")),
        V,
        "functionalize at 'weight': every tensor must hold data, got a meta tensor",
    ),
    (
        lambda: model().call("forwrd", params(), X),
        K,
        "Mlp: the module must have the method, got 'forwrd'; did you mean 'forward'",
    ),
    (lambda: model().embed(params(), X), T, "Mlp: the module must have get_input_embeddings; use a transformers model"),
    (
        lambda: model().site("up.wight"),
        K,
        "Mlp: a site must be a parameter of the model, got 'up.wight'; did you mean 'up.weight'",
    ),
    (lambda: model()({**params(), "up.wight": X}, X), K, "Mlp: params must hold the model's leaves only, got 'up.wight'"),
    (lambda: model()({}, X), K, "Mlp: params must hold every leaf, got none for 'down.weight'"),
    (lambda: model()(None, X), T, "Mlp: params must be a dict of leaves, got NoneType"),
    (
        lambda: model()({**params(), "up.weight": "x"}, X),
        T,
        r"params\['up.weight'\]: a leaf must be a tensor or a weight expression, got str",
    ),
    (lambda: model()({**params(), "up.bias": X}, X), V, r"params\['up.bias'\]: shape must be \(8,\), got \(2, 8\)"),
    (traced_unprepared, RuntimeError, "Mlp: what a trace needs must be made before it; call net.init or model.prepare"),
    (read_after_a_call, AttributeError, "the weight at 'up': it can be read during a call only"),
    (lambda: facts().num_layers, V, r"Mlp: the config must say the number of layers \(one of num_hidden_layers"),
    (lambda: facts().check_cache(), V, "Mlp: key-value prefixes need a forward that takes past_key_values; use PromptTuning"),
    (lambda: ModelFacts(*functionalize(Recurrent())).check_cache(), V, "need plain attention in every layer, got 'mamba'"),
    (lambda: adapter().replace(parms={}), T, r"Adapter.replace: fields are params, consts and rank_axes, got \['parms'\]"),
    (lambda: net()(params(), None, X), T, "adapter: an Adapter or a tuple of them is required, got NoneType"),
    # populations
    (lambda: net().members([adapter()]), T, "adapters: a stack is required, got a list; stack them with fp.stack"),
    (lambda: net().members(adapter()), V, "adapters: a stack is required, got leaves of unequal leading axes"),
    (lambda: select(stack([adapter()] * 3), [0, 3]), V, r"select: positions must be in \[0, 3\), got \[3\]"),
    (lambda: select(stack([adapter()] * 3), []), V, r"select: positions must be in \[0, 3\), got none"),
    (lambda: stack([]), V, "stack: a list of at least one adapter is required, got an empty list"),
    (lambda: stack([(adapter(),), (adapter(), adapter())]), T, r"stack: every member must have as many adapters, got \[1, 2\]"),
    (lambda: stack([adapter(), Adapter({"x": {}})]), T, "stack: every member must have the same paths and leaves"),
    (lambda: stack([adapter(), changed(torch.Tensor.double)]), T, "stack at 'up': leaf 'A' must have one dtype"),
    (
        lambda: stack([leaf(2), leaf(3)]),
        V,
        r"stack at 's': leaf 'v' must have one shape, it has no rank axis, got \[\(2,\), \(3,\)\]",
    ),
    (lambda: stack([leaf(2, 4, axis=-2), leaf(2, 5, axis=-2)]), V, "stack at 's': leaf 'v' may differ along its rank only"),
    (
        lambda: unstack(adapter()),
        V,
        r"unstack: every leaf must have the same leading axis, got sizes \[0, 2, 8\]; make it with stack",
    ),
    # formats
    (
        lambda: quantize(model(), params(), "nf4"),
        T,
        r"quantize: a format is required, got str; pass an instance such as NF4\(\)",
    ),
    (
        lambda: quantize(model(), params(), NF4(), target_modules=["norm"]),
        T,
        "quantize at 'norm': a layer with a matrix is required",
    ),
    (lambda: quantize(model(), quantize(model(), params(), NF4()), NF4()), T, "quantize at 'up': a dense weight is required"),
    (
        lambda: quantize(model(), {**params(), "up.weight": params()["up.weight"] / 0}, NF4()),
        V,
        "quantize at 'up': nf4: a weight that is finite",
    ),
    (lambda: NF4(block_size=3), V, "nf4: block_size must be even and positive, got 3"),
    (lambda: NF4().requant(torch.ones(2, 2).int()), T, r"nf4: a floating weight is required, got torch\.int32"),
    (lambda: Int8().requant(torch.ones(2)), V, r"int8: a weight with rows is required, got \(2,\); leave the weight dense"),
    (lambda: NF4().requant(X / 0), V, "nf4: a weight that is finite in float32 is required, got NaN or infinity"),
    (lambda: Format().encode(X), T, "format: a format must define encode"),
    (lambda: Format().decode(None), T, "format: a format must define decode"),
    (lambda: Format().step(None), T, "format: a format must define step"),
    (lambda: Format().encode_like(X, None), T, "format: a format must define encode_like"),
    (lambda: NF4().grid(None), T, "nf4: an affine grid is required; use Int8 or AffineInt"),
    (lambda: NF4.from_dict({"block": 3}), T, "NF4: fields must be known, got 'block'; did you mean 'block_size'"),
    (
        lambda: Codebook().requant(X),
        errors.CannotRequantizeError,
        "codebook: cannot be made from a weight: .* keep the weight dense, or store it as NF4",
    ),
    (lambda: NF4().requant(X, like=Int8().requant(X)), T, r"nf4: like must be stored as NF4\(\), got Int8\(\)"),
    (lambda: Int8().requant(X, like=Int8().requant(X.T)), V, r"int8: the weight must have like's shape \(8, 2\), got \(2, 8\)"),
    (
        lambda: adapt(model(), LoRA(r=2, init_lora_weights="loftq", target_modules=["up"])).init(params(), 0),
        V,
        "lora at 'up': init 'loftq' needs the dense weight that was quantized; call net.init",
    ),
    # libraries
    (lambda: Library().take(None, "up", X.dtype, {}), T, ": this library has no layers in memory"),
    (lambda: Library().read({}, "up", X.shape, X.dtype, {}, None), T, ": this library has no checkpoints"),
    (lambda: Library().write(None, "up"), T, ": this library has no writer"),
    (lambda: Library().config({}, ()), T, ": this library has no writer"),
    (lambda: Dense(storage="float16").requant(X * 1e5), V, "dense: a weight within the format's range is required"),
    (
        lambda: require_sound(dataclasses.replace(Int8().requant(X), data={"qdata": X.char(), "scale": X[:, 0] / 0}), "here"),
        C,
        "here: scale must be finite, got NaN",
    ),
    (
        lambda: require_sound(dataclasses.replace(Int8().requant(X), data={"qdata": X.char(), "scale": X[0]}), "here"),
        C,
        r"here: the tensors must decode to \(2, 8\), got",
    ),
    (lambda: BitsAndBytes().pick({"b": X}, "up", "a"), C, r"bitsandbytes at 'up': tensor 'a' is required, got \['b'\]"),
    (lambda: BitsAndBytes().pick({"a": X}, "up", "a", (3,)), C, r"'a' must have shape \(3,\), got \(2, 8\)"),
    (lambda: BitsAndBytes().pick({"a": X}, "up", "a", None, (torch.int8,)), C, "'a' must be int8, got float32"),
    (lambda: BitsAndBytes().pick({"a": X / 0}, "up", "a", None, (X.dtype,)), C, "'a' must be finite, got NaN or infinity"),
    (lambda: BitsAndBytes().require_fit(Int8(), "up", torch.Size((4,))), C, r"bitsandbytes at 'up': a weight with rows is req"),
    (
        lambda: BitsAndBytes().same({"up": NF4().requant(X), "down": Int8().requant(X)}, lambda q: str(q.format)),
        V,
        r"bitsandbytes at 'down': must be stored as 'up' is, .* NF4\(\), got Int8\(\)",
    ),
    # files
    (
        in_folder(lambda f: (f / "adapter_model.safetensors").unlink()),
        F,
        r"adapter_model.safetensors must be there, got \['adapter_config",
    ),
    (read_without_axes, C, "adapter_model.safetensors: tensors must have the axes of hira, got fewer"),
    (
        lambda: load_peft(model(), params(), "no/such/folder"),
        F,
        r"load_peft\('no/such/folder'\): an existing directory or a hub id",
    ),
    (raw("adapter_config.json", "{"), C, "adapter_config.json: an adapter config must be JSON"),
    (
        raw("adapter_config.json", "[]"),
        C,
        "adapter_config.json: an adapter config must be an object with a peft_type, got list",
    ),
    (config(task_type="CHAT"), C, "adapter_config.json: task_type must be one of 'SEQ_CLS'.*got 'CHAT'"),
    (
        config(peft_type="LORAX"),
        C,
        "adapter_config.json: peft_type must be a registered method, got 'LORAX'; did you mean 'LORA'",
    ),
    (
        config(megatron_config={"x": 1}),
        C,
        r"LoRA must know every field that is not at its default, got megatron_config=\{'x': 1\}",
    ),
    (
        lambda: adapt(model(), LoRA(target_modules=["up"], layer_replication=[[0, 1]])),
        V,
        r"layer_replication=\[\[0, 1\]\] needs a model with these layers; functionalize\(replicate_layers",
    ),
    (lambda: facts().head(X), V, "the model must have a language model's head"),
    (lambda: facts().classifier(), V, "the model must have a linear head 'score' or 'classifier'"),
    (
        lambda: adapt(functionalize(nn.ParameterDict({"w": torch.empty(0, 3)}))[0], LoRA(target_parameters=["w"])),
        V,
        r"lora at 'w': a base weight must have entries, got shape \(0, 3\); leave it out with exclude_modules",
    ),
    (
        lambda: AdaLoRA(total_step=9, init_r=12).pruned(Adapter({"up": {"E": torch.ones(2, 3, 1)}}), {}),
        V,
        "adalora: members are pruned apart, as their ranks differ, got a stack at 'up'; unstack the adapter and the state",
    ),
    (
        lambda: net(SHiRA(r=1, target_modules=["up"])).init(params(), 0, masks=[X]),
        T,
        "shira: masks must be a dict from paths to masks, got list",
    ),
    (config(r=2**62), C, "the config of lora must give tensors of possible sizes"),
    (config(r=-1), C, "the fields must make a LoRA, got lora: r must be a positive integer, got -1"),
    (
        raw("adapter_model.safetensors", "x"),
        C,
        "adapter_model.safetensors: a whole safetensors file is required.*corrupt or truncated",
    ),
    (
        tensors(lambda t: {k: v * torch.nan for k, v in t.items()}),
        C,
        "every tensor must be finite, got NaN or infinity in 'base_model",
    ),
    (
        tensors(lambda t: {"x": X}),
        C,
        "the tensors must be those of the config's sites in this model, got missing 'base_model.*; extra 'base",
    ),
    (
        tensors(lambda t: {**t, "base_model.model.up.base_layer.weight": X}),
        C,
        "the file's base weight must be this model's, got another one",
    ),
    (
        lambda folder: save_peft(net(), adapter(), folder, task_type="CHAT"),
        V,
        "save_peft: task_type must be one of .*got 'CHAT'",
    ),
    (
        saved_without_head,
        V,
        r"save_peft: peft's SEQ_CLS files hold the head 'classifier', so it must be in modules_to_save, got \[\]",
    ),
    (lambda folder: save_peft(net(), adapter(), Path(__file__)), V, "save_peft: path must be a directory, got the file"),
    (
        lambda folder: save_peft(net(UP, UP), net(UP, UP).init(params(), 0), folder),
        V,
        "save_peft: a net with one method that peft has",
    ),
    (
        lambda folder: save_peft(net(), stack([adapter()] * 2), folder),
        T,
        r"adapter at 'up': leaf 'A' of lora must have shape .*got \(2, .*take one of unstack\(adapter\)",
    ),
    (
        lambda folder: saved_tokens(folder),
        V,
        r"save_peft of trainabletokens: peft has no field 'exclude_modules', got \('lm_head',\)",
    ),
    # the conformance suite
    (lambda: testing.check_law(UP, "mrge"), K, "check_law: law must exist, got 'mrge'; did you mean 'merge'"),
]


def leaf(*shape, axis=None):
    return Adapter({"s": {"v": torch.zeros(shape)}}, {}, () if axis is None else (("v", axis),))


def prefixed(what):
    llama, own = zoo.functional("llama")
    prefixed = adapt(llama, PrefixTuning(num_virtual_tokens=2))
    made = prefixed.init(own, 0)
    return {
        "merge": lambda: prefixed.merge(own, made),
        "call": lambda: prefixed.call("get_input_embeddings", own, made),
    }[what]


def saved_tokens(folder):
    llama, own = zoo.functional("llama")
    tokens = adapt(llama, TrainableTokens(token_indices=[1], exclude_modules=["lm_head"]))
    save_peft(tokens, tokens.init(own, 0), folder)


def run(call, folder):
    """Makes the call of a row; those that take a folder get one."""
    wants = call.__code__.co_argcount if hasattr(call, "__code__") else 0
    return call(folder) if wants else call()


@pytest.mark.parametrize(("call", "kind", "text"), ROWS, ids=[re.sub(r"\W+", " ", r[2])[:60].strip() for r in ROWS])
def test_a_mistake_is_explained(call, kind, text, tmp_path):
    with pytest.raises(kind) as caught:
        run(call, tmp_path)
    found = str(caught.value)
    assert type(caught.value) is kind
    assert re.search(text, found), found
    if kind is not KeyError:  # which prints its message in quotes
        assert found.endswith((".", "?")), found


# -- every raise -------------------------------------------------------------------------------------------------------------

#: Files whose rows are in another test file.
ELSEWHERE = {
    "optim.py": "test_optim.py",
    "transforms.py": "test_optim.py",
    "schedules.py": "test_optim.py",
    "replication.py": "test_tied_layers.py",
    "families.py": "test_methods_shared.py",
    "gradients.py": "test_gradients.py",
    "remat.py": "test_remat.py",
    "train.py": "test_train.py",
    "result.py": "test_train.py",
    "batches.py": "test_train.py",
    "checkpoint.py": "test_train.py",
    "resuming.py": "test_train.py",
    "kbit.py": "test_kbit.py",
    "perexample.py": "test_perexample.py",
    "factors.py": "test_perexample.py",
    "population.py": "test_inputs.py",
    "routing.py": "test_inputs.py",
    "probe.py": "test_probe.py",
    "inputs.py": "test_inputs.py",
    "fold.py": "test_units.py",
    "units.py": "test_units.py",
    "blocks.py": "test_blocks.py",
    "interop/trainer.py": "test_to_module.py",
    "demo.py": "test_demo.py",
    "cli.py": "test_demo.py",
    "data/train_base.py": "test_demo.py",
    "mirrors.py": "test_methods_shadow.py",
    "lorainits.py": "test_methods_lora_inits.py",
    "statistics.py": "test_statistics.py",
    "methods/adamss.py": "test_methods_adamss.py",
    "methods/alora.py": "test_methods_alora.py",
    "methods/arrow.py": "test_methods_arrow.py",
    "methods/deft.py": "test_methods_rotations.py",
    "methods/hira.py": "test_methods_rotations.py",
    "methods/lora.py": "test_methods_lora_inits.py",
    "methods/poly.py": "test_methods_poly.py",
    "methods/psoft.py": "test_methods_rotations.py",
    "methods/xlora.py": "test_methods_xlora.py",
    "methods/beft.py": "test_methods_c3a_to_waveft.py",
    "methods/c3a.py": "test_methods_c3a_to_waveft.py",
    "methods/glora.py": "test_methods_c3a_to_waveft.py",
    "methods/peanut.py": "test_methods_peanut.py",
    "methods/prompttuning.py": "test_prompts.py",
    "methods/pvera.py": "test_methods_shared.py",
    "methods/randlora.py": "test_methods_shared.py",
    "methods/shadow.py": "test_methods_shadow.py",
    "methods/tinylora.py": "test_methods_shared.py",
    "methods/waveft.py": "test_methods_c3a_to_waveft.py",
    "methods/bdlora.py": "test_methods_lora_variants.py",
    "methods/kasa.py": "test_methods_lora_variants.py",
    "methods/monteclora.py": "test_methods_lora_variants.py",
    "methods/qalora.py": "test_methods_lora_variants.py",
    "methods/velora.py": "test_methods_lora_variants.py",
    "methods/prefixtuning.py": "test_prompts.py",
    "testing/laws.py": "test_laws_bite.py",
    "testing/conformance.py": "test_format_laws_bite.py",
    "quantization.py": "test_quant.py",
    "merging.py": "test_quantized_merging.py",
    "loftq.py": "test_quantized_merging.py",
    "quant/affineint.py": "test_quant_affine.py",
    "quant/packing.py": "test_quant_affine.py",
    "quant/minifloat.py": "test_quant_floats.py",
    "quant/codebook.py": "test_quant_tables.py",
    "interop/options.py": "test_options.py",
    "interop/files.py": "test_interop_transformers.py",
    "interop/transformers.py": "test_interop_transformers.py",
    "interop/writing.py": "test_interop_transformers.py",
    "interop/libraries/aqlm.py": "test_interop_checkpoints.py",
    "interop/libraries/awq.py": "test_interop_checkpoints.py",
    "interop/libraries/bitnet.py": "test_interop_checkpoints.py",
    "interop/libraries/bitsandbytes.py": "test_interop_bitsandbytes.py",
    "interop/libraries/compressed.py": "test_interop_checkpoints.py",
    "interop/libraries/eetq.py": "test_interop_checkpoints.py",
    "interop/libraries/finefp8.py": "test_interop_checkpoints.py",
    "interop/libraries/gptq.py": "test_interop_checkpoints.py",
    "interop/libraries/hqq.py": "test_interop_hqq_quanto.py",
    "interop/libraries/inc.py": "test_interop_checkpoints.py",
    "interop/libraries/quanto.py": "test_interop_hqq_quanto.py",
    "interop/libraries/torchao.py": "test_interop_torchao.py",
    "testing/cases.py": "test_laws_bite.py",
    "testing/strategies.py": "test_laws_bite.py",
}

#: Statements without a row, by file and function, and why.
WITHOUT = {
    ("layers.py", "Kind.matrix"): "a contract that every kind meets, test_kinds_say_what_they_are",
    ("layers.py", "Kind.stored"): "as above",
    ("layers.py", "Kind.product"): "as above",
    ("layers.py", "Kind.map"): "as above",
    ("layers.py", "Kind.adjoint"): "as above",
    ("standins.py", "StandIn.__getattr__"): "Python's protocol of missing attributes, not a message for users",
    ("standins.py", "_kept"): "of a layer that its model casts in the call, test_adapt.py",
    ("__main__.py", "<module>"): "the exit code of the command",
    ("interop/pefttensors.py", "_filled"): "of copies that sites share, test_methods_lily.py",
    ("entries.py", "_token_entries"): "of a tie's two ends, test_tied_layers.py",
    ("interop/peft.py", "_require_one_name"): "of a layer under two names, test_tied_layers.py",
    ("interop/pefttensors.py", "buffers_of"): "of modules saved whole, test_interop_peft.py",
    ("interop/pefttensors.py", "_require_those_of"): "of ties that peft does not make, test_tied_layers.py",
    ("interop/pefttensors.py", "_leaves_of"): "of places that a file holds, test_fields.py",
    ("interop/pefttensors.py", "_require_equal"): "of a tied weight's two modules, test_tied_layers.py",
}


def test_kinds_say_what_they_are():
    @dataclasses.dataclass(frozen=True)
    class Odd(Kind):
        name = "odd"

    for call, text in (
        (lambda: Odd().matrix(X), "odd: a kind must say how its weight becomes a matrix"),
        (lambda: Odd().stored(X, X.shape), "odd: a kind must say how a matrix becomes its weight"),
        (lambda: Odd().product(X, X, None), "odd: a weight of this kind is read by its module and never meets an input"),
        (lambda: Odd().adjoint(X, X), "odd: a kind with has_adjoint must say how its transposed weight meets an output"),
        (lambda: Odd().map(X, X, X.shape), "odd: a weight of this kind is read by its module and never meets an input"),
    ):
        with pytest.raises(TypeError, match=text):
            call()


def raises_of(path):
    """Yields ``(first line, last line, qualified function name)`` of every ``raise`` that makes an exception."""

    def walk(node, names):
        for child in ast.iter_child_nodes(node):
            inner = [*names, child.name] if isinstance(child, ast.FunctionDef | ast.ClassDef) else names
            if isinstance(child, ast.Raise) and child.exc is not None:
                yield child.lineno, child.end_lineno, ".".join(names) or "<module>"
            yield from walk(child, inner)

    return list(walk(ast.parse(path.read_text()), []))


def lines_of(error):
    """Yields ``(file, line)`` of every frame of the package, in the errors that led to this one too."""
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT / "funcpeft"):
                yield str(path.relative_to(ROOT / "funcpeft")), frame.lineno
        error = error.__cause__ or error.__context__


def test_every_raise_has_a_row(tmp_path):
    reached = set()
    for i, (call, kind, _) in enumerate(ROWS):
        (tmp_path / str(i)).mkdir()
        try:
            run(call, tmp_path / str(i))
        except kind as e:
            reached |= set(lines_of(e))
    bare, unused = [], {*WITHOUT}
    for path in sorted((ROOT / "funcpeft").rglob("*.py")):
        name = str(path.relative_to(ROOT / "funcpeft"))
        for first, last, function in raises_of(path):
            if name in ELSEWHERE or any((name, line) in reached for line in range(first, last + 1)):
                continue
            unused.discard((name, function))
            if (name, function) not in WITHOUT:
                bare.append(f"{name}:{first} in {function}")
    assert not bare, f"no row makes these run: {bare}"
    assert not unused, f"no such statement any more: {unused}"


def test_the_other_test_files_have_rows():
    for name, test in ELSEWHERE.items():
        assert (ROOT / "funcpeft" / name).exists(), name
        assert "raises(" in (ROOT / "tests" / test).read_text(), test


# -- messages ----------------------------------------------------------------------------------------------------------------


def test_the_words_of_a_message():
    assert errors.say("lora at 'x'", "r must be positive", 0, "use 1") == "lora at 'x': r must be positive, got 0; use 1."
    assert errors.say("lora", "no") == "lora: no."
    assert errors.listed(range(10), 2) == "0, 1 and 8 more"
    assert errors.listed(["a"]) == "'a'"
    assert errors.nearest("q_prj", ["model.q_proj", "k_proj"]) == "did you mean 'k_proj' or 'q_proj'?"
    assert errors.nearest("zzz", ["b", "a"]) == "known are 'a', 'b'"
    assert errors.one_of("x", "f", 3, [1, 2]) == "x: f must be one of 1, 2, got 3."
    assert errors.divisors(12) == "1, 2, 3, 4, 6, 12"
    assert errors.divisors(5040, 3) == "1, 2, 3, ..."


def test_kinds_of_error_are_those_of_python_too():
    assert issubclass(errors.NoMatchError, ValueError)
    assert issubclass(errors.CheckpointError, ValueError)
    assert issubclass(errors.NoMergedFormError, ValueError)
    assert issubclass(errors.NameMissingError, KeyError)
    assert str(errors.NameMissingError("plain")) == "plain"
    assert str(errors.NameMissingError()) == ""
