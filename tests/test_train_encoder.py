"""Whole runs of train_encoder on 64 tiny pictures: every method, resume, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from encoder_data import run, save_scenes, tiny_config
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.runs import UserError, load_config, read_jsonl
from clipmoe_vlm.upcycling import upcycle
from train_encoder.config import EncoderConfig
from train_encoder.features import Features
from train_encoder.run import main


@pytest.fixture(scope="module")
def dmu(world) -> Path:
    """The output of a whole dmu run, made by the command line."""
    output = world / "dmu"
    result = run(tiny_config(world, output))
    assert result.returncode == 0, result.stderr
    (world / "dmu.log").write_text(result.stdout)
    return output


def run_here(config: Path, *arguments: str) -> None:
    """The same program without the start of a process, with the threads that `run` gives it."""
    torch.set_num_threads(1)
    main(load_config(EncoderConfig, [str(config), *arguments], "train_encoder"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])}


def ffn_names(layers: dict[str, list[int]]) -> set[str]:
    return {f"{tower}_model.encoder.layers.{layer}.mlp.{name}" for tower, numbers in layers.items()
            for layer in numbers for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}


def test_dmu_trains_the_ffns_then_only_the_routers(dmu):
    base, *experts = (weights(dmu / name) for name in ("base", "stage_1/model", "stage_2/model"))
    for expert in experts:
        assert changed(base, expert) == ffn_names({"vision": [0, 1], "text": [0, 1]})
    untuned = upcycle([CLIPMoEModel.from_pretrained(dmu / name) for name in ("base", "stage_1/model", "stage_2/model")])
    moved = changed(untuned.state_dict(), weights(dmu / "model"))
    assert moved == {f"{tower}_model.encoder.layers.{layer}.mlp.router.weight" for tower in ("vision", "text")
                     for layer in (0, 1)}


def test_dmu_stages_cluster_and_accumulate(dmu):
    first, second = (np.load(dmu / f"stage_{s}" / "labels.npy") for s in (1, 2))
    assert np.array_equal(second // 4, first)  # two clusters per modality
    for stage, labels in ((1, first), (2, second)):
        counts = json.loads((dmu / f"stage_{stage}" / "clusters.json").read_text())
        sizes = np.unique(labels, return_counts=True)[1]
        assert counts["sizes"] == sizes.tolist() and counts["num_clusters"] == len(sizes)
        assert counts["used_samples"] == (sizes // 8 * 8).sum() == 64 - counts["dropped_samples"]
        features = Features([dmu / f"stage_{stage}" / "features" / "image"])[np.arange(64)]
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), np.ones(64), rtol=1e-3)  # half floats
    # Stage 2 saw the pictures through expert 1.
    model = CLIPMoEModel.from_pretrained(dmu / "stage_1" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(dmu / "base")
    captions = [row["caption"] for row in read_jsonl(dmu / "index" / "train.jsonl")]
    ids = tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_text_features(ids), dim=-1)
    found = Features([dmu / "stage_2" / "features" / "text"])[np.arange(64)]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_dmu_writes_what_others_read(dmu):
    log = (dmu.parent / "dmu.log").read_text()
    names = ["base", "expert_1", "expert_2", "random_routers", "uniform_average", "final"]
    assert sorted(file.stem for file in (dmu / "evaluation").iterdir()) == sorted(names)
    for name in names:
        assert log.count(f"[{name}] image->text") == 1
        result = json.loads((dmu / "evaluation" / f"{name}.json").read_text())
        assert result["name"] == name
        assert result["retrieval"]["n_images"] == result["retrieval"]["n_captions"] == 12
        assert set(result["hard"]) == {"color", "place"} and result["hard"]["color"]["n"] == 12
        correct = [item["correct"] for item in result["hard_items"] if item["kind"] == "place"]
        assert result["hard"]["place"]["accuracy"] == pytest.approx(np.mean(correct))
        if name in ("base", "expert_1", "expert_2"):
            assert result["routing"] is None
        else:
            loads = np.array(result["routing"]["text_load"])
            np.testing.assert_allclose(loads.sum(1), [1, 1], rtol=1e-5)
    average = json.loads((dmu / "evaluation" / "uniform_average.json").read_text())["routing"]
    np.testing.assert_allclose(average["vision_load"], 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(average["vision_entropy"], np.log(3), rtol=1e-5)
    rows = read_jsonl(dmu / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in ("mcl_1", "mcl_2", "router") for step in (1, 2, 3, 4)]
    for row in rows:
        expected = row["contrastive"]
        if row["stage"] == "router":
            assert row["image_balance"] > 0 and row["text_balance"] > 0
            expected += 0.01 * (row["image_balance"] + row["text_balance"] / 2)
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    summary = (dmu / "summary.md").read_text()
    for word in ("| expert_2 |", "| stage_2 |", "scores.png", "stage_2/stage.png", "routing.png"):
        assert word in summary
    for picture in ("scores.png", "stage_2/stage.png", "routing.png"):
        assert (dmu / picture).stat().st_size > 1000


def test_the_final_folder_is_all_that_one_needs(dmu, tmp_path):
    folder = shutil.copytree(dmu / "model", tmp_path / "elsewhere")
    model = CLIPMoEModel.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(["a red square"], return_tensors="pt")["input_ids"]
    size = AutoImageProcessor.from_pretrained(folder).crop_size["height"]
    assert model(input_ids=ids, pixel_values=torch.zeros(1, 3, size, size)).logits_per_image.shape == (1, 1)


def test_a_finished_run_is_not_run_again_and_not_mixed_with_another(dmu, world, capsys):
    before = {file: file.stat().st_mtime_ns for file in dmu.rglob("*.safetensors")}
    run_here(world / "dmu.yaml", "workers=1", "checkpoint_every=7")
    assert {file: file.stat().st_mtime_ns for file in dmu.rglob("*.safetensors")} == before
    printed = capsys.readouterr().out
    assert "updates of" not in printed and "[final]" not in printed and "done: the model is in" in printed
    with pytest.raises(UserError, match=r"mcl\.learning_rate was 0\.001 and is now 0\.5"):
        run_here(world / "dmu.yaml", "mcl.learning_rate=0.5")


@pytest.mark.parametrize("method", ["direct", "sparse_upcycling", "mcl_random_batches", "without_mcl"])
def test_baselines_spend_the_same_budget(world, method):
    output = world / method
    run_here(tiny_config(world, output, method=method, first_moe_layer=1))
    steps = {folder: json.loads((output / folder / "done.json").read_text())["steps"] for folder in
             ("direct", "sparse_upcycling", "stage_1", "stage_2", "router") if (output / folder).exists()}
    assert steps == {"direct": {"direct": 12}, "sparse_upcycling": {"sparse_upcycling": 12},
                     "mcl_random_batches": {"stage_1": 4, "stage_2": 4, "router": 4},
                     "without_mcl": {"stage_1": 8, "router": 4}}[method]
    names = {"base", "final"}
    if method in ("mcl_random_batches", "without_mcl"):
        names |= {"expert_1", "random_routers", "uniform_average"} | {f"expert_{s}" for s in (1, 2)
                                                                       if method == "mcl_random_batches"}
    assert {file.stem for file in (output / "evaluation").iterdir()} == names
    model = CLIPMoEModel.from_pretrained(output / "model")
    base, final = weights(output / "base"), model.state_dict()
    experts = {"direct": 1, "sparse_upcycling": 3, "mcl_random_batches": 3, "without_mcl": 2}[method]
    assert model.config.vision_config.num_experts == experts
    first = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(base[first], final[first])  # first_moe_layer: 1
    if method == "direct":
        assert changed(base, final) == ffn_names({"vision": [1], "text": [0, 1]})
    elif method == "sparse_upcycling":
        stacked = final["text_model.encoder.layers.0.mlp.experts.fc1_weight"]
        dense = base["text_model.encoder.layers.0.mlp.fc1.weight"]
        assert all(not torch.equal(expert, dense) for expert in stacked) and not torch.equal(stacked[0], stacked[1])
    else:
        stacked = final["text_model.encoder.layers.1.mlp.experts.fc2_bias"]
        tuned = [weights(output / f"stage_{s}" / "model") for s in range(1, experts)]
        for expert, state in enumerate([base, *tuned]):
            assert torch.equal(stacked[expert], state["text_model.encoder.layers.1.mlp.fc2.bias"])


def test_a_stage_may_go_on_from_the_previous_one_with_merged_clusters(world):
    output = world / "previous"
    run_here(tiny_config(world, output, init_from="previous", small_clusters="merge", num_clusters=3,
                         mcl={"max_steps": 2}, router={"max_steps": 1}, validation_data=None))
    counts = json.loads((output / "stage_2" / "clusters.json").read_text())
    assert len(np.unique(np.load(output / "stage_2" / "labels.npy"))) > counts["num_clusters"] > 1
    # AdamW moves a weight by about the learning rate (1e-3) at each update, so two stages of two can pass 2e-3.
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    base, one, two = (weights(output / folder)[name] for folder in ("base", "stage_1/model", "stage_2/model"))
    assert (two - base).abs().max() > 2.6e-3 > 2.2e-3 > (one - base).abs().max() > 0


def test_epochs_start_over_until_max_steps(world):
    output = world / "epochs"
    run_here(tiny_config(world, output, method="direct", num_experts=2, mcl={"max_steps": None, "epochs": 2},
                         router={"max_steps": 3}, validation_data=None))
    assert [row["epoch"] for row in read_jsonl(output / "metrics.jsonl")] == [0] * 8 + [1] * 8 + [2] * 3


def test_settings_that_save_memory_change_no_loss(world, tmp_path):
    """And may be set on the way: a run that is out of memory must not begin anew."""
    values = {"num_experts": 2, "short_captions": "first_sentence", "validation_data": None, "hard_captions": None,
              "router": {"expert_dropout": 0.0}}
    run_here(tiny_config(world, tmp_path / "plain", **values))
    run_here(tiny_config(world, tmp_path / "small", **values, micro_batch_size=3, gradient_checkpointing=True))
    plain, small = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("plain", "small"))
    assert {row["stage"] for row in plain} == {"mcl_1", "router"} and all(row["short"] > 0 for row in plain)
    for key in ("loss", "contrastive", "short", "image_balance", "text_balance"):
        np.testing.assert_allclose([row[key] for row in small], [row[key] for row in plain], rtol=1e-3, err_msg=key)
    run_here(tmp_path / "plain.yaml", "micro_batch_size=4", "compile=true")


def test_the_logit_scale_may_be_the_bases_own(world, tmp_path):
    own = CLIPMoEModel.from_pretrained(world / "clip").logit_scale.exp().item()
    losses = []
    for scale in (None, own, 100.0):
        output = tmp_path / str(scale)
        run_here(tiny_config(world, output, method="direct", num_experts=2, logit_scale=scale, mcl={"max_steps": 1},
                             router={"max_steps": 1}, validation_data=None, hard_captions=None))
        losses.append([row["loss"] for row in read_jsonl(output / "metrics.jsonl")])
    assert losses[0] == losses[1] != losses[2]


def test_shards_train_like_the_folder(world):
    rows = (world / "train.csv").read_text().splitlines()[1:]
    (world / "shards").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(world / "shards" / f"{shard}.tar")) as writer:
            for row in rows[shard * 32:shard * 32 + 32]:
                path, caption = row.split(",")
                writer.write({"__key__": Path(path).stem, "png": (world / path).read_bytes(), "txt": caption})
    values = {"method": "direct", "num_experts": 2, "validation_data": None, "workers": 1}
    run_here(tiny_config(world, world / "from_folder", **values))
    run_here(tiny_config(world, world / "from_shards", **values, train_data=str(world / "shards" / "{0..1}.tar")))
    assert not changed(weights(world / "from_folder" / "model"), weights(world / "from_shards" / "model"))


def test_unreadable_pictures_are_skipped_counted_and_named(world, capsys):
    rows = (world / "train.csv").read_text().splitlines()
    (world / "train" / "torn.png").write_bytes((world / "train" / "000.png").read_bytes()[:60])
    (world / "torn.csv").write_text("\n".join([*rows, "train/torn.png,a red square", "train/gone.png,a red square"]))
    values = {"train_data": str(world / "torn.csv"), "num_experts": 2, "validation_data": None,
              "mcl": {"max_steps": 2}, "router": {"max_steps": None}}
    run_here(tiny_config(world, world / "torn", **values))
    printed = capsys.readouterr().out
    assert "2 unreadable" in printed
    assert "stage_1: skipped sample train/gone.png: unreadable picture" in printed
    assert "stage_1: skipped sample train/torn.png: unreadable picture" in printed
    assert np.load(world / "torn" / "stage_1" / "labels.npy")[-2:].tolist() == [-1, -1]
    rows = read_jsonl(world / "torn" / "metrics.jsonl")
    assert sum(row["skipped"] for row in rows if row["stage"] == "mcl_1") == 0  # no label, never drawn
    in_batches = printed.count("router, step")
    assert sum(row["skipped"] for row in rows if row["stage"] == "router") == in_batches > 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": "/nowhere"}, "model: /nowhere: no such file"),
    ({"method": "mcl"}, "method: 'mcl' is not one of dmu, direct"),
    ({"top_k": 5}, "top_k: a token cannot go to 5 of num_experts=3 experts"),
    ({"mcl": {"batch_size": 1}}, "mcl.batch_size: 1 must be a multiple of the 1 processes"),
    ({"mcl": {"batch_size": 100}}, "train_data has 64 samples, fewer than one batch of 100"),
    ({"mcl": {"batch_size": 40}}, r"none of the \d clusters of the 64 training samples fills one batch of 40"),
    ({"caption_column": "text"}, r"train\.csv, sample 1: there is no column 'text' \(found: image, caption\)"),
    ({"first_moe_layer": 2}, "first_moe_layer: 2 leaves no MoE layer"),
    ({"text_length": 248}, "16 text positions cannot be stretched to 248"),
    ({"micro_batch_size": 0}, "micro_batch_size: 0 must be at least 1, or null"),
    ({"precision": "fp16"}, "fp16 needs a GPU"),
    ({"hard_captions": "train.jsonl"}, r"train\.jsonl: no such file"),
    ({"method": "direct", "mcl": {"learning_rate": 1e30}},
     r"direct, step \d: the (loss|gradient norm) is (nan|inf); no update was made\. Samples of the batch: train/"),
])
def test_a_mistake_is_one_sentence(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_here(tiny_config(world, tmp_path / "out", **changes))


def test_a_mistake_on_the_command_line_is_one_line_and_code_2(world, tmp_path):
    result = run(tiny_config(world, tmp_path / "out"), "mcl.learning_rat=1")
    assert result.returncode == 2
    assert "there is no key 'mcl.learning_rat'; did you mean 'mcl.learning_rate'?" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_the_text_tower_is_stretched_on_request(world, tmp_path):
    source = CLIPMoEModel.from_pretrained(world / "clip")
    shutil.copytree(world / "clip", tmp_path / "clip")
    values = source.config.to_dict()
    values["text_config"]["max_position_embeddings"] = 24
    longer = CLIPMoEModel(type(source.config)(**values))
    longer.save_pretrained(tmp_path / "clip")
    run_here(tiny_config(world, tmp_path / "out", model=str(tmp_path / "clip"), text_length=36, method="direct",
                         num_experts=2, mcl={"max_steps": 1}, router={"max_steps": 1}, validation_data=None))
    assert CLIPMoEModel.from_pretrained(tmp_path / "out" / "model").config.text_config.max_position_embeddings == 36
    base = weights(tmp_path / "out" / "base")["text_model.embeddings.position_embedding.weight"]
    old = longer.text_model.embeddings.position_embedding.weight
    assert torch.equal(base[:21], old[:21])
    torch.testing.assert_close(base[22], (old[20] + old[21]) / 2)


def test_held_out_pictures_with_several_captions_and_a_torn_one(world, tmp_path, capsys):
    save_scenes(tmp_path, 4, "many", 5)
    rows = (tmp_path / "many.csv").read_text().splitlines()
    (tmp_path / "many.csv").write_text("\n".join([*rows, rows[1] + " again", "many/gone.png,a red square"]))
    run_here(tiny_config(world, tmp_path / "out", validation_data=str(tmp_path / "many.csv"), method="direct",
                         mcl={"max_steps": 1}, router={"max_steps": 1}, hard_captions=None))
    result = json.loads((tmp_path / "out" / "evaluation" / "base.json").read_text())
    assert (result["retrieval"]["n_images"], result["retrieval"]["n_captions"]) == (4, 5)
    assert result["skipped_pictures"] == 1 and "gone.png: unreadable picture" in capsys.readouterr().out
