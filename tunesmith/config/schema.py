"""The schema of a config file: one pydantic model a section, one documented field a setting.

A field is here only if code reads it. The text under a field is its documentation everywhere: in the JSON
schema that editors complete from, and in `docs/config.md`. It gives the unit, and where the default comes
from.
"""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from tunesmith.config.checks import check_consistency, resolve_defaults
from tunesmith.config.methods import MethodName
from tunesmith.config.preferences import PREFERENCES, PreferenceName

Role = Literal["system", "user", "assistant", "tool"]
Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "pairs", "labelled", "ranked"
]

PositiveInt = Annotated[int, Field(ge=1, lt=2**53)]  # beyond 2**53 JSON readers round
PositiveFloat = Annotated[float, Field(gt=0)]
# A description inside a union is that branch's name in messages and in the JSON schema.
Fraction = Annotated[float, Field(gt=0, lt=1, description="a fraction above 0 and below 1")]
Text = Annotated[str, Field(min_length=1)]
SourcePath = Annotated[str, Field(min_length=1, description="a path")]
RunName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="a name of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    ),
]


def _one_or_many(value: Any) -> Any:
    """Let `train: a.jsonl` and `train: {path: a.jsonl}` stand for a list of one source."""
    if isinstance(value, str):
        return [{"path": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and a config cannot change once it is read.

    Strict: `true` is no number, `"8"` is no number and `3.0` is no whole number, in a config as in Python."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunConfig(Section):
    """Where the run lives and how it is repeated."""

    name: RunName | None = None
    """Folder of the run below `output_dir`. Default: the config file's name without its ending, or `run`
    for a config that is no file."""
    output_dir: Text = "runs"
    """Folder that holds runs."""
    recipe: Literal["sft", "pretrain", "prefer"] | None = None
    """What is trained: answers of conversations (`sft`), whole texts (`pretrain`), or which of two answers is
    the better one (`prefer`). The verb says it; name it here for verbs that cannot, such as `preview`.
    Default `sft`. Some defaults depend on it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of row order, adapter initialisation, dropout and NEFTune noise."""
    resume: Literal["auto", "never"] | PositiveInt = "auto"
    """`auto` goes on from the newest complete checkpoint of this run, or starts afresh when there is none;
    `never` refuses a run folder that already holds a run; a number names the step of the checkpoint to go
    on from."""
    resume_anyway: bool = False
    """Go on with other settings, data, tokenizer or base weights than the run began with. What differs is
    shown either way; without this it is refused."""


class ModelConfig(Section):
    """The base model and how it is loaded, or the config of one that begins from scratch."""

    path: Text | None = None
    """Folder or hub id of the base model. Only safetensors weights are read."""
    config: Text | None = None
    """In place of `path`: folder, hub id or JSON file of a model's config. The model is made by it with
    random weights drawn from `run.seed`, and all of it is trained; no weights are read. Its vocabulary is the
    tokenizer's, rounded up to a multiple of 64."""
    config_changes: dict[str, JsonValue] = {}
    """Fields of that config to change, such as `{hidden_size: 256, num_hidden_layers: 8}`. A mapping changes
    the fields it names in a mapping of the config."""
    initialisation: Literal["scaled", "plain"] = "scaled"
    """Random weights of `config`: `plain` is what transformers draws for the architecture; `scaled` divides
    those of the projections that write into the residual stream by sqrt(2 x layers), which keeps that
    stream's size from growing with depth (GPT-2, Radford et al. 2019, section 2.3)."""
    tokenizer: Text | None = None
    """Folder or hub id of the tokenizer. Default: the one beside the model or its config."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the matrix products and of frozen weights. `auto` is bfloat16 where the hardware
    multiplies it natively, else float32. Trained weights are always kept in float32, since AdamW's small
    steps vanish in bfloat16."""
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention implementation of transformers. `auto` takes the fastest that can do what `data.packing`
    asks: our own on a CPU; on a GPU FlexAttention for `tree`, and FlashAttention, if installed, for `flat`;
    else what transformers chooses (sdpa). With any other value examples cannot share prefixes (`tree`)."""
    quantization: Literal["none", "nf4", "int8", "torchao_int8"] = "none"
    """Hold the frozen weights of the base's linear layers, but for the head, in 4 or 8 bits; needs an
    adapter. `nf4`: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), products in `dtype`. `int8`: LLM.int8()
    (Dettmers et al. 2022, arXiv:2208.07339), inputs rounded to 8 bits too; both by bitsandbytes.
    `torchao_int8`: weights only, by torchao. Its int4 is not offered: PEFT refuses such weights, and they do
    not run on CPUs."""
    double_quantization: bool = True
    """With `nf4`: quantise the scales of the weights as well, which takes 0.37 bits less a weight (QLoRA,
    section 3)."""
    rope_scaling: Literal["auto", "none", "linear", "dynamic", "yarn"] = "auto"
    """Scaling of rotary positions when `data.max_length` exceeds the length the model was trained for.
    `auto`: leave what the model's config has, and add linear scaling by the smallest whole factor only when
    the length demands it."""
    freeze: list[Text] = []
    """Regular expressions; parameters whose name one of them finds are not trained (full fine-tuning)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model."""

    @property
    def is_from_scratch(self) -> bool:
        """Whether the weights begin at random."""
        return self.config is not None

    @property
    def origin(self) -> tuple[str, str]:
        """(key, folder, hub id or JSON file) of the model: what it goes on from, or the config it begins
        by."""
        return ("model.path", self.path) if self.path is not None else ("model.config", self.config or "")

    @property
    def tokenizer_origin(self) -> tuple[str, str]:
        """(key, folder or hub id) of the tokenizer."""
        if self.tokenizer is not None:
            return "model.tokenizer", self.tokenizer
        key, place = self.origin
        is_file = key == "model.config" and place.endswith(".json")
        return key, os.path.dirname(place) or "." if is_file else place


class AdapterConfig(Section):
    """What is trained: something small beside the model, or the model itself (`none`). A key that the method
    does not read is an error; docs/adapters.md tells which to choose."""

    method: MethodName | None = None
    """How the model is tuned. `lora` (Hu et al. 2021, arXiv:2106.09685) adds low-rank matrices B A to linear
    layers; `dora` (Liu et al. 2024, arXiv:2402.09353) learns the length of each output's weights apart from
    their direction; `rslora` (Kalajdzievski 2023, arXiv:2312.03732) divides alpha by sqrt(r) and not by r;
    `pissa` (Meng et al. 2024, arXiv:2404.02948) and `olora` (Büyükakyüz 2024, arXiv:2406.01775) begin with
    the largest singular directions, or the first columns of a QR decomposition, of the weights; `loftq` (Li
    et al. 2023, arXiv:2310.08659) begins with the rounding error of 4-bit weights; `adalora` (Zhang et al.
    2023, arXiv:2303.10512) shares a budget of ranks out among layers; `vera` (Kopiczko et al. 2023,
    arXiv:2310.11454) trains two vectors a layer between random matrices that all share; `oft` (Qiu et al.
    2023, arXiv:2306.07280) rotates the inputs of linear layers; `ia3` (Liu et al. 2022, arXiv:2205.05638)
    rescales keys, values and the feed-forward's inner activations; `bottleneck` (Houlsby et al. 2019,
    arXiv:1902.00751) puts a small network after each attention and feed-forward; `prefix` (Li and Liang 2021,
    arXiv:2101.00190) learns keys and values of virtual tokens in each layer, `prompt` (Lester et al. 2021,
    arXiv:2104.08691) their embeddings, `p_tuning` (Liu et al. 2021, arXiv:2103.10385) a network that makes
    the embeddings; `ln_tuning` (Zhao et al. 2023, arXiv:2312.11420) trains the norms, and `trainable_tokens`
    the embeddings of a few tokens. `none` trains the model itself. Default: `lora`; with `model.config` and
    in pretraining, `none`."""
    r: PositiveInt | None = None
    """Rank of the matrices of the LoRA family; `adalora`: the mean rank at the end, having begun with 1.5
    times that; width of `bottleneck`. Default 16 (on all linear layers, by the QLoRA paper's finding that
    rank matters less than coverage), for `adalora` 8, for `vera` 256, for `bottleneck` 64."""
    alpha: PositiveFloat | None = None
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) for `rslora`). Default 32, twice the
    default rank; 16 for `pissa`, `olora` and `loftq`, whose beginning stands for a part of the weights
    themselves."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input; for `oft` of whole blocks, for `bottleneck` on its inner
    activations."""
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """`all-linear` (every linear layer but the output head), a list of module names, or one regular
    expression that must match a module's whole name. Default `all-linear`; for `ia3` the projections of keys
    and values and the last of the feed-forward, as in its paper."""
    modules_to_save: list[Text] = []
    """Modules trained in full beside the adapter and saved with it, such as `lm_head`."""
    lora_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Learning rate of the B matrices over that of the A matrices (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354, which suggests 16). 1 is plain LoRA."""
    trainable_tokens: list[Text] = []
    """Tokens whose embedding rows are trained and saved with the adapter. One the tokenizer lacks is added
    to it."""
    oft_block_size: PositiveInt | None = None
    """Inputs that `oft` rotates together; it must divide the number of inputs of each layer. Default 32, as
    in PEFT."""
    num_virtual_tokens: PositiveInt | None = None
    """Virtual tokens of `prefix`, `prompt` and `p_tuning`, put before every example; they take room in the
    model's context. Default 20, beyond which Lester et al. found little gain (section 3.2)."""
    encoder_size: Annotated[int, Field(ge=0)] | None = None
    """Width of the network that makes the virtual tokens while `prefix` and `p_tuning` are trained; only what
    it makes is saved in the end. Default 512, as in Li and Liang. 0 trains those of `prefix` themselves."""
    init_text: Text | None = None
    """Text whose embeddings the tokens of `prompt` begin with, repeated or cut to their number. Default:
    tokens drawn from the vocabulary."""


