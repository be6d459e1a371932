"""Every row of every kind of file comes back, in order, at its place; whatever is wrong with one is said."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config.schema import SourceConfig
from tunesmith.data import sources
from tunesmith.data.decode import decode, parse_json
from tunesmith.data.records import BadRow, RawRow
from tunesmith.data.sources import fingerprint_files, is_hub_id, iter_rows, resolve_files
from tunesmith.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROWS: list[dict[str, Any]] = [
    {"text": 'a, "b" [c] {d}'},
    {"text": "\\", "n": [1, [2]]},
    {"text": "\u4f60\U0001f600"},
]


def read(path: Path, limit: int = 1 << 24) -> list[RawRow]:
    return list(iter_rows(SourceConfig(path=str(path)), max_row_bytes=limit))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def places(rows: list[RawRow]) -> list[str]:
    return [row.place.rpartition("/")[2] for row in rows]


def problem(row: RawRow, **options: int) -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        decode(row, **options)
    return caught.value.reason, caught.value.detail


def bad(payload: bytes | dict[str, Any], **options: int) -> tuple[str, str]:
    return problem(RawRow("f:1", payload), **options)


# --- which files


def test_a_folder_gives_its_data_files_sorted_and_leaves_out_hidden_and_other_ones(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a.jsonl.gz",
        "sub/c.parquet",
        ".d.jsonl",
        ".git/e.json",
        "README.md",
        "UP.JSON",
        "state.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(file.relative_to(tmp_path)) for file in resolve_files(str(tmp_path))]
    assert found == ["UP.JSON", "a.jsonl.gz", "b.jsonl", "sub/c.parquet"]
    assert resolve_files(f"{tmp_path}/**/*.parquet") == [tmp_path / "sub" / "c.parquet"]
    assert [file.name for file in resolve_files(f"{tmp_path}/*")] == ["UP.JSON", "a.jsonl.gz", "b.jsonl"]


def test_a_path_that_is_not_there_names_the_near_ones(tmp_path: Path) -> None:
    write(tmp_path / "chat.jsonl", "")
    with pytest.raises(
        DataError, match=r"caht\.jsonl: no such file or folder\. Near names in .*: chat\.jsonl\.$"
    ):
        resolve_files(f"{tmp_path}/caht.jsonl")
    with pytest.raises(DataError, match=r"the folder .*/nowhere does not exist either"):
        resolve_files(f"{tmp_path}/nowhere/chat.jsonl")
    with pytest.raises(
        DataError, match=r"no file matches this pattern\. Supported endings: \.jsonl, \.ndjson"
    ):
        resolve_files(f"{tmp_path}/*.parquet")
    write(tmp_path / "x.pdf", "")
    with pytest.raises(DataError, match=r"x\.pdf: the ending is none that can be read\. Supported: \.jsonl"):
        resolve_files(f"{tmp_path}/x.pdf")
    (tmp_path / "docs").mkdir()
    write(tmp_path / "docs" / "x.pdf", "")
    with pytest.raises(DataError, match=r"docs: no data file there \(only x\.pdf\)\. Supported endings"):
        resolve_files(f"{tmp_path}/docs")


def test_a_hub_id_is_owner_slash_name_and_nothing_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("openai/gsm8k")
    assert is_hub_id("openai/gsm8k:train")
    assert not is_hub_id("data/chat.jsonl")
    assert not is_hub_id("a/b/c")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    assert not is_hub_id("openai/gsm8k")


def test_a_hub_data_set_out_of_reach_is_said_beside_the_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert streaming
        if name == "no/where":
            raise ConnectionError("Couldn't reach 'no/where' on the Hub")
        return [{"text": split}, {"text": "b"}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(Path("some/where:test")) == [
        RawRow("some/where:test[0]", {"text": "test"}),
        RawRow("some/where:test[1]", {"text": "b"}),
    ]
    with pytest.raises(DataError) as caught:
        read(Path("no/where"))
    assert str(caught.value) == (
        "no/where: no such file or folder; the folder no does not exist either. Read as the hub data set "
        "no/where, split train, it gave 0 rows and then ConnectionError: Couldn't reach 'no/where' on the Hub"
    )


def test_the_fingerprint_follows_contents_and_their_order_but_not_names(tmp_path: Path) -> None:
    a, b, copy = (
        write(tmp_path / n, t) for n, t in (("a.txt", "1\n2\n"), ("b.txt", "3\n"), ("c.txt", "1\n2\n"))
    )
    moved = [write(tmp_path / n, t) for n, t in (("d.txt", "1\n"), ("e.txt", "2\n3\n"))]
    assert fingerprint_files([a, b]) == fingerprint_files([copy, b])
    assert len({fingerprint_files(files) for files in ([a, b], [b, a], [a], moved, [])}) == 5


# --- lines


def test_json_lines_keep_their_line_numbers_over_blank_lines_crlf_and_a_byte_order_mark(
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\n{"a": 3}')
    rows = read(file)
    assert places(rows) == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    assert [decode(row) for row in rows] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert all(isinstance(row.payload, bytes) for row in rows)


def test_utf16_is_named_with_the_command_that_mends_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: is UTF-16, expected UTF-8\. Convert it: iconv -f UTF-16"):
        read(write(tmp_path / "a.jsonl", '{"a": 1}\n'.encode("utf-16")))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 17])
def test_an_overlong_line_is_a_bad_row_and_the_next_line_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    rows = read(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 100 + '"}\n{"a": 3}\n'), limit=50)
    assert [problem(rows[1])] == [("too_large", "the row has 109 bytes; data.max_row_bytes allows 50")]
    assert places(rows) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert (decode(rows[0]), decode(rows[2])) == ({"a": 1}, {"a": 3})


def test_text_is_one_row_a_line_that_is_not_blank(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.txt", b"  one\r\n\n two \n\xffx"))
    assert [row.payload for row in rows[:2]] == [{"text": "  one"}, {"text": " two "}]
    assert places(rows) == ["a.txt:1", "a.txt:3", "a.txt:4"]
    assert problem(rows[2])[0] == "wrong_encoding"


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_packed_files_are_read_and_a_damaged_one_says_how_far_it_got(tmp_path: Path, ending: str) -> None:
    # Digits that do not repeat: the archive stays long enough to be cut well before its end.
    lines = [json.dumps({"n": i, "h": hash((i, 1))}) for i in range(50_000)]
    plain = "\n".join(lines).encode()
    packed = gzip.compress(plain) if ending == "gz" else zstandard.compress(plain)
    rows = read(write(tmp_path / f"a.jsonl.{ending}", packed))
    assert (len(rows), decode(rows[-1])["n"], places(rows)[-1]) == (50_000, 49_999, f"a.jsonl.{ending}:50000")
    assert len(read(write(tmp_path / f"b.json.{ending}", packed))) == 50_000
    cut = SourceConfig(path=str(write(tmp_path / f"c.jsonl.{ending}", packed[: len(packed) // 2])))
    seen: list[RawRow] = []
    with pytest.raises(DataError) as caught:
        seen.extend(iter_rows(cut, max_row_bytes=1 << 20))
    assert 1000 < len(seen) < 50_000
    assert [decode(row)["n"] for row in seen] == list(range(len(seen)))
    assert f"{len(seen):,} rows came before the damage" in str(caught.value)
    with pytest.raises(DataError, match=r"d\.txt\.\w+: cannot be read to its end.*0 rows came before"):
        read(write(tmp_path / f"d.txt.{ending}", b"not an archive"))


# --- .json


def test_a_json_list_gives_its_elements_with_the_line_each_begins_in(tmp_path: Path) -> None:
    rows = read(
        write(tmp_path / "a.json", "\n [\n" + ",\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n]\n")
    )
    assert [decode(row) for row in rows] == ROWS
    assert places(rows) == ["a.json:3", "a.json:6", "a.json:15"]
    assert read(write(tmp_path / "b.json", " [ ] ")) == read(write(tmp_path / "c.json", "")) == []


def test_json_lines_and_object_after_object_in_a_json_file_are_read(tmp_path: Path) -> None:
    lines = read(write(tmp_path / "a.json", '{broken\n{"a": [1]}\n\n{"a": [2]}\n'))
    assert places(lines) == ["a.json:1", "a.json:2", "a.json:4"]
    assert [decode(row) for row in lines[1:]] == [{"a": [1]}, {"a": [2]}]
    objects = read(write(tmp_path / "b.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)))
    assert [decode(row) for row in objects] == ROWS
    assert places(objects) == ["b.json:1", "b.json:4", "b.json:13"]
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert [decode(row) for row in read(write(tmp_path / "c.json", json.dumps(chat, indent=1)))] == [chat]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_around_the_list_is_an_error_that_says_what_to_do(
    tmp_path: Path, indent: int | None
) -> None:
    with pytest.raises(
        DataError, match=r"a\.json: holds one object whose key 'data' has a list; expected the list"
    ):
        read(write(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=indent)))


def test_a_json_list_that_was_cut_off_ends_in_a_bad_row(tmp_path: Path) -> None:
    whole = json.dumps(ROWS, indent=1)
    cut = read(write(tmp_path / "a.json", whole[:-20]))
    assert [decode(row) for row in cut[:2]] == ROWS[:2]
    assert problem(cut[2])[0] == "not_json"
    assert "the file ends inside this row" in problem(cut[2])[1]
    objects = read(write(tmp_path / "c.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)[:-20]))
    assert "the file ends inside this row" in problem(objects[2])[1]
    with pytest.raises(DataError, match=r"b\.json:17: the file ends before its list does\."):
        read(write(tmp_path / "b.json", whole[:-1]))


@pytest.mark.parametrize("limit", [1 << 20, 30])
def test_a_missing_quote_or_bracket_in_a_json_list_is_named_and_no_row_is_lost_in_silence(
    tmp_path: Path, limit: int
) -> None:
    whole = json.dumps([{"a": "x"}] * 9, indent=1)
    lines = whole.split("\n")
    for broken in ('  "a": "x', '  "a": x"', '  "a: "x"'):
        with pytest.raises(DataError, match=r"a\.json:8: a quote or bracket is missing in or after the row"):
            read(write(tmp_path / "a.json", "\n".join([*lines[:8], broken, *lines[9:]])), limit)
    missing = "in or after the row of line 2," if limit > 30 else "in a row before,"
    with pytest.raises(
        DataError, match=rf"a\.json:29: the file ends before its list .* is missing {missing}"
    ):
        read(write(tmp_path / "a.json", whole.replace(" },\n", "\n", 1)), limit)
    with pytest.raises(
        DataError, match=r"a\.json:4: text follows the list, which ended in line 4\. A bracket"
    ):
        read(write(tmp_path / "a.json", whole.replace("},", "}},", 1)))


def test_elements_that_are_no_objects_or_too_large_are_bad_rows_each(tmp_path: Path) -> None:
    rows = read(
        write(tmp_path / "a.json", '[1, "a, ]b",\n null, [{"a": 1}], {"a": "' + "x" * 60 + '"},{"a": 2}]'),
        limit=40,
    )
    assert [problem(row) for row in rows[:5]] == [
        ("not_an_object", "found a number; expected an object, {...}"),
        ("not_an_object", "found a string; expected an object, {...}"),
        ("not_an_object", "found null; expected an object, {...}"),
        ("not_an_object", "found a list; expected an object, {...}"),
        ("too_large", "the row has 69 bytes; data.max_row_bytes allows 40"),
    ]
    assert decode(rows[5]) == {"a": 2}
    assert places(rows) == ["a.json:1", "a.json:1", *["a.json:2"] * 4]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\\"[]{},')),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('ab\\"{[,', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text('ab\\"]', max_size=3), json_values, max_size=3), max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    is_ascii=st.booleans(),
    space=st.text(" \n\t\r", max_size=4),
    chunk=st.sampled_from([1, 2, 3, 7, 40]),
)
def test_any_json_list_comes_back_whatever_its_white_space_and_the_chunks_it_is_read_in(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    indent: int | None,
    is_ascii: bool,
    space: str,
    chunk: int,
) -> None:
    one = [json.dumps(row, indent=indent, ensure_ascii=is_ascii) for row in rows]
    text = f"{space}[{space}" + f"{space},{space}".join(one) + f"{space}]{space}"
    file = write(tmp_path_factory.getbasetemp() / "any.json", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", chunk)
        got = read(file)
    assert [decode(row) for row in got] == rows
    starts, at = [], 0
    for part in one:
        at = text.index(part, at)
        starts.append(f"any.json:{text.count(chr(10), 0, at) + 1}")
        at += len(part)
    assert places(got) == starts


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_big_file_is_read_in_bounded_memory(tmp_path: Path, name: str) -> None:
    is_list = name == "a.json"
    row = json.dumps(
        {"text": 'a "quoted" [text] ' * 100, "n": [{"a": 1}] * 20}, indent=1 if is_list else None
    )
    comma = "," if is_list else "\n"
    with (tmp_path / name).open("w") as file:
        file.write(("[" if is_list else "") + row + (comma + row) * 999)
        file.write(f'{comma}"{"y" * 30_000_000}"')  # one row over the limit: it must not be held either
        file.write((comma + row) * 9_000 + ("]" if is_list else ""))
    tracemalloc.start()
    counts = [0, 0]
    for got in iter_rows(SourceConfig(path=str(tmp_path / name)), max_row_bytes=1 << 20):
        counts[isinstance(got.payload, BadRow)] += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts == [10_000, 1]
    assert (tmp_path / name).stat().st_size > 50e6
    # A chunk of 128 KiB, its copy without escapes, some arrays over its brackets, and a row of up to 1 MiB.
    assert peak < 8e6


# --- tables


def test_csv_rows_carry_the_line_they_begin_in(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.csv",
        b'\xef\xbb\xbfa,b\r\n1,"two\r\n \r\nlines"\r\n\r\n3,"x ""y"""\r\n4\r\n5,6,7\r\n\xff,8\r\n9,10',
    )
    rows = read(file)
    assert places(rows) == [f"a.csv:{line}" for line in (2, 6, 7, 8, 9, 10)]
    assert [row.payload for row in (rows[0], rows[1], rows[5])] == [
        {"a": "1", "b": "two\r\n \r\nlines"},
        {"a": "3", "b": 'x "y"'},
        {"a": "9", "b": "10"},
    ]
    assert problem(rows[2]) == ("wrong_columns", "1 fields; the header names 2: a, b")
    assert problem(rows[3]) == ("wrong_columns", "3 fields; the header names 2: a, b")
    assert problem(rows[4])[1].startswith("byte 0xff at offset 0 of a is not UTF-8.")


