"""Texts from outside: JSON of any shape, and text that is no Unicode."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffa.runtime.text import is_unicode, parse_json, to_unicode


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", b"\xff", b"\xef\xbb\xbf"])
def test_whatever_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_byte_order_mark_is_left_out() -> None:
    assert parse_json("\ufeff[1]") == parse_json(b"\xef\xbb\xbf[1]") == [1]


@given(st.text(st.characters(exclude_categories=())))
def test_text_becomes_unicode_and_unicode_stays_as_it_is(text: str) -> None:
    fixed = to_unicode(text)
    fixed.encode()
    assert is_unicode(fixed) and (fixed == text) == is_unicode(text)
    assert json.loads(json.dumps(fixed)) == fixed
