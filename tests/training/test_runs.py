"""What a run writes and when it stops: best model, early stop, bad numbers, metrics, summary, artifacts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import conversations, write_rows
from transformers import AutoModelForCausalLM

import tunesmith
from tunesmith.errors import ModelError, TrainingError
from tunesmith.training.run_folder import read_metrics


def with_valid(run_config, tmp_path, number=6, **sections):
    valid = write_rows(tmp_path / "valid.jsonl", conversations(number, seed=21))
    sections["data"] = {"valid": str(valid)} | sections.get("data", {})
    return run_config(**sections)


def test_best_is_the_model_of_the_lowest_eval_loss_and_training_stops_when_it_rises(run_config, tmp_path):
    # A learning rate that soon does harm: eval loss falls, then rises.
    config = with_valid(
        run_config,
        tmp_path,
        train={"epochs": 20, "learning_rate": 0.05, "schedule": "constant"},
        eval={"every_steps": 1, "early_stopping_patience": 4},
    )
    result = tunesmith.sft(config)
    evals = {
        line["step"]: line["eval_loss"]
        for line in read_metrics(result.run / "metrics.jsonl")
        if "eval_loss" in line
    }
    best_step = min((step for step in evals if step), key=evals.__getitem__)
    assert result.summary["best_step"] == best_step
    assert result.summary["best_eval_loss"] == evals[best_step]
    assert max(evals) == best_step + 4 < 100
    # best/ holds that step's weights: its checkpoint-free reload gives that eval loss.
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    again = config | {"run": {**config["run"], "name": "again"}}
    model = PeftModel.from_pretrained(base, result.best).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "merged" / file).write_bytes((result.best / file).read_bytes())
    again["model"] = {**config["model"], "path": str(tmp_path / "merged")}
    again["train"] = {"max_steps": 1, "batch_size": 1}
    assert tunesmith.sft(again).summary["eval_loss_before"] == pytest.approx(evals[best_step], rel=1e-5)


def test_evaluating_more_often_does_not_change_training(run_config, tmp_path):
    """An evaluation draws nothing from the random state that dropout uses."""
    weights = []
    for every in (1, 5):
        config = with_valid(run_config, tmp_path, adapter={"dropout": 0.2}, eval={"every_steps": every})
        config["run"]["name"] = f"every{every}"
        weights.append(load_file(tunesmith.sft(config).final / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(run_config, tiny_models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("q") % 100 + 3 :].fill_(math.nan)  # some letters are poison
    folder = tmp_path / "poisoned"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((tiny_models() / file).read_bytes())
    config = run_config(model={"path": str(folder)})
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; nothing was changed") as error:
        tunesmith.sft(config)
    run = tmp_path / "runs" / "r"
    assert "train.jsonl:" in str(error.value)
    bad = json.loads((run / "bad_step.json").read_text())
    (step,) = bad["steps"]
    rows = step["rows"]
    assert len(rows) == 4
    assert {row["loss"] for row in rows} == {"nan"}
    assert all("<|im_start|>user" in row["text"] for row in rows)
    assert not (run / "checkpoints").exists()


def test_metrics_and_summary_agree_with_a_count_of_the_rows(run_config, tmp_path):
    config = with_valid(run_config, tmp_path)
    result = tunesmith.sft(config)
    report = json.loads((result.run / "data_report.json").read_text())
    lines = [line for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]
    assert (
        sum(line["rows"] for line in lines) == result.summary["rows"] == report["train"][0]["rows_kept"] == 20
    )
    assert sum(line["tokens"] for line in lines) == result.summary["tokens"] == report["train"][0]["tokens"]
    assert sum(line["target_tokens"] for line in lines) == report["train"][0]["target_tokens"]
    # By hand: an answer's bytes, <|im_end|> and the newline behind it.
    rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
    targets = sum(len(m["content"]) + 2 for row in rows for m in row["messages"] if m["role"] == "assistant")
    assert result.summary["target_tokens"] == targets
    assert result.summary["first_loss"] == lines[0]["loss"]
    assert result.summary["last_loss"] == lines[-1]["loss"]
    assert {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "rows",
        "tokens",
        "target_tokens",
        "computed_tokens",
        "tokens_per_s",
        "target_tokens_per_s",
        "mfu",
        "peak_memory_gib",
        "step_s",
    } == set(lines[0])


def test_training_rows_that_stand_in_validation_are_counted(run_config, tmp_path):
    config = run_config()
    rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
    config["data"]["valid"] = str(
        write_rows(tmp_path / "valid.jsonl", [*rows[:3], *conversations(4, seed=77)])
    )
    result = tunesmith.sft(config)
    report = json.loads((result.run / "data_report.json").read_text())
    assert report["valid_examples_also_in_train"] == 3


def test_a_fraction_splits_rows_off_for_validation_by_the_seed(run_config):
    result = tunesmith.sft(run_config(data={"valid": 0.25}))
    report = json.loads((result.run / "data_report.json").read_text())
    assert (report["train_rows"], report["valid_rows"]) == (15, 5)
    assert report["valid_examples_also_in_train"] == 0


@pytest.mark.parametrize("method", ["lora", "none"])
def test_what_is_saved_loads_without_tunesmith_and_gives_the_same_logits(run_config, tmp_path, method):
    config = run_config(train={"learning_rate": 1e-3})
    if method == "none":
        config["adapter"] = {"method": "none"}
    logits = []
    from tunesmith.training.session import Session

    original = Session.measure_tuned

    def measure(self):
        with torch.no_grad():
            model = self.trainer.model.eval()
            logits.append(model(torch.arange(3, 30)[None], use_cache=False).logits)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "measure_tuned", measure)
        result = tunesmith.sft(config)
    script = """
