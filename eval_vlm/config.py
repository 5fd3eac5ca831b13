"""Configuration of an evaluation run."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from clipmoe_vlm.runs import UserError

SUITES = ("pope", "mme", "gqa", "vqav2", "textvqa", "vizwiz", "scienceqa", "mmbench", "mmbench_cn", "seedbench",
          "mmstar", "ocrbench", "mmvet", "llava_bench")
SOURCE = dict.fromkeys(SUITES, "questions") | {"pope": "questions_dir", "mme": "folder"}  # the key of the question file
YES_NO_SUITES = ("pope", "mme")  # every answer of theirs is yes or no
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ANSWERING = ("generate", "yes_no")


@dataclass
class PopeConfig:
    questions_dir: str = ""  # holds coco_pope_{random,popular,adversarial}.json; or a `datasets` folder or hub name
    image_folder: str = ""  # what the files' `image` is relative to; pictures inside a dataset are written there
    source: str = "coco"  # coco | aokvqa | gqa: which three files
    split: str = "test"  # of a dataset


@dataclass
class MmeConfig:
    folder: str = ""  # holds one folder per subtask; or a `datasets` folder or hub name
    image_folder: str = ""  # of a dataset: where its pictures are written
    split: str = "test"


@dataclass
class QuestionsConfig:
    """What every other suite has; its module names the files."""

    questions: str = ""  # question file, or a `datasets` folder or hub name with lmms-lab's columns
    image_folder: str = ""  # where the pictures are; pictures inside `questions` are written there
    split: str = "test"  # of a dataset or split file


@dataclass
class GqaConfig(QuestionsConfig):
    split: str = "testdev"
    subset: str = "testdev_balanced_instructions"  # of a dataset
    images: str = ""  # a dataset's pictures (columns id, image), a dataset of their own


@dataclass
class Vqav2Config(QuestionsConfig):
    annotations: str = ""  # v2_mscoco_val2014_annotations.json; "": a test split, or a dataset with answers
    split: str = "validation"


@dataclass
class TextvqaConfig(QuestionsConfig):
    ocr_tokens: str = ""  # file with OCR tokens for the prompt (LLaVA's or Rosetta's), or `column`; "": without
    split: str = "validation"


@dataclass
class VizwizConfig(QuestionsConfig):
    split: str = "val"


@dataclass
class ScienceqaConfig(QuestionsConfig):
    subset: str = "ScienceQA-IMG"  # of a dataset
    images_only: bool = True  # ScienceQA-IMG; false: questions without a picture too (for scoring)


@dataclass
class MmbenchConfig(QuestionsConfig):
    language: str = "en"  # en | cn: the prompt's, and a dataset's subset
    circular: bool = True  # every rotation of the choices; false: the unrotated questions only
    split: str = "dev"


@dataclass
class MmbenchCnConfig(MmbenchConfig):
    language: str = "cn"


@dataclass
class SeedbenchConfig(QuestionsConfig):
    images_only: bool = True  # false: questions about videos too, by LLaVA's middle frames


@dataclass
class MmstarConfig(QuestionsConfig):
    split: str = "val"


@dataclass
class OcrbenchConfig(QuestionsConfig):
    pass


@dataclass
class MmvetConfig(QuestionsConfig):
    pass


@dataclass
class LlavaBenchConfig(QuestionsConfig):
    split: str = "train"


@dataclass
class EvalConfig:
    model: str = MISSING  # a VLM folder (train_vlm's, or any of transformers' Llava family), or its name on the hub
    output_dir: str = MISSING
    suites: list[str] = field(default_factory=lambda: ["pope", "mme"])
    pope: PopeConfig = field(default_factory=PopeConfig)
    mme: MmeConfig = field(default_factory=MmeConfig)
    gqa: GqaConfig = field(default_factory=GqaConfig)
    vqav2: Vqav2Config = field(default_factory=Vqav2Config)
    textvqa: TextvqaConfig = field(default_factory=TextvqaConfig)
    vizwiz: VizwizConfig = field(default_factory=VizwizConfig)
    scienceqa: ScienceqaConfig = field(default_factory=ScienceqaConfig)
    mmbench: MmbenchConfig = field(default_factory=MmbenchConfig)
    mmbench_cn: MmbenchCnConfig = field(default_factory=MmbenchCnConfig)
    seedbench: SeedbenchConfig = field(default_factory=SeedbenchConfig)
    mmstar: MmstarConfig = field(default_factory=MmstarConfig)
    ocrbench: OcrbenchConfig = field(default_factory=OcrbenchConfig)
    mmvet: MmvetConfig = field(default_factory=MmvetConfig)
    llava_bench: LlavaBenchConfig = field(default_factory=LlavaBenchConfig)
    rule: str = "official"  # how answers are read: official | lmms_eval | vlmevalkit
    prompt_suffix: str | None = None  # after each question; null: the suite's, as LLaVA-1.5 has it
    batch_size: int = 16  # questions at once; changes no answer
    max_new_tokens: int = 128  # longer answers are cut there, marked and counted
    answering: str = "generate"  # generate | yes_no: the larger of the logits of yes and no; only for yes/no suites
    precision: str = "auto"  # auto | fp32 | bf16 | fp16; auto: fp32 on a CPU, bf16 on a GPU
    limit: int | None = None  # questions per set or subtask, rounded up to whole pictures; null: all


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
    if config.answering not in ANSWERING:
        raise UserError(f"answering: '{config.answering}' is unknown; choose one of {', '.join(ANSWERING)}")
    others = [suite for suite in config.suites if suite not in YES_NO_SUITES]
    if config.answering == "yes_no" and others:
        raise UserError(f"answering: yes_no is for {' and '.join(YES_NO_SUITES)}, whose every answer is yes or no; "
                        f"leave {', '.join(others)} out of suites, or set answering=generate")
    for key in ("batch_size", "max_new_tokens"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}: {getattr(config, key)} is less than 1; give a positive number")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit: {config.limit} is less than 1; give a positive number, or null for all questions")
    for suite in config.suites:
        for key in (SOURCE[suite],) if suite == "mme" else (SOURCE[suite], "image_folder"):
            if not getattr(getattr(config, suite), key):
                raise UserError(f"{suite}.{key} is empty; name the folder, or leave {suite} out of suites")
