"""summary.md: the scores as tables, beside what saying yes to everything and chance would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import atomic_write
from eval_vlm.suites.mme import COGNITION, PERCEPTION


def write_summary(file: Path, scores: dict[str, Any]) -> None:
    """Writes the summary of `scores` (the content of scores.json) to `file`."""
    lines = [f"# Scores of {scores['model']}", "",
             f"Rule `{scores['rule']}`, batch size {scores['batch_size']}, greedy decoding. Brackets: 95% intervals, "
             "clustered by picture.", ""]
    if "pope" in scores["suites"]:
        lines += pope_table(scores["suites"]["pope"], scores["rule"])
    if "mme" in scores["suites"]:
        lines += mme_table(scores["suites"]["mme"])
    for suite, part in scores["suites"].items():
        if suite not in ("pope", "mme"):
            lines += means_table(suite, part)
    for suite, count in scores["cut_answers"].items():
        if count:
            lines += [f"- {suite}: {count} of {scores['answers'][suite]} answers were cut at "
                      f"max_new_tokens={scores['max_new_tokens']}; a larger one lets the model finish", ""]
    lines += ["Question files (sha256):", ""]
    for suite, categories in scores["suites"].items():
        lines += [f"- {suite} {name}: `{figures['questions_sha256']}`" for name, figures in categories.items()
                  if isinstance(figures, dict) and figures.get("questions_sha256")]
    if scores["submissions"]:
        lines += ["", "For the benchmarks' servers and judges:", ""]
        lines += [f"- {suite}: {place}" for suite, place in scores["submissions"].items()]
    with atomic_write(file) as stream:
        stream.write("\n".join(lines) + "\n")


def headline(scores: dict[str, Any]) -> dict[str, float]:
    """The main figures of `scores`, by `suite/set`: POPE's F1 in percent, MME's points, the scores of the others."""
    unit = 1 if scores["rule"] == "vlmevalkit" else 100
    f1 = "f1_score" if scores["rule"] == "lmms_eval" else "f1"
    found = {}
    for suite, part in scores["suites"].items():
        if suite == "pope":
            figures = {name: unit * one[f1] for name, one in part.items() if name != "all"}
        elif suite == "mme":
            figures = {name: part[name] for name in ("perception", "cognition", "total")}
        else:
            figures = {name: one["score"] for name, one in part["scores"].items()}
        found |= {f"{suite}/{name}": value for name, value in figures.items() if value is not None}
    return found


def pope_table(sets: dict[str, Any], rule: str) -> list[str]:
    unit = 1 if rule == "vlmevalkit" else 100
    f1 = "f1_score" if rule == "lmms_eval" else "f1"
    lines = ["## POPE", "",
             "Percent. Always yes: accuracy and F1 of a model that says yes to everything; chance is 50.", "",
             "| set | questions | pictures | accuracy | F1 | precision | recall | yes | always yes |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, one in sets.items():
        if name == "mean":
            rest = " | ".join(f"{unit * one[key]:.1f}" for key in ("precision", "recall", "yes_ratio"))
            lines.append(f"| mean of the sets | | | {with_interval(one['accuracy'], one['accuracy_interval'], unit)} "
                         f"| {with_interval(one[f1], one['f1_interval'], unit)} | {rest} | |")
            continue
        yes_ratio = f"{unit * one['yes_ratio']:.1f}" if "yes_ratio" in one else "-"
        lines.append(
            f"| {name} | {one['n']} | {one['pictures']} "
            f"| {with_interval(one['accuracy'], one['accuracy_interval'], unit)} "
            f"| {with_interval(one[f1], one['f1_interval'], unit)} | {unit * one['precision']:.1f} | "
            f"{unit * one['recall']:.1f} | {yes_ratio} | {unit * one['always_yes']['accuracy']:.1f}, "
            f"{unit * one['always_yes']['f1']:.1f} |")
    return lines + [""] + warnings(sets)


def mme_table(tasks: dict[str, Any]) -> list[str]:
    lines = ["## MME", "", "Points: 100 x accuracy + 100 x share of pictures with both questions right. Neither: "
             "answers read as neither yes nor no, which are wrong.", "",
             "| subtask | pictures | score (of 200) | accuracy % | both right % | neither | always yes | chance |",
             "|---|---|---|---|---|---|---|---|"]
    scored = {name: one for name, one in tasks.items() if isinstance(one, dict)}
    for name, one in scored.items():
        lines.append(f"| {name} | {one['pictures']} | {with_interval(one['score'], one['interval'])} | "
                     f"{100 * one['acc']:.1f} | {100 * one['acc_plus']:.1f} | {one['other']} | "
                     f"{one['always_yes']:.1f} | {one['chance']:.1f} |")
    lines.append(f"| total (of {tasks['total_max']}) | | {with_interval(tasks['total'], tasks['total_interval'])} "
                 "| | | | "
                 f"{sum(one['always_yes'] for one in scored.values()):.1f} | "
                 f"{sum(one['chance'] for one in scored.values()):.1f} |")
    lines.append("")
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        absent = ", ".join(task for task in members if task not in scored)
        lines.append(f"- {name}: " + (f"no sum, without {absent}" if absent else
                                      f"{with_interval(tasks[name], tasks[f'{name}_interval'])} of "
                                      f"{200 * len(members)}"))
    return lines + [""] + warnings(scored)


def means_table(suite: str, part: dict[str, Any]) -> list[str]:
    """Of the suites whose headline figures are means over questions."""
    lines = [f"## {suite}", "", "| figure | questions | pictures | score |", "|---|---|---|---|"]
    lines += [f"| {name} | {one['n']} | {one['pictures']} | {with_interval(one['score'], one['interval'])} |"
              for name, one in part["scores"].items()]
    return lines + [""] + warnings({"questions": part["questions"]})


def warnings(categories: dict[str, Any]) -> list[str]:
    lines = [f"- {name}: {one['warn']}" for name, one in categories.items() if one.get("warn")]
    lines += [f"- {name}: {one['empty_answers']} of {one['n']} answers are empty" for name, one in categories.items()
              if one.get("empty_answers")]
    return [*lines, ""] if lines else []


def with_interval(value: float, interval: list[float] | None, unit: float = 1, places: int = 1) -> str:
    text = f"{unit * value:.{places}f}"
    return text if interval is None else (
        f"{text} [{unit * interval[0]:.{places}f}, {unit * interval[1]:.{places}f}]")
