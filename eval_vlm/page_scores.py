"""What a page's tables show: the papers' row, every set and subtask, POPE's objects, how often the model says yes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from eval_vlm.config import YES_NO_SUITES
from eval_vlm.outcomes import Outcome
from eval_vlm.suites.mme import COGNITION, PERCEPTION

# In the order of LLaVA-1.5's and CLIP-MoE's tables: heading, and which of the suite's figures stands there.
COLUMNS = {"vqav2": ("VQAv2", "overall"), "gqa": ("GQA", "accuracy"), "vizwiz": ("VizWiz", "overall"),
           "scienceqa": ("SQA-I", "img_accuracy"), "textvqa": ("TextVQA", "accuracy"), "pope": ("POPE", "mean F1"),
           "mme": ("MME", "perception"), "mmbench": ("MMBench", "circular"), "mmbench_cn": ("MMBench-CN", "circular"),
           "seedbench": ("SEED", "image"), "llava_bench": ("LLaVA-W", "relative"), "mmvet": ("MM-Vet", "total"),
           "mmstar": ("MMStar", "all"), "ocrbench": ("OCRBench", "all")}
ALWAYS = 0.95  # a model that says one word this often is told of
OBJECT = re.compile(r"is there (an? (.+?) in) the im\w*\?", re.IGNORECASE)  # POPE's own files have "imange"


def rows(suite: str, part: dict[str, Any], rule: str) -> list[dict[str, Any]]:
    """Every figure of a suite with an interval, under its name in compare.json.

    Args:
        part: the suite's in scores.json.

    Returns:
        dicts with `name`, `value`, `interval` and `max`; where they apply `n`, `pictures`, `chance`, `always_yes`.
    """
    if suite == "pope":
        return _pope(part, rule)
    if suite == "mme":
        return _mme(part)
    found = [{"name": name, "value": one["score"], "interval": one["interval"], "max": 100, "n": one["n"],
              "pictures": one["pictures"]} for name, one in part["scores"].items()]
    relative = part["figures"].get("all", {}).get("relative") if suite == "llava_bench" else None
    if relative is not None:
        found.insert(0, {"name": "relative", "value": relative, "interval": None, "max": 100})
    return found


def _pope(part: dict[str, Any], rule: str) -> list[dict[str, Any]]:
    """Percent, whatever the rule's own unit."""
    unit = 1 if rule == "vlmevalkit" else 100
    found = []
    for key, suffix in (("accuracy", ""), ("f1_score" if rule == "lmms_eval" else "f1", " F1")):
        short = "f1" if suffix else key
        for name, one in part.items():
            interval = one.get(f"{short}_interval")
            row = {"name": f"{name} {short}" if name == "mean" and not suffix else name + suffix, "max": 100,
                   "value": unit * one[key], "interval": interval and [unit * bound for bound in interval],
                   "n": one.get("n"), "pictures": one.get("pictures")}
            if "always_yes" in one:
                row["always_yes"] = unit * one["always_yes"][short]
            if "chance" in one and not suffix:
                row["chance"] = unit * one["chance"]
            found.append(row)
    return found


def _mme(part: dict[str, Any]) -> list[dict[str, Any]]:
    tasks = {name: one for name, one in part.items() if isinstance(one, dict)}
    found = [{"name": name, "value": one["score"], "interval": one["interval"], "max": 200, "n": one["n"],
              "pictures": one["pictures"], "chance": one["chance"], "always_yes": one["always_yes"]}
             for name, one in tasks.items()]
    sums = {"perception": PERCEPTION, "cognition": COGNITION, "total": tuple(tasks)}
    return found + [{"name": name, "value": part[name], "interval": part.get(f"{name}_interval"),
                     "max": 200 * len(members),
                     **{key: sum(tasks[task][key] for task in members) for key in ("chance", "always_yes")}}
                    for name, members in sums.items() if part.get(name) is not None]