def test_a_csv_quote_that_is_never_closed_is_a_bad_row(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", 'a,b\n1,2\n3,"4\n5,6\n'))
    assert rows[0].payload == {"a": "1", "b": "2"}
    assert problem(rows[1]) == ("not_csv", "unexpected end of data; the row runs from line 3 to 4")


def test_a_long_csv_field_is_read_and_an_overlong_line_is_a_bad_row(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", f"a\n{'x' * 200_000}\n{'y' * 300_000}\nz\n"), limit=250_000)
    assert (rows[0].payload, rows[2].payload) == ({"a": "x" * 200_000}, {"a": "z"})
    assert problem(rows[1]) == ("too_large", "the row has 300,000 bytes; data.max_row_bytes allows 250,000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name every column; found nothing."),
        ("a,,b\n1,2,3\n", "the first line must name every column; found 'a', '', 'b'."),
        ("a,b,a\n1,2,3\n", "the header names 'a' more than once: 'a', 'b', 'a'."),
        ("a;b\n1;2\n", "the header has one column, 'a;b'. Columns must be separated by commas."),
    ],
)
def test_a_csv_header_must_name_each_column_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "a.csv", text))
    assert str(caught.value).endswith(f"a.csv: {message}")


@pytest.mark.parametrize("kind", ["parquet", "file.arrow", "stream.arrow"])
def test_tables_give_rows_as_objects_at_their_index(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": [f"row {i}" for i in range(700)], "turns": [[{"role": "user"}]] * 700})
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=300)
    else:
        new = pa.ipc.new_file if kind.startswith("file") else pa.ipc.new_stream
        with new(str(file), table.schema) as sink:
            sink.write_table(table)
    rows = read(file)
    assert [row.payload for row in rows] == table.to_pylist()
    assert rows[699].place == f"{file}[699]"
    assert decode(rows[0]) == {"text": "row 0", "turns": [{"role": "user"}]}
    with pytest.raises(DataError, match=r"cannot be read to its end.*\. 0 rows came before the damage"):
        read(write(tmp_path / f"b.{kind}", file.read_bytes()[:100]))


