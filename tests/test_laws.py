"""Registry x laws, over layer kinds, sizes and dtypes. Nothing here names a method."""

import dataclasses

import pytest

from funcpeft import methods
from funcpeft.testing import LAWS, check_law

EXAMPLES = [m for name in methods.__all__ for m in getattr(methods, name).examples()]


def label(method):
    changed = [f"{f.name}={v!r}" for f in dataclasses.fields(method) if (v := getattr(method, f.name)) != f.default]
    return f"{type(method).__name__}({', '.join(changed)})"


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", EXAMPLES, ids=label)
def test_law(method, law):
    check_law(method, law, max_examples=10)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", EXAMPLES, ids=label)
def test_law_at_length(method, law):
    check_law(method, law, max_examples=60)


@pytest.mark.parametrize("method", EXAMPLES, ids=label)
def test_waivers_name_laws_and_give_reasons(method):
    assert set(method.waived) <= set(LAWS)
    assert all(len(reason) > 20 for reason in method.waived.values())
