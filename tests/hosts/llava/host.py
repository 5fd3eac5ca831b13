"""Runs the original LLaVA, as installed, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
TRAIN = HERE.parents[1] / "reference" / "llava_train"
RUNS = json.loads((TRAIN / "runs.json").read_text())
FLOAT32_TRAIN = str(HERE / "float32_train.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY),
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@dataclasses.dataclass
class Trained:
    """What a training left: its folder, what it printed, and what float32_train.py wrote down.

    Attributes:
        losses: per process, of each micro-batch.
        updates: what was logged, and the groups' learning rates.
    """

    folder: Path
    printed: str
    losses: list[list[float]]
    updates: list[dict]


def run(command: list[str], timeout: int = 300, check: bool = True, cwd: Path | None = None,
        **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in this environment; if it fails, its last words are the error."""
    values = {**os.environ, **ENVIRONMENT, **environment}
    process = subprocess.Popen(command, env=values, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        printed, complaints = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launchers' children too
        process.wait()
        raise
    if check and process.returncode:
        raise AssertionError(f"{' '.join(command)[:300]} ended with {process.returncode}:\n{printed[-2000:]}\n"
                             f"{complaints[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, printed, complaints)


def fork(words: list[str], log: Path, processes: int = 1, timeout: int = 300, **environment: str) -> str:
    """`python WORDS` (`-m MODULE ...` or `SCRIPT.py ...`) in forks of this process.

    It has LLaVA imported, unpatched, which saves each of them the time.

    Returns:
        what all processes printed.
    """
    import llava.train.train  # noqa: F401

    children = {}
    port = str(free_port())
    for rank in range(processes):
        values = {} if processes == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pid = os.fork()
        if pid == 0:
            _be_child(words, log.with_suffix(f".{rank}"), {**ENVIRONMENT, **environment, **values})
        children[pid] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < processes and time.monotonic() < deadline and not any(codes.values()):
        for pid, rank in children.items():
            if rank not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for pid, rank in children.items():
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    printed = "".join(log.with_suffix(f".{rank}").read_text() for rank in range(processes))
    if codes != dict.fromkeys(range(processes), 0):
        raise AssertionError(f"{' '.join(words)[:300]} ended with {codes}:\n{printed[-5000:]}")
    return printed


def _be_child(words: list[str], log: Path, environment: dict[str, str]) -> None:
    code = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not pytest's
        os.environ.update(environment)
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def arguments(output: Path, tower: Path, recorded: str, **changed: str | None) -> list[str]:
    """LLaVA's arguments of a recorded run, with some changed (None: left out)."""
    values = {**RUNS[recorded]["arguments"], "report_to": "none", "tf32": "False", "vision_tower": str(tower),
              "output_dir": str(output)}
    for name in ("model_name_or_path", "image_folder", "data_path"):
        values[name] = str(TRAIN / values[name])
    stage = "start" if recorded.startswith("stage1") else "stage1"
    values["pretrain_mm_mlp_adapter"] = str(tower.parent / f"projector_{stage}.bin")
    values.update(changed)
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", value)]


def train(output: Path, tower: Path, recorded: str = "stage1", ours: tuple[str, ...] = (), patched: bool = True,
          processes: int = 1, script: str = FLOAT32_TRAIN, timeout: int = 300,
          environment: dict[str, str] | None = None, **changed: str | None) -> Trained:
    """Trains in forks as one of the recorded runs did, with some of LLaVA's arguments changed (None: left out).

    Args:
        ours: options of `python -m clipmoe_vlm.llava`.
        patched: with it in front; else LLaVA as it is.
    """
    environment = dict(environment or {})
    words = arguments(output, tower, recorded, **changed)
    if "--lora_enable" in words:
        environment["LORA_START"] = str(TRAIN / "lora.safetensors")
    command = ["-m", "clipmoe_vlm.llava", *ours, script] if patched else [script]
    printed = fork([*command, *words], output.with_suffix(".log"), processes, timeout, **environment)
    return read(output, printed)


def read(output: Path, printed: str) -> Trained:
    """What float32_train.py wrote down."""
    records = [json.loads(file.read_text()) for file in sorted(output.glob("losses_*.json"))]
    return Trained(output, printed, [record["losses"] for record in records],
                   records[0]["updates"] if records else [])
