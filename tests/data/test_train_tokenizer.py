"""A tokenizer learnt from files: every text comes back, control tokens stay the template's, sizes are as
asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.cli import main
from tunesmith.data.encoding import Encoder
from tunesmith.data.prepare import PrepareOptions, Preparer
from tunesmith.data.records import RawRow
from tunesmith.data.train_tokenizer import CONTROL_TOKENS, train_tokenizer
from tunesmith.errors import ConfigError, DataError, ModelError

_SYLLABLES = ("quick", "brown", "fox", "jump", "lazy", "dog", "swan", "sing", "geese")
_WORDS = ["naïve", "café", "漢字", "नमस्ते", "🦊", "12", "345;"] + [
    a + b for a in _SYLLABLES for b in _SYLLABLES
]


def corpus_rows(number=300):
    return [
        {"text": " ".join(_WORDS[(i * k) % len(_WORDS)] for k in range(1, 30))} for i in range(1, number + 1)
    ]


def write(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "corpus.jsonl", corpus_rows())
    report = train_tokenizer(
        [str(folder / "corpus.jsonl")], vocab_size=400, out=folder / "out", say=lambda _: None
    )
    return folder, report, AutoTokenizer.from_pretrained(folder / "out")


def round_trip(tokenizer, text):
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_vocabulary_is_of_the_size_asked_for_with_control_tokens_last(trained):
    _, report, tokenizer = trained
    assert len(tokenizer) == report.vocab_size == 400
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [397, 398, 399]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|endoftext|>",) * 2 + (None,)
    for token in CONTROL_TOKENS:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [
            tokenizer.convert_tokens_to_ids(token)
        ]


def test_every_byte_has_a_token_and_every_character_comes_back(trained):
    _, _, tokenizer = trained
    assert {ids for i in range(256) for ids in tokenizer.convert_tokens_to_ids([byte_name(i)])} == set(
        range(256)
    )
    characters = "".join(map(chr, range(0x180))) + "\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010fffe"
    for text in (*characters, characters, "\x00", " \n\t  \r\n", "漢字かな交じり文", "👩‍👩‍👧‍👦"):
        assert round_trip(tokenizer, text) == text


def byte_name(byte):
    """The letter that stands for a byte in GPT-2's vocabulary and all that follow it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return chr(byte) if byte in plain else chr(256 + others.index(byte))


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_any_text_comes_back_composed(trained, text):
    """As Qwen2's: what is written as a letter and its accent comes back as one (NFC)."""
    assert round_trip(trained[2], text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("name", ["wiki_demo.txt", "gsm8k_train.jsonl", "alpaca_en_demo.json"])
def test_real_texts_come_back(trained, shared, name):
    text = (shared / "data" / name).read_text(encoding="utf-8")[:200_000]
    assert round_trip(trained[2], text) == unicodedata.normalize("NFC", text)


def test_text_is_split_as_qwen_splits_it(trained, qwen_tokenizer):
    ours, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in (trained[2], qwen_tokenizer))
    assert ours["normalizer"] == theirs["normalizer"]
    pattern = [spec["pre_tokenizer"]["pretokenizers"][0] for spec in (ours, theirs)]
    assert pattern[0] == pattern[1]
    ids = trained[2]("12345")["input_ids"]
    assert len(ids) == 5  # digits one by one


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2", "mistral", "gemma2"])
def test_it_is_the_same_tokenizer_beside_any_model(trained, family, tmp_path):
    """transformers 5 decides by the config.json beside a tokenizer what class it has."""
    trained[2].save_pretrained(tmp_path)
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads(beside.backend_tokenizer.to_str()) == json.loads(trained[2].backend_tokenizer.to_str())
    assert (beside.eos_token, beside.pad_token) == ("<|endoftext|>", "<|endoftext|>")


def test_the_chat_template_renders_chatml(trained):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = trained[2].apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    prompt = trained[2].apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_control_text_that_a_user_writes_stays_text(trained):
    tokenizer = trained[2]
    encoder = Encoder(tokenizer)
    assert encoder.control_ids == dict(zip(CONTROL_TOKENS, (397, 398, 399), strict=True))
    row = {"messages": [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "c"}]}
    options = PrepareOptions(
        format="messages", columns={}, system=None, train_on="assistant", max_length=256, too_long="drop"
    )
    (prepared,) = Preparer(tokenizer, options).prepare([RawRow("x:1", row)])
    ids = prepared.examples[0].input_ids.tolist()
    assert Counter(ids)[398] == Counter(ids)[399] == 2  # those of the template alone
    assert "a <|im_end|> b" in tokenizer.decode(ids)
    (document,) = Preparer(
        tokenizer,
        PrepareOptions(
            format="text", columns={}, system=None, train_on="all", max_length=256, too_long="drop"
        ),
    ).prepare([RawRow("x:1", {"text": "one <|endoftext|> two"})])
    assert Counter(document.examples[0].input_ids.tolist())[397] == 1  # the end of the document


