"""LLaVA's data as train_vlm reads it: by places, in little memory, from several sources; bad files and odd pictures."""

import io
import json
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from llava_runs import LLAVA_TRAIN, settings
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import vlm_data
from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError, load_config, read_jsonl
from train_vlm import index as index_module
from train_vlm.chat import ChatEncoder
from train_vlm.config import VLMConfig
from train_vlm.data import ConversationDataset
from train_vlm.model import build
from train_vlm.samples import Samples, read_picture, read_samples
from train_vlm.train import train

STAGE2 = json.loads((LLAVA_TRAIN / "stage2.json").read_text())

pytestmark = pytest.mark.usefixtures("one_process")


def sample(number=0, image=None, question=None, **more) -> dict:
    """A text sample, or one about a picture."""
    question = question or ("<image>\nWhat is it?" if image else "What is it?")
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is the number {number}."}]
    return {"id": f"s{number}", "conversations": turns} | ({"image": image} if image else {}) | more


def write(file: Path, samples) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(samples if isinstance(samples, str) else json.dumps(samples), encoding="utf-8")
    return str(file)


def refused(folder: Path, data, image_folder="") -> str:
    with pytest.raises(UserError) as error:
        read_samples(data, image_folder, folder / "cache")
    assert "\n" not in str(error.value) and not list((folder / "cache").glob("*.npy"))
    return str(error.value)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_large_file_is_read_in_little_memory(tmp_path, capsys):
    vlm_data.main(["megabytes=40", "limit_mib=24", "reads=500", f"folder={tmp_path}"])
    assert "read   500 samples in each of 2 processes" in capsys.readouterr().out
    with pytest.raises(UserError, match="24 MiB were not enough"):  # the limit is one
        vlm_data.main(["megabytes=40", "limit_mib=24", "parsed=1", f"folder={tmp_path}"])


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@examples(max_examples=60, deadline=None)
@given(values=st.lists(JSON, max_size=8), indent=st.sampled_from([None, 0, 2]), ascii=st.booleans(),
       chunk=st.integers(1, 12), ends=st.sampled_from(["", "\n", " \r\n"]))
def test_any_list_is_read_as_json_reads_it(tmp_path_factory, values, indent, ascii, chunk, ends):
    file = tmp_path_factory.getbasetemp() / "list.json"
    content = (ends + json.dumps(values, indent=indent, ensure_ascii=ascii) + ends).encode("utf-8", "replace")
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "CHUNK", chunk)
        found = list(index_module.json_list(str(file)))
    assert [value for _, _, value in found] == json.loads(content)
    assert all(content[start:start + len(raw)] == raw for start, raw, _ in found)


@pytest.mark.parametrize("content, words", [
    ("", ["not valid JSON", "no end"]),
    ("{}", ["must hold a list of samples, found '{}'"]),
    ('{"id": 1}\n{"id": 2}', ["must hold a list"]),
    ("[]", ["no samples"]),
    ("[1, 2]", ["sample 0 is no object with 'conversations'; sample 1 is no object"]),
    (json.dumps([sample(n) for n in range(9)])[:-30], ["not valid JSON", "line 1, sample 8"]),
    (json.dumps([sample(n) for n in range(9)], indent=1).replace('"s4"', "s4"), ["Expecting", "line 55, sample 4"]),
    (json.dumps([sample(0), sample(1)]).replace("}, {\"id", "} {\"id"), ["no comma behind it (line 1, sample 0)"]),
    (json.dumps([sample(0)]) * 2, ["goes on behind the list's end"]),
])
def test_broken_json_is_one_sentence(tmp_path, content, words):
    message = refused(tmp_path, write(tmp_path / "data.json", content))
    assert "data.json" in message and all(word in message for word in words), message


