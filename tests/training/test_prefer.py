"""What `tunesmith prefer` computes, against a plain loop of transformers and PEFT that runs each answer as a
padded row of its own and writes the losses out by hand."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import judged_pairs, labelled_answers, make_tiny_model, write_rows
from torch.nn import functional as F
from training.test_equivalence import ids_and_labels, losses_of, same_weights
from training.test_resume import metrics_without_times, same_files, stop_after
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

import tunesmith
from tunesmith.errors import DataError, Interrupted
from tunesmith.training import reference as reference_module
from tunesmith.training.displacement import DisplacementWatch
from tunesmith.training.run_folder import read_metrics


@pytest.fixture
def prefer_config(run_config, tmp_path):
    """Makes a config of a small preference run."""

    def make(
        family: str = "llama", method: str = "dpo", rows: int = 20, desirable: float = 0.6, **sections
    ) -> dict:
        config = run_config(family, **sections)
        if config["adapter"].get("method") == "none":
            config["adapter"] = {"method": "none"}
        made = labelled_answers(rows, desirable) if method == "kto" else judged_pairs(rows)
        config["data"]["train"] = str(write_rows(tmp_path / f"{method}.jsonl", made))
        config["prefer"] = {"method": method} | sections.get("prefer", {})
        return config

    return make


# --- the plain loop


def answer_logps(model, tokenizer, batch) -> torch.Tensor:
    """[B] log-probability of the last answer of each conversation, of padded rows."""
    encoded = []
    for messages in batch:
        ids, _ = ids_and_labels(tokenizer, messages)
        prompt, _ = ids_and_labels(tokenizer, messages[:-1])
        encoded.append((ids, len(prompt) + len(tokenizer("<|im_start|>assistant\n")["input_ids"])))
    width = max(len(ids) for ids, _ in encoded)
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in encoded])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded])
    logps = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
    of_tokens = logps.gather(-1, input_ids[:, 1:, None])[..., 0]
    is_answer = torch.tensor([[start <= i < len(ids) for i in range(1, width)] for ids, start in encoded])
    return (of_tokens * is_answer).sum(1), is_answer.sum(1)


def loss_by_hand(method: str, prefer: dict, answers, reference) -> torch.Tensor:
    """Mean loss of a step: the formulas of the papers, with [N] chosen and [N] rejected answers."""
    beta = prefer.get("beta", {"simpo": 2.0}.get(method, 0.1))
    (chosen, chosen_tokens), (rejected, rejected_tokens) = answers
    ratios = [a - r for a, r in zip((chosen, rejected), reference, strict=True)]
    h, e = beta * (ratios[0] - ratios[1]), prefer.get("label_smoothing", 0.0)
    mean_chosen, mean_rejected = chosen / chosen_tokens, rejected / rejected_tokens
    if method == "dpo":
        losses = -(1 - e) * torch.log(torch.sigmoid(h)) - e * torch.log(torch.sigmoid(-h))
        losses = losses - prefer.get("sft_weight", 0.0) * mean_chosen
    elif method == "ipo":
        losses = (ratios[0] / chosen_tokens - ratios[1] / rejected_tokens - 1 / (2 * beta)) ** 2
    elif method == "hinge":
        losses = (1 - h).clamp(min=0)
    elif method == "robust":
        e = prefer["label_smoothing"]
        losses = (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)
    elif method == "simpo":
        losses = -F.logsigmoid(beta * (mean_chosen - mean_rejected) - 1.0)
    elif method == "cpo":
        losses = -F.logsigmoid(beta * (chosen - rejected)) - mean_chosen
    else:
        assert method == "orpo"
        odds = [torch.log(p.exp() / (1 - p.exp())) for p in (mean_chosen, mean_rejected)]
        losses = -mean_chosen - beta * F.logsigmoid(odds[0] - odds[1])
    return losses.mean()


def kto_by_hand(model, reference, tokenizer, rows, order) -> torch.Tensor:
    """Of a step's rows: the reference point from each prompt with the next row's answer."""
    chats = [rows[i]["messages"] for i in order]
    wrong = [rows[i]["messages"][:-1] + rows[(i + 1) % len(rows)]["messages"][-1:] for i in order]
    with torch.no_grad():
        with reference(model):
            base, of_wrong = (answer_logps(model, tokenizer, some)[0] for some in (chats, wrong))
        z = (answer_logps(model, tokenizer, wrong)[0] - of_wrong).mean().clamp(min=0)
    ratios = answer_logps(model, tokenizer, chats)[0] - base
    signs = torch.tensor([1.0 if rows[i]["label"] else -1.0 for i in order])
    return (1 - torch.sigmoid(signs * 0.1 * (ratios - z))).mean()


def plain_loop(config: dict, *, steps: int) -> tuple[list[float], torch.nn.Module]:
    """Loss of each step, and the model after them."""
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
    seed, batch_size, method = (
        config["run"]["seed"],
        config["train"]["batch_size"],
        config["prefer"]["method"],
    )
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    adapter = config["adapter"]
    reference = nullcontext
    if adapter.get("method") != "none":
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=adapter["r"],
                lora_alpha=adapter["alpha"],
                lora_dropout=0.0,
                target_modules="all-linear",
            ),
        )
        reference = PeftModel.disable_adapter
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["train"]["learning_rate"], weight_decay=0.0)
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=round(0.03 * steps), num_training_steps=steps
    )
    losses, epoch, order = [], 0, []
    while len(losses) < steps:
        if not order:
            order = np.random.default_rng([seed, epoch]).permutation(len(rows)).tolist()
            epoch += 1
        chosen, order = order[:batch_size], order[batch_size:]
        if method == "kto":
            loss = kto_by_hand(model, reference, tokenizer, rows, chosen)
        else:
            answers, of_reference = [], []
            for side in ("chosen", "rejected"):
                chats = [
                    [*rows[i]["messages"], {"role": "assistant", "content": rows[i][side]}] for i in chosen
                ]
                answers.append(answer_logps(model, tokenizer, chats))
                with torch.no_grad():
                    of_reference.append(answer_logps(frozen, tokenizer, chats)[0])
            loss = loss_by_hand(method, config["prefer"], answers, of_reference)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(
    ("method", "prefer"),
    [
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.2, "sft_weight": 0.5}),
        ("ipo", {}),
        ("hinge", {"beta": 0.5}),
        ("robust", {"label_smoothing": 0.2}),
        ("orpo", {}),
        ("simpo", {}),
        ("cpo", {}),
        ("kto", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_losses_and_weights_follow_a_plain_loop(prefer_config, method, prefer):
    config = prefer_config(method=method, prefer=prefer)
    expected, model = plain_loop(config, steps=5)
    result = tunesmith.prefer(config)
    # A hinge at work is a difference of sums that are a hundred times as large.
    assert losses_of(result) == pytest.approx(expected, rel=1e-4, abs=3e-5)
    same_weights(model, result.final, rtol=1e-2)


def test_the_reference_point_of_kto_is_that_of_the_whole_step(prefer_config):
    """Only good answers: all become likelier, after other prompts too, and the point leaves 0."""
    config = prefer_config(method="kto", desirable=1.0, train={"micro_batch_tokens": 256})
    expected, _ = plain_loop(config, steps=5)
    result = tunesmith.prefer(config)
    assert losses_of(result) == pytest.approx(expected, rel=1e-4)
    lines = [line for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["kl"] > 1
    assert "reward_undesirable" not in lines[-1]


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("packing", ["tree", "flat"])
def test_families_and_packings_follow_it_too(prefer_config, family, packing):
    config = prefer_config(family, data={"packing": packing})
    expected, _ = plain_loop(config, steps=5)
    assert losses_of(tunesmith.prefer(config)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_a_whole_model_is_compared_with_what_it_was(prefer_config, reference):
    config = prefer_config(
        adapter={"method": "none"}, train={"learning_rate": 1e-3}, prefer={"reference": reference}
    )
    expected, _ = plain_loop(config, steps=5)
    assert losses_of(tunesmith.prefer(config)) == pytest.approx(expected, rel=1e-4)


def test_an_epoch_more_reads_the_same_reference(prefer_config, capsys):
    config = prefer_config(train={"epochs": 2})
    expected, _ = plain_loop(config, steps=10)
    assert losses_of(tunesmith.prefer(config)) == pytest.approx(expected, rel=1e-3)
    assert "reference log-probabilities of 20 rows computed" in capsys.readouterr().out


# --- the reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_a_model_that_is_its_own_reference_has_a_loss_of_ln_2(prefer_config, dtype, reference):
    config = prefer_config(model={"dtype": dtype}, data={"valid": 0.25}, prefer={"reference": reference})
    lines = read_metrics(tunesmith.prefer(config).run / "metrics.jsonl")
    before, first = (next(line for line in lines if key in line) for key in ("eval_loss", "loss"))
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert before["eval_kl_of_tokens"] == 0


def test_a_second_run_asks_nothing_and_takes_the_same_course(prefer_config, monkeypatch, capsys):
    config = prefer_config(data={"valid": 0.25})
    first = tunesmith.prefer(config)
    capsys.readouterr()
    config["run"]["name"] = "again"
    second = tunesmith.prefer(config)
    said = capsys.readouterr().out
    assert "rows computed" not in said
    assert said.count("reference log-probabilities: read from") == 2
    assert metrics_without_times(first.run) == metrics_without_times(second.run)
    assert same_files(first.final, second.final)


def test_another_model_or_other_rows_ask_anew(prefer_config, capsys, tmp_path):
    config = prefer_config()
    tunesmith.prefer(config)
    other = make_tiny_model(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    model.save_pretrained(other)
    for change in ({"model": {"path": str(other)}}, {"data": {"max_length": 255, "system": "Be brief."}}):
        changed = {section: dict(values) for section, values in config.items()}
        for section, values in change.items():
            changed[section] |= values
        changed["run"]["name"] = "-".join(change)
        capsys.readouterr()
        tunesmith.prefer(changed)
        assert "rows computed" in capsys.readouterr().out


def test_what_one_run_was_told_stays_when_another_asks_about_more(prefer_config, tmp_path):
    config = prefer_config(train={"epochs": None, "max_steps": 2})
    tunesmith.prefer(config)
    (file,) = (tmp_path / "cache").glob("reference-*/targets.f32")
    before = np.fromfile(file, dtype=np.float32)
    is_known = ~np.isnan(before)
    assert not is_known.all()
    before[is_known] = -7.0  # which the model would not say
    before.tofile(file)
    # Other rows beside them in their passes.
    config["train"] |= {"max_steps": 5}
    tunesmith.prefer(config | {"run": config["run"] | {"name": "more", "seed": 8}})
    after = np.fromfile(file, dtype=np.float32)
    assert not np.isnan(after).any()
    assert np.array_equal(after == -7.0, is_known)


def test_only_rows_that_are_drawn_are_asked_about(prefer_config, capsys):
    tunesmith.prefer(prefer_config(train={"epochs": None, "max_steps": 2}))
    assert "reference log-probabilities of 8 rows computed" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_killed_while_it_asks_goes_on_with_the_same_numbers(
    prefer_config, monkeypatch, tmp_path, method
):
    config = prefer_config(method=method)
    expected = tunesmith.prefer(config)
    shutil.rmtree(tmp_path / "cache")
    config["run"]["name"] = "killed"
    monkeypatch.setattr(reference_module, "_ROUNDS", 1)
    asked = []

    def stop_after_three(ask):
        def asking(items):
            asked.append(items)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return ask(items)

        return asking

    fill = reference_module._fill
    monkeypatch.setattr(
        reference_module,
        "_fill",
        lambda file, starts, passes, ask, *rest: fill(file, starts, passes, stop_after_three(ask), *rest),
    )
    with pytest.raises(KeyboardInterrupt):
        tunesmith.prefer(config)
    (file,) = (tmp_path / "cache").glob("reference-*/targets.f32")
    known = ~np.isnan(np.fromfile(file, dtype=np.float32))
    assert known.any()
    assert not known.all()
    result = tunesmith.prefer(config)
    assert len(asked) > 3
    assert metrics_without_times(result.run) == metrics_without_times(expected.run)
    assert same_files(result.final, expected.final)


# --- resume


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("dpo", {"adapter": {"dropout": 0.1}}),
        ("dpo", {"adapter": {"dropout": 0.1}, "prefer": {"reference": "live"}}),
        ("dpo", {"adapter": {"method": "none"}, "train": {"learning_rate": 1e-3}}),
        ("kto", {"adapter": {"dropout": 0.1}}),
        ("simpo", {}),
    ],
    ids=["cached", "live", "full", "kto", "simpo"],
)
def test_a_run_that_is_stopped_ends_where_one_that_was_not_ends(prefer_config, monkeypatch, method, sections):
    config = prefer_config(method=method, **sections)
    config["data"]["valid"] = 0.25
    straight = tunesmith.prefer(config)
    config["run"]["name"] = "stopped"
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Interrupted):
            tunesmith.prefer(config)
    resumed = tunesmith.prefer(config)
    assert metrics_without_times(straight.run) == metrics_without_times(resumed.run)
    assert same_files(straight.final, resumed.final)


# --- figures


def test_figures_are_means_over_the_pairs_of_a_step(prefer_config):
    config = prefer_config(rows=8, train={"batch_size": 8}, data={"valid": str(Path("unused"))})
    config["data"]["valid"] = config["data"]["train"]
    result = tunesmith.prefer(config | {"train": config["train"] | {"epochs": 3}})
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    base = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32).eval()
    rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
    sides = {
        side: [[*row["messages"], {"role": "assistant", "content": row[side]}] for row in rows]
        for side in ("chosen", "rejected")
    }
    with torch.no_grad():
        before = {side: answer_logps(base, tokenizer, chats) for side, chats in sides.items()}
        tuned = PeftModel.from_pretrained(base, result.final).eval()
        after = {side: answer_logps(tuned, tokenizer, chats)[0] for side, chats in sides.items()}
    reward = {side: 0.1 * (after[side] - before[side][0]) for side in sides}
    line = [line for line in read_metrics(result.run / "metrics.jsonl") if "eval_loss" in line][-1]
    margin = reward["chosen"] - reward["rejected"]
    expected = {
        "eval_reward_chosen": reward["chosen"].mean(),
        "eval_reward_rejected": reward["rejected"].mean(),
        "eval_reward_margin": margin.mean(),
        "eval_reward_accuracy": (margin > 0).float().mean(),
        "eval_logp_chosen": after["chosen"].mean(),
        "eval_logp_rejected": after["rejected"].mean(),
        "eval_logp_accuracy": (after["chosen"] > after["rejected"]).float().mean(),
        "eval_tokens_chosen": before["chosen"][1].float().mean(),
        "eval_tokens_rejected": before["rejected"][1].float().mean(),
        "eval_loss": -F.logsigmoid(margin).mean(),
    }
    assert {key: line[key] for key in expected} == pytest.approx(
        {key: float(value) for key, value in expected.items()}, rel=1e-3
    )


def test_a_method_for_pairs_refuses_labelled_rows_and_the_other_way_about(prefer_config):
    config, other = prefer_config(method="dpo"), prefer_config(method="kto")
    config["data"]["train"], other["data"]["train"] = other["data"]["train"], config["data"]["train"]
    with pytest.raises(DataError, match=r"answers with a label.*Set prefer.method to kto"):
        tunesmith.prefer(config)
    with pytest.raises(DataError, match=r"pairs of answers \(pairs\).*Set prefer.method to dpo"):
        tunesmith.prefer(other)


def test_chosen_answers_that_become_less_likely_are_warned_of_once(prefer_config, capsys):
    """Ten times the usual rate drives both answers down."""
    config = prefer_config(data={"valid": 0.25}, train={"epochs": 6, "learning_rate": 5e-2})
    result = tunesmith.prefer(config)
    first, *_, last = [line for line in read_metrics(result.run / "metrics.jsonl") if "eval_loss" in line]
    said = capsys.readouterr().out
    assert said.count("chosen answers became less likely") == 1
    assert f"(mean log-probability {first['eval_logp_chosen']:.1f} -> " in said
    assert "prefer.sft_weight keeps them likely" in said
    assert last["eval_logp_chosen"] < first["eval_logp_chosen"] - 1
    assert last["eval_reward_margin"] > 0


def test_without_an_evaluation_the_last_steps_are_looked_at(capsys):
    told: list[str] = []
    watch = DisplacementWatch(0.1, "Advice.", told.append)
    for step in range(1, 20):
        watch.look({"step": step, "reward_chosen": -0.3, "reward_margin": 0.2})
    assert not told
    watch.look({"step": 20, "reward_chosen": -0.3, "reward_margin": 0.2})
    watch.look({"step": 21, "reward_chosen": -0.9, "reward_margin": 0.9})
    assert told == [
        "warning: step 20: over the last 20 logged steps chosen answers are less likely than to the "
        "reference (mean log-ratio -3.0) while the margin of their reward is 0.200. Advice."
    ]
    for chosen, margin in ((-0.05, 0.2), (-0.3, -0.1), (0.3, 0.2)):  # half a nat; no margin; likelier
        told.clear()
        watch = DisplacementWatch(0.1, "Advice.", told.append)
        for step in range(1, 40):
            watch.look({"step": step, "reward_chosen": chosen, "reward_margin": margin})
        assert not told


def test_a_run_is_merged_as_any_other(prefer_config, tmp_path):
    config = prefer_config()
    result = tunesmith.prefer(config)
    tunesmith.merge([result.run], tmp_path / "merged")
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config["model"]["path"]), result.final
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, tuned(ids).logits, atol=1e-4)
