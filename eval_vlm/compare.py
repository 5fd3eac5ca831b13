"""Paired difference of two evaluation runs: `python -m eval_vlm.compare A B [rule=official] [output=FILE]`.

A and B are output folders of eval_vlm.run, or several with commas between (`A1,A2,A3`): models trained with several
seeds, whose mean is compared. All must have answered the same questions. Prints B minus A per set and subtask, with 95%
intervals clustered by picture and p-values, and writes them to compare.json in the (first) folder of B, or to `output`.
Of two runs it makes a page too, compare.html beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from clipmoe_vlm.intervals import pooled_difference
from clipmoe_vlm.runs import UserError, fail, read_jsonl, write_json
from eval_vlm.config import SUITES
from eval_vlm.outcomes import flips, outcomes
from eval_vlm.page import write_compare_page
from eval_vlm.predictions import predictions_file, with_grades
from eval_vlm.report import with_interval
from eval_vlm.stats import as_line, holm
from eval_vlm.suites import check_rule, compare, estimates, rules_of

USAGE = "usage: python -m eval_vlm.compare A B [rule=official] [output=FILE]; A and B are runs, or runs with commas"


def compare_runs(run_a: Path, run_b: Path, rule: str = "official") -> dict[str, Any]:
    """The content of compare.json: `suites` (per suite and category a line of eval_vlm/stats.py, with `p_holm` over all
    of them) and `flips` (per suite the ids of questions that b answers `better`, and `worse`).

    Raises:
        UserError: no suite that both runs hold, or different questions.
    """
    result: dict[str, Any] = {"a": str(run_a), "b": str(run_b), "rule": rule, "suites": {}, "flips": {}}
    for name, (rows_a, rows_b) in read_runs([run_a, run_b], rule).items():
        result["suites"][name] = compare(name, rows_a, rows_b, rule)
        result["flips"][name] = flips(outcomes(name, rows_a, rule), outcomes(name, rows_b, rule))
    return with_holm(result)


def pool_runs(runs_a: list[Path], runs_b: list[Path], rule: str = "official") -> dict[str, Any]:
    """As `compare_runs`, of the means over models of several seeds; there are no flips.

    Raises:
        UserError: also a side of one run.
    """
    if min(len(runs_a), len(runs_b)) < 2:
        raise UserError("pooling needs the runs of two seeds or more on each side, with commas between: A1,A2 B1,B2")
    twice = [run for run in {*runs_a, *runs_b} if [*runs_a, *runs_b].count(run) > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice; each run is the model of another seed")
    result: dict[str, Any] = {"a": [str(run) for run in runs_a], "b": [str(run) for run in runs_b], "rule": rule,
                              "suites": {}}
    for name, runs in read_runs([*runs_a, *runs_b], rule).items():
        figures = [estimates(name, rows, rule) for rows in runs]
        a, b = figures[:len(runs_a)], figures[len(runs_a):]
        categories = [category for category in figures[0] if all(category in one for one in figures)]
        result["suites"][name] = {category: as_line(
            sum(one[category].value for one in a) / len(a), sum(one[category].value for one in b) / len(b),
            pooled_difference([one[category] for one in b], [one[category] for one in a]))
            for category in categories}
    return with_holm(result)


def read_runs(runs: list[Path], rule: str) -> dict[str, list[list[dict]]]:
    """Per suite the predictions of each run.

    Raises:
        UserError: no suite in common, an unknown rule, other questions or prompts.
    """
    found = {}
    for name in SUITES:
        files = [predictions_file(run, name) for run in runs]
        if not all(file.is_file() for file in files):
            continue
        check_rule(rule, rules_of(name))
        rows = [read_jsonl(file) for file in files]
        asked = [_asked(one, file) for one, file in zip(rows, files, strict=True)]
        for file, one in zip(files[1:], asked[1:], strict=True):
            if one != asked[0]:
                different = sorted(question for question in one.keys() | asked[0].keys()
                                   if one.get(question) != asked[0].get(question))
                raise UserError(f"{files[0]} and {file} answer different questions, or with different prompts "
                                f"({len(different)} differ, such as {different[0]}); score all models on the same "
                                "files, with the same prompt_suffix, to the end")
        found[name] = [with_grades(run, name, one) for run, one in zip(runs, rows, strict=True)]
    if not found:
        raise UserError(f"{' and '.join(map(str, runs))} have no suite's predictions in common; name output folders of "
                        "eval_vlm.run")
    return found


def _asked(rows: list[dict], file: Path) -> dict[str, tuple]:
    """Question id -> what was asked, and what is right."""
    fields = ("image", "question", "label", "answers", "prompt")
    for number, row in enumerate(rows, 1):
        absent = [field for field in ("id", "answer") if not isinstance(row.get(field), str)]
        if absent:
            raise UserError(f"{file}, line {number} is not a prediction of eval_vlm.run (no {', '.join(absent)}); "
                            "run eval_vlm.run again, it mends or names the line")
    return {row["id"]: tuple(str(row.get(field)) for field in fields) for row in rows}


def with_holm(result: dict[str, Any]) -> dict[str, Any]:
    lines = [line for categories in result["suites"].values() for line in categories.values()]
    for line, p_value in zip(lines, holm([line["p_value"] for line in lines]), strict=True):
        line["p_holm"] = p_value
    return result


def show(result: dict[str, Any], width: int | None = None) -> None:
    """Prints the table, how many questions flipped, and what it all supports."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=width)
    for side in ("a", "b"):
        runs = result[side] if isinstance(result[side], list) else [result[side]]
        console.print(f"{side.upper()}: {', '.join(runs)}", markup=False, soft_wrap=True)
    table = Table()
    for name in ("suite", "set", "n", "A", "B", "B - A [95%]", "p", "p (Holm)"):
        table.add_column(name, justify="left" if name in ("suite", "set") else "right")
    lines = [(suite, name, line) for suite, part in result["suites"].items() for name, line in part.items()]
    for suite, name, line in lines:
        unit = 100 if suite == "pope" else 1
        table.add_row(suite, escape(name), str(line["n"]), f"{unit * line['a']:.1f}", f"{unit * line['b']:.1f}",
                      escape(with_interval(line["difference"], line["interval"], unit)),
                      *("-" if line[key] is None else f"{line[key]:.3f}" for key in ("p_value", "p_holm")))
    console.print(table)
    for suite, flipped in result.get("flips", {}).items():
        console.print(f"{suite}: B answers {len(flipped['better'])} questions better than A, {len(flipped['worse'])} "
                      "worse", markup=False)
    console.print(verdict(result), markup=False)


