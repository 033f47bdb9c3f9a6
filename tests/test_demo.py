"""The demo and the command line: what is printed and written, the errors as a user reads them, the base's training."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from funcpeft import cli, demo, methods
from funcpeft.data import train_base

SMALL = ("--members", "2", "--steps", "3", "--batch", "1", "--tokens", "16", "--no-progress")


def run(capsys, *argv):
    status = cli.main(["demo", *map(str, argv)])
    return status, capsys.readouterr()


def refused(capsys, *argv):
    """Runs the demo, which must print one line on stderr and exit with 2; returns the line."""
    try:
        status = cli.main(["demo", *map(str, argv)])
    except SystemExit as e:
        status = e.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("Failed to load")]  # torchao's, when imported
    assert (status, printed.out, len(lines)) == (2, "", 1)
    return lines[0]


# -- the demo --------------------------------------------------------------------------------------------------------------


def test_demo_trains_merges_saves_and_draws(capsys, tmp_path):
    status, printed = run(capsys, *SMALL, "--out", tmp_path)
    assert status == 0
    rows = [line.split("│")[1:-1] for line in printed.out.splitlines() if line.startswith("│")]
    members = {r[0].strip(): r for r in rows if r[0].strip().isdecimal()}
    assert members.keys() == {"0", "1"}
    assert [float(members[m][1]) for m in "01"] == [3e-4, 3e-2]
    assert sum(r[-1].strip() == "best" for r in members.values()) == 1
    assert {r[0].strip(): r[2].strip() for r in rows if len(r) == 3} == {
        "merged": "same",
        "reloaded": "same",
        "read by peft": "same",
    }
    for said in ("vmapped", "one by one", "swallowed"):
        assert said in printed.out
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as f:
        assert len(list(f.keys())) == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "curves.png"]


def trained(**settings):
    s = demo.Settings(members=2, batch=2, tokens=32, progress=False, **settings)
    task, text = demo.make_task(s), demo.split(demo.domain_text("prose"), s.tokens)
    many = demo.stack([task.net.init(task.params, seed=i) for i in range(2)])
    return demo.train(task, many, torch.tensor([3e-3, 1e-2]), text, s)


def test_a_longer_run_learns():
    _, steps, curves = trained(steps=20)
    assert float(curves[-1].min()) < float(curves[0].min()) - 0.02
    assert steps == [0, 3, 5, 8, 10, 13, 15, 18, 20]
    assert curves.shape == (len(steps), 2)


def test_equal_seeds_give_equal_curves():
    first, same, other = (trained(steps=2, seed=seed)[2] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "extra", [("--method", "ia3", "--domain", "html"), ("--method", "DoRA", "--set", "r=2", "--domain", "source")]
)
def test_methods_fields_and_domains_by_name(capsys, tmp_path, extra):
    status, printed = run(capsys, *SMALL, *extra, "--out", tmp_path)
    assert status == 0
    assert f"text: {extra[-1]}," in printed.out


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_on_a_quantized_base(capsys, tmp_path, name):
    status, printed = run(capsys, *SMALL, "--quantize", name, "--out", tmp_path)
    assert status == 0
    assert printed.out.count("same") == 3


def test_a_directory_of_text(capsys, tmp_path):
    (tmp_path / "text/deep").mkdir(parents=True)
    (tmp_path / "text/a.txt").write_text("one two three " * 50)
    (tmp_path / "text/deep/b.md").write_text("vier fünf sechs " * 50)
    (tmp_path / "text/c.bin").write_bytes(b"\xff\xfe\x00" * 500)
    data = demo.directory_text(tmp_path / "text")
    assert bytes(data.tolist()) == b"one two three " * 50 + b"\n" + "vier fünf sechs ".encode() * 50
    status, _ = run(capsys, *SMALL, "--text", tmp_path / "text", "--out", tmp_path / "out")
    assert status == 0


def test_without_matplotlib_and_peft(monkeypatch, capsys, tmp_path):
    absent = ("matplotlib", "peft")
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    status, printed = run(capsys, *SMALL, "--out", tmp_path)
    assert status == 0
    assert "no picture: matplotlib is not installed" in printed.out
    assert "peft is not installed" in printed.out
    assert not (tmp_path / "curves.png").exists()


def test_what_cannot_be_merged_or_saved_is_said(capsys, tmp_path):
    status, printed = run(capsys, *SMALL, "--method", "Full", "--set", 'target_modules=["norm"]', "--out", tmp_path)
    assert status == 0
    assert "not saved: save_peft" in printed.out


def test_a_failed_check_is_status_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "difference", lambda got, wanted: 0.5)
    status, printed = run(capsys, *SMALL, "--out", tmp_path)
    assert status == 1
    assert "DIFFERS" in printed.out


def test_the_population_step_is_every_members_own():
    task = demo.make_task(demo.Settings())
    lrs, ids = torch.tensor([1e-3, 1e-2]), torch.randint(0, 256, (2, 17))
    alone = [task.net.init(task.params, seed=i) for i in range(2)]
    many, together = demo.stack(alone), demo.optim.adamw(lr=lrs)
    stepped, _ = demo.population_step(task, together)(many, together.init(many), ids, torch.tensor(0))
    for got, adapter, lr in zip(demo.unstack(stepped), alone, lrs.tolist(), strict=True):
        optimizer = demo.optim.adamw(lr=lr)
        wanted, _ = demo.member_step(task, optimizer)(adapter, optimizer.init(adapter), ids, torch.tensor(0))
        for path, leaves in wanted.params.items():
            # a first step of adamw has the size lr wherever the gradient is not tiny, whatever its size
            torch.testing.assert_close(got.params[path]["B"], leaves["B"], rtol=0, atol=0.01 * lr)


# -- errors ----------------------------------------------------------------------------------------------------------------

ERRORS = [
    (("--method", "lorra"), "'lorra'; did you mean 'LoRA'"),
    (("--method", "zzz"), "known are 'BEFT'"),
    (("--method", "Poly"), "the call needs the value 'task_ids'"),
    (("--method", "XLoRA"), "experts must be a list of LoRA adapters"),
    (("--set", "init_lora_weights=eva"), "a method that needs the base and text alone is required"),
    (("--set", "rank=3"), "rank"),
    (("--set", "r=0"), "r must be a positive integer, got 0. Fields are set by --set FIELD=VALUE."),
    (("--set", "r"), "FIELD=VALUE is required, got 'r'"),
    (("--set", 'target_modules=["q_prj"]'), "got 'q_prj'; did you mean 'q_proj'"),
    (("--members", "0"), "--members: a whole number above 0 is required, got '0'"),
    (("--lr", "-1", "1"), "a number above 0 is required"),
    (("--lr", "x", "1"), "a number above 0 is required, got 'x'"),
    (("--tokens", "300"), "--tokens: at most the base's context of 256 is required, got 300"),
    (("--quantize", "nf5"), "'nf5'"),
    (("--domain", "poems"), "'poems'"),
    (("--text", "no/such/place"), "--text no/such/place: a directory with text files is required, got nothing there"),
    (("--text", "pyproject.toml"), "a directory with text files is required, got a file"),
    (("--unknown",), "--unknown"),
]


@pytest.mark.parametrize(("argv", "text"), ERRORS, ids=[" ".join(argv) for argv, _ in ERRORS])
def test_a_mistake_is_one_line(capsys, tmp_path, argv, text):
    assert text in refused(capsys, *argv, "--out", tmp_path / "out")


def test_text_that_is_absent_or_short(capsys, tmp_path):
    assert "at least one UTF-8 text file is required, got none" in refused(capsys, "--text", tmp_path)
    (tmp_path / "a.txt").write_text("short")
    assert "at least 650 bytes are needed for windows of 64, a tenth of them held out, got 5" in refused(
        capsys, "--text", tmp_path
    )


def test_an_output_that_is_a_file(capsys, tmp_path):
    (tmp_path / "out").write_text("")
    assert "--out: a directory that can be written is required" in refused(capsys, "--out", tmp_path / "out")


def test_a_library_without_the_text(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "must come with its html" in refused(capsys, "--domain", "html")
    assert "must come with its prose" in refused(capsys)


def test_a_base_that_is_not_there(tmp_path):
    with pytest.raises(demo.UserError, match=r"train it with: python -m funcpeft\.data\.train_base"):
        demo.load_base(tmp_path)


# -- the command -------------------------------------------------------------------------------------------------------------


def test_version_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "funcpeft", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"funcpeft {cli.version()}\n"


def test_methods_are_listed(capsys):
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in methods.__all__)
    assert "low-rank adaptation" in printed


# -- the base ----------------------------------------------------------------------------------------------------------------


def test_the_base_is_small_and_knows_source():
    module = demo.load_base()
    assert sum(t.numel() for t in module.parameters()) < 1.5e6
    assert (train_base.BASE / "model.safetensors").stat().st_size < 3e6
    held = train_base.read_bytes(train_base.source_files(held_out=True))
    assert train_base.evaluate(module, held, 8, 128) < 2.6


def test_train_base_writes_a_model_that_transformers_loads(capsys, tmp_path):
    from transformers import LlamaForCausalLM

    small = "--steps 2 --batch 1 --context 16 --hidden 16 --layers 1 --heads 2 --threads 1 --no-progress".split()
    for name in ("a", "b"):
        assert train_base.main([*small, "--out", str(tmp_path / name)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    written = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert written[0].keys() == {"config.json", "model.safetensors"}
    assert written[0] == written[1]
    module = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert module.dtype == torch.float16
    assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("argv", "text"),
    [("--steps 0", "--steps: a positive number is required, got 0"), ("--heads 3", "--heads: must divide the width 160")],
)
def test_train_base_refuses(capsys, argv, text):
    with pytest.raises(SystemExit, match="2"):
        train_base.main(argv.split())
    assert text in capsys.readouterr().err


def test_source_is_split_by_name():
    train, held = (train_base.source_files(held_out=h) for h in (False, True))
    assert train
    assert held
    assert not set(train) & set(held)
    assert not any("pydoc_data" in p.parts or "test" in p.parts for p in train + held)


def test_orthogonalized_matrices():
    for shape in ((2, 6, 10), (2, 10, 6)):
        values = torch.linalg.svdvals(train_base.orthogonalized(torch.randn(shape)))
        assert bool(((values > 0.5) & (values < 1.4)).all())


def test_the_schedule_rises_and_falls():
    factors = [train_base.cosine(i, 100) for i in range(100)]
    assert factors[3] == factors[4] == max(factors) == 1
    assert factors[:4] == sorted(factors[:4])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.03
