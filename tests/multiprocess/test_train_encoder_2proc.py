"""train_encoder with two processes (gloo) computes what one process computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from clipmoe_vlm.runs import load_config
from train_encoder.config import EncoderConfig
from train_encoder.run import main

sys.path.insert(0, str(Path(__file__).parent.parent))
from encoder_data import ROOT, environment, make_world, run, tiny_config  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_loss_and_gradients_are_those_of_the_whole_batch(tmp_path):
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    str(Path(__file__).with_name("encoder_loss_worker.py")), str(tmp_path / "two.safetensors")],
                   cwd=ROOT, env=environment(), check=True, timeout=300, capture_output=True)
    torch.manual_seed(0)  # what follows draws as the worker does, on one process and by the textbook
    pictures, texts = torch.randn(8, 6), torch.randn(8, 6)
    towers = [torch.nn.Linear(6, 4) for _ in range(2)]
    readable = [0, 1, 3, 4, 5, 6, 7]
    image, text = (F.normalize(tower(rows[readable]), dim=-1)
                   for tower, rows in zip(towers, (pictures, texts), strict=True))
    logits, target = 100 * image @ text.T, torch.arange(7)
    loss = sum(F.cross_entropy(scores, target, label_smoothing=0.1) for scores in (logits, logits.T)) / 2
    loss.backward()
    parameters = [parameter for tower in towers for parameter in tower.parameters()]
    expected = {"loss": loss.detach(), **{str(n): parameter.grad for n, parameter in enumerate(parameters)}}
    found = load_file(tmp_path / "two.safetensors")
    assert expected.keys() == found.keys() and all(tensor.abs().max() > 0 for tensor in found.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=2e-6)


def test_two_processes_make_the_same_clusters_and_experts(world):
    outputs = [world / "one", world / "two"]
    torch.set_num_threads(1)
    main(load_config(EncoderConfig, [str(tiny_config(world, outputs[0]))], "train_encoder"))
    result = run(tiny_config(world, outputs[1]), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = outputs
    for stage in ("stage_1", "stage_2"):
        labels = [np.load(output / stage / "labels.npy") for output in outputs]
        assert np.array_equal(*labels)
        assert (one / stage / "clusters.json").read_text() == (two / stage / "clusters.json").read_text()
        experts = [load_file(output / stage / "model" / "model.safetensors") for output in outputs]
        for name in experts[0]:
            torch.testing.assert_close(experts[1][name], experts[0][name], rtol=0, atol=2e-4)
    assert np.array_equal(np.load(one / "stage_1/features/image.npy"), np.load(two / "stage_1/features/image.npy"))
    losses = [[json.loads(row)["loss"] for row in (output / "metrics.jsonl").read_text().splitlines()][:8]
              for output in outputs]  # the experts' stages; router tuning has dropout, which each rank draws anew
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_mistake_ends_both_processes_with_one_sentence(world):
    result = run(tiny_config(world, world / "wrong"), "caption_column=text", processes=2)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1 and "there is no column 'text' (found: image, caption)" in result.stderr
