"""MMBench in Chinese: mmbench.py under a name of its own, so that one run asks both languages.

Files: `mmbench_dev_cn_20231003.tsv` and its like, or lmms-lab/MMBench (subset cn).
"""

from __future__ import annotations

from eval_vlm.config import MmbenchCnConfig
from eval_vlm.suites import mmbench
from eval_vlm.suites.mmbench import SUBMISSION, parse, points, prompt, score, write_submission

__all__ = ["SUBMISSION", "load", "parse", "points", "prompt", "score", "write_submission"]


def load(config: MmbenchCnConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises as mmbench's."""
    records, hashes = mmbench.load(config, limit)
    return [{**record, "suite": "mmbench_cn"} for record in records], hashes