import sys, torch
sys.modules["tunesmith"] = None  # any import of it fails
from transformers import AutoTokenizer
folder, kind, out = sys.argv[1:]
if kind == "lora":
    from peft import AutoPeftModelForCausalLM as Model
else:
    from transformers import AutoModelForCausalLM as Model
model = Model.from_pretrained(folder, dtype=torch.float32).eval()
assert model.config.use_cache
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{"role": "user", "content": "x"}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
assert text == "<|im_start|>user\\nx<|im_end|>\\n<|im_start|>assistant\\n", text
assert model.generation_config.eos_token_id == 1
torch.save(model(torch.arange(3, 30)[None]).logits.detach(), out)
"""
    out = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", script, str(result.final), method, str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(out), logits[0], rtol=0, atol=1e-5)


def test_a_full_model_is_loaded_in_the_format_it_was_saved_in(run_config):
    result = tunesmith.sft(
        run_config(adapter={"method": "none", "r": None, "alpha": None}, model={"dtype": "bfloat16"})
    )
    assert AutoModelForCausalLM.from_pretrained(result.final, dtype="auto").dtype == torch.bfloat16


def test_lora_plus_gives_b_matrices_a_higher_learning_rate(run_config):
    from tunesmith.training.trainer import PackTrainer

    groups = []
    original = PackTrainer.create_optimizer

    def create(self, model=None):
        optimizer = original(self, model)
        groups.extend((group["lr"], len(group["params"])) for group in optimizer.param_groups)
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackTrainer, "create_optimizer", create)
        tunesmith.sft(run_config(adapter={"lora_plus_ratio": 16}, train={"max_steps": 1, "epochs": None}))
    assert sorted(groups) == [(pytest.approx(0.01), 14), (pytest.approx(0.16), 14)]


@pytest.mark.parametrize(
    ("family", "spared"),
    [
        ("qwen2", {"model.embed_tokens.weight"}),  # which is its head too
        ("mistral", {"model.embed_tokens.weight"}),
    ],
)
def test_weight_decay_spares_biases_norms_and_embeddings(run_config, family, spared):
    from tunesmith.training.trainer import PackTrainer

    found = {}
    original = PackTrainer.create_optimizer

    def create(self, model=None):
        optimizer = original(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            found[group["weight_decay"]] = {names[id(p)] for p in group["params"]}
        return optimizer

    config = run_config(family, train={"weight_decay": 0.1, "max_steps": 1, "epochs": None})
    config["adapter"] = {"method": "none"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackTrainer, "create_optimizer", create)
        tunesmith.sft(config)
    matrices = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    decayed = {
        f"model.layers.{layer}.{part}.{name}_proj.weight"
        for layer in (0, 1)
        for part, names in matrices.items()
        for name in names
    }
    assert found[0.1] == decayed | ({"lm_head.weight"} if family == "mistral" else set())
    assert spared <= found[0.0]
    assert found[0.0] - spared == {name for name in found[0.0] if "norm" in name or name.endswith("bias")}


def test_frozen_parameters_stay_as_they_were(run_config, tiny_models):
    config = run_config(model={"freeze": ["embed_tokens", r"layers\.0\."]}, train={"learning_rate": 1e-3})
    config["adapter"] = {"method": "none"}
    result = tunesmith.sft(config)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_models(), result.final))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers.1." in name or name == "model.norm.weight"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"adapter": {"target_modules": ["q_prj"]}},
            r"no module 'q_prj' in this model. Did you mean q_proj\?",
        ),
        (
            {"adapter": {"target_modules": "q_proj"}},
            r"'q_proj' matches the whole name of no linear module.*down_proj",
        ),
        ({"adapter": {"modules_to_save": ["head"]}}, r"adapter.modules_to_save: there is no module 'head'"),
        ({"model": {"freeze": ["layer7"]}, "adapter": {"method": "none"}}, r"'layer7' finds no parameter"),
        ({"model": {"path": "/nowhere/at/all"}}, r"model.path=/nowhere/at/all"),
    ],
)
def test_a_model_or_module_that_is_not_there_is_named_with_what_is(run_config, sections, message):
    config = run_config(**sections)
    if config["adapter"].get("method") == "none":
        config["adapter"] = {"method": "none"}
    with pytest.raises(ModelError, match=message):
        tunesmith.sft(config)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(run_config, tiny_models, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((tiny_models() / file).read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"a pickle \(pytorch_model.bin\).*(?s:.*)use_safetensors=False"):
        tunesmith.sft(run_config(model={"path": str(folder)}))


def test_longer_rows_than_the_model_was_trained_for_scale_its_positions(run_config, capsys):
    result = tunesmith.sft(
        run_config(
            data={"max_length": 1024},
            train={"micro_batch_tokens": 1024, "max_steps": 1, "epochs": None},
            adapter={"r": 2},
        )
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "data.max_length=1024 exceeds the 512 positions" in said
    assert "(linear, factor 2)" in said
    assert result.summary["steps"] == 1
    card = (result.final / "README.md").read_text()
    assert "'rope_type': 'linear', 'factor': 2.0" in card
    assert "`max_position_embeddings=1024`" in card


def test_new_tokens_are_trained_and_saved_with_the_adapter(run_config, tmp_path):
    config = run_config(adapter={"trainable_tokens": ["<|tool|>"]})
    result = tunesmith.sft(config)
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result.final)
    assert len(tokenizer.encode("<|tool|>", add_special_tokens=False)) == 1
    model = AutoPeftModelForCausalLM.from_pretrained(result.final)
    assert model.get_input_embeddings().weight.shape[0] == 260
