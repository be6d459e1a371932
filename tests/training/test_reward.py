"""A reward model against stock transformers and PEFT, which are given each answer as a row of its own.

Tolerances: float32 sums in another order; over several steps AdamW lets rounding grow.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from crash.harness import scenario_config
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny import conversations, tiny_tokenizer, write_rows
from torch.nn.functional import logsigmoid
from training.test_equivalence import losses_of
from training.test_resume import metrics_without_times, same_files, stop_after
from training.test_strategies import assert_same_course, each, train
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_scheduler,
    set_seed,
)

import tunesmith
from tunesmith.artifacts import merged_weights
from tunesmith.artifacts.found import find_model
from tunesmith.artifacts.merge import merge
from tunesmith.artifacts.tuned import load_own_model
from tunesmith.cli import main
from tunesmith.config import load_config
from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import ConfigError, Interrupted, MergeError, ModelError
from tunesmith.models.adapt import build_model
from tunesmith.models.score import name_padding
from tunesmith.packing.answers import collate_answers_flat, collate_answers_tree
from tunesmith.training.preference import RewardObjective, answer_scores
from tunesmith.training.run_folder import read_metrics

PAIRS = "pairs.jsonl"
_WORDS = ["alpha", "beta", "gamma", "delta", "red", "green", "blue", "sun", "moon"]


def pairs(number: int, *, margins: bool = True) -> list[dict]:
    """Prompts with two answers each; the chosen one ends in a word that the rejected one has not."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(2, 8)))

    return [
        {
            "prompt": [{"role": "user", "content": text()}],
            "chosen": [{"role": "assistant", "content": f"{text()} yes"}],
            "rejected": [{"role": "assistant", "content": text()}],
        }
        | ({"margin": i % 3 / 2} if margins else {})
        for i in range(number)
    ]


@pytest.fixture
def reward_config(run_config, tmp_path):
    def make(family: str = "llama", number: int = 20, **sections) -> dict:
        config = run_config(family, **sections)
        config["data"]["train"] = str(write_rows(tmp_path / PAIRS, pairs(number)))
        return config | {"prefer": {"method": "reward"}}

    return make


def texts(row: dict) -> tuple[str, str]:
    """ChatML by hand, of the chosen and of the rejected answer."""
    chosen, rejected = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["prompt"] + row[side])
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def stock_classifier(path: str):
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)