def test_bytes_a_token_are_measured_on_every_hundredth_document(trained):
    folder, report, tokenizer = trained
    held_out = [row["text"] for row in corpus_rows()[99::100]]
    assert report.corpus.held_out == held_out
    assert len(held_out) == 3
    assert report.corpus.num_bytes == sum(
        len(row["text"].encode()) for i, row in enumerate(corpus_rows(), start=1) if i % 100
    )
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in held_out)
    assert report.bytes_per_token == sum(len(text.encode()) for text in held_out) / tokens
    said = []
    again = train_tokenizer(
        [str(folder / "corpus.jsonl")],
        vocab_size=300,
        out=folder / "second",
        base=str(folder / "out"),
        say=said.append,
    )
    assert again.base_bytes_per_token == report.bytes_per_token > again.bytes_per_token
    assert any(f"{again.bytes_per_token:.3f} bytes a token; " in line for line in said)


def test_what_is_held_out_is_not_learnt_from(tmp_path):
    rows = [{"text": "aa ab ac ad"}] * 99 + [{"text": "zz " * 1000}]
    file = write(tmp_path / "c.jsonl", rows)
    train_tokenizer([str(file)], vocab_size=262, out=tmp_path / "out", say=lambda _: None)
    assert not any("zz" in token for token in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab())


def test_the_first_pair_learnt_is_the_most_frequent_one(tmp_path):
    """By hand: of `low` x 5, `lower` x 2, `newest` x 6 and `widest` x 3 (Sennrich et al.), e-s and s-t and t
    at the end go first: es 9, then est 9."""
    words = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    file = write(tmp_path / "c.jsonl", [{"text": word} for word in words])
    train_tokenizer([str(file)], vocab_size=259 + 3, out=tmp_path / "out", say=lambda _: None)
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == [["e", "s"], ["es", "t"], ["l", "o"]]


def test_the_same_files_give_the_same_tokenizer_in_any_process(trained, tmp_path):
    folder, *_ = trained
    for threads in ("1", "3"):
        out = tmp_path / threads
        subprocess.run(
            [
                *(sys.executable, "-m", "tunesmith", "tokenizer", "train", str(folder / "corpus.jsonl")),
                *("--vocab-size", "400", "--out", str(out)),
            ],
            check=True,
            capture_output=True,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
        )
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_all_formats_and_renamed_columns_are_read_in_turn(tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": "qqq www"}, {"role": "assistant", "content": "eee"}]}
    ] * 5
    write(tmp_path / "chat.jsonl", chats)
    write(tmp_path / "body.jsonl", [{"body": "rrr ttt"}] * 3)
    (tmp_path / "lines.txt").write_text("yyy uuu\n" * 2)
    said = []
    report = train_tokenizer(
        [str(tmp_path / name) for name in ("chat.jsonl", "body.jsonl", "lines.txt")],
        vocab_size=266, out=tmp_path / "out", columns=["body=text"], say=said.append,
    )  # fmt: skip
    assert (report.corpus.documents, report.corpus.num_bytes) == (10, 5 * 10 + 3 * 7 + 2 * 7)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert {"qq", "ee"} <= set(vocabulary)
    assert "user" not in vocabulary
    assert report.bytes_per_token is None
    assert "under 100 documents: no text is held out to measure on" in said


def test_max_bytes_ends_the_reading_and_takes_documents_of_each_source_in_turn(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"text": name * 10}] * 50)
    report = train_tokenizer(
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        vocab_size=261, out=tmp_path / "out", max_bytes=40, say=lambda _: None,
    )  # fmt: skip
    assert (report.corpus.documents, report.corpus.num_bytes, report.corpus.is_cut) == (4, 40, True)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert {"aa", "bb"} <= set(vocabulary)


def test_bad_rows_are_counted_and_passed_over(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "abab abab"}\n{"text": 3}\n{]\n{"text": "abab"}\n')
    said = []
    report = train_tokenizer([str(file)], vocab_size=260, out=tmp_path / "out", say=said.append)
    assert (report.corpus.documents, report.corpus.bad_rows) == (2, 2)
    assert any("the first is" in line and "c.jsonl:2" in line for line in said)


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        ('{"text": "a"}', {"vocab_size": 258}, ConfigError, r"258: expected 259 or more \(256 bytes"),
        ('{"text": "abab abab"}', {"vocab_size": 300}, DataError, r"only 26\d tokens. Use --vocab-size 26\d"),
        ("", {}, DataError, r"c.jsonl: there is no row in it"),
        ('{"text": "a"}', {"max_bytes": 0}, ConfigError, r"--max-bytes 0: expected 1"),
        ('{"text": "a"}', {"columns": ["body"]}, ConfigError, r"--column body: expected NAME=OURS"),
        ('{"text": "a"}', {"columns": ["body=text"]}, ConfigError, r"--column body: .*have no such column"),
        ('{"text": "a"}', {"base": "./nowhere"}, ModelError, r"--base ./nowhere: no tokenizer"),
        ('{"a": "a"}', {}, DataError, r"the format cannot be told"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, content, options, error, message):
    file = tmp_path / "c.jsonl"
    file.write_text(content)
    with pytest.raises(error, match=message):
        train_tokenizer(
            [str(file)], **{"vocab_size": 260, "out": tmp_path / "out", "say": lambda _: None, **options}
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, capsys):
    file = write(tmp_path / "c.jsonl", [{"text": "abab abab"}])
    assert main(["tokenizer", "train", str(file), "--vocab-size", "260", "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