class SourceConfig(Section):
    """One place where rows come from."""

    path: Text
    """A file (.jsonl, .json, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .csv, .txt), a folder or glob of
    them, or a hub data set id (`owner/name`, or `owner/name:split`)."""
    weight: PositiveFloat = 1.0
    """How often the source is seen in an epoch: 1 is every row once, 0.5 a random half, anew each epoch, 2
    is each row twice. In pretraining the rows that are drawn are blocks."""
    format: Format = "auto"
    """Shape of the rows; `auto` finds it from the first rows and prints it."""
    columns: dict[str, str] = {}
    """Renames columns before the format is read: `{question: instruction, answer: output}` maps the file's
    `question` to our `instruction`."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What a row of a .txt file is, named as in `datasets`: a line, a paragraph (lines up to a blank one), or
    the whole file. Blank ones are no rows."""


Sources = Annotated[
    list[SourceConfig],
    BeforeValidator(
        _one_or_many,
        # What an editor is told to accept; each of these becomes a list of sources.
        json_schema_input_type=SourcePath
        | SourceConfig
        | Annotated[list[SourcePath | SourceConfig], Field(min_length=1)],
    ),
    Field(min_length=1),
]


class DataConfig(Section):
    """Rows, and how they become tokens and targets."""

    train: Sources
    """Rows to train on: a path, a source, or a list of either."""
    valid: Fraction | Sources | None = None
    """Rows to evaluate on: a path, a source, a list of either, or a fraction of the training rows split off
    by `run.seed`."""
    format: Format = "auto"
    """Format of every source that does not name its own."""
    columns: dict[str, str] = {}
    """Column names of every source that does not name its own."""
    template: Text = "auto"
    """`auto` is the tokenizer's own chat template, `chatml` sets up ChatML on a base model, anything else
    is the path of a Jinja file."""
    system: str | None = None
    """System prompt given to every conversation; it replaces one that is there."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens carry loss: all assistant turns, the last one only, or the whole text. `tunesmith prefer`
    always trains the assistant turns that its answers differ in."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest example, in tokens."""
    too_long: Literal["drop", "truncate", "split", "error"] | None = None
    """What happens to an example over `max_length`: `drop` counts it, `truncate` cuts its end and keeps it
    only if a target is left (no end token is invented), `split` makes several examples of it (pretraining
    only), `error` stops. Default `drop`; in pretraining `split`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` lists the first 20 bad rows and stops; `skip` leaves them out and counts them in
    `data_report.json`."""
    max_row_bytes: PositiveInt = 16 * 2**20
    """A row of more bytes than this is a bad row (it is nearly always a broken file)."""
    loading: Literal["cached", "lazy", "streaming"] = "cached"
    """`cached` tokenises once, in parallel, to memory-mapped files; `lazy` tokenises a row when it is
    fetched; `streaming` reads the files in order, never all of them (needs `train.max_steps`)."""
    shuffle_buffer: PositiveInt = 10_000
    """Rows that are shuffled with one another under `loading: streaming`, and held in memory. In pretraining
    these documents are grouped into blocks with one another, too."""
    packing: Literal["tree", "flat", "none", "concatenate"] | None = None
    """`tree` lays the examples of a micro-batch end to end in one forward pass, each seeing only itself, and
    computes once what several of them begin with (a system prompt, a document, the earlier turns of a chat);
    `flat` does so without sharing; `none` runs one example a pass. The result is the same; none pads. Where a
    model cannot do what is asked, the run says so and does the next of the three. `concatenate` (pretraining
    only) is another training: documents are joined, cut every `max_length` tokens, and see each other.
    Default `tree`; in pretraining `flat`; with virtual tokens (`adapter.method: prefix`, `prompt` or
    `p_tuning`) `none`, the only one they go with."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that prepare rows. Default: one a core, or none (this process alone) when the files are
    under 16 MiB."""
    cache_dir: Text | None = None
    """Folder of the prepared data. Default: `tunesmith/data` below the user's cache folder."""

    @property
    def pass_packing(self) -> Literal["tree", "flat", "none"]:
        """How the examples of a pass lie in it. A block of joined documents is an example like others."""
        return "flat" if self.packing == "concatenate" else self.packing or "tree"


