"""LLaVA-NeXT by its interface: a stand-in of ours with its calling sequence (see next_standin/llava/__init__.py)."""

import json
import sys
from pathlib import Path

import pytest
import torch
from host import REPOSITORY, TRAIN, run
from safetensors.torch import load_file

from clipmoe_vlm.convert import load_vision

STANDIN = Path(__file__).parent / "next_standin"
OUR_WORD = ("--tower", "routers", "--tower_learning_rate", "1e-2")
RUNS = {  # options of ours, arguments of LLaVA-NeXT's
    "ours": (OUR_WORD, {}),
    "ours, tower frozen": (OUR_WORD, {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}),
    "ours, tower unfrozen": (OUR_WORD, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}),
    "unfreeze": ((), {"unfreeze_mm_vision_tower": "True"}),
    "tunable parts": ((), {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"}),
    "nothing": ((), {}),
}


@pytest.fixture(scope="module")
def runs(towers, tmp_path_factory) -> dict[str, tuple[Path, dict, dict, str]]:
    """Per run its folder, what the stand-in saw, its first line of the log, and all that was printed.

    They are forks of one process that has the stand-in for its `llava`.
    """
    folder = tmp_path_factory.mktemp("next")
    commands = []
    for number, (ours, theirs) in enumerate(RUNS.values()):
        arguments = {"model_name_or_path": str(TRAIN / "llama"), "vision_tower": str(towers / "moe"),
                     "output_dir": str(folder / str(number)), "use_cpu": "True", "logging_steps": "1",
                     "max_steps": "3", "per_device_train_batch_size": "2", "save_strategy": "no",
                     "learning_rate": "1e-3", "lr_scheduler_type": "constant", "mm_projector_lr": "1e-4",
                     "mm_vision_tower_lr": "1e-5", **theirs}
        commands.append(["-m", "clipmoe_vlm.llava", *ours, "llava.train.train",
                         *(word for name, value in arguments.items() for word in (f"--{name}", value))])
    script = folder / "runs.py"
    script.write_text("from pathlib import Path\nfrom host import fork\n"
                      f"for number, words in enumerate({commands!r}):\n"
                      f"    fork(words, Path({str(folder)!r}) / f'{{number}}.log', timeout=100)\n")
    run([sys.executable, str(script)], PYTHONPATH=f"{STANDIN}:{Path(__file__).parent}:{REPOSITORY}")
    results = {}
    for number, name in enumerate(RUNS):
        printed = (folder / f"{number}.0").read_text()
        line = next(json.loads(line) for line in printed.splitlines() if line.startswith('{"'))
        results[name] = (folder / str(number), torch.load(folder / str(number) / "seen.pt"), line, printed)
    return results


def changed(seen: dict, tower: Path) -> set[str]:
    before = load_file(tower / "model.safetensors")
    return {name for name, tensor in seen["tower"].items() if not torch.equal(tensor, before[name])}


def balance_of_real_tiles(seen: dict, tower: Path) -> float:
    with torch.no_grad():
        return load_vision(tower)(seen["pictures"], output_hidden_states=-2).balance_loss.item()


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("ours")])
def test_our_word_decides_over_theirs(towers, runs, name):
    folder, seen, line, printed = runs[name]
    routers = {f"vision_model.encoder.layers.{layer}.mlp.router.weight" for layer in (0, 1)}
    assert changed(seen, towers / "moe") == routers
    assert sum(group["size"] for group in seen["groups"] if group["lr"] == 1e-2) == sum(
        seen["tower"][name].numel() for name in routers)
    assert line["router_aux_loss"] == pytest.approx(balance_of_real_tiles(seen, towers / "moe"), abs=1e-4)
    assert printed.count("what trains") == 1
    saved = load_file(folder / "vision_tower" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in seen["tower"].items())


@pytest.mark.parametrize("name", ["unfreeze", "tunable parts"])
def test_their_words_alone_train_all_that_is_used(towers, runs, name):
    _, seen, line, _ = runs[name]
    names = changed(seen, towers / "moe")
    assert any("embeddings" in name for name in names) and any("experts" in name for name in names)
    assert not any("layers.2." in name or "post_layernorm" in name for name in names)
    assert "router_aux_loss" in line
    assert {group["lr"] for group in seen["groups"]} == {1e-3, 1e-4, 1e-5}


def test_nothing_said_trains_nothing(towers, runs):
    folder, seen, line, _ = runs["nothing"]
    assert not changed(seen, towers / "moe") and "router_aux_loss" not in line
    assert not (folder / "vision_tower").exists()
