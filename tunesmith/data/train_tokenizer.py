"""A tokenizer learnt from a corpus: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in
GPT-2), with Qwen2's way of splitting text beforehand.

    sources --documents in turn--> every 100th held out, the others --BPE--> tokenizer folder
                                                     `--> bytes a token, beside a base tokenizer's

The result is a Qwen2Tokenizer: whatever lies beside a Qwen2 model is loaded as one by transformers 5, which
puts that class's own normaliser (NFC) and splitting in place of what tokenizer.json says. With these it is
the same tokenizer in every folder.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config import SourceConfig
from tunesmith.data.decode import decode
from tunesmith.data.formats import detect_format, read_record
from tunesmith.data.records import BadRow, Record
from tunesmith.data.sources import iter_rows
from tunesmith.data.templates import CHATML
from tunesmith.errors import ConfigError, DataError, ModelError

Say = Callable[[str], None]

# The end of a document, which is also the pad token (as in Qwen2.5's base models), and ChatML's two.
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFAULT_MAX_BYTES = 2**30
_NUM_BYTES = 256
_HOLD_OUT_EVERY = 100
_HELD_OUT_BYTES = 16 * 2**20
_MAX_ROW_BYTES = 64 * 2**20
_SAMPLE_ROWS = 32


@dataclass
class Corpus:
    """What was read. `held_out` are the documents that are not learnt from (as many as fit in 16 MiB)."""

    documents: int = 0
    num_bytes: int = 0
    bad_rows: int = 0
    is_cut: bool = False
    held_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizerReport:
    """What became of it: UTF-8 bytes of held-out text a token, None where no document was held out."""

    corpus: Corpus
    vocab_size: int
    bytes_per_token: float | None
    base_bytes_per_token: float | None


def train_tokenizer(
    sources: Sequence[str],
    *,
    vocab_size: int,
    out: Path,
    base: str | None = None,
    columns: Sequence[str] = (),
    max_bytes: int = DEFAULT_MAX_BYTES,
    say: Say = print,
) -> TokenizerReport:
    """Learn a tokenizer of `vocab_size` tokens (control tokens among them) and write it to `out`.

    `sources` are paths as in `data.train`; of several, documents are taken in turn, until there are
    `max_bytes` of text: what is held in memory is a count of the distinct words. `columns` are `name=ours`
    texts: columns to rename before the format is found. The same files give the same tokenizer.
    Raises ConfigError for arguments that cannot be, DataError for a corpus that is none or too small,
    ModelError if there is no tokenizer `base`."""
    least = _NUM_BYTES + len(CONTROL_TOKENS)
    if vocab_size < least:
        raise ConfigError(
            f"--vocab-size {vocab_size}: expected {least} or more ({_NUM_BYTES} bytes and "
            f"{len(CONTROL_TOKENS)} control tokens)."
        )
    if max_bytes < 1:
        raise ConfigError(f"--max-bytes {max_bytes}: expected 1 or more.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already. Name another folder, or remove it.")
    renamed = dict(_column(text) for text in columns)
    base_tokenizer = None if base is None else _load(base)
    corpus, opened = Corpus(), [_open(path, renamed, say) for path in sources]
    for name in renamed:
        if not any(name in source.columns for source in opened):
            raise ConfigError(
                f"--column {name}: {', '.join(sources)} have no such column in their first rows."
            )
    texts = _in_turn([_documents(source, corpus, say) for source in opened])
    tokenizer = _learn(_learnt_from(texts, corpus, max_bytes, say), vocab_size - len(CONTROL_TOKENS))
    if not corpus.num_bytes:
        raise DataError(f"{', '.join(sources)}: there is no text to learn from ({corpus.bad_rows} bad rows).")
    if len(tokenizer) < vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the text has pairs for only {len(tokenizer)} tokens. Use "
            f"--vocab-size {len(tokenizer)} or less, or more text."
        )
    tokenizer.save_pretrained(out)
    report = TokenizerReport(
        corpus,
        len(tokenizer),
        _bytes_per_token(tokenizer, corpus.held_out),
        None if base_tokenizer is None else _bytes_per_token(base_tokenizer, corpus.held_out),
    )
    _tell(report, base, out, say)
    return report


# --- text


def _column(text: str) -> tuple[str, str]:
    name, separator, ours = text.partition("=")
    if not (name and separator and ours):
        raise ConfigError(f"--column {text}: expected NAME=OURS, such as body=text.")
    return name, ours


def _open(path: str, renamed: Mapping[str, str], say: Say) -> SourceConfig:
    """The source with its format, found from its first rows, and those of the columns that they have."""
    sample, problems = [], []
    rows = iter_rows(SourceConfig(path=path), max_row_bytes=_MAX_ROW_BYTES)
    for row in itertools.islice(rows, _SAMPLE_ROWS):
        try:
            sample.append(decode(row))
        except BadRow as problem:
            problems.append(f"{row.place}: {problem}")
    if not sample:
        raise DataError("\n".join(problems) or f"{path}: there is no row in it.")
    columns = {name: ours for name, ours in renamed.items() if any(name in row for row in sample)}
    sample = [{columns.get(key, key): value for key, value in row.items()} for row in sample]
    found = detect_format(sample, path)
    say(f"{path}: format {found}, found from its first rows")
    return SourceConfig(path=path, format=found, columns=columns)


def _documents(source: SourceConfig, corpus: Corpus, say: Say) -> Iterator[list[str]]:
    """The texts of each row: of a conversation, what was said; bad rows are counted and passed over."""
    for row in iter_rows(source, max_row_bytes=_MAX_ROW_BYTES):
        try:
            record, _ = read_record(decode(row), source.format, source.columns)
        except BadRow as problem:
            if not corpus.bad_rows:
                say(f"warning: bad rows are passed over; the first is {row.place}: {problem}")
            corpus.bad_rows += 1
        else:
            yield _texts(record)


def _texts(record: Record) -> list[str]:
    said = [message["content"] for message in record.messages] if record.is_chat else []
    return [text for text in (*said, record.prompt, record.completion) if isinstance(text, str) and text]


def _in_turn(sources: list[Iterator[list[str]]]) -> Iterator[list[str]]:
    """A document of each source after another, of those that have some left."""
    while sources:
        left = []
        for source in sources:
            document = next(source, None)
            if document is not None:
                left.append(source)
                yield document
        sources = left


def _learnt_from(
    documents: Iterator[list[str]], corpus: Corpus, max_bytes: int, say: Say
) -> Iterator[list[str]]:
    """All but every 100th document, until there are `max_bytes`; `corpus` keeps the account."""
    told_at, held_out_bytes = time.monotonic(), 0
    for number, texts in enumerate(documents, start=1):
        size = sum(len(text.encode()) for text in texts)
        corpus.documents = number
        if number % _HOLD_OUT_EVERY == 0:
            if held_out_bytes + size <= _HELD_OUT_BYTES:
                corpus.held_out += texts
                held_out_bytes += size
            continue
        corpus.num_bytes += size
        yield texts
        if corpus.num_bytes >= max_bytes:
            corpus.is_cut = True
            return
        if time.monotonic() - told_at >= 10:
            told_at = time.monotonic()
            say(f"{corpus.num_bytes / 2**20:,.0f} MiB read")


# --- learning


def _learn(texts: Iterator[list[str]], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    shape = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair that was seen once says nothing of other text
        show_progress=False,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    vocab, merges = _parts(backend)
    end, *others = CONTROL_TOKENS
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        eos_token=end,
        pad_token=end,
        extra_special_tokens=others,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _parts(backend: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


# --- report


def _load(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"--base {name}: no tokenizer can be loaded from it: {line}") from error


def _bytes_per_token(tokenizer: Any, texts: Sequence[str]) -> float | None:
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    tokens = sum(map(len, ids))
    return sum(len(text.encode()) for text in texts) / tokens if tokens else None


def _tell(report: TokenizerReport, base: str | None, out: Path, say: Say) -> None:
    corpus, merges = report.corpus, report.vocab_size - _NUM_BYTES - len(CONTROL_TOKENS)
    say(
        f"learnt from {corpus.num_bytes:,} bytes of {corpus.documents:,} documents"
        + (", where --max-bytes ended it" if corpus.is_cut else "")
        + (f"; {corpus.bad_rows:,} bad rows passed over" if corpus.bad_rows else "")
    )
    say(
        f"{report.vocab_size:,} tokens: {_NUM_BYTES} bytes, {merges:,} pairs, {len(CONTROL_TOKENS)} control "
        f"tokens ({', '.join(CONTROL_TOKENS)})"
    )
    if report.bytes_per_token is None:
        say(f"under {_HOLD_OUT_EVERY} documents: no text is held out to measure on")
    else:
        compared = (
            "" if report.base_bytes_per_token is None else f"; {base}: {report.base_bytes_per_token:.3f}"
        )
        say(
            f"held-out text (every {_HOLD_OUT_EVERY}th document): {report.bytes_per_token:.3f} bytes a "
            f"token{compared}"
        )
    say(f"tokenizer: {out}")
