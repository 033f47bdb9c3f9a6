"""The documentation says what the package does: its code runs, its tables are the registry's, every public name has a place."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

import funcpeft as fp
from funcpeft import methods, quant

ROOT = Path(__file__).parents[1]
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if "```python" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(page.stem.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for i, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
        exec(compile(text, f"{page.name} block {i}", "exec", dont_inherit=True), module.__dict__)


def test_the_readme_names_every_method():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (.*`\w+`.*) \|$", text[text.index("## Methods") :], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(methods.__all__)


def test_every_public_name_has_a_place():
    generated = {*methods.__all__, *quant.__all__, "optim", "testing", "train"}
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    placed = set(re.findall(r":: funcpeft\.(\w+)(?:\(.*\))?$", api, re.MULTILINE))
    assert set(fp.__all__) <= placed | generated


def test_the_laws_of_the_concepts_page_are_all():
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    table = text[text.index("| law | statement |") :].split("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE)[1:] == list(fp.testing.LAWS)
