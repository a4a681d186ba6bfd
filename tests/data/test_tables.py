"""One reader of JSON lists, JSONL and Parquet: values, places in the file, and broken rows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffa.data.samples import DataError
from diffa.data.tables import BrokenRow, RowIndex, iter_rows, iter_spans, open_parquet

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
BLANKS = st.text(" \t\r\n", max_size=3)


@given(
    rows=st.lists(VALUES, max_size=5), blanks=BLANKS, ascii_only=st.booleans(), indent=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_places_of_a_json_list_hold_exactly_the_rows(
    rows: list[Any], blanks: str, ascii_only: bool, indent: bool
) -> None:
    text = json.dumps(rows, ensure_ascii=ascii_only, indent=1 if indent else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_bytes((blanks + text + blanks).encode("utf-8", "surrogatepass"))
        data = path.read_bytes()
        spans = list(iter_spans(path))
    assert [span.value for span in spans] == rows
    assert [json.loads(data[span.start : span.end]) for span in spans] == rows


@given(rows=st.lists(VALUES, max_size=6), blanks=st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_an_index_of_jsonl_reads_any_range_without_blank_lines(
    rows: list[Any], blanks: list[bool]
) -> None:
    lines = [
        ("\n" if blank else "") + json.dumps(row) + "\n"
        for row, blank in zip(rows, blanks, strict=False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(lines), "utf-8")
        index = RowIndex(path)
        for span in iter_spans(path):
            index.append(span)
        assert len(index) == len(rows)
        assert [index[i] for i in range(len(rows))] == rows
        assert index.read(1, 4) == rows[1:4] and index.read(0, 99) == rows


def test_a_broken_line_is_one_row_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n{"a": 2}\n')
    first, broken, binary, last = iter_rows(path)
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(broken, BrokenRow) and broken.startswith("is broken JSON")
    assert binary == BrokenRow("is not UTF-8 text")
    index = RowIndex(path)
    for span in iter_spans(path):
        index.append(span)
    assert isinstance(index[1], BrokenRow) and index[3] == {"a": 2}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"a": 1}, {"a": ', "nothing after it can be read"),
        ('[{"a": 1} {"a": 2}]', "where ',' or ']' should be"),
        ('[{"a": 1}', "after the end of the file"),
    ],
)
def test_a_broken_list_ends_in_one_broken_row(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    first, broken = iter_rows(tmp_path / "rows.json")
    assert first == {"a": 1} and isinstance(broken, BrokenRow) and reason in broken


def test_what_is_no_list_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"is not a JSON list: it begins with '{"):
        list(iter_rows(tmp_path / "map.json"))
    for name in ("none.json", "none.jsonl", "none.parquet"):
        with pytest.raises(DataError, match="there is no manifest"):
            list(iter_rows(tmp_path / name))
    with pytest.raises(DataError, match="cannot be read"):
        list(iter_spans(tmp_path))


def test_columns_of_parquet_can_be_omitted(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"a": [1, None, 3], "audio": [b"x", b"y", b"z"]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    assert list(iter_rows(tmp_path / "rows.parquet", omit=("audio",))) == [
        {"a": 1}, {"a": None}, {"a": 3},
    ]  # fmt: skip
    assert open_parquet(tmp_path / "rows.parquet").num_row_groups == 2
