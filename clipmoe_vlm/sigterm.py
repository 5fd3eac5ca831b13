"""SIGTERM, which Slurm, launchers and `kill` send: a program saves what it has and ends with exit code 0."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_sigterm = {"asked": False, "waits": False}


def end_on_sigterm() -> None:
    """From now on SIGTERM (from Slurm, a launcher or `kill`) ends this process with exit code 0 and one line.

    It does so at once, or where a block under `sigterm_waits` says so. Files are atomic, so nothing needs to be tidied.
    """

    def ask(*_: Any) -> None:
        _sigterm["asked"] = True
        if not _sigterm["waits"]:
            end_by_sigterm()

    signal.signal(signal.SIGTERM, ask)


@contextlib.contextmanager
def sigterm_waits() -> Iterator[None]:
    """Within the block SIGTERM waits for the block's end; the block can look at `sigterm_asked` and end earlier."""
    _sigterm["waits"] = True
    try:
        yield
    finally:
        _sigterm["waits"] = False
    if _sigterm["asked"]:
        end_by_sigterm()


def let_sigterm_wait() -> None:
    """The same from now on, to the program's end."""
    _sigterm["waits"] = True


def sigterm_asked() -> bool:
    return _sigterm["asked"]


def end_by_sigterm() -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError):  # not `print`, which a signal may have interrupted
            os.write(1, b"stopped by SIGTERM; the same command goes on from here\n")
    os._exit(0)


def leave_sigterm_to_parent(_worker: int) -> None:
    """For DataLoader workers (`worker_init_fn`): they end by SIGTERM only when it comes from their own process.

    Slurm and torchrun send it to the workers, too, and a run whose workers are gone cannot finish its step.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=watch, daemon=True).start()