def test_a_table_row_over_the_limit_or_not_in_utf8_is_a_bad_row_alone(tmp_path: Path) -> None:
    for name, odd, reason in (("a", b"x" * 1000, "too_large"), ("b", b"\xff", "wrong_encoding")):
        strings = pa.array([b"a", odd, b"b"], pa.binary()).view(pa.string())
        pyarrow.parquet.write_table(pa.table({"text": strings}), tmp_path / f"{name}.parquet")
        rows = read(tmp_path / f"{name}.parquet", limit=500)
        assert (rows[0].payload, rows[2].payload) == ({"text": "a"}, {"text": "b"})
        assert problem(rows[1])[0] == reason


# --- decode


def test_wrong_encoding_names_the_byte_and_its_offset() -> None:
    assert bad('{"a": "caf\u00e9"}'.encode("latin-1")) == (
        "wrong_encoding",
        'byte 0xe9 at offset 10 of the row (after \'{"a": "caf\') is not UTF-8. '
        "Convert the file: iconv -f ITS_ENCODING -t UTF-8",
    )
    assert (
        bad(b'{"a": "\xed\xa0\x80"}')[0] == "wrong_encoding"
    )  # half a character, encoded: json.loads takes it


def test_not_json_names_the_column_and_what_is_near() -> None:
    assert bad(b'{"a": 1, "b" 2}') == (
        "not_json",
        "column 14: Expecting ':' delimiter, near '{\"a\": 1, \"b\" 2}'",
    )
    assert bad(b'{"a": 1,\n "b": }')[1].startswith("line 2 of the row, column 7: Expecting value")
    assert bad(b'{"a": ' + b"1" * 5000 + b"}")[0] == "not_json"
    assert bad(b'{"a": "raw\ttab"}')[1].startswith("column 11: Invalid control character at")


