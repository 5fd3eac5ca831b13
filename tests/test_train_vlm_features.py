"""The cache of tower features: the same training without asking the tower again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from llava_runs import LLAVA_TRAIN, settings
from PIL import Image
from safetensors.torch import load_file, save_file

from clipmoe_vlm import CLIPMoEVisionModel
from clipmoe_vlm.runs import UserError, read_jsonl
from train_vlm.train import train

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains with and without the cache on a folder of pictures of its own, one of them broken."""
    root = tmp_path_factory.mktemp("cache")
    shutil.copytree(LLAVA_TRAIN / "images", root / "images")
    samples = json.loads((LLAVA_TRAIN / "stage2.json").read_text())
    (root / "images" / "broken.png").write_bytes(b"no picture")
    for sample, picture in zip(samples[:2], ("broken.png", "missing.png"), strict=True):
        sample["image"] = picture
        sample["conversations"][0]["value"] = "<image>\nWhat?"
    (root / "data.json").write_text(json.dumps(samples))

    def start(name, **changes):
        train(settings(root / name, data=str(root / "data.json"), image_folder=str(root / "images"), max_steps=6,
                       **changes))
        return load_file(root / name / "model/model.safetensors"), read_jsonl(root / name / "metrics.jsonl")

    return root, start


@pytest.fixture(scope="module")
def plain(run):
    return run[1]("plain")


@pytest.fixture(scope="module")
def cached(run):
    return run[1]("cached", feature_cache=str(run[0] / "features"))


def shards(root):
    return sorted((root / "features").glob("*/*.safetensors"))


def pictures(root) -> int:
    return sum(len(load_file(shard)["keys"]) for shard in shards(root))


def test_training_is_the_same(plain, cached):
    for name, value in plain[0].items():
        torch.testing.assert_close(cached[0][name], value, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(cached[1], plain[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert (ours["skipped"], ours["pictures"]) == (theirs["skipped"], theirs["pictures"])
    assert sum(row["skipped"] for row in cached[1]) > 0


def test_a_second_run_does_not_ask_the_tower(run, cached, monkeypatch):
    root, start = run
    before = [(shard, shard.stat().st_mtime_ns) for shard in shards(root)]

    def asked(*args, **kwargs):
        raise AssertionError("the tower was asked")

    monkeypatch.setattr(CLIPMoEVisionModel, "forward", asked)
    again = start("again", feature_cache=str(root / "features"), workers=2)
    assert all(torch.equal(value, cached[0][name]) for name, value in again[0].items())
    assert [(shard, shard.stat().st_mtime_ns) for shard in shards(root)] == before
    # Another preprocessing is another cache.
    with pytest.raises(AssertionError, match="asked"):
        start("square", feature_cache=str(root / "features"), image_aspect_ratio="square")


def test_a_changed_picture_is_another_picture(run, cached):
    root, start = run
    count = pictures(root)
    picture = root / "images" / "scene03.png"
    data = picture.read_bytes()
    Image.new("RGB", (30, 40), "red").save(picture)
    try:
        changed = start("changed", feature_cache=str(root / "features"))
        expected = start("changed_plain")
    finally:
        picture.write_bytes(data)
    assert pictures(root) == count + 1
    for name, value in expected[0].items():
        torch.testing.assert_close(changed[0][name], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_found_and_said(run, cached, tmp_path, workers):
    root, start = run
    folder = tmp_path / "features"
    shutil.copytree(root / "features", folder)
    for shard in folder.glob("*/*.safetensors"):
        tensors = load_file(shard)
        tensors["features"][:, 0, 0] += 1
        save_file(tensors, shard)
    with pytest.raises(UserError, match=r"feature_cache: .*safetensors cannot be read \(a checksum is wrong\); remove"):
        start(f"damaged{workers}", feature_cache=str(folder), workers=workers)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="feature_cache: .*safetensors cannot be read"):
        start(f"torn{workers}", feature_cache=str(folder), workers=workers)


def test_a_tower_that_trains_has_no_cache(tmp_path):
    with pytest.raises(UserError, match="feature_cache: a tower that trains"):
        train(settings(tmp_path, tower="full", feature_cache=str(Path(tmp_path) / "features")))
