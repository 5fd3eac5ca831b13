"""What the report says: read from the programs' output files, with the words that the numbers allow."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import platform
import random
import struct
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.intervals import cluster_interval, paired_interval
from clipmoe_vlm.routing import routing_map
from clipmoe_vlm.runs import UserError, read_jsonl
from eval_vlm.suites import mme, pope

KIND_NAMES = {"object": "object", "color": "colour", "place": "place", "count": "count"}
TOWERS = {"base": "base tower", "clipmoe": "CLIP-MoE tower"}
QUESTIONS_SHOWN = 20
PICTURES_ROUTED = 6
LAYERS_ROUTED = 4


# --- words for numbers ---------------------------------------------------------------------------------------------


def percent(value: tuple) -> str:
    """`(0.7312, 0.701, 0.76)` -> `73.1 [70.1, 76.0]`; the interval is left out where there is none."""
    mean, low, high = value
    return f"{100 * mean:.1f}" + ("" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def points(value: tuple, unit: float = 100) -> str:
    """A difference: `+3.1 [-0.2, 6.4]`."""
    mean, low, high = value
    return f"{unit * mean:+.1f}" + ("" if low is None else f" [{unit * low:+.1f}, {unit * high:+.1f}]")


def in_words(value: tuple) -> str:
    """What a difference with its interval supports: `better`, `worse` or `no evidence of a difference`."""
    _, low, high = value
    if low is not None and low > 0:
        return "better"
    if low is not None and high < 0:
        return "worse"
    return "no evidence of a difference"


def listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "nothing"


# --- reading -------------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict:
    """Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; the step that writes it has not ended, run `make demo` again") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}); remove it and run `make demo` again") from error


def encoder_models(run: Path) -> list[dict]:
    """The table's rows: every model that was evaluated on retrieval and hard captions, with what it is."""
    dmu = run / "encoder" / "dmu" / "evaluation"
    experts = sorted(dmu.glob("expert_*.json"), key=lambda file: int(file.stem.removeprefix("expert_")))
    rows = [("base", "Base CLIP", "trained on short captions; expert 0", dmu / "base.json")]
    rows += [(file.stem, f"Expert {file.stem.removeprefix('expert_')} alone", "one MCL stage on detailed captions",
              file) for file in experts]
    rows += [
        ("clipmoe", "CLIP-MoE (DMU)", "base and experts, trained routers", dmu / "final.json"),
        ("random_routers", "Random routers", "control: the same experts, routers untrained",
         dmu / "random_routers.json"),
        ("uniform_average", "Uniform average", "control: all experts, equal weights", dmu / "uniform_average.json"),
        ("direct", "Direct fine-tuning", "dense; as many optimizer steps as DMU",
         run / "encoder" / "direct" / "evaluation" / "final.json"),
        ("sparse_upcycling", "Sparse upcycling", "experts start as copies of the base; as many steps as DMU",
         run / "encoder" / "sparse_upcycling" / "evaluation" / "final.json"),
    ]
    models = []
    for key, title, what, file in rows:
        evaluation = read_json(file)
        retrieval = evaluation["retrieval"]
        hits = {way: [int(rank < 1) for rank in retrieval[f"{way}_ranks"]]
                for way in ("image_to_text", "text_to_image")}
        models.append({
            "key": key, "title": title, "what": what,
            "items": evaluation["hard_items"], "routing": evaluation["routing"],
            "hard": {kind: (one["accuracy"], one["low"], one["high"]) for kind, one in evaluation["hard"].items()},
            "hits": hits, "retrieval": {way: interval(cluster_interval(found)) for way, found in hits.items()},
            "recall": {way: retrieval[way] for way in hits},
            "n": (retrieval["n_images"], retrieval["n_captions"]),
        })
    return models


def interval(value) -> tuple:
    """Mean, low, high of an `Interval`; None for bounds that are unknown."""
    return (value.mean, None, None) if value.low != value.low else (value.mean, value.low, value.high)


