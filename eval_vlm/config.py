"""Configuration of an evaluation run."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from clipmoe_vlm.runs import UserError

SUITES = ("pope", "mme")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass
class PopeConfig:
    questions_dir: str = ""  # holds coco_pope_{random,popular,adversarial}.json
    image_folder: str = ""  # what the files' `image` is relative to


@dataclass
class MmeConfig:
    folder: str = ""  # holds one folder per subtask


@dataclass
class EvalConfig:
    model: str = MISSING  # a VLM folder that LlavaForConditionalGeneration loads
    output_dir: str = MISSING
    suites: list[str] = field(default_factory=lambda: list(SUITES))
    pope: PopeConfig = field(default_factory=PopeConfig)
    mme: MmeConfig = field(default_factory=MmeConfig)
    rule: str = "official"  # how answers are read: official | lmms_eval | vlmevalkit
    prompt_suffix: str = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's, after each question
    batch_size: int = 16  # questions at once; changes no answer
    max_new_tokens: int = 128
    precision: str = "auto"  # auto | fp32 | bf16 | fp16; auto: fp32 on a CPU, bf16 on a GPU
    limit: int | None = None  # questions per set or subtask, rounded up to whole pictures; null: all
    seed: int = 0  # of the bootstrap intervals; decoding is greedy


def check(config: EvalConfig) -> None:
    """Refuses values that no run can use.

    Raises:
        UserError: names the key.
    """
    for suite in config.suites:
        if suite not in SUITES:
            raise UserError(f"suites: there is no suite '{suite}'; the suites are {', '.join(SUITES)}")
    if not config.suites:
        raise UserError(f"suites: the list is empty; name some of {', '.join(SUITES)}")
    if config.precision not in PRECISIONS:
        raise UserError(f"precision: '{config.precision}' is unknown; choose one of {', '.join(PRECISIONS)}")
    for key in ("batch_size", "max_new_tokens"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}: {getattr(config, key)} is less than 1; give a positive number")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit: {config.limit} is less than 1; give a positive number, or null for all questions")
    needed = {"pope": ("questions_dir", "image_folder"), "mme": ("folder",)}
    for suite in config.suites:
        for key in needed[suite]:
            if not getattr(getattr(config, suite), key):
                raise UserError(f"{suite}.{key} is empty; name the folder, or leave {suite} out of suites")
