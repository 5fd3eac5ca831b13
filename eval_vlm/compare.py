"""Paired difference of two evaluation runs: `python -m eval_vlm.compare RUN_A RUN_B [rule=official] [output=FILE]`.

Both runs must have answered the same questions. Prints a table of B minus A per set and subtask, with 95% intervals
clustered by picture and two-sided p-values, and writes them to RUN_B/compare.json (or `output`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, fail, read_jsonl, write_json
from eval_vlm.config import SUITES
from eval_vlm.report import with_interval
from eval_vlm.suites import check_rule, compare, rules_of

USAGE = "usage: python -m eval_vlm.compare RUN_A RUN_B [rule=official] [output=FILE]"


def compare_runs(run_a: Path, run_b: Path, rule: str = "official") -> dict[str, Any]:
    """The content of compare.json.

    Raises:
        UserError: no suite that both runs hold, or different questions.
    """
    result: dict[str, Any] = {"a": str(run_a), "b": str(run_b), "rule": rule, "suites": {}}
    for name in SUITES:
        files = [run / "predictions" / f"{name}.jsonl" for run in (run_a, run_b)]
        if not all(file.is_file() for file in files):
            continue
        check_rule(rule, rules_of(name))
        rows_a, rows_b = (read_jsonl(file) for file in files)
        asked_a, asked_b = ({(row["id"], row["image"], row["question"], str(row.get("label"))) for row in rows}
                            for rows in (rows_a, rows_b))
        if asked_a != asked_b:
            example = sorted(asked_a ^ asked_b)[0][0]
            raise UserError(f"{files[0]} and {files[1]} answer different questions ({len(asked_a ^ asked_b)} differ, "
                            f"such as {example}); score both models on the same files to the end")
        result["suites"][name] = compare(name, rows_a, rows_b, rule)
    if not result["suites"]:
        raise UserError(f"{run_a} and {run_b} have no suite's predictions in common; name two output folders of "
                        "eval_vlm.run")
    return result


def table(result: dict[str, Any]) -> str:
    lines = [f"A: {result['a']}", f"B: {result['b']}", "",
             "| suite | set | n | A | B | B - A [95%] | p |", "|---|---|---|---|---|---|---|"]
    for suite, categories in result["suites"].items():
        unit = 100 if suite == "pope" else 1
        for name, one in categories.items():
            p_value = "-" if one["p_value"] is None else f"{one['p_value']:.3f}"
            lines.append(f"| {suite} | {name} | {one['n']} | {unit * one['a']:.1f} | {unit * one['b']:.1f} | "
                         f"{with_interval(one['difference'], one['interval'], unit)} | {p_value} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    runs = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(runs) != 2 or set(options) - {"rule", "output"}:
        raise UserError(USAGE)
    result = compare_runs(Path(runs[0]), Path(runs[1]), options.get("rule", "official"))
    write_json(options.get("output", Path(runs[1]) / "compare.json"), result)
    print(table(result))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