def scores_of(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """[N, 2] by stock transformers, each answer a row alone, without padding."""
    with torch.no_grad():
        return torch.tensor(
            [[model(ids_of(tokenizer, text)).logits.item() for text in texts(row)] for row in rows]
        )


def plain_loop(config: dict, *, steps: int) -> tuple[list[float], list[float], torch.nn.Module]:
    """Loss and margin of each step, and the model after them: a row at a time, no packs, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
    seed, batch_size = config["run"]["seed"], config["train"]["batch_size"]
    set_seed(seed)
    model = stock_classifier(config["model"]["path"])
    if config["adapter"].get("method") != "none":
        a = config["adapter"]
        lora = LoraConfig(task_type="SEQ_CLS", r=a["r"], lora_alpha=a["alpha"], target_modules="all-linear")
        model = get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["train"]["learning_rate"], weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, round(0.03 * steps), steps)
    losses, margins, epoch, order = [], [], 0, []
    while len(losses) < steps:
        if not order:
            order = np.random.default_rng([seed, epoch]).permutation(len(rows)).tolist()
            epoch += 1
        batch, order = order[:batch_size], order[batch_size:]
        loss, margin = torch.zeros(()), 0.0
        for row in (rows[i] for i in batch):
            chosen, rejected = (model(ids_of(tokenizer, text)).logits[0, 0] for text in texts(row))
            loss = loss - logsigmoid(chosen - rejected - row.get("margin", 0.0)) / len(batch)
            margin += (chosen - rejected).item() / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        margins.append(margin)
    return losses, margins, model


def same_weights(model: torch.nn.Module, folder: Path, *, rtol: float) -> None:
    saved = load_file(next(folder.glob("*model.safetensors")))
    state = get_peft_model_state_dict(model) if hasattr(model, "peft_config") else model.state_dict()
    assert saved.keys() == state.keys()
    for name, value in saved.items():
        assert (state[name] - value).abs().max() <= rtol * state[name].abs().max(), name


# --- training


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("packing", ["tree", "flat"])
def test_losses_margins_and_weights_follow_a_plain_loop(reward_config, family, packing):
    config = reward_config(family, data={"packing": packing})
    losses, margins, model = plain_loop(config, steps=5)
    result = tunesmith.prefer(config)
    assert losses_of(result) == pytest.approx(losses, rel=1e-4)
    lines = [line for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]
    assert [line["reward_margin"] for line in lines] == pytest.approx(margins, rel=1e-3, abs=1e-4)
    assert [line["reward_chosen"] - line["reward_rejected"] for line in lines] == pytest.approx(
        margins, rel=1e-3, abs=1e-4
    )
    same_weights(model, result.final, rtol=5e-2)
    assert "base_model.model.score.weight" in load_file(result.final / "adapter_model.safetensors")


def test_full_fine_tuning_follows_a_plain_loop(reward_config):
    config = reward_config(train={"learning_rate": 1e-3})
    config["adapter"] = {"method": "none"}
    losses, _, model = plain_loop(config, steps=5)
    result = tunesmith.prefer(config)
    assert losses_of(result) == pytest.approx(losses, rel=1e-4)
    same_weights(model, result.final, rtol=2e-2)
    assert "lm_head.weight" not in load_file(result.final / "model.safetensors")


def _prepared(tokenizer, row: dict) -> PreparedRow:
    examples = []
    for side, text in enumerate(texts(row)):
        ids = ids_of(tokenizer, text)[0].numpy().astype(np.int32)
        spans = np.asarray([[len(ids) - 4, len(ids)]], dtype=np.int32)
        examples.append(
            Example(ids, spans, np.ones(1, dtype=np.float32), side=side, margin=row.get("margin", 0.0))
        )
    return PreparedRow("row", tuple(examples))


@pytest.mark.parametrize("method", ["lora", "none"])
@pytest.mark.parametrize("collate", [collate_answers_tree, collate_answers_flat])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_and_gradients_of_a_pack_are_those_of_single_rows(reward_config, family, collate, method):
    adapter = {"method": method} | ({"r": 4} if method == "lora" else {})
    config = load_config(reward_config(family) | {"adapter": adapter}, recipe="prefer")
    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer, lambda _: None)
    if method == "lora":  # as it begins an adapter does nothing
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    rows = pairs(4)
    pack = collate([_prepared(tokenizer, row) for row in rows])
    scores = answer_scores(model, pack)
    RewardObjective(config.prefer)(model, pack).loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # The same weights by the model's stock forward: the head is not asked about positions.
    loss, alone = torch.zeros(()), []
    for row in rows:
        chosen, rejected = (model(ids_of(tokenizer, text)).logits[0, 0] for text in texts(row))
        alone += [chosen.item(), rejected.item()]
        loss = loss - logsigmoid(chosen - rejected - row["margin"])
    loss.backward()
    assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    assert packed.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            assert (packed[name] - parameter.grad).abs().max() <= 1e-5 * scale + 1e-6, name


def test_the_margin_of_a_row_is_taken_off_its_scores(reward_config, tmp_path):
    """Before training the loss is that of the scores the model begins with, by hand."""
    losses = []
    for i, margin in enumerate((0.0, 0.5, 3.0)):
        config = reward_config(run={"name": f"r{i}"}, train={"max_steps": 1, "epochs": None, "batch_size": 6})
        rows = [row | {"margin": margin} for row in pairs(6)]
        config["data"]["train"] = str(write_rows(tmp_path / f"{i}.jsonl", rows))
        losses += losses_of(tunesmith.prefer(config))
    set_seed(3)
    model = stock_classifier(config["model"]["path"]).eval()
    chosen, rejected = scores_of(model, tiny_tokenizer(), pairs(6)).T
    expected = [-logsigmoid(chosen - rejected - margin).mean().item() for margin in (0.0, 0.5, 3.0)]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[2] - losses[0] > 1


def test_the_size_of_passes_does_not_change_a_step(reward_config):
    lines = []
    for i, tokens in enumerate((4096, 256)):
        config = reward_config(run={"name": f"r{i}"}, train={"micro_batch_tokens": tokens, "batch_size": 8})
        lines.append(read_metrics(tunesmith.prefer(config).run / "metrics.jsonl"))
    for key in ("loss", "grad_norm", "reward_margin", "reward_accuracy"):
        assert [line[key] for line in lines[1]] == pytest.approx([line[key] for line in lines[0]], rel=1e-4)


# --- what is saved


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT says so of the norms of ln_tuning
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen2", "lora"),
        ("qwen2", "none"),
        *(
            ("llama", m)
            for m in ("lora", "none", "dora", "pissa", "adalora", "ia3", "ln_tuning", "oft", "vera")
        ),
    ],
)
def test_what_a_run_saves_gives_the_same_scores_in_stock_libraries(reward_config, tmp_path, family, method):
    config = reward_config(family, data={"valid": str(write_rows(tmp_path / "valid.jsonl", pairs(8)))})
    config["adapter"] = {"method": method} | (
        {"r": 4} if method in ("lora", "dora", "pissa", "adalora") else {}
    )
    result = tunesmith.prefer(config)
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    if method == "none":
        model = AutoModelForSequenceClassification.from_pretrained(result.final)
        assert type(model).__name__.endswith("ForSequenceClassification")
        assert model.config.num_labels == 1
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            result.final, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
    model.eval()
    rows = pairs(8)
    alone = scores_of(model, tokenizer, rows)
    last = [line for line in read_metrics(result.run / "metrics.jsonl") if "eval_loss" in line][-1]
    assert alone[:, 0].mean().item() == pytest.approx(last["eval_reward_chosen"], abs=2e-5)
    assert alone[:, 1].mean().item() == pytest.approx(last["eval_reward_rejected"], abs=2e-5)
    flat = [text for row in rows for text in texts(row)]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer(flat, add_special_tokens=False, padding=True, return_tensors="pt")
        assert not bool(batch.attention_mask.all())
        with torch.no_grad():
            padded = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        # On the left rotary positions count from the padding on: turned further, the same up to rounding.
        assert padded.tolist() == pytest.approx(
            alone.flatten().tolist(), abs=1e-5 if side == "right" else 1e-4
        )
    assert not (result.final / "generation_config.json").exists()
    assert "text-classification" in (result.final / "README.md").read_text()


def test_answers_that_end_in_the_pad_token_get_another_one(reward_config, tmp_path):
    """Raw text ends in EOS, which pads in this tokenizer: stock pooling would look before it."""
    config = reward_config(data={"template": "auto"})
    rows = [
        {"prompt": "one two", "chosen": f"three {word}", "rejected": f"four {word} {word}"} for word in _WORDS
    ]
    config["data"]["train"] = str(write_rows(tmp_path / PAIRS, rows))
    config["data"]["valid"] = config["data"]["train"]
    config["adapter"] = {"method": "none"}
    result = tunesmith.prefer(config)
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    model = AutoModelForSequenceClassification.from_pretrained(result.final).eval()
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    chosen = [f"{row['prompt']}{row['chosen']}<|im_end|>" for row in rows]
    last = [line for line in read_metrics(result.run / "metrics.jsonl") if "eval_loss" in line][-1]
    examples = [ids_of(tokenizer, text) for text in chosen]
    with torch.no_grad():
        alone = torch.cat([model(ids).logits[:, 0] for ids in examples])
        batch = tokenizer(chosen, add_special_tokens=False, padding=True, return_tensors="pt")
        padded = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    assert padded.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    assert alone.mean().item() == pytest.approx(last["eval_reward_chosen"], abs=2e-5)


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(reward_config):
    config = load_config(reward_config(), recipe="prefer")
    tokenizer = tiny_tokenizer()
    model = build_model(config, tokenizer, lambda _: None)
    assert name_padding(model, tokenizer, {198}) == "<|im_end|>"  # its own will do
    assert name_padding(model, tiny_tokenizer(), {1, 2}) == "<|im_start|>"
    with pytest.raises(ModelError, match=r"answers end in every control token .*Add one to the tokenizer"):
        name_padding(model, tiny_tokenizer(), {0, 1, 2})


def test_a_reward_model_goes_on_with_its_own_head(reward_config):
    config = reward_config(train={"learning_rate": 1e-3})
    config["adapter"] = {"method": "none"}
    first = tunesmith.prefer(config)
    again = reward_config(
        run={"name": "again"}, train={"learning_rate": 1e-3}, model={"path": str(first.final)}
    )
    losses, _, _ = plain_loop(again, steps=5)
    result = tunesmith.prefer(again)
    assert losses_of(result) == pytest.approx(losses, rel=1e-4)
    assert losses[0] < 0.9 * losses_of(first)[0]


def test_a_classifier_with_several_labels_is_refused(reward_config, tiny_models, tmp_path):
    folder = tmp_path / "classifier"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models(), num_labels=3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match=r"tells 3 labels apart, and a reward model gives one score"):
        tunesmith.prefer(reward_config(model={"path": str(folder)}))


def test_a_reward_model_is_no_base_for_fine_tuning(run_config, reward_config):
    config = reward_config()
    config["adapter"] = {"method": "none"}
    final = tunesmith.prefer(config).final
    with pytest.raises(ModelError, match=r"is a sequence classifier.*no head for next tokens"):
        tunesmith.sft(run_config(model={"path": str(final)}, run={"name": "s"}))


def test_what_is_trained_beside_the_adapter_stays_as_the_config_says(reward_config):
    """PEFT adds the score head to the list that it is given."""
    result = tunesmith.prefer(reward_config(adapter={"modules_to_save": ["norm"]}))
    assert load_config(result.run / "config.yaml").adapter.modules_to_save == ["norm"]
    saved = load_file(result.final / "adapter_model.safetensors")
    assert {"base_model.model.model.norm.weight", "base_model.model.score.weight"} <= saved.keys()


# --- checkpoints


@pytest.mark.parametrize("method", ["lora", "none"])
def test_a_stopped_run_ends_with_the_same_weights(reward_config, monkeypatch, tmp_path, method):
    adapter = {"method": "none"} if method == "none" else {"r": 4, "dropout": 0.1}
    sections = {
        "train": {"learning_rate": 1e-3, "epochs": 2},
        "data": {"valid": str(write_rows(tmp_path / "valid.jsonl", pairs(5)))},
        "checkpoint": {"every_steps": 4},
    }
    one, other = (reward_config(run={"name": name}, **sections) | {"adapter": adapter} for name in "ab")
    straight = tunesmith.prefer(one)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            tunesmith.prefer(other)
    resumed = tunesmith.prefer(other)
    assert same_files(straight.final, resumed.final)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)


# --- ranks


@pytest.mark.parametrize("method", ["lora", pytest.param("none", marks=pytest.mark.long)])
@pytest.mark.parametrize("strategy", each(["ddp", "fsdp", "zero2", "zero3"]))
def test_two_processes_train_a_reward_model_as_one_does(driver, tmp_path, strategy, method):
    """21 pairs, 4 a step: the last step has one, and a process nothing."""
    adapter = {"method": "none"} if method == "none" else {"r": 4, "dropout": 0.0}
    config = scenario_config({"adapter": adapter, "train": {"learning_rate": 1e-3}}, tmp_path)
    config["data"] |= {
        part: str(write_rows(tmp_path / f"{part}-pairs.jsonl", pairs(number)))
        for part, number in (("train", 21), ("valid", 5))
    }
    config |= {"prefer": {"method": "reward"}}
    config["run"] |= {"name": "alone", "recipe": "prefer"}
    alone = train(driver, config, 1)
    config["run"] |= {"name": strategy}
    config["distributed"] = {"strategy": strategy}
    shared = train(driver, config, 2)
    assert_same_course(alone, shared, rel=1e-4)
    for a, b in zip(*(read_metrics(run / "metrics.jsonl") for run in (alone, shared)), strict=True):
        for key in ("reward_chosen", "reward_margin", "reward_accuracy", "eval_reward_margin"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-3, abs=1e-5)
    (one,), (other,) = ((run / "final").glob("*model.safetensors") for run in (alone, shared))
    saved, expected = load_file(other), load_file(one)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (saved[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


# --- settings


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": {"prompts": ["one"]}}, r"eval.prompts names texts to go on with, but prefer.method reward"),
        ({"model": {"config": "c"}}, r"model.config asks for random weights, but prefer.method reward"),
        ({"adapter": {"method": "bottleneck"}}, r"adapter.method is bottleneck, .* score head in full"),
        (
            {"adapter": {"method": "trainable_tokens", "trainable_tokens": ["a"]}},
            r"adapter.method is trainable_tokens, which trains nothing beside itself",
        ),
        ({"prefer": {"method": "reward", "beta": 0.1}}, r"prefer.beta is 0.1, but prefer.method is reward"),
    ],
)
def test_what_a_reward_model_cannot_do_is_said(sections, message):
    minimal = {"model": {"path": "m"}, "data": {"train": "a"}, "prefer": {"method": "reward"}}
    with pytest.raises(ConfigError, match=message):
        load_config(minimal | sections, recipe="prefer")


# --- afterwards


@pytest.mark.parametrize("family", ["llama", "mistral"])  # tied to its embedding, and with a head of its own
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_merged_reward_model_gives_the_scores_of_its_adapter(
    reward_config, tmp_path, capsys, family, quantization
):
    result = tunesmith.prefer(reward_config(family, model={"quantization": quantization}))
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    out = tmp_path / "merged"
    merged = merge(result.run, out)
    assert merged.agreement is not None
    assert "the base is loaded whole" not in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.config.architectures == [type(model).__name__]
    assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    found = find_model(str(result.run), print, may_score=True)
    adapted = load_own_model(found, tokenizer, torch.float32, print)
    rows = pairs(6)
    assert scores_of(model, AutoTokenizer.from_pretrained(out), rows).flatten().tolist() == pytest.approx(
        scores_of(adapted, tokenizer, rows).flatten().tolist(), abs=1e-5
    )
    assert merged.agreement.max_logit_difference < 1e-5
    assert (merged.agreement.unit, merged.agreement.top1) == ("pair", 1.0)
    assert not any("lm_head" in name for name in load_file(out / "model.safetensors"))


def test_a_merge_that_changes_the_scores_is_not_kept(reward_config, tmp_path, monkeypatch):
    result = tunesmith.prefer(reward_config())
    merged = merged_weights.merged

    def doubled(path, *rest):
        return {name: (1 + (path == "score")) * value for name, value in merged(path, *rest).items()}

    monkeypatch.setattr(merged_weights, "merged", doubled)
    with pytest.raises(MergeError, match=r"was not kept: KL .* nats a pair"):
        merge(result.run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["lora", "none"])
def test_verbs_that_write_answers_refuse_a_reward_model(reward_config, tmp_path, capsys, method):
    config = reward_config() | {"adapter": {"method": method}}
    result, out = tunesmith.prefer(config), str(tmp_path / "out")
    assert "chat with it" not in capsys.readouterr().out
    run, pairs_file = str(result.run), config["data"]["train"]
    for words in (
        ["chat", run],
        ["serve", run],
        ["generate", run, "--input", pairs_file, "--output", out],
        ["eval", run, "--data", str(write_rows(tmp_path / "rows.jsonl", conversations(2)))],
        ["export", "gguf", run, "--out", out],
        ["export", "ollama", run, "--out", out],
        ["export", "hf", run, "--out", out],
    ):
        assert main(words) == 2, words
        assert "is a reward model: it gives answers scores and writes none" in capsys.readouterr().err
