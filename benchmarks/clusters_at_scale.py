"""One MCL stage on features larger than its memory: `python -m benchmarks.clusters_at_scale [pairs=1200000] ...`.

As `train_encoder.run` does it, with random features in place of a model's: encode both modalities into half-float
shards, k-means, small clusters merged at the third stage's number of them, the batches of a pass. It runs in a process
that may take `limit_mib` more memory of its own than its libraries do (RLIMIT_DATA; pages of mapped files do not count,
the system may drop them). Needs Linux, and 4 bytes x pairs x dim of disk in `folder`, which are given back.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clipmoe_vlm.runs import Distributed, UserError, fail
from train_encoder.clusters import accumulate, centres, stage_labels
from train_encoder.features import Features, Items, encode
from train_encoder.sampler import batch_report, cluster_batches, merge_small

SETTINGS = {"pairs": 1_200_000, "dim": 768, "clusters": 3, "batch_size": 800, "limit_mib": 1024, "folder": "/tmp"}
MIB = 2**20


def stage(values: dict, folder: Path) -> None:
    """The limited process: writes what it did to `folder/result.json`."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread that finds no memory for its start would be waited for without end
    start = memory("self")
    resource.setrlimit(resource.RLIMIT_DATA, (start["VmData"] * 1024 + values["limit_mib"] * MIB,) * 2)
    pairs, dim, k = values["pairs"], values["dim"], values["clusters"]
    seconds = {}

    @contextmanager
    def timed(name: str):
        began = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - began, 1)

    directions = 2 * np.random.default_rng(0).normal(size=(4 * k, dim)).astype(np.float32)

    def random_rows(items: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        random = np.random.default_rng(items[0])
        rows = directions[random.integers(len(directions), size=len(items))]
        rows = rows + random.standard_normal((len(items), dim), dtype=np.float32)
        return torch.from_numpy(rows), torch.ones(len(items), dtype=torch.bool), []

    for modality, key in enumerate(("image", "text")):
        with timed(f"encode {key}"):
            encode(lambda rows: rows, Items(pairs, lambda n, modality=modality: (modality, n)), random_rows,
                   folder / key, dim=dim, workers=0, distributed=Distributed(0, 1, torch.device("cpu")),
                   precision="fp32", dtype=np.float16, description=f"encoding {key}s")
    image, text = Features([folder / "image"]), Features([folder / "text"])
    with timed("k-means and labels"):
        labels, chosen = stage_labels(image, text, k, seed=0)
    random = np.random.default_rng(0)
    for _ in range(2):  # two more stages, with labels by chance
        parents = labels
        labels = accumulate(parents, random.integers(k * k, size=pairs), k * k)
    with timed("merge small clusters"):
        values_of = np.unique(labels)
        drawn = merge_small(labels, centres(image, text, labels), values_of // (k * k), values["batch_size"])
    with timed("batches of a pass"):
        batches = cluster_batches(drawn, values["batch_size"], seed=0, epoch=0)
    report = batch_report(drawn, values["batch_size"])
    (folder / "result.json").write_text(json.dumps({
        "accumulated_clusters": len(values_of), "batches": len(batches), "dropped_samples": report["dropped_samples"],
        "libraries_mib": start["RssAnon"] // 1024, "seconds": seconds}))


def memory(process: int | str) -> dict[str, int]:
    """Kilobytes of a process: its own resident ones, those of files that it has mapped, and what its limit counts."""
    with open(f"/proc/{process}/status", encoding="ascii") as stream:
        rows = dict(line.split(":", 1) for line in stream)
    return {name: int(rows[name].split()[0]) for name in ("RssAnon", "RssFile", "VmData") if name in rows}


def main(arguments: list[str]) -> None:
    values = dict(SETTINGS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in values or not (key == "folder" or value.isdecimal()):
            raise UserError(f"'{argument}' is not one of pairs, dim, clusters, batch_size, limit_mib (=NUMBER), folder")
        values[key] = value if key == "folder" else int(value)
    needed = 4 * values["pairs"] * values["dim"]
    if shutil.disk_usage(values["folder"]).free < 1.1 * needed:
        raise UserError(f"{values['folder']} has no room for {needed / 1e9:.1f} GB of features; name another folder=")
    with tempfile.TemporaryDirectory(dir=values["folder"], prefix="features.") as name:
        folder = Path(name)
        child = multiprocessing.get_context("spawn").Process(target=stage, args=(values, folder))
        child.start()
        peak = {"RssAnon": 0, "RssFile": 0, "VmData": 0}
        while child.is_alive():
            with suppress(OSError):  # it may end meanwhile
                peak |= {key: max(peak[key], now) for key, now in memory(child.pid).items()}
            child.join(0.02)
        if child.exitcode:
            raise UserError(f"{values['limit_mib']} MiB were not enough (exit code {child.exitcode})")
        result = json.loads((folder / "result.json").read_text())
    for what, took in result["seconds"].items():
        print(f"{what:24} {took:8.1f} s")
    own, mapped = peak["RssAnon"] // 1024, peak["RssFile"] // 1024
    print(f"peak of its own memory {own} MiB, of which {result['libraries_mib']} before it began; of mapped files "
          f"{mapped} MiB")
    print(json.dumps({**values, **result, "features_mib": needed // MIB, "peak_own_mib": own,
                      "peak_mapped_mib": mapped}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
