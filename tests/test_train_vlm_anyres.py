"""How pictures of any shape reach the language model: square, pad and anyres, as LLaVA does them and as they train."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from llava_runs import LLAVA_TRAIN, REFERENCE, settings
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution
from vlm_world import save_moe_tower, save_siglip

from clipmoe_vlm.llava_layout import convert_vlm
from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError, read_jsonl
from clipmoe_vlm.vlm import tokens_per_picture
from eval_vlm.generate import Answerer
from eval_vlm.models import load_vlm
from train_vlm.chat import IMAGE_TOKEN, to_messages
from train_vlm.config import VLMConfig
from train_vlm.data import Collator, make_dataset
from train_vlm.index import pictures_of
from train_vlm.loss import VLMLoss
from train_vlm.model import build
from train_vlm.samples import read_samples
from train_vlm.train import train

ODD_SIZES = [(1, 1), (1, 2000), (2000, 1), (3, 1), (27, 29), (376, 47), (88, 55), (30, 200), (999, 1000)]

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    """A small CLIP-MoE vision tower of 28 pixels and 4x4 patches."""
    return save_moe_tower(tmp_path_factory.mktemp("tower"), patch_size=7)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    """A tower without class token, of 3x3 patches and two pixels that they leave out."""
    return save_siglip(tmp_path_factory.mktemp("siglip"), 32, 10)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Stage 2's samples, some with a second or third picture of another shape, one with pictures of odd sizes."""
    folder = tmp_path_factory.mktemp("data")
    samples = json.loads((LLAVA_TRAIN / "stage2.json").read_text())
    for sample in samples[::3]:
        if sample.get("image"):
            sample["image"] = [sample["image"], "scene01.png", "scene04.png"][: 2 + len(sample["conversations"]) % 2]
            sample["conversations"][-2]["value"] += f"\n{IMAGE_TOKEN}" * (len(sample["image"]) - 1)
    shutil.copytree(LLAVA_TRAIN / "images", folder / "images")
    names = []
    for height, width in [(1, 1), (1, 90), (90, 1), (3, 1)]:
        names.append(f"{height}x{width}.png")
        Image.effect_noise((width, height), 60).save(folder / "images" / names[-1])
    samples[0] = {"id": "odd", "image": names, "conversations": [
        {"from": "human", "value": f"{IMAGE_TOKEN * 3}What are these?{IMAGE_TOKEN}"},
        {"from": "gpt", "value": "A point and three lines."}]}
    (folder / "data.json").write_text(json.dumps(samples[:24]))
    return folder / "data.json"


def tiled(output, **changes) -> VLMConfig:
    """The settings of other tests, with tiles; pictures lie beside the data."""
    if "data" in changes:
        changes["image_folder"] = str(Path(changes["data"]).parent / "images")
    return settings(output, **{"image_aspect_ratio": "anyres", "max_length": 512, **changes})


@pytest.fixture(scope="module")
def trained(tower, data, tmp_path_factory) -> Path:
    """Stage 1 on squares, then stage 2 on tiles: four updates of projector, language model and routers."""
    folder = tmp_path_factory.mktemp("trained")
    train(settings(folder / "one", vision_tower=tower, data=str(LLAVA_TRAIN / "stage1.json"), template="plain",
                   image_aspect_ratio="square", llm_tuning="frozen", max_steps=1))
    train(tiled(folder / "two", vlm=str(folder / "one/model"), data=str(data), tower="routers", max_steps=4))
    return folder


# --- as LLaVA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_pixels_of_whole_pictures_are_llavas(aspect):
    _, processor = build(settings("unused", image_aspect_ratio=aspect))
    pixels = load_file(LLAVA_TRAIN / "pixels.safetensors")
    names = [name for name in pixels if name.startswith(aspect)]
    assert len(names) == {"square": 24, "pad": 21}[aspect]
    for name in names:
        picture = open_rgb(LLAVA_TRAIN / "images" / f"{name.split('.')[1]}.png")
        assert torch.equal(processor.image_processor(picture, return_tensors="pt").pixel_values[0], pixels[name])


def test_pixels_of_tiles_are_llavas(tower):
    _, processor = build(tiled("unused", vision_tower=tower))
    for name, tiles in load_file(REFERENCE / "llava/anyres_pixels.safetensors").items():
        picture = open_rgb(LLAVA_TRAIN / "images" / f"{name}.png")
        assert torch.equal(processor.image_processor(picture, return_tensors="pt").pixel_values[0], tiles)