@pytest.mark.parametrize(
    ("text", "found"), [("[1]", "a list"), ('"a"', "a string"), ("null", "null"), ("3", "a number")]
)
def test_a_row_that_is_no_object_says_what_it_is(text: str, found: str) -> None:
    assert bad(text.encode()) == ("not_an_object", f"found {found}; expected an object, {{...}}")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    assert bad(f'{{"a": [{number}]}}'.encode()) == (
        "nan",
        f"holds {number}, which is not JSON; expected a finite number",
    )
    assert bad({"a": [{"b": float("nan")}]}) == ("nan", "a[0].b is nan; expected a finite number")


def test_half_a_character_is_refused_and_a_whole_pair_is_not() -> None:
    assert decode(RawRow("f:1", rb'{"a": "\ud83d\ude00", "b": "\\ud83d"}')) == {
        "a": "\U0001f600",
        "b": "\\ud83d",
    }
    reason, detail = bad(rb'{"m": [{"c": "ab\uD83D"}]}')
    assert (reason, detail.split(",")[0]) == ("lone_surrogate", "m[0].c holds \\ud83d")
    assert bad(rb'{"\ude00": 1}')[0] == "lone_surrogate"
    assert bad({"a": "\udcff"})[0] == "lone_surrogate"
    with pytest.raises(BadRow, match="lone_surrogate"):
        parse_json(r'"\ud800"')


