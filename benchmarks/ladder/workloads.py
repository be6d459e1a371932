"""The workloads: real rows as token ids and targets, written to one file that every rung reads.

    a      alpaca_en_demo: short answers, the template's own system prompt
    b      gsm8k_train under one shared system prompt of about 600 tokens
    c      pairs of dpo_en_demo, each answer at most 1,024 tokens with its prompt
    d0.5   Qwen2.5-0.5B's shape with random weights, conversations of alpaca rows cut at 512 tokens
    d1.5   the same in Qwen2.5-1.5B's shape

Ids, targets and the rows of each step are tunesmith's own: encoded, ordered and cut as `tunesmith sft` and
`tunesmith prefer` do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.config import Config, load_config
from tunesmith.data.loading import load_data
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.data.rows import AnswerRows
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.models.demo import default_demo_directory
from tunesmith.packing.plan import RowSource, StepPlan, make_plan
from tunesmith.packing.sharing import Sharing

CACHE = default_demo_directory().parents[1] / "benchmarks"
SHARED = Path(__file__).parents[2].parent / "shared"
_LONGEST_ANSWER = 1024  # tokens of a prompt with one of its answers, workload c


@dataclass(frozen=True)
class Setting:
    """A workload's defaults: rows (pairs) of a step, steps of a run, longest row, and tokens of a pack in the
    rungs that have packs (what tunesmith chooses on this machine, and is left to choose in its rung)."""

    rows_per_step: int
    steps: int
    max_length: int
    pack_tokens: int


SETTINGS = {
    "a": Setting(32, 6, 1536, 1536),
    "b": Setting(16, 3, 1536, 3072),
    "c": Setting(8, 3, _LONGEST_ANSWER, 2 * _LONGEST_ANSWER),
    "d0.5": Setting(8, 4, 512, 1536),
    "d1.5": Setting(4, 3, 512, 1536),
}
# The published configs; what is not named is transformers' default for Qwen2.
_QWEN = {
    "d0.5": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "d1.5": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}


@dataclass
class Workload:
    """What a run trains on.

    config: the tunesmith config of the same run. steps: the indices of the rows of each optimiser step, in
    the order of the plan. rows: index -> the row as token ids,

        text       {"input_ids", "targets"} with a 0 or 1 a token
        pairs      {"prompt", "chosen", "rejected"}
        labelled   {"prompt", "completion", "mismatched", "label"}, mismatched being another row's completion

    lengths: tokens of every row of the data set, from which the plan is made. flops_per_token,
    flops_per_target: of a training step."""

    name: str
    kind: Literal["text", "pairs", "labelled"]
    config: dict[str, Any]
    steps: list[list[int]]
    rows: dict[int, dict[str, Any]]
    lengths: list[int]
    flops_per_token: float
    flops_per_target: float

    @property
    def is_pairs(self) -> bool:
        return self.kind == "pairs"

    def tokens(self, index: int) -> int:
        """Tokens of a row as a plain script runs it: each answer with a prompt of its own."""
        row = self.rows[index]
        if self.kind == "text":
            return len(row["input_ids"])
        return len(self.answers(index)) * len(row["prompt"]) + self.targets(index)

    def targets(self, index: int) -> int:
        if self.kind == "text":
            return sum(self.rows[index]["targets"])
        return sum(map(len, self.answers(index)))

    def answers(self, index: int) -> list[list[int]]:
        """What the row has beside its prompt: chosen before rejected."""
        row = self.rows[index]
        return [row[name] for name in ("chosen", "rejected", "completion") if name in row]

    def plan(self, lengths: NDArray[np.int32] | None = None, sharing: Sharing | None = None) -> StepPlan:
        """The step plan of these rows, the same that tunesmith makes of the config. `lengths`: tokens that
        each row computes, if they are not those of the rows."""
        if lengths is None:
            lengths = np.asarray(self.lengths, dtype=np.int32)
        return _plan(load_config(self.config), lengths, self.pack_tokens, sharing)

    @property
    def pack_tokens(self) -> int:
        """Most tokens of a pack."""
        return load_config(self.config).train.micro_batch_tokens or SETTINGS[self.name].pack_tokens

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Workload:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["rows"] = {int(index): row for index, row in content["rows"].items()}
        return cls(**content)


def prepare(
    name: str,
    folder: Path,
    *,
    steps: int | None = None,
    rows_per_step: int | None = None,
    pack_tokens: int | None = None,
    model: Path | None = None,
    data: Path = SHARED / "data",
) -> Workload:
    """Make a workload; `folder` takes the files that are written for it. `model` stands in for its own."""
    setting = SETTINGS[name]
    values = {
        "run": {"name": "ladder", "output_dir": str(folder / "runs"), "seed": 42},
        "model": {"path": str(model or model_of(name))},
        "adapter": {"r": 8, "alpha": 16, "dropout": 0.0},
        "data": {"max_length": setting.max_length} | _data(name, folder, data),
        "train": {
            "max_steps": steps or setting.steps,
            "batch_size": rows_per_step or setting.rows_per_step,
            "micro_batch_tokens": pack_tokens,
            "learning_rate": 2e-4,
            "schedule": "constant",
            "warmup": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        },
        "checkpoint": {"every_steps": 10**6},
    }
    if name == "c":
        values["prefer"] = {"method": "dpo", "beta": 0.1}
    return of_config(name, load_config(values, recipe="prefer" if name == "c" else None))


def of_config(name: str, config: Config) -> Workload:
    """The rows of the steps that a run of this config trains."""
    train = load_data(config, load_tokenizer(config)).train
    rows, lengths = train.rows, train.lengths.astype(np.int32)
    assert len(train.row_starts) == len(lengths) + 1, "a row that became several examples"
    # Which rows a step holds does not depend on the size of passes.
    order = _plan(config, lengths, int(lengths.max())).rows_of_epoch(0).tolist()
    size = config.train.batch_size
    wanted = [order[step * size : (step + 1) * size] for step in range(config.train.max_steps or 0)]
    if not all(len(step) == size for step in wanted):
        raise ValueError(f"workload {name} has {len(order)} rows, too few for {len(wanted)} steps of {size}")
    kind: Literal["text", "pairs", "labelled"] = "text"
    as_lists = _text
    if isinstance(rows, AnswerRows):
        kind, as_lists = ("labelled", _labelled) if rows.is_mismatched else ("pairs", _pair)
    cost = _cost(config)
    return Workload(
        name,
        kind,
        config.model_dump(mode="json", exclude_unset=True),
        wanted,
        {index: as_lists(rows[index]) for step in wanted for index in step},
        lengths.tolist(),
        *cost,
    )


def _plan(
    config: Config, lengths: NDArray[np.int32], pack_tokens: int, sharing: Sharing | None = None
) -> StepPlan:
    return make_plan(
        lengths,
        np.arange(len(lengths) + 1, dtype=np.int64),
        sources=[RowSource(0, len(lengths))],
        batch_size=config.train.batch_size,
        micro_batch_tokens=pack_tokens,
        num_ranks=1,
        seed=config.run.seed,
        epochs=None,
        max_steps=config.train.max_steps,
        one_example_a_pass=False,
        sharing=sharing,
    )


def _text(row: PreparedRow) -> dict[str, Any]:
    (example,) = row.examples
    targets = (example.token_weights() > 0).astype(int)
    return {"input_ids": example.input_ids.tolist(), "targets": targets.tolist()}


def _pair(row: PreparedRow) -> dict[str, Any]:
    (prompt, chosen), (_, rejected) = map(_prompt_and_answer, row.examples)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _labelled(row: PreparedRow) -> dict[str, Any]:
    assert row.mismatched is not None
    ((prompt, completion),) = map(_prompt_and_answer, row.examples)
    ((_, mismatched),) = map(_prompt_and_answer, row.mismatched.examples)
    is_desirable = row.examples[0].side == 0
    return {"prompt": prompt, "completion": completion, "mismatched": mismatched, "label": is_desirable}


def _prompt_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """Tokens before the answer, and those of the answer, which must be one piece."""
    ((start, end),) = example.spans.tolist()
    ids = example.input_ids.tolist()
    return ids[:start], ids[start:end]


def _cost(config: Config) -> tuple[float, float]:
    """FLOPs of training by token and by target, from the model's shapes alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.models.adapt import adapt_model
    from tunesmith.models.cost import training_cost

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.path))
        cost = training_cost(adapt_model(model, config, None))
    return cost.per_token, cost.per_target