def test_grids_are_llavas():
    """The size that a picture is fitted into, also where two do equally well."""
    reference = json.loads((REFERENCE / "llava/anyres.json").read_text())
    side = reference["patch"]
    given, _ = build(settings("unused", image_aspect_ratio="anyres", image_grid_pinpoints=reference["grid_pinpoints"]))
    default, _ = build(settings("unused", image_aspect_ratio="anyres"))  # a tower of 56 pixels
    scaled = [[side * length // 56 for length in pair] for pair in default.config.image_grid_pinpoints]
    assert given.config.image_grid_pinpoints == scaled
    assert len(reference["cases"]) == 60
    for case in reference["cases"]:
        width, height = case["size"]
        best = select_best_resolution((height, width), given.config.image_grid_pinpoints)
        assert list(best[::-1]) == case["best"]
        assert [length // side for length in best[::-1]] == case["shape"]
    assert select_best_resolution((8, 8), scaled) == (2 * side, side)  # LLaVA's first: one tile wide, two high


# --- training and use agree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tower", "siglip"])
def test_tokens_are_those_of_processor_and_model(kind, request):
    model, processor = build(tiled("unused", vision_tower=request.getfixturevalue(kind)))
    for height, width in ODD_SIZES:
        inputs = processor(images=Image.new("RGB", (width, height)), text=IMAGE_TOKEN, return_tensors="pt")
        tokens = tokens_per_picture(model.config, (height, width))
        with torch.no_grad():
            features = model.get_image_features(inputs.pixel_values, inputs.image_sizes).pooler_output
        assert tokens == int((inputs.input_ids == model.config.image_token_id).sum()) == len(features[0])
        assert tokens >= tokens_per_picture(model.config)


def read(trained: Path, data: Path, count: int, max_length: int = 512) -> list[dict]:
    """The samples as the next training of the trained folder would read them."""
    config = tiled("unused", vlm=str(trained / "two/model"), data=str(data), max_length=max_length)
    samples = read_samples(config.data, config.image_folder, data.parent / "index")
    dataset, _ = make_dataset(config, samples, *build(config))
    return [dataset[number] for number in range(count)]


@pytest.fixture(scope="module")
def items(trained, data) -> list[dict]:
    """Samples with one, two, four and no pictures."""
    items = read(trained, data, 8)
    assert {len(item.get("image_sizes", [])) for item in items} == {0, 1, 2, 4}
    return items


@pytest.mark.parametrize("packing", [False, True])
def test_loss_is_that_of_the_finished_folder(trained, data, items, packing):
    """Ids and logits of transformers' processor and model for the same batch, text-only samples in it."""
    model, _ = build(tiled("unused", vlm=str(trained / "two/model")))
    batch = Collator(0, torch.zeros(1, 3, 28, 28), packing)(items)
    assert batch["counts"]["pictures"] < batch["counts"]["tiles"] == len(batch["inputs"]["pixel_values"])
    with torch.no_grad():
        loss, *_ = VLMLoss(model.eval())(**batch["inputs"])

    finished = LlavaNextForConditionalGeneration.from_pretrained(trained / "two/model").eval()
    processor = AutoProcessor.from_pretrained(trained / "two/model", backend="pil")
    samples = json.loads(data.read_text())[:8]
    pictures = [open_rgb(data.parent / "images" / name) for sample in samples for name in pictures_of(sample)]
    texts = [processor.tokenizer.apply_chat_template(to_messages(sample["conversations"]), tokenize=False,
                                                     chat_template=processor.chat_template) for sample in samples]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = finished(**inputs).logits[..., : model.config.image_token_id]
    expected = 0.0
    for item, ids, real, row in zip(items, inputs.input_ids, inputs.attention_mask.bool(), logits, strict=True):
        assert torch.equal(item["input_ids"], ids[real])
        expected += torch.nn.functional.cross_entropy(row[real][:-1], item["labels"][1:], reduction="sum").item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_dummy_moves_nothing(trained, items):
    """Text alone: the tower, the projector and image_newline take part, with zero gradients."""
    model, _ = build(tiled("unused", vlm=str(trained / "two/model")))
    batch = Collator(0, torch.zeros(1, 3, 28, 28))([item for item in items if "pictures" not in item])
    loss, router_losses, _ = VLMLoss(model)(**batch["inputs"])
    (loss + batch["counts"]["tiles"] * router_losses.sum()).backward()
    assert batch["counts"]["pictures"] == batch["counts"]["tiles"] == 0
    for parameter in (model.model.image_newline, *model.model.multi_modal_projector.parameters()):
        assert parameter.grad is not None and not parameter.grad.any()


# --- runs ----------------------------------------------------------------------------------------------------------


def test_stage1_on_squares_goes_on_with_tiles(trained):
    before = LlavaForConditionalGeneration.from_pretrained(trained / "one/model")
    after = LlavaNextForConditionalGeneration.from_pretrained(trained / "two/model")
    assert after.config.image_grid_pinpoints == [[56, 28], [28, 56], [56, 56], [28, 84], [84, 28]]
    newline = after.model.image_newline
    assert 0.5 < newline.std() * newline.shape[0] ** 0.5 < 1.5  # LLaVA starts it at one over the root of its width
    old, new = before.state_dict(), after.state_dict()
    assert new.keys() - old.keys() == {"model.image_newline"}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name for name in changed if "vision_tower" in name} == {
        f"model.vision_tower.vision_model.encoder.layers.{layer}.mlp.router.weight" for layer in (0, 1)}
    assert {name for name in old if "projector" in name} < changed
    rows = read_jsonl(trained / "two/metrics.jsonl")
    assert any(row["pictures"] < row["tiles"] for row in rows) and not any(row["skipped"] for row in rows)
    projector = sum(new[name].numel() for name in new if "projector" in name) + newline.numel()
    assert f"{projector:,}" in (trained / "two/summary.md").read_text()  # image_newline trains with the projector


@pytest.fixture(scope="module")
def third_stage(trained, data):
    """Trains projector and image_newline of the trained folder further; returns where to."""

    def run(output: Path, **changes) -> Path:
        train(tiled(output, vlm=str(trained / "two/model"), data=str(data), llm_tuning="frozen", max_steps=2,
                    warmup_ratio=0, **changes))
        return output

    return run


@pytest.fixture(scope="module")
def plain(third_stage, tmp_path_factory) -> Path:
    return third_stage(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("changes", [{"zero_stage": 3}, {"packing": True}, {"micro_batch_size": 1}],
                         ids=["zero3", "packing", "accumulation"])
def test_newline_trains_alike(trained, third_stage, plain, tmp_path, changes):
    other = third_stage(tmp_path, **changes)
    before, expected, got = (load_file(run / "model/model.safetensors") for run in (trained / "two", plain, other))
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert {name.split(".")[-2 if "projector" in name else -1] for name in changed} == {
        "linear_1", "linear_2", "image_newline"}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=0, msg=name)
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (plain, other))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4)


