"""train_vlm in two processes (gloo) under every ZeRO stage: gradients, resuming in other numbers, mishaps."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

sys.path[:0] = [str(Path(__file__).parent.parent)]
from encoder_crash import Mishap, Server  # noqa: E402
from encoder_data import ROOT, environment  # noqa: E402
from vlm_world import LLAVA_TRAIN, assert_same_end, losses, make_vlm_world, vlm_config  # noqa: E402

from clipmoe_vlm.pictures import open_rgb  # noqa: E402
from clipmoe_vlm.runs import load_config, read_jsonl  # noqa: E402
from train_vlm.chat import ChatEncoder  # noqa: E402
from train_vlm.config import VLMConfig  # noqa: E402
from train_vlm.model import build  # noqa: E402
from train_vlm.sampler import BatchPlan  # noqa: E402

STAGES = (0, 1, 2, 3)
TWELVE = {"zero_stage": 3, "max_steps": 12}
# The last file that is opened before the loop, where SIGTERM waits for the end of an update.
FIRST_UPDATE = Mishap("terminate", at=r"open .*/metrics.jsonl$")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folder of a VLM to start from."""
    folder = make_vlm_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(0)
    model, processor = build(load_config(VLMConfig, [str(vlm_config(folder, folder / "run"))], "train_vlm"))
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    samples = json.loads((LLAVA_TRAIN / "stage2.json").read_text())
    held_out = [sample for sample in samples if "image" in sample][:4] + [s for s in samples if "image" not in s][:1]
    (folder / "held_out.json").write_text(json.dumps(held_out))
    return folder


def config_of(world: Path, name: str, **changes) -> Path:
    return vlm_config(world, world / name, llm=None, vision_tower=None, vlm=str(world / "start"), **changes)


@pytest.fixture(scope="module")
def server(world):
    with Server(world, environment(), "train_vlm") as server:
        yield server


@pytest.fixture(scope="module")
def runs(server, world) -> dict[str, int]:
    """`zero0` to `zero3` of two processes and `one` of one: each was stopped after its first update, whose checkpoint
    is kept as `first_NAME`, and finished. The value is the ZeRO stage."""
    found = {"one": 0, **{f"zero{stage}": stage for stage in STAGES}}
    for name, stage in found.items():
        processes = 1 if name == "one" else 2
        config = config_of(world, name, zero_stage=stage, validation_data=str(world / "held_out.json"), answers=2)
        end = server.run(config, FIRST_UPDATE, processes)
        assert end.codes == [0] * processes, end.output
        assert "stopped by SIGTERM after update 1 of 6; the same command goes on" in end.output.splitlines()[-1]
        (world / name / "checkpoints/step_1").rename(world / f"first_{name}")
        (world / name / "checkpoints/latest").unlink()
        end = server.run(config, processes=processes)
        assert end.codes == [0] * processes, end.output
    return found


def held_out_losses(folder: Path) -> list[float]:
    return [row["validation_loss"] for row in read_jsonl(folder / "metrics.jsonl") if "validation_loss" in row]


