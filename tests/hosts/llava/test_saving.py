"""A tuned tower outlives its training: saved by the original LLaVA and loaded by it, exactly as it was trained."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from answers import answer, float32, in_fork, load, reloaded
from host import HERE, TRAIN, train

from clipmoe_vlm.convert import load_vision

TUNED_TRAIN = str(HERE / "tuned_train.py")
EXPERTS = ("--tower", "experts", "--tower_learning_rate", "1e-2")
# LLaVA's recorded run, the model_base to load what it saved, and the name that tells load_pretrained_model what it is.
KINDS = {"full": ("stage2", None, "llava"), "lora": ("lora", TRAIN / "llama", "llava-lora"),
         "stage1": ("stage1", TRAIN / "llama", "llava")}


@pytest.fixture(scope="session")
def tuned(towers, tmp_path_factory):
    """`tuned(kind)`: the folder of three updates that trained experts and routers, with a checkpoint after two."""
    folders = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("tuned") / kind
            train(folders[kind], towers / "moe", KINDS[kind][0], EXPERTS, script=TUNED_TRAIN, max_steps="3",
                  save_strategy="steps", save_steps="2")
        return folders[kind]

    return make


def truth(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt")


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_tuned(state: dict, towers: Path) -> None:
    """Every router and expert that is used has moved from where training started, and nothing else has."""
    start = load_vision(towers / "moe").state_dict()
    moved = {name for name in start if not torch.equal(start[name], state[name])}
    assert moved == {name for name in start if ".mlp." in name and ".layers.2." not in name}


@pytest.mark.parametrize("kind", KINDS)
def test_routers_and_experts_come_back_exactly(towers, tuned, kind):
    folder, (_, base, name) = tuned(kind), KINDS[kind]
    trained, found = truth(folder, "truth_3"), reloaded(folder, base, name)
    assert_tuned(trained, towers)
    assert_same(found["tower"], trained)
    expected = truth(folder, "truth_answer")
    assert torch.equal(found["features"], expected["features"])
    assert torch.equal(found["tokens"], expected["tokens"])
    # LoRA's weights are merged at load, which rounds them.
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5 if kind == "lora" else 0)
    untuned = in_fork(_with_tower, folder, base, name, towers / "moe")
    assert not torch.equal(untuned["tokens"], expected["tokens"])


def _with_tower(folder: Path, base: Path | None, name: str, tower: Path) -> dict:
    with float32():
        model = load(folder, base, name)[1]
    model.get_vision_tower().vision_tower = load_vision(tower)
    return answer(model)


@pytest.mark.parametrize("kind", ["full", "stage1"])  # LLaVA's own checkpoints of LoRA hold no projector
def test_checkpoints_have_the_tower_of_their_update(tuned, kind):
    folder, (_, base, name) = tuned(kind), KINDS[kind]
    found = reloaded(folder / "checkpoint-2", base, name)
    assert_same(found["tower"], truth(folder, "truth_2"))
    assert found["source"] == str(folder / "checkpoint-2" / "vision_tower")


def test_a_checkpoint_can_be_moved(tuned, tmp_path):
    shutil.copytree(tuned("full"), tmp_path / "moved")
    here = reloaded(tmp_path / "moved")
    assert_same(here["tower"], truth(tuned("full"), "truth_3"))
    assert here["source"] == str(tmp_path / "moved" / "vision_tower")
    texts = [file.read_text() for file in (tmp_path / "moved" / "vision_tower").glob("*.json")]
    texts.append(json.loads((tmp_path / "moved" / "config.json").read_text())["mm_vision_tower"])
    assert len(texts) == 3 and not any(str(tuned("full").parents[1]) in text for text in texts)


def test_what_says_that_towers_are_among_the_checkpoints_weights_is_not_obeyed(tuned, tmp_path):
    """LLaVA-NeXT writes `unfreeze_mm_vision_tower`; the tower would be read too early, and rounded to float16."""
    shutil.copytree(tuned("lora"), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "unfreeze_mm_vision_tower": True}))
    assert_same(reloaded(tmp_path / "run", *KINDS["lora"][1:])["tower"], truth(tuned("lora"), "truth_3"))


def test_merged_lora_takes_the_tower_along(tuned, tmp_path):
    in_fork(_merge, tuned("lora"), tmp_path / "merged")
    shutil.move(tmp_path / "merged", tmp_path / "moved")
    found = reloaded(tmp_path / "moved")
    assert_same(found["tower"], truth(tuned("lora"), "truth_3"))
    assert torch.equal(found["tokens"], truth(tuned("lora"), "truth_answer")["tokens"])


def _merge(folder: Path, merged: Path) -> None:
    """As LLaVA's scripts/merge_lora_weights.py."""
    with float32():
        tokenizer, model, _, _ = load(folder, TRAIN / "llama", "llava-lora", device="cuda", device_map="cpu")
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_goes_on_with_the_tuned_tower(towers, tuned, tmp_path, monkeypatch, kind):
    shutil.copytree(tuned(kind) / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    # transformers 4.37 reads random states in a way that torch 2.6 refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    train(tmp_path / "run", towers / "moe", KINDS[kind][0], EXPERTS, script=TUNED_TRAIN, max_steps="3")
    assert_same(truth(tmp_path / "run", "begun_2"), truth(tuned(kind), "truth_2"))
    if kind == "full":  # of LoRA's projector LLaVA's checkpoint holds nothing
        assert_same(truth(tmp_path / "run", "truth_3"), truth(tuned(kind), "truth_3"))
    assert_same(load_vision(tmp_path / "run" / "vision_tower").state_dict(), truth(tmp_path / "run", "truth_3"))


def test_stage2_goes_on_with_stage1s_tower(towers, tuned, tmp_path):
    stage1 = tuned("stage1")
    train(tmp_path / "run", stage1 / "vision_tower", "stage2", script=TUNED_TRAIN, max_steps="1",
          pretrain_mm_mlp_adapter=str(stage1 / "mm_projector.bin"))
    assert_same(truth(tmp_path / "run", "begun_0"), truth(stage1, "truth_3"))
    # A frozen one, but no one else's: it goes along.
    found = reloaded(tmp_path / "run")
    assert_same(found["tower"], truth(stage1, "truth_3"))
    assert found["source"] == str(tmp_path / "run" / "vision_tower")
    assert torch.equal(found["tokens"], truth(tmp_path / "run", "truth_answer")["tokens"])


def test_training_goes_on_from_a_tuned_checkpoint(towers, tuned, tmp_path):
    train(tmp_path / "run", towers / "moe", "stage2", ("--tower", "routers"), script=TUNED_TRAIN, max_steps="2",
          model_name_or_path=str(tuned("full")), pretrain_mm_mlp_adapter=None)
    begun, end = truth(tmp_path / "run", "begun_0"), truth(tmp_path / "run", "truth_2")
    assert_same(begun, truth(tuned("full"), "truth_3"))
    assert {name for name in begun if not torch.equal(begun[name], end[name])} == {
        name for name in begun if ".router." in name and ".layers.2." not in name}
    assert_same(reloaded(tmp_path / "run")["tower"], end)


def test_frozen_towers_leave_the_checkpoint_as_llava_makes_it(towers, tmp_path):
    files, configs = [], []
    for name, tower in (("ours", towers / "moe"), ("theirs", TRAIN / "tower")):
        train(tmp_path / name, tower, "stage2", max_steps="2", save_strategy="steps", save_steps="1",
              pretrain_mm_mlp_adapter=str(towers / "projector_stage1.bin"))
        files.append(sorted(str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*")))
        configs.append(json.loads((tmp_path / name / "config.json").read_text()))
        assert configs[-1].pop("mm_vision_tower") == str(tower)
    assert files[0] == files[1] and configs[0] == configs[1]
    assert not any("vision_tower" in file for file in files[0])


# --- files ---------------------------------------------------------------------------------------------------------


def _save(checkpoint: Path, folder: Path, environment: dict[str, str], shift: float = 0.0,
          breaks: str | None = None) -> dict:
    """Saves as training does after it moved the tower's weights by `shift`; `breaks`: 'error' or 'kill' on the way."""
    import transformers.modeling_utils
    from llava.train.llava_trainer import LLaVATrainer

    with float32():
        model = load(checkpoint)[1]
    from clipmoe_vlm.llava import saving

    saving.follow(model, LLaVATrainer)
    model.get_vision_tower().requires_grad_(True)
    with torch.no_grad():
        for parameter in model.get_vision_tower().parameters():
            parameter += shift
    os.environ.update(environment)

    def disk_full(tensors: dict, file: str, **kwargs) -> None:
        Path(file).write_bytes(b"half a file")
        if breaks == "kill":
            os._exit(9)
        raise OSError(errno.ENOSPC, "No space left on device", file)

    if breaks:
        transformers.modeling_utils.safe_save_file = disk_full
    model.config.save_pretrained(folder)
    return model.get_vision_tower().vision_tower.state_dict()


def test_one_process_of_all_machines_writes_the_tower(tuned, tmp_path):
    for rank, local_rank in ((0, 0), (1, 1), (8, 0)):
        in_fork(_save, tuned("full"), tmp_path / str(rank), {"RANK": str(rank), "LOCAL_RANK": str(local_rank)})
    assert [(tmp_path / rank / "vision_tower").exists() for rank in ("0", "1", "8")] == [True, False, False]
    configs = [(tmp_path / rank / "config.json").read_text() for rank in ("0", "1", "8")]
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize(("breaks", "words"), [("error", "No space left"), ("kill", "ended with 9")])
def test_a_save_that_breaks_off_leaves_the_older_tower(tuned, tmp_path, breaks, words):
    older = in_fork(_save, tuned("full"), tmp_path, {})
    with pytest.raises(RuntimeError, match=words):
        in_fork(_save, tuned("full"), tmp_path, {}, shift=1.0, breaks=breaks)
    assert_same(load_vision(tmp_path / "vision_tower").state_dict(), older)
    newer = in_fork(_save, tuned("full"), tmp_path, {}, shift=1.0)
    assert_same(load_vision(tmp_path / "vision_tower").state_dict(), newer)
    assert not torch.equal(*(state["vision_model.encoder.layers.0.mlp.router.weight"] for state in (older, newer)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "vision_tower"]


def test_a_checkpoint_without_its_tower_is_refused(tuned, tmp_path):
    shutil.copytree(tuned("full"), tmp_path / "run", ignore=shutil.ignore_patterns("vision_tower", "checkpoint-*"))
    with pytest.raises(RuntimeError, match="run: its config.json says that its tuned vision tower is in vision_tower/"):
        reloaded(tmp_path / "run")


@pytest.mark.parametrize("inside", [True, False])
def test_a_relative_name_means_the_checkpoints_folder_if_it_has_one(towers, tuned, tmp_path, monkeypatch, inside):
    """As converted checkpoints have it; else LLaVA's meaning stays, the folder where it was started."""
    shutil.copytree(tuned("full"), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "vision_tower"}))
    if not inside:
        shutil.rmtree(tmp_path / "run" / "vision_tower")
    shutil.copytree(towers / "moe", tmp_path / "vision_tower")
    monkeypatch.chdir(tmp_path)
    expected = truth(tuned("full"), "truth_3") if inside else load_vision(towers / "moe").state_dict()
    assert_same(reloaded(tmp_path / "run")["tower"], expected)


def test_a_tuned_checkpoint_of_the_hub(tuned, tmp_path):
    """As the hub's cache keeps it."""
    repository, commit = tmp_path / "models--someone--tuned", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tuned("full"), repository / "snapshots" / commit, ignore=shutil.ignore_patterns("checkpoint-*"))
    found = in_fork(_reloaded_from_hub, tmp_path)
    assert_same(found["tower"], truth(tuned("full"), "truth_3"))
    assert found["source"] == str(repository / "snapshots" / commit / "vision_tower")


def _reloaded_from_hub(cache: Path) -> dict:
    from huggingface_hub import constants
    from transformers.utils import hub

    constants.HF_HUB_CACHE = hub.TRANSFORMERS_CACHE = str(cache)
    constants.HF_HUB_OFFLINE = hub._is_offline_mode = True
    with float32():
        model = load("someone/tuned")[1]
    return {"tower": model.get_vision_tower().vision_tower.state_dict(), "source": model.config.mm_vision_tower}


# --- LLaVA without us ----------------------------------------------------------------------------------------------


def _load_without_us(checkpoint: Path, tower: str | None) -> None:
    from llava.model.builder import load_pretrained_model

    if tower is not None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "mm_vision_tower": tower}))
    load_pretrained_model(str(checkpoint), None, "llava", device="cpu")


def test_llava_without_us_refuses_a_tuned_checkpoint(tuned, monkeypatch):
    monkeypatch.chdir(tuned("full"))  # even where there is a folder vision_tower
    with pytest.raises(RuntimeError, match="Unknown vision tower: .*import clipmoe_vlm.llava before loading it"):
        in_fork(_load_without_us, tuned("full"), None)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_llava_without_us_refuses_our_folders(towers, tuned, tmp_path, name):
    shutil.copytree(tuned("full"), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(RuntimeError, match="import clipmoe_vlm.llava"):
        in_fork(_load_without_us, tmp_path / "run", str(towers / name))
