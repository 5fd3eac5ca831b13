"""Runs of a program in which something happens at a chosen moment: a signal, a full disk, a file that vanishes.

A moment is the n-th time that the program touches a file whose event and path match a pattern: what is on the disk
changes at such moments only, and they do not depend on how fast the machine is. The program runs in processes of its
own, forked from one server that has imported it already: a start then costs a fraction of a second.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from clipmoe_vlm.runs import read_jsonl

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


@dataclass
class Mishap:
    """What happens in process `rank` at the `count`-th event that matches `at` ("os.rename /path/of/the/target")."""

    do: str  # kill | kill_half_written | terminate | terminate_all | disk_full | remove | count (all, to the end)
    count: int = 1
    at: str = ""
    rank: int = 0
    file: str = ""  # for remove


@dataclass
class End:
    """How the processes ended: their exit codes (negative: by that signal), what they printed, the last moment."""

    codes: list[int]
    output: str
    events: int  # that process 0 has counted, of those that match `at`
    last: str  # the event at which the mishap came


class Server:
    """Starts runs: `with Server(world, environment) as server: server.run(config, Mishap("kill", 100))`."""

    def __init__(self, world: Path, environment: dict[str, str], program: str = "train_encoder"):
        self.process = subprocess.Popen([sys.executable, __file__, str(world), program], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def run(self, config: Path, mishap: Mishap | None = None, processes: int = 1) -> End:
        job = {"config": str(config), "mishap": mishap and asdict(mishap), "processes": processes}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return End(**json.loads(self.process.stdout.readline()))


def kill_ten_times(server: Server, config: Path, processes: int, events: int) -> None:
    """Starts a run again and again, killed each time, the last time in the middle of writing a checkpoint.

    `events`: of process 0 in an unbroken run. It is killed at moments small enough that ten do not finish the run.
    """
    random = np.random.default_rng(0)
    for number in range(9):
        rank = number % processes
        count = int(random.integers(1, events // 6)) // (1 + 2 * rank)  # process 0 does most
        end = server.run(config, Mishap("kill", count + 1, rank=rank), processes)
        assert end.codes[rank] == -signal.SIGKILL and set(end.codes) <= {-signal.SIGKILL, 2}, end
        assert "Traceback" not in end.output
    end = server.run(config, Mishap("kill_half_written", at=r"rename .*/checkpoint"), processes)
    assert end.codes[0] == -signal.SIGKILL and end.last.endswith("checkpoint.safetensors")


def assert_same_end(one: Path, other: Path) -> None:
    """Two output folders hold the same clusters, models and losses, to the last bit, and nothing half-done."""
    names = sorted(str(file.relative_to(other)) for pattern in ("**/model.safetensors", "**/*labels.npy")
                   for file in other.glob(pattern))
    assert names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    losses = [[(row["stage"], row["step"], row["loss"]) for row in read_jsonl(folder / "metrics.jsonl")]
              for folder in (one, other)]
    assert losses[0] == losses[1]
    assert not [file for file in one.rglob("*") if file.name.startswith(".") or file.name.startswith("checkpoint")]


def watch(world: str, mishap: Mishap, report: Path) -> None:
    """Counts the events from here on, and makes the mishap happen."""
    pattern, seen = re.compile(mishap.at), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in EVENTS:
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(world) or path == str(report):
            return
        text = f"{event} {os.fspath(path)}"
        if not pattern.search(text):
            return
        seen += 1
        if seen != mishap.count and mishap.do != "count":
            return
        report.write_text(json.dumps({"events": seen, "last": text}))
        if mishap.do == "kill_half_written":
            os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
        if mishap.do in ("kill", "kill_half_written"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif mishap.do == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif mishap.do == "terminate_all":
            if not os.fork():  # not from here: data workers obey their own process
                os.killpg(0, signal.SIGTERM)
                os._exit(0)
        elif mishap.do == "disk_full":
            raise OSError(errno.ENOSPC, "No space left on device", path)
        elif mishap.do == "remove":
            os.unlink(mishap.file)

    sys.addaudithook(hook)


def load_program(name: str) -> tuple[Callable, type]:
    """The program's main function and the class of its configuration."""
    if name == "train_encoder":
        from train_encoder.config import EncoderConfig
        from train_encoder.run import main

        return main, EncoderConfig
    import functorch.compile  # noqa: F401  # late imports of DeepSpeed and of the summary, once for all runs
    import matplotlib.pyplot  # noqa: F401

    from train_vlm.build_ops import prepare_deepspeed
    from train_vlm.config import VLMConfig
    from train_vlm.train import train

    prepare_deepspeed()
    return train, VLMConfig


def serve(world: str, name: str) -> None:
    import torch
    from matplotlib.figure import Figure

    from clipmoe_vlm.runs import run_program
    from clipmoe_vlm.sigterm import end_on_sigterm

    main, config_class = load_program(name)
    torch.set_num_threads(1)
    Figure.savefig = lambda figure, stream, **settings: None  # drawing takes longer than all the rest
    for line in sys.stdin:
        job = json.loads(line)
        mishap = Mishap(**(job["mishap"] or {"do": "none"}))
        report, log = Path(world, "report.json"), Path(world, "output.txt")
        report.unlink(missing_ok=True)
        log.write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children: list[int] = []
        for rank in range(job["processes"]):
            pid = os.fork()
            if pid:
                os.setpgid(pid, children[0] if children else pid)
                children.append(pid)
                continue
            signal.alarm(120)  # a process that hangs ends
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
            os.dup2(1, 2)
            if job["processes"] > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = [name, job["config"]]
            if rank == mishap.rank:
                watch(world, mishap, report)
            code = 0
            try:
                end_on_sigterm()
                run_program(main, config_class, name)
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps({"codes": codes, "output": log.read_text(),
                          **(json.loads(report.read_text()) if report.exists() else {"events": 0, "last": ""})}),
              flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
