"""The README of what a run made: what it is, what it was trained on and how, what it reached, and its limits."""

from __future__ import annotations

from typing import Any

from tunesmith.config import Config, dump_config
from tunesmith.data.loading import Data
from tunesmith.models.adapt import count_parameters


def model_card(config: Config, data: Data, model: Any, step: int, metrics: dict[str, Any]) -> str:
    """A model card in Markdown, with the front matter that the hub reads."""
    is_adapter = config.adapter.method != "none"
    trained, total = count_parameters(model)
    kind = "a LoRA adapter for" if is_adapter else "a fine-tuned copy of"
    front = [
        "---",
        f"base_model: {config.model.path}",
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [tunesmith, sft" + (", lora]" if is_adapter else "]"),
        "---",
    ]
    sources = [
        f"| {report.path} | {report.format} | {report.rows_read} | {report.rows_kept} | {report.tokens} | {report.target_tokens} |"
        for report in data.train.reports
    ]
    reached = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, (int, float))]
    return "\n".join(
        [
            *front,
            "",
            f"# {config.run.name}",
            "",
            f"This is {kind} `{config.model.path}`, tuned with tunesmith for {step} steps of {config.train.batch_size} rows.",
            f"Trained parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %).",
            "",
            "## Use",
            "",
            "```python",
            *_usage(is_adapter),
            "```",
            "",
            "## Data",
            "",
            "| source | format | rows read | rows trained on | tokens | targets |",
            "|---|---|---|---|---|---|",
            *sources,
            "",
            f"Loss on: `{config.data.train_on}`. Longest example: {config.data.max_length} tokens"
            f" (longer ones: {config.data.too_long}). Validation rows: {data.valid.num_rows if data.valid else 0}"
            + (f", of which {data.overlap} stand in the training set too." if data.overlap is not None else "."),
            "",
            "## Metrics",
            "",
            "| metric | value |",
            "|---|---|",
            *reached,
            "",
            "## Limits",
            "",
            "The figures hold for rows like those it was tuned and evaluated on. Nothing was measured on other tasks, on",
            "safety or on bias; what the base model does there may have changed. The base model's licence applies.",
            "",
            "## Config",
            "",
            "```yaml",
            dump_config(config).rstrip(),
            "```",
            "",
        ]
    )


def _usage(is_adapter: bool) -> list[str]:
    loader = "peft import AutoPeftModelForCausalLM as Model" if is_adapter else "transformers import AutoModelForCausalLM as Model"
    return [
        f"from {loader}",
        "from transformers import AutoTokenizer",
        "",
        'model = Model.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'messages = [{"role": "user", "content": "..."}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))",
    ]
