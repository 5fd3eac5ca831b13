"""Makes POPE's three sets or MME's pairs from annotated pictures of your own.

    python -m eval_vlm.build pope|mme ANNOTATIONS OUTPUT_DIR [key=value ...]

ANNOTATIONS: COCO's instances JSON, or scenes (eval_vlm/annotations.py). Same annotations, keys and seed: same bytes.
docs/build.md says how.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from clipmoe_vlm.runs import UserError, atomic_folder, fail, write_json
from eval_vlm.annotations import Picture, read_pictures
from eval_vlm.probing import HALF, SUBTASKS, Company, mme_pairs, pope_set
from eval_vlm.score import apply_options
from eval_vlm.suites.mme import PICTURES
from eval_vlm.suites.pope import SETS

USAGE = "python -m eval_vlm.build pope|mme ANNOTATIONS OUTPUT_DIR [key=value ...]"


@dataclass
class PopeBuild:
    images: str = ""  # what the annotations' file names are relative to; "": the annotations' folder
    pictures: int = 500
    min_objects: int = HALF  # different ones, in a picture
    seed: int = 0


@dataclass
class MmeBuild:
    images: str = ""
    pictures: int = 30  # per subtask
    seed: int = 0


def build(kind: str, annotations: str, output_dir: str, options: list[str] | None = None) -> dict:
    """Writes the folder, whole or not at all, and returns the content of its build.json.

    Raises:
        UserError: unknown keys, broken annotations, too few pictures, a picture that is not there, or a folder that
            holds something else.
    """
    default = {"pope": PopeBuild, "mme": MmeBuild}.get(kind)
    if not default:
        raise UserError(f"there is nothing to build for '{kind}', only for pope and mme; usage: {USAGE}")
    config = apply_options(default(), options or [], kind)
    if config.pictures < 1 or getattr(config, "min_objects", HALF) < HALF:
        raise UserError(f"pictures must be 1 or more and min_objects {HALF} or more; correct them")
    pictures = read_pictures(annotations)
    folder = Path(config.images or Path(annotations).parent)
    made_by = {"kind": kind, "annotations_sha256": hashlib.sha256(Path(annotations).read_bytes()).hexdigest(),
               **{key: value for key, value in asdict(config).items() if key != "images"}}
    output = Path(output_dir)
    if output.is_file() or output.is_dir() and any(output.iterdir()):
        check_same(output, made_by)
        return json.loads((output / "build.json").read_text(encoding="utf-8"))
    with atomic_folder(output) as new:
        counts = (_pope if kind == "pope" else _mme)(pictures, folder, config, new)
        result = {**made_by, **counts}
        write_json(new / "build.json", result)
    return result


def check_same(output: Path, made_by: dict) -> None:
    """Raises:
        UserError: the folder there is not this build.
    """
    try:
        theirs = json.loads((output / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        theirs = None
    if not isinstance(theirs, dict) or "annotations_sha256" not in theirs:
        raise UserError(f"{output} is there already and is no build of this program; name another folder")
    changed = [key for key, value in made_by.items() if theirs.get(key) != value]
    if changed:
        raise UserError(f"{output} holds a build with other {', '.join(changed)}; name another folder, or remove it")


def _pope(pictures: list[Picture], folder: Path, config: PopeBuild, output: Path) -> dict:
    rich = [picture for picture in pictures if len(picture.objects) >= config.min_objects]
    if len(rich) < config.pictures:
        raise UserError(f"only {len(rich)} of the {len(pictures)} annotated pictures hold {config.min_objects} or more "
                        f"different objects, {config.pictures} are asked for; type pictures={len(rich) or 1}, or "
                        "annotate more")
    numbers = sorted(random.Random(f"{config.seed} pictures").sample(range(len(rich)), config.pictures))
    chosen = [rich[number] for number in numbers]
    _check_files(chosen, folder)
    company = Company(chosen)  # of the pictures asked about, as POPE has it
    for kind in SETS:
        lines = pope_set(chosen, company, kind, config.seed)
        (output / f"coco_pope_{kind}.json").write_text("".join(json.dumps(line) + "\n" for line in lines),
                                                       encoding="utf-8")
    return {"questions": {kind: 2 * HALF * len(chosen) for kind in SETS},
            "frequency": dict(company.frequency.most_common())}


def _mme(pictures: list[Picture], folder: Path, config: MmeBuild, output: Path) -> dict:
    company = Company(pictures)
    questions = {}
    for subtask in SUBTASKS:
        pairs = mme_pairs(pictures, subtask, company, config.seed)
        if not pairs:
            continue  # the annotations do not hold it: boxes, or a ground
        if len(pairs) < config.pictures:
            raise UserError(f"only {len(pairs)} of the {len(pictures)} annotated pictures allow a question about "
                            f"{subtask}, {config.pictures} are asked for; type pictures={len(pairs)}, or annotate more")
        chosen = pairs[:config.pictures]
        _check_files([picture for picture, _ in chosen], folder)
        write_mme(chosen, folder, output / subtask)
        questions[subtask] = 2 * len(chosen)
    if not questions:
        raise UserError("the annotations allow no question: no picture holds an object")
    return {"questions": questions}


def write_mme(pairs: list[tuple[Picture, tuple[str, str]]], folder: Path, output: Path) -> None:
    """MME's release layout: each picture, copied, and beside it a .txt with two lines `question<TAB>answer`."""
    output.mkdir(parents=True)
    for picture, (yes, no) in pairs:
        source = folder / picture.image
        target = output / picture.image.replace("/", "_")
        if target.with_suffix(".txt").exists():
            raise UserError(f"two pictures would be called {target.name} in MME's folders; rename one of them")
        if source.suffix.lower() not in PICTURES:
            raise UserError(f"{source}: MME's pictures end with {', '.join(PICTURES)}; convert it")
        shutil.copyfile(source, target)
        target.with_suffix(".txt").write_text(f"{yes}\tYes\n{no}\tNo\n", encoding="utf-8")


def _check_files(pictures: list[Picture], folder: Path) -> None:
    missing = [picture.image for picture in pictures if not (folder / picture.image).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]}: there is no such picture ({len(missing)} of {len(pictures)} are "
                        "missing); name the folder of pictures by images=FOLDER")


def main(arguments: list[str]) -> None:
    if len(arguments) < 3 or arguments[0] in ("-h", "--help") or any("=" in one for one in arguments[:3]):
        raise UserError(f"usage: {USAGE}; keys: {', '.join(asdict(PopeBuild()))} (mme: without min_objects)")
    kind, annotations, output, *options = arguments
    result = build(kind, annotations, output, options)
    counts = ", ".join(f"{name} {count}" for name, count in result["questions"].items())
    print(f"{output}: {counts} questions; ask a model: "
          + (f"python -m eval_vlm.run CONFIG suites=[pope] pope.questions_dir={output} pope.image_folder=..."
             if kind == "pope" else f"python -m eval_vlm.run CONFIG suites=[mme] mme.folder={output}"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