def hard_difference(ours: dict, theirs: dict, kind: str) -> tuple:
    """Accuracy of `ours` minus `theirs` on the same pairs of captions of one kind."""
    other = {item["id"]: item["correct"] for item in theirs["items"]}
    items = [item for item in ours["items"] if item["kind"] == kind]
    return interval(paired_interval([item["correct"] for item in items], [other[item["id"]] for item in items],
                                    [item["image"] for item in items]))


def image_file(run: Path, suite: str, image: str) -> Path:
    return run / "data" / ("mme" if suite == "mme" else "images/test") / image


def picture(file: Path, size: int = 160) -> str:
    """The picture as a data URI, at least `size` pixels wide so that small ones don't blur on a screen."""
    try:
        with Image.open(file) as opened:
            opened = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{file}: not a readable picture ({error}); run `make demo` again") from error
    if opened.width < size:
        factor = round(size / opened.width)
        opened = opened.resize((opened.width * factor, opened.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    opened.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def questions(run: Path) -> list[dict]:
    """Twenty test questions drawn with a fixed seed, half from each suite, with both models' answers."""
    answers = {tower: {suite: read_jsonl(run / "eval" / tower / "predictions" / f"{suite}.jsonl")
                       for suite in ("pope", "mme")} for tower in TOWERS}
    shown = []
    for suite, module in (("pope", pope), ("mme", mme)):
        rows = answers["base"][suite]
        others = {row["id"]: row for row in answers["clipmoe"][suite]}
        for index in sorted(random.Random(0).sample(range(len(rows)), min(QUESTIONS_SHOWN // 2, len(rows)))):
            row = rows[index]
            cells = [{"answer": one["answer"], "right": module.parse(one).lower() == row["label"].lower()}
                     for one in (row, others[row["id"]])]
            shown.append({"suite": suite.upper(), "category": row["category"], "question": row["question"],
                          "label": row["label"], "answers": cells,
                          "picture": picture(image_file(run, suite, row["image"]))})
    return shown


def vlm_rows(run: Path) -> list[dict]:
    """POPE per set and MME per subtask: both VLMs with intervals, their paired difference, always-yes and chance."""
    scores = {tower: read_json(run / "eval" / tower / "scores.json")["suites"] for tower in TOWERS}
    compared = read_json(run / "eval" / "clipmoe" / "compare.json")["suites"]
    rows = []
    for suite, unit, key, bound in (("pope", 100, "accuracy", "accuracy_interval"), ("mme", 1, "score", "interval")):
        for name, one in compared[suite].items():
            if name != "total" and not isinstance(scores["base"][suite].get(name), dict):
                continue  # F1, means and sums have no row of their own here
            cells = {}
            total = suite == "mme" and name == "total"
            for tower in TOWERS:
                mine = scores[tower][suite]
                value = ((mine["total"], *(mine["total_interval"] or (None, None))) if total else
                         (mine[name][key], *(mine[name][bound] or (None, None))))
                cells[tower] = tuple(None if x is None else unit * x for x in value)
            first = scores["base"][suite]
            subtasks = [task for task in first.values() if isinstance(task, dict)]
            if suite == "pope":
                yes, chance = 100 * first[name]["always_yes"]["accuracy"], 50.0
            elif total:
                yes, chance = sum(task["always_yes"] for task in subtasks), sum(task["chance"] for task in subtasks)
            else:
                yes, chance = first[name]["always_yes"], first[name]["chance"]
            gap = (one["difference"], *(one["interval"] or (None, None)))
            ratios = [scores[tower][suite][name]["yes_ratio"] for tower in TOWERS] if not total else None
            asked = sum(task["n"] for task in subtasks) if total else first[name]["n"]
            rows.append({
                "suite": suite.upper(), "name": {"all": "all three sets"}.get(name, name), "key": name,
                "n": asked, "values": cells, "gap": gap, "unit": unit,
                "base": percent(tuple(None if x is None else x / 100 for x in cells["base"])),
                "clipmoe": percent(tuple(None if x is None else x / 100 for x in cells["clipmoe"])),
                "difference": points(gap, unit), "words": in_words(gap), "p_value": one["p_value"],
                "yes_ratio": ratios, "always_yes": yes, "chance": chance,
                "f1": [scores[tower]["pope"][name]["f1"] for tower in TOWERS] if suite == "pope" else None,
                "headline": suite == "pope" or total})
    return rows


def losses(run: Path) -> dict[str, dict[str, list]]:
    """Panel -> curve -> `[steps, losses]`."""
    panels: dict[str, dict[str, list]] = {"encoder": {}, "little LLM": {}, "VLM": {}}
    for method in ("dmu", "direct", "sparse_upcycling"):
        for row in read_jsonl(run / "encoder" / method / "metrics.jsonl"):
            name = f"dmu {row['stage']}" if method == "dmu" else method.replace("_", " ")
            add(panels["encoder"], name, row)
    if (run / "llm" / "metrics.jsonl").is_file():
        for row in read_jsonl(run / "llm" / "metrics.jsonl"):
            add(panels["little LLM"], "text of training scenes", row)
    for tower in TOWERS:
        for file in sorted((run / "vlm" / tower).glob("stage_*/metrics.jsonl")):
            for row in read_jsonl(file):
                add(panels["VLM"], f"{TOWERS[tower]}, {file.parent.name.replace('_', ' ')}", row)
    return {name: curves for name, curves in panels.items() if curves}


def add(curves: dict[str, list], name: str, row: dict) -> None:
    if "loss" in row:
        steps, values = curves.setdefault(name, [[], []])
        steps.append(row["step"])
        values.append(row["loss"])


def clusters(run: Path) -> list[dict]:
    found = []
    for file in sorted((run / "encoder" / "dmu").glob("stage_*/clusters.json")):
        one = read_json(file)
        sizes = sorted(one["sizes"], reverse=True)
        found.append({"stage": file.parent.name.replace("_", " "), "sizes": sizes, "used": one["used_samples"],
                      "dropped": one["dropped_samples"]})
    return found


@torch.no_grad()
def routing_maps(run: Path) -> dict:
    """Which expert took each patch of six test pictures, in up to four layers spread over the depth."""
    folder = run / "encoder" / "dmu" / "model"
    model = CLIPMoEModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    files = sorted((run / "data" / "images" / "test").glob("*.png"))
    if not files:
        raise UserError(f"{run / 'data' / 'images' / 'test'}: no pictures; run `make demo` again")
    count = min(PICTURES_ROUTED, len(files))
    images = [Image.open(files[(2 * index + 1) * len(files) // (2 * count)]).convert("RGB") for index in range(count)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    logits = model.vision_model(pixels).router_logits
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    picked = sorted({round(index * (len(logits) - 1) / max(1, LAYERS_ROUTED - 1)) for index in range(LAYERS_ROUTED)})
    return {"images": images, "experts": config.num_experts,
            "layers": {config.first_moe_layer + index: routing_map(logits[index], count, (side, side)).numpy()
                       for index in picked}}


def parameters(folder: Path) -> int:
    """Number of weights in a model folder, from the header of its safetensors files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size
    return total


def making(run: Path, models: list[dict]) -> dict:
    """Sizes, steps, times, versions."""
    timing = read_json(run / "timing.json")
    steps = {}
    for method in ("dmu", "direct", "sparse_upcycling"):
        rows = read_jsonl(run / "encoder" / method / "metrics.jsonl")
        steps[method] = len({(row["stage"], row["step"]) for row in rows})
    config = read_json(run / "encoder" / "dmu" / "model" / "config.json")
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "deepspeed", "open_clip_torch", "peft", "scikit-learn")}
    reading = run / "llm" / "text_questions.json"
    return {
        "reading": read_json(reading)["kinds"] if timing["llm"] == "little" else {},
        "size": timing["size"], "llm": timing["llm"], "timing": timing["steps"],
        "seconds": wall_seconds(timing["steps"]), "steps": steps,
        "vision": config["vision_config"], "text": config["text_config"],
        "parameters": {"base CLIP": parameters(run / "encoder" / "dmu" / "base"),
                       "CLIP-MoE": parameters(run / "encoder" / "dmu" / "model"),
                       "VLM with the base tower": parameters(run / "vlm" / "base" / "stage_2" / "model"),
                       "VLM with the CLIP-MoE tower": parameters(run / "vlm" / "clipmoe" / "stage_2" / "model")},
        "test_pictures": models[0]["n"][0], "python": platform.python_version(), "versions": versions,
        "machine": f"{processor_name()}, {os.cpu_count()} processor cores, "
                   f"{'a GPU: ' + torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}",
    }


def wall_seconds(steps: list[dict]) -> float:
    """Time in which at least one step ran: steps ran side by side, and a run that was stopped has gaps."""
    total, until = 0.0, 0.0
    for step in sorted(steps, key=lambda step: step["started"]):
        end = step["started"] + step["seconds"]
        total += max(0.0, end - max(until, step["started"]))
        until = max(until, end)
    return total


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # only a name for the page; other systems say it another way
        pass
    return platform.machine()


# --- the verdict ---------------------------------------------------------------------------------------------------


def verdict(models: dict[str, dict], kinds: list[str], vlm: list[dict]) -> dict:
    """The page's answers in words, each with the numbers behind it. Only what an interval supports is claimed."""
    base, moe = models["base"], models["clipmoe"]
    blind = [kind for kind in kinds if base["hard"][kind][1] is None or base["hard"][kind][1] <= 0.5]
    gained = {kind: hard_difference(moe, base, kind) for kind in kinds}
    up = [kind for kind in kinds if in_words(gained[kind]) == "better"]
    down = [kind for kind in kinds if in_words(gained[kind]) == "worse"]
    same = [kind for kind in kinds if kind not in up + down]
    added = [kind for kind in blind if kind in up]

    def names(some: list[str]) -> str:
        return listed([KIND_NAMES[kind] for kind in some])

    first = (f"On {names(blind)} the base is no better than a coin: blind." if blind else
             "The base is better than a coin on every kind of detail: blind to none of them.")
    second = [f"DMU added {names(up)}." if up else "There is no evidence that DMU added any kind of detail."]
    if same:
        second.append(f"No evidence of a change for {names(same)}.")
    if down:
        second.append(f"It lost {names(down)}.")
    if blind:
        second.append(f"Of what the base was blind to, CLIP-MoE now sees more of {names(added)}." if added else
                      "Of what the base was blind to, nothing is seen better.")
    whole = {row["suite"]: row for row in vlm if row["key"] in ("all", "total")}
    third = []
    for suite, unit in (("POPE", "points of accuracy"), ("MME", "MME points")):
        row = whole[suite]
        word = {"better": "sees better", "worse": "sees worse"}.get(row["words"], "shows no evidence of a difference")
        third.append(f"On {suite} the VLM with the CLIP-MoE tower {word} ({row['difference']} {unit}).")
    words = [whole[suite]["words"] for suite in ("POPE", "MME")]
    if "better" in words and "worse" in words:
        sees = "the VLM is better on one benchmark and worse on the other"
    elif "better" in words:
        sees = "the VLM sees better for it"
    elif "worse" in words:
        sees = "the VLM sees worse with it"
    else:
        sees = "whether the VLM sees better for it these numbers don't show"
    headline = (f"DMU added {names(added)}, to which the base was blind; {sees}." if added else
                f"DMU added {names(up)}, though nothing to which the base was blind; {sees}." if up else
                f"These numbers don't show that DMU added detail; {sees}.")

    rivals = []
    for key in ("direct", "sparse_upcycling", "random_routers", "uniform_average",
                *(name for name in models if name.startswith("expert_"))):
        rivals.append({"title": models[key]["title"],
                       "gaps": {kind: hard_difference(moe, models[key], kind) for kind in kinds},
                       "retrieval": {way: interval(paired_interval(moe["hits"][way], models[key]["hits"][way]))
                                     for way in moe["hits"]}})
    rivals.insert(0, {"title": base["title"], "gaps": gained,
                      "retrieval": {way: interval(paired_interval(moe["hits"][way], base["hits"][way]))
                                    for way in moe["hits"]}})
    return {"headline": headline[0].upper() + headline[1:], "first": first, "second": " ".join(second),
            "third": " ".join(third), "rivals": rivals, "gained": gained, "blind": blind, "added": added,
            "against": against(rivals, kinds)}


def against(rivals: list[dict], kinds: list[str]) -> list[str]:
    """Where CLIP-MoE wins or loses against each baseline and control, in a sentence each."""
    sentences = []
    for rival in rivals[1:]:
        won = [KIND_NAMES[kind] for kind in kinds if in_words(rival["gaps"][kind]) == "better"]
        lost = [KIND_NAMES[kind] for kind in kinds if in_words(rival["gaps"][kind]) == "worse"]
        if won or lost:
            parts = [f"better on {listed(won)}"] * bool(won) + [f"worse on {listed(lost)}"] * bool(lost)
            sentences.append(f"Against {rival['title'].lower()}, CLIP-MoE is {' and '.join(parts)}.")
        else:
            sentences.append(f"Against {rival['title'].lower()} there is no evidence of a difference on any kind.")
    return sentences


def targets(models: dict[str, dict], vlm: list[dict]) -> list[dict]:
    """What the demo is meant to reach, and whether this run did."""
    base, moe = models["base"]["hard"], models["clipmoe"]["hard"]
    result = []
    if "color" in moe:
        met = moe["color"][1] is not None and base["color"][2] is not None and moe["color"][1] > base["color"][2]
        result.append({"met": met, "what": "CLIP-MoE's hard-caption accuracy on colour is above its base's, intervals "
                                           "apart",
                       "found": f"{percent(moe['color'])} against {percent(base['color'])}"})
    on_random = next(row for row in vlm if row["suite"] == "POPE" and row["key"] == "random")
    for index, (tower, title) in enumerate(TOWERS.items()):
        accuracy, ratio = on_random["values"][tower][0], on_random["yes_ratio"][index]
        result.append({"met": accuracy >= 70 and 0.35 <= ratio <= 0.65,
                       "what": f"The VLM with the {title}: at least 70% on POPE random, yes ratio 35-65%",
                       "found": f"{on_random[tower]}%, yes ratio {100 * ratio:.0f}%"})
    return result


def gather(run: Path) -> dict:
    """Everything that the page, the table and summary.json say.

    Raises:
        UserError: a file is missing or broken.
    """
    models = encoder_models(run)
    by_key = {model["key"]: model for model in models}
    kinds = [kind for kind in KIND_NAMES if kind in by_key["base"]["hard"]]
    vlm = vlm_rows(run)
    answer = verdict(by_key, kinds, vlm)
    goals = targets(by_key, vlm)
    made = making(run, models)
    summary = {
        "headline": answer["headline"], "size": made["size"], "llm": made["llm"],
        "hard_captions": {model["key"]: {kind: model["hard"][kind] for kind in kinds} for model in models},
        "hard_captions_clipmoe_minus_base": answer["gained"],
        "retrieval_R@1": {model["key"]: model["retrieval"] for model in models},
        "vlm": {f"{row['suite']} {row['key']}": {**row["values"], "difference": [
            None if x is None else row["unit"] * x for x in row["gap"]]} for row in vlm},
        "pope_yes_ratio": {row["key"]: dict(zip(TOWERS, row["yes_ratio"], strict=True))
                           for row in vlm if row["suite"] == "POPE"},
        "targets": goals, "parameters": made["parameters"], "seconds": made["seconds"], "machine": made["machine"],
        "versions": made["versions"],
    }
    return {"name": run.resolve().name, "models": models, "kinds": kinds, "vlm_rows": vlm, "verdict": answer,
            "headline": answer["headline"], "targets": goals, "losses": losses(run), "clusters": clusters(run),
            "routing": by_key["clipmoe"]["routing"], "maps": routing_maps(run), "questions": questions(run),
            "made": made, "summary": summary}
