"""Is the data or the model the bottleneck? `python -m benchmarks.encoder_data CONFIG.yaml [key=value ...]`.

For a configuration of train_encoder, on one process: samples/s that the loader delivers (read, decoded, resized,
tokenized) for several numbers of workers, and samples/s that an MCL step (forward and backward) takes on this device.
They take turns within each repeat, on samples drawn anew, so that a busy machine slows all of them alike. Prints
medians, one sentence, and one JSON line. A run that was begun in `output_dir` lends its index and base; else both are
made in a temporary folder. With several GPUs in a machine the loaders share its cores: give this one its share only
(`taskset`).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.loading import loader
from clipmoe_vlm.runs import Distributed, init_distributed, run_program
from clipmoe_vlm.upcycling import ffn_parameters
from train_encoder.config import EncoderConfig
from train_encoder.data import Collate, Pairs, Samples, load_collate
from train_encoder.features import autocast
from train_encoder.loss import contrastive_loss
from train_encoder.run import make_base
from train_encoder.sources import build_index

REPEATS = 3
ROUNDS = 4  # batches per worker and measurement; the first of each worker is not timed


def main(config: EncoderConfig) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    distributed = init_distributed()
    batch = 32 if distributed.device.type == "cuda" else 8
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(config.output_dir)
        if not (folder / "base").is_dir():
            folder = Path(scratch)
        index = folder / "index" / "train.jsonl"
        found = build_index(config.train_data, index, config.image_column, config.caption_column, config.image_root,
                            config.short_captions)
        print(f"train data: {found}", flush=True)
        make_base(config, folder)
        samples, collate = Samples(index), load_collate(folder / "base")
        model = CLIPMoEModel.from_pretrained(folder / "base").to(distributed.device).train().requires_grad_(False)
        for _, parameter in ffn_parameters(model, config.first_moe_layer):
            parameter.requires_grad_(True)

        cores = len(os.sched_getaffinity(0))
        workers = sorted({config.workers, *(2**n for n in range(8) if 2**n <= max(cores, config.workers))})
        rates: dict[int, list[float]] = {count: [] for count in workers}
        steps: list[float] = []
        random = np.random.default_rng(0)
        for _ in range(REPEATS):
            for count in workers:
                numbers = random.integers(len(samples), size=(ROUNDS * max(1, count), batch))
                rates[count].append(loader_rate(samples, collate, numbers, count))
            steps.append(step_rate(model, collate, samples, random.integers(len(samples), size=batch), distributed,
                                   config))
    loading, step = {count: round(median(values), 1) for count, values in rates.items()}, round(median(steps), 1)
    for count, rate in loading.items():
        print(f"loader, workers={count:<3} {rate:10.1f} samples/s ({min(rates[count]):.1f} to {max(rates[count]):.1f})")
    print(f"model step          {step:10.1f} samples/s ({min(steps):.1f} to {max(steps):.1f}) on {distributed.device}")
    print(verdict(loading, step, config.workers))
    print(json.dumps({"loader": loading, "model": step, "workers": config.workers, "cores": cores, "batch": batch,
                      "device": str(distributed.device), "precision": config.precision, "torch": torch.__version__}))


def loader_rate(samples: Samples, collate: Collate, numbers: np.ndarray, workers: int) -> float:
    """Samples/s over the batches [n, b] of `numbers`, without the workers' start."""
    batches = loader(Pairs(samples), collate, numbers, workers)
    warm_up = max(1, workers)
    for _ in range(warm_up):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return numbers[warm_up:].size / (time.perf_counter() - start)


def step_rate(model: CLIPMoEModel, collate: Collate, samples: Samples, numbers: np.ndarray, distributed: Distributed,
              config: EncoderConfig) -> float:
    """Samples/s of forward and backward on one batch, the second time that it is seen."""
    batch = next(loader(Pairs(samples), collate, [numbers], 0))
    ids, pixels, valid = (batch[key].to(distributed.device) for key in ("input_ids", "pixel_values", "valid"))
    for _ in range(2):
        start = time.perf_counter()
        with autocast(distributed, config.precision):
            output = model(input_ids=ids, pixel_values=pixels)
        contrastive_loss(output.image_embeds, output.text_embeds, valid).backward()
        if distributed.device.type == "cuda":
            torch.cuda.synchronize()
        model.zero_grad(set_to_none=True)
    return len(ids) / (time.perf_counter() - start)


def verdict(loading: dict[int, float], step: float, workers: int) -> str:
    """One sentence: which is slower with the configured workers, and what would help."""
    rates = f"with workers={workers} the loader delivers {loading[workers]:.1f} samples/s, the model takes {step:.1f}"
    if loading[workers] >= step:
        return f"The model is the bottleneck: {rates}."
    enough = [count for count, rate in loading.items() if rate >= step]
    best = max(loading, key=loading.__getitem__)
    advice = f"workers={min(enough)} would do" if enough else (
        f"the most here is {loading[best]:.1f} with workers={best}, so more cores or smaller pictures are needed")
    return f"The data is the bottleneck: {rates}; {advice}."


if __name__ == "__main__":
    run_program(main, EncoderConfig, "python -m benchmarks.encoder_data")
