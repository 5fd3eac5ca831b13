"""Whatever stops a run of train_vlm, the same command ends it with the bits of a run that nothing stopped."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from encoder_crash import Mishap, Server
from encoder_data import environment
from vlm_world import assert_same_end, make_vlm_world, vlm_config

LORA = {"r": 4, "alpha": 8, "dropout": 0.2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_vlm_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world):
    with Server(world, environment(), "train_vlm") as server:
        yield server


def config_of(world: Path, name: str, **changes) -> Path:
    return vlm_config(world, world / name, micro_batch_size=4, lora=LORA, **changes)


@pytest.fixture(scope="module")
def whole(server, world) -> Path:
    """The output of an unbroken run of six updates with a checkpoint every second one."""
    assert server.run(config_of(world, "whole")).codes == [0]
    return world / "whole"


@pytest.mark.parametrize("tower, llm_tuning, changes", [
    ("frozen", "full", {}), ("routers", "lora", {}), ("experts", "frozen", {}), ("last_n", "lora", {}),
    ("full", "full", {}), ("frozen", "dora", {}), ("frozen", "qlora", {}), ("frozen", "frozen", {}),
    ("routers", "full", {"precision": "bf16", "zero_stage": 0}),
    ("experts", "lora", {"precision": "bf16", "zero_stage": 2})])
def test_killed_at_ten_moments(server, world, tower, llm_tuning, changes):
    """Seven of them at random, three in the middle of writing a checkpoint."""
    values = {"tower": tower, "llm_tuning": llm_tuning, "max_steps": 8, "checkpoint_every": 1, **changes}
    config = config_of(world, "killed", **values)
    name = "_".join(["unbroken", tower, llm_tuning, *changes])
    end = server.run(config_of(world, name, **values), Mishap("count"))
    assert end.codes == [0], end.output
    random = np.random.default_rng(0)
    half_written = Mishap("kill_half_written", count=2, at="open .*/step_.*safetensors")
    for number in range(10):
        mishap = half_written if number % 3 == 1 else Mishap("kill", count=int(random.integers(1, end.events // 8)))
        killed = server.run(config, mishap)
        assert killed.codes == [-signal.SIGKILL] and "Traceback" not in killed.output
    assert server.run(config).codes == [0]
    assert_same_end(world / "killed", world / name)
    shutil.rmtree(world / "killed")


def test_sigterm(server, world, whole):
    """While the model loads, in an update, and while the finished model is written."""
    config = config_of(world, "terminated")
    for moment, word in ((r"open .*/\.config\.yaml", "stopped by SIGTERM; the same command"),
                         (r"rename .*/latest", "stopped by SIGTERM after update 3 of 6; the same command"),
                         (r"mkdir .*/\.model\.new", "finished: ")):
        end = server.run(config, Mishap("terminate", at=moment))
        assert end.codes == [0] and end.last, end.output
        assert end.output.splitlines()[-1].startswith(word)
    assert_same_end(world / "terminated", whole)


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_finished(server, world, whole):
    config, output = config_of(world, "full"), world / "full"
    for file, words, left in (("open .*/step_4/.*safetensors", f"{output}/checkpoints/step_4 could not be written", 2),
                              ("rename .*/model", f"the disk is full ({output / 'model'})", 4)):
        end = server.run(config, Mishap("disk_full", at=file))
        assert end.codes == [2] and "Traceback" not in end.output
        assert end.output.splitlines()[-1].startswith(f"error: {words}")
        assert [path.name for path in output.glob("checkpoints/step_*")] == [f"step_{left}"]
    assert server.run(config).codes == [0]
    assert_same_end(output, whole)


def test_checkpoints_that_do_not_fit_are_refused(server, world):
    """A torn or missing file, other parameters, another configuration: one sentence, and nothing is lost."""
    config, output = config_of(world, "torn", zero_stage=3), world / "torn"
    assert server.run(config, Mishap("terminate", at="rename .*/latest")).codes == [0]
    [file] = output.glob("checkpoints/step_3/*.safetensors")
    data = file.read_bytes()

    def refused(words: str, config: Path = config) -> None:
        end = server.run(config)
        assert end.codes == [2] and "Traceback" not in end.output
        assert words in end.output.splitlines()[-1]

    file.write_bytes(data[:-8])
    refused("step_3 can't be read")
    file.unlink()
    refused("step_3 lacks a file, or is a checkpoint of another model")
    file.write_bytes(data)
    refused("(epochs was 1 and is now 2; learning_rate was 0.001 and is now 0.1)",
            config_of(world, "torn", learning_rate=0.1, epochs=2))
    assert server.run(config_of(world, "torn", zero_stage=1, checkpoint_every=5, workers=1)).codes == [0]
