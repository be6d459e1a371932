"""Rows out of files: which files a path means, each file's rows in order, a row's bytes made an object.

    path --resolve_files--> files --iter_rows--> RawRow (place, undecoded)

Memory is bounded by the chunk size and `max_row_bytes`, whatever the size of a file. JSON stays undecoded
here, so that the processes that decode can share the work. What is wrong with one row is a BadRow and the
reader goes on; what leaves an unknown number of rows unread (a damaged archive, an unreadable file) is a
DataError.

| ending          | a row is                                                 | its place                 |
|-----------------|----------------------------------------------------------|---------------------------|
| .jsonl .ndjson  | a line that is not blank                                 | `file:line`               |
| .json           | an element of the list (or a line, if it is JSON lines)  | `file:line` it begins in  |
| .csv            | a record below the header                                | `file:line` it begins in  |
| .txt            | a line that is not blank, as `{"text": line}`; or, by    | `file:line` it begins in  |
|                 | `sample_by`, a paragraph or the whole file               |                           |
| .parquet .arrow | a row                                                    | `file[index]`             |
| a hub data set  | a row                                                    | `owner/name:split[index]` |

Lines and indices are those an editor and Python show: lines from 1, indices from 0. All but the two binary
ones may end in .gz or .zst.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.schema import SourceConfig
from tunesmith.data.decode import wrong_encoding
from tunesmith.data.records import BadRow, RawRow
from tunesmith.errors import DataError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet", ".arrow")
_ENDING = re.compile(r"(?i)(\.(?:jsonl|ndjson|json|csv|txt))(?:\.(?:gz|zst))?$|(\.(?:parquet|arrow))$")
_ENDINGS_SHOWN = f"{', '.join(ENDINGS)} (the first five also with .gz or .zst)"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(\w[\w.-]*))?")
# `datasets.save_to_disk` writes these beside its .arrow files: they describe rows, they hold none.
_METADATA_FILES = frozenset({"dataset_info.json", "dataset_dict.json", "state.json"})
_CHUNK = 1 << 17  # bytes; 32 KiB costs a quarter on JSON lines, 1 MiB a fifth on .json

SampleBy = Literal["line", "paragraph", "document"]
_Numbered = Iterator[tuple[int, bytes | BadRow]]  # (line the row begins in, the row)


# --- which files


def resolve_files(path: str) -> list[Path]:
    """The data files that a file, a folder (searched to its bottom) or a glob (`**` too) stands for, sorted.

    Hidden files are passed over, and in folders and globs files of other endings too. Raises DataError when
    none is left."""
    given = Path(path).expanduser()
    if given.is_file():
        if _ending(given) is None:
            raise DataError(f"{path}: the ending is none that can be read. Supported: {_ENDINGS_SHOWN}.")
        return [given]
    if given.is_dir():
        found = [file for file in given.rglob("*") if not _is_hidden(file.relative_to(given))]
    else:
        found = [Path(file) for file in glob.glob(str(given), recursive=True)]
    files = sorted(f for f in found if f.is_file() and _ending(f) and f.name not in _METADATA_FILES)
    if not files:
        raise DataError(_nothing_found(path, given, found))
    return files


def is_hub_id(path: str) -> bool:
    """Whether a path names a data set on the hub: `owner/name` or `owner/name:split`, and nothing local."""
    return bool(_HUB_ID.fullmatch(path)) and not _ENDING.search(path) and not Path(path).exists()


def fingerprint_files(files: Sequence[Path]) -> str:
    """A hash of the files' contents in order, for cache keys: 32 hexadecimal digits. Names do not enter, so
    that a moved folder keeps its cache; sizes do, so that a row moved from one file to the next changes
    it."""
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                whole.update(block)
        whole.update(file.stat().st_size.to_bytes(8, "little"))
    return whole.hexdigest()


def _ending(path: Path) -> str | None:
    match = _ENDING.search(path.name)
    return (match[1] or match[2]).lower() if match else None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _nothing_found(path: str, given: Path, found: Sequence[Path]) -> str:
    if given.is_dir() or found:
        others = sorted({file.name for file in found if file.is_file()})[:5]
        only = f" (only {', '.join(others)})" if others else ""
        return f"{path}: no data file there{only}. Supported endings: {_ENDINGS_SHOWN}."
    if glob.has_magic(path):
        return f"{path}: no file matches this pattern. Supported endings: {_ENDINGS_SHOWN}."
    parent = given.parent
    if not parent.is_dir():
        return f"{path}: no such file or folder; the folder {parent} does not exist either."
    near = difflib.get_close_matches(given.name, [file.name for file in parent.iterdir()], n=3)
    hint = f"Near names in {parent}: {', '.join(near)}" if near else f"Supported endings: {_ENDINGS_SHOWN}"
    return f"{path}: no such file or folder. {hint}."


# --- rows of a source


# How far a source has been read: (files that are done with, rows read of the next one).
Position = tuple[int, int]


def iter_rows(source: SourceConfig, *, max_row_bytes: int) -> Iterator[RawRow]:
    """Every row of the source in order; bad rows come in their place with a BadRow as payload."""
    return (row for _, row in iter_rows_from(source, (0, 0), max_row_bytes=max_row_bytes))


def iter_rows_from(
    source: SourceConfig, start: Position, *, max_row_bytes: int
) -> Iterator[tuple[Position, RawRow]]:
    """The rows after `start`, each with the position behind it. Files before it are not opened, rows before
    it in its file are passed over as they lie there."""
    done, passed = start
    if is_hub_id(source.path):
        for number, row in enumerate(_hub_rows(source.path, passed), start=passed + 1):
            yield (0, number), row
        return
    list_columns = frozenset(source.columns)
    for index, file in list(enumerate(resolve_files(source.path)))[done:]:
        num_rows = 0
        try:
            for row in _file_rows(file, max_row_bytes, list_columns, source.sample_by):
                num_rows += 1
                if index > done or num_rows > passed:
                    yield (index, num_rows), row
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{file}: cannot be read to its end, it is damaged, cut off or not readable: {error}. "
                f"{num_rows:,} rows came before the damage. Replace the file."
            ) from error


def _file_rows(file: Path, limit: int, list_columns: frozenset[str], sample_by: SampleBy) -> Iterator[RawRow]:
    ending = _ending(file)
    if ending in (".parquet", ".arrow"):
        for index, payload in enumerate(_arrow_rows(file, ending, limit)):
            yield RawRow(f"{file}[{index}]", payload)
    elif ending == ".csv":
        for number, fields in _csv_rows(_chunks(file), limit, file):
            yield RawRow(f"{file}:{number}", fields)
    elif ending == ".txt":
        for number, line in _not_blank(_texts(_lines(_chunks(file), limit), limit, sample_by)):
            yield RawRow(f"{file}:{number}", line if isinstance(line, BadRow) else _text_row(line))
    else:
        chunks = _chunks(file)
        is_json = ending == ".json"
        rows = _json_rows(chunks, limit, file, list_columns) if is_json else _lines(chunks, limit)
        for number, row in _not_blank(rows):
            yield RawRow(f"{file}:{number}", row)


def _chunks(file: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked, without a byte order mark."""
    with file.open("rb") as raw:
        stream: Any = raw
        if file.suffix.lower() == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif file.suffix.lower() == ".zst":
            # Not `zstandard`: its reader takes an archive that was cut off for one that ended.
            import pyarrow

            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")
        chunk = stream.read(_CHUNK)
        if chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(
                f"{file}: is UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {file.name}"
            )
        chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        while chunk:
            yield chunk
            chunk = stream.read(_CHUNK)


