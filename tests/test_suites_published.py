"""Suites without reference data, by their published definitions: MMStar's, OCRBench's and MM-Vet's own scripts, LLaVA's
summary of reviews; and what the benchmarks' servers read."""

import dataclasses
import json
import math

import pytest
from suites_data import MAKERS

from clipmoe_vlm.runs import UserError
from eval_vlm.config import EvalConfig, MmbenchConfig
from eval_vlm.suites import mmstar, module, ocrbench
from eval_vlm.suites.choices import extract_letter


def star(answer: str | None, label: str = "A", ability: str = "math", kind: str = "geometry", number: int = 0) -> dict:
    return {"id": str(number), "question_id": str(number), "category": ability, "l2_category": kind, "answer": answer,
            "question": "Which?\nOptions: A: kite, B: drum, C: oar, D: tin", "label": label, "image": f"{number}.png"}


@pytest.mark.parametrize(("answer", "letter"), [
    ("A", "A"), (" b.", "B"), ("An apple", "A"), ("(C) oar", "C"), ("Option D", "D"), ("The answer is b, I think", "B"),
    ("the answer is: B", "T"), ("It is B", "I"), ("", None), ("\n c", "C")])
def test_mmstars_own_rule(answer, letter):
    assert mmstar.parse(star(answer))["letter"] == letter


@pytest.mark.parametrize(("rule", "answer", "letter"), [
    ("vlmevalkit", "The drum", "B"), ("vlmevalkit", "It is B", "B"), ("vlmevalkit", "no idea", None),
    ("lmms_eval", "I choose C", "C"), ("lmms_eval", "It is (B).", "B"), ("lmms_eval", "the drum", None)])
def test_mmstar_by_the_toolkits_rules(rule, answer, letter):
    assert mmstar.parse(star(answer), rule)["letter"] == letter


def test_mmstar_averages():
    records = [star("A", number=0), star("B", number=1), star("A", number=2), star("A", "B", kind="algebra", number=3),
               star("c", "C", "logic", "codes", 4), star(None, "C", "logic", "codes", 5)]
    assert mmstar.score(records) == {
        "final score": 0.5, "math": 0.5, "logic": 0.5, "math(geometry)": 2 / 3, "math(algebra)": 0.0,
        "logic(codes)": 0.5, "warn": "1 question has no answer"}
    lmms = mmstar.score(records, "lmms_eval")  # means of the kinds' means; `c` is no letter there
    assert math.isclose(lmms["math"], 1 / 3) and math.isclose(lmms["average"], 2 / 9)
    assert mmstar.score(records, "vlmevalkit")["Overall"] == 1 / 3
    assert mmstar.points(records)["math"].values == [100, 0, 100, 0]


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), ("B. kite", "B"), ("(A) or (B)", "B"), ("A kite, so B", "A"), ("The answer is B, not C: no", "C"),
    ("see A: no. B: yes", "B"), ("nothing", None), ("", None), ("CAB", "B"),
    ("My answer is a D, the answer is C", "C")])
def test_lmms_evals_extractor(answer, letter):
    assert extract_letter(answer, "ABCD") == letter


def ocr(answer: str | None, right: list[str], kind: str = "Digit String Recognition", number: int = 0) -> dict:
    return {"id": str(number), "question_id": number, "category": kind, "answers": right, "answer": answer,
            "image": f"{number}.png", "question": "what?"}


@pytest.mark.parametrize(("answer", "right", "kind", "official", "lmms_eval"), [
    ("It says CENTRE!", ["centre"], "Handwriting Recognition", 1, 1),
    ("cent\nre", ["cent re"], "Handwriting Recognition", 1, 1),
    ("center", ["centre", "Center"], "Doc-oriented VQA", 1, 1),
    ("１２３", ["123"], "Digit String Recognition", 0, 1),
    ("x + 1", ["x+1"], ocrbench.FORMULAE, 1, 1),
    ("X+1", ["x+1"], ocrbench.FORMULAE, 0, 0),
    ("", ["a"], "Digit String Recognition", 0, 0)])
def test_ocrbench_looks_whether_the_text_is_in_the_answer(answer, right, kind, official, lmms_eval):
    parsed = [ocrbench.parse(ocr(answer, right, kind), rule) for rule in ("official", "vlmevalkit", "lmms_eval")]
    assert parsed == [official, official, lmms_eval]


def test_ocrbench_sums():
    records = [ocr("12", ["12"], number=0), ocr("no", ["12"], "Irregular Text Recognition", 1),
               ocr("a", ["a"], "Key Information Extraction", 2), ocr(None, ["a"], "Doc-oriented VQA", 3)]
    figures = ocrbench.score(records)
    assert {key: figures[key] for key in ("Text Recognition", "Key Information Extraction", "Doc-oriented VQA",
                                          "Scene Text-centric VQA", "Final Score", "Final Score Norm")} == {
        "Text Recognition": 1, "Key Information Extraction": 1, "Doc-oriented VQA": 0, "Scene Text-centric VQA": 0,
        "Final Score": 2, "Final Score Norm": 0.2}
    assert figures["warn"] == "1 question has no answer; 4 of OCRBench's 1000 questions: the sum is of 4"
    assert ocrbench.score(records, "lmms_eval")["ocrbench_accuracy"] == 0.002


