"""Settings change the numbers they say they change."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from tiny import conversations, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.errors import ConfigError, MissingExtraError
from tunesmith.training.callbacks import Schedule
from tunesmith.training.run_folder import read_metrics
from tunesmith.training.session import Session


def lines_of(result):
    return [line for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]


def cosine(step, steps, warmup):
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def linear(step, steps, warmup):
    return (steps - step) / (steps - warmup)


def stable_then_down(step, steps, decay):
    """By 1 - sqrt over the last `decay` steps, the first of which is still at the top."""
    return 1 - math.sqrt(max(0, step - (steps - decay)) / decay)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"schedule": "constant"}, lambda step, steps, warmup: 1.0),
        ({"schedule": "linear"}, linear),
        ({"schedule": "linear", "min_learning_rate": 2e-4}, lambda *at: 0.2 + 0.8 * linear(*at)),
        ({"schedule": "cosine"}, cosine),
        ({"schedule": "cosine", "min_learning_rate": 2e-4}, lambda *at: 0.2 + 0.8 * cosine(*at)),
        ({"schedule": "cosine_with_min_lr"}, lambda *at: 0.1 + 0.9 * cosine(*at)),
        ({"schedule": "cosine_with_min_lr", "min_learning_rate": 3e-4}, lambda *at: 0.3 + 0.7 * cosine(*at)),
        ({"schedule": "inverse_sqrt"}, lambda step, steps, warmup: math.sqrt(warmup / step)),
        # a tenth of 30 steps
        ({"schedule": "warmup_stable_decay"}, lambda step, steps, warmup: stable_then_down(step, steps, 3)),
        (
            {"schedule": "warmup_stable_decay", "decay": 0.5},
            lambda step, steps, warmup: stable_then_down(step, steps, 15),
        ),
        # more than is left after the warm-up
        (
            {"schedule": "warmup_stable_decay", "decay": 28},
            lambda step, steps, warmup: stable_then_down(step, steps, 26),
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_learning_rate_follows_the_formula_of_its_schedule(run_config, settings, factor):
    steps, warmup, peak = 30, 4, 1e-3
    config = run_config(
        train={
            "max_steps": steps,
            "epochs": None,
            "batch_size": 1,
            "warmup": warmup,
            "learning_rate": peak,
            **settings,
        }
    )
    rates = [line["learning_rate"] for line in lines_of(tunesmith.sft(config))]
    expected = [
        peak * (step / warmup if step < warmup else factor(step, steps, warmup)) for step in range(steps)
    ]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_a_stable_phase_with_a_floor_ends_and_begins_at_it(run_config):
    """transformers' warm-up of this schedule begins at the floor too."""
    settings = {
        "schedule": "warmup_stable_decay",
        "decay": 4,
        "min_learning_rate": 2e-4,
        "learning_rate": 1e-3,
    }
    config = run_config(train={"max_steps": 10, "epochs": None, "batch_size": 1, "warmup": 4, **settings})
    rates = [line["learning_rate"] for line in lines_of(tunesmith.sft(config))]
    shape = [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, *(1 - math.sqrt(step / 4) for step in range(4))]
    assert rates == pytest.approx([2e-4 + 8e-4 * factor for factor in shape], rel=1e-6)


def test_a_warm_up_of_all_steps_never_falls(run_config):
    settings = {"schedule": "linear", "min_learning_rate": 2e-4, "learning_rate": 1e-3}
    config = run_config(train={"max_steps": 4, "epochs": None, "warmup": 4, **settings})
    rates = [line["learning_rate"] for line in lines_of(tunesmith.sft(config))]
    assert rates == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4], rel=1e-6)


def test_the_batch_size_grows_to_its_full_size_and_epochs_hold_every_row(run_config, tmp_path):
    """20 rows; 1 + 3 k / 4 rows, rounded down, in the first four steps, then 4, and what is left of the
    epoch."""
    valid = str(write_rows(tmp_path / "valid.jsonl", conversations(3, seed=3)))
    warmup = {"start": 1, "steps": 4}
    config = run_config(data={"valid": valid}, train={"batch_size_warmup": warmup, "epochs": 2})
    result = tunesmith.sft(config)
    lines = lines_of(result)
    assert [line["rows"] for line in lines] == [1, 1, 2, 3, 4, 4, 4, 1] + [4] * 5
    assert [line["epoch"] for line in lines] == [step / 8 for step in range(1, 9)] + [
        1 + step / 5 for step in range(1, 6)
    ]
    evaluated = [line["step"] for line in read_metrics(result.run / "metrics.jsonl") if "eval_loss" in line]
    assert evaluated == [0, 8, 13]
    assert {folder.name for folder in (result.run / "checkpoints").iterdir()} == {
        "step-000008",
        "step-000013",
    }