def _too_large(size: int, limit: int) -> BadRow:
    return BadRow("too_large", f"the row has {size:,} bytes; data.max_row_bytes allows {limit:,}")


def _lines(chunks: Iterable[bytes], limit: int) -> _Numbered:
    """Lines without `\\n`. Of a line over the limit only the length is kept."""
    number, size = 1, 0
    held: list[bytes] = []
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            size += len(line)
            if size > limit:
                yield number, _too_large(size, limit)
            else:
                yield number, b"".join(held) + line if held else line
            number, size = number + 1, 0
            held.clear()
        size += len(rest)
        if size > limit:
            held.clear()
        elif rest:
            held.append(rest)
    if size:
        yield number, _too_large(size, limit) if size > limit else b"".join(held)


def _not_blank(rows: _Numbered) -> _Numbered:
    return ((number, row) for number, row in rows if isinstance(row, BadRow) or (row and not row.isspace()))


def _texts(lines: _Numbered, limit: int, sample_by: SampleBy) -> _Numbered:
    """The rows of a .txt file with the line each begins in: lines, or what several of them are together."""
    if sample_by == "line":
        yield from lines
        return
    first, size = 1, 0
    held: list[bytes] = []
    problem: BadRow | None = None

    def text() -> bytes | BadRow:
        if size > limit or problem is not None:
            return problem or _too_large(size, limit)
        return b"\n".join(held)

    for number, line in lines:
        if sample_by == "paragraph" and not isinstance(line, BadRow) and (not line or line.isspace()):
            if held or problem:
                yield first, text()
            held, problem, size = [], None, 0
            continue
        if not held and problem is None:
            first = number
        if isinstance(line, BadRow):
            problem = line
        else:
            size += len(line) + 1
            if size <= limit:
                held.append(line)
            else:
                held[1:] = []
    if held or problem:
        yield first, text()


