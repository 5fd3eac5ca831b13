"""Two or three invented questions per suite, in the benchmark's own files and in lmms-lab's columns."""

import base64
import csv
import io
import json
from pathlib import Path

from datasets import Dataset, Features, Image, List
from PIL import Image as Pillow

TEN = ["kite"] * 7 + ["red kite", "Kite", "bird"]


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", (12, 10), colour).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [png(colour) for colour in ("red", "green", "blue")]


def save(folder: Path, columns: dict[str, list], image: bool = True, several: bool = False) -> Path:
    """A folder of `datasets.save_to_disk` with the pictures inside."""
    data = Dataset.from_dict(columns)
    if image:
        count = len(data)
        pictures = [{"bytes": PICTURES[index % 3], "path": None} for index in range(count)]
        feature = List(Image()) if several else Image()
        values = [[one] for one in pictures] if several else pictures
        data = Dataset.from_dict({**columns, "image": values}, Features({**data.features, "image": feature}))
    data.save_to_disk(folder)
    return folder


def write(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif file.suffix == ".tsv":
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(content[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(content)
    else:
        file.write_text(json.dumps(content))
    return file


def pope(folder: Path) -> dict[str, dict]:
    rows = {name: [{"question_id": number, "image": f"{number % 2}.jpg", "text": f"Is there a {name} {number}?",
                    "label": "yes" if number % 2 else "no"} for number in (1, 2, 3)]
            for name in ("random", "popular", "adversarial")}
    for name, one in rows.items():
        write(folder / "output" / "coco" / f"coco_pope_{name}.json", []).write_text(
            "".join(json.dumps(row) + "\n" for row in one))
        write(folder / "seem" / "gqa" / f"gqa_pope_seem_{name}.json", one)  # a list there
    everything = [(name, row) for name, one in rows.items() for row in one]
    save(folder / "data", {"id": [str(index) for index in range(9)],
                           "question_id": [str(row["question_id"]) for _, row in everything],
                           "question": [row["text"] for _, row in everything],
                           "answer": [row["label"] for _, row in everything],
                           "category": [name for name, _ in everything]})
    return {"official": {"questions_dir": folder / "output"}, "dataset": {"questions_dir": folder / "data"}}


def mme(folder: Path) -> dict[str, dict]:
    questions = [("Is it red? Please answer yes or no.", "Yes"), ("Is it night? Please answer yes or no.", "No")]
    for name in ("0", "1"):
        write(folder / "release" / "count" / f"{name}.txt", "").write_text("".join(f"{one}\t{label}\n"
                                                                                  for one, label in questions))
        (folder / "release" / "count" / f"{name}.png").write_bytes(PICTURES[int(name)])
    save(folder / "data", {"question_id": [f"count/{name}.png" for name in ("0", "0", "1", "1")],
                           "question": [one for one, _ in questions * 2],
                           "answer": [label for _, label in questions * 2], "category": ["count"] * 4})
    return {"official": {"folder": folder / "release"}, "dataset": {"folder": folder / "data"}}


def gqa(folder: Path) -> dict[str, dict]:
    rows = {f"0{number}": {"imageId": f"n{number}", "question": f"What is thing {number}?", "answer": "kite",
                           "isBalanced": True, "types": {"structural": "query", "semantic": "attr", "detailed": "x"},
                           "groups": {"global": "hue", "local": "y"},
                           "semantic": [{"operation": "select", "argument": "kite (1)", "dependencies": []},
                                        {"operation": "query", "argument": "name", "dependencies": [0]}]}
            for number in (1, 2)}
    columns = {"id": list(rows), **{key: [row[key] for row in rows.values()] for key in rows["01"]}}
    save(folder / "data", columns, image=False)
    save(folder / "pictures", {"id": ["n1", "n2"]})
    return {"official": {"questions": write(folder / "testdev_balanced_questions.json", rows)},
            "dataset": {"questions": folder / "data", "images": str(folder / "pictures")}}


def vqav2(folder: Path) -> dict[str, dict]:
    questions = [{"image_id": 9, "question": f"What is thing {number}?", "question_id": 9000 + number}
                 for number in (0, 1)]
    annotations = [{"question_id": row["question_id"], "image_id": 9, "question_type": "what is",
                    "answer_type": "other", "multiple_choice_answer": "kite",
                    "answers": [{"answer": one, "answer_confidence": "yes", "answer_id": number}
                                for number, one in enumerate(TEN, 1)]} for row in questions]
    save(folder / "data", {key: [{**one, **two}[key] for one, two in zip(questions, annotations, strict=True)]
                           for key in ("question_id", "image_id", "question", "question_type", "answer_type",
                                       "answers")})
    return {"official": {"questions": write(folder / "questions.json", {"data_subtype": "val2014",
                                                                        "questions": questions}),
                         "annotations": str(write(folder / "annotations.json", {"annotations": annotations}))},
            "dataset": {"questions": folder / "data"}}


def textvqa(folder: Path) -> dict[str, dict]:
    rows = [{"question_id": 34602 + number, "image_id": "00ab", "question": f"what IS sign {number}?", "answers": TEN}
            for number in (0, 1)]
    save(folder / "data", {key: [row[key] for row in rows] for key in rows[0]} | {"ocr_tokens": [["AB", "12"]] * 2})
    tokens = write(folder / "llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": "00ab", "image": "00ab.jpg", "category": "default", "text": "What is sign 0?\nReference OCR "
         "token: AB, 12\nAnswer the question using a single word or phrase."}])
    return {"official": {"questions": write(folder / "TextVQA_0.5.1_val.json", {"data": rows}),
                         "ocr_tokens": str(tokens)},
            "dataset": {"questions": folder / "data", "ocr_tokens": "column"}}


def vizwiz(folder: Path) -> dict[str, dict]:
    rows = [{"image": f"VizWiz_val_0000000{number}.jpg", "question": "what IS this?", "answer_type": "other",
             "answerable": 1, "answers": [{"answer": one, "answer_confidence": "yes"} for one in TEN]}
            for number in (0, 1)]
    save(folder / "data", {"question_id": [row["image"][:-4] for row in rows],
                           "question": [row["question"] for row in rows], "answers": [TEN, TEN],
                           "category": ["other"] * 2})
    return {"official": {"questions": write(folder / "val.json", rows)}, "dataset": {"questions": folder / "data"}}


def scienceqa(folder: Path) -> dict[str, dict]:
    problems = {"5": {"question": "Which is a kite?", "choices": ["drum", "kite"], "answer": 1, "hint": "Look up.",
                      "image": "image.png", "split": "test"},
                "7": {"question": "Which is north?", "choices": ["Maine", "Iowa", "Utah"], "answer": 0, "hint": "",
                      "image": "image.png", "split": "test"}}
    write(folder / "release" / "problems.json",
          {**problems, "8": {**problems["7"], "image": None}, "9": {**problems["7"], "split": "val"}})
    write(folder / "release" / "pid_splits.json", {"test": ["5", "7", "8"], "val": ["9"]})
    save(folder / "data", {key: [row[key] for row in problems.values()]
                           for key in ("question", "choices", "answer", "hint")})
    return {"official": {"questions": folder / "release"}, "dataset": {"questions": folder / "data"}}


def mmbench(folder: Path) -> dict[str, dict]:
    rows = [{"index": 0, "question": "Which is it?", "hint": "Look up.", "A": "kite", "B": "drum", "C": "oar",
             "D": "", "answer": "B", "category": "shape", "l2-category": "perceive", "split": "dev"},
            {"index": 1_000_000, "question": "Which is it?", "hint": "Look up.", "A": "drum", "B": "oar", "C": "kite",
             "D": "", "answer": "A", "category": "shape", "l2-category": "perceive", "split": "dev"},
            {"index": 3, "question": "Where is it?", "hint": "", "A": "left", "B": "right", "C": "", "D": "",
             "answer": "A", "category": "place", "l2-category": "reason", "split": "dev"}]
    for row, picture in zip(rows, (PICTURES[0], PICTURES[0], PICTURES[1]), strict=True):
        row["image"] = base64.b64encode(picture).decode()
    rows[1]["image"] = "0"  # the picture of another row
    data = [{key: "nan" if value == "" else value for key, value in row.items()} for row in rows]
    save(folder / "data", {key: [row[key] for row in data] for key in rows[0] if key != "image"})
    return {"official": {"questions": write(folder / "mmbench_dev_20230712.tsv", rows)},
            "dataset": {"questions": folder / "data"}}


def mmbench_cn(folder: Path) -> dict[str, dict]:
    return mmbench(folder)


def seedbench(folder: Path) -> dict[str, dict]:
    rows = [{"question_id": str(100 + number), "data_type": "image", "question_type_id": 1 + number,
             "question": f"What is thing {number}?", "choice_a": "kite", "choice_b": "drum", "choice_c": "oar",
             "choice_d": "tin", "answer": "C", "data_id": f"55_{number}"} for number in (0, 1)]
    video = {**rows[0], "question_id": "v1", "data_type": "video", "question_type_id": 10}
    save(folder / "data", {key: [row[key] for row in rows] for key in rows[0]}, several=True)
    return {"official": {"questions": write(folder / "SEED-Bench.json", {
        "question_type": {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10},
        "questions": [*rows, video]})}, "dataset": {"questions": folder / "data"}}


def mmstar(folder: Path) -> dict[str, dict]:
    question = "Which is it?\nOptions: A: kite, B: drum, C: oar, D: tin"
    rows = [{"index": number, "question": question, "answer": "B", "category": "math",
             "l2_category": "geometry" if number else "statistical reasoning"} for number in (0, 1)]
    save(folder / "data", {key: [row[key] for row in rows] for key in rows[0]})
    sheet = [{**row, "image": base64.b64encode(PICTURES[number]).decode()} for number, row in enumerate(rows)]
    return {"official": {"questions": write(folder / "MMStar.tsv", sheet)}, "dataset": {"questions": folder / "data"}}


def ocrbench(folder: Path) -> dict[str, dict]:
    rows = [{"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "question": " what is written? ",
             "answers": ["CENTRE"], "image_path": "IIIT5K/1.png", "id": 0},
            {"dataset_name": "HME100k", "type": "Handwritten Mathematical Expression Recognition",
             "question": "Write the formula.", "answers": ["x + 1"], "image_path": "HME100k/1.png", "id": 1}]
    save(folder / "data", {"dataset": [row["dataset_name"] for row in rows],
                           "question": [row["question"] for row in rows],
                           "question_type": [row["type"] for row in rows],
                           "answer": [row["answers"] for row in rows]})
    return {"official": {"questions": write(folder / "OCRBench.json", rows)}, "dataset": {"questions": folder / "data"}}


def mmvet(folder: Path) -> dict[str, dict]:
    rows = {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>5", "imagesource": "",
                     "capability": ["ocr", "math"]},
            "v1_1": {"imagename": "v1_0.png", "question": "What is y?", "answer": "2", "imagesource": "",
                     "capability": ["rec"]}}
    save(folder / "data", {"question_id": list(rows), "question": [row["question"] for row in rows.values()],
                           "answer": [row["answer"] for row in rows.values()], "image_source": ["", ""],
                           "capability": [",".join(row["capability"]) for row in rows.values()]})
    return {"official": {"questions": write(folder / "mm-vet.json", rows)}, "dataset": {"questions": folder / "data"}}


def llava_bench(folder: Path) -> dict[str, dict]:
    rows = [{"question_id": number, "image": "001.jpg", "text": f"What is thing {number}?", "category": kind}
            for number, kind in enumerate(("conv", "detail", "complex"))]
    save(folder / "data", {"question_id": [row["question_id"] for row in rows],
                           "question": [row["text"] for row in rows], "caption": [""] * 3, "gpt_answer": [""] * 3,
                           "category": [row["category"] for row in rows]})
    return {"official": {"questions": write(folder / "questions.jsonl", rows)},
            "dataset": {"questions": folder / "data"}}


MAKERS = {one.__name__: one for one in (pope, mme, gqa, vqav2, textvqa, vizwiz, scienceqa, mmbench, mmbench_cn,
                                        seedbench, mmstar, ocrbench, mmvet, llava_bench)}
