"""Chat answers as plain transformers would with the same folder, and says what is wrong with a folder."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tunesmith.artifacts.found import Found, find_model
from tunesmith.artifacts.tuned import Tuned, load_tuned
from tunesmith.data.formats import read_record
from tunesmith.errors import ConfigError, ModelError, TemplateError
from tunesmith.inference import chat as chat_module
from tunesmith.inference.chat import begin, chat
from tunesmith.inference.speak import Drawing

QUESTION = "one two?"


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Pipes lines into a chat; returns what it printed on stdout and on stderr."""

    def run(
        model: Path | str, *lines: str, system: str | None = None, max_new_tokens: int = 8, **options: Any
    ) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat(str(model), system=system, max_new_tokens=max_new_tokens, **options)
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def load(name: Path) -> Tuned:
    return load_tuned(find_model(str(name), print), print)


def greedy(model: Any, folder: Path, messages: list[dict[str, str]], number: int = 8) -> str:
    """The answer by argmax, token by token, without generate."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + number and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def shown(answers: list[str]) -> str:
    """What a pipe gets: the answers without what could drive a terminal."""
    kept = ["".join(char for char in answer if char in "\n\t" or char.isprintable()) for answer in answers]
    return "".join(f"{answer}\n" for answer in kept)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_pipe_gets_the_greedy_answers_and_the_second_knows_the_first(say: Any, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    first = greedy(model, model_folder, [user(QUESTION)])
    history = [user(QUESTION), {"role": "assistant", "content": first}, user("three?")]
    second = greedy(model, model_folder, history)
    alone = greedy(model, model_folder, [user("three?")])
    assert second != alone  # else the test could not tell
    out, err = say(model_folder, QUESTION, "three?", "/reset", "three?")
    assert out == shown([first, second, alone])
    assert "greedy (generation_config of" in err
    assert "an answer ends at <|im_end|>" in err


def test_the_system_prompt_is_there_and_stays_after_a_reset(say: Any, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected = greedy(model, model_folder, [{"role": "system", "content": "red"}, user(QUESTION)])
    assert expected != greedy(model, model_folder, [user(QUESTION)])
    out, _ = say(model_folder, QUESTION, "/reset", QUESTION, "/exit", QUESTION, system="red")
    assert out == shown([expected, expected])


def test_an_adapter_is_put_on_the_base_it_names(say: Any, adapter_folder: Path, model_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    plain = greedy(base, model_folder, [user(QUESTION)])
    tuned = greedy(PeftModel.from_pretrained(base, adapter_folder), model_folder, [user(QUESTION)])
    assert tuned != plain
    out, err = say(adapter_folder, QUESTION)
    assert out == shown([tuned])
    assert f"adapter {adapter_folder} on {model_folder}" in err.replace("\n", "")


def test_a_run_answers_with_its_best_and_without_one_with_its_final(
    adapter_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter_folder, tmp_path / "run" / "final")
    assert find_model(str(tmp_path / "run"), print) == Found(str(model_folder), tmp_path / "run" / "final")
    shutil.copytree(adapter_folder, tmp_path / "run" / "best")
    assert find_model(str(tmp_path / "run"), print) == Found(str(model_folder), tmp_path / "run" / "best")
    assert find_model(str(tmp_path / "run" / "final"), print) == Found(
        str(model_folder), tmp_path / "run" / "final"
    )


def test_the_adapters_own_generation_config_ends_the_answer(
    say: Any, adapter_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    messages = [user(QUESTION)]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    tuned = PeftModel.from_pretrained(base, adapter_folder)
    whole = tuned.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[
        0, len(prompt) :
    ]
    stop = int(whole[3])
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))
    GenerationConfig(eos_token_id=[1, stop], pad_token_id=1).save_pretrained(folder)
    until = whole[: whole.tolist().index(stop)]
    assert len(until) < len(whole) - 1
    out, err = say(folder, QUESTION)
    assert out == shown([tokenizer.decode(until, skip_special_tokens=True)])
    assert "cut off" not in err
    _, err = say(adapter_folder, QUESTION)
    assert "cut off at --max-new-tokens 8" in err


def test_sampling_is_used_and_named_where_the_folder_asks_for_it(
    say: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    GenerationConfig(
        do_sample=True, temperature=0.5, top_p=0.9, eos_token_id=1, pad_token_id=1
    ).save_pretrained(folder)
    _, err = say(folder)
    assert "sampling, temperature 0.5, top_p 0.9" in err


def test_temperature_and_top_p_are_taken_over_what_the_folder_says(
    say: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    settings = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, eos_token_id=1, pad_token_id=1)
    settings.save_pretrained(folder)
    out, err = say(folder, QUESTION, drawing=Drawing(temperature=0))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert out == shown([greedy(model, model_folder, [user(QUESTION)])])
    assert "greedy (as asked)" in err
    _, err = say(folder, drawing=Drawing(temperature=1.5, top_p=0.8))
    assert "sampling, temperature 1.5, top_p 0.8, top_k 7 (as asked)" in err
    _, err = say(model_folder, drawing=Drawing(temperature=1.5))
    assert "sampling, temperature 1.5 (as asked)" in err  # and no top_k of transformers' own
    with pytest.raises(ConfigError, match="--top-p 2: expected"):
        say(folder, drawing=Drawing(temperature=1, top_p=2))


def test_base_and_tuned_answer_side_by_side_each_with_its_own_history(
    say: Any, adapter_folder: Path, model_folder: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected: list[str] = []
    histories: dict[str, list[dict[str, str]]] = {"base": [], "tuned": []}
    models = {"base": base}
    models["tuned"] = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), adapter_folder
    )
    for question in (QUESTION, "three?"):
        for label, history in histories.items():
            history.append(user(question))
            said = greedy(models[label], model_folder, history)
            history.append({"role": "assistant", "content": said})
            expected.append(f"{label}: {shown([said])}")
    assert histories["base"][1] != histories["tuned"][1]
    out, _ = say(adapter_folder, QUESTION, "three?", compares_base=True)
    assert out == "".join(expected)


def test_the_base_of_a_full_run_is_the_model_its_config_names(
    say: Any, model_folder: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    changed = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight *= -1
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "final")
    changed.save_pretrained(run / "final")
    values = {"model": {"path": str(model_folder)}, "adapter": {"method": "none"}}
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"data": {"train": "t", "max_length": 512}}))
    out, _ = say(run, QUESTION, compares_base=True)
    answers = {
        name: greedy(m, model_folder, [user(QUESTION)]) for name, m in (("base", base), ("tuned", changed))
    }
    assert answers["base"] != answers["tuned"]
    assert out == "".join(f"{name}: {shown([said])}" for name, said in answers.items())
    with pytest.raises(ModelError, match="--compare-base has nothing to compare with"):
        say(model_folder, QUESTION, compares_base=True)


def test_on_a_wide_terminal_the_answers_stand_in_two_columns(
    adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = load(adapter_folder)
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(chat_module, "Console", lambda **_: console)
    talk = begin(tuned, None, 8, base=(tuned.model, tuned.model.disable_adapter))
    written.truncate(0)
    talk.answer(QUESTION)
    last = written.getvalue().rpartition("\u250f")[2].splitlines()  # the table that stays
    (_, *heading), (_, *row) = (
        [cell.strip() for cell in re.split("[\u2503\u2502]", line)] for line in last[1:4:2]
    )
    assert heading[:2] == ["base", "tuned"]
    said = [
        chat_module._harmless(speaker.messages[-1]["content"]).split("\n")[0] for speaker in talk.speakers
    ]
    assert [Text(text).plain.strip() for text in said] == row[:2]
    assert said[0] != said[1]


def test_a_system_prompt_can_be_set_and_taken_away_in_the_middle(say: Any, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    red = {"role": "system", "content": "red"}
    first = greedy(model, model_folder, [user(QUESTION)])
    history = [user(QUESTION), {"role": "assistant", "content": first}, user("three?")]
    second = greedy(model, model_folder, [red, *history])
    history += [{"role": "assistant", "content": second}, user("sun")]
    third = greedy(model, model_folder, history)
    out, _ = say(model_folder, QUESTION, "/system red", "three?", "/system", "sun")
    assert out == shown([first, second, third])


def test_a_saved_conversation_is_a_row_that_can_be_trained_on(
    say: Any, adapter_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talks.jsonl"
    commands = [QUESTION, "three?", f"/save {file}", "/reset", "sun", f"/save {file}"]
    _, err = say(adapter_folder, *commands, system="red", compares_base=True)
    assert f"added to {file}: 5 messages" in err.replace("\n", "")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    roles = [[message["role"] for message in row["messages"]] for row in rows]
    assert roles == [["system", "user", "assistant", "user", "assistant"], ["system", "user", "assistant"]]
    for row in rows:
        record, notes = read_record(row, "messages", {})
        assert list(record.messages) == row["messages"]
        assert notes == ()
    # What is kept is what the tuned model said, and not its base.
    out, _ = say(adapter_folder, "sun", system="red")
    assert shown([rows[1]["messages"][-1]["content"]]) == out
    _, err = say(adapter_folder, "/save", f"/save {tmp_path / 'empty.jsonl'}")
    assert err.count("there must be an answer in it") == 2
    assert not (tmp_path / "empty.jsonl").exists()


def test_a_control_string_in_a_question_is_plain_text(model_folder: Path) -> None:
    messages = [user("a<|im_end|>b")]
    ids = load(model_folder).prompt_ids(messages)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    # One <|im_end|> is the template's; served naively there would be two.
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = load(model_folder)
    model, tokenizer = tuned.model, tuned.tokenizer
    whole = greedy(model, model_folder, [user(QUESTION)])
    forward, calls = model.forward, iter(range(100))

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", interrupted)
    lines: Iterator[str] = iter([QUESTION, "/reset", QUESTION])
    capsys.readouterr()
    chat_module._converse(begin(tuned, None, 8), lines, is_terminal=True)
    printed = capsys.readouterr()
    asked = tokenizer.apply_chat_template([user(QUESTION)], add_generation_prompt=True, return_dict=True)
    prompt = asked["input_ids"]
    three = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=3)[0, len(prompt) :]
    assert printed.out == shown([tokenizer.decode(three, skip_special_tokens=True), whole])
    assert "stopped" in printed.err


def test_a_conversation_longer_than_the_model_is_refused_in_words(say: Any, model_folder: Path) -> None:
    out, err = say(model_folder, "x" * 600)
    assert out == ""
    assert "the model reads 512. /reset begins anew." in err


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert chat_module._harmless("a\x1b[2J\tb\n\x9bc\r\u00e9") == "a[2J\tb\nc\u00e9"


# --- what is no model


def test_a_folder_without_a_model_lists_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "old").mkdir()
    with pytest.raises(ModelError, match=r"holds no model: .*; found notes\.txt, old/\.$"):
        find_model(str(tmp_path), print)


def test_a_run_that_saved_nothing_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ModelError, match="It is a run that has saved nothing yet"):
        find_model(str(tmp_path), print)


def test_a_path_that_is_not_there_names_near_ones_and_a_hub_id_is_left_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "alpaca").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no such folder\. Near names in runs: alpaca\."):
        find_model("runs/alpacca", print)
    assert find_model("Qwen/Qwen2.5-0.5B-Instruct", print) == Found("Qwen/Qwen2.5-0.5B-Instruct")


def test_a_file_and_a_broken_adapter_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    with pytest.raises(ModelError, match="names no base model"):
        find_model(str(tmp_path), print)
    with pytest.raises(ModelError, match="is a file; expected the folder"):
        find_model(str(tmp_path / "adapter_config.json"), print)


def test_a_base_that_has_moved_is_named(adapter_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match=r"gone: no tokenizer can be loaded"):
        chat(str(folder), system=None, max_new_tokens=8)


def test_a_model_without_a_chat_template_is_no_chat_model(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match="has no chat template"):
        chat(str(folder), system=None, max_new_tokens=8)


def test_a_run_is_served_with_its_system_prompt_and_its_positions(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "final")
    longer = 2 * AutoModelForCausalLM.from_pretrained(model_folder).config.max_position_embeddings
    values = {
        "model": {"path": str(model_folder)},
        "data": {"train": "t.jsonl", "system": "be brief", "max_length": longer},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    for name in (run, run / "final"):
        tuned = load(name)
        assert tuned.model.config.rope_parameters["factor"] == 2
        assert begin(tuned, None, 4).system == "be brief"
        assert begin(tuned, "mine", 4).system == "mine"
    assert find_model(str(model_folder), print).run is None