def test_a_z_loss_is_in_the_training_loss_and_not_in_the_eval_loss(run_config, tmp_path):
    """One row for both: before the first step the two losses differ by the coefficient times the mean of
    log(Z)^2 over the targets, which here is read off the model's logits."""
    row = conversations(1, seed=8, max_turns=1)
    file = str(write_rows(tmp_path / "one.jsonl", row))
    train = {"max_steps": 1, "epochs": None, "batch_size": 1, "z_loss": 0.5}
    config = run_config(data={"valid": file, "train_on": "all"}, train=train)
    config["data"]["train"] = file
    result = tunesmith.sft(config)
    lines = read_metrics(result.run / "metrics.jsonl")
    before = next(line["eval_loss"] for line in lines if line["step"] == 0)
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    ids = tokenizer.apply_chat_template(row[0]["messages"], return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    log_z = logits.double().exp().sum(-1).log()
    assert before == pytest.approx(nll, rel=1e-5)
    assert lines_of(result)[0]["loss"] == pytest.approx(nll + 0.5 * log_z.square().mean().item(), rel=1e-5)


def test_warmup_below_one_is_a_fraction_of_all_steps(run_config):
    config = run_config(train={"max_steps": 10, "epochs": None, "warmup": 0.2, "learning_rate": 1e-3})
    rates = [line["learning_rate"] for line in lines_of(tunesmith.sft(config))]
    assert rates[:3] == pytest.approx([0.0, 0.5e-3, 1e-3])


def test_clipping_scales_the_gradient_and_reports_it_unclipped(run_config):
    """With plain SGD the first update is the clipped gradient times the learning rate."""
    norms, changes = [], []
    for limit in (0, 1e-3):
        config = run_config(
            adapter={},
            train={
                "max_steps": 1, "epochs": None, "optimizer": "sgd", "learning_rate": 1.0, "warmup": 0,
                "max_grad_norm": limit, "schedule": "constant",
            },
            run={"name": f"clip{limit}"},
        )  # fmt: skip
        config["adapter"] = {"method": "none"}
        before = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
        result = tunesmith.sft(config)
        after = AutoModelForCausalLM.from_pretrained(result.final, dtype=torch.float32)
        pairs = zip(before.parameters(), after.parameters(), strict=True)
        changes.append(math.sqrt(sum(float((a - b).detach().double().square().sum()) for a, b in pairs)))
        norms.append(lines_of(result)[0].get("grad_norm"))
    assert changes[1] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1] == pytest.approx(changes[0], rel=1e-3)


def test_neftune_noise_has_the_size_of_its_paper_and_evaluation_has_none(run_config, tmp_path, monkeypatch):
    """Uniform in +-alpha / sqrt(L d) for L tokens of d dimensions (Jain et al. 2023, section 2)."""
    seen = []

    def watch(self, args, state, control, model=None, **kwargs):
        # After training has hooked its noise in: hooks run in the order they were made.
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(
            lambda module, inputs, output: seen.append(
                (module.training, inputs[0].numel(), (output - module.weight[inputs[0]]).detach())
            )
        )

    monkeypatch.setattr(Schedule, "on_train_begin", watch)
    valid = str(write_rows(tmp_path / "valid.jsonl", conversations(5, seed=3)))
    config = run_config(data={"valid": valid}, train={"neftune_alpha": 5.0, "max_steps": 1, "epochs": None})
    tunesmith.sft(config)
    assert {training for training, _, _ in seen} == {True, False}
    for training, length, noise in seen:
        if not training:
            assert noise.abs().max() == 0
            continue
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.99 * bound < noise.abs().max() <= bound * (1 + 1e-5)
        # The standard deviation of a uniform variable is its half width over the root of 3.
        assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "rslora"},
        {"method": "dora"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r"model\.layers\.1\..*_proj"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["rslora", "dora", "list", "regex", "modules_to_save"],
)
def test_every_kind_of_lora_reloads_in_stock_peft_with_the_same_logits(run_config, monkeypatch, adapter):
    ids = torch.arange(3, 60)[None]
    trained = []

    def measure(self):
        with torch.no_grad():
            trained.append(self.trainer.model.eval()(ids, use_cache=False).logits)

    monkeypatch.setattr(Session, "measure_tuned", measure)
    # mistral: its tiny config has an untied head
    config = run_config("mistral", adapter=adapter, train={"max_steps": 2, "epochs": None})
    result = tunesmith.sft(config)
    base = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    with torch.no_grad():
        untouched = base(ids).logits
        loaded = PeftModel.from_pretrained(base, result.final).eval()(ids).logits
    assert torch.allclose(loaded, trained[0], rtol=1e-5, atol=1e-5)
    assert (loaded - untouched).abs().max() > 1e-2