def _text_row(line: bytes) -> dict[str, Any] | BadRow:
    try:
        return {"text": line.removesuffix(b"\r").decode()}
    except UnicodeDecodeError as error:
        return wrong_encoding(error, "the row")


# --- .json

_FIRST_KEY_HOLDS_ROWS = re.compile(rb'\s*\{\s*"([^"\\]*)"\s*:\s*\[\s*[\[{]')
_COLUMNS_OF_LISTS = frozenset(
    {"messages", "conversations", "conversation", "tools", "functions", "history", "prompt", "completion"}
)


def _json_rows(chunks: Iterator[bytes], limit: int, file: Path, list_columns: frozenset[str]) -> _Numbered:
    """Rows of a .json file: a list or, as many of that ending hold, JSON lines or object after object."""
    head = b""
    while not head.strip() and (chunk := next(chunks, b"")):
        head += chunk
    chunks = itertools.chain([head], chunks)
    if head.lstrip().startswith(b"["):
        return _json_values(chunks, limit, file, in_list=True)
    lines = [line for line in head.split(b"\n", 6)[:6] if line.strip()]
    is_lines = any(line.startswith(b"{") and _is_json(line) for line in lines)
    wrapper = _FIRST_KEY_HOLDS_ROWS.match(head)
    if wrapper and not (is_lines and len(lines) > 1):
        key = wrapper[1].decode(errors="replace")
        if key not in _COLUMNS_OF_LISTS | list_columns:
            raise DataError(
                f"{file}: holds one object whose key {key!r} has a list; expected the list itself, [...]. "
                f"Write it out: python -c \"import json; json.dump(json.load(open('{file.name}'))['{key}'], "
                f"open('rows.json', 'w'))\""
            )
    if head.lstrip().startswith(b"{") and not is_lines:
        return _json_values(chunks, limit, file, in_list=False)
    return _lines(chunks, limit)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


_QUOTE, _COMMA, _OPEN, _CLOSE = 1, 2, 3, 4
_KINDS = np.zeros(256, dtype=np.uint8)
for _characters, _kind in ((b'"', _QUOTE), (b",", _COMMA), (b"[{", _OPEN), (b"]}", _CLOSE)):
    _KINDS[list(_characters)] = _kind
_STEPS = np.array([0, 0, 0, 1, -1], dtype=np.int64)  # of the depth, by kind