def headline(suite: str, found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of `found` that stands in the papers' table; of an MME without all of perception the sum of what is
    there, of a POPE without all three sets the F1 of all questions."""
    by_name = {row["name"]: row for row in found}
    instead = {"mme": "total", "pope": "all F1"}.get(suite)
    return by_name.get(COLUMNS[suite][1]) or by_name.get(instead)


def notes(headlines: dict[str, dict[str, Any] | None]) -> list[str]:
    """What the papers' table holds, in words."""
    found = []
    if row := headlines.get("pope"):
        found.append("POPE: mean F1 of the three sets, as LLaVA gives it." if row["name"] == "mean F1" else
                     "POPE: F1 over the sets that were run; LLaVA gives the mean of all three.")
    if row := headlines.get("mme"):
        found.append("MME: the sum of the ten perception subtasks, of 2,000." if row["name"] == "perception" else
                     f"MME: the sum of the {row['max'] // 200} subtasks that were run, of {row['max']:,}; papers give "
                     "the ten of perception.")
    if headlines.get("llava_bench"):
        found.append("LLaVA-W: percent of the reference's points, which has no interval here.")
    absent = [COLUMNS[suite][0] for suite, row in headlines.items() if row is None]
    if absent:
        found.append(f"{', '.join(absent)}: run, but there is nothing to score (see the warnings).")
    return found


def yes_ratios(suite: str, records: list[dict], outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Per set or subtask of a yes/no suite: `name`, `n`, `yes` and `no` (how often the answer is read as that) and
    `label_yes`, shares of 1."""
    if suite not in YES_NO_SUITES:
        return []
    found = []
    for name in dict.fromkeys(record["category"] for record in records):
        chosen = [record for record in records if record["category"] == name]
        read = [outcomes[record["id"]].read.lower() for record in chosen]
        found.append({"suite": suite, "name": name, "n": len(chosen),
                      "yes": read.count("yes") / len(chosen), "no": read.count("no") / len(chosen),
                      "label_yes": sum(record["label"].lower() == "yes" for record in chosen) / len(chosen)})
    return found


def objects(records: list[dict], outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Per object that POPE asks for: `TP FP FN TN`, `errors`, and the words that find its questions (`search`).

    An answer that is neither yes nor no is counted as the wrong one of the two.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if not (match := OBJECT.search(record["question"])):
            continue
        cells = found.setdefault(match[2].lower(), {"search": match[1], "TP": 0, "FP": 0, "FN": 0, "TN": 0})
        cells[("T" if outcomes[record["id"]].value == 1 else "F")
              + ("P" if (record["label"] == "yes") == (outcomes[record["id"]].value == 1) else "N")] += 1
    for cells in found.values():
        cells["errors"] = cells["FP"] + cells["FN"]
    return dict(sorted(found.items(), key=lambda item: (-item[1]["errors"], item[0])))


def warnings(config: Any, parts: dict[str, dict], records: dict[str, list[dict]], yes: Iterable[dict]) -> list[str]:
    """What a reader must know before the figures, one sentence each."""
    found = []
    for suite, asked in records.items():
        heading = COLUMNS[suite][0]
        if config.limit is not None:
            found.append(f"{heading}: only the first questions were asked (limit={config.limit}); this is no benchmark "
                         "figure.")
        found += _counted(heading, asked, lambda row: row.get("cut", False),
                          f"cut at max_new_tokens={config.max_new_tokens}; a larger one lets the model finish")
        found += _counted(heading, asked, lambda row: not row["answer"], "empty")
        found += [f"{heading}{'' if name == 'questions' else ', ' + name}: {one['warn']}."
                  for name, one in parts[suite].items() if isinstance(one, dict) and one.get("warn")]
    for one in yes:
        for word in ("yes", "no"):
            if one[word] >= ALWAYS:
                label = one["label_yes"] if word == "yes" else 1 - one["label_yes"]
                found.append(f"{COLUMNS[one['suite']][0]}, {one['name']}: the model says {word} to "
                             f"{100 * one[word]:.0f}% of the questions, where {100 * label:.0f}% are right.")
    return found


def _counted(heading: str, asked: list[dict], chosen: Callable[[dict], bool], words: str) -> list[str]:
    count = sum(map(chosen, asked))
    return [f"{heading}: {count:,} of {len(asked):,} answers {'is' if count == 1 else 'are'} {words}."] if count else []


def hashes(parts: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Per suite the sha256 of its question files, by set or subtask."""
    return {suite: {name: one["questions_sha256"] for name, one in part.items()
                    if isinstance(one, dict) and one.get("questions_sha256")} for suite, part in parts.items()}
