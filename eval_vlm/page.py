"""The page of a run (report.html) or of a comparison (compare.html): one file that needs no network.

`page_scores.py` makes its tables, `page_questions.py` the data of its questions browser, `templates/` what it looks
like and does. Everything that comes from files is text to it: the template escapes, the script uses no HTML, and the
page's own policy (CSP) lets no other script run and nothing load.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, atomic_write, load_config, read_jsonl
from eval_vlm import page_questions, page_scores
from eval_vlm.config import EvalConfig
from eval_vlm.outcomes import Outcome, outcomes
from eval_vlm.predictions import predictions_file, read_routing, routing_file, with_grades
from eval_vlm.suites import picture_folder, report
from eval_vlm.suites.questions import read_json

TEMPLATES = Path(__file__).with_name("templates")


class Run:
    """What a page needs of a run's folder.

    Args:
        rule: how answers are read; None: the run's own.
        suites: those of the page; None: the run's own.

    Raises:
        UserError: the folder lacks config.yaml, or the predictions of a suite.
    """

    def __init__(self, folder: Path, rule: str | None = None, suites: list[str] | None = None):
        self.folder = folder
        self.config = load_config(EvalConfig, [str(folder / "config.yaml")], "eval_vlm.run")
        self.rule = rule or self.config.rule
        self.name = Path(self.config.model).name or self.config.model
        self.suites = [suite for suite in page_scores.COLUMNS if suite in (suites or self.config.suites)]
        self.fit = page_questions.fit(Path(self.config.model))
        self.predictions = {suite: self._read(suite) for suite in self.suites}
        self.outcomes: dict[str, dict[str, Outcome]] = {
            suite: outcomes(suite, rows, self.rule) for suite, rows in self.predictions.items()}
        self.pictures = {suite: picture_folder(suite, getattr(self.config, suite)) for suite in self.suites}
        self.routing = {suite: read_routing(routing_file(folder, suite), self.predictions[suite])
                        for suite in self.suites}

    def _read(self, suite: str) -> list[dict]:
        file = predictions_file(self.folder, suite)
        if not file.is_file():
            raise UserError(f"{file}: there are no predictions for a page; run eval_vlm.run again")
        return with_grades(self.folder, suite, read_jsonl(file))

    @functools.cached_property
    def parts(self) -> dict[str, dict]:
        """Per suite its part of scores.json; computed anew where the rule is another than the run's."""
        file = self.folder / "scores.json"
        scores = read_json(file) if file.is_file() else {"rule": None, "suites": {}}
        if scores["rule"] == self.rule and set(self.suites) <= set(scores["suites"]):
            return {suite: scores["suites"][suite] for suite in self.suites}
        known = page_scores.hashes(scores["suites"])
        return {suite: report(suite, self.predictions[suite], self.rule,
                              {"questions": ""} | known.get(suite, {})) for suite in self.suites}

    def facts(self) -> dict[str, Any]:
        """What the template shows of the run."""
        yes = [one for suite, rows in self.predictions.items()
               for one in page_scores.yes_ratios(suite, rows, self.outcomes[suite])]
        rows = {suite: page_scores.rows(suite, part, self.rule) for suite, part in self.parts.items()}
        return {"name": self.name, "config": self.config, "folder": str(self.folder), "rows": rows, "yes": yes,
                "headlines": {suite: page_scores.headline(suite, found) for suite, found in rows.items()},
                "hashes": page_scores.hashes(self.parts),
                "warnings": page_scores.warnings(self.config, self.parts, self.predictions, yes),
                "n": {suite: (len(found), len({row["image"] for row in found}))
                      for suite, found in self.predictions.items()},
                "objects": page_scores.objects(self.predictions.get("pope", []), self.outcomes.get("pope", {}))}


def write_run_page(run: Path) -> Path:
    """Writes report.html into a run's folder, from its config.yaml, scores.json and predictions, and returns its place.

    Raises:
        UserError: one of them is missing or broken. A missing picture is no error: a sentence stands in its place.
    """
    return _write(run / "report.html", [Run(run)], None)


def write_compare_page(result: dict[str, Any], file: Path) -> Path:
    """Writes the page of a comparison of two runs.

    Args:
        result: the content of compare.json; its `a` and `b` are the runs' folders.

    Raises:
        UserError: as `write_run_page`, or a question that only one of the runs has answered.
    """
    runs = [Run(Path(result[side]), result["rule"], list(result["suites"])) for side in ("a", "b")]
    if runs[0].name == runs[1].name:  # every model of train_vlm is called `model`
        for run in runs:
            run.name = str(run.folder)
    for suite in runs[0].suites:
        a, b = ({row["id"] for row in run.predictions[suite]} for run in runs)
        if a != b:
            raise UserError(f"{runs[0].folder} and {runs[1].folder} have not answered the same questions of {suite} "
                            f"({len(a ^ b)} only in one, such as {sorted(a ^ b)[0]}); run eval_vlm.run on both to "
                            "the end")
    return _write(file, runs, result["suites"])


def _write(file: Path, runs: list[Run], lines: dict[str, Any] | None) -> Path:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, script = ((TEMPLATES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    facts = [run.facts() for run in runs]
    page = environment.get_template("page.html").render(
        runs=facts, lines=lines, rule=runs[0].rule, columns=page_scores.COLUMNS,
        notes=page_scores.notes(facts[0]["headlines"]), style=Markup(style), script=Markup(script),
        style_hash=_hash(style), script_hash=_hash(script),
        data=Markup(page_questions.to_script(page_questions.browser_data(runs))))
    with atomic_write(file, "wb") as stream:
        stream.write(page.encode("utf-8", "replace"))  # half a surrogate pair is a question mark
    return file


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
