"""FSDP2, ZeRO-2 and ZeRO-3 on two processes over gloo: the losses of one process, artefacts that stock
libraries load, and runs that are killed and end with the same bits, by the same strategy or another."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from crash.harness import Driver, difference, scenario_config
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from tiny import conversations, make_tiny_model, write_rows
from transformers import AutoModelForCausalLM

from tunesmith.config import load_config
from tunesmith.errors import ConfigError
from tunesmith.training.run_folder import read_metrics

STRATEGIES = ["fsdp", "zero2", "zero3"]
METHODS = ["lora", "none"]
# Which are killed in `make test`: each strategy once. The others are, too, by `make test-long`.
_KILLED = {("fsdp", "none", "sft"), ("zero2", "lora", "sft"), ("zero3", "none", "sft")}
_NO_DROPOUT = {"lora": {"method": "lora", "r": 4, "alpha": 8, "dropout": 0.0}, "none": {"method": "none"}}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs tunesmith[deepspeed]"
)


def each(strategies: list[str]) -> list:
    return [pytest.param(s, marks=needs_deepspeed if s.startswith("zero") else ()) for s in strategies]


def killed() -> list:
    cases = itertools.product(STRATEGIES, METHODS, ["sft", "pretrain"])
    marks = {
        case: [needs_deepspeed] * case[0].startswith("zero") + [pytest.mark.long] * (case not in _KILLED)
        for case in cases
    }
    return [pytest.param(*case, marks=marks[case]) for case in marks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


def config_of(folder: Path, name: str, strategy: str, method: str, recipe: str = "sft", **sections) -> dict:
    learning_rate = 1e-2 if method == "lora" else 1e-3
    config = scenario_config(
        {"adapter": _NO_DROPOUT[method], "train": {"learning_rate": learning_rate}}, folder
    )
    config["distributed"] = {"strategy": strategy}
    config["eval"] |= {"stop_rate_rows": 0 if method == "none" else 2}  # answers of a shared model take long
    config["run"] |= {"name": name, "recipe": recipe}
    if recipe == "pretrain":
        for part, rows in (("train", 90), ("valid", 12)):
            texts = [
                f"{i}. " + " ".join(m["content"] for m in row["messages"])
                for i, row in enumerate(conversations(rows))
            ]
            config["data"][part] = str(
                write_rows(folder / f"{part}-texts.jsonl", [{"text": text} for text in texts])
            )
        config["data"]["max_length"] = 128
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    return config


def train(driver: Driver, config: dict, ranks: int, **kill) -> Path:
    run = Path(config["run"]["output_dir"]) / config["run"]["name"]
    run.parent.mkdir(exist_ok=True)
    ended = driver.run(config, run.with_suffix(".log"), ranks=ranks, **kill)
    if not kill:
        assert ended.statuses == [0] * ranks, run.with_suffix(".log").read_text()[-3000:]
    return run


@pytest.fixture(scope="module")
def alone(driver: Driver, folder: Path):
    """(method, recipe) -> the run of one process."""
    runs: dict[tuple[str, str], Path] = {}

    def get(method: str, recipe: str = "sft") -> Path:
        if (method, recipe) not in runs:
            config = config_of(folder, f"alone-{method}-{recipe}", "ddp", method, recipe)
            runs[method, recipe] = train(driver, config, 1)
        return runs[method, recipe]

    return get


@pytest.fixture(scope="module")
def straight(driver: Driver, folder: Path):
    """(strategy, method, recipe) -> the run of two processes that nothing happened to."""
    runs: dict[tuple[str, str, str], Path] = {}

    def get(strategy: str, method: str, recipe: str = "sft") -> Path:
        key = strategy, method, recipe
        if key not in runs:
            runs[key] = train(driver, config_of(folder, "-".join(key), *key), 2)
        return runs[key]

    return get


def assert_same_course(one: Path, other: Path, rel: float) -> None:
    first, second = read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "learning_rate", "rows", "tokens", "target_tokens"):
            assert (key in a) == (key in b)
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=rel), (a["step"], key)


def logits_of(final: Path, method: str) -> torch.Tensor:
    kind = AutoPeftModelForCausalLM if method == "lora" else AutoModelForCausalLM
    model = kind.from_pretrained(final, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(1, 60)[None]).logits


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("lora", "sft"),
        ("none", "sft"),
        ("none", "pretrain"),
        pytest.param("lora", "pretrain", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("strategy", each(["ddp", *STRATEGIES]))
def test_a_run_has_the_losses_of_one_process_and_makes_the_same_model(
    alone, straight, strategy: str, method: str, recipe: str
) -> None:
    """Sums over ranks are added in another order than within one: 1e-5 is 80 times the last place of fp32."""
    run = straight(strategy, method, recipe)
    assert len(read_metrics(run / "metrics.jsonl")) >= 12
    assert_same_course(alone(method, recipe), run, rel=1e-5)
    expected = logits_of(alone(method, recipe) / "final", method)
    assert torch.allclose(logits_of(run / "final", method), expected, atol=1e-3 * float(expected.std()))


@pytest.mark.parametrize("strategy", each(["fsdp", "zero3"]))
def test_a_head_of_its_own_is_trained_in_full(driver: Driver, folder: Path, strategy: str) -> None:
    """One that is tied to the embedding is put together for that; this one only for what it gave."""
    untied = folder / "untied"
    untied.mkdir(exist_ok=True)
    if not (untied / "model").exists():
        make_tiny_model(untied / "model", "mistral")
        for name in ("train.jsonl", "valid.jsonl"):
            write_rows(untied / name, conversations(22 if name == "train.jsonl" else 6))
        train(driver, config_of(untied, "alone", "ddp", "none"), 1)
    run = train(driver, config_of(untied, strategy, strategy, "none"), 2)
    assert_same_course(untied / "runs" / "alone", run, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", each(["fsdp", "zero3"]))
def test_a_rank_holds_its_share_of_the_weights(straight, strategy: str, method: str) -> None:
    """Counted where they are held: an engine that does not share out trains the same model."""
    log = straight(strategy, method).with_suffix(".log").read_text()
    held, total = map(
        lambda number: int(number.replace(",", "")),
        re.search(rf"{strategy} over 2 processes: this one holds ([\d,]+) of ([\d,]+) weights", log).groups(),
    )
    # DeepSpeed keeps what is smaller than its threshold whole only while it is in use.
    assert 0.45 * total <= held <= 0.6 * total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", each(STRATEGIES))
def test_each_rank_writes_its_share_of_a_checkpoint(straight, strategy: str, method: str) -> None:
    checkpoint = straight(strategy, method) / "checkpoints" / "step-000012"
    parts = sorted(checkpoint.glob("optimizer-*.safetensors"))
    assert [part.name for part in parts] == [f"optimizer-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sizes = [part.stat().st_size for part in parts]
    assert max(sizes) < 0.75 * sum(sizes)
    assert json.loads((checkpoint / "manifest.json").read_text())["shards"] == 2
    if method == "none":
        whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
        with safe_open(straight(strategy, method) / "final" / "model.safetensors", "pt") as final:
            for name in final.keys():  # noqa: SIM118
                assert torch.equal(final.get_tensor(name), whole[name])


@pytest.mark.parametrize(("strategy", "method", "recipe"), killed())
def test_a_run_killed_between_checkpoints_ends_with_the_same_bits(
    driver: Driver, folder: Path, straight, strategy: str, method: str, recipe: str
) -> None:
    config = config_of(folder / "killed", f"{strategy}-{method}-{recipe}", strategy, method, recipe)
    run = train(driver, config, 2, kill_before=["rows", "step 8"])
    assert not (run / "final").exists()
    assert (run / "checkpoints" / "step-000006").is_dir()
    train(driver, config, 2)
    assert difference(straight(strategy, method, recipe), run) is None


@pytest.mark.parametrize(
    ("method", "first", "ranks", "then", "ranks_then"),
    [
        ("none", "fsdp", 2, "ddp", 1),
        pytest.param("none", "zero3", 2, "fsdp", 2, marks=needs_deepspeed),
        pytest.param("lora", "ddp", 1, "zero3", 2, marks=needs_deepspeed),
        pytest.param("none", "ddp", 1, "zero2", 2, marks=needs_deepspeed),
    ],
)
def test_a_checkpoint_of_one_strategy_is_gone_on_with_by_another(
    driver: Driver, folder: Path, alone, method: str, first: str, ranks: int, then: str, ranks_then: int
) -> None:
    name = f"{first}-{then}-{method}"
    config = config_of(folder / "other", name, first, method)
    train(driver, config, ranks, kill_before=["rows", "step 8"])
    run = train(driver, config | {"distributed": {"strategy": then}}, ranks_then)
    assert_same_course(alone(method), run, rel=1e-5)


@needs_deepspeed
def test_a_deepspeed_config_is_taken_as_it_is(driver: Driver, folder: Path, alone) -> None:
    """Its "auto" are filled in; AdamW decays alike, since nothing decays here."""
    engine = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 100,
    }
    file = folder / "ds_config.json"
    file.write_text(json.dumps(engine))
    config = config_of(folder, "json", "zero2", "none", distributed={"config": str(file)})
    assert_same_course(alone("none"), train(driver, config, 2), rel=1e-5)


def test_a_step_left_out_is_left_out_by_every_rank(driver: Driver, folder: Path) -> None:
    # A rate at which nothing is learned: half of the steps are above the median of those before.
    still = {"epochs": 4, "learning_rate": 1e-9, "on_bad_step": "skip", "spike_factor": 1.0000001}
    config = config_of(folder, "spikes", "fsdp", "none", train=still)
    run = train(driver, config, 2)
    lines = read_metrics(run / "metrics.jsonl")
    skipped = [line["step"] for line in lines if "skipped" in line]
    assert skipped
    bad = json.loads((run / "bad_step.json").read_text())["steps"]
    assert [step["step"] for step in bad] == skipped
    counted = {line["step"]: line["loss"] for line in lines if "loss" in line and line["step"] not in skipped}
    for step in bad:  # over the median of those before it that counted, and no other step was
        assert step["loss"] > statistics.median(loss for at, loss in counted.items() if at < step["step"])
    for at, loss in list(counted.items())[16:]:
        assert loss <= 1.0000001 * statistics.median(
            other for before, other in counted.items() if before < at
        )
    assert {row["rank"] for row in bad[0]["rows"]} == {0, 1}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"distributed": {"strategy": "zero2", "offload": "all"}}, "zero2 none and optimizer"),
        ({"distributed": {"strategy": "zero3"}, "model": {"quantization": "nf4"}}, "Use ddp or zero2"),
        ({"distributed": {"strategy": "fsdp"}, "train": {"optimizer": "adafactor"}}, "Set it to adamw"),
        ({"distributed": {"strategy": "zero2"}, "train": {"on_bad_step": "skip"}}, "Set it to stop"),
        ({"distributed": {"strategy": "ddp", "offload": "all"}}, "ddp none"),
        ({"distributed": {"strategy": "ddp", "config": {"a": 1}}}, "nothing reads it"),
    ],
)
def test_what_a_strategy_cannot_do_is_said_with_what_to_use(run_config, sections, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(run_config(**sections), [])