def moments(checkpoint: Path) -> dict[str, torch.Tensor]:
    """AdamW's first moment of each parameter, flat, put together from the pieces."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in checkpoint.glob("*.safetensors"):
        for key, value in load_file(file).items():
            kind, start, name = key.split("/", 2)
            if kind == "exp_avg":
                parts.setdefault(name, []).append((int(start), value))
    return {name: torch.cat([value for _, value in sorted(pieces, key=lambda piece: piece[0])])
            for name, pieces in parts.items()}


def plain_gradients(world: Path) -> dict[str, torch.Tensor]:
    """Of the first global batch, clipped: sample by sample through transformers' own forward."""
    model = LlavaForConditionalGeneration.from_pretrained(world / "start").requires_grad_(False)
    processor = AutoProcessor.from_pretrained(world / "start", backend="pil")
    samples = json.loads((LLAVA_TRAIN / "stage2.json").read_text())
    chosen = BatchPlan([1] * len(samples), 1, 2, 2, False, VLMConfig.seed).order(0)[:4]
    losses, auxes, count, pictures = [], [], 0, 0
    for name, parameter in model.named_parameters():
        tower = "vision_tower" in name
        parameter.requires_grad_(not tower or ".mlp." in name and ".layers.2." not in name)
    for sample in (samples[index] for index in chosen):
        ids, labels = ChatEncoder(processor.tokenizer, processor.chat_template).encode(sample["conversations"])
        pairs = [pair for pair in zip(ids, labels, strict=True)
                 for _ in range(4 if pair[0] == model.config.image_token_id else 1)]
        pixels = None
        if sample.get("image"):
            picture = open_rgb(LLAVA_TRAIN / "images" / sample["image"])
            pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            auxes.append(model.model.vision_tower(pixels, output_hidden_states=-2).aux_loss)
            pictures += 1
        logits = model(input_ids=torch.tensor([[token for token, _ in pairs]]), pixel_values=pixels).logits[0]
        targets = torch.tensor([label for _, label in pairs])[1:]
        losses.append(F.cross_entropy(logits[:-1, :model.config.image_token_id], targets, reduction="sum"))
        count += int((targets >= 0).sum())
    assert 0 < pictures < len(chosen)  # pictures and text alone meet
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    (sum(losses) / count + 0.01 * sum(auxes) / pictures).backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    return {name: parameter.grad.flatten() for name, parameter in trained.items()}


def test_gradients_are_those_of_plain_pytorch_in_every_zero_stage(world, runs):
    """With an expert that no token reaches; AdamW's first moment is a tenth of its first gradient."""
    expected = plain_gradients(world)
    idle = [name for name in expected if "layers.0.mlp.experts" in name]
    assert idle and all(expected[name].chunk(4)[3].abs().max() == 0 < expected[name].abs().max() for name in idle)
    for name in runs:
        found = moments(world / f"first_{name}")
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(10 * found[key], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


def test_zero_stages_end_alike(world, runs):
    one = load_file(world / "one/model/model.safetensors")
    rows = [row for row in read_jsonl(world / "zero3/metrics.jsonl") if "loss" in row]
    assert any(row["pictures"] < row["samples"] for row in rows) and all(row["aux_loss"] > 0 for row in rows)
    for stage in STAGES:
        assert losses(world / f"zero{stage}") == pytest.approx(losses(world / "one"), abs=2e-5)
        # An odd number of micro-batches, with and without pictures, on two processes.
        ours, theirs = held_out_losses(world / f"zero{stage}"), held_out_losses(world / "one")
        assert len(ours) == 2 and ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=1e-4)
        ours, theirs = ([row for row in read_jsonl(world / run / "answers.jsonl") if row["step"] == 0]
                        for run in (f"zero{stage}", "one"))
        assert ours == theirs and len(ours) == 2
        found = load_file(world / f"zero{stage}/model/model.safetensors")
        assert found.keys() == one.keys()
        # Adam turns rounding of near-zero gradients into steps of the size of the learning rate; few are so small.
        differ = sum(((found[name] - one[name]).abs() > 1e-4).sum().item() for name in one)
        assert differ < 0.001 * sum(value.numel() for value in one.values()), stage


def test_goes_on_with_other_processes_and_stages(server, world, runs):
    """Every update in new processes: two, then one of each stage. The losses are those of the unbroken run."""
    values = {"max_steps": 2 * len(STAGES)}
    assert server.run(config_of(world, "unbroken", **values), processes=2).codes == [0, 0]
    starts = [(stage, processes) for stage in (3, 1, 0, 2) for processes in (2, 1)]
    for update, (stage, processes) in enumerate(starts, 1):
        end = server.run(config_of(world, "elastic", zero_stage=stage, offload=stage == 2, **values), FIRST_UPDATE,
                         processes)
        assert end.codes == [0] * processes, end.output
        assert f"stopped by SIGTERM after update {update} of {len(starts)}" in end.output.splitlines()[-1]
    end = server.run(config_of(world, "elastic", zero_stage=2, **values), processes=2)
    assert end.codes == [0, 0] and losses(world / "elastic") == pytest.approx(losses(world / "unbroken"), abs=1e-5)