def test_pictures_that_do_not_fit_are_cut_off(trained, data, tmp_path):
    """As with whole pictures: a sample ends before the first one that is too much, if an answer is left by then."""
    ask, answer = {"from": "human", "value": f"{IMAGE_TOKEN}\nWhat?"}, {"from": "gpt", "value": "A teapot."}
    together = {**ask, "value": f"{IMAGE_TOKEN * 2}\nWhat?"}
    pictures = ["scene00.png", "scene01.png"]
    samples = [{"image": pictures, "conversations": [together, answer]},
               {"image": pictures, "conversations": [ask, answer, ask, answer]}]
    shutil.copytree(data.parent / "images", tmp_path / "images")
    (tmp_path / "data.json").write_text(json.dumps(samples))
    skipped, cut = read(trained, tmp_path / "data.json", 2, max_length=140)
    assert "no whole answer within max_length 140" in skipped["problem"]
    assert cut["truncated"] and len(cut["input_ids"]) <= 140
    assert cut["image_sizes"] == [(40, 96)] and len(cut["pictures"]) == 4
    assert sum(cut["input_ids"] == 1200) == 16 + 4 * 11  # of 12 patches 2 are margin; the mark


@pytest.mark.parametrize("changes, message", [
    ({"image_grid_pinpoints": [[28, 56], [56, 40]]}, r"image_grid_pinpoints: \[56, 40\] .* multiples of 28"),
    ({"image_grid_pinpoints": [[56]]}, r"image_grid_pinpoints: \[56\] is no \[width, height\]"),
    ({"image_grid_pinpoints": [[28, 56]], "image_aspect_ratio": "pad"}, "image_grid_pinpoints is for .*: anyres"),
    ({"select_feature": "cls_patch"}, "select_feature: cls_patch: LLaVA-NeXT .* no place for .* class token"),
    ({"max_length": 100}, "max_length: 100 leaves no room .* takes up to 88 tokens"),
], ids=["no multiple", "no pair", "no tiles", "class token", "no room"])
def test_misfits_are_told(tower, data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(tiled(tmp_path, vision_tower=tower, data=str(data)), **changes))


def test_a_folder_of_tiles_does_not_go_back_unasked(trained, data, tmp_path):
    with pytest.raises(UserError, match="set image_aspect_ratio: anyres"):
        train(tiled(tmp_path, vlm=str(trained / "two/model"), data=str(data), image_aspect_ratio="pad"))


# --- the finished folder in the other programs ---------------------------------------------------------------------


def test_eval_vlm_answers_as_transformers_does(trained, data):
    model, processor = load_vlm(trained / "two/model", torch.device("cpu"))
    folder = LLAVA_TRAIN / "images"
    records = [{"id": f"{name}{prompt}", "image": f"{name}.png", "prompt": prompt}
               for name in ("scene00", "scene01", "scene05") for prompt in ("Is it red?", "What colour is the ground?")]
    answers = {record["id"]: result["answer"]
               for record, result in Answerer(model, processor, 4, 12).answers(records, folder)}
    for record in records:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]}]
        inputs = processor(images=open_rgb(folder / record["image"]), return_tensors="pt",
                           text=processor.apply_chat_template(chat, add_generation_prompt=True))
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1]:]
        assert answers[record["id"]] == processor.decode(ids, skip_special_tokens=True).strip()


def test_llava_gets_the_tiles_back(trained, tmp_path):
    convert_vlm(trained / "two/model", tmp_path / "llava", to="llava", say=lambda _: None)
    values = json.loads((tmp_path / "llava/config.json").read_text())
    assert (values["image_aspect_ratio"], values["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    assert values["image_grid_pinpoints"] == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    newline = LlavaNextForConditionalGeneration.from_pretrained(trained / "two/model").model.image_newline
    assert torch.equal(load_file(tmp_path / "llava/model.safetensors")["model.image_newline"], newline)