def _json_values(chunks: Iterator[bytes], limit: int, file: Path, *, in_list: bool) -> _Numbered:
    """The undecoded elements of a JSON list, or values that follow one another, with the line each begins in.

    Rows are found without being parsed: the parity of the quotes so far tells what lies in a string, and the
    sum of the brackets outside strings tells the depth; both are running sums over a chunk. Commas between
    rows are not checked. A quote or bracket that is missing makes a row swallow those after it; that is a
    DataError, as nobody can say how many rows it cost."""
    row = _OpenRow(limit)
    depth, in_string, carried = 0, 0, b""
    if in_list:
        before, _, after = next(chunks).partition(b"[")
        row.line += before.count(b"\n")
        chunks = itertools.chain([after], chunks)
    for chunk in chunks:
        chunk = carried + chunk
        # An odd last backslash escapes the first byte of the next chunk, and goes there.
        end = len(chunk) - (len(chunk) - len(chunk.rstrip(b"\\"))) % 2
        chunk, carried = chunk[:end], chunk[end:]
        # Without escapes, of the same length: every quote that is left opens or closes a string.
        plain = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        kinds = _KINDS[np.frombuffer(plain, dtype=np.uint8)]
        at = np.flatnonzero(kinds)
        kinds = kinds[at]
        quotes = np.cumsum(kinds == _QUOTE) + in_string
        outside = quotes % 2 == 0
        depths = np.cumsum(_STEPS[kinds] * outside) + depth
        cuts = np.flatnonzero(outside & (depths <= 0) & ((kinds == _COMMA) | (kinds == _CLOSE)))
        start = 0
        ends = (depths[cuts] < 0) & in_list
        brackets = (kinds[cuts] == _CLOSE) & ~ends
        for cut, bracket, is_end in zip(at[cuts].tolist(), brackets.tolist(), ends.tolist(), strict=True):
            row.add(chunk[start : cut + bracket])
            if row.size:
                yield row.take()
            start = cut + 1
            if is_end:
                _refuse_more(row, itertools.chain([chunk[start:] + carried], chunks), file)
                return
        row.add(chunk[start:])
        if len(at):
            depth, in_string = int(depths[-1]), int(quotes[-1]) % 2
    row.add(carried)
    if in_list or depth > 0 or in_string:
        yield row.start_line, _cut_off(row, file)
    elif row.size:
        yield row.take()


def _cut_off(row: _OpenRow, file: Path) -> BadRow:
    """What is said of the row that is open at the file's end. DataError where it stands for more than one."""
    if not row.size:
        missing = f"in or after the row of line {row.suspect}" if row.suspect else "in a row before"
        raise DataError(
            f"{file}:{row.line}: the file ends before its list does. A bracket is missing {missing}, or the "
            "file was cut off. Mend the row, or add the last ]."
        )
    if row.size > row.limit or row.holds_others(b"".join(row.pieces)):
        raise DataError(
            f"{file}:{row.start_line}: a quote or bracket is missing in or after the row that begins here; "
            f"the {row.size:,} bytes from here to the file's end cannot be told apart. Mend the row."
        )
    cause = "it was cut off, or a quote or bracket is missing"
    return BadRow("not_json", f"the file ends inside this row, {row.size:,} bytes after its start; {cause}")


def _refuse_more(row: _OpenRow, chunks: Iterator[bytes], file: Path) -> None:
    end_line = row.line
    for chunk in chunks:
        row.add(chunk)
        if row.size:
            raise DataError(
                f"{file}:{row.start_line}: text follows the list, which ended in line {end_line}. A bracket "
                "too many there? Expected one list and nothing else."
            )


