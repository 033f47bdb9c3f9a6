"""Registry of formats x laws of formats, and methods x formats x laws of methods. Nothing here names a method or a format."""

import pytest

from funcpeft import methods, quant
from funcpeft.testing import FORMAT_LAWS, LAWS, check_format_law, check_law

FORMATS = [f for name in quant.__all__ for f in getattr(quant, name).examples()]
FIRST = [getattr(quant, name).examples()[0] for name in quant.__all__]
METHODS = [getattr(methods, name).examples()[0] for name in methods.__all__]
VARIANTS = [m for name in methods.__all__ for m in getattr(methods, name).examples()]


def label(thing):
    return type(thing).__name__


@pytest.mark.parametrize("law", FORMAT_LAWS)
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_law_of_formats(fmt, law):
    check_format_law(fmt, law, max_examples=12)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_law_on_stored_bases(method, law):
    check_law(method, law, max_examples=4, formats=FIRST)


@pytest.mark.parametrize("fmt", FIRST, ids=label)
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_every_method_merges_and_maps_on_every_format(method, fmt):
    for law in ("merge", "vmap", "grad"):
        check_law(method, law, max_examples=2, formats=[fmt])


@pytest.mark.slow
@pytest.mark.parametrize("law", FORMAT_LAWS)
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_law_of_formats_at_length(fmt, law):
    check_format_law(fmt, law, max_examples=60)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", VARIANTS, ids=repr)
def test_law_on_stored_bases_at_length(method, law):
    check_law(method, law, max_examples=12, formats=FORMATS)
