"""`python -m eval_vlm.score`: prediction files of every layout, the report, and bad input in one sentence each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from eval_data import REFERENCE, environment
from suites_data import MAKERS

from clipmoe_vlm.runs import UserError
from eval_vlm.config import SUITES
from eval_vlm.score import main, score_file
from eval_vlm.suites import module
from eval_vlm.suites.questions import hash_files

SHORT = "\nAnswer the question using a single word or phrase."
RIGHT = {"pope": "yes", "mme": "Yes", "gqa": "kite", "vqav2": "kite", "textvqa": "kite", "vizwiz": "kite",
         "scienceqa": "B", "mmbench": "B", "mmbench_cn": "B", "seedbench": "C", "mmstar": "B", "ocrbench": "centre",
         "mmvet": "x", "llava_bench": "x"}  # to each suite's first question


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    return {name: make(folder / name)["official"] for name, make in MAKERS.items()}


def source(suite: str, files: dict) -> tuple[str, list[str]]:
    """The question file and the further options."""
    values = dict(files[suite])
    questions = str(values.pop({"pope": "questions_dir", "mme": "folder"}.get(suite, "questions")))
    return questions, [f"{key}={value}" for key, value in values.items()]


def records_of(suite: str, files: dict, tmp_path: Path) -> list[dict]:
    questions, options = source(suite, files)
    grade = {"tuple": [8, 9]} if suite == "llava_bench" else {"score": [1.0]} if suite == "mmvet" else {}
    ours = tmp_path / "any.jsonl"
    first = {"pope": "random/1", "mme": "count/0/1", "gqa": "01", "vqav2": "9000", "textvqa": "34602", "vizwiz": "0",
             "scienceqa": "5", "mmbench": "0", "mmbench_cn": "0", "seedbench": "100", "mmstar": "0", "ocrbench": "0",
             "mmvet": "v1_0", "llava_bench": "0"}[suite]
    ours.write_text(json.dumps({"suite": suite, "id": first, "answer": RIGHT[suite], **grade}) + "\n")
    return score_file(suite, str(ours), questions, options=options)[1]


def predictions(file: Path, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if file.suffix == ".jsonl" else json.dumps(rows))
    return str(file)


@pytest.mark.parametrize("suite", SUITES)
def test_a_runs_predictions_of_every_suite(suite, files, tmp_path):
    """As eval_vlm.run writes them: all of the record with its answer."""
    questions, options = source(suite, files)
    records = records_of(suite, files, tmp_path)
    rows = [{**record, "answer": RIGHT[suite], "score": None} for record in records]
    result, scored = score_file(suite, predictions(tmp_path / "p.jsonl", rows), questions, options=options)
    assert result["n"] == result["answered"] == len(records) and result["rule"] == "official"
    assert all(len(digest) == 64 for digest in result["questions_sha256"].values())
    assert all(record["answer"] == RIGHT[suite] for record in scored)
    if suite not in ("mmvet", "llava_bench"):
        plain = [{**record, "answer": RIGHT[suite]} for record in records]
        assert result["figures"] == module(suite).score(plain)
        assert next(iter(result["scores"].values()))["n"] > 0


@pytest.mark.parametrize(("suite", "rows", "right"), [
    ("mme", [{"question_id": "count/0.png", "prompt": "Is it night?" + SHORT, "text": "No"},
             {"question_id": "count/0.png", "prompt": "Is it red?" + SHORT, "text": "Yes"}],
     {"count/0/1": "Yes", "count/0/2": "No"}),
    ("textvqa", [{"question_id": "00ab", "prompt": "What is sign 1?\nReference OCR token: AB" + SHORT, "text": "b"},
                 {"question_id": "00ab", "prompt": "What is sign 0?\nReference OCR token: AB" + SHORT, "text": "a"}],
     {"34602": "a", "34603": "b"}),
    ("pope", [{"question_id": 2, "category": "popular", "text": "Yes"}], {"popular/2": "Yes"}),
    ("mmbench", [{"question_id": 0, "round_id": 0, "text": "B"}, {"question_id": 0, "round_id": 2, "text": "C"}],
     {"0": "B", "2000000": "C"}),
    ("seedbench", [{"question_id": 100, "text": "C"}], {"100": "C"}),  # a number there, text in the question file
    ("scienceqa", [{"question_id": 5, "prompt": "<image>\nContext: Look up.\nWhich is a kite?\nA. ..", "text": "B"}],
     {"5": "B"}),
    ("vizwiz", [{"image": "VizWiz_val_00000001.jpg", "answer": "kite"}], {"1": "kite"}),
    ("gqa", [{"questionId": "02", "prediction": "kite"}], {"02": "kite"}),
    ("vqav2", [{"question_id": 9001, "answer": "kite"}], {"9001": "kite"}),
    ("mmvet", {"v1_1": "2"}, {"v1_1": "2"}),
    ("mmvet", [{"question_id": 1, "prompt": "What is y?", "text": "2"}], {"v1_1": "2"}),
])
def test_llavas_and_the_benchmarks_own_answer_files(suite, rows, right, files, tmp_path):
    questions, options = source(suite, files)
    file = predictions(tmp_path / ("p.json" if isinstance(rows, dict) else "p.jsonl"), rows)
    scored = score_file(suite, file, questions, options=options)[1]
    assert {row["id"]: row["answer"] for row in scored if row["answer"] is not None} == right


def test_a_rotation_of_no_number_is_named(files, tmp_path):
    questions, options = source("mmbench", files)
    file = predictions(tmp_path / "p.jsonl", [{"question_id": "b1", "round_id": 1, "text": "B"}])
    with pytest.raises(UserError, match="row 1: question b1, round_id 1"):
        score_file("mmbench", file, questions, options=options)


def test_pope_by_the_numbers_of_llavas_question_file(files, tmp_path):
    questions = Path(source("pope", files)[0])
    numbered = [{"question_id": number, "image": image, "text": f"Is there a {name} {question}?" + SHORT,
                 "category": name} for number, image, name, question in ((20_000_002, "0.jpg", "popular", 2),
                                                                         (1, "1.jpg", "adversarial", 1))]
    predictions(questions / "llava_pope_test.jsonl", numbered)
    rows = [{"question_id": row["question_id"], "prompt": row["text"], "text": "No"} for row in numbered]
    scored = score_file("pope", predictions(tmp_path / "p.jsonl", rows), str(questions))[1]
    (questions / "llava_pope_test.jsonl").unlink()
    assert [row["id"] for row in scored if row["answer"]] == ["popular/2", "adversarial/1"]


def test_grades_of_a_judge(files, tmp_path):
    questions, _ = source("mmvet", files)
    file = predictions(tmp_path / "grades.json", {"v1_0": {"model": ["g"], "content": ["0.5"], "score": [0.5]},
                                                  "v1_1": {"model": ["g"], "content": ["1.0"], "score": [1.0]}})
    assert score_file("mmvet", file, questions)[0]["figures"]["total"] == 75
    questions, _ = source("llava_bench", files)
    file = predictions(tmp_path / "reviews.jsonl", [
        {"id": number + 1, "question_id": number, "category": f"llava_bench_{kind}", "content": "", "tuple": [8, 6]}
        for number, kind in enumerate(("conv", "detail", "complex"))])
    assert score_file("llava_bench", file, questions)[0]["figures"]["all"]["relative"] == 75


def test_an_answer_given_twice_and_one_not_given(files, tmp_path):
    questions, options = source("seedbench", files)
    rows = [{"question_id": "100", "text": "A"}, {"question_id": "100", "text": "C"}]
    result, scored = score_file("seedbench", predictions(tmp_path / "p.jsonl", rows), questions, options=options)
    assert result["figures"]["all"] == {"questions": 2, "correct": 1, "accuracy": 50.0}
    assert "question 100 answered twice; the last is used; 1 question has no answer" in result["figures"]["warn"]
    assert (result["n"], result["answered"], len(scored)) == (2, 1, 3)


def test_mme_with_a_subtask_that_cannot_be_scored_still_scores_the_others(files, tmp_path):
    questions, _ = source("mme", files)
    result, _ = score_file("mme", predictions(tmp_path / "p.jsonl", [
        {"suite": "mme", "id": "count/0/1", "answer": "Yes"}, {"suite": "mme", "id": "count/0/2", "answer": "No"}]),
        questions)
    assert result["scores"]["count"]["score"] == 100 and "no perception sum" in result["figures"]["warn"]


def test_the_report_names_file_hash_n_and_rule(tmp_path):
    file = REFERENCE / "pope" / "coco_pope_random.json"
    rows = [{"question_id": json.loads(line)["question_id"], "text": "Yes"} for line in file.read_text().splitlines()]
    out = subprocess.run([sys.executable, "-m", "eval_vlm.score", "pope", predictions(tmp_path / "p.jsonl", rows),
                          "--questions", str(file), "--rule", "vlmevalkit", "--output", str(tmp_path / "scores.json")],
                         env=environment(), capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    for words in ("rule vlmevalkit", "N = 3000, answered 3000", hash_files(file), "random / accuracy", "0.5000 ["):
        assert words in out.stdout, words
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["figures"]["random"]["accuracy"] == 50 and scores["questions_sha256"] == {"random": hash_files(file)}
    assert scores["predictions_sha256"] == hash_files(tmp_path / "p.jsonl")


def test_a_submission_file_beside(files, tmp_path, capsys):
    questions, options = source("vqav2", files)
    file = predictions(tmp_path / "p.jsonl", [{"question_id": 9000, "text": "A Kite."}])
    main(["vqav2", file, "--questions", questions, "--submission", str(tmp_path / "s.json"), *options])
    assert json.loads((tmp_path / "s.json").read_text())[0] == {"question_id": 9000, "answer": "kite"}
    assert "overall" in capsys.readouterr().out
    main(["vqav2", file, "--questions", questions])  # without annotations: a test split
    assert "no right answers" in capsys.readouterr().out


GOOD = [{"question_id": 9000, "text": "kite"}]


@pytest.mark.parametrize(("arguments", "rows", "words"), [
    (["vqa2"], GOOD, "no suite 'vqa2'; the suites are pope, mme"),
    (["vqav2", "--rule", "strict"], GOOD, "rule 'strict' is unknown.*official_after_llava_convert"),
    (["vqav2", "--rule", "vlmevalkit"], GOOD, "rule 'vlmevalkit' is unknown"),
    (["vqav2", "colour=red"], GOOD, "'colour=red' is not of the form key=value with a key of vqav2: questions"),
    (["vqav2", "--colour"], GOOD, "usage: python -m eval_vlm.score"),
    (["vqav2"], [{"question_id": 77, "text": "kite"}], "row 1 answers question 77, which is not in .*questions.json"),
    (["vqav2"], [{"question_id": 9000, "prompt": "Is it?" + SHORT, "text": "no"}], "question 9000, which is not"),
    (["vqav2"], [{"suite": "gqa", "id": "9000", "answer": "x"}], "row 1 is a prediction for gqa, not for vqav2"),
    (["vqav2"], [{"question_id": 9000}], "row 1: no answer"),
    (["vqav2"], [{"question_id": 9000, "text": 3}], "row 1: the answer must be text, found 3"),
    (["vqav2"], [], "no predictions"),
    (["scienceqa", "--submission", "x"], GOOD, "scienceqa has no submission file"),
])
def test_bad_input_is_one_sentence(arguments, rows, words, files, tmp_path):
    with pytest.raises(UserError, match=words):
        main([arguments[0], predictions(tmp_path / "p.jsonl", rows), "--questions",
              source("vqav2", files)[0], *arguments[1:]])
    assert not (tmp_path / "scores.json").exists()


def test_a_row_that_fits_several_questions_is_refused(files, tmp_path):
    questions, _ = source("pope", files)
    with pytest.raises(UserError, match="question 2 is there 3 times.*llava_pope_test.jsonl"):
        score_file("pope", predictions(tmp_path / "p.jsonl", [{"question_id": 2, "text": "Yes"}]), questions)


def test_bad_input_ends_with_code_2_and_no_traceback(files, tmp_path):
    out = subprocess.run([sys.executable, "-m", "eval_vlm.score", "gqa", str(tmp_path / "none.jsonl"), "--questions",
                          source("gqa", files)[0]], env=environment(), capture_output=True, text=True, timeout=300)
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert out.stderr.startswith("error: ") and "none.jsonl" in out.stderr