# --- rows


def _data(name: str, folder: Path, data: Path) -> dict[str, Any]:
    """The config's section `data`."""
    alpaca = data / "alpaca_en_demo.json"
    if name == "a":
        return {"train": str(alpaca)}
    if name == "c":
        return {"train": str(data / "dpo_en_demo.json")}
    if name == "b":
        prompt = Path(__file__).with_name("math_prompt.txt").read_text(encoding="utf-8").strip()
        columns = {"question": "instruction", "answer": "output"}
        return {
            "train": str(data / "gsm8k_train.jsonl"),
            "format": "alpaca",
            "columns": columns,
            "system": prompt,
        }
    file = folder / "conversations.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for messages in _conversations(json.loads(alpaca.read_text(encoding="utf-8"))):
            stream.write(json.dumps({"messages": messages}) + "\n")
    return {"train": str(file), "too_long": "truncate"}


def _conversations(rows: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Exchanges put together until the conversation has 3,500 characters, certainly more than 512 tokens."""
    messages: list[dict[str, str]] = []
    size = 0
    for row in rows:
        question = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        size += len(question) + len(row["output"])
        if size >= 3500:
            yield messages
            messages, size = [], 0


# --- models


def model_of(name: str) -> Path:
    """The model of a workload: the demo model, or Qwen2.5's shape."""
    if name in _QWEN:
        return random_qwen(CACHE / f"qwen2.5-{name[1:]}b-random", _QWEN[name])
    folder = default_demo_directory()
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: no demo model there; make it with `tunesmith demo-model`")
    return folder


def random_qwen(folder: Path, shape: dict[str, int]) -> Path:
    """A Qwen2.5 model of this shape with random bf16 weights and the real tokenizer, made once."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    if (folder / "tokenizer.json").is_file():
        return folder
    config = Qwen2Config(
        **shape,
        vocab_size=151936,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight_name, parameter in model.named_parameters():
            if "norm" in weight_name:
                parameter.fill_(1.0)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                parameter.normal_(0, 0.02, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    model.tie_weights()
    model.save_pretrained(folder)
    for file in (SHARED / "models" / "qwen2.5-tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder
