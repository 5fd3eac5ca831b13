"""The demo's result page: `python -m demo.report RUN_FOLDER` reads what the programs wrote there and nothing else.

Writes `report.html` (one file, no network needed), `summary.json`, and for the repository's own documentation
`result.png` and `results.md`; prints one table. `report_facts.py` reads and computes, `report_figures.py` draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table

from clipmoe_vlm.runs import UserError, atomic_write, fail, write_json
from demo import report_figures as figures
from demo.report_facts import KIND_NAMES, gather, in_words, percent

TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(run: Path) -> dict:
    """Writes the four files into the run's folder and returns the facts.

    Raises:
        UserError: a file that a program should have written is missing or broken.
    """
    facts = gather(run)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["in_words"] = in_words
    pictures = {
        "hard": figures.data_uri(figures.hard_captions(facts)),
        "losses": figures.data_uri(figures.losses(facts["losses"])),
        "load": figures.data_uri(figures.expert_load(facts["routing"])),
        "maps": figures.data_uri(figures.routing_maps(facts["maps"]), "png"),
        "clusters": figures.data_uri(figures.cluster_sizes(facts["clusters"])),
    }
    page = environment.get_template(TEMPLATE.name).render(facts=facts, pictures=pictures, kind_names=KIND_NAMES)
    with atomic_write(run / "report.html") as stream:
        stream.write(page)
    with atomic_write(run / "result.png", "wb") as stream:
        stream.write(figures.drawn(figures.result(facts), "png"))
    with atomic_write(run / "results.md") as stream:
        stream.write(markdown(facts))
    write_json(run / "summary.json", facts["summary"])
    return facts


def markdown(facts: dict) -> str:
    """The main tables, times and versions."""
    made, kinds = facts["made"], facts["kinds"]
    lines = [f"# What `make demo` gave (size {made['size']}, language model {made['llm']})", "",
             f"Written by `python -m demo.report`. One run, one seed. {facts['headline']}", "",
             "Hard captions right, % (a coin: 50), with 95% intervals clustered by picture:", "",
             "| | " + " | ".join(KIND_NAMES[kind] for kind in kinds) + " |", "|---|" + "---|" * len(kinds)]
    lines += [f"| {model['title']} | " + " | ".join(percent(model["hard"][kind]) for kind in kinds) + " |"
              for model in facts["models"]]
    lines += ["", *(f"- {sentence}" for sentence in facts["verdict"]["against"]), "",
              "The VLM with each tower (POPE: accuracy in %; MME: points), the difference paired:", "",
              "| | questions | base tower | CLIP-MoE tower | difference | always yes | chance |",
              "|---|---|---|---|---|---|---|"]
    lines += [f"| {row['suite']} {row['name']} | {row['n']} | {row['base']} | {row['clipmoe']} | {row['difference']} | "
              f"{row['always_yes']:.1f} | {row['chance']:.1f} |" for row in facts["vlm_rows"]]
    lines += ["", "Goals:", "", *(f"- {'met' if goal['met'] else 'not met'}: {goal['what']} ({goal['found']})"
                                  for goal in facts["targets"])]
    lines += ["", f"{made['seconds'] / 60:.0f} minutes after set-up on {made['machine']}; Python {made['python']}, "
              + ", ".join(f"{name} {version}" for name, version in made["versions"].items()) + ".", "",
              "| step (two run side by side) | seconds |", "|---|---|"]
    lines += [f"| {step['name']} | {step['seconds']:.0f} |" for step in made["timing"]]
    return "\n".join(lines) + "\n"


def print_table(facts: dict, console: Console) -> None:
    """Hard captions of the encoders, POPE and MME of the VLMs; everything with its 95% interval."""
    table = Table(title="Hard captions right, % (a coin: 50) [95% interval]")
    table.add_column("")
    for kind in facts["kinds"]:
        table.add_column(KIND_NAMES[kind], justify="right")
    for model in facts["models"]:
        table.add_row(model["title"], *(percent(model["hard"][kind]) for kind in facts["kinds"]))
    console.print(table)
    table = Table(title="The VLM with each tower")
    for name in ("", "base tower", "CLIP-MoE tower", "difference"):
        table.add_column(name, justify="right" if name else "left")
    for row in facts["vlm_rows"]:
        if row["headline"]:
            table.add_row(f"{row['suite']} {row['name']}", row["base"], row["clipmoe"], row["difference"])
    console.print(table)
    console.print(facts["headline"], highlight=False)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UserError("usage: python -m demo.report RUN_FOLDER (such as runs/demo)")
    run = Path(arguments[0])
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; make it with `make demo`")
    facts = write_report(run)
    print_table(facts, Console(width=None if sys.stdout.isatty() else 120))
    print(f"\nThe report: {(run / 'report.html').resolve()}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