def verdict(result: dict[str, Any]) -> str:
    """What the table supports, in a sentence or two."""
    lines = [line for part in result["suites"].values() for line in part.values() if line["p_value"] is not None]
    clear = sum(line["p_value"] < 0.05 for line in lines)
    held = sum(line["p_holm"] < 0.05 for line in lines)
    seeds = (f"Over {len(result['a'])} and {len(result['b'])} seeds. " if isinstance(result["a"], list) else
             "One training run each: another seed would move both. ")
    if not clear:
        return f"{seeds}No difference beyond chance in any of {len(lines)} figures."
    return (f"{seeds}{clear} of {len(lines)} figures differ by themselves (p < 0.05), {held} when all are looked at "
            "together (Holm).")


def main(arguments: list[str]) -> None:
    options = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("rule=", "output=")))
    sides = [argument.split(",") for argument in arguments if not argument.startswith(("rule=", "output="))]
    if len(sides) != 2:
        raise UserError(USAGE)
    a, b = ([Path(run) for run in side] for side in sides)
    rule = options.get("rule", "official")
    output = Path(options.get("output", b[0] / "compare.json"))
    if output.suffix != ".json":
        raise UserError(f"output={output}: name a file ending with .json; the page is written beside it as .html")
    result = compare_runs(a[0], b[0], rule) if len(a) == len(b) == 1 else pool_runs(a, b, rule)
    write_json(output, result)
    show(result, None if sys.stdout.isatty() else 120)
    if len(a) > 1:  # a page shows the answers of two models
        return
    try:
        print(f"The report: {write_compare_page(result, output.with_suffix('.html')).resolve()}")
    except UserError as error:  # the figures are there, whatever else of the runs is not
        print(f"no report: {error}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