class PreferConfig(Section):
    """Learning from pairs of answers, or from answers with a thumb up or down (`tunesmith prefer`). A key
    that the method does not read is an error, and so is any of them under another recipe."""

    method: PreferenceName | None = None
    """How. `dpo` (Rafailov et al. 2023, arXiv:2305.18290) makes chosen answers likelier than rejected ones,
    compared with the model that training began with; `ipo` (Azar et al. 2023, arXiv:2310.12036) only up to a
    margin; `hinge` (Zhao et al. 2023, arXiv:2305.10425) until a margin is reached; `robust` (Chowdhury et
    al. 2024, arXiv:2403.00409) where a known share of the pairs is the wrong way about. `kto` (Ethayarajh et
    al. 2024, arXiv:2402.01306) learns from single answers with a label. Without a reference: `orpo` (Hong et
    al. 2024, arXiv:2403.07691) and `cpo` (Xu et al. 2024, arXiv:2401.08417), which fine-tune on the chosen
    answers at the same time, and `simpo` (Meng et al. 2024, arXiv:2405.14734), which compares mean tokens.
    `reward` (Bradley-Terry, as in Touvron et al. 2023, arXiv:2307.09288) makes a model that gives answers
    scores. Default `dpo`."""
    beta: PositiveFloat | None = None
    """Scale of the rewards that a loss compares: the larger, the closer the model stays to its reference.
    `ipo`: tau of its paper; `orpo`: lambda, the weight of the odds ratio. Default 0.1; 2 for `simpo`, and 5
    for `dpo` with `length_normalized` (Lambert et al. 2024, arXiv:2411.15124)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Share of the pairs taken to be the wrong way about: `dpo` expects it (conservative DPO, Mitchell 2023),
    `robust` corrects for it. Default 0, for `robust` 0.1."""
    gamma: Annotated[float, Field(ge=0)] | None = None
    """Margin that `simpo` wants between the rewards. Default 1, half of beta, as its authors advise."""
    sft_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the mean negative log-probability of the chosen answer's tokens, added to the loss (Pang et
    al. 2024, arXiv:2404.19733, which takes 1): it keeps chosen answers from becoming less likely too.
    Default 0; 1 for `cpo`, of which it is a part."""
    desirable_weight: PositiveFloat | None = None
    """Weight of desirable answers in `kto`. Where there are fewer of them, let weight x number be 1 to 3/2
    times that of the undesirable ones, as its paper advises. Default 1."""
    undesirable_weight: PositiveFloat | None = None
    """Weight of undesirable answers in `kto`. Default 1."""
    length_normalized: bool | None = None
    """Compare the mean log-ratio of an answer's tokens and not their sum, so that long answers do not weigh
    more. Default false for `dpo`, and true for `ipo`, as its authors ran it."""
    reference: Literal["cached", "live"] | None = None
    """Where the log-probabilities of the reference, the model that training began with, come from.
    `cached`: computed once, before training, and kept beside the prepared data for this and later runs.
    `live`: computed in each step, by the model with its adapter switched off, or by a frozen copy where the
    whole model is trained. Default `cached`."""


class BatchSizeWarmup(Section):
    """How the number of rows per step grows at the beginning."""

    start: PositiveInt
    """Rows of the first step."""
    steps: PositiveInt
    """Steps until there are `train.batch_size` rows."""


class TrainConfig(Section):
    """The optimisation."""

    epochs: PositiveFloat | None = None
    """Passes over the training rows; fractions are allowed. Default 3 unless `max_steps` is set; under
    `tunesmith prefer` 1, as in most of its papers."""
    max_steps: PositiveInt | None = None
    """Optimiser steps to stop after, instead of `epochs`."""
    batch_size: PositiveInt = 16
    """Rows per optimiser step over all ranks. Packing, micro-batches and rank count do not change it. A pair
    of answers is one row."""
    batch_size_warmup: BatchSizeWarmup | None = None
    """Let steps begin with fewer rows and grow evenly, such as `{start: 4, steps: 100}` (GPT-3, Brown et al.
    2020, arXiv:2005.14165, appendix B). A run of so many epochs has more steps then."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass; a prefix that rows share counts once. It bounds memory and does not
    change the result. Default: chosen when the run starts, from the memory that is free and what larger
    passes would save; config.yaml of the run says what was chosen, and the run goes on with it after a
    stop."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default 2e-4 for LoRA and its like (QLoRA paper, table 9), more for methods that
    train less (docs/adapters.md has them), 1e-5 for full fine-tuning, and 6e-4 for a model from scratch (125M
    parameters in GPT-3's table 2.1, Brown et al. 2020, arXiv:2005.14165, which takes 2e-4 at 1.3B and 1.2e-4
    at 6.7B). Under `tunesmith prefer` 5e-6 for LoRA and 5e-7 for full fine-tuning (the recipes of Zephyr,
    Tunstall et al. 2023, arXiv:2310.16944); for `prefer.method` `kto` and `orpo` 5e-5 and 5e-6, `simpo` 6e-6
    and 6e-7, `cpo` and `reward` 1e-4 and 1e-5."""
    schedule: Literal[
        "cosine", "linear", "constant", "cosine_with_min_lr", "inverse_sqrt", "warmup_stable_decay"
    ] = "cosine"
    """Shape of the learning rate after warm-up. `cosine`, `linear` and `warmup_stable_decay` end at
    `min_learning_rate`; `cosine_with_min_lr` ends at a tenth of the peak unless that is set.
    `warmup_stable_decay` stays at the peak and falls over the last `decay` of the steps, by 1 - sqrt (Hägele
    et al. 2024, arXiv:2405.18392)."""
    min_learning_rate: PositiveFloat | None = None
    """Learning rate that the schedule ends at. Default: 0; a tenth of the peak is common in pretraining."""
    decay: PositiveFloat = 0.1
    """How long `warmup_stable_decay` falls. Below 1: fraction of all steps; 1 and above: number of steps.
    Hägele et al. find 0.1 to 0.2 enough."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1: fraction of all steps; 1 and above: number of steps. 0.03 as in the QLoRA paper."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay, applied to matrices only: never to biases, norms or embeddings, nor to a head that is
    tied to them (OLMo 2, arXiv:2501.00656: those that decay grow too small). Pretraining
    mostly takes 0.1."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a target's probability that is spread over the whole vocabulary, in training only (Szegedy et
    al. 2016, arXiv:1512.00567)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of log(Z)^2, which is added to the loss of each target in training only, where Z is the sum
    that the softmax divides by: it keeps logits from drifting (PaLM, Chowdhery et al. 2022, arXiv:2204.02311,
    section 5, which takes 1e-4)."""
    optimizer: Literal["adamw", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"] = "adamw"
    """`adamw` is torch's fused AdamW. The 8-bit ones need `tunesmith[quant]`."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass to save memory. `auto` turns it on when the estimate for
    `micro_batch_tokens` does not fit in the memory that is free."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the noise added to embeddings while training (Jain et al. 2023, arXiv:2310.05914, which
    suggests 5)."""
    loader_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that fetch rows during training. 0 is best for cached data; lazy data may gain from more."""
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """What to do about a step whose loss or gradient is not finite, or whose loss leaps up (`spike_factor`).
    Its rows are listed in `bad_step.json`, and the weights never see it: `stop` ends the run, `skip` leaves
    the step out, `rollback` goes back to the last checkpoint and leaves it out when it comes to it again."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A step is bad when its loss is more than this many times the median of the last 64 good steps. Default:
    loss may do what it likes while it is finite."""
    log_every_steps: PositiveInt = 1
    """Steps between two lines of `metrics.jsonl`."""
    trainer_args: dict[str, JsonValue] = {}
    """Any other field of transformers' TrainingArguments, passed on as it is. One that a setting above
    decides is an error."""


