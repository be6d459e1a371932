"""`tunesmith export hf`: a plain transformers folder, tried by a process that knows nothing of tunesmith."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tunesmith.artifacts.export import commands
from tunesmith.artifacts.export.check import Reference
from tunesmith.artifacts.export.gguf_file import reference_of, refuse_existing, work_folder
from tunesmith.artifacts.export.plain import model_files, plain_folder
from tunesmith.artifacts.found import Say, find_model
from tunesmith.artifacts.tuned import load_own_model, load_own_tokenizer
from tunesmith.errors import ExportError

# Mean difference of log-probabilities in nats. The same weights give the same numbers; a merged adapter is
# rounded to the format of the base's weights.
_SAME, _MERGED = 1e-4, 0.1

_STOCK = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, asked, answers = sys.argv[1:]
asked = json.load(open(asked, encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
chats = [
    tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    for chat in asked["chats"]
]
with torch.inference_mode():
    last = [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy() for ids in asked["prompts"]]
np.savez(answers, logps=np.stack(last), chats=np.array(json.dumps(chats)))
"""


def export_hf(name: str, out: Path, say: Say) -> Path:
    """Write the model of a run, adapter or model as a folder that stock transformers, vLLM and SGLang load:
    an adapter is merged into its base.

    Raises ModelError for a model that cannot be loaded, ExportError if what was written is not the model."""
    out = out.expanduser()
    refuse_existing(out)
    found = find_model(name, say)
    with work_folder(out) as work:
        plain = plain_folder(found, work, say)
        folder = work / "hf"
        if plain.parent == work:
            plain.rename(folder)
        else:
            folder.mkdir()
            for file in model_files(plain):
                shutil.copy(file, folder)
        trained = load_own_model(found, load_own_tokenizer(found), torch.float32, lambda _: None)
        reference = reference_of(found, trained, say)
        say("loading it with stock transformers")
        error, number = _compare(folder, reference, work)
        limit = _SAME if found.adapter is None else _MERGED
        if not error <= limit:
            raise ExportError(
                f"log-probabilities in stock transformers differ by {error:.3g} nats on average from those "
                f"of the tuned model; expected {limit} at most"
            )
        folder.rename(out)
    say(f"prompt ids of {number} conversations equal the trained ones; log-probabilities within {error:.2g}")
    say(f"{out}\n{commands.servers(out)}")
    return out


def _compare(folder: Path, reference: Reference, work: Path) -> tuple[float, int]:
    """(mean difference of the log-probabilities of next tokens, number of conversations whose ids are
    equal). Raises ExportError at the first whose are not."""
    chats, prompts = reference.chats(), reference.prompts()
    asked, answers = work / "asked.json", work / "answers.npz"
    asked.write_text(json.dumps({"chats": [chat for chat, _ in chats], "prompts": prompts}), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-I", "-c", _STOCK, str(folder), str(asked), str(answers)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(f"stock transformers cannot load what was written: {last}")
    with np.load(answers) as given:
        logps, ids = given["logps"], json.loads(str(given["chats"]))
    for (messages, ours), theirs in zip(chats, ids, strict=True):
        if theirs != ours:
            raise ExportError(
                f"a conversation that ends with {messages[-1]['content'][:60]!a} has another prompt in stock "
                "transformers than in training"
            )
    own = np.stack([reference.logps(prompt, ())[0].numpy() for prompt in prompts])
    likely = own > np.log(1e-4)
    return float(np.abs(own - logps)[likely].mean()), len(chats)