def test_rslora_divides_by_the_root_of_the_rank(run_config):
    from peft import PeftConfig

    result = tunesmith.sft(run_config(adapter={"method": "rslora"}, train={"max_steps": 1, "epochs": None}))
    saved = PeftConfig.from_pretrained(result.final)
    assert (saved.r, saved.lora_alpha, saved.use_rslora) == (4, 8, True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved.base_model_name_or_path), result.final
    )
    from peft.tuners.lora import LoraLayer

    scalings = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scalings == {8 / math.sqrt(4)}


def test_sources_are_seen_as_often_as_their_weights_say(run_config, tmp_path):
    first = str(write_rows(tmp_path / "a.jsonl", conversations(12, seed=1)))
    second = str(write_rows(tmp_path / "b.jsonl", conversations(10, seed=2)))
    config = run_config(train={"batch_size": 1})
    config["data"]["train"] = [{"path": first, "weight": 2}, {"path": second, "weight": 0.5}]
    assert tunesmith.sft(config).summary["rows"] == 2 * 12 + 5


def test_a_field_of_training_arguments_is_passed_on(run_config):
    config = run_config(train={"trainer_args": {"adam_beta2": 0.5}, "max_steps": 1, "epochs": None})
    seen = []

    def begin(self, start):
        seen.append(self.trainer.args.adam_beta2)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "begin", begin)
        with pytest.raises(KeyboardInterrupt):
            tunesmith.sft(config)
    assert seen == [0.5]


def test_an_unknown_field_of_training_arguments_is_named_with_a_near_one(run_config):
    config = run_config(train={"trainer_args": {"adam_beta_2": 0.5}})
    with pytest.raises(ConfigError, match=r"trainer_args.adam_beta_2: .* Did you mean adam_beta2\?"):
        tunesmith.sft(config)


def test_an_eight_bit_optimizer_without_bitsandbytes_names_the_extra(run_config, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"train.optimizer=adamw_8bit needs.*tunesmith\[quant\]"):
        tunesmith.sft(run_config(train={"optimizer": "adamw_8bit"}))


def test_answers_before_and_after_are_those_of_greedy_decoding(run_config, tmp_path):
    """One row, learnt by heart: the answer becomes exact, and `before` is what the untouched model says."""
    row = conversations(1, seed=8, max_turns=1)
    file = str(write_rows(tmp_path / "one.jsonl", row))
    config = run_config(
        data={"valid": file},
        train={"max_steps": 60, "epochs": None, "batch_size": 1, "schedule": "constant"},
        eval={"answer_rows": 1, "max_new_tokens": 60, "every_steps": 60},
        checkpoint={"every_steps": 60},
    )
    config["data"]["train"] = file
    result = tunesmith.sft(config)
    assert result.summary["exact_match_before"] == 0.0
    assert result.summary["exact_match_after"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(
        row[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    said = []
    with torch.no_grad():
        for _ in range(60):  # an argmax loop that shares nothing with generate
            token = int(
                model(torch.cat([ids, torch.tensor([said], dtype=torch.long)], dim=1)).logits[0, -1].argmax()
            )
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
    import json

    answers = json.loads((result.run / "answers.json").read_text())
    assert answers["before"] == [tokenizer.decode(said, skip_special_tokens=True).strip()]
    assert answers["rows"][0]["expected"] == row[0]["messages"][1]["content"]
