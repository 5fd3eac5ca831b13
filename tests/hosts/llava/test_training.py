"""The original LLaVA trains with our tower as it does with its own, and what of the tower we say."""

import json

import pytest
import torch
from host import RUNS, TRAIN, Trained, free_port, train
from safetensors.torch import load_file

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def check_trajectory(trained: Trained, recorded: str, ranks: int = 1) -> None:
    """Each micro-batch's loss, and each group's learning rate in each update."""
    for rank in range(ranks):
        run = RUNS[recorded if ranks == 1 else f"{recorded}:{rank}"]
        steps = run["steps"]
        expected = [micro["loss"] for step in steps for micro in step["micro"]]
        assert trained.losses[rank] == pytest.approx(expected, abs=1e-5)
    used = [bool(group["params"]) for group in run["groups"]]  # we leave out LLaVA's empty groups
    assert [update["lr"] for update in trained.updates] == [
        [rate for rate, kept in zip(step["lr"], used, strict=True) if kept] for step in steps]


def saved_weights(trained: Trained) -> dict[str, torch.Tensor]:
    """What LLaVA wrote, under the names of the recorded runs."""
    found = {}
    for file in [*trained.folder.glob("*.bin"), *trained.folder.glob("*.safetensors")]:
        if file.name != "training_args.bin":
            found.update(load_file(file) if file.suffix == ".safetensors" else torch.load(file))
    names = {name: name.replace("base_model.model.", "") for name in found}
    return {f"projector.{name.split('mm_projector.')[1]}" if "mm_projector." in name
            else f"lora.{name}" if "lora_" in name else f"llm.{name}": found[old] for old, name in names.items()}


@pytest.mark.parametrize("recorded", ["stage1", "stage2", "lora"])
def test_a_dense_tower_of_ours_trains_as_llavas_own(towers, tmp_path, recorded):
    trained = train(tmp_path / "llava", towers / "dense", recorded)
    check_trajectory(trained, recorded)
    expected = {name[len("final."):]: tensor for name, tensor in load_file(TRAIN / f"{recorded}.safetensors").items()
                if name.startswith("final.")}
    got = saved_weights(trained)
    assert len(expected) >= 4
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, **TOLERANCE)


@pytest.mark.parametrize(("recorded", "ranks"), [("batch2_accumulate2", 1), ("decay", 1), ("two_ranks", 2)])
def test_variants_with_a_dense_tower_of_ours(towers, tmp_path, recorded, ranks):
    name = recorded if ranks == 1 else f"{recorded}:0"
    trained = train(tmp_path / "llava", towers / "dense", name, processes=ranks)
    check_trajectory(trained, recorded, ranks)
    got, variants = saved_weights(trained), load_file(TRAIN / "variants.safetensors")
    for key, tensor in variants.items():
        if key.startswith(f"{recorded}.projector."):
            torch.testing.assert_close(got[key[len(recorded) + 1:]], tensor, **TOLERANCE)


def test_a_frozen_tower_leaves_the_checkpoint_as_llava_makes_it(towers, tmp_path):
    start = str(towers / "projector_start.bin")
    runs = (("theirs", TRAIN / "tower", False), ("dense", towers / "dense", True),
            ("moe", towers / "moe", True))
    folders = {name: train(tmp_path / name, tower, patched=patched, max_steps="2", pretrain_mm_mlp_adapter=start).folder
               for name, tower, patched in runs}
    theirs = json.loads((folders["theirs"] / "config.json").read_text())
    for name in ("dense", "moe"):
        config = json.loads((folders[name] / "config.json").read_text())
        assert config.pop("mm_vision_tower") == str(towers / name)
        assert config == {key: value for key, value in theirs.items() if key != "mm_vision_tower"}
        files = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
                 for folder in (folders["theirs"], folders[name])]
        assert files[0] == files[1]


# Parts of the names of what trains in the three-block tower, of which LLaVA's select layer -2 uses the first two.
TRAINED = {
    "frozen": (),
    "routers": ("layers.0.mlp.router", "layers.1.mlp.router"),
    "experts": ("layers.0.mlp", "layers.1.mlp"),
    "last_n": ("layers.1.",),
    "full": ("embeddings", "pre_layrnorm", "layers.0.", "layers.1."),
}


