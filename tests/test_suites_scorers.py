"""The scorers of the nine suites with reference data against the official scripts, lmms-eval and VLMEvalKit.

POPE and MME are in test_scorers.py; here are the seven others, per answer and in total, under every rule there is.
"""

import json
import math
import random
from pathlib import Path

import pytest

from clipmoe_vlm.runs import UserError
from eval_vlm.suites import module, rules_of

NAMES = ("gqa", "vqav2", "textvqa", "vizwiz", "scienceqa", "mmbench", "seedbench")
REFERENCE = {name: json.loads((Path(__file__).parent / "reference" / "scorers" / f"{name}.json").read_text())
             for name in NAMES}
KINDS = {**{number: f"Kind {letter}" for number, letter in enumerate("ABCDEFGHI", 1)},
         10: "Kind V1", 11: "Kind V2", 12: "Kind V3"}  # the reference's made-up names
PRINTED = ("printed", "accuracy_percent_printed")
RULES = [(name, rule) for name in NAMES for rule, figures in REFERENCE[name]["expected"].items() if figures]


def with_kinds(records: list[dict]) -> list[dict]:
    return [{**record, "category": KINDS[record["question_type_id"]]} if "question_type_id" in record else record
            for record in records]


def assert_close(ours, expected, path: str = "") -> None:
    if isinstance(expected, dict):
        wanted = {key: value for key, value in expected.items() if key not in PRINTED}
        assert set(ours) - {"warn"} == set(wanted), path
        for key, value in wanted.items():
            assert_close(ours[key], value, f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(ours) == len(expected), path
        for index, value in enumerate(expected):
            assert_close(ours[index], value, f"{path}/{index}")
    elif isinstance(expected, float):
        assert math.isclose(ours, expected, rel_tol=1e-9, abs_tol=1e-12), (path, ours, expected)
    else:
        assert ours == expected, (path, ours, expected)


def edge_case(suite: str, start: str) -> dict:
    (case,) = [case for case in REFERENCE[suite]["edge_cases"] if case["case"].startswith(start)]
    return {**case, "records": with_kinds(case["records"])}


def test_every_rule_of_the_reference_is_there():
    for name in NAMES:
        rules = {rule for rule, figures in REFERENCE[name]["expected"].items() if figures}
        assert rules == set(rules_of(name)), name


@pytest.mark.parametrize(("suite", "rule"), [
    (suite, rule) for suite, rule in RULES if rule in REFERENCE[suite]["records"][0]["parsed"]])
def test_every_answer_is_read_as_the_rule_reads_it(suite, rule):
    read = 0
    for record in REFERENCE[suite]["records"]:
        expected = record["parsed"][rule]
        if record["answer"] is not None and expected is not None:
            if isinstance(expected, dict):  # whether a whole group of MMBench is right is a figure
                expected = {key: value for key, value in expected.items() if key != "group_hit"}
            assert_close(module(suite).parse(record, rule), expected, str(record))
            read += 1
    assert read >= 185


@pytest.mark.parametrize(("suite", "rule"), RULES)
def test_figures_equal_the_scripts_in_any_order_of_records(suite, rule):
    records = with_kinds(REFERENCE[suite]["records"])
    expected = REFERENCE[suite]["expected"][rule]
    assert_close(module(suite).score(records, rule), expected)
    random.Random(0).shuffle(records)
    assert_close(module(suite).score(records, rule), expected)


HEADLINES = {  # per suite and rule: name in points -> its figure and the factor to percent
    "gqa": {"official": ("accuracy", "accuracy", 1), "lmms_eval": ("accuracy", "exact_match", 100),
            "vlmevalkit": ("accuracy", "Overall", 1)},
    "vqav2": {"official": ("overall", "overall", 1), "official_after_llava_convert": ("overall", "overall", 1),
              "lmms_eval": ("overall", "exact_match", 100)},
    "textvqa": {"official": ("accuracy", "accuracy", 100), "lmms_eval": ("accuracy", "exact_match", 100),
                "vlmevalkit": ("accuracy", "Overall", 1)},
    "vizwiz": {"official": ("overall", "overall", 1), "official_after_llava_convert": ("overall", "overall", 1),
               "vqa_rule": ("overall", "overall", 1), "lmms_eval": ("overall", "exact_match", 100),
               "vlmevalkit": ("overall", "Overall", 1)},
    "scienceqa": {"official": ("img_accuracy", "img_accuracy", 1),
                  "lmms_eval": ("img_accuracy", "scienceqa_img/exact_match", 100),
                  "vlmevalkit": ("img_accuracy", "with_image", 100)},
    "mmbench": {"official": ("circular", "circular/Overall", 100), "lmms_eval": ("circular", "overall", 100),
                "vlmevalkit": ("vanilla_0", "vanilla_0/Overall", 100)},
    "seedbench": {"official": ("Kind C", "types/Kind C/accuracy", 1), "lmms_eval": ("image", "seed_image", 100),
                  "vlmevalkit": ("image", "image", 100)},
}


@pytest.mark.parametrize(("suite", "rule"), RULES)
def test_points_have_the_headline_figure_as_their_mean(suite, rule):
    name, figure, factor = HEADLINES[suite][rule]
    expected = REFERENCE[suite]["expected"][rule]
    for key in figure.split("/"):
        expected = expected[key]
    points = module(suite).points(with_kinds(REFERENCE[suite]["records"]), rule)[name]
    assert math.isclose(sum(points.values) / len(points.values), factor * expected, rel_tol=1e-9)
    assert len(set(points.ids)) == len(points.ids) == len(points.pictures)


def test_rounded_as_the_scripts_print_them():
    vqav2 = module("vqav2").score(REFERENCE["vqav2"]["records"])
    printed = REFERENCE["vqav2"]["expected"]["official"]["printed"]
    assert round(vqav2["overall"], 2) == printed["overall"]
    assert {name: round(value, 2) for name, value in vqav2["perQuestionType"].items()} == printed["perQuestionType"]
    textvqa = module("textvqa").score(REFERENCE["textvqa"]["records"])
    printed = REFERENCE["textvqa"]["expected"]["official"]["accuracy_percent_printed"]
    assert f"{100 * textvqa['accuracy']:.2f}" == printed
    one = module("scienceqa").score(REFERENCE["scienceqa"]["records"])
    assert (f"Total: {one['total']}, Correct: {one['correct']}, Accuracy: {one['accuracy']:.2f}%, IMG-Accuracy: "
            f"{one['img_accuracy']:.2f}%") == REFERENCE["scienceqa"]["expected"]["official"]["printed"]
    seed = module("seedbench").score(with_kinds(REFERENCE["seedbench"]["records"]))
    lines = [*((name, one) for name, one in seed["types"].items()), ("Total accuracy", seed["all"]),
             ("image accuracy", seed["image"]), ("video accuracy", seed["video"])]
    assert [f"{name}: {one['accuracy']:.2f}%" for name, one in lines] == \
        REFERENCE["seedbench"]["expected"]["official"]["printed"]


def headline(suite: str, figures: dict, key: str):
    if suite == "seedbench":
        return {kind: one["accuracy"] for kind, one in figures["types"].items()} if key == "types" else \
            figures[key]["accuracy"]
    return figures[key]["Overall"] if suite == "mmbench" else figures[key]


CASES = [(suite, case["case"]) for suite in NAMES for case in REFERENCE[suite]["edge_cases"]
         if not case["case"].startswith("the prompt's question")]  # that is found out where answers are matched


@pytest.mark.parametrize(("suite", "start"), CASES)
def test_where_a_script_fails_there_is_a_figure_or_a_reason(suite, start):
    case = edge_case(suite, start)
    suggested = {key: value for key, value in case["suggested"].items() if key != "why"}
    if "error" in suggested:
        with pytest.raises(UserError, match=suggested["error"]):
            module(suite).score(case["records"])
        return
    figures = module(suite).score(case["records"])
    assert suggested.pop("warn", "") in figures.get("warn", "")
    for key, value in suggested.items():
        ours = headline(suite, figures, key)
        if isinstance(value, dict):
            assert {kind: ours[kind] for kind in value} == value
        else:
            assert ours == value if value is None else math.isclose(ours, value, rel_tol=1e-9), key


@pytest.mark.parametrize("suite", NAMES)
def test_an_unknown_rule_and_no_predictions_are_named(suite):
    with pytest.raises(UserError, match="'strict'.*official"):
        module(suite).score(REFERENCE[suite]["records"], "strict")
    with pytest.raises(UserError, match="no predictions"):
        module(suite).score([])


@pytest.mark.parametrize("suite", NAMES)
def test_a_split_without_labels_says_so(suite):
    field = "answers" if "answers" in REFERENCE[suite]["records"][0] else "label"
    records = [{**record, field: None} for record in with_kinds(REFERENCE[suite]["records"])]
    assert "no right answers" in module(suite).score(records)["warn"] and module(suite).points(records) == {}


def test_numbers_of_missing_and_doubled_answers_are_told():
    records = [dict(record) for record in REFERENCE["gqa"]["records"] if record["isBalanced"]][:4]
    figures = module("gqa").score([*records, {**records[0], "answer": "zzz"},
                                   *({**record, "question_id": f"9{index}", "answer": None}
                                     for index, record in enumerate(records[:2]))])
    assert "2 questions have no answer, counted as wrong" in figures["warn"]
    assert f"question {records[0]['question_id']} answered twice; the last is used" in figures["warn"]
    assert sum(count for _, count in figures["accuracyPerLength"].values()) == 6
