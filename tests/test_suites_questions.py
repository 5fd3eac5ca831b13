"""Question files: the benchmarks' own and lmms-lab's columns give the same records; LLaVA-1.5's prompts; bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from suites_data import MAKERS, PICTURES

from clipmoe_vlm.runs import UserError
from eval_vlm.config import SUITES, EvalConfig
from eval_vlm.suites import module, picture_folder
from eval_vlm.suites.questions import hash_files

LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
PROMPTS = {  # the first question's; formats as in LLaVA's own question files
    "pope": "Is there a random 1?" + SHORT,
    "mme": "Is it red?" + SHORT,
    "gqa": "What is thing 1?" + SHORT,
    "vqav2": "What is thing 0?" + SHORT,
    "textvqa": "What is sign 0?\nReference OCR token: AB, 12" + SHORT,
    "vizwiz": "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
    "scienceqa": "Context: Look up.\nWhich is a kite?\nA. drum\nB. kite" + LETTER,
    "mmbench": "Look up.\nWhich is it?\nA. kite\nB. drum\nC. oar" + LETTER,
    "mmbench_cn": "Look up.\nWhich is it?\nA. kite\nB. drum\nC. oar\n请直接回答选项字母。",
    "seedbench": "What is thing 0?\nA. kite\nB. drum\nC. oar\nD. tin" + LETTER,
    "mmstar": "Which is it?\nOptions: A: kite, B: drum, C: oar, D: tin" + LETTER,
    "ocrbench": "what is written?",
    "mmvet": "What is x?",
    "llava_bench": "What is thing 0?",
}
OWN_NAMES = ("id", "image", "question_id", "llava_id", "picture")  # differ between a release and lmms-lab's copy


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    return {name: make(folder / name) for name, make in MAKERS.items()}


def config_of(suite: str, values: dict, image_folder: str = "", **more):
    default = getattr(EvalConfig(model="", output_dir=""), suite)
    values = {key: str(value) for key, value in values.items()}
    return dataclasses.replace(default, **values, image_folder=image_folder, **more)


def load(suite: str, values: dict, image_folder: str = "", **more):
    return module(suite).load(config_of(suite, values, image_folder, **more))


def test_every_suite_has_files_here():
    assert set(MAKERS) == set(SUITES) == set(PROMPTS)


@pytest.mark.parametrize("suite", SUITES)
def test_own_files_and_dataset_columns_give_the_same_questions(suite, files, tmp_path):
    official, hashes = load(suite, files[suite]["official"])
    dataset, dataset_hashes = load(suite, files[suite]["dataset"], str(tmp_path))
    assert len(official) >= 2 and len({record["id"] for record in official}) == len(official)
    assert [{key: value for key, value in record.items() if key not in OWN_NAMES} for record in official] == \
        [{key: value for key, value in record.items() if key not in OWN_NAMES} for record in dataset]
    assert [module(suite).prompt(record) for record in official] == [module(suite).prompt(one) for one in dataset]
    assert all(len(digest) == 64 for digest in (*hashes.values(), *dataset_hashes.values()))


@pytest.mark.parametrize("suite", SUITES)
def test_prompts_are_those_of_llava(suite, files):
    record = load(suite, files[suite]["official"])[0][0]
    assert module(suite).prompt(record) == PROMPTS[suite]
    assert module(suite).prompt(record, "!").endswith("!") and SHORT not in module(suite).prompt(record, "!")


def test_textvqa_without_ocr_tokens(files):
    record = load("textvqa", {"questions": files["textvqa"]["official"]["questions"]})[0][0]
    assert module("textvqa").prompt(record) == "What is sign 0?" + SHORT


@pytest.mark.parametrize("suite", SUITES)
def test_pictures_inside_a_dataset_are_written_once_and_read_back(suite, files, tmp_path):
    config = config_of(suite, files[suite]["dataset"], str(tmp_path / "pictures"))
    records, _ = module(suite).load(config)
    folder = picture_folder(suite, config)
    for record in records:
        with Image.open(folder / record["image"]) as picture:
            assert picture.size == (12, 10)
    assert {file.read_bytes() for file in folder.iterdir()} <= set(PICTURES)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert module(suite).load(config)[0] == records
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times


def test_parquet_files_as_the_hub_keeps_them(files, tmp_path):
    from datasets import load_from_disk

    (tmp_path / "hub" / "data").mkdir(parents=True)
    load_from_disk(files["seedbench"]["dataset"]["questions"]).to_parquet(tmp_path / "hub" / "data" / "test-0.parquet")
    expected = load("seedbench", files["seedbench"]["dataset"])
    assert load("seedbench", {"questions": tmp_path / "hub"}) == expected
    shutil.copy(tmp_path / "hub" / "data" / "test-0.parquet", tmp_path / "hub" / "data" / "dev-0.parquet")
    assert load("seedbench", {"questions": tmp_path / "hub"}) == expected
    with pytest.raises(UserError, match="no split 'val', only dev, test"):
        load("seedbench", {"questions": tmp_path / "hub"}, split="val")


def test_the_hash_is_the_files_own(files):
    file = files["mmvet"]["official"]["questions"]
    assert load("mmvet", files["mmvet"]["official"])[1] == {"questions": hash_files(file)}


def test_pope_reads_the_other_sources_and_one_file(files):
    folder = Path(files["pope"]["official"]["questions_dir"]).parent
    for place in (folder, folder / "seem", folder / "seem" / "gqa"):
        assert len(load("pope", {"questions_dir": place}, source="gqa")[0]) == 9
    one, hashes = load("pope", {"questions_dir": folder / "output" / "coco" / "coco_pope_popular.json"})
    assert {record["category"] for record in one} == {"popular"} == set(hashes)
    with pytest.raises(UserError, match="'vg' is unknown; choose one of coco, aokvqa, gqa"):
        load("pope", {"questions_dir": folder}, source="vg")


def test_mmbench_makes_the_rotations_that_a_file_lacks(files):
    records = {record["question_id"]: record for record in load("mmbench", files["mmbench"]["official"])[0]}
    assert sorted(records) == [0, 3, 1_000_000, 1_000_003, 2_000_000]
    made = records[2_000_000]
    assert made["choices"] == {"A": "oar", "B": "kite", "C": "drum"} and made["label"] == "C"
    assert records[1_000_003]["choices"] == {"A": "right", "B": "left"} and records[1_000_003]["label"] == "B"
    assert records[0]["choices"][records[0]["label"]] == made["choices"][made["label"]] == "drum"
    assert len({records[index]["image"] for index in (0, 1_000_000, 2_000_000)}) == 1
    plain = load("mmbench", files["mmbench"]["official"], circular=False)[0]
    assert [record["question_id"] for record in plain] == [0, 3]


def test_scienceqa_and_seedbench_leave_out_what_has_no_picture(files):
    assert [record["id"] for record in load("scienceqa", files["scienceqa"]["official"])[0]] == ["5", "7"]
    everything = load("scienceqa", files["scienceqa"]["official"], images_only=False)[0]
    assert [record["has_image"] for record in everything] == [True, True, False]
    assert len(load("seedbench", files["seedbench"]["official"])[0]) == 2
    videos = load("seedbench", files["seedbench"]["official"], images_only=False)[0][2:]
    assert [record["category"] for record in videos] == ["Action Recognition"]


def test_limit_keeps_whole_pictures(files):
    config = config_of("mmbench", files["mmbench"]["official"])
    assert [record["question_id"] for record in module("mmbench").load(config, 1)[0]] == [0, 1_000_000, 2_000_000]


# --- bad input -------------------------------------------------------------------------------------------------------

QUESTION_FILES = {
    "gqa": "testdev_balanced_questions.json", "vqav2": "questions.json", "textvqa": "TextVQA_0.5.1_val.json",
    "vizwiz": "val.json", "mmbench": "mmbench_dev_20230712.tsv", "seedbench": "SEED-Bench.json", "mmstar": "MMStar.tsv",
    "ocrbench": "OCRBench.json", "mmvet": "mm-vet.json", "llava_bench": "questions.jsonl"}


def test_a_question_twice_in_a_json_object_is_named(files, tmp_path):
    text = Path(files["gqa"]["official"]["questions"]).read_text()
    (tmp_path / "questions.json").write_text(text.replace('"02":', '"01":'))
    with pytest.raises(UserError, match="questions.json: question 01 is there twice"):
        load("gqa", {"questions": tmp_path / "questions.json"})


@pytest.mark.parametrize("suite", SUITES)
def test_a_missing_question_file_is_named(suite, tmp_path):
    key = {"pope": "questions_dir", "mme": "folder"}.get(suite, "questions")
    with pytest.raises(UserError, match="nowhere"):
        load(suite, {key: tmp_path / "nowhere.json"})


@pytest.mark.parametrize("suite", QUESTION_FILES)
def test_another_benchmarks_file_is_refused(suite, files, tmp_path):
    other = tmp_path / QUESTION_FILES[suite]
    if other.suffix == ".tsv":
        other.write_text("a\tb\n1\t2\n")
    else:
        other.write_text(json.dumps([{"a": 1}]) if other.suffix == ".json" else json.dumps({"a": 1}) + "\n")
    if suite == "vizwiz":
        other.write_text(json.dumps([{"image": "x.jpg"}]))
    with pytest.raises(UserError, match=QUESTION_FILES[suite]):
        load(suite, {"questions": other})


@pytest.mark.parametrize("suite", ["vqav2", "textvqa", "vizwiz", "seedbench", "ocrbench", "llava_bench", "mmbench"])
def test_a_doubled_question_is_named(suite, files, tmp_path):
    file = Path(files[suite]["official"]["questions"])
    text = file.read_text()
    if file.suffix == ".tsv":
        lines = text.splitlines(keepends=True)
        copy = "".join([*lines, lines[-1]])
    elif file.suffix == ".jsonl":
        copy = text + text
    else:
        content = json.loads(text)
        rows = content if isinstance(content, list) else content.get("questions", content.get("data"))
        rows.append({**rows[0], "question_id": 0} if suite == "vizwiz" else rows[0])
        copy = json.dumps(content)
    (tmp_path / file.name).write_text(copy)
    values = {**files[suite]["official"], "questions": tmp_path / file.name}
    with pytest.raises(UserError, match=rf"{file.name}: question \w+ is there twice"):
        load(suite, values)


@pytest.mark.parametrize(("suite", "old", "new", "words"), [
    ("seedbench", '"answer": "C"', '"answer": "E"', "question 100: the label must be one of A, B, C, D, found 'E'"),
    ("mmstar", "\tB\t", "\tF\t", "index 0: the label must be one of A, B, C, D, found 'F'"),
    ("mmbench", "\tB\tshape", "\tD\tshape", "index 0: the label must be one of A, B, C, found 'D'"),
    ("ocrbench", "Regular Text", "Spoken Text", "question 0: OCRBench has no kind 'Spoken Text Recognition'"),
    ("mmvet", '"ocr"', '"smell"', "question v1_0: MM-Vet has no ability 'smell'"),
    ("llava_bench", '"detail"', '"novel"', "row 2: .*'novel'"),
])
def test_a_label_outside_the_allowed_is_named(suite, old, new, words, files, tmp_path):
    file = Path(files[suite]["official"]["questions"])
    text = file.read_text()
    assert old in text
    (tmp_path / file.name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=words):
        load(suite, {**files[suite]["official"], "questions": tmp_path / file.name})


def test_a_scienceqa_label_past_the_choices_is_named(files, tmp_path):
    folder = Path(shutil.copytree(files["scienceqa"]["official"]["questions"], tmp_path / "release"))
    problems = json.loads((folder / "problems.json").read_text())
    problems["7"]["answer"] = 3
    (folder / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(UserError, match="question 7: the label must be one of 0 to 2, found 3"):
        load("scienceqa", {"questions": folder})


def test_annotations_of_other_questions_are_refused(files, tmp_path):
    values = dict(files["vqav2"]["official"])
    annotations = json.loads(Path(values["annotations"]).read_text())
    annotations["annotations"].pop()
    values["annotations"] = tmp_path / "annotations.json"
    values["annotations"].write_text(json.dumps(annotations))
    with pytest.raises(UserError, match="no annotation of question 9001 .1 are missing"):
        load("vqav2", values)


def test_a_dataset_that_cannot_be_had_is_one_sentence():
    with pytest.raises(UserError, match="lmms-lab/NoSuchSet: no file or folder.*name the question file"):
        load("vizwiz", {"questions": "lmms-lab/NoSuchSet"})
