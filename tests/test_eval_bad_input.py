"""Bad input through eval_vlm's command lines: one sentence, exit code 2, and nothing that was there is touched."""

import copy
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eval_data import command, config_file, environment, execute, make_questions, make_vlm
from suites_data import MAKERS, save

from clipmoe_vlm.runs import UserError
from eval_vlm.config import SOURCE
from eval_vlm.score import score_file, suite_config
from eval_vlm.suites import module


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs `python -m eval_vlm.<program>` in this process and returns its sentence."""

    def run(program: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            runpy.run_module(f"eval_vlm.{program}", run_name="__main__")
        said = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
        return said[0]

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny VLM, its questions and a finished run: (folder, config file)."""
    folder = tmp_path_factory.mktemp("world")
    make_vlm(folder / "vlm")
    make_questions(folder / "questions", pictures=2)
    config = config_file(folder, folder / "vlm", folder / "questions")
    execute(config)
    return folder, config


# --- eval_vlm.run ----------------------------------------------------------------------------------------------------


def edit(name: str, old: str, new: str):
    """A change of the questions' folder: in one file, the first `old` becomes `new`."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def remove(name: str):
    return lambda folder: (folder / name).unlink()


POPE, MME = "pope/coco_pope_popular.json", "mme/existence/1.txt"
QUESTIONS = {
    "POPE's picture is missing": (remove("images/1.png"), r"1\.png: there is no such picture \(question random/7; 1 "),
    "MME's picture is missing": (remove("mme/existence/1.png"), r"there is no picture 1\.jpg or \.png in .*existence"),
    "a question's number twice": (edit(POPE, '"question_id": 2', '"question_id": 1'),
                                  r"popular\.json, line 2: question_id 1 is there twice"),
    "POPE's label": (edit(POPE, '"label": "no"', '"label": "maybe"'),
                     r"popular\.json, question 1: the label must be Yes or No, found 'maybe'"),
    "MME's label": (edit(MME, "\tYes", "\tPerhaps"), r"1\.txt, line 1: the label must be Yes or No, found 'Perhaps'"),
    "a subtask with one question less": (edit(MME, "Is it night? Please answer yes or no.\tNo\n", ""),
                                         r"existence/1\.txt: existence/1\.png has 1 of its 2 questions"),
    "a subtask with one question more": (edit(MME, "Is it night?", "Is it?\tNo\nIs it night?"), "has 3 of its 2 que"),
    "MME's line": (edit(MME, "\tNo", " No"), r"1\.txt, line 2: expected question<TAB>Yes or No"),
    "no JSON": (edit(POPE, "{", "<"), r"popular\.json, line 1: not valid JSON"),
    "a question that is no text": (edit(POPE, '"text": "Is there a cat in the image?"', '"text": ["a"]'), "no string"),
    "an empty set": (lambda folder: (folder / POPE).write_text(""), r"popular\.json holds no question"),
    "a set is missing": (remove(POPE), r"popular\.json: no such file"),
    "other questions than were answered": (edit(POPE, "a cat", "a tiger"), "made with other questions"),
    "other labels than were answered": (edit(POPE, '"label": "no"', '"label": "yes"'), "made with other questions"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_question_files(case, world, refused, tmp_path):
    change, words = QUESTIONS[case]
    folder, config = world
    questions = shutil.copytree(folder / "questions", tmp_path / "questions")
    change(questions)
    places = [f"pope.questions_dir={questions / 'pope'}", f"pope.image_folder={questions / 'images'}",
              f"mme.folder={questions / 'mme'}"]
    before = tree(folder)
    assert re.search(words, refused("run", config, *places))
    assert tree(folder) == before
    if "answered" not in case:
        assert re.search(words, refused("run", config, *places, f"output_dir={tmp_path / 'new'}"))
        assert not (tmp_path / "new").exists()


def test_predictions_of_other_questions_in_the_output_folder(world, refused, tmp_path):
    folder, config = world
    run = shutil.copytree(folder / "run", tmp_path / "run")
    file = run / "predictions" / "pope.jsonl"
    text = file.read_text()
    for new, words in ((text.replace('"random/3"', '"random/99"', 1), "is about question random/99, which is not"),
                       ("not JSON\n" + text, r"pope\.jsonl, line 1 is not a prediction")):
        file.write_text(new)
        before = tree(run)
        assert re.search(words, refused("run", config, f"output_dir={run}", "batch_size=3"))
        assert tree(run) == before


def test_folders_that_are_no_vlm(world, refused, tmp_path):
    folder, config = world
    right = (folder / "vlm" / "config.json").read_text()
    for name, files, words in (
            ("nowhere", None, r"nowhere.*(no config\.json|no such)"), ("empty", {}, r"empty.*no config\.json"),
            ("clip", {"config.json": '{"model_type": "clip"}'}, "clip is not a VLM: its model_type is 'clip'"),
            ("broken", {"config.json": '{"model_type": '}, r"config\.json is not valid JSON"),
            ("bare", {"config.json": right}, "bare: .* cannot be loaded .*not whole"),
            ("torn", {"config.json": right, "model.safetensors": "torn"}, "torn: .* cannot be loaded .*not whole")):
        if files is not None:
            (tmp_path / name).mkdir()
            for file, text in files.items():
                (tmp_path / name / file).write_text(text)
        before = tree(tmp_path)
        assert re.search(words, refused("run", config, f"model={tmp_path / name}", f"output_dir={folder / name}"))
        assert tree(tmp_path) == before


class Tags(HTMLParser):
    """The tags of a page with their event handlers, such as `onerror`."""

    def __init__(self, page: Path):
        super().__init__()
        self.seen = Counter()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.seen[(tag, *sorted(name for name, _ in attrs if name.startswith("on")))] += 1


def test_html_in_a_question_or_an_answer_is_text_in_the_page(world, tmp_path):
    """Read as a browser reads it: no tag comes from a question or an answer."""
    folder, config = world
    evil = "</script></td><script>alert(1)</script><img src=x onerror=alert(2)><!--"
    questions = shutil.copytree(folder / "questions", tmp_path / "questions")
    edit(POPE, "a cat in the image?", f"a cat {evil}")(questions)
    run = tmp_path / "run"
    options = (f"pope.questions_dir={questions / 'pope'}", "suites=[pope]", f"output_dir={run}")
    execute(config, *options)
    file = run / "predictions" / "pope.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["answer"] = "Yes " + evil
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    execute(config, *options)
    evil_tags = Tags(run / "report.html").seen
    assert "alert(2)" in (run / "report.html").read_text()
    execute(config, "suites=[pope]", f"output_dir={tmp_path / 'good'}")
    good_tags = Tags(tmp_path / "good" / "report.html").seen
    assert evil_tags["script",] == good_tags["script",] and not [tag for tag in evil_tags if tag not in good_tags]


# --- eval_vlm.score --------------------------------------------------------------------------------------------------

GOOD = [{"question_id": 100, "text": "C"}, {"question_id": 101, "text": "C"}]
SEED = {
    "of another question": ([*GOOD, {"question_id": 7, "text": "A"}], "row 3 answers question 7, which is not in"),
    "of a question that has changed": (
        [{"suite": "seedbench", "id": "100", "question": "What was it?", "answer": "C"}], "question 100, which is not"),
    "of another suite": ([{"suite": "pope", "id": "100", "answer": "C"}], "row 1 is a prediction for pope, not for se"),
    "an answer that is no text": ([{"question_id": 100, "text": 3}], "row 1: the answer must be text, found 3"),
    "no answer": ([{"question_id": 100}], "row 1: no answer"),
    "none": ([], "no predictions"),
    "not a row": (["C"], r"line 1: expected a JSON object, found '\"C\"'"),
    "an id that is none": ([{"suite": "seedbench", "id": [100], "answer": "C"}], "question .100., which is not in"),
}


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    return {name: make(folder / name)["official"] for name, make in MAKERS.items()}


@pytest.mark.parametrize("case", SEED)
def test_prediction_files(case, suites, refused, tmp_path):
    rows, words = SEED[case]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("scores.json", "submission.jsonl"):
        (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    assert re.search(words, refused("score", "seedbench", tmp_path / "p.jsonl", "--questions",
                                    suites["seedbench"]["questions"], "--output", tmp_path / "scores.json",
                                    "--submission", tmp_path / "submission.jsonl"))
    assert tree(tmp_path) == before


def test_an_answer_of_ten_thousand_tokens_is_read_like_any_other(suites, tmp_path):
    row = {"suite": "pope", "id": "popular/2", "answer": "No, " + 9_999 * "there is nothing "}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    result, _ = score_file("pope", str(tmp_path / "p.jsonl"), str(suites["pope"]["questions_dir"]))
    assert result["figures"]["popular"]["accuracy"] == 1


def test_a_subtask_of_a_dataset_with_an_odd_number_of_questions(refused, tmp_path):
    data = save(tmp_path / "data", {"question_id": ["count/0.png", "count/0.png", "count/1.png"],
                                    "question": ["Is it?"] * 3, "answer": ["Yes", "No", "Yes"],
                                    "category": ["count"] * 3})
    (tmp_path / "p.jsonl").write_text(json.dumps({"suite": "mme", "id": "count/0/1", "answer": "Yes"}) + "\n")
    assert "data: count/1.png has 1 of its 2 questions" in refused("score", "mme", tmp_path / "p.jsonl", "--questions",
                                                                 data)


# --- the other programs ----------------------------------------------------------------------------------------------


def test_compare_of_runs_with_other_questions(world, refused, tmp_path):
    folder, _ = world
    other = shutil.copytree(folder / "run", tmp_path / "other")
    file = other / "predictions" / "pope.jsonl"
    file.write_text(file.read_text().replace("Is there a tree", "Is there a bush"))
    (other / "compare.json").write_text("mine")
    before = tree(tmp_path)
    assert "answer different questions" in refused("compare", folder / "run", other)
    assert "no suite's predictions in common" in refused("compare", folder / "run", tmp_path)
    assert tree(tmp_path) == before


def test_build_and_judge_end_alike(suites, refused, tmp_path):
    assert "no such file" in refused("build", "pope", tmp_path / "none.json", tmp_path / "out")
    assert "neither COCO's" in refused("build", "mme", suites["ocrbench"]["questions"], tmp_path / "out")
    assert "none.jsonl: no such file" in refused("judge", "mmvet", tmp_path / "none.jsonl", "--questions",
                                                 suites["mmvet"]["questions"], "--model", "j")
    assert not list(tmp_path.iterdir())


def test_a_process_of_its_own_ends_alike(world, tmp_path):
    folder, config = world
    result = subprocess.run(command(config, "pope.questions_dir=nowhere", f"output_dir={tmp_path / 'new'}"),
                            env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "nowhere" in result.stderr
    assert not (tmp_path / "new").exists()


# --- every field of every question file ------------------------------------------------------------------------------


def paths(content, at=()):
    """Where something stands in a JSON document, two members of each list and all of each object."""
    yield at
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content[:2]):
            yield from paths(value, (*at, key))


def changed(content, at, value):
    """With `value` there, or nothing where it is `...`."""
    if not at:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return content


@pytest.mark.parametrize("suite", sorted({*MAKERS} - {"mme", "mmbench", "mmbench_cn", "mmstar"}))  # theirs is no JSON
def test_whatever_stands_in_a_question_file_there_is_a_sentence_or_a_score(suite, tmp_path):
    """Each field in turn holds something else, or nothing: a refusal in words, never a traceback."""
    values = {key: str(value) for key, value in MAKERS[suite](tmp_path)["official"].items()}
    source = SOURCE[suite]
    options = [f"{key}={value}" for key, value in values.items() if key != source]

    def score() -> None:
        records, _ = module(suite).load(suite_config(suite, values[source], options))
        for record in records:
            assert isinstance(record["question"], str) and isinstance(module(suite).prompt(record), str)
            assert isinstance(record["image"], str) and isinstance(record["id"], str)
        rows = [{**record, "answer": "yes, B kite", "grade": None} for record in records]
        module(suite).score(rows)
        module(suite).points(rows)

    score()
    refusals = 0
    for place in map(Path, values.values()):
        for file in sorted(place.rglob("*.json")) if place.is_dir() else [place]:
            text = file.read_text()
            lines = file.suffix == ".jsonl" or (suite == "pope" and not text.startswith("["))
            content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
            for at in paths(content):
                for value in (None, 5, "<b>", [[1]], {"a": None}, ...):
                    if not at and (lines or value is ...):
                        continue
                    new = changed(content, at, value)
                    file.write_text("".join(json.dumps(row) + "\n" for row in new) if lines else json.dumps(new))
                    try:
                        score()
                    except UserError as error:
                        refusals += 1
                        assert "\n" not in str(error)
            file.write_text(text)
    assert refusals > 20
