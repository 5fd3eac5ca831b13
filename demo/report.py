"""The demo's result page: `python -m demo.report RUN_FOLDER` reads what the programs wrote there and nothing else.

Writes `report.html` (one file, no network needed), `result.png` (the README's picture) and `summary.json` to the
folder, and prints one table. `demo/report_facts.py` reads and computes, `demo/report_figures.py` draws.
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
    """Writes the three files into the run's folder and returns the facts.

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
    write_json(run / "summary.json", facts["summary"])
    return facts


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
