"""What the programs share about a run: configuration, output folder, atomic files, metrics, processes, errors.

The plugin itself never imports this module's third-party needs (omegaconf, tqdm): they are imported where used.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import difflib
import errno
import glob
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError

from .sigterm import end_by_sigterm, sigterm_asked

Config = TypeVar("Config")
# Processes wait for each other: for the main one while it indexes, converts, clusters or saves what is large.
PATIENCE = timedelta(hours=4)


class UserError(Exception):
    """A mistake that the user can mend: its text is one sentence with what was wrong, where, and what to do."""


def run_program(program: Callable[[Config], None], config_class: type[Config], usage: str) -> None:
    """Reads the command line into `config_class` and runs `program`; user errors end it in one line and exit code 2."""
    try:
        program(load_config(config_class, sys.argv[1:], usage))
    except UserError as error:
        if os.environ.get("RANK", "0") != "0" and not torch.distributed.is_initialized():
            leave_word_to_main()  # they have not joined yet: the configuration is wrong, for all alike
        fail(str(error))
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        fail(f"the disk is full ({getattr(error, 'filename', None) or error}); free some space and run the same "
             "command again: finished work is intact and the run resumes from its last checkpoint")
    except RuntimeError as error:
        if sigterm_asked():  # the other processes, or a data worker just started, obeyed it first
            end_by_sigterm()
        # Another process has ended, and its own message says why: no traceback beside it.
        if "RANK" not in os.environ or not re.search("by peer|Broken pipe", str(error)):
            raise
        print(f"process {os.environ['RANK']} ends: another process of the run has ended", file=sys.stderr, flush=True)
        os._exit(2)


def leave_word_to_main() -> NoReturn:
    """Ends a process after what goes wrong on all of them; the launcher ends all when the first one ends, so wait."""
    time.sleep(3)
    os._exit(2)


def is_disk_full(error: Exception) -> bool:
    """Whether a failed write means no space; safetensors says so in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def fail(message: str) -> None:
    """Prints one line to stderr and ends the process with exit code 2; at once, since other ranks may be waiting."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()  # or the sentence would stand behind it
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        os._exit(2)
    sys.exit(2)


# --- configuration -------------------------------------------------------------------------------------------------


def load_config(config_class: type[Config], arguments: list[str], usage: str) -> Config:
    """`CONFIG.yaml [key=value ...]` -> an instance of the dataclass `config_class`.

    Later values win: defaults, the file, the command line. Keys of nested dataclasses are written `group.key=value`.
    The launcher's own `--local_rank=N` is accepted and ignored (the environment says the same).

    Raises:
        UserError: no or missing file, a key that does not exist (names the nearest one), a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help"):
        raise UserError(f"usage: {usage} CONFIG.yaml [key=value ...]; keys: {', '.join(_keys(config_class))}")
    file, overrides = Path(arguments[0]), arguments[1:]
    if not file.is_file():
        raise UserError(f"{arguments[0]}: no such configuration file; usage: {usage} CONFIG.yaml [key=value ...]")
    config = OmegaConf.structured(config_class)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"'{override}' on the command line is not of the form key=value")
    try:
        sources = [(str(file), OmegaConf.load(file)), ("the command line", OmegaConf.from_dotlist(overrides))]
    except YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    for where, source in sources:
        if not OmegaConf.is_dict(source):
            raise UserError(f"{where} must hold `key: value` lines")
        _check_keys(OmegaConf.to_container(source), config_class, where)
        try:
            config = OmegaConf.merge(config, source)
        except OmegaConfBaseException as error:
            raise UserError(f"{where}: {error.full_key}: {str(error).splitlines()[0]}") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{file}: no value for {', '.join(missing)}; add it to the file or type {missing[0]}=...")
    return OmegaConf.to_object(config)


def _keys(config_class: type, prefix: str = "") -> list[str]:
    keys = []
    for field, nested in _fields(config_class):
        keys += _keys(nested, f"{prefix}{field}.") if nested else [prefix + field]
    return keys


def _fields(config_class: type) -> list[tuple[str, type | None]]:
    """The fields of a dataclass, each with its class when it is a dataclass itself."""
    import typing

    hints = typing.get_type_hints(config_class)
    return [(f.name, hints[f.name] if dataclasses.is_dataclass(hints[f.name]) else None)
            for f in dataclasses.fields(config_class)]


def _check_keys(values: dict, config_class: type, where: str, prefix: str = "") -> None:
    fields = dict(_fields(config_class))
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise UserError(f"{where}: there is no key '{prefix}{key}'; did you mean '{prefix}{near[0]}'?")
        nested = fields[key]
        if nested and isinstance(value, dict):
            _check_keys(value, nested, where, f"{prefix}{key}.")


