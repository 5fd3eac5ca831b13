"""Each recipe runs to its end as it is but for the sizes of model and batches, on data laid out as it names them."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
from braceexpand import braceexpand
from encoder_data import COLORS, save_tiny_clip
from matplotlib.figure import Figure
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.runs import load_config, read_jsonl
from train_encoder import run
from train_encoder.config import EncoderConfig
from train_encoder.data import Samples

RECIPES = sorted((Path(run.__file__).parent / "configs").glob("*.yaml"))
# Three pictures and three captions: whatever a small random model makes of them, k-means finds those three.
PICTURES = list(COLORS.items())[:3]
WORDS = ("square on the left", "number 1 2 3", "red blue green white")


def caption(number: int) -> str:
    return " ".join(["a", *[WORDS[number // 3 % 3]] * 40])  # more words than 77 positions


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), PICTURES[number % 3][1]).save(stream, "png")
    return stream.getvalue()


def save_model(folder: Path, positions: int) -> None:
    """A small random model of the family that the folder's name says, as transformers saves it."""
    save_tiny_clip(folder.parent / "words")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "words")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": positions, "bos_token_id": 1,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    vision, size = {**tower, "image_size": 16, "patch_size": 8}, {"height": 16, "width": 16}
    if "siglip" in folder.name:
        SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
        SiglipImageProcessor(size=size).save_pretrained(folder)
    else:
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_sharegpt4v(file: Path, root: Path, count: int) -> None:
    rows = []
    for number in range(count):
        name = f"coco/train2017/{number:012}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
        rows.append({"id": f"{number:012}", "image": name, "conversations": [
            {"from": "human", "value": "What is in the picture?\n<image>"},
            {"from": "gpt", "value": caption(number)}]})
    file.write_text(json.dumps(rows))


def save_shards(files: list[str], count: int) -> None:
    """`count` samples a shard, with the members that img2dataset writes."""
    for shard, file in enumerate(files):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w") as archive:
            for number in range(shard * count, (shard + 1) * count):
                columns = {"caption": "of the web", "re_caption": caption(number), "status": "success"}
                for ending, data in (("json", json.dumps(columns).encode()), ("txt", b"of the web"),
                                     ("png", picture(number))):
                    member = tarfile.TarInfo(f"{number:09}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_runs_to_its_end(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where all paths of the recipe lead
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # drawing takes longer than all the rest
    torch.set_num_threads(1)
    smaller = ["mcl.batch_size=4", "router.batch_size=4", "workers=0", "precision=fp32"]
    config = load_config(EncoderConfig, [str(recipe), *smaller], "")
    if config.micro_batch_size:
        config.micro_batch_size = 3
    siglip = "siglip" in config.model
    save_model(Path(config.model), 64 if siglip else 77)
    if config.train_data.endswith(".json"):
        for file, count in ((config.train_data, 36), (config.validation_data, 9)):
            save_sharegpt4v(Path(file), Path(config.image_root), count)
    else:
        save_shards(list(braceexpand(config.train_data)), 1)
        save_shards([config.validation_data], 9)

    run.main(config)

    folder = Path(config.output_dir)
    assert Samples(folder / "index" / "train.jsonl").caption(4) == caption(4)
    model = CLIPMoEModel.from_pretrained(folder / "model")
    for tower in (model.config.vision_config, model.config.text_config):
        assert (tower.num_experts, tower.num_experts_per_tok, tower.first_moe_layer) == (4, 2, 0)
    assert model.config.text_config.max_position_embeddings == (64 if siglip else 248)
    for stage in (1, 2, 3):
        counts = json.loads((folder / f"stage_{stage}" / "clusters.json").read_text())
        assert counts["num_clusters"] == 9 and counts["unreadable_samples"] == 0
    rows = read_jsonl(folder / "metrics.jsonl")
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["mcl_1", "mcl_2", "mcl_3", "router"]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert json.loads((folder / "evaluation" / "final.json").read_text())["retrieval"]["n_images"] == 9
