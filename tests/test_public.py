"""The public face: names, layout of method files, the README's blocks, the import contracts' premise."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import funcpeft as fp
from funcpeft import methods

ROOT = Path(__file__).parents[1]
METHODS = [getattr(methods, name) for name in methods.__all__]


def test_every_public_name_exists_and_is_documented():
    for name in fp.__all__:
        thing = getattr(fp, name)
        assert inspect.getdoc(thing), name


def test_every_method_is_public():
    assert set(methods.__all__) <= set(fp.__all__)


@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_a_method_file_states_formula_and_source(cls):
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    assert ".. math::" in doc or "..  math::" in doc, "the module docstring must give the formula"
    assert cls is methods.Full or "References:" in doc


@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_a_method_hashes_pickles_and_documents_its_own_fields(cls):
    import pickle

    one = cls.examples()[0]
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(one) == hash(pickle.loads(pickle.dumps(one)))
    inherited = {f.name for f in dataclasses.fields(fp.Method)}
    text = "\n".join(inspect.getdoc(c) or "" for c in cls.__mro__ if c not in (object,))
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in inherited and f"{f.name}:" not in text]
    assert not missing


def test_the_registry_is_one_import_per_line_without_logic():
    lines = (ROOT / "funcpeft/methods/__init__.py").read_text().splitlines()
    code = [x for x in lines if x.startswith("from ")]
    assert code == sorted(code)
    assert all(re.fullmatch(r"from funcpeft\.methods\.\w+ import \w+", x) for x in code)


def test_importing_funcpeft_imports_no_optional_package():
    optional = ("transformers", "peft", "hypothesis", "matplotlib", "bitsandbytes", "torchao", "torch._dynamo")
    code = f"import funcpeft, sys; print([m for m in {optional} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def readme_blocks():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readme_shows_python_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(i for i, x in enumerate(lines) if x.startswith("```python")) <= 35


@pytest.mark.parametrize("block", range(len(readme_blocks()) if (ROOT / "README.md").exists() else 0))
def test_a_readme_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for text in readme_blocks()[: block + 1]:
        exec(compile(text, f"README.md block {block}", "exec"), names)
