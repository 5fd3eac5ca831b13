"""LLaVA's data in less memory than it takes: `python -m benchmarks.vlm_data [megabytes=2000] [limit_mib=256] ...`.

Writes one JSON list of made-up conversations into `folder`, then reads it as `train_vlm` does: the main process notes
where each sample lies, then `readers` processes read samples in random order. They run in processes that may take
`limit_mib` more memory than they have when they begin (RLIMIT_DATA; pages of mapped files do not count). `parsed=1`
takes `json.load` in place of all that. Needs Linux.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from benchmarks.clusters_at_scale import MIB, memory
from clipmoe_vlm.runs import UserError, fail
from train_vlm.samples import read_samples

SETTINGS = {"megabytes": 2000, "limit_mib": 256, "readers": 2, "reads": 20_000, "parsed": 0, "folder": "/tmp"}


def write_conversations(file: Path, size: int) -> int:
    """Text and picture conversations of about `size` bytes together, on one line as LLaVA's; returns their number."""
    words = "the a grey cat sits on red sofa beside window and looks at two birds in tree under blue sky".split()
    draw, number = random.Random(0), 0
    with open(file, "w", encoding="utf-8") as stream:
        stream.write("[")
        while stream.tell() < size:
            turns = [{"from": speaker, "value": " ".join(draw.choices(words, k=draw.randrange(5, 120)))}
                     for speaker in ("human", "gpt") * draw.randrange(1, 6)]
            sample = {"id": f"{number:012}", "conversations": turns}
            if number % 8:
                turns[0]["value"] = f"<image>\n{turns[0]['value']}"
                sample["image"] = f"{number % 100}.jpg"
            stream.write(", " * (number > 0) + json.dumps(sample))
            number += 1
        stream.write("]")
    return number


def parse(file: str, _cache: Path) -> int:
    with open(file, encoding="utf-8") as stream:
        return len(json.load(stream))


def index(file: str, cache: Path) -> int:
    return len(read_samples(file, "", cache))


def read(file: str, cache: Path, number: int, reads: int) -> int:
    samples = read_samples(file, "", cache)  # finds the index
    draw = random.Random(number)
    return sum(len(samples[draw.randrange(len(samples))]["conversations"]) for _ in range(reads))


def limited(limit_mib: int, works: list[tuple]) -> tuple[list[int], float, int]:
    """Runs each (function, arguments ...) in a forked process of its own, all at once.

    Returns their results, the seconds, and the largest memory of one's own that any of them took more than this
    process (MiB).

    Raises:
        UserError: the memory was not enough for one of them.
    """
    context = multiprocessing.get_context("fork")
    results = context.Array("q", len(works))
    before = memory("self")["RssAnon"]

    def run(number: int, work, *arguments) -> None:
        tqdm.monitor_interval = 0  # a thread that finds no memory for its start would be waited for without end
        resource.setrlimit(resource.RLIMIT_DATA, (memory("self")["VmData"] * 1024 + limit_mib * MIB,) * 2)
        try:
            results[number] = work(*arguments)
        except MemoryError:
            sys.exit(1)

    children = [context.Process(target=run, args=(number, *work)) for number, work in enumerate(works)]
    began, peak = time.perf_counter(), 0
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        for child in children:
            with suppress(OSError, KeyError):  # it may end meanwhile
                peak = max(peak, memory(child.pid)["RssAnon"] - before)
        time.sleep(0.02)
    if any(child.exitcode for child in children):
        raise UserError(f"{limit_mib} MiB were not enough")
    return list(results), time.perf_counter() - began, peak // 1024


def main(arguments: list[str]) -> None:
    values = dict(SETTINGS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in values or not (key == "folder" or value.isdecimal()):
            raise UserError(f"'{argument}' is not one of {', '.join(values)} (=NUMBER, but for the folder)")
        values[key] = value if key == "folder" else int(value)
    with tempfile.TemporaryDirectory(dir=values["folder"], prefix="conversations.") as name:
        file, cache = Path(name) / "data.json", Path(name) / "cache"
        (Path(name) / "0.jpg").touch()
        written = write_conversations(file, values["megabytes"] * 10**6)
        print(f"{file.stat().st_size / 1e6:.0f} MB of {written} samples; at most {values['limit_mib']} MiB a process")
        work = (parse if values["parsed"] else index, str(file), cache)
        (found,), seconds, peak = limited(values["limit_mib"], [work])
        print(f"{work[0].__name__:6} {found} samples in {seconds:.1f} s; its own memory grew by {peak} MiB")
        if not values["parsed"]:
            works = [(read, str(file), cache, number, values["reads"]) for number in range(values["readers"])]
            _, seconds, peak = limited(values["limit_mib"], works)
            print(f"read   {values['reads']} samples in each of {values['readers']} processes in {seconds:.1f} s; the "
                  f"own memory of none grew by more than {peak} MiB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