class _OpenRow:
    """A row of a .json file as it is gathered: its bytes while within the limit, and the lines passed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.line = self.start_line = 1
        self.suspect = 0  # line of the first row that seems to hold others
        self.size = 0
        self.pieces: list[bytes] = []
        self._margin = b""  # the line break and blanks before the row

    def add(self, piece: bytes) -> None:
        if not self.size:
            row = piece.lstrip()
            blank = piece[: len(piece) - len(row)]
            self.line += blank.count(b"\n")
            self._margin = blank[blank.rfind(b"\n") :] if b"\n" in blank else b""
            self.start_line, piece = self.line, row
        self.line += piece.count(b"\n")
        self.size += len(piece)
        if self.size > self.limit:
            self.pieces.clear()
        else:
            self.pieces.append(piece)

    def take(self) -> tuple[int, bytes | BadRow]:
        payload = _too_large(self.size, self.limit) if self.size > self.limit else b"".join(self.pieces)
        if not self.suspect and isinstance(payload, bytes) and self.holds_others(payload):
            self.suspect = self.start_line
        self.size = 0
        self.pieces.clear()
        return self.start_line, payload

    def holds_others(self, text: bytes) -> bool:
        """Whether a line inside the row begins as the row does; what an indented row holds is further in."""
        return bool(self._margin) and self._margin + text[:1] in text


# --- .csv, tables, the hub


def _csv_rows(
    chunks: Iterator[bytes], limit: int, file: Path
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    overlong: list[BadRow] = []

    def lines() -> Iterator[str]:
        for _, line in _lines(chunks, limit):
            if isinstance(line, BadRow):
                overlong.append(line)
            yield "\n" if isinstance(line, BadRow) else line.decode("utf-8", "surrogateescape") + "\n"

    # Process-wide, and only ever raised: the default of 128 KiB a field is less than a long document.
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    reader = csv.reader(lines(), strict=True)
    header = _csv_header(reader, file)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, BadRow("not_csv", f"{error}; the row runs from line {number} to {reader.line_num}")
            continue
        if overlong:
            yield number, overlong.pop()
            overlong.clear()
        elif fields:
            yield number, _csv_row(header, fields)


def _csv_header(reader: Any, file: Path) -> list[str]:
    try:
        header: list[str] = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: the header is not CSV: {error}.") from error
    names = ", ".join(repr(name) for name in header)
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or not all(name.strip() for name in header):
        raise DataError(f"{file}: the first line must name every column; found {names or 'nothing'}.")
    if twice:
        raise DataError(f"{file}: the header names {', '.join(map(repr, twice))} more than once: {names}.")
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise DataError(f"{file}: the header has one column, {names}. Columns must be separated by commas.")
    return header


def _csv_row(header: list[str], fields: list[str]) -> dict[str, Any] | BadRow:
    if len(fields) != len(header):
        return BadRow(
            "wrong_columns", f"{len(fields)} fields; the header names {len(header)}: {', '.join(header)}"
        )
    row = dict(zip(header, fields, strict=True))
    for name, field in row.items():
        try:
            field.encode("utf-8", "surrogateescape").decode()
        except UnicodeDecodeError as error:
            return wrong_encoding(error, name)
    return row


def _arrow_rows(file: Path, ending: str, limit: int) -> Iterator[dict[str, Any] | BadRow]:
    import pyarrow

    try:
        for batch in _arrow_batches(file, ending):
            if len(set(batch.schema.names)) != len(batch.schema.names):
                raise DataError(f"{file}: a column name is there twice: {', '.join(batch.schema.names)}.")
            try:
                if batch.nbytes <= limit:
                    yield from batch.to_pylist()
                    continue
            except UnicodeDecodeError:
                pass  # one of its rows; the next lines find out which
            for index in range(batch.num_rows):
                row = batch.slice(index, 1)
                try:
                    yield row.to_pylist()[0] if row.nbytes <= limit else _too_large(row.nbytes, limit)
                except UnicodeDecodeError as error:
                    yield wrong_encoding(error, "a column")
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _arrow_batches(file: Path, ending: str) -> Iterator[Any]:
    import pyarrow

    if ending == ".parquet":
        import pyarrow.parquet

        # Without a buffer size whole column chunks of a row group, which may be gigabytes, are read at once.
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            yield from table.iter_batches(batch_size=256, use_threads=False)
        return
    with pyarrow.OSFile(str(file)) as stream:  # not a memory map: its pages count as this process's memory
        try:
            opened = pyarrow.ipc.open_file(stream)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:  # `datasets` writes the stream kind
            stream.seek(0)
            batches = iter(pyarrow.ipc.open_stream(stream))
        for batch in batches:
            for start in range(0, batch.num_rows, 256):
                yield batch.slice(start, 256)


def _hub_rows(path: str, start: int) -> Iterator[RawRow]:
    import datasets

    match = _HUB_ID.fullmatch(path)
    assert match, path
    name, split = match[1], match[2] or "train"
    index = start
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        for row in rows.skip(start) if start else rows:
            yield RawRow(f"{name}:{split}[{index}]", row)
            index += 1
    except (
        Exception
    ) as error:  # its own, and whatever httpx, fsspec, pyarrow and the readers of formats raise
        local = _nothing_found(path, Path(path), [])
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise DataError(
            f"{local} Read as the hub data set {name}, split {split}, it gave {index:,} rows and then {said}"
        ) from error
