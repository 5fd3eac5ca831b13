"""The scorers against recorded results of the official scripts, lmms-eval and VLMEvalKit, per answer and in total."""

import json
import math
import random
from pathlib import Path

import pytest

from clipmoe_vlm.runs import UserError
from eval_vlm.suites import mme, pope

SUITES = {"pope": pope, "mme": mme}
REFERENCE = {name: json.loads((Path(__file__).parent / "reference" / "scorers" / f"{name}.json").read_text())
             for name in SUITES}
RULES = [(name, rule) for name in SUITES for rule in REFERENCE[name]["expected"]]


def assert_close(ours, expected, path: str = "") -> None:
    if isinstance(expected, dict):
        assert set(ours) == set(expected), path
        for key in expected:
            assert_close(ours[key], expected[key], f"{path}/{key}")
    else:
        assert math.isclose(ours, expected, rel_tol=1e-9, abs_tol=1e-12), (path, ours, expected)


def edge_case(suite: str, start: str) -> dict:
    (case,) = [case for case in REFERENCE[suite]["edge_cases"] if case["case"].startswith(start)]
    return case


@pytest.mark.parametrize(("suite", "rule"), RULES)
def test_every_answer_is_read_as_the_rule_reads_it(suite, rule):
    for record in REFERENCE[suite]["records"]:
        assert SUITES[suite].parse(record, rule) == record["parsed"][rule], record


@pytest.mark.parametrize(("suite", "rule"), RULES)
def test_figures_equal_the_scripts_in_any_order_of_records(suite, rule):
    records = list(REFERENCE[suite]["records"])
    assert_close(SUITES[suite].score(records, rule=rule), REFERENCE[suite]["expected"][rule])
    random.Random(0).shuffle(records)
    assert_close(SUITES[suite].score(records, rule=rule), REFERENCE[suite]["expected"][rule])


@pytest.mark.parametrize(("suite", "rule"), RULES)
def test_points_have_the_headline_figure_as_their_mean(suite, rule):
    expected = REFERENCE[suite]["expected"][rule]
    for name, points in SUITES[suite].points(REFERENCE[suite]["records"], rule).items():
        if suite == "mme":
            figure = expected["tasks"][name] if rule != "official" else expected["tasks"][name]["score"]
        elif name == "all":
            figure = expected["mean"]["accuracy"] if rule == "official" else expected["all"]["accuracy"]
        else:
            figure = expected[name]["accuracy"]
        unit = 100 if (suite, rule) == ("pope", "vlmevalkit") else 1
        assert math.isclose(unit * sum(points.values) / len(points.values), figure, rel_tol=1e-9)
        assert len(set(points.ids)) == len(points.ids) == len(points.pictures)


@pytest.mark.parametrize("case", [case for case in REFERENCE["pope"]["edge_cases"] if case["records"]],
                         ids=lambda case: case["case"].split(";")[0])
def test_pope_edge_cases(case):
    figures = pope.score(case["records"])["random"]
    suggested = dict(case["suggested"])
    suggested.pop("why", None)
    warning = suggested.pop("warn")
    assert_close({key: figures[key] for key in suggested}, suggested)
    if "has no answer" in (warning or ""):
        # The records alone don't tell what was asked; with the missing question among them the warning comes.
        records = [*case["records"], {**case["records"][0], "question_id": 99, "answer": None}]
        figures = pope.score(records)["random"]
        assert_close({key: figures[key] for key in suggested}, suggested)
    assert figures.get("warn") == warning


def test_pope_without_predictions_is_an_error():
    with pytest.raises(UserError, match=edge_case("pope", "no answer at all")["suggested"]["error"]):
        pope.score([])


def test_pope_mean_needs_all_three_sets():
    records = [record for record in REFERENCE["pope"]["records"] if record["category"] != "popular"]
    figures = pope.score(records)
    assert figures["mean"] is None and "popular" not in figures


@pytest.mark.parametrize("rule", ["official", "lmms_eval", "vlmevalkit"])
def test_a_label_that_is_neither_yes_nor_no_is_named(rule):
    record = {**REFERENCE["pope"]["records"][3], "label": "perhaps"}
    with pytest.raises(UserError, match="random, question 4.*'perhaps'"):
        pope.score([record], rule)
    first, *others = REFERENCE["mme"]["records"]
    figures = mme.score([{**first, "label": "perhaps"}, *others], rule)
    existence = figures["tasks"]["existence"]
    assert "existence, question 1" in existence["error"] and "'perhaps'" in existence["error"]
    assert list(figures.values())[0] is None and list(figures.values())[1] is not None


def test_an_unknown_rule_is_named():
    for suite in SUITES:
        with pytest.raises(UserError, match="'strict'.*official, lmms_eval, vlmevalkit"):
            SUITES[suite].score(REFERENCE[suite]["records"], "strict")


@pytest.mark.parametrize("start", ["an answer with a tab", "an answer with a line break"])
def test_mme_reads_the_answer_itself(start):
    case = edge_case("mme", start)
    assert mme.parse(case["records"][0]) == case["suggested"]["parsed"]
    assert mme.score(case["records"])["tasks"]["existence"]["score"] == 200


@pytest.mark.parametrize("start", ["no answer of a task", "the two questions of a picture not next"])
def test_mme_edge_figures(start):
    case = edge_case("mme", start)
    ours, expected = mme.score(case["records"])["tasks"]["existence"], case["suggested"]["existence"]
    assert_close({key: ours[key] for key in expected}, expected)


@pytest.mark.parametrize(("start", "words"), [("one question of a pair", "existence.png has 1 of its 2 questions"),
                                              ("a label that is not", "label must be Yes or No")])
def test_mme_names_a_task_it_cannot_score_and_scores_the_others(start, words):
    records = [record for record in REFERENCE["mme"]["records"] if record["category"] != "existence"]
    figures = mme.score(records + edge_case("mme", start)["records"])
    assert words in figures["tasks"]["existence"]["error"] and words in figures["warn"]
    expected = REFERENCE["mme"]["expected"]["official"]
    assert figures["perception"] is None and math.isclose(figures["cognition"], expected["cognition"])
    assert_close(figures["tasks"]["OCR"], expected["tasks"]["OCR"])


def test_mme_names_a_missing_task_and_gives_no_sum_for_its_half():
    figures = mme.score([record for record in REFERENCE["mme"]["records"] if record["category"] != "OCR"])
    expected = REFERENCE["mme"]["expected"]["official"]
    assert figures["perception"] is None and "OCR" in figures["warn"] and "OCR" not in figures["tasks"]
    assert math.isclose(figures["cognition"], expected["cognition"])
    assert_close(figures["tasks"]["count"], expected["tasks"]["count"])


def test_mme_counts_a_missing_answer_as_wrong_and_the_last_of_two():
    records = [dict(record) for record in REFERENCE["mme"]["records"][:2]]  # existence_00: both right
    assert mme.score(records)["tasks"]["existence"]["score"] == 200
    missing = mme.score([records[0], {**records[1], "answer": None}])
    assert missing["tasks"]["existence"]["score"] == 50 and "1 question has no answer" in missing["warn"]
    doubled = mme.score([{**records[0], "answer": "Yes"}, *records])
    assert doubled["tasks"]["existence"]["score"] == 200 and "question 1 answered twice" in doubled["warn"]
    with pytest.raises(UserError, match="no subtask colour"):
        mme.score([{**record, "category": "colour"} for record in records])