def test_other_encodings_and_missing_files_are_one_sentence(tmp_path):
    (tmp_path / "data.json").write_bytes(json.dumps([sample()]).replace("It", "\xc4").encode("latin-1"))
    assert "not in UTF-8" in refused(tmp_path, str(tmp_path / "data.json"))
    assert "no such file" in refused(tmp_path, str(tmp_path / "nowhere.json"))
    (tmp_path / "empty").mkdir()
    assert "not one that `datasets` wrote" in refused(tmp_path, str(tmp_path / "empty"))


def test_samples_are_those_of_the_file_in_any_order_and_process(tmp_path):
    samples = read_samples(str(LLAVA_TRAIN / "stage2.json"), str(LLAVA_TRAIN / "images"), tmp_path)
    assert len(samples) == len(STAGE2)
    assert samples.lengths == json.loads((LLAVA_TRAIN / "sampler.json").read_text())["lengths"]
    sent = pickle.dumps(samples)
    assert len(sent) < 1000  # to the other processes: no sample
    order = torch.randperm(len(samples)).tolist()
    loaded = DataLoader(pickle.loads(sent), batch_size=None, sampler=order, num_workers=2, collate_fn=lambda one: one)
    for number, found in zip(order, loaded, strict=True):
        pictures = [str(LLAVA_TRAIN / "images" / STAGE2[number]["image"])] if "image" in STAGE2[number] else []
        assert found == {**STAGE2[number], "image": pictures}


def test_the_index_is_used_again_and_changed_data_is_refused(tmp_path):
    data = write(tmp_path / "data.json", [sample(n) for n in range(5)])
    read_samples(data, "", tmp_path / "run/data")
    index = next((tmp_path / "run/data").glob("*.npy"))
    made = index.stat().st_mtime_ns
    os.utime(data, (1, 1))  # copied anew
    samples = read_samples(data, "", tmp_path / "run/data")
    assert index.stat().st_mtime_ns == made and samples[3]["id"] == "s3"
    write(tmp_path / "data.json", [sample(n) for n in (0, 1, 2, 4, 3)])
    with pytest.raises(UserError, match=r"data\.json changed since .*run was begun"):
        read_samples(data, "", tmp_path / "run/data")
    with pytest.raises(UserError, match="gone or changed since the run began"):
        samples[3]
    os.unlink(data)
    with pytest.raises(UserError, match="gone or changed since the run began"):
        samples[2]


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, words", [
    (sample(image="a.png", question="no mark"), "has 1 picture(s) but 0 <image> mark(s)"),
    (sample(image=["a.png", "a.png"]), "has 2 picture(s) but 1 <image> mark(s)"),
    (sample(question="<image> and <image>", image="a.png"), "has 1 picture(s) but 2 <image> mark(s)"),
    (sample(question="<image>"), "has 0 picture(s) but 1 <image> mark(s)"),
    (sample(image="../data.json"), "outside image_folder"),
    (sample(image="sub/../../a.png"), "outside image_folder"),
    (sample(image="/etc/passwd"), "outside image_folder"),
    (sample(image=7), "has a picture '7'"),
    (sample(image=[""]), "has a picture ''"),
    (sample(conversations=[]), "has no 'conversations'"),
    (sample(conversations=[{"from": "human"}]), "each must be {from: human or gpt, value: text}"),
    ({"id": "s0"}, "has no 'conversations'"),
])
def test_samples_that_cannot_be_used_are_named(tmp_path, bad, words):
    Image.new("RGB", (4, 4)).save((tmp_path / "images").mkdir() or tmp_path / "images/a.png")
    data = write(tmp_path / "data.json", [sample(1, "a.png"), bad | {"id": "bad"}])
    message = refused(tmp_path, data, str(tmp_path / "images"))
    assert f"{data}: sample 1 (id 'bad') " in message and words in message


def test_many_bad_samples_are_counted_and_the_first_three_named(tmp_path):
    data = write(tmp_path / "data.json", [sample(n, question="<image>" if n % 2 else "?") for n in range(20)])
    message = refused(tmp_path, data)
    assert all(f"sample {n} (id 's{n}') has 0 picture(s)" in message for n in (1, 3, 5)) and "s7" not in message
    assert message.endswith("and 7 more samples")


