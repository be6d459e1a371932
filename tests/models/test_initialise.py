"""Models from scratch: the config that was asked for, weights by the seed, sizes that fit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.config import load_config
from tunesmith.errors import ModelError
from tunesmith.models.adapt import build_model
from tunesmith.models.cost import size_lines
from tunesmith.models.initialise import initialise_model, residual_projections, scratch_config

# As Qwen2.5-0.5B's config.json has it on the hub.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    "max_position_embeddings": 32768, "max_window_layers": 24, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
    "bos_token_id": 151643, "eos_token_id": 151643, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "sliding_window": 32768, "initializer_range": 0.02,
}  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
TOKENS = 259  # of the tiny tokenizer: 256 bytes and three control tokens


@pytest.fixture
def qwen(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN))
    return file


def config_of(place, changes=SMALL, **sections):
    model = {"config": str(place), "config_changes": changes, **sections.pop("model", {})}
    return load_config({"model": model, "data": {"train": "none.jsonl"}, **sections})


def made(place, changes=SMALL, **sections):
    return scratch_config(config_of(place, changes, **sections), tiny_tokenizer())


def built(config, seed=None):
    set_seed(config.run.seed if seed is None else seed)
    return initialise_model(config, tiny_tokenizer(), lambda _: None)


def family_config(family, tmp_path):
    """The folder of a config of the family, without weights and with its own ideas of the special tokens."""
    CONFIG_MAPPING[family](
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=7, bos_token_id=8,
        eos_token_id=9, tie_word_embeddings=family != "mistral",
    ).save_pretrained(tmp_path / family)  # fmt: skip
    return tmp_path / family


# --- the config


def test_changes_override_fields_and_the_rest_stays(qwen):
    config = made(qwen)
    assert {name: getattr(config, name) for name in SMALL} == SMALL
    assert (config.num_key_value_heads, config.rms_norm_eps, config.tie_word_embeddings) == (2, 1e-6, True)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert made(qwen, {**SMALL, "rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5


def test_what_a_changed_field_decides_is_decided_anew(tmp_path):
    """transformers writes out what it derives: the size of a head, the kind of each layer."""
    CONFIG_MAPPING["llama"](
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    ).save_pretrained(tmp_path / "a")
    assert made(tmp_path / "a", {"hidden_size": 64}).head_dim == 16
    assert made(tmp_path / "a", {"hidden_size": 64, "head_dim": 32}).head_dim == 32
    CONFIG_MAPPING["qwen3"](
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    ).save_pretrained(tmp_path / "b")
    assert (
        made(tmp_path / "b", {"hidden_size": 64}).head_dim == 64
    )  # 128 / 4 it never was: a choice, which stays
    gemma = CONFIG_MAPPING["gemma2"](num_hidden_layers=6)
    gemma.save_pretrained(tmp_path / "c")
    for layers in (3, 8):
        kinds = made(tmp_path / "c", {"num_hidden_layers": layers}).layer_types
        assert kinds == (gemma.layer_types * 2)[:layers]


def test_a_mapping_changes_what_it_names(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    CONFIG_MAPPING["llama"](rope_parameters=rope).save_pretrained(tmp_path)
    assert made(tmp_path, {"rope_parameters": {"factor": 4.0}}).rope_parameters == rope | {"factor": 4.0}


def test_the_vocabulary_is_the_tokenizers_rounded_up_to_a_multiple_of_64(qwen):
    assert made(qwen).vocab_size == 320
    assert made(qwen, {**SMALL, "vocab_size": 300}).vocab_size == 300  # asked for: left as it is
    with pytest.raises(
        ModelError, match=r"vocab_size=258, but the tokenizer has 259 tokens. .* it is then 320\."
    ):
        made(qwen, {**SMALL, "vocab_size": 258})


def test_special_tokens_are_the_tokenizers_and_no_row_is_kept_from_training(qwen):
    """transformers leaves out the row of the pad token, drawing and training; the tokenizer's is also its
    EOS, which ends documents."""
    model = built(config_of(qwen))
    tokenizer = tiny_tokenizer()
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert model.config.pad_token_id is None
    assert model.generation_config.pad_token_id == 1
    model(torch.tensor([[1, 5]])).logits.sum().backward()
    row = model.get_input_embeddings().weight
    assert row[1].abs().max() > 0
    assert row.grad[1].abs().max() > 0
    tokenizer.pad_token = "<|endoftext|>"
    own = initialise_model(config_of(qwen), tokenizer, lambda _: None)
    assert own.config.pad_token_id == 2
    assert own.get_input_embeddings().padding_idx is None


def test_positions_reach_as_far_as_the_rows(qwen):
    data = {"data": {"train": "none.jsonl", "max_length": 40000}}
    config = load_config({"model": {"config": str(qwen), "config_changes": SMALL}, **data})
    assert scratch_config(config, tiny_tokenizer()).max_position_embeddings == 40000
    assert made(qwen).max_position_embeddings == 32768


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hiden_size": 64},
            r"model.config_changes.hiden_size: the config of .*config.json \(qwen2\) has no such field to "
            r"change. "
            r"Did you mean hidden_size",
        ),
        ({"zzzzzz": 1}, r"zzzzzz: .* It has .*hidden_size.*vocab_size"),
        ({"model_type": "llama"}, r"model_type: .* name another config"),
        (
            SMALL | {"hidden_size": 66},
            r"hidden_size=66 does not divide over num_attention_heads=4. Use hidden_size 64 or 68, "
            r"or 3 heads",
        ),
        (
            SMALL | {"num_key_value_heads": 3},
            r"num_attention_heads=4 does not divide over num_key_value_heads=3. Use one of 1, 2, 4\.",
        ),
        (SMALL | {"hidden_size": 60}, r"heads of 15 numbers cannot be turned in pairs"),
        (SMALL | {"hidden_size": "64"}, r"config.json: .*hidden_size"),
        (SMALL | {"hidden_act": "sillu"}, r"no model can be made by it: .*sillu"),
        (SMALL | {"num_hidden_layers": -1}, r"num_hidden_layers|cannot"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused_with_the_fix(qwen, changes, message):
    with pytest.raises(ModelError, match=message):
        built(config_of(qwen, changes))


def test_what_is_no_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model.config=.*none.json: there is no such file"):
        made(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{]")
    with pytest.raises(ModelError, match=r"a.json: no config there"):
        made(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ModelError, match=r"b.json: no config there: .*model_type"):
        made(tmp_path / "b.json")


# --- weights


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_weights_are_those_transformers_draws_from_the_seed(family, tmp_path):
    folder = family_config(family, tmp_path)
    (folder / "model.safetensors").write_text("no weights are read")
    config = config_of(folder, {}, model={"initialisation": "plain"}, run={"seed": 5})
    torch.manual_seed(99)
    torch.rand(3)
    ours = build_model(config, tiny_tokenizer(), lambda _: None, pieces=())
    set_seed(5)
    theirs = AutoModelForCausalLM.from_config(scratch_config(config, tiny_tokenizer()), dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert torch.equal(parameter, expected[name]), name
    other = dict(built(config, seed=6).named_parameters())
    assert not any(torch.equal(p, expected[name]) for name, p in other.items() if p.ndim >= 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_weights_divide_residual_projections_by_the_root_of_twice_the_layers(family, tmp_path):
    """0.02 / sqrt(2 x 3) = 0.008165; of 4,096 numbers and more a standard deviation is known to 1 %."""
    folder = family_config(family, tmp_path)
    plain = dict(built(config_of(folder, {}, model={"initialisation": "plain"})).named_parameters())
    for name, scaled in built(config_of(folder, {})).named_parameters():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(scaled, plain[name] * (1 / math.sqrt(6)) if writes else plain[name]), name
        if scaled.ndim >= 2:
            expected = 0.02 / math.sqrt(6) if writes else 0.02
            assert scaled.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("gpt_neox", {}, {"attention.dense", "mlp.dense_4h_to_h"}),
        ("phi", {}, {"self_attn.dense", "mlp.fc2"}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}, {"self_attn.out_proj", "fc2"}),  # square fc1
        ("cohere", {}, {"self_attn.o_proj", "mlp.down_proj"}),
        ("mamba", {}, {"mixer.out_proj"}),
        # experts of which a pass of 8 tokens visits few, and a router of as many outputs as the stream
        (
            "qwen3_moe",
            {"num_experts": 64, "moe_intermediate_size": 32},
            {"self_attn.o_proj", "mlp.experts.down_proj"},
        ),
        ("mixtral", {"num_local_experts": 64}, {"self_attn.o_proj", "mlp.experts.down_proj"}),
    ],
)  # fmt: skip
def test_residual_projections_are_found_in_the_graph_whatever_their_names(family, sizes, expected):
    config = CONFIG_MAPPING[family](
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=None, bos_token_id=0, eos_token_id=1,
        **sizes,
    )  # fmt: skip
    found = residual_projections(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    kinds = {name.removesuffix(".weight").partition(f".{layer}.")[2] for layer in (0, 1) for name in found}
    assert kinds - {""} == expected
    assert len(found) == 2 * len(expected)


def test_an_architecture_that_scales_by_itself_is_not_scaled_twice(tmp_path):
    GPT2Config(vocab_size=500, n_embd=64, n_layer=3, n_head=4).save_pretrained(tmp_path)
    said = []
    config = config_of(tmp_path, {})
    set_seed(0)
    model = initialise_model(config, tiny_tokenizer(), said.append)
    found = [name for name in residual_projections(model) if name.endswith("c_proj.weight")]
    assert len(found) == 6
    for name in found:
        std = dict(model.named_parameters())[name].std().item()
        assert std == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    assert (
        "projections into the residual stream are not scaled: the architecture draws them smaller itself"
        in said
    )


def test_sizes_are_counted_with_embeddings_apart(tmp_path):
    """A llama of 64: q and o 64 x 64, k and v 64 x 32, three matrices of 64 x 96, two norms of 64 a layer."""
    model = built(config_of(family_config("mistral", tmp_path), {}))
    layers = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
    total = layers + 2 * 320 * 64  # embedding and head
    first, second = size_lines(model, total * 5, is_known=True)
    assert first == (
        f"of {total:,} parameters {2 * 320 * 64:,} are embeddings and output head "
        f"({4096000 / total:.0f} %), {layers:,} are layers"
    )
    assert second == (
        f"this run has {5 * total:,} tokens, 5.00 a parameter; compute-optimal training has about 20 a "
        f"parameter (Hoffmann et al. 2022): {20 * total:,} tokens"
    )
    tied = built(config_of(family_config("llama", tmp_path), {}))
    assert f"{320 * 64:,} are embeddings" in size_lines(tied, 1, is_known=False)[0]
    assert "this run has at most 1 tokens" in size_lines(tied, 1, is_known=False)[1]
