"""The run at a glance: `summary.md` and `loss.png`."""

from __future__ import annotations

from pathlib import Path

from clipmoe_vlm.runs import atomic_write, read_jsonl
from train_vlm.config import VLMConfig


def write_summary(output: Path, config: VLMConfig, trained_parts: str) -> None:
    """Summarises `metrics.jsonl` of a finished run."""
    rows = read_jsonl(output / "metrics.jsonl")
    _plot(rows, output / "loss.png")
    last = rows[-max(1, len(rows) // 10):]
    lines = [
        f"# VLM training: {output.name}",
        "",
        f"{len(rows)} steps of {config.global_batch_size} samples, template `{config.template}`, "
        f"ZeRO {config.zero_stage}, {config.precision}.",
        "",
        "```",
        trained_parts,
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| language-model loss, first step | {rows[0]['lm_loss']:.4f} |",
        f"| the same, mean of the last {len(last)} steps | {sum(row['lm_loss'] for row in last) / len(last):.4f} |",
        f"| auxiliary loss of the routers, last step | {rows[-1]['aux_loss']:.4f} |",
        f"| samples used, skipped, truncated | {sum(r['samples'] for r in rows)}, {sum(r['skipped'] for r in rows)}, "
        f"{sum(r['truncated'] for r in rows)} |",
        f"| label tokens | {sum(r['label_tokens'] for r in rows)} |",
        f"| tokens per second, mean | {sum(r['tokens_per_second'] for r in rows) / len(rows):.0f} |",
        "",
        "![loss](loss.png)",
        "",
    ]
    with atomic_write(output / "summary.md") as stream:
        stream.write("\n".join(lines))


def _plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["lm_loss"] for row in rows], label="language-model loss")
    if any(row["aux_loss"] for row in rows):
        axes.plot(steps, [row["aux_loss"] for row in rows], label="router aux loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)