@pytest.fixture(scope="module")
def whole(server, world) -> Path:
    """An unbroken run of twelve updates under ZeRO-3."""
    assert server.run(config_of(world, "whole", **TWELVE), processes=2).codes == [0, 0]
    return world / "whole"


def test_whatever_stops_one_of_two_processes(server, world, whole):
    """Killed, terminated (one alone, or both and their workers), out of disk: at the end not one bit differs."""
    file = "open .*/step_.*safetensors"
    for code, mishap in ((-signal.SIGKILL, Mishap("kill_half_written", at=file, rank=1)),
                         (-signal.SIGKILL, Mishap("kill", at=file, rank=0)),
                         (0, Mishap("terminate", at="open .*/images/", rank=1)),
                         (0, Mishap("terminate_all", at="rename .*/latest")),
                         (2, Mishap("disk_full", at=file, rank=1)),
                         (-signal.SIGKILL, Mishap("kill", count=3, at="open .*/images/", rank=1)),
                         (-signal.SIGKILL, Mishap("kill_half_written", at=file, rank=0))):
        workers = 1 if mishap.do == "terminate_all" else 0
        end = server.run(config_of(world, "stopped", workers=workers, **TWELVE), mishap, 2)
        assert end.codes[mishap.rank] == code and "Traceback" not in end.output, end
        if code == 0:
            assert end.codes == [0, 0] and "stopped by SIGTERM after update " in end.output.splitlines()[-1]
        elif code == 2:
            assert end.codes == [2, 2] and end.output.count("error: ") == 1 and "could not be written" in end.output
        else:
            assert end.codes[1 - mishap.rank] in (2, -signal.SIGKILL)
    assert server.run(config_of(world, "stopped", **TWELVE), processes=2).codes == [0, 0]
    assert_same_end(world / "stopped", whole)


def test_a_mistake_is_said_once(server, world, whole):
    for name, changes, sentence in (
            ("wrong", {"vision_towr": "x"}, "there is no key 'vision_towr'; did you mean 'vision_tower'?"),
            ("wrong", {"global_batch_size": 3}, "must be a multiple of micro_batch_size"),
            ("whole", {"seed": 1}, "seed was 42 and is now 1")):
        end = server.run(config_of(world, name, **TWELVE | changes), processes=2)
        assert end.codes == [2, 2] and "Traceback" not in end.output
        assert end.output.count("error: ") == 1 and sentence in end.output


def test_launchers_two_nodes_and_sigterm(world, whole):
    """As docs/launch.md has it: `deepspeed --hostfile --no_ssh`, stopped by a signal; torchrun goes on from there."""
    config, output = config_of(world, "launched", **TWELVE), world / "launched"
    (world / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [launch("deepspeed", "--hostfile", str(world / "hostfile"), "--no_ssh", "--node_rank", rank,
                    "--master_addr", "127.0.0.1", "--master_port", port, "train_vlm/run.py", str(config))
             for rank in "01"]
    started = time.time()
    while not (output / "metrics.jsonl").exists():
        assert time.time() - started < 300 and nodes[0].poll() is None, nodes[0].communicate()[0]
        time.sleep(0.01)
    os.killpg(nodes[1].pid, signal.SIGTERM)  # the launcher itself does not pass it on
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert nodes[0].returncode == 0 and "stopped by SIGTERM after update " in outputs[0], outputs
    nodes = [launch("torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint",
                    f"127.0.0.1:{port}", "--rdzv_id", "1", "train_vlm/run.py", str(config)) for _ in range(2)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same_end(output, whole)


def launch(launcher: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([str(Path(sys.executable).parent / launcher), *arguments], cwd=ROOT, text=True,
                            env={**environment(), "DS_ACCELERATOR": "cpu"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)
