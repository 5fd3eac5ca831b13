"""Whatever stops a run of train_encoder, the same command ends it with the bits of a run that nothing stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
import webdataset
from encoder_crash import Mishap, assert_same_end, kill_ten_times
from encoder_data import tiny_config

import train_encoder.train
from clipmoe_vlm.runs import UserError, load_checkpoint, load_config
from train_encoder.config import EncoderConfig
from train_encoder.run import main


@pytest.fixture(scope="module")
def whole(server, world) -> tuple[Path, int]:
    """The output of an unbroken run, and how many events it had."""
    end = server.run(tiny_config(world, world / "whole"), Mishap("count"))
    assert end.codes == [0], end.output
    return world / "whole", end.events


def checkpoint_step(stage: Path) -> int:
    with safetensors.safe_open(stage / "checkpoint.safetensors", "pt") as file:
        return int(file.metadata()["step"])


def test_killed_at_ten_moments(server, world, whole):
    config = tiny_config(world, world / "killed")
    kill_ten_times(server, config, 1, whole[1])
    assert server.run(config).codes == [0]
    assert_same_end(world / "killed", whole[0])


def test_sigterm_in_training_saves_after_the_step(server, world, whole):
    config = tiny_config(world, world / "terminated")
    for stage, name in (("stage_1", "mcl_1"), ("router", "router")):
        end = server.run(config, Mishap("terminate", at=f"rename .*/{stage}/checkpoint"))
        assert end.codes == [0]
        assert end.output.splitlines()[-1].endswith(
            f"{name}: stopped by SIGTERM after update 3 of 4; the same command goes on from there")
        assert checkpoint_step(world / "terminated" / stage) == 3  # the periodic one is of update 2
    end = server.run(config)
    assert end.codes == [0] and "resuming after update 3" in end.output
    assert_same_end(world / "terminated", whole[0])


def test_sigterm_elsewhere_ends_at_once_but_not_in_the_middle_of_saving_a_model(server, world, whole):
    output = world / "terminated_elsewhere"
    config = tiny_config(world, output)
    for moment, finished in ((r"open .*/\.config\.yaml", 0), (r"rename .*/stage_1/labels", 0),
                             (r"rename .*/stage_1/model", 1), (r"open .*/stage_2/features/", 1),
                             (r"open .*/evaluation/\.expert_2/", 2)):
        end = server.run(config, Mishap("terminate", at=moment))
        assert end.codes == [0] and end.last, moment
        assert end.output.splitlines()[-1].endswith("stopped by SIGTERM; the same command goes on from here")
        assert len(list(output.glob("*/done.json"))) == finished
    assert server.run(config).codes == [0]
    assert_same_end(output, whole[0])


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_finished(server, world, whole):
    output = world / "full"
    config = tiny_config(world, output)
    for file in ("metrics.jsonl", "stage_1/checkpoint.safetensors", "stage_1/model", "stage_2/features/text/00000.npy",
                 "router/done.json"):
        end = server.run(config, Mishap("disk_full", at=f"rename .*/{file}$"))
        assert end.codes == [2] and "Traceback" not in end.output
        assert end.output.splitlines()[-1].startswith(f"error: the disk is full ({output / file})")
    assert server.run(config).codes == [0]
    assert_same_end(output, whole[0])


def test_a_shard_that_vanishes_stops_the_run_until_it_is_back(server, world):
    shard = world / "shards" / "1.tar"
    shard.parent.mkdir()
    rows = (world / "train.csv").read_text().splitlines()[1:]
    for number in range(2):
        with webdataset.TarWriter(str(shard.with_name(f"{number}.tar"))) as writer:
            for row in rows[number * 32:number * 32 + 32]:
                path, caption = row.split(",")
                writer.write({"__key__": Path(path).stem, "png": (world / path).read_bytes(), "txt": caption})
    shutil.copy(shard, world / "kept.tar")
    values = {"train_data": str(shard.parent), "method": "direct", "num_experts": 2, "validation_data": None,
              "hard_captions": None, "mcl": {"max_steps": 12}, "workers": 1}
    assert server.run(tiny_config(world, world / "shards_whole", **values)).codes == [0]
    broken = world / "shards_broken"
    end = server.run(tiny_config(world, broken, **values), Mishap("remove", at="rename .*/checkpoint", file=str(shard)))
    assert end.codes == [2] and "Traceback" not in end.output
    assert end.output.splitlines()[-1].startswith(f"error: {shard} ")
    assert checkpoint_step(broken / "direct") >= 2
    shutil.copy(world / "kept.tar", shard)
    end = server.run(tiny_config(world, broken, **values))
    assert end.codes == [0] and "direct: 16 updates" in end.output and "resuming after update" in end.output
    assert_same_end(broken, world / "shards_whole")


def test_what_is_not_finite_stops_before_the_update_and_keeps_the_last_checkpoint(world, whole, monkeypatch):
    torch.set_num_threads(1)
    output = world / "not_finite"
    config = load_config(EncoderConfig, [str(tiny_config(world, output))], "train_encoder")
    step_gradients = train_encoder.train.step_gradients

    def break_update(number: int, what: str) -> None:
        """Of those made from now on."""
        calls = []

        def broken(model, *arguments, **settings):
            losses = step_gradients(model, *arguments, **settings)
            calls.append(None)
            if len(calls) == number and what == "loss":
                losses["loss"] += float("nan")
            elif len(calls) == number:
                next(p for p in model.parameters() if p.grad is not None).grad += float("inf")
            return losses

        monkeypatch.setattr(train_encoder.train, "step_gradients", broken)

    for number, what, value in ((7, "loss", "nan"), (1, "gradient norm", "inf")):
        break_update(number, what)
        with pytest.raises(UserError, match=rf"mcl_2, step 3: the {what} is {value}; no update was made"):
            main(config)
        told = json.loads((output / "stage_2" / "non_finite.json").read_text())
        assert told["step"] == 3 and len(told["ids"]) == 8 and all(name.startswith("train/") for name in told["ids"])
        assert checkpoint_step(output / "stage_2") == 2
    monkeypatch.undo()
    main(config)
    assert_same_end(output, whole[0])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    def save(width: int) -> tuple:
        layer = torch.nn.Linear(width, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        return dict(layer.named_parameters()), optimizer

    file = tmp_path / "checkpoint.safetensors"
    train_encoder.train.save_checkpoint(file, *save(3), step=1)
    with pytest.raises(UserError, match=r"weight.weight has shape \[2, 3\] there and \[2, 4\] here"):
        load_checkpoint(file, *save(4))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="checkpoint.safetensors cannot be read"):
        load_checkpoint(file, *save(3))