@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_nesting_over_the_limit_is_refused_at_any_depth(depth: int) -> None:
    said = ("too_deep", "objects and lists are nested more than 64 levels deep")
    assert bad(b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}") == said
    assert decode(RawRow("f:1", b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"))["a"]
    wide = {"a": [[] for _ in range(500)]}
    assert decode(RawRow("f:1", json.dumps(wide).encode())) == wide
    nested: Any = {}
    for _ in range(depth - 1):
        nested = {"a": nested}
    assert bad(nested) == said


def test_a_key_written_twice_in_one_object_is_refused() -> None:
    assert bad(b'{"m": [{"role": 1, "role": 2}]}') == (
        "duplicate_key",
        "the key 'role' is there twice in one object; one value is lost",
    )
    assert decode(RawRow("f:1", b'{"a": {"a": 1}}')) == {"a": {"a": 1}}


def test_bytes_in_a_table_are_refused_and_nul_characters_are_not() -> None:
    assert bad({"image": {"bytes": b"123"}}) == ("binary", "image.bytes holds 3 bytes; expected text")
    assert decode(RawRow("f:1", rb'{"a": "\u0000"}')) == {"a": "\0"}


# --- the real sets


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data sets are not at {SHARED}")
@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("alpaca_en_demo.json", 999),
        ("glaive_toolcall_en_demo.json", 300),
        ("kto_en_demo.json", 300),
        ("gsm8k_train.jsonl", 7473),
    ],
)
def test_the_shared_sets_are_read_as_json_loads_reads_them(name: str, num_rows: int) -> None:
    text = (SHARED / name).read_text()
    expected = (
        json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    )
    rows = read(SHARED / name)
    assert [decode(row) for row in rows] == expected
    assert len(rows) == num_rows
    lines = text.split("\n")
    assert all(lines[int(row.place.rpartition(":")[2]) - 1].lstrip().startswith("{") for row in rows)


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", [(1, "one"), (2, "two"), (5, "  three"), (6, "four ")]),
        ("paragraph", [(1, "one\ntwo"), (5, "  three\nfour ")]),
        ("document", [(1, "one\ntwo\n\n \n  three\nfour ")]),
    ],
)
def test_a_row_of_a_text_file_is_a_line_a_paragraph_or_the_file(tmp_path, sample_by, expected):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\n \n  three\nfour \n")
    source = SourceConfig(path=str(file), sample_by=sample_by)
    rows = list(iter_rows(source, max_row_bytes=100))
    assert [(row.place, row.payload["text"]) for row in rows] == [
        (f"{file}:{line}", text) for line, text in expected
    ]


@pytest.mark.parametrize("sample_by", ["paragraph", "document"])
def test_a_paragraph_over_the_limit_is_one_bad_row_with_its_size(tmp_path, sample_by):
    file = tmp_path / "a.txt"
    file.write_text(
        "\n" * (sample_by == "paragraph") + "0123456789\n" * 10 + "\nend\n" * (sample_by == "paragraph")
    )
    first, *rest = iter_rows(SourceConfig(path=str(file), sample_by=sample_by), max_row_bytes=50)
    assert first.payload.reason == "too_large"
    assert "110 bytes" in first.payload.detail
    assert [row.payload["text"] for row in rest] == ["end"] * (sample_by == "paragraph")
