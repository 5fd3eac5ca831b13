"""train_encoder with two processes (gloo) computes what one process computes."""

from __future__ import annotations

import filecmp
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clipmoe_vlm.runs import Distributed, load_config
from train_encoder.config import EncoderConfig
from train_encoder.run import main

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import encoder_step  # noqa: E402
from encoder_crash import Mishap, assert_same_end, kill_ten_times  # noqa: E402
from encoder_data import ROOT, environment, tiny_config  # noqa: E402


@pytest.fixture(scope="module")
def whole(server, world) -> tuple[Path, int]:
    """The output of an unbroken run of two processes, and how many events the first one had."""
    end = server.run(tiny_config(world, world / "whole"), Mishap("count"), 2)
    assert end.codes == [0, 0], end.output
    return world / "whole", end.events


def test_loss_and_gradients_are_those_of_one_process_with_the_whole_batch(tmp_path):
    """With every term of the loss, and in micro-batches; on each rank no more than [b, B] logits."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    encoder_step.__file__, str(tmp_path / "two.safetensors")],
                   cwd=ROOT, env=environment(), check=True, timeout=300, capture_output=True)
    two = load_file(tmp_path / "two.safetensors")
    alone = Distributed(0, 1, torch.device("cpu"))
    # Principal components with nearly equal variances pass rounding errors on enlarged.
    for short_captions, tolerance in ((True, 5e-6), (False, 1e-6)):
        one = encoder_step.step(encoder_step.moe_model(), encoder_step.batch(short_captions), None, alone)
        for size in (None, 7):
            case = f"{short_captions}.{size}."
            encoder_step.assert_same({name.removeprefix(case): value for name, value in two.items()
                                      if name.startswith(case)}, one, tolerance)
    assert two["largest"] == encoder_step.SAMPLES ** 2 / 2


def test_two_processes_make_the_same_clusters_and_experts(server, world, whole):
    one, two = outputs = [world / "one", whole[0]]
    assert server.run(tiny_config(world, one)).codes == [0]
    for stage in ("stage_1", "stage_2"):
        labels = [np.load(output / stage / "labels.npy") for output in outputs]
        assert np.array_equal(*labels)
        assert (one / stage / "clusters.json").read_text() == (two / stage / "clusters.json").read_text()
        experts = [load_file(output / stage / "model" / "model.safetensors") for output in outputs]
        difference = torch.cat([(experts[1][name] - value).flatten().abs() for name, value in experts[0].items()])
        # AdamW's first updates are the gradient's sign: where it is all but zero, rounding decides.
        assert difference.max() > 0 and (difference > 2e-4).float().mean() < 1e-3
    assert filecmp.cmp(*(output / "stage_1/features/image/00000.npy" for output in outputs), shallow=False)
    losses = [[json.loads(row)["loss"] for row in (output / "metrics.jsonl").read_text().splitlines()][:8]
              for output in outputs]  # the experts' stages; router tuning has dropout, which each rank draws anew
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_mistake_ends_both_processes_with_one_sentence(server, world):
    end = server.run(tiny_config(world, world / "wrong", caption_column="text"), processes=2)
    assert end.codes == [2, 2] and "Traceback" not in end.output
    assert end.output.count("error: ") == 1 and "there is no column 'text' (found: image, caption)" in end.output


def test_one_process_of_two_killed_at_ten_moments(server, world, whole):
    config = tiny_config(world, world / "killed")
    kill_ten_times(server, config, 2, whole[1])
    assert server.run(config, processes=2).codes == [0, 0]
    assert_same_end(world / "killed", whole[0])


def test_sigterm_ends_both_processes_after_the_same_step(server, world, whole):
    """Whether it reaches the second one alone, or both and their data workers, as Slurm and torchrun send it."""
    output = world / "terminated"
    # The second process reads pictures in training alone, four of each batch.
    for workers, mishap, stage in ((0, Mishap("terminate", count=6, at=r"open .*/train/\d+\.png", rank=1), "mcl_1"),
                                   (1, Mishap("terminate_all", at="rename .*/stage_2/checkpoint"), "mcl_2")):
        config = tiny_config(world, output, workers=workers)
        end = server.run(config, mishap, 2)
        assert end.codes == [0, 0], end.output
        assert f"{stage}: stopped by SIGTERM after update " in end.output.splitlines()[-1]
    end = server.run(config, Mishap("terminate_all", at=r"open .*/evaluation/\.final/"), 2)  # in no training
    assert end.codes == [0, 0], end.output
    assert server.run(config, processes=2).codes == [0, 0]
    assert_same_end(output, whole[0])


def test_a_full_disk_ends_both_processes_with_one_sentence(server, world, whole):
    output = world / "full"
    config = tiny_config(world, output)
    end = server.run(config, Mishap("disk_full", at="rename .*/stage_1/labels"), 2)
    assert end.codes == [2, 2] and "Traceback" not in end.output
    assert end.output.count("error: ") == 1 and f"the disk is full ({output / 'stage_1' / 'labels.npy'})" in end.output
    assert server.run(config, processes=2).codes == [0, 0]
    assert_same_end(output, whole[0])


def test_launchers_and_two_nodes_give_the_same_bits(world):
    """The launchers that docs/launch.md names, two processes each; torchrun as two nodes of one."""
    values = {"method": "direct", "num_experts": 2, "validation_data": None, "hard_captions": None,
              "mcl": {"max_steps": 2}, "router": {"max_steps": 1}}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    node = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint",
            f"127.0.0.1:{port}", "--rdzv_id", "1", "-m", "train_encoder.run"]
    commands = {"torchrun": [node, node],
                "accelerate": [["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "-m",
                                "train_encoder.run"]],
                "deepspeed": [["deepspeed", "--num_accelerators", "2", "--master_port", port, "train_encoder/run.py"]]}
    scripts = Path(sys.executable).parent
    for name, nodes in commands.items():
        config = tiny_config(world, world / name, **values)
        started = [subprocess.Popen([str(scripts / command[0]), *command[1:], str(config)], cwd=ROOT, text=True,
                                    env={**environment(), "DS_ACCELERATOR": "cpu"}, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT) for command in nodes]
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(nodes), outputs
        assert "".join(outputs).count("direct: 3 updates of 8 samples") == 1  # one run, not two beside each other
        if name != "torchrun":
            assert_same_end(world / name, world / "torchrun")
    torch.set_num_threads(1)
    main(load_config(EncoderConfig, [str(tiny_config(world, world / "alone", **values))], "train_encoder"))
    one, two = (load_file(world / name / "model" / "model.safetensors") for name in ("alone", "torchrun"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4)
