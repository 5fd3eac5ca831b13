"""The demo's data: everything said about a scene is true of it. Drawn with stand-in stamps, so nothing is fetched."""

import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import data, questions, scenes, signs
from demo.stamps import DIGITS, LANDMARKS, LETTERS, OBJECTS, OPERATORS, THEME_OF, Stamps
from eval_vlm import probing
from eval_vlm.annotations import scene
from eval_vlm.probing import plural
from eval_vlm.suites import mme, pope

SIZES = data.Sizes(train=150, test=60, pope=20, mme=6, signs=3, llm_texts=40)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory) -> Path:
    """Opaque rectangles of different shapes inside a transparent margin, with captions like the package's."""
    folder = tmp_path_factory.mktemp("stamps")
    for i, (name, stamp) in enumerate(
            {**OBJECTS, **LANDMARKS, **LETTERS, **DIGITS, **OPERATORS}.items()):
        file = folder / f"{stamp}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
        picture.paste((i * 2, 0, 0, 255), (5, 5, 25 + i % 30, 50))
        picture.save(file)
        words = f"A {name}.\nde.utf8=Ein {name}.\nes.utf8=Un {name}.\nfr.utf8=Une {name}.\nit.utf8=Una {name}.\n"
        file.with_suffix(".txt").write_text(words, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(stamps, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "data"
    data.make(folder, stamps, SIZES, seed=3)
    return folder


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def annotations(folder) -> dict[str, dict]:
    return {row["id"]: row for row in rows(folder / "annotations.jsonl")}


def test_same_seed_same_bytes(folder, stamps, tmp_path):
    data.make(tmp_path / "again", stamps, SIZES, seed=3)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert all((folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_another_seed_makes_other_scenes(folder, stamps, tmp_path):
    data.make(tmp_path / "other", stamps, SIZES, seed=4)
    assert (tmp_path / "other" / "annotations.jsonl").read_bytes() != (folder / "annotations.jsonl").read_bytes()


def test_test_scenes_are_never_trained_on(annotations):
    contents = {split: {scenes.content(row) for key, row in annotations.items() if key.startswith(split)}
                for split in ("train", "test")}
    assert len(contents["train"]) == SIZES.train and len(contents["test"]) == SIZES.test
    assert not contents["train"] & contents["test"]


def test_test_scenes_do_not_depend_on_how_many_are_trained_on():
    assert scenes.annotations(0, "test", 30, set()) == scenes.annotations(0, "test", 30, set())
    taken = set()
    test = scenes.annotations(0, "test", 30, taken)
    few, many = (scenes.annotations(0, "train", n, set(taken)) for n in (20, 50))
    assert many[:20] == few and not {scenes.content(r) for r in many} & {scenes.content(r) for r in test}


def test_no_training_file_names_a_test_scene(folder):
    for name in ("llava_stage1.json", "llava_stage2.json", "short_train.csv", "detailed_train.jsonl"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "images/train/" in text and "images/test/" not in text


def test_scenes_are_unambiguous(annotations):
    for row in annotations.values():
        places = [place for o in row["objects"] for place in o["places"]]
        assert len(set(places)) == len(places) <= 4 and set(places) <= set(scenes.PLACES)
        names = [o["name"] for o in row["objects"]]
        assert len(set(names)) == len(names) and row["ground"] in scenes.COLORS


def test_each_stamp_lies_wholly_in_its_place(folder, annotations):
    """The stand-ins are dark red, so wherever a picture differs from its ground there must be an object, and back."""
    for row in annotations.values():
        picture = np.asarray(Image.open(folder / row["image"])).astype(int)
        assert picture.shape == (64, 64, 3)
        drawn = (np.abs(picture - scenes.COLORS[row["ground"]]) > 10).any(-1)
        for place in scenes.PLACES:
            y, x = (32 if word in place else 0 for word in ("bottom", "right"))
            filled = drawn[y:y + 32, x:x + 32].sum() > 100
            assert filled == any(place in o["places"] for o in row["objects"])


def read_caption(caption: str) -> tuple[str, dict[str, tuple[int, frozenset]]]:
    """A detailed caption -> ground, {object: (count, places)}."""
    text = caption[0].lower() + caption[1:].rstrip(".")
    ground = next(color for color in scenes.COLORS if re.search(rf"\b{color} (ground|picture)|ground is {color}", text))
    found = {}
    number = "|".join(["an?", *scenes.NUMBERS])
    for match in re.finditer(rf"\b({number}) ({'|'.join([*OBJECTS, *map(plural, OBJECTS)])})\b((?: |, |and )*"
                             rf"(?:(?:{'|'.join(scenes.PLACES)})(?:, | and |))*)", text):
        name = next(n for n in OBJECTS if match[2] in (n, plural(n)))
        count = scenes.NUMBERS.index(match[1]) if match[1] in scenes.NUMBERS else 1
        found[name] = (count, frozenset(place for place in scenes.PLACES if place in match[3]))
    return ground, found


def told(annotation: dict, with_places: bool) -> tuple[str, dict]:
    return annotation["ground"], {o["name"]: (len(o["places"]), frozenset(o["places"] if with_places else ()))
                                  for o in annotation["objects"]}


def test_captions_agree_with_annotations(folder, annotations):
    by_image = {row["image"]: row for row in annotations.values()}
    with_places = 0
    for split in ("train", "test"):
        for row in rows(folder / f"detailed_{split}.jsonl"):
            places = " left" in row["caption"] or " right" in row["caption"]
            with_places += places
            assert read_caption(row["caption"]) == told(by_image[row["image"]], places)
        short = (folder / f"short_{split}.csv").read_text(encoding="utf-8").splitlines()
        assert short[0] == "filepath\ttitle"
        for line in short[1:]:
            image, caption = line.split("\t")
            assert sorted(re.split(", | and ", caption)) == sorted(o["name"] for o in by_image[image]["objects"])
    assert 0.5 < with_places / len(by_image) < 0.9


def test_hard_captions_differ_in_their_kind_alone(folder, annotations):
    kinds = Counter()
    for row in rows(folder / "hard_test.jsonl"):
        kinds[row["kind"]] += 1
        annotation = annotations[row["id"].rsplit("_", 1)[0]]
        (ground, true), (false_ground, false) = read_caption(row["true"]), read_caption(row["false"])
        assert (ground, true) == told(annotation, row["kind"] != "count")
        assert row["true"] != row["false"]
        assert (ground != false_ground) == (row["kind"] == "color")
        if row["kind"] == "object":
            assert len(true.keys() - false.keys()) == len(false.keys() - true.keys()) == 1
            assert sorted(map(str, true.values())) == sorted(map(str, false.values()))
        else:
            assert true.keys() == false.keys()
            changed = {name for name in true if true[name] != false[name]}
            counts = {name for name in true if true[name][0] != false[name][0]}
            assert bool(changed) == (row["kind"] in ("place", "count"))
            assert len(counts) == (1 if row["kind"] == "count" else 0)
            places = [place for _, taken in false.values() for place in taken]
            assert len(places) == len(set(places))
    assert kinds == dict.fromkeys(("object", "color", "place", "count"), SIZES.test)


def truth(question: str, annotation: dict) -> str:
    """The answer to a question about a scene, found from the annotation by other code than the maker's."""
    question = question.removeprefix("<image>\n").removesuffix(questions.YES_OR_NO)
    names = {word: name for name in OBJECTS for word in (name, plural(name))}
    places = defaultdict(list, {o["name"]: o["places"] for o in annotation["objects"]})

    def yes(fact: bool) -> str:
        return "Yes" if fact else "No"

    if m := re.fullmatch(r"Is there an? (\w+) in (?:the|this) image\?", question):
        return yes(bool(places[names[m[1]]]))
    if m := re.fullmatch(r"Is there only one (\w+) in this image\?", question):
        return yes(len(places[names[m[1]]]) == 1)
    if m := re.fullmatch(r"Are there (\w+) (\w+) in this image\?", question):
        return yes(len(places[names[m[2]]]) == scenes.NUMBERS.index(m[1]))
    if m := re.fullmatch(r"How many (\w+) are in the image\?", question):
        return scenes.NUMBERS[len(places[names[m[1]]])].capitalize()
    if m := re.fullmatch(r"Is the ground (\w+) in this image\?", question):
        return yes(annotation["ground"] == m[1])
    if question == "What color is the ground?":
        return annotation["ground"].capitalize()
    if m := re.fullmatch(r"Where is the (\w+)\?", question):
        return places[m[1]][0].capitalize()
    if m := re.fullmatch(r"What is at the (.+)\?", question):
        return next((name.capitalize() for name, at in places.items() if m[1] in at), "Nothing")
    m = re.fullmatch(r"Is the (\w+) (?:on the (left|right) side of|(above|below)) the (\w+)\?", question)
    one, other = places[m[1]][0], places[m[4]][0]
    if m[2]:
        return yes(m[2] in one and m[2] not in other)
    row = {"above": "top", "below": "bottom"}[m[3]]
    return yes(row in one and row not in other)


def test_conversations_are_true_and_balanced(folder, annotations):
    answers = Counter()
    for row in json.loads((folder / "llava_stage2.json").read_text(encoding="utf-8")):
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n") and (folder / row["image"]).is_file()
        if row["id"] in annotations:
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                assert answer["value"] == truth(question["value"], annotations[row["id"]]), question
                if "Is there a" in question["value"]:
                    answers[answer["value"]] += 1
            existence = ["Is there a" in question["value"] for question in turns[::2]]
            # A later question may name what is there; it must not answer one that is still to come.
            assert existence == sorted(existence, reverse=True)
    assert answers["Yes"] == answers["No"] > 100


def test_stage_1_pairs_pictures_with_true_captions(folder, annotations):
    samples = json.loads((folder / "llava_stage1.json").read_text(encoding="utf-8"))
    assert len(samples) == SIZES.train
    for row in samples:
        assert read_caption(row["conversations"][1]["value"]) == told(annotations[row["id"]], True)


def read_map(words: list[str]) -> tuple[str, dict[str, set]]:
    """A map of 64 words -> ground, {object: places}; each object fills its share of a quarter and nothing else."""
    cells = [words[i:i + 8] for i in range(0, 64, 8)]
    grounds, found = set(), defaultdict(set)
    for place in scenes.PLACES:
        y, x = (4 if word in place else 0 for word in ("bottom", "right"))
        quarter = Counter(word for row in cells[y:y + 4] for word in row[x:x + 4])
        grounds |= quarter.keys() & scenes.COLORS.keys()
        things = quarter.keys() - scenes.COLORS.keys()
        assert len(things) <= 1 and all(quarter[name] == 9 for name in things)
        for name in things:
            found[name].add(place)
    assert len(words) == 64 and len(grounds) == 1
    return grounds.pop(), found


def test_texts_map_training_scenes_and_describe_them_or_ask_about_them(folder, annotations):
    training = {(row["ground"], frozenset((o["name"], frozenset(o["places"])) for o in row["objects"])): row
                for key, row in annotations.items() if key.startswith("train")}
    samples = json.loads((folder / "llm_text.json").read_text(encoding="utf-8"))
    assert len(samples) == SIZES.llm_texts
    described = 0
    for row in samples:
        scene, *first = row["conversations"][0]["value"].split("\n")
        assert scene == scene.upper()
        ground, found = read_map(scene.lower().split())
        annotation = training[ground, frozenset((name, frozenset(places)) for name, places in found.items())]
        if not first:
            described += 1
            assert read_caption(row["conversations"][1]["value"]) == told(annotation, True)
            continue
        asked = [*first, *(turn["value"] for turn in row["conversations"][2::2])]
        for question, answer in zip(asked, row["conversations"][1::2], strict=True):
            assert answer["value"] == truth(question, annotation)
    assert 0 < described < len(samples) / 2


def test_pope_asks_three_there_and_three_absent_of_each_picture(folder, annotations):
    present = {row["image"].split("/")[-1]: {o["name"] for o in row["objects"]}
               for key, row in annotations.items() if key.startswith("test")}
    asked = {}
    for kind in pope.SETS:
        lines = rows(folder / "pope" / f"coco_pope_{kind}.json")
        per_picture = Counter(line["image"] for line in lines)
        assert set(per_picture.values()) == {6} and len(per_picture) <= SIZES.pope
        assert Counter(line["label"] for line in lines)["yes"] * 2 == len(lines)
        for line in lines:
            name = re.fullmatch(r"Is there an? (\w+) in the image\?", line["text"])[1]
            assert (name in present[line["image"]]) == (line["label"] == "yes")
        asked[kind] = [(line["image"], line["text"]) for line in lines if line["label"] == "yes"]
    assert asked["random"] == asked["popular"] == asked["adversarial"]


def test_popular_and_adversarial_sets_follow_the_training_scenes(annotations):
    train = [row for key, row in annotations.items() if key.startswith("train")]
    test = [row for key, row in annotations.items() if key.startswith("test") and len(row["objects"]) >= 3]
    company = probing.Company(map(scene, train))
    themes = {}
    for kind in pope.SETS:
        rng = random.Random(0)
        absent = [(row, name) for row in test
                  for name in company.absent(scene(row), [o["name"] for o in row["objects"]][:3], kind, rng)]
        themes[kind] = np.mean([THEME_OF[name] in {THEME_OF[o["name"]] for o in row["objects"]}
                                for row, name in absent])
        if kind == "popular":
            assert {name for _, name in absent} <= {name for name, _ in company.frequency.most_common(8)}
    assert themes["adversarial"] > 2 * themes["random"]


def test_eval_vlm_reads_pope_and_mme(folder, annotations):
    from eval_vlm.config import MmeConfig, PopeConfig

    records, _ = pope.load(PopeConfig(str(folder / "pope"), str(folder / "images" / "test")), None)
    assert len(records) == 3 * len(rows(folder / "pope" / "coco_pope_random.json"))
    records, _ = mme.load(MmeConfig(str(folder / "mme")), None)
    by_subtask = defaultdict(list)
    for record in records:
        by_subtask[record["category"]].append(record)
        assert (folder / "mme" / record["image"]).is_file()
    assert set(by_subtask) == {*probing.SUBTASKS, *signs.SUBTASKS}
    for subtask, asked in by_subtask.items():
        assert len(asked) == 2 * SIZES.mme
        assert [record["label"].lower() for record in asked] == ["yes", "no"] * SIZES.mme
        for record in asked if subtask in probing.SUBTASKS else []:
            annotation = annotations[f"test_{Path(record['image']).stem}"]
            assert truth(record["question"], annotation).lower() == record["label"].lower()


def test_signs_ask_what_they_show(stamps):
    for i in range(30):
        sign = signs.Sign("numerical_calculation", f"sum {i}", Stamps(stamps), 64)
        yes, no = (int(re.search(r"(\d+)\?", question)[1]) for question in sign.pair)
        assert sign.open[1] == str(yes) and yes != no
        for subtask in signs.SUBTASKS:
            sign = signs.Sign(subtask, f"{subtask} {i}", Stamps(stamps), 64)
            assert sign.pair[0] != sign.pair[1] and all(q.endswith(questions.YES_OR_NO) for q in sign.pair)
            assert sorted(answer for _, answer in sign.turns() if answer in ("Yes", "No")) == ["No", "Yes"]


def test_missing_stamp_is_named(tmp_path):
    with pytest.raises(data.UserError, match="has no .*cow.png; fetch the stamps"):
        data.make(tmp_path / "data", tmp_path, SIZES)
    assert not (tmp_path / "data").exists()