def test_links_and_absolute_paths_within_the_folder_are_fine(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/link.png").symlink_to(tmp_path / "a.png")
    paths = ["link.png", str(tmp_path / "images/link.png"), "sub/../link.png"]
    data = write(tmp_path / "data.json", [sample(n, path) for n, path in enumerate(paths)])
    for found in read_samples(data, str(tmp_path / "images"), tmp_path / "cache"):
        assert read_picture(found["image"][0]).getpixel((0, 0)) == (1, 2, 3)


def test_a_wrong_image_folder_is_told_at_the_start(tmp_path):
    data = write(tmp_path / "data.json", [sample(n, f"{n}.png") for n in range(3)])
    assert "there is no picture" in (message := refused(tmp_path, data)) and "set image_folder" in message


def test_several_pictures_anywhere_in_the_text(tmp_path):
    """Pixels come in the order of the marks; a mark that stands alone in its turn moves to the front, as in LLaVA."""
    turns = [{"from": "human", "value": "Left <image> or right\n<image>?"}, {"from": "gpt", "value": "Left."},
             {"from": "human", "value": "And this? <image>"}, {"from": "gpt", "value": "No."},
             {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    names = ["scene03.png", "scene05.png", "scene01.png"]
    data = write(tmp_path / "data.json", [{"id": 1, "image": names, "conversations": turns}])
    samples = read_samples(data, str(LLAVA_TRAIN / "images"), tmp_path / "cache")
    model, processor = build(settings(tmp_path))
    item = ConversationDataset(samples, ChatEncoder(processor.tokenizer, processor.chat_template),
                               processor.image_processor, model.config.image_token_id, lambda size: 1, 400)[0]
    text = processor.tokenizer.decode(item["input_ids"]).replace(" ", "")
    assert "Left<image>orright\n<image>?ASSISTANT:" in text and "USER:<image>\nAndthis?ASSISTANT:" in text
    expected = processor.image_processor([open_rgb(LLAVA_TRAIN / "images" / name) for name in names],
                                         return_tensors="pt")["pixel_values"]
    assert torch.equal(item["pictures"], expected) and (item["input_ids"] == model.config.image_token_id).sum() == 3


# --- several sources -----------------------------------------------------------------------------------------------


def two_sources(folder: Path) -> list[dict]:
    for name, colour in (("one", (255, 0, 0)), ("two", (0, 255, 0))):
        write(folder / name / "data.json", [sample(n, "a.png") for n in range(6)])
        Image.new("RGB", (8, 8), colour).save(folder / name / "a.png")
    return [{"path": str(folder / "one/data.json"), "weight": 2},
            {"path": str(folder / "two/data.json"), "weight": 0.5, "image_folder": str(folder / "two")}]


def test_sources_keep_their_pictures_and_their_names(tmp_path):
    samples = read_samples(two_sources(tmp_path), "", tmp_path / "cache")
    assert len(samples) == 12 and samples.weights == [(6, 2), (6, 0.5)]
    assert [found["id"] for found in samples][5:7] == [f"{tmp_path}/one/data.json: s5", f"{tmp_path}/two/data.json: s0"]
    colours = [read_picture(found["image"][0]).getpixel((0, 0)) for found in samples]
    assert colours == [(255, 0, 0)] * 6 + [(0, 255, 0)] * 6
    assert samples.lengths == [9] * 12 and isinstance(samples, Samples)


def test_a_mixture_trains_from_yaml_and_command_line(tmp_path):
    """3 + 12 samples an epoch: all of the first source twice, half of the second."""
    values = {key: value for key, value in vars(settings(tmp_path / "yaml")).items() if key != "lora"}
    write(tmp_path / "run.yaml", json.dumps({**values, "data": two_sources(tmp_path), "image_folder": "", "epochs": 2,
                                             "template": "plain", "llm_tuning": "frozen"}))
    from_file = load_config(VLMConfig, [str(tmp_path / "run.yaml")], "")
    train(from_file)
    rows = read_jsonl(tmp_path / "yaml/metrics.jsonl")
    assert [row["samples"] for row in rows] == [4, 4, 4, 3] * 2
    summary = (tmp_path / "yaml/summary.md").read_text()
    assert "`data.json`: 6 samples, weight 2; `data.json`: 6 samples, weight 0.5; 2 passes |" in summary
    line = json.dumps(from_file.data).replace('"', "")
    one = load_config(VLMConfig, [str(tmp_path / "run.yaml"), f"data={line}"], "")
    assert one.data == from_file.data
    two = load_config(VLMConfig, [str(tmp_path / "run.yaml"), f"data={tmp_path}/one/data.json"], "")
    assert two.data == f"{tmp_path}/one/data.json"


@pytest.mark.parametrize("data, words", [
    ([], "neither a path nor a list"), (7, "neither a path nor a list"), ({"path": "a.json"}, "neither a path nor"),
    (["a.json"], "entry 1: 'a.json' must have a path"), ([{"weight": 2}], "must have a path"),
    ([{"path": "a.json", "wieght": 2}], "nothing else"), ([{"path": "a.json", "weight": 0}], "weight 0 must be"),
    ([{"path": "a.json", "weight": "2"}], "weight '2'"), ([{"path": "a.json", "weight": float("nan")}], "weight nan"),
])
def test_a_wrong_mixture_is_one_sentence(tmp_path, data, words):
    assert words in refused(tmp_path, data)


def test_a_weight_that_uses_no_sample_is_refused(tmp_path):
    data = write(tmp_path / "data.json", [sample(n) for n in range(4)])
    with pytest.raises(UserError, match="4 samples; at weight 0.1 none would be used"):
        read_samples([{"path": data, "weight": 0.1}], "", tmp_path / "cache")


# --- datasets ------------------------------------------------------------------------------------------------------


def save_datasets(folder: Path, samples: list[dict], image) -> str:
    features = {"id": datasets.Value("string"), "image": image,
                "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}]}
    datasets.Dataset.from_list(samples, features=datasets.Features(features)).save_to_disk(str(folder))
    return str(folder)


def test_pictures_in_a_datasets_folder_are_not_read_at_the_start(tmp_path):
    noise = np.random.default_rng(0).bytes(1_000_000)
    data = save_datasets(tmp_path / "d", [sample(n, {"bytes": noise, "path": None}) for n in range(60)],
                         datasets.Image())
    (found,), _, _ = vlm_data.limited(24, [(vlm_data.index, data, tmp_path / "cache")])
    assert found == 60
    assert read_samples(data, "", tmp_path / "cache")[59]["image"] == [{"bytes": noise, "path": None}]


def test_datasets_folders_with_lists_paths_and_none(tmp_path):
    """As `datasets` itself gives them, but for paths, which lead to the pictures."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    rows = [sample(0, [stored, stored], "<image> or <image>?"), sample(1) | {"image": None}, sample(2) | {"image": []},
            sample(3, [stored])]
    listed = datasets.List(datasets.Image())
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    samples = read_samples(save_datasets(tmp_path / "lists", rows, listed), "", tmp_path / "c")
    assert [found["image"] for found in samples] == [[stored, stored], [], [], [stored]]
    assert [length > 0 for length in samples.lengths] == [True, False, False, True]
    for name, image, feature in (("text", "a.png", datasets.Value("string")),
                                 ("struct", {"bytes": None, "path": "a.png"}, plain)):
        paths = save_datasets(tmp_path / name, [sample(0, image), sample(1)], feature)
        assert read_samples(paths, "", tmp_path / "c")[0]["image"] == [str(tmp_path / "a.png")]
    outside = save_datasets(tmp_path / "outside", [sample(0, {"bytes": None, "path": "../a.png"})], plain)
    assert "sample 0 (id 's0') has a picture outside" in refused(tmp_path / "y", outside)
    marks = save_datasets(tmp_path / "marks", [sample(0, [stored], "no mark")], listed)
    assert "has 1 picture(s) but 0 <image> mark(s)" in refused(tmp_path / "y", marks)


# --- pictures ------------------------------------------------------------------------------------------------------


def odd_pictures(folder: Path) -> list[str]:
    """Unusual, but good ones."""
    folder.mkdir()
    red = Image.new("RGB", (30, 20), (200, 10, 10))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    palette = noise.quantize(16)
    palette.info["transparency"] = 3
    see_through = noise.copy()
    see_through.putalpha(Image.linear_gradient("L").resize((30, 20)))
    turned = Image.Exif()
    turned[0x0112] = 6
    red.resize((1, 1)).save(folder / "pixel.png")
    noise.crop((0, 0, 30, 1)).save(folder / "line.png")
    noise.crop((0, 0, 3, 20)).save(folder / "column.png")
    noise.crop((0, 0, 30, 3)).save(folder / "three.png")
    noise.convert("L").save(folder / "grey.png")
    noise.convert("LA").save(folder / "grey_alpha.png")
    noise.convert("1").save(folder / "bits.png")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.save(folder / "turned.jpg", exif=turned)
    palette.save(folder / "palette.png")
    see_through.save(folder / "transparent.png")
    noise.save(folder / "animated.gif", save_all=True, append_images=[red])
    return sorted(file.name for file in folder.iterdir())


def claimed_png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
            + b"\0\0\0 IDAT")


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_odd_pictures_become_the_pixels_of_llava(tmp_path, aspect):
    """By a plain version of LLaVA's steps: RGB without more ado, padded with the mean colour or cut to a square."""
    names = odd_pictures(tmp_path / "images")
    processor = build(settings(tmp_path, image_aspect_ratio=aspect))[1].image_processor
    side, mean, std = processor.crop_size["height"], np.array(processor.image_mean), np.array(processor.image_std)
    for name in names:
        with Image.open(tmp_path / "images" / name) as picture:
            image = picture.convert("RGB")
        width, height = image.size
        if aspect == "pad":
            longest = max(image.size)
            padded = Image.new("RGB", (longest, longest), tuple(int(value * 255) for value in mean))
            padded.paste(image, ((longest - width) // 2, (longest - height) // 2))
            image = padded.resize((side, side), Image.Resampling.BICUBIC)
        else:
            scale = side / min(image.size)
            image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        expected = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)
        found = processor(read_picture(str(tmp_path / "images" / name)), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_odd_pictures_train_and_unreadable_ones_are_skipped(tmp_path, capsys, aspect):
    """No warning, no pixel mistaken for a channel; every sample is used or named."""
    good = odd_pictures(tmp_path / "images")
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "images/16_bit.png")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (tmp_path / "images/cut.jpg").write_bytes(buffer.getvalue()[:-400])
    (tmp_path / "images/bomb.png").write_bytes(claimed_png(20_000, 20_000))
    (tmp_path / "images/line_of_20000.png").write_bytes(claimed_png(20_000, 1))
    (tmp_path / "images/empty.png").touch()
    (tmp_path / "images/text.png").write_text("no picture")
    (tmp_path / "images/folder.png").mkdir()
    bad = ["cut.jpg", "bomb.png", "line_of_20000.png", "empty.png", "text.png", "folder.png", "gone.png", "nul\0.png"]
    samples = [sample(n, name, id=name) for n, name in enumerate([*good, "16_bit.png", *bad])]
    data = write(tmp_path / "data.json", [*samples, sample(99, image="", question="Hm?")])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        train(settings(tmp_path / "run", data=data, image_folder=str(tmp_path / "images"), llm_tuning="frozen",
                       global_batch_size=22, micro_batch_size=22, image_aspect_ratio=aspect))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert sum(row["skipped"] for row in rows) == len(bad)
    assert sum(row["samples"] for row in rows) == len(good) + 2
    output = "".join(capsys.readouterr())
    assert all(f"skipped sample {name}: unreadable picture {tmp_path}/images/{name}: " in output for name in bad)
    assert "refused for its 20000 x 20000 pixels" in output or "exceeds limit" in output