def vet(grade, abilities: list[str], number: int) -> dict:
    return {"id": f"v1_{number}", "question_id": f"v1_{number}", "abilities": abilities, "grade": grade, "answer": "x",
            "image": f"{number}.png", "category": "default", "question": "what?", "label": "y"}


def test_mmvet_adds_up_a_judges_grades():
    records = [vet([1.0], ["ocr", "math"], 0), vet([0.5, 0.0], ["math", "ocr"], 1), vet(0.1, ["rec"], 2)]
    figures = module("mmvet").score([*records, vet(None, ["gen"], 3)])
    assert math.isclose(figures["total"], 100 * 1.35 / 3) and math.isclose(figures["ocr"], 62.5)
    assert figures["gen"] is None and math.isclose(figures["rec"], 10)
    assert figures["combinations"].keys() == {"ocr_math", "rec"}
    assert math.isclose(figures["combinations"]["ocr_math"], 62.5)
    assert figures["warn"] == "1 of 4 questions have no grade and are left out"
    assert "graded by a judge" in module("mmvet").score([vet(None, ["rec"], 0)])["warn"]
    with pytest.raises(UserError, match="question v1_7: .*from 0 to 1, found 7"):
        module("mmvet").score([vet(7, ["rec"], 7)])


def review(points, kind: str, number: int) -> dict:
    return {"id": str(number), "question_id": number, "category": kind, "grade": points, "answer": "x", "label": None,
            "image": "001.jpg", "question": "what?"}


def test_llava_bench_sums_reviews_up_as_llavas_script():
    records = [review([8.0, 10.0], "conv", 0), review([9, 6.5], "detail", 1), review([9, 2], "detail", 2)]
    figures = module("llava_bench").score(records)
    assert [round(figures["all"][key], 1) for key in ("relative", "reference", "model")] == [71.2, 86.7, 61.7]
    assert figures["detail"] == {"relative": 100 * 4.25 / 9, "reference": 90, "model": 42.5}
    assert "complex" not in figures
    assert "compared by a judge" in module("llava_bench").score([review(None, "conv", 0)])["warn"]
    with pytest.raises(UserError, match="question 5: a review has two numbers"):
        module("llava_bench").score([review([1.0], "conv", 5)])


# --- what servers and judges read ------------------------------------------------------------------------------------


def answered(suite: str, folder, texts: list[str | None]) -> list[dict]:
    values = {key: str(value) for key, value in MAKERS[suite](folder / suite)["official"].items()}
    config = dataclasses.replace(getattr(EvalConfig(model="", output_dir=""), suite), **values)
    records, _ = module(suite).load(config)
    return [{**record, "answer": text} for record, text in zip(records, texts, strict=True)]


@pytest.mark.parametrize(("suite", "texts", "expected"), [
    ("vqav2", ["The Kite.", None], [{"question_id": 9000, "answer": "kite"}, {"question_id": 9001, "answer": ""}]),
    ("textvqa", ["It's two", "No"], [{"question_id": 34602, "answer": "it 's 2"},
                                     {"question_id": 34603, "answer": "no"}]),
    ("vizwiz", ["A kite", None], [{"image": "VizWiz_val_00000000.jpg", "answer": "kite"},
                                  {"image": "VizWiz_val_00000001.jpg", "answer": ""}]),
    ("gqa", ["Kite..", "No."], [{"questionId": "01", "prediction": "kite"}, {"questionId": "02", "prediction": "no"}]),
    ("mmvet", ["x = 1", None], {"v1_0": "x = 1", "v1_1": ""}),
    ("seedbench", ["C", None], [{"question_id": "100", "prediction": "C"}, {"question_id": "101", "prediction": ""}]),
    ("llava_bench", ["It is.", "b", None], [("It is.", 0), ("b", 1), ("", 2)]),
])
def test_submission_files(suite, texts, expected, tmp_path):
    file = tmp_path / "out"
    module(suite).write_submission(answered(suite, tmp_path, texts), file)
    if suite in ("seedbench", "llava_bench"):
        content = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        content = json.loads(file.read_text())
    if suite == "llava_bench":
        content = [(row["text"], row["question_id"]) for row in content]
    assert content == expected


def test_mmbenchs_sheet(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    values = MAKERS["mmbench"](tmp_path / "mmbench")["official"]
    records, _ = module("mmbench").load(MmbenchConfig(questions=str(values["questions"])))
    texts = ["B", "=A\x0b", None, "C", "A"]
    records = [{**record, "answer": text} for record, text in zip(records, texts, strict=True)]
    module("mmbench").write_submission(records, tmp_path / "out.xlsx")
    rows = list(openpyxl.load_workbook(tmp_path / "out.xlsx").active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (0, "Which is it?", "kite", "drum", "oar", None, "B", "B", "dev")
    assert rows[2][6] == "=A " and rows[3][6] is None and len(rows) == 6