class EvalConfig(Section):
    """Evaluation on `data.valid`."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations. Default: at the end of each epoch. There is always one at the end."""
    batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass. It does not change the result. Default: `train.micro_batch_tokens`."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a lower eval loss."""
    answer_rows: Annotated[int, Field(ge=0)] = 0
    """Answer this many validation rows before and after training (greedily) and report exact matches and
    examples."""
    stop_rate_rows: Annotated[int, Field(ge=0)] = 8
    """After `tunesmith sft`, answer this many rows greedily and report which share of the answers ended by
    itself: of validation rows, else training rows, those with the shortest answers of the first ones (or
    those of `answer_rows`, where there are some). An answer may take twice the tokens of the longest of their
    own, and 64 in any case. 0: do not."""
    prompts: list[Text] = []
    """Texts that the model goes on with at each evaluation, as raw text; what it wrote is in
    `samples.jsonl`."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature at which those texts are drawn, by `run.seed`; 0 takes the likeliest token."""
    max_new_tokens: PositiveInt = 256
    """Longest of those answers and texts, in tokens."""


class CheckpointConfig(Section):
    """What is saved while training, so that a run can go on after a stop."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints. Default: at the end of each epoch. There is always one when a signal ends
    the run."""
    keep: PositiveInt = 2
    """Newest checkpoints kept, beside the one of the lowest eval loss. `best/` and `final/` are apart and
    never deleted."""
    asynchronous: bool = False
    """Copy what a checkpoint holds to memory and write it while training goes on. It takes as much memory as
    a checkpoint takes disk."""
    on_save_error: Literal["warn", "stop"] = "warn"
    """What to do when a checkpoint or `best/` cannot be written, as on a full disk: `warn` says so and goes
    on to the next one, `stop` ends the run. The last complete checkpoint stays as it was."""


