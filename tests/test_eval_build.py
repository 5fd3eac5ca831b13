"""POPE's sets and MME's pairs built from annotations: POPE's released sets, made-up COCO files, and what is refused."""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest
from eval_data import REFERENCE
from PIL import Image
from test_demo_data import truth

from clipmoe_vlm.runs import UserError
from demo import scenes
from eval_vlm import build
from eval_vlm.annotations import Picture, read_pictures, scene
from eval_vlm.config import MmeConfig, PopeConfig
from eval_vlm.probing import NUMBERS, Company, plural, pope_set, side_questions
from eval_vlm.suites import mme, pope


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def asked(line: dict) -> str:
    return re.fullmatch(r"Is there an? (.+) in the image\?", line["text"])[1]


def tree(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# --- POPE's own release --------------------------------------------------------------------------------------------


class Release:
    """POPE's released COCO sets, the statistics released with them, and what they tell about the pictures."""

    def __init__(self):
        folder = REFERENCE / "pope"
        self.sets = {kind: lines(folder / f"coco_pope_{kind}.json") for kind in pope.SETS}
        self.frequency = json.loads((folder / "coco_ground_truth_objects.json").read_text())
        self.companions = json.loads((folder / "coco_co_occur.json").read_text())
        self.there, self.absent, self.passed_over = defaultdict(list), defaultdict(set), defaultdict(set)
        for line in self.sets["random"]:
            if line["label"] == "yes":
                self.there[line["image"]].append(asked(line))
        popular = sorted(self.frequency, key=lambda name: -self.frequency[name])
        for kind, rows in self.sets.items():
            questions = defaultdict(list)
            for yes, no in zip(rows[::2], rows[1::2], strict=True):
                image, there, absent = no["image"], asked(yes), asked(no)
                ranking = {"popular": popular, "adversarial": self.companions.get(there, [])}.get(kind, [])
                if absent in ranking:  # else drawn by the dice
                    self.passed_over[image] |= {*ranking[:ranking.index(absent)]} - {*self.there[image],
                                                                                    *questions[image]}
                questions[image].append(absent)
                self.absent[image].add(absent)

    def pictures(self) -> list[Picture]:
        """What is known to be in each picture: the three asked for, and whatever the questions passed over."""
        return [Picture(image, {name: [] for name in [*there, *sorted(self.passed_over[image], key=[
            *self.frequency].index)]}) for image, there in self.there.items()]


@pytest.fixture(scope="module")
def release() -> Release:
    return Release()


def test_the_released_sets_pass_over_only_what_is_there(release):
    """The rule itself: had another been used, some object passed over would be asked for as absent elsewhere."""
    assert len(release.there) == 500 and sum(map(len, release.passed_over.values())) > 300
    for image, names in release.passed_over.items():
        assert not names & release.absent[image], image
    known = Counter(name for picture in release.pictures() for name in picture.objects)
    assert all(known[name] <= release.frequency[name] for name in known)
    # Whoever has none of the most frequent objects is asked for them: those are known in full.
    assert [known[name] for name in ("person", "dining table", "car", "chair")] == [348, 130, 90, 85]


def test_the_released_statistics_make_the_released_sets_line_for_line(release):
    company = Company([])
    company.frequency = Counter(release.frequency)
    company.together = {name: Counter({other: len(others) - rank for rank, other in enumerate(others)})
                        for name, others in release.companions.items()}
    assert pope_set(release.pictures(), company, "popular", 0) == release.sets["popular"]
    ours = pope_set(release.pictures(), company, "adversarial", 0)
    differ = [(one, other) for one, other in zip(ours, release.sets["adversarial"], strict=True) if one != other]
    # All companions of a toaster, scissors and a zebra were there or asked for already: POPE drew, and so do we.
    assert len(differ) <= 3
    assert all(asked(other) not in release.companions[asked(ours[other["question_id"] - 2])] for _, other in differ)


def test_statistics_recomputed_from_the_released_questions_make_nearly_the_released_sets(release, tmp_path):
    file = tmp_path / "objects.jsonl"
    file.write_text("".join(json.dumps({"image": one.image, "objects": list(one.objects)}) + "\n"
                            for one in release.pictures()))
    for image in release.there:
        (tmp_path / image).touch()
    build.build("pope", file, tmp_path / "pope")
    same = {}
    for kind, theirs in release.sets.items():
        ours = lines(tmp_path / "pope" / f"coco_pope_{kind}.json")
        assert [line for line in ours if line["label"] == "yes"] == [one for one in theirs if one["label"] == "yes"]
        assert [{**line, "text": ""} for line in ours] == [{**line, "text": ""} for line in theirs]
        same[kind] = sum(one == other for one, other in zip(ours, theirs, strict=True))
    assert same["popular"] > 2980 and same["adversarial"] > 2650  # of 3000; a sixth of the objects is not known
    absent = [Counter(asked(line) for line in rows if line["label"] == "no")
              for rows in (release.sets["random"], lines(tmp_path / "pope" / "coco_pope_random.json"))]
    spread = [np.std([counts[name] for name in release.frequency]) for counts in absent]
    assert spread[1] == pytest.approx(spread[0], rel=0.25)  # each object about as often as any other


# --- a made-up COCO file -------------------------------------------------------------------------------------------

NAMES = ("person", "wine glass", "orange", "mouse", "dining table", "cat", "bus", "sheep", "umbrella", "toy")


def make_coco(folder, count: int = 60) -> dict:
    """Pictures of 100 x 80 pixels with up to seven kinds of objects; some boxes are crowds, some tiny."""
    rng = random.Random(5)
    content = {"images": [], "annotations": [], "categories": [{"id": 10 * i, "name": n} for i, n in enumerate(NAMES)]}
    (folder / "val").mkdir(parents=True)
    for number in range(count):
        content["images"].append({"id": number, "file_name": f"{number:03d}.png", "width": 100, "height": 80})
        Image.new("RGB", (100, 80), (number, 0, 0)).save(folder / "val" / f"{number:03d}.png")
        for category in rng.sample(range(len(NAMES)), rng.randint(1, 7)):
            for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
                side = rng.choice((3, 12, 20, 30))
                content["annotations"].append({
                    "id": len(content["annotations"]), "image_id": number, "category_id": 10 * category,
                    "iscrowd": int(rng.random() < 0.05),
                    "bbox": [rng.randint(0, 100 - side), rng.randint(0, 80 - side), side, side]})
    rng.shuffle(content["annotations"])  # as COCO's, which do not go by picture
    (folder / "instances.json").write_text(json.dumps(content))
    return content


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    return folder, make_coco(folder)


def run(kind: str, coco, output, **options) -> dict:
    options = {"images": coco[0] / "val", **options}
    return build.build(kind, coco[0] / "instances.json", str(output), [f"{k}={v}" for k, v in options.items()])


def test_pope_of_coco_asks_by_frequency_and_company(coco, tmp_path):
    """Against a plain count over the annotations."""
    result = run("pope", coco, tmp_path / "pope", pictures=30)
    files = {one["id"]: one["file_name"] for one in coco[1]["images"]}
    there = defaultdict(list)
    for one in coco[1]["annotations"]:
        name = NAMES[one["category_id"] // 10]
        if name not in there[files[one["image_id"]]]:
            there[files[one["image_id"]]].append(name)
    sets = {kind: lines(tmp_path / "pope" / f"coco_pope_{kind}.json") for kind in pope.SETS}
    pictures = list(dict.fromkeys(line["image"] for line in sets["random"]))
    assert len(pictures) == 30 and all(len(there[image]) >= 3 for image in pictures)
    frequency = Counter(name for image in pictures for name in there[image])
    together = {(a, b): sum({a, b} <= {*there[image]} for image in pictures) for a in NAMES for b in NAMES}
    assert result["frequency"] == frequency and result["questions"] == dict.fromkeys(pope.SETS, 180)
    for kind, rows in sets.items():
        assert [row["question_id"] for row in rows] == list(range(1, 181))
        assert [row["label"] for row in rows] == ["yes", "no"] * 90
        assert all(("an " in row["text"]) == (asked(row)[0] in "aeiou") for row in rows)
        for start in range(0, 180, 6):
            image = rows[start]["image"]
            yes, no = ([asked(row) for row in rows[start + first:start + 6:2]] for first in (0, 1))
            assert {row["image"] for row in rows[start:start + 6]} == {image}
            assert yes == there[image][:3] and len({*no}) == 3 and not {*no} & {*there[image]}
            for number, (before, name) in enumerate(zip(yes, no, strict=True)):
                free = {*frequency} - {*there[image]} - {*no[:number]}
                score = {"random": lambda x: 0, "popular": frequency.get,
                         "adversarial": lambda x, before=before: together[before, x]}[kind]
                assert score(name) == max(map(score, free))
    records, _ = pope.load(PopeConfig(str(tmp_path / "pope"), str(coco[0] / "val")))
    assert len(records) == 3 * 180


def test_mme_of_coco_asks_one_question_of_each_answer_and_both_are_true(coco, tmp_path):
    result = run("mme", coco, tmp_path / "mme", pictures=12)
    assert result["questions"] == {"existence": 24, "count": 24, "position": 24}  # no colour of the ground in COCO's
    numbers = {one["file_name"]: one["id"] for one in coco[1]["images"]}
    boxes = defaultdict(list)
    for one in coco[1]["annotations"]:
        boxes[one["image_id"], NAMES[one["category_id"] // 10]].append(one)
    names = {word: name for name in NAMES for word in (name, plural(name))}

    def answer(question: str, image: int) -> bool:
        if match := re.fullmatch(r"Is there an? (.+) in this image\?", question):
            return (image, match[1]) in boxes
        if match := re.fullmatch(r"(?:Is there only (one)|Are there (\w+)) (.+) in this image\?", question):
            found = boxes[image, names[match[3]]]
            assert not any(one["iscrowd"] or one["bbox"][2] < 9 for one in found)  # 1% of 100 x 80 pixels
            return len(found) == NUMBERS.index(match[1] or match[2])
        match = re.fullmatch(r"Is the (.+) (on the (?:left|right) side of|above|below) the (.+)\?", question)
        (one,), (other,) = (boxes[image, match[i]] for i in (1, 3))
        axis, ahead = {"on the left side of": (0, True), "on the right side of": (0, False), "above": (1, True),
                       "below": (1, False)}[match[2]]
        first, second = (one["bbox"], other["bbox"]) if ahead else (other["bbox"], one["bbox"])
        return first[axis] + first[axis + 2] <= second[axis]

    records, _ = mme.load(MmeConfig(str(tmp_path / "mme")))
    assert len(records) == 72
    for record in records:
        image = record["image"].split("/")[1]
        assert (tmp_path / "mme" / record["image"]).read_bytes() == (coco[0] / "val" / image).read_bytes()
        question = record["question"].removesuffix(" " + mme.YES_OR_NO)
        assert answer(question, numbers[image]) == (record["label"] == "Yes"), question
    assert [record["label"] for record in records] == ["Yes", "No"] * 36


def test_scenes_have_places_and_colours_too(tmp_path, capsys):
    rows = scenes.annotations(0, "test", 80, set())
    (tmp_path / "scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "images" / "test").mkdir(parents=True)
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    build.main(["mme", str(tmp_path / "scenes.jsonl"), str(tmp_path / "mme"), "pictures=20"])
    assert "existence 40, count 40, position 40, color 40 questions" in capsys.readouterr().out
    by_name = {row["image"].replace("/", "_"): row for row in rows}
    records, _ = mme.load(MmeConfig(str(tmp_path / "mme")))
    assert Counter(one["category"] for one in records) == dict.fromkeys(("existence", "count", "position", "color"), 40)
    for record in records:
        question = record["question"]
        assert truth(question, by_name[record["image"].split("/")[1]]) == record["label"], question
    build.main(["pope", str(tmp_path / "scenes.jsonl"), str(tmp_path / "pope"), "pictures=20"])
    assert len(lines(tmp_path / "pope" / "coco_pope_popular.json")) == 120


def test_same_seed_same_bytes_and_another_seed_other_pictures(coco, tmp_path):
    for kind in ("pope", "mme"):
        first, again, other = (tmp_path / f"{kind}{name}" for name in ("first", "again", "other"))
        for folder, seed in ((first, 3), (again, 3), (other, 4)):
            run(kind, coco, folder, pictures=10, seed=seed)
        assert tree(first) == tree(again) and tree(first) != tree(other)


def test_words():
    pairs = [("person", "people"), ("bus", "buses"), ("wine glass", "wine glasses"), ("bench", "benches"),
             ("toothbrush", "toothbrushes"), ("butterfly", "butterflies"), ("toy", "toys"), ("tomato", "tomatoes"),
             ("sheep", "sheep"), ("dog", "dogs")]
    assert [plural(one) for one, _ in pairs] == [many for _, many in pairs]


# --- what is refused -----------------------------------------------------------------------------------------------


def change(content: dict, key: str, index: int, **fields) -> dict:
    content = json.loads(json.dumps(content))
    content[key][index].update(fields)
    return content


BROKEN = {
    "a category without a name": (lambda c: change(c, "categories", 3, name=None), "category 30 has no name"),
    "a picture twice": (lambda c: change(c, "images", 3, id=2), "among images the id 2 is there twice"),
    "a file twice": (lambda c: change(c, "images", 3, file_name="002.png"), "the picture 002.png is there twice"),
    "an annotation twice": (lambda c: change(c, "annotations", 3, id=2), "among annotations the id 2 is there twice"),
    "a box of NaN": (lambda c: change(c, "annotations", 0, id=7000, bbox=[0, 0, float("nan"), 1]),
                     r"annotation 7000: the bbox must be four numbers .* found \[0, 0, nan, 1\]"),
    "an unknown picture": (lambda c: change(c, "annotations", 0, image_id=99), "is of image 99, which"),
    "an unknown category": (lambda c: change(c, "annotations", 0, category_id=99), "is of category 99, which"),
    "no categories": (lambda c: {**c, "categories": None}, "has no list of categories"),
    "another format": (lambda c: {"info": 1}, "is neither COCO's instances JSON .* nor scenes"),
    "no picture's name": (lambda c: change(c, "images", 0, file_name=None), "image 0 has no file_name"),
    "a missing picture": (lambda c: change(c, "images", 0, file_name="gone.png"), "gone.png: there is no such picture"),
    "few kinds": (lambda c: {**c, "annotations": [{**one, "category_id": one["category_id"] % 40}
                                                  for one in c["annotations"]]}, "holds all but .* of the 4 kinds"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotations_are_named(case, coco, tmp_path):
    make, message = BROKEN[case]
    (tmp_path / "broken.json").write_text(json.dumps(make(coco[1])))
    kind, pictures = ("mme", 60) if case == "a missing picture" else ("pope", 10)
    with pytest.raises(UserError, match=message):
        build.build(kind, tmp_path / "broken.json", tmp_path / "out",
                    [f"images={coco[0] / 'val'}", f"pictures={pictures}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json"]


@pytest.mark.parametrize(("text", "message"), [
    ("", "neither COCO's"), ("[1, 2]", "neither COCO's"), ('{"image": "a.png"}', "neither COCO's"),
    ("{broken", "line 1: not valid JSON"),
    (2 * '{"image": "a.png", "objects": ["cow"]}\n', "the picture a.png is there twice"),
    ('{"image": "a.png", "objects": [{"places": []}]}', "scene 1: an object has no name"),
    ('{"image": "a.png", "objects": [{"name": "cow", "places": ["middle"]}]}', "scene 1: the places of cow must be"),
    ('{"image": 3, "objects": []}', "scene 1: needs image"),
])
def test_broken_scenes_are_named(text, message, tmp_path):
    (tmp_path / "scenes.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pictures(tmp_path / "scenes.jsonl")


def test_too_few_pictures_and_unknown_keys_are_refused(coco, tmp_path):
    for kind, options, message in [
            ("pope", {"pictures": 1000}, r"only \d+ of the 60 annotated pictures hold 3 or more .*type pictures="),
            ("pope", {"pictures": 10, "min_objects": 2}, "min_objects 3 or more"),
            ("mme", {"pictures": 1000}, "only 60 of the 60 annotated pictures allow a question about existence"),
            ("mme", {"min_objects": 3}, "with a key of mme: images, pictures, seed"),
            ("mme", {"pictures": "many"}, "mme: Value 'many'"), ("vqa", {}, "nothing to build for 'vqa'"),
            ("pope", {"images": tmp_path, "pictures": 5}, r"there is no such picture \(5 of 5 are missing\)")]:
        with pytest.raises(UserError, match=message):
            run(kind, coco, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_another_build_and_other_files_are_never_overwritten(coco, tmp_path):
    run("pope", coco, tmp_path / "pope", pictures=10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "build.json").write_text("[]")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="holds a build with other pictures, seed; name another folder"):
        run("pope", coco, tmp_path / "pope", pictures=11, seed=1)
    for folder in ("mine", "mine/notes.txt", "other"):
        with pytest.raises(UserError, match="is no build of this program"):
            run("mme", coco, tmp_path / folder, pictures=5)
    assert run("pope", coco, tmp_path / "pope", pictures=10)["pictures"] == 10  # the same one: nothing to do
    assert tree(tmp_path) == before


def test_every_pair_of_places_has_its_side():
    """All pairs of quarters, against the words of their names."""
    for one, other in combinations(scenes.PLACES, 2):
        row = {"image": "a", "objects": [{"name": "cow", "places": [one]}, {"name": "dog", "places": [other]}]}
        questions = side_questions(scene(row))
        assert questions and all((truth(yes, row), truth(no, row)) == ("Yes", "No") for yes, no in questions)
