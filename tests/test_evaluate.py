"""Zero-shot evaluation against clip-benchmark's own code and plain computations, and the program around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import torch
import yaml
from clip_benchmark.metrics import image_caption_selection, zeroshot_classification, zeroshot_retrieval
from encoder_data import COLORS, ROOT, make_world
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.convert import load_dense, processors_of, save_folder
from clipmoe_vlm.runs import UserError, load_config
from clipmoe_vlm.upcycling import upcycle
from train_encoder import zero_shot
from train_encoder.classes import load_classification
from train_encoder.compare import comparison, differences, intervals, mean_of_groups
from train_encoder.config import EncoderConfig
from train_encoder.data import picture_transform
from train_encoder.evaluate import EvaluateConfig, main
from train_encoder.tasks import TaskConfig, load_hard_captions, load_held_out
from train_encoder.zero_shot import classification, retrieval

ARCHITECTURE = {"embed_dim": 16, "quick_gelu": True,
                "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8},
                "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
CLASSES = ["red", "blue", "crimson", "green", "white", "rose", "red", "white"]  # so they are not of one size
TEMPLATES = ["a photo of a {c} square.", "the {c} one", "{c}"]


def seeded_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = open_clip.CLIP(**ARCHITECTURE)
    with torch.no_grad():  # random features of a fresh model barely differ: make them tell pictures apart
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2 if "embedding" in name else 4)
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An open_clip model as a weights file; 30 pictures of six classes with two or three captions each."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    save_file(seeded_model(0).state_dict(), folder / "weights.safetensors")
    random, images = np.random.default_rng(0), []
    for number in range(30):
        label = CLASSES[number % 8]
        color = label if label in COLORS else "red"
        height, width = random.integers(16, 60, 2)  # some margins are odd
        pixels = random.integers(90, 150, (height, width, 3)).astype(np.uint8)
        pixels[4:12, 4:12] = COLORS[color]
        name = f"{number:03}.png"
        for place in (folder / "coco" / "val2014", folder / "classes" / label):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / name)
        captions = [f"a {color} square, number {number}", f"{number} is {color}", f"{color} on grey"][:2 + number % 2]
        images.append({"filepath": "val2014", "filename": name, "split": "test" if number % 10 else "restval",
                       "sentences": [{"raw": caption, "tokens": caption.split()} for caption in captions]})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def evaluate(folder: Path, tasks: dict, models: dict, output: Path, *arguments: str, **values) -> Path:
    """The program, in this process."""
    torch.set_num_threads(1)
    file = output.with_suffix(".yaml")
    values = {"output_dir": str(output), "models": models, "tasks": tasks, "workers": 0, **values}
    file.write_text(yaml.safe_dump(values))
    main(load_config(EvaluateConfig, [str(file), *arguments], "evaluate"))
    return output


def source(world: Path) -> dict:
    return {"source": str(world / "weights.safetensors"), "architecture": str(world / "architecture.json")}


def tasks_of(world: Path) -> dict:
    return {"coco": {"kind": "retrieval", "data": str(world / "dataset_coco.json"), "split": "all",
                     "image_root": str(world / "coco")},
            "colors": {"kind": "classification", "data": str(world / "classes"),
                       "templates": str(world / "templates.txt")}}


@pytest.fixture(scope="module")
def scores(world) -> dict:
    """Our scores of the open_clip model."""
    tasks = tasks_of(world) | {"sugar": {"kind": "hard_captions", "data": str(sugar_crepe(world)),
                                         "image_root": str(world / "coco" / "val2014")}}
    output = evaluate(world, tasks, {"clip": source(world)}, world / "scores")
    return {task: one["models"]["clip"] for task, one in json.loads((output / "scores.json").read_text()).items()}


def sugar_crepe(world: Path) -> Path:
    folder = world / "sugar"
    folder.mkdir(exist_ok=True)
    for category, words in (("swap_att", "yellow"), ("add_obj", "red and a dog")):
        rows = {str(2 * n): {"filename": f"{n:03}.png", "caption": f"a square {n}", "negative_caption": f"{words} {n}"}
                for n in range(30)}
        (folder / f"{category}.json").write_text(json.dumps(rows))
    return folder


# --- the same numbers as clip-benchmark ----------------------------------------------------------------------------


class Theirs(Dataset):
    """Pictures with a target each, as clip-benchmark wants them."""

    def __init__(self, items: list[tuple[Path, object]], classes: list[str]):
        self.items, self.classes = items, classes
        self.transform = open_clip.image_transform(16, is_train=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int):
        path, target = self.items[number]
        return self.transform(Image.open(path).convert("RGB")), target


def their_loader(items: list, classes: list[str] = (), collate=None) -> DataLoader:
    return DataLoader(Theirs(items, classes), batch_size=8, collate_fn=collate)


def with_texts(batch: list) -> tuple[torch.Tensor, list]:
    return torch.stack([picture for picture, _ in batch]), [texts for _, texts in batch]


def tokenize(texts: list[str]) -> torch.Tensor:
    return open_clip.tokenize(texts, context_length=24)


def test_retrieval_equals_clip_benchmark(world, scores):
    images = json.loads((world / "dataset_coco.json").read_text())["images"]
    items = [(world / "coco" / "val2014" / row["filename"], [one["raw"] for one in row["sentences"]]) for row in images]
    theirs = zeroshot_retrieval.evaluate(seeded_model(0), their_loader(items, collate=with_texts), tokenize, "cpu",
                                         amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):  # they name a direction by what is found, we by where it goes from and to
        assert scores["coco"][f"image to text R@{k}"]["mean"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
        assert scores["coco"][f"text to image R@{k}"]["mean"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
    assert 0 < scores["coco"]["text to image R@5"]["mean"] < scores["coco"]["text to image R@10"]["mean"] < 1


def labelled(world: Path) -> list[tuple[Path, int]]:
    return [(file, number) for number, name in enumerate(sorted(set(CLASSES)))
            for file in sorted((world / "classes" / name).iterdir())]


def test_classification_equals_clip_benchmark(world, scores, monkeypatch):
    # Their float(array of one number) is an error since numpy 2.4.
    monkeypatch.setattr(zeroshot_classification, "float", lambda one: float(np.asarray(one).item()), raising=False)
    classes, items = sorted(set(CLASSES)), labelled(world)
    theirs = zeroshot_classification.evaluate(seeded_model(0), their_loader(items, classes), tokenize, classes,
                                              TEMPLATES, "cpu", amp=False)
    assert scores["colors"]["top-1"]["mean"] == pytest.approx(theirs["acc1"])
    assert scores["colors"]["mean per class"]["mean"] == pytest.approx(theirs["mean_per_class_recall"])
    assert scores["colors"]["top-5"]["mean"] == pytest.approx(theirs["acc5"])
    assert len({0, *theirs.values(), 1}) == 5


def test_sugar_crepe_equals_clip_benchmark(world, scores):
    for category in ("swap_att", "add_obj"):
        rows = json.loads((world / "sugar" / f"{category}.json").read_text()).values()
        items = [(world / "coco" / "val2014" / row["filename"], [row["caption"], row["negative_caption"]])
                 for row in rows]
        theirs = image_caption_selection.evaluate(seeded_model(0), their_loader(items, collate=with_texts), tokenize,
                                                  "cpu", amp=False)
        assert scores["sugar"][category]["mean"] == pytest.approx(theirs["text_acc"])
    assert scores["sugar"]["all rows"]["n"] == 60 and 0 < scores["sugar"]["all rows"]["mean"] < 1


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(16, 19), (17, 16), (33, 90), (640, 427), (16, 16)])
def test_pictures_become_the_pixels_of_open_clip(size, mode):
    side = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size=side if mode == "squash" else {"shortest_edge": 16}, crop_size=side,
                                   do_center_crop=mode == "shortest")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    theirs = open_clip.image_transform(16, is_train=False, resize_mode=mode)(picture)
    torch.testing.assert_close(picture_transform(processor)(picture), theirs, rtol=0, atol=1e-6)


# --- scores --------------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(12), 3)
    image, text = (generator.normal(size=(rows, 5)).astype(np.float32) for rows in (12, 36))
    whole = retrieval(image, text, owners), classification(text, image, owners)
    monkeypatch.setattr(zero_shot, "BLOCK", 50)
    assert (retrieval(image, text, owners), classification(text, image, owners)) == whole
    assert whole[1]["top_5"] > whole[1]["top_1"] > 0


def test_the_mean_over_classes_has_the_spread_of_strata():
    groups = np.array([0] * 4 + [1] * 2 + [2] * 6)
    values = np.array([1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0])
    spread = mean_of_groups(values, groups)
    means = [values[groups == group].mean() for group in range(3)]
    assert spread.mean() == pytest.approx(np.mean(means))
    variance = sum(values[groups == group].var() / (groups == group).sum() for group in range(3)) / 9
    assert np.square(spread - spread.mean()).sum() / 12**2 == pytest.approx(variance)
    assert mean_of_groups(np.ones(12), groups).tolist() == [1] * 12


def hard_result(correct: list[int], kinds: int = 2) -> dict:
    return {"hard": {"color": {}}, "hard_items": [
        {"id": n, "image": f"{n // 2}.png", "kind": f"kind {n % kinds}", "correct": value}
        for n, value in enumerate(correct)]}


def test_a_loss_to_the_base_is_red_and_says_whether_it_is_clear():
    draw = np.random.default_rng(0)
    right, wrong = [1] * 80, [0] * 60 + [1] * 20
    clear = "\n".join(comparison(hard_result(right), hard_result(wrong)))
    assert clear.startswith("> [!CAUTION]\n> 🔴 This model scores lower than its base on: kind 0 (-75.0 points); kind")
    assert "🔴 **worse than its base**" in clear and "within chance" not in clear
    noise = draw.integers(0, 2, 80).tolist()
    slight = "\n".join(comparison(hard_result(noise), hard_result([1 - value for value in noise[:2]] + noise[2:])))
    assert ("within chance" in slight) == ("🔴" in slight) and "worse" not in slight
    better = "\n".join(comparison(hard_result(wrong), hard_result(right)))
    assert "🔴" not in better and "kind 1: +75.0 points" in better and "better than its base" in better


def test_differences_are_paired_and_need_the_same_data():
    base, other = hard_result([1, 0] * 20), hard_result([1, 1] * 20)
    assert differences(base, other)["kind 1"].mean == 1 and differences(base, other)["kind 0"].low == 0
    assert differences(base, other)["kind 1"].clusters == 20
    with pytest.raises(UserError, match="not measured on the same pictures"):
        differences(base, hard_result([1] * 38))
    many = intervals(hard_result([1, 0] * 20, kinds=15))
    assert set(many) == {"all rows", "mean of the kinds"}  # too many kinds to name each


# --- files ---------------------------------------------------------------------------------------------------------


def test_datasets_folders_give_the_scores_of_class_folders(world, scores):
    files, features = labelled(world), {"picture": datasets.Image(),
                                        "color": datasets.ClassLabel(names=sorted(set(CLASSES)))}
    found = datasets.Dataset.from_dict({"picture": [str(file) for file, _ in files], "color": [n for _, n in files]},
                                       features=datasets.Features(features))
    datasets.DatasetDict({"train": found.select(range(3)), "test": found}).save_to_disk(world / "saved")
    found.to_parquet(world / "hub" / "data" / "test-00000-of-00001.parquet")
    common = {"kind": "classification", "templates": str(world / "templates.txt"), "split": "test",
              "image_column": "picture", "label_column": "color"}
    output = evaluate(world, {name: {**common, "data": str(world / name)} for name in ("saved", "hub")},
                      {"clip": source(world)}, world / "from_datasets")
    for one in json.loads((output / "scores.json").read_text()).values():
        assert one["models"]["clip"] == scores["colors"]


def test_imagenets_names_by_id_and_its_templates(world, tmp_path):
    for wnid in ("n01443537", "n01440764", "n15075141"):
        (tmp_path / wnid).mkdir()
        shutil.copy(world / "coco" / "val2014" / "000.png", tmp_path / wnid / "x.JPEG")
    task = load_classification(TaskConfig("classification", str(tmp_path), classes="imagenet"))
    assert task.classes == ["tench", "goldfish", "toilet paper"] and task.labels == [0, 1, 2]
    assert len(task.templates) == 80 and task.templates[0] == "a bad photo of a {}."


def test_karpathys_splits(world):
    values = {"output_dir": "", "model": "", "train_data": "", "validation_data": str(world / "dataset_coco.json"),
              "image_root": str(world / "coco")}
    test = load_held_out(EncoderConfig(**values), world / "unused.jsonl").retrieval
    assert len(test.pictures) == 27 and test.owners[:5] == [0, 0, 0, 1, 1]
    assert test.captions[0] == "a blue square, number 1"
    assert test.pictures[0].size == Image.open(world / "coco" / "val2014" / "001.png").size
    rest = load_held_out(EncoderConfig(**values, validation_split="restval"), world / "unused.jsonl").retrieval
    assert len(rest.pictures) == 3
    values["image_root"] += "/val2014"  # the pictures side by side
    assert len(load_held_out(EncoderConfig(**values), world / "unused.jsonl").retrieval.pictures) == 27


def test_aros_layouts(world, tmp_path):
    box = {"bbox_x": 2, "bbox_y": 3, "bbox_w": 9, "bbox_h": 7}
    relation = [{"image_id": 1, "image_path": "001.png", **box, "relation_name": name, "true_caption": "a on b",
                 "false_caption": "b on a"} for name in ("on", "under")]
    attribution = [{"image_path": "001.png", "attributes": ["red", "old"], "true_caption": "x", "false_caption": "y"}]
    order = [{"image": "002.png", "caption_options": ["one two", "two one", "o n e"]}]
    for name, rows in (("relation", relation), ("attribution", attribution), ("coco_order", order)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    task = load_hard_captions(str(tmp_path), str(world / "coco" / "val2014"))
    assert [(row["kind"], row["picture"], row["true"], row["false"]) for row in task.rows] == [
        ("red_old", 0, "x", ["y"]), ("coco_order", 1, "one two", ["two one", "o n e"]),
        ("on", 2, "a on b", ["b on a"]), ("under", 2, "a on b", ["b on a"])]
    whole = Image.open(world / "coco" / "val2014" / "001.png")
    assert task.pictures[2].tobytes() == whole.crop((2, 3, 11, 10)).tobytes()
    assert task.pictures[0].tobytes() == whole.tobytes()


def test_one_false_caption_that_wins_is_enough_to_be_wrong(world):
    rows = [{"image": f"{n:03}.png", "true": f"a square {n}", "false": f"yellow {n}", "kind": "x"} for n in range(30)]
    more = [{**row, "false": [row["false"], f"{row['true']}, grey"]} for row in rows]
    tasks = {}
    for name, values in (("one", rows), ("two", more), ("same", [{**row, "false": row["true"]} for row in rows])):
        (world / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
        tasks[name] = {"kind": "hard_captions", "data": str(world / f"{name}.jsonl"),
                       "image_root": str(world / "coco" / "val2014")}
    output = evaluate(world, tasks, {"clip": source(world)}, world / "several")
    found = [json.loads((output / "results" / "clip" / f"{name}.json").read_text()) for name in tasks]
    one, two, same = ([item["correct"] for item in result["hard_items"]] for result in found)
    assert all(b <= a for a, b in zip(one, two, strict=True)) and 0 < sum(two) < sum(one) and sum(same) == 0


def test_unreadable_pictures_are_left_out_and_counted(world, tmp_path, capsys):
    shutil.copytree(world / "classes", tmp_path / "classes")
    (tmp_path / "classes" / "red" / "torn.png").write_bytes(b"no picture")
    tasks = {"colors": {**tasks_of(world)["colors"], "data": str(tmp_path / "classes")}}
    output = evaluate(world, tasks, {"clip": source(world)}, tmp_path / "out")
    result = json.loads((output / "results" / "clip" / "colors.json").read_text())
    assert result["skipped_pictures"] == 1 and result["classification"]["n_images"] == 30
    assert "torn.png: unreadable picture" in capsys.readouterr().out
    assert "1 pictures could not be read" in (output / "summary.md").read_text()


def test_texts_that_are_cut_are_counted(world, tmp_path):
    rows = [{"image": f"{n:03}.png", "true": "word " * (30 if n < 4 else 3), "false": "no", "kind": "long"}
            for n in range(10)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = evaluate(world, {"long": {"kind": "hard_captions", "data": str(tmp_path / "long.jsonl"),
                                       "image_root": str(world / "coco" / "val2014")}},
                      {"clip": source(world)}, tmp_path / "out")
    result = json.loads((output / "results" / "clip" / "long.json").read_text())
    assert (result["truncated_texts"], result["text_length"]) == (4, 24)
    assert "Texts cut: 4 by clip (to 24 tokens)." in (output / "summary.md").read_text()


@pytest.mark.parametrize(("task", "message"), [
    ({"kind": "guess", "data": "classes"}, "tasks.t.kind: 'guess' is not one of retrieval, classification"),
    ({"kind": "classification", "data": "nowhere"}, "tasks.t.data: nowhere: no such file or folder"),
    ({"kind": "classification", "data": "empty_class"}, "empty_class/blue: a class folder without pictures"),
    ({"kind": "classification", "data": "classes", "classes": "names.txt"},
     r"names.txt has 2 names, but classes has 6 classes; one line each, in the order blue, crimson, green"),
    ({"kind": "classification", "data": "classes", "classes": "names.json"},
     r"names.json has no name for 5 of the 6 classes of classes, the first is crimson"),
    ({"kind": "classification", "data": "classes", "classes": "imagenet"}, "needs ImageNet's ids .* found blue"),
    ({"kind": "classification", "data": "classes", "templates": "names.txt"}, "names.txt, line 1: a template needs {}"),
    ({"kind": "classification", "data": "classes", "split_": "x"}, "split_"),
    ({"kind": "retrieval", "data": "dataset_coco.json"},
     r"dataset_coco.json: 27 of its 27 pictures are not there, the first is val2014/001.png; .*image_root"),
    ({"kind": "retrieval", "data": "dataset_coco.json", "split": "val"}, r"'val' \(found: restval, test, or all\)"),
    ({"kind": "retrieval", "data": "karpathy.json"}, r"karpathy.json, picture 1: .*found: filename, split"),
    ({"kind": "hard_captions", "data": "hard.jsonl"}, r"hard.jsonl, row 1: no text in 'false' \(found: image, true"),
    ({"kind": "hard_captions", "data": "box.json"}, r"box.json, row 1: a box has the numbers bbox_x"),
    ({"kind": "hard_captions", "data": "gone.jsonl"}, r"gone.jsonl: 1 of its 2 pictures are not there.*gone.png"),
    ({"kind": "hard_captions", "data": "names.txt"}, "names.txt: not valid JSON"),
])
def test_a_mistake_is_one_sentence(world, tmp_path, monkeypatch, task, message):
    for name in ("classes", "dataset_coco.json"):
        (tmp_path / name).symlink_to(world / name)
    shutil.copytree(world / "classes", tmp_path / "empty_class")
    for file in (tmp_path / "empty_class" / "blue").iterdir():
        file.unlink()
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    (tmp_path / "names.json").write_text('{"blue": "blue sky"}')
    (tmp_path / "karpathy.json").write_text('{"images": [{"filename": "x.jpg", "split": "test"}]}')
    row = {"image": str(world / "coco" / "val2014" / "000.png"), "true": "x", "kind": "y"}
    (tmp_path / "hard.jsonl").write_text(json.dumps(row))
    (tmp_path / "box.json").write_text(json.dumps([{**row, "false": "z", "bbox_x": 1}]))
    (tmp_path / "gone.jsonl").write_text("".join(
        json.dumps({**row, "false": "z", **change}) + "\n" for change in ({}, {"image": "gone.png"})))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        evaluate(world, {"t": task}, {"clip": source(world)}, tmp_path / "out")


# --- the program ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What train_encoder leaves (base/ beside model/), and hard captions on which the base is right and the CLIP-MoE,
    one of whose experts is scrambled, mostly is not better than chance."""
    world = make_world(tmp_path_factory.mktemp("trained"))
    folder = world / "run"
    base = load_dense(world / "clip")
    processors = processors_of(world / "clip")
    expert = CLIPMoEModel(base.config)
    expert.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if ".mlp." in name:
                parameter.copy_(torch.randn_like(parameter))
    save_folder(base, folder / "base", *processors)
    save_folder(upcycle([base, expert]), folder / "model", *processors)
    image_processor, tokenizer = processors
    rows = []
    for n, row in enumerate(line.split(",") for line in (world / "train.csv").read_text().splitlines()[1:]):
        texts = [f"a {color} square" for color in COLORS]
        ids = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
        pixels = picture_transform(image_processor)(Image.open(world / row[0]).convert("RGB"))[None]
        with torch.no_grad():
            scores = torch.nn.functional.normalize(base.get_text_features(ids), dim=-1) @ base.get_image_features(
                pixels)[0]
        order = scores.argsort(descending=True).tolist()
        first, second = sorted(((n % 3), (n % 3) + 1), key=order.index)
        rows.append({"image": row[0], "true": texts[first], "false": texts[second], "kind": "preferred"})
    (world / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def test_a_clip_moe_is_compared_with_its_own_base_and_a_loss_is_told_in_red(trained, capsys):
    tasks = {"scenes": {"kind": "retrieval", "data": str(trained / "test.csv")},
             "hard": {"kind": "hard_captions", "data": str(trained / "hard.jsonl")}}
    output = evaluate(trained, tasks, {"clip_moe": str(trained / "run")}, trained / "out")
    printed = capsys.readouterr().out
    sentence = "clip_moe scores lower than its base (base) on: "
    assert sentence in printed and "[base] hard: hard captions preferred 100.0" in printed
    summary = (output / "summary.md").read_text()
    assert "> [!CAUTION]\n> 🔴 " + sentence in summary and "hard preferred (-" in summary
    assert "| clip_moe - base | 🔴 **-" in summary and (output / "scores.png").stat().st_size > 1000
    found = json.loads((output / "scores.json").read_text())
    hard, change = found["hard"]["models"], found["hard"]["differences"]["clip_moe"]
    assert change["base"] == "base" and change["preferred"]["high"] < 0
    assert change["preferred"]["mean"] == pytest.approx(hard["clip_moe"]["preferred"]["mean"] - 1)
    assert found["scenes"]["models"]["base"]["text to image R@1"]["n"] == 12
    assert not list(output.glob(".*"))

    # Typed again, nothing is measured again; what is missing is.
    before = {file: file.stat().st_mtime_ns for file in output.rglob("results/*/*.json")}
    (output / "results" / "base" / "hard.json").unlink()
    evaluate(trained, tasks, {"clip_moe": str(trained / "run")}, output, "workers=1")
    printed = capsys.readouterr().out
    assert printed.count("[base] ") == 1 and "[clip_moe]" not in printed and sentence in printed
    after = {file: file.stat().st_mtime_ns for file in output.rglob("results/*/*.json")}
    assert {file.name for file in before if before[file] != after[file]} == {"hard.json"}
    with pytest.raises(UserError, match="precision was 'fp32' and is now 'bf16'"):
        evaluate(trained, tasks, {"clip_moe": str(trained / "run")}, output, "precision=bf16")
    with open(trained / "test.csv", "a") as stream:
        stream.write("test/000.png,again\n")
    with pytest.raises(UserError, match=r"test\.csv changed since"):
        evaluate(trained, tasks, {"clip_moe": str(trained / "run")}, output)


def test_the_configuration_of_the_docs_is_one(tmp_path):
    text = (ROOT / "docs" / "evaluation.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(EvaluateConfig, [str(tmp_path / "config.yaml"), "tasks.coco.split=val"], "evaluate")
    assert config.tasks["coco"] == TaskConfig("retrieval", "data/dataset_coco.json", "data/coco", "val")


def test_any_model_may_be_the_base(trained):
    tasks = {"hard": {"kind": "hard_captions", "data": str(trained / "hard.jsonl")}}
    models = {"old": str(trained / "clip"), "new": str(trained / "run" / "model")}
    output = evaluate(trained, tasks, models, trained / "named", base="old")
    found = json.loads((output / "scores.json").read_text())["hard"]
    assert list(found["models"]) == ["old", "new"] and found["differences"]["new"]["base"] == "old"
    output = evaluate(trained, tasks, {"old": models["old"]}, trained / "alone")
    assert "no base to compare with" in (output / "summary.md").read_text()
    output = evaluate(trained, tasks, {"new": models["new"]}, trained / "by_source", base=models["old"])
    found = json.loads((output / "scores.json").read_text())["hard"]
    assert list(found["models"]) == ["base", "new"] and found["differences"]["new"]["base"] == "base"


@pytest.mark.parametrize(("models", "message"), [
    ({"a": "/nowhere"}, "models.a: /nowhere: no such file"),
    ({"a": {"path": "x"}}, "models.a: expected a source, or source with architecture and top_k"),
    ({"a/b": "clip"}, "the name 'a/b' becomes a file's name"),
    ({}, "models and tasks: name at least one of each"),
])
def test_a_wrong_model_is_one_sentence(trained, tmp_path, models, message):
    tasks = {"hard": {"kind": "hard_captions", "data": str(trained / "hard.jsonl")}}
    with pytest.raises(UserError, match=message):
        evaluate(trained, tasks, models, tmp_path / "out")