@pytest.mark.parametrize("tuning", TRAINED)
def test_just_what_was_said_changes(towers, tmp_path, tuning):
    trained = train(tmp_path / "llava", towers / "moe", "stage2", ours=("--tower", tuning),
                    environment={"RECORD": "1"}, max_steps="3")
    before = load_file(towers / "moe" / "model.safetensors")
    after = torch.load(trained.folder / "record_0.pt")["tower"]
    assert set(before) == set(after)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    # Keys' biases move nothing, so that their gradient is rounding noise or nothing.
    wanted = {name for name in before if any(part in name for part in TRAINED[tuning])}
    assert changed | {name for name in wanted if "k_proj.bias" in name} == wanted
    table = trained.printed[trained.printed.index("what trains"):].splitlines()
    counts = {line[:22].strip(): [int(word.replace(",", "")) for word in line[22:].split()[:2]] for line in table[1:7]
              if line.startswith(("vision tower", "projector", "language"))}
    in_tower = [count for name, count in counts.items() if name.startswith("vision tower")]
    assert [sum(column) for column in zip(*in_tower, strict=True)] == [
        sum(tensor.numel() for tensor in before.values()), sum(before[name].numel() for name in wanted)]
    assert ("0.01 times the routers' auxiliary loss" in trained.printed) == (tuning != "frozen")
    assert trained.printed.count("what trains") == 1


def test_the_towers_own_learning_rate(towers, tmp_path):
    trained = train(tmp_path / "llava", towers / "moe", "stage2", environment={"RECORD": "1"}, max_steps="4",
                    ours=("--tower", "full", "--tower_learning_rate", "2e-4"), weight_decay="0.1",
                    mm_projector_lr="5e-4")
    groups = torch.load(trained.folder / "record_0.pt")["groups"]
    rates = {}
    for names, *steps in zip(groups, *(update["lr"] for update in trained.updates), strict=True):
        for name in names:
            rates[name] = steps
    shape = [update["lr"][0] / 1e-3 for update in trained.updates]  # warm-up and cosine
    assert len(rates) == sum(map(len, groups)) and len(set(shape)) == 4
    for name, steps in rates.items():
        peak = 2e-4 if "vision_tower" in name else 5e-4 if "mm_projector" in name else 1e-3
        assert steps == pytest.approx([peak * part for part in shape])
    assert sum("vision_tower" in name for name in rates) > 20
    assert "0.0002" in trained.printed


# --- the real script and the real launchers ------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", ["stage1_bf16", "stage2_bf16"])
def test_llavas_own_script_in_bfloat16(towers, tmp_path, recorded):
    """Nothing of LLaVA is changed here; the recorded run had LLaVA's own tower."""
    trained = train(tmp_path / "llava", towers / "dense", recorded, script="llava.train.train", max_steps="3")
    state = json.loads((trained.folder / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    expected = [step["loss"] for step in RUNS[recorded]["steps"]][:3]
    assert len(losses) == 3
    assert losses[:2] == pytest.approx(expected[:2], abs=0.03)  # the schedule of 3 steps is another from then on


def test_trained_towers_are_not_left_in_float16(towers, tmp_path):
    """LLaVA casts its tower to float16, where nothing else trains in 16 bits; ours is read anew if it trains."""
    from llava.train import train as module

    trained = train(tmp_path / "llava", towers / "moe", "stage1", ours=("--tower", "experts"), script=module.__file__,
                    max_steps="2")
    saved = load_file(trained.folder / "vision_tower" / "model.safetensors")
    before = load_file(towers / "moe" / "model.safetensors")
    untouched = "vision_model.embeddings.patch_embedding.weight"
    assert torch.equal(saved[untouched], before[untouched])
    assert not torch.equal(saved[untouched], before[untouched].half().float())  # or this test would see nothing


# --- DeepSpeed's own optimizer --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.1", reason="the DeepSpeed of LLaVA's pins does not start without a GPU")
@pytest.mark.parametrize("rate", ["1e-4", None])
def test_a_deepspeed_configuration_with_an_optimizer(towers, tmp_path, rate):
    """LLaVA's zero3_offload.json has one; LLaVA's own groups are not used then."""
    (tmp_path / "zero.json").write_text(json.dumps({
        "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
        "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "torch_adam": True}}}))
    environment = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = () if rate is None else ("--tower_learning_rate", rate)

    def run():
        return train(tmp_path / "llava", towers / "moe", "stage2", ours=("--tower", "routers", *options), use_cpu=None,
                     deepspeed=str(tmp_path / "zero.json"), max_steps="2", environment=environment)

    if rate is not None:
        with pytest.raises(AssertionError, match="DeepSpeed's configuration has an optimizer of its own"):
            run()
        return
    trained = run()
    assert trained.printed.count("what trains") == 1
    assert "router_aux_loss" in trained.updates[1]["logged"]
