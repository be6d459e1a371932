"""A stream that is taken up in the middle goes on with the rows it would have had."""

from __future__ import annotations

from functools import partial

import pytest
from tiny import write_rows

from tunesmith.config import SourceConfig
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.rows import StreamedRows
from tunesmith.data.sources import iter_rows, iter_rows_from
from tunesmith.errors import DataError


class Unprepared:
    """Gives each row back by its place, without tokens."""

    def prepare(self, rows):
        return [PreparedRow(row.place) for row in rows]


@pytest.fixture
def sources(tmp_path):
    """Three sources of 7, 12 (in three files, one of them empty) and 1 rows."""
    for name, number in (("a/1", 7), ("b/1", 5), ("b/2", 0), ("b/3", 7), ("c/1", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / f"{name}.jsonl", [{"text": str(i)} for i in range(number)])
    return [SourceConfig(path=str(tmp_path / name)) for name in "abc"]


def stream(sources, *, length=200, buffer=6, **options):
    read = [(partial(iter_rows_from, source, max_row_bytes=1 << 20), Unprepared()) for source in sources]
    return StreamedRows(read, length=length, buffer=buffer, seed=5, skip_bad_rows=False, **options)


def test_a_source_is_read_from_any_row_on(sources):
    whole = list(iter_rows_from(sources[1], (0, 0), max_row_bytes=1 << 20))
    assert [row for _, row in whole] == list(iter_rows(sources[1], max_row_bytes=1 << 20))
    for number, (position, _) in enumerate(whole, start=1):
        assert list(iter_rows_from(sources[1], position, max_row_bytes=1 << 20)) == whole[number:]


@pytest.mark.parametrize("buffer", [5, 6, 19, 20, 21, 1000])
def test_every_row_comes_once_before_any_comes_again(sources, buffer):
    rows = stream(sources, buffer=buffer)
    rounds = [[rows[i].place for i in range(at, at + 20)] for at in (0, 20, 40)]
    assert [len(set(places)) for places in rounds] == [20, 20, 20]
    assert rounds[0] != rounds[1]  # in another order


@pytest.mark.parametrize("buffer", [19, 20, 41, 1000])
def test_a_stream_may_have_fewer_rows_than_are_shuffled_together(sources, buffer):
    """Each round is a window, or two, and its documents are grouped with one another alone."""
    groups = []

    def as_they_are(documents):
        groups.append(len(documents))
        return documents

    rows = stream(sources, buffer=buffer, blocks=as_they_are)
    assert len({rows[i].place for i in range(20)}) == len({rows[i].place for i in range(20, 40)}) == 20
    assert groups == ([19, 1, 19, 1] if buffer == 19 else [20, 20])


def test_documents_of_which_none_makes_a_block_are_said_when_all_have_been_read(sources):
    for buffer in (3, 20, 1000):
        with pytest.raises(DataError, match="no document of it can be trained on"):
            stream(sources, buffer=buffer, blocks=lambda documents: [])[0]
        rare = stream(sources, buffer=buffer, blocks=lambda rows: [row for row in rows if "c/" in row.place])
        assert [rare[i].place.split("/")[-2] for i in range(3)] == ["c", "c", "c"]


def test_rows_are_shuffled_in_their_window_and_the_sources_take_turns(sources):
    rows = stream(sources, buffer=5)
    in_order = stream(sources, buffer=1)
    for at in range(0, 20, 5):
        places, ordered = ([some[i].place for i in range(at, at + 5)] for some in (rows, in_order))
        assert sorted(places) == sorted(ordered)
    assert [rows[i].place for i in range(5)] != [in_order[i].place for i in range(5)]
    turns = [in_order[i].place.split("/")[-2] for i in range(20)]
    assert "".join(turns) == "abc" + "ab" * 6 + "b" * 5


@pytest.mark.parametrize("buffer", [6, 20, 1000])
def test_a_stream_taken_up_at_any_item_goes_on_as_it_would_have(sources, buffer):
    straight = stream(sources, buffer=buffer)
    places = [straight[i] for i in range(100)]
    for item in (0, 5, 6, 17, 18, 19, 40, 59, 95):
        resumed = stream(sources, buffer=buffer)
        resumed.start_at(places[item].stream)
        assert [resumed[i].place for i in range(item, 100)] == [row.place for row in places[item:]]


def test_items_of_the_block_before_can_be_had_without_reading_again(sources):
    rows = stream(sources)
    later = rows[6].place
    turns = rows._turns
    assert rows[5].place == stream(sources)[5].place
    assert rows._turns is turns
    assert rows[6].place == later
    rows[30]
    assert rows[0].place == stream(sources)[0].place  # but two blocks back it begins again
    assert rows._turns is not turns


def test_a_stream_without_rows_says_so_also_when_they_have_gone(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [])
    source = SourceConfig(path=str(file))
    with pytest.raises(DataError, match="there is no row in it"):
        stream([source])[0]
    resumed = stream([source])
    resumed.start_at({"window": 0, "first": 0, "positions": [[0, 3]], "turn": 0})
    with pytest.raises(DataError, match="there is no row in it"):
        resumed[0]
