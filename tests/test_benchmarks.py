"""Every benchmark runs at tiny settings and writes the ratios it is for; what they are is not tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent / "benchmarks"

# the libraries that are compared warn about themselves when they are imported
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module


def test_population_compares_every_way_with_the_limit(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("population").main(["--quick", "--no-compile", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "population.json").read_text())
    assert figures["machine"]["threads"] >= 1
    assert figures["machine"]["versions"]["torch"]
    (shape,) = figures["shapes"]
    for mode, ways in (("eval", {"peft adapter_names"}), ("train", {"torch.func.grad"})):
        found = shape[mode]["ways"]
        assert found.keys() == ways | {"peft loop", "loop", "vmap", "apply_many", "base"}
        assert found["base"]["to_limit"] == found["peft loop"]["over_peft"] == 1
        for way in found.values():
            assert 0 < way["q1"] <= way["ms"] <= way["q3"]
            assert way["to_limit"] == pytest.approx(way["ms"] / found["base"]["ms"])
    assert (tmp_path / "population.png").stat().st_size > 1000
    assert "apply_many" in capsys.readouterr().out


def test_members_are_a_curve(script: Any, tmp_path: Path) -> None:
    script("population").main(["--quick", "--members", "--out", str(tmp_path)])
    (curve,) = json.loads((tmp_path / "members.json").read_text())["curves"]
    assert [point["members"] for point in curve["points"]] == [1, 2]
    assert all(
        point[mode][ratio] > 0 for point in curve["points"] for mode in ("eval", "train") for ratio in ("to_limit", "over_peft")
    )
    assert (tmp_path / "members.png").stat().st_size > 1000


def test_what_a_compiler_raises_is_a_figure(script: Any) -> None:
    def fails() -> None:
        raise RuntimeError("no graph")

    kept, seconds, errors = script("population").first_calls({"works": lambda: 1, "fails": fails})
    assert list(kept) == list(seconds) == ["works"]
    assert errors == {"fails": "RuntimeError: no graph"}


def test_ways_that_differ_are_not_timed(script: Any) -> None:
    population, torch = script("population"), script("torch")
    with pytest.raises(AssertionError, match="other and peft loop differ by"):
        population.require_equal({"peft loop": lambda: torch.ones(2, 3), "other": lambda: torch.zeros(2, 3)}, 2)


def test_goals_say_whether_they_are_met(script: Any) -> None:
    population = script("population")
    shape = population.SHAPES[0]
    ways = {"apply_many": {"ms": 4.0, "over_peft": 30.0, "to_limit": 1.4}, "base": {"ms": 3.0}}
    assert [g["met"] for g in population.goals_of(shape, "eval", ways)] == [True, False]


def test_memory_compares_peaks(script: Any, tmp_path: Path) -> None:
    script("memory").main(["--quick", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "memory.json").read_text())
    (remat,), (qlora,) = figures["remat"], figures["qlora"]
    assert {"peft, checkpointing", "value_and_grad, remat", "torch.func.grad, remat"} < remat["ways"].keys()
    assert [g["at_most"] for g in remat["goals"]] == [1.1, 1.1]
    for way in (*remat["ways"].values(), *qlora["ways"].values()):
        assert way["peak_bytes"] > 0
        assert way["peak_to_first"] > 0


def test_adapters_are_loaded_and_merged(script: Any, tmp_path: Path) -> None:
    script("adapters").main(["--quick", "--out", str(tmp_path)])
    counts = json.loads((tmp_path / "adapters.json").read_text())["counts"]
    assert [c["adapters"] for c in counts] == [1, 2]
    assert all(c[what]["funcpeft"]["over_peft"] > 0 for c in counts for what in ("load", "merge"))