def prepare_output(config: Any, may_change: Iterable[str] = ()) -> Path:
    """Makes `config.output_dir` and writes the resolved configuration to its `config.yaml`.

    A folder made with another configuration is refused, with the differences; `may_change` names the keys
    (dotted) that do not affect results, such as the number of workers. Call it on the main process only.
    """
    from omegaconf import OmegaConf

    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    ours = _flat(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    file = folder / "config.yaml"
    if file.is_file():
        theirs = _flat(OmegaConf.to_container(OmegaConf.load(file)))
        changed = [f"{key} was {theirs.get(key)!r} and is now {ours.get(key)!r}" for key in sorted({*ours, *theirs})
                   if ours.get(key) != theirs.get(key) and key not in may_change and key != "output_dir"]
        if changed:
            raise UserError(f"{folder} holds a run with another configuration ({'; '.join(changed)}); "
                            "name another output_dir, or remove that folder to start anew")
    with atomic_write(file) as stream:
        stream.write(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return folder


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a file that appears under its name only when it is whole, on the disk, and closed without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):  # of a killed run
        leftover.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a fresh folder that takes the name `path` (in place of an older one) only when the block ends well.

    Leftovers of a killed run are removed. Between the two renames only the old folder's second name exists for an
    instant; `path` is never a half-written folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")


def read_jsonl(path: str | Path) -> list[dict]:
    """Reads JSON lines; raises as `iterate_jsonl`."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: str | Path) -> Iterator[dict]:
    """Reads JSON lines one by one.

    Raises:
        UserError: the file is missing, or a line is not a JSON object (names file and line).
    """
    number = 0
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: expected a JSON object, found {line.strip()[:60]!r}")
                    yield row
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {max(number, 1)}: not valid JSON ({error})") from error


class Metrics:
    """Appends one JSON line per call to `path`; a resumed run first drops what lies after its checkpoint.

    Args:
        keep: called with each row already there; rows for which it is false are dropped, as is a torn last line.
    """

    def __init__(self, path: str | Path, keep: Callable[[dict], bool] = lambda row: True):
        self.path = Path(path)
        rows = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        with atomic_write(self.path) as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows if keep(row))
        self.stream = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def log(self, **values: Any) -> None:
        self.stream.write(json.dumps(values) + "\n")


def save_checkpoint(file: str | Path, trainable: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW,
                    **state: Any) -> None:
    """One safetensors file: trainable weights, AdamW's moments, and `state` as text. It replaces the older one when
    whole."""
    tensors = {}
    for name, parameter in trainable.items():
        moments = optimizer.state[parameter]  # empty while fp16 has left out every update so far
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"step.{name}"] = moments.get("step", torch.zeros(()))
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = moments.get(key, torch.zeros_like(parameter))
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()},
                                  {key: str(value) for key, value in state.items()})
    with atomic_write(file, "wb") as stream:
        stream.write(data)


def load_checkpoint(file: str | Path, trainable: dict[str, torch.nn.Parameter],
                    optimizer: torch.optim.AdamW) -> dict[str, str] | None:
    """Fills weights and optimizer state from `file` and returns its `state`; None if there is no such file.

    Raises:
        UserError: the file cannot be read, or holds other parameters than `trainable`.
    """
    if not Path(file).is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as tensors, torch.no_grad():
            theirs = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()
                      if name.startswith("weight.")}
            ours = {f"weight.{name}": list(parameter.shape) for name, parameter in trainable.items()}
            wrong = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
            if wrong:
                raise UserError(f"{file} is a checkpoint of another model or configuration ({len(wrong)} differences; "
                                f"the first: {wrong[0]} has shape {theirs.get(wrong[0])} there and "
                                f"{ours.get(wrong[0])} here); remove it to start this stage anew")
            for name, parameter in trainable.items():
                parameter.copy_(tensors.get_tensor(f"weight.{name}"))
                optimizer.state[parameter] = {
                    "step": tensors.get_tensor(f"step.{name}"),  # AdamW wants its counter on the CPU
                    **{key: tensors.get_tensor(f"{key}.{name}").to(parameter.device)
                       for key in ("exp_avg", "exp_avg_sq")}}
            return tensors.metadata()
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to start this stage anew") from error


# --- processes and progress ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Where this process stands: its rank, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def main_first(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on the main process only, hands its (small) result to all; a UserError ends every process."""
        if self.world_size == 1:
            return action()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = action()
            except UserError as error:
                box[1] = str(error)
        torch.distributed.broadcast_object_list(box, src=0)
        if box[1] is not None:
            if self.is_main:
                raise UserError(box[1])
            os._exit(2)
        return box[0]


def init_distributed() -> Distributed:
    """Joins the process group that a launcher (torchrun, accelerate, deepspeed) set up in the environment, if any."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    atexit.register(_leave_processes)
    return Distributed(rank, world_size, device)


def _leave_processes() -> None:
    """A group that outlives the interpreter sometimes aborts the process: gloo's threads are still running."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def stage_seed(*parts: object) -> int:
    """A seed that depends on all of `parts` (names and numbers), the same in every process."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


def set_seed(seed: int) -> None:
    """Seeds python, numpy and torch."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def progress(iterable: Iterable | None = None, *, description: str, total: int | None = None, initial: int = 0,
             enabled: bool = True) -> Any:
    """A tqdm bar with time left; where the output is no terminal it prints a line at most every 15 seconds."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    interval = 0.5 if terminal else 15.0
    return tqdm(iterable, desc=description, total=total, initial=initial, disable=not enabled, dynamic_ncols=True,
                mininterval=interval, maxinterval=interval, smoothing=0.1, file=sys.stderr if terminal else _Lines())


class _Lines:
    """Takes a bar's states, which overwrite each other on a terminal, as lines."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():  # tqdm moves up from the second bar on
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """In words for people: seconds, minutes, or hours and minutes."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes // 60} h {minutes % 60} min" if minutes > 99 else \
        f"{minutes} min"
