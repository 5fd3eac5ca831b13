"""The model card of a finished run: `model/README.md`, which the Hugging Face hub shows as the model's page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from clipmoe_vlm.runs import atomic_write

from .compare import caution, differences, intervals, losses, verdict
from .config import EncoderConfig
from .evaluation_summary import cell
from .report import description, evaluations, recipe, support

if TYPE_CHECKING:
    from .train import Run

LOADING = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

name = "FOLDER"  # this folder, or its name on the hub
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(name, backend="pil")
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
pixels = processor(images=Image.open("picture.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
ids = tokenizer(["a cat", "a dog"], padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
print(model(input_ids=ids, pixel_values=pixels).logits_per_image.softmax(-1))  # the probability of each text"""

TEXT = """\
# {name}

This is {description}, made from `{base}`.
A picture and a text each go through a tower into one space, where their cosine says how well they fit.

## Use

```python
{loading}
```

`trust_remote_code=True` runs the three Python files of this folder; where the package `clipmoe_vlm` is installed,
`import clipmoe_vlm` takes its place. The folder also serves as the vision tower of a LLaVA (`vision_tower: FOLDER`).

## How it was made

| | |
|---|---|
{recipe}

Settings that are not named are those of the paper's public code ([arXiv 2409.19291](https://arxiv.org/abs/2409.19291)).

## Figures

{figures}

## Intended use, and limits

For finding pictures by a text and texts by a picture, for classification without training (a text per class), and as
the vision tower of a vision-language model. It carries the base's biases and those of the captions it was tuned on, has
been measured on the data above only, and may have lost some of what its base could do elsewhere: measure it on your own
data beside its base first. Not for identifying people or for decisions about them.

## Share it

`hf upload YOU/{name} FOLDER` puts this folder on the hub as it is. Look through this file's header first:

{header}
"""


def write(run: Run) -> None:
    """Writes `model/README.md` once; what a person changes in it stays."""
    file = run.folder / "model" / "README.md"
    if file.is_file():
        return
    config, results = run.config, evaluations(run.folder)
    name, base = run.folder.resolve().name, Path(config.model).name
    licence, on_hub = licence_of(config.model), not Path(config.model).exists()
    rows = recipe(run)
    data = ModelCardData(
        model_name=name, library_name="transformers", pipeline_tag="zero-shot-image-classification", license=licence,
        base_model=config.model if on_hub else None, tags=["clip", "clip-moe", "mixture-of-experts"],
        eval_results=eval_results(results["final"], config) if results else None)
    body = TEXT.format(
        name=name, description=description(run.folder / "model"), base=base,
        loading=LOADING, recipe="\n".join(f"| {what} | {value} |" for what, value in rows),
        figures="\n".join(figures(results, config)),
        header="\n".join([
            f"- `license: {licence}` is that of the base's card; the training data's counts too" if licence else
            "- add the `license` that its base's and its training data's allow",
            "- add its training data's name on the hub as `datasets`, if it has one",
            *([] if on_hub else [f"- add the base's name on the hub as `base_model` (here: the local `{base}`)"])]))
    with atomic_write(file) as stream:
        stream.write(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")))


def licence_of(model: str) -> str | None:
    """What the base's own card says, if the base has one on this machine."""
    file = Path(model) / "README.md"
    if not Path(model).exists():
        file = try_to_load_from_cache(model, "README.md")
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return None
    return ModelCard.load(file, ignore_metadata_errors=True).data.get("license")


def figures(results: dict[str, dict], config: EncoderConfig) -> list[str]:
    """A row per measure: base, this model, and their difference paired by item."""
    if not results:
        return ["Nothing was measured on held-out data."]
    base, final = intervals(results["base"]), intervals(results["final"])
    changes = differences(results["base"], results["final"])
    lines = caution(sentence) if (sentence := losses(changes)) else []
    lines += ["Percent on held-out data, with 95% intervals; differences in points, paired by item.", "",
              "| | base | this model | difference | |", "|---|---|---|---|---|"]
    for what, change in changes.items():
        lines.append(f"| {what} | {cell(base[what])} | {cell(final[what])} | {cell(change, '+')} | {verdict(change)} |")
    return [*lines, "", *support(results, config)]


def eval_results(result: dict, config: EncoderConfig) -> list[EvalResult]:
    """The figures in the form of the hub's model index."""
    found = []
    for part, source, metric in (("retrieval", config.validation_data, "recall"),
                                 ("hard_items", config.hard_captions, "accuracy")):
        for measure, interval in intervals({part: result[part]}).items():
            found.append(EvalResult(
                task_type="image-text-retrieval", dataset_type=Path(source).stem, dataset_name=Path(source).name,
                metric_type=metric, metric_name=measure, metric_value=round(100 * interval.mean, 2)))
    return found
