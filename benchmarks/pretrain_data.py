"""Preparing a corpus for pretraining: tokens/s and memory, beside the way the tutorials write it.

    python -m benchmarks.pretrain_data TOKENIZER [--gigabytes 0.2] [--texts FOLDER]

Writes a jsonl of documents of the size asked for (seeded; 200 to 20,000 characters each, most of them short),
made of the text files in FOLDER (.txt, .json, .jsonl: what strings they hold) or, without, of words. Then

    ours       data.loading cached, packing flat: split, tokenised, cached, grouped by best fit
    tutorial   datasets.load_dataset("json"), map(tokenize, batched, num_proc), map(group_texts, batched,
               num_proc), as transformers' run_clm.py has it

each in a process of its own with an empty cache, and prints one JSON object. Memory is sampled twice a
second: the resident memory of the process, and of it and its workers together with pages that they share
counted once (PSS). cpu_s, over all processes and with their imports, says the same as seconds on a machine
that does nothing else, and is steadier on one that does. Linux, since memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.prepare import _WORDS, PeakMemory

BLOCK = 1024  # tokens


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def material(folder: Path | None) -> str:
    """Text to cut documents from."""
    texts: list[str] = []
    for file in sorted(folder.iterdir()) if folder else ():
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            texts.append(content)
        elif file.suffix == ".json":
            texts += strings(json.loads(content))
        elif file.suffix == ".jsonl":
            texts += (text for line in content.splitlines() for text in strings(json.loads(line)))
    rng = random.Random(1)
    return "\n".join(texts) or " ".join(rng.choices(_WORDS, k=1_000_000))


def write_corpus(file: Path, size: int, text: str) -> int:
    """Write at least `size` bytes of documents, no two alike; returns how many."""
    rng = random.Random(0)
    words, documents, written = text.split(" "), 0, 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            left = min(20_000, round(200 * rng.paretovariate(0.8)))
            parts = []
            while left > 0:  # paragraphs from anywhere, so that no long stretch comes twice
                at = rng.randrange(len(words))
                parts.append(" ".join(words[at : at + rng.randint(20, 120)]))
                left -= len(parts[-1])
            written += stream.write(json.dumps({"text": "\n".join(parts)}) + "\n")
            documents += 1
    return documents


def ours(file: Path, tokenizer: str, workers: int, cache: Path) -> dict[str, Any]:
    from tunesmith.config import load_config
    from tunesmith.data.loading import load_data
    from tunesmith.data.tokenizer import load_tokenizer

    config = load_config(
        {
            "model": {"path": tokenizer},
            "data": {
                "train": str(file),
                "format": "text",
                "max_length": BLOCK,
                "cache_dir": str(cache),
                "workers": workers,
            },
        },
        recipe="pretrain",
    )
    data = load_data(config, load_tokenizer(config))
    (report,) = data.train.reports
    return {
        "documents": report.rows_kept,
        "tokens": report.tokens,
        "blocks": data.train.num_rows,
        "fill": round(data.train.fill or 0, 5),
        "documents_cut": report.rows_split,
    }


def tutorial(file: Path, tokenizer_name: str, workers: int, cache: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer([text + tokenizer.eos_token for text in examples["text"]])

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        from itertools import chain

        joined = {key: list(chain(*lists)) for key, lists in examples.items()}
        length = len(joined["input_ids"]) // BLOCK * BLOCK
        result = {
            key: [tokens[at : at + BLOCK] for at in range(0, length, BLOCK)] for key, tokens in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    tokens = rows.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    blocks = tokens.map(group_texts, batched=True, num_proc=workers)
    return {"documents": len(rows), "tokens": len(blocks) * BLOCK, "blocks": len(blocks)}


def measure(way: str, file: Path, tokenizer: str, workers: int) -> dict[str, Any]:
    """One way, in this process, with a cache of its own."""
    import datasets  # noqa: F401  # both ways need them; what an import takes is no part of the comparison
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory(dir=file.parent) as cache, PeakMemory() as memory:
        start = time.perf_counter()
        result = (ours if way == "ours" else tutorial)(file, tokenizer, workers, Path(cache))
        seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return result | {
        "seconds": round(seconds, 1),
        "cpu_s": round(sum(each.ru_utime + each.ru_stime for each in used), 1),
        "tokens_per_s": round(result["tokens"] / seconds),
        "peak_gib": {
            "this process": round(memory.own / 2**30, 3),
            "together, shared pages once": round(memory.proportional / 2**30, 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", help="folder or hub id")
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--texts", type=Path, help="folder of texts to make documents of")
    parser.add_argument("--only", choices=["ours", "tutorial"])
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, file = options.measure
        print(json.dumps(measure(way, Path(file), options.tokenizer, options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "corpus.jsonl")
        documents = write_corpus(file, round(options.gigabytes * 1e9), material(options.texts))
        result: dict[str, Any] = {"bytes": file.stat().st_size, "documents": documents}
        for way in ["ours", "tutorial"] if options.only is None else [options.only]:
            command = [sys.executable, "-m", "benchmarks.pretrain_data", options.tokenizer]
            command += ["--workers", str(options.workers), "--measure", way, str(file)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result[way] = json.loads(said.splitlines()[-1])
        if options.only is None:
            result["ratio"] = round(result["ours"]["tokens_per_s"] / result["tutorial"]["tokens_per_s"], 2)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