class DistributedConfig(Section):
    """How several processes share one run. Nothing else in a config depends on their number."""

    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    """What each process holds: `ddp` all of model, gradients and optimiser (and so does one process alone);
    `fsdp` a share of each (FSDP2, Zhao et al. 2023, arXiv:2304.11277); `zero2` all of the model and a share
    of gradients and optimiser, `zero3` a share of each (DeepSpeed ZeRO, Rajbhandari et al. 2020,
    arXiv:1910.02054; needs `tunesmith[deepspeed]`)."""
    config: Text | dict[str, JsonValue] | None = None
    """Settings of the engine as it knows them, written here or in a JSON file: a DeepSpeed config, whose
    `"auto"` are filled in, or the `fsdp_config` of transformers. They go before ours."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep in the processor's memory, instead of the accelerator's: the optimiser's state (`zero2`, `zero3`),
    or weights and gradients too (`fsdp`, `zero3`)."""
    timeout_s: PositiveInt = 1800
    """Longest that processes wait for each other; then the run ends and says which is late."""


class TrackingConfig(Section):
    """Experiment trackers, beside `metrics.jsonl` which is always written."""

    report_to: list[Literal["swanlab", "tensorboard", "wandb", "trackio"]] = []
    """Trackers by name. One that fails is reported once and never ends the run."""
    project: Text = "tunesmith"
    """Project name in the tracker. The run's name is `run.name`."""
    swanlab_mode: Literal["local", "cloud", "offline", "disabled"] = "local"
    """SwanLab sends nothing anywhere unless this is `cloud`."""


class Config(Section):
    """A whole config. A minimal file names `model.path` (or `model.config`) and `data.train`."""

    # A factory each: `resolve_defaults` writes into sections, and one default is one object for all configs.
    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig
    prefer: PreferConfig = Field(default_factory=PreferConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @property
    def has_scalar_head(self) -> bool:
        """Whether the model gives an answer a score, and the next token no probabilities."""
        method = self.prefer.method or "dpo"
        return self.run.recipe == "prefer" and PREFERENCES[method].has_scalar_head

    @model_validator(mode="after")
    def _resolve_and_check(self) -> Config:
        resolve_defaults(self)
        check_consistency(self)
        return self
