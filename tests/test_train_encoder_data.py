"""Training data of every layout, odd pictures, long and short captions, and what happens when data goes away."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import tarfile
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import webdataset
from encoder_data import ROOT, command, environment, save_scenes, save_tiny_clip, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from benchmarks import encoder_data as encoder_data_benchmark
from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.loading import loader
from clipmoe_vlm.processors import clip_tokenizer
from clipmoe_vlm.runs import UserError, load_config
from train_encoder.config import EncoderConfig
from train_encoder.data import Collate, Pairs, Samples, load_collate, open_picture
from train_encoder.sampler import cluster_batches, rank_slice
from train_encoder.sources import build_index


def index(source, **columns) -> Samples:
    """The samples of a source, and in `found` the line that tells about them."""
    target = Path(columns.pop("target", f"{source}.index/x.jsonl"))
    values = {"image_column": "image", "caption_column": "caption", "image_root": None, **columns}
    found = build_index(str(source), target, **values)
    samples = Samples(target)
    assert found.startswith(f"{len(samples)} samples in {source}")
    samples.found = found
    return samples


def rows(samples: Samples) -> list[dict]:
    return [samples.record(number) for number in range(len(samples))]


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def plain(color=(200, 30, 60), size=(6, 5)) -> Image.Image:
    return Image.new("RGB", size, color)


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


# --- captions files ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in (1, 2):
        plain().save(tmp_path / f"{number}.png")
    return tmp_path


def captions_file(file: Path, content: str, **columns) -> Samples:
    file.write_text(content, encoding="utf-8")
    return index(file, **columns)


def test_every_captions_format_gives_the_same_samples(folder):
    expected = [{"id": "1.png", "image": str(folder / "1.png"), "caption": "a cat, \"grey\""},
                {"id": "2.png", "image": str(folder / "2.png"), "caption": "ein Hündchen"}]
    pairs = [{"image": row["id"], "caption": row["caption"]} for row in expected]
    turns = [{"image": row["image"], "conversations": [{"from": "human", "value": "<image>\nDescribe."},
                                                       {"from": "gpt", "value": row["caption"]}]} for row in pairs]
    for name, content, columns in (
            ("a.csv", 'image,caption\n1.png,"a cat, ""grey"""\n2.png,ein Hündchen\n', {}),
            ("excel.csv", '\ufeffimage,caption\n1.png,"a cat, ""grey"""\n2.png,ein Hündchen\n', {}),
            ("b.tsv", 'image\tcaption\n1.png\t"a cat, ""grey"""\n2.png\tein Hündchen\n', {}),
            ("open_clip.csv", 'filepath\ttitle\n1.png\t"a cat, ""grey"""\n2.png\tein Hündchen\n',
             {"image_column": "filepath", "caption_column": "title"}),
            ("c.jsonl", "\n".join(map(json.dumps, pairs)), {}),
            ("sharegpt4v.json", json.dumps(turns), {"caption_column": "conversations"})):
        assert rows(captions_file(folder / name, content, **columns)) == expected, name


def test_several_captions_of_a_picture_are_several_samples(folder):
    (folder / "x").mkdir()
    shutil.copy(folder / "1.png", folder / "x" / "1.png")
    (folder / "elsewhere").mkdir()
    row = {"image": "x/1.png", "caption": ["one", " ", "two"], "id": 7}
    two = captions_file(folder / "elsewhere" / "e.jsonl", json.dumps(row), image_root=str(folder))
    assert rows(two) == [{"id": "7", "image": str(folder / "x" / "1.png"), "caption": text} for text in ("one", "two")]


def test_rows_without_picture_or_caption_are_counted_in_one_line(folder):
    samples = captions_file(folder / "a.jsonl", "\n".join(map(json.dumps, [
        {"image": "1.png", "caption": "cat"}, {"image": "2.png", "caption": "  "}, {"id": "text", "caption": "dog"},
        {"image": "2.png"}, {"image": "2.png", "caption": "dog"}])))
    assert [row["caption"] for row in rows(samples)] == ["cat", "dog"]
    assert samples.found.endswith("a.jsonl; left out: 2 without a caption (the first: 2.png), 1 without a picture (the "
                                  "first: text)")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", "picture,text\n1.png,cat\n",
     r"a\.csv, sample 1: there is no column 'image' \(found: picture, text\); set image_column"),
    ("a.jsonl", '{"image": "1.png", "title": "cat"}\n', r"a\.jsonl, sample 1: .*'caption' \(found: image, title\)"),
    ("a.csv", "image,caption\n", r"a\.csv holds no samples"),
    ("a.csv", "", r"a\.csv holds no samples"),
    ("a.csv", "image,caption\n1.png,\n", r"a\.csv: no usable sample; left out: 1 without a caption"),
    ("a.csv", f"image,caption\n1.png,{'x' * 200_000}\n", r"a\.csv: not valid CSV .*field larger than field limit"),
    ("a.json", "{", r"a\.json: not valid JSON"),
    ("a.json", '{"image": "1.png"}\n{"image": "2.png"}', r"a\.json: not valid JSON .*JSON lines are named \.jsonl"),
    ("a.json", '["1.png"]', r"a\.json holds no objects with 'image' and 'caption' but '1\.png'"),
    ("a.jsonl", '{"image": "1.png", "caption": "cat"}\n{', r"a\.jsonl, line 2: not valid JSON"),
    ("a.txt", "cat", r"ends in \.csv, \.tsv, \.jsonl or \.json"),
    ("a.csv", "image,caption\ngone/1.png,cat\n", r"no picture .*gone/1\.png, nor any of the first 1; set image_root"),
    ("a.tar", "no tar" * 200, r"a\.tar is no plain tar file"),
    ("a.parquet", "no parquet", r"a\.parquet: `datasets` cannot read it"),
])
def test_a_wrong_source_is_one_sentence(folder, monkeypatch, name, content, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    with pytest.raises(UserError, match=message) as error:
        captions_file(folder / name, content)
    assert "\n" not in str(error.value) and not (folder / f"{name}.index" / "x.jsonl").exists()


def test_a_missing_or_changed_source_is_refused(folder):
    (folder / "empty").mkdir()
    for source, message in (("nothing.csv", r"nothing\.csv: no such file"), ("{1..2.tar", "a brace pattern is written"),
                            ("{1..2}.tar", r"1\.tar: no such file"), ("empty", "empty holds no samples")):
        with pytest.raises(UserError, match=message):
            index(folder / source)
    first = captions_file(folder / "a.csv", "image,caption\n1.png,cat\n1.png,\n").found
    assert index(folder / "a.csv").found == first  # told again by a resumed run
    with pytest.raises(UserError, match=r"a\.csv changed since"):
        captions_file(folder / "a.csv", "image,caption\n1.png,cat\n1.png,\n2.png,dog\n")


def test_a_large_json_list_is_read_as_a_stream(folder):
    file = folder / "large.json"
    file.write_text(json.dumps([{"image": "1.png", "caption": f"{n} " + "word " * 200} for n in range(8_000)]))
    tracemalloc.start()
    samples = index(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples) == 8_000 and peak < file.stat().st_size / 4
    assert samples.caption(7_654).startswith("7654 word")


# --- shards and folders --------------------------------------------------------------------------------------------


def test_img2dataset_output_of_every_format_gives_the_same_samples(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = {}
    for name in ("webdataset", "files", "parquet"):
        samples = index(reference / "img2dataset" / name, target=tmp_path / f"{name}.jsonl",
                        caption_column="re_caption", image_column="jpg" if name == "parquet" else "image")
        found[name] = {row["id"].split("/")[-1]: (row["caption"], samples.picture(number).tobytes())
                       for number, row in enumerate(rows(samples))}
        assert ("2 without a picture" in samples.found) == (name == "parquet")
        if name != "parquet":
            assert {row["id"] for row in rows(samples)} == {"00000/000000", "00000/000001", "00001/000010",
                                                            "00001/000012"}
    # The same as webdataset's own reader sees.
    shards = str(reference / "img2dataset" / "webdataset" / "{00000..00001}.tar")
    expected = {sample["__key__"]: (sample["json"]["re_caption"], sample["jpg"].tobytes()) for sample in
                webdataset.WebDataset(shards, shardshuffle=False).decode("pil")}
    assert len(expected) == 4 and found["webdataset"] == found["files"] == found["parquet"] == expected
    # By default the caption is the .txt, which one of the four has empty.
    for source in (shards, reference / "img2dataset" / "files"):
        samples = index(source, target=tmp_path / "txt" / f"{Path(source).name}.jsonl")
        assert {row["caption"] for row in rows(samples)} == {"alt text 0", "alt text 1", "alt text 3"}
        assert samples.found.endswith("left out: 1 without a caption (the first: 00001/000010)")


def test_shards_read_any_sample_in_any_order_and_count_what_is_amiss(tmp_path):
    picture, other = encoded(plain()), encoded(plain((1, 2, 3)))
    members = [("x/a.png", encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))), ("x/a.txt", b"first \n"),
               ("b.json", b'{"caption": "second"}'), ("b.png", b"no picture"), ("c.png", picture),
               ("c.json", b'{"title": "third"}'), ("d.cls", b"0"), ("e.txt", b"alone"), ("f.jpg", picture),
               ("g.png", picture), ("g.txt", b"the one"), ("g.png", other), ("g.txt", b"the other"),
               ("._a.jpg", b"of a Mac"), ("h.JPG", picture), ("h.json", b"{"), ("i.png", picture), ("i.txt", b"last")]
    for part in ("0", "1"):
        write_tar(tmp_path / f"s-{part}.tar", members)
    write_tar(tmp_path / "s-2.tar", [])  # all of its downloads failed
    braces, folder = tmp_path / "s-{0..2}.tar", tmp_path
    for source in (braces, folder):
        samples = index(source, target=tmp_path / "index" / f"{source.name}.jsonl")
        assert [row["id"] for row in rows(samples)] == [f"s-{part}/{key}" for part in (0, 1) for key in
                                                        ("x/a", "b", "g", "i")]
        assert [samples.caption(number) for number in (7, 5, 4, 6)] == ["last", "second", "first", "the one"]
        assert samples.picture(4).mode == "RGB" and samples.picture(4).getpixel((0, 0)) == (255, 0, 0)
        assert samples.picture(6).getpixel((0, 0)) == (200, 30, 60)
        assert samples.picture(1).startswith("sample s-0/b: unreadable picture")
        assert samples.found.endswith(
            "left out: 6 without a caption (the first: s-0/c), 4 without a picture (the first: s-0/d), "
            "2 with a key used before (the first: s-0/g)")
    assert [row["caption"] for row in rows(index(braces, target=tmp_path / "t.jsonl", caption_column="title"))] == [
        "third", "third"]


def test_shards_without_a_sample_or_torn_are_refused(tmp_path):
    bare = write_tar(tmp_path / "bare.tar", [("a.png", b"")])
    with pytest.raises(UserError, match=r"bare\.tar: no sample with a picture and a caption .*first has: png"):
        index(bare)
    whole = write_tar(tmp_path / "whole.tar", [("a.png", encoded(plain())), ("a.txt", b"cat"), ("b.txt", b"x" * 5000)])
    (tmp_path / "torn.tar").write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"torn\.tar is no plain tar file, or torn"):
        index(tmp_path / "torn.tar")


def test_equal_names_of_shards_in_several_folders_give_different_ids(tmp_path):
    for name in ("cc", "laion"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", [("0.png", encoded(plain())), ("0.txt", name.encode())])
    samples = index(tmp_path / "{cc,laion}" / "00000.tar", target=tmp_path / "i.jsonl")
    assert [row["id"] for row in rows(samples)] == ["cc/00000/0", "laion/00000/0"]


def test_a_folder_of_pictures_with_text_files(folder):
    (folder / "1.txt").write_text("one")
    (folder / "deep").mkdir()
    (folder / "deep" / "3.jpg").write_bytes(encoded(plain(), "JPEG"))
    (folder / "deep" / "3.json").write_text('{"caption": "three"}')
    samples = index(folder, target=folder.parent / f"{folder.name}.jsonl")
    assert [(row["id"], row["caption"]) for row in rows(samples)] == [("1", "one"), ("deep/3", "three")]
    assert "1 without a caption (the first: 2)" in samples.found


# --- datasets ------------------------------------------------------------------------------------------------------


def test_datasets_folders_and_parquet_give_the_pixels_that_datasets_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pictures = [plain((40 * n, 10, 250 - n)) for n in range(6)]
    data = datasets.Dataset.from_dict(
        {"image": [*pictures, None], "caption": [*(f"colour {n}" for n in range(5)), "", "none"],
         "short": [str(n) for n in range(7)]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"),
                                    "short": datasets.Value("string")})).select([4, 6, 0, 5, 2, 3, 1])
    data.save_to_disk(str(tmp_path / "folder"), num_shards=3)
    (tmp_path / "parquet").mkdir()
    for shard in range(2):
        data.shard(2, shard, contiguous=True).to_parquet(str(tmp_path / "parquet" / f"{shard}.parquet"))
    for source in ("folder", "parquet", "parquet/*.parquet"):
        samples = index(tmp_path / source, target=tmp_path / f"{source.replace('*', 'all')}.jsonl",
                        short_captions="short")
        assert [row["caption"] for row in rows(samples)] == [f"colour {n}" for n in (4, 0, 2, 3, 1)]
        assert [row["id"] for row in rows(samples)] == ["0", "2", "4", "5", "6"]  # the row's number
        assert [row["short"] for row in rows(samples)] == ["4", "0", "2", "3", "1"]
        for row, number in zip(rows(samples), range(len(samples)), strict=True):
            assert samples.picture(number).tobytes() == data[int(row["id"])]["image"].tobytes()
        assert samples.found.endswith("1 without a picture (the first: 1), 1 without a caption (the first: 3)")


def test_datasets_and_parquet_may_name_files_and_hold_ids_and_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    plain().save(tmp_path / "1.png")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "an answer"}]
    columns = {"id": ["a", "b"], "talk": [turns] * 2}
    datasets.Dataset.from_dict({"image": ["1.png"] * 2, **columns}).save_to_disk(str(tmp_path / "folder"))
    parquet.write_table(pyarrow.table({"image": [{"bytes": None, "path": "1.png"}] * 2, **columns}),
                        tmp_path / "a.parquet")
    for source in ("folder", "a.parquet"):
        samples = index(tmp_path / source, caption_column="talk", image_root=str(tmp_path))
        assert rows(samples) == [{"id": key, "image": str(tmp_path / "1.png"), "caption": "an answer"} for key in "ab"]


@pytest.mark.parametrize(("columns", "message"), [
    ({"image_column": "picture"}, r"sample 1: there is no column 'picture' \(found: image, url\); set image_column"),
    ({"image_column": "url", "caption_column": "text"}, "there is no column 'text'"),
    ({}, "pictures are stored as bytes, as a path or as `datasets` Image, not as int64"),
])
def test_datasets_without_pictures_or_captions_are_refused(tmp_path, columns, message):
    datasets.Dataset.from_dict({"image": [1, 2], "url": ["a", "b"]}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=message):
        index(tmp_path / "d", **columns)


def test_a_folder_of_splits_names_them(tmp_path):
    data = datasets.Dataset.from_dict({"image": ["1.png"], "caption": ["cat"]})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="holds several splits; name one of test, train as "):
        index(tmp_path / "d")


# --- pictures ------------------------------------------------------------------------------------------------------


def opened(tmp_path: Path, data: bytes) -> Image.Image | str:
    """The picture from a file, the same from a shard; no warning in either case."""
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "shard").write_bytes(b"before" + data + b"after")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = open_picture(str(tmp_path / "file"), "x")
        two = open_picture([str(tmp_path / "shard"), 6, len(data)], "x")
    if isinstance(one, str):
        assert one.startswith("sample x: ") and two.startswith("sample x: ")
    else:
        assert one.mode == two.mode == "RGB" and one.tobytes() == two.tobytes()
    return one


def test_odd_pictures_become_rgb(tmp_path):
    red = (255, 0, 0)
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.info["transparency"] = b"\x80\x00"
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    cases = {
        "cmyk": encoded(plain(red).convert("CMYK"), "JPEG", quality=100),
        "palette": encoded(palette),
        "transparent": encoded(Image.new("RGBA", (4, 4), (*red, 0))),
        "animated": encoded(Image.new("RGB", (4, 4), red), "GIF", save_all=True,
                            append_images=[Image.new("RGB", (4, 4), (0, 0, 255))]),
        "webp": encoded(Image.new("RGB", (4, 4), red), "WEBP", lossless=True, save_all=True,
                        append_images=[Image.new("RGB", (4, 4), (0, 0, 255))]),
        "one pixel": encoded(plain(red, (1, 1))),
    }
    for name, data in cases.items():
        assert np.abs(np.array(opened(tmp_path, data).getpixel((0, 0))) - red).max() <= 2, name
    for kind in ("PNG", "TIFF"):
        grey = np.asarray(opened(tmp_path, encoded(Image.fromarray(ramp), kind)))
        assert np.array_equal(grey[..., 0], ramp // 256) and np.array_equal(grey[..., 0], grey[..., 2])
    assert opened(tmp_path, encoded(plain(size=(8, 4)), "JPEG", exif=turned)).size == (8, 4)


def claimed_png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, with nothing after it that could be decoded."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + b"\0\0\0 IDAT"


@pytest.mark.parametrize(("size", "limit"), [((20_000, 20_000), 1), ((20_000, 20_000), None), ((20_000, 1), 1)])
def test_pictures_too_large_are_refused_by_their_header(tmp_path, monkeypatch, size, limit):
    if limit is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries set it
    message = opened(tmp_path, claimed_png(*size))
    assert ("refused for its" if limit is None or size[1] == 1 else "exceeds limit") in message
    assert "unreadable" in opened(tmp_path, claimed_png(10, 10))  # what that file is otherwise


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]), data=st.data())
def test_broken_files_are_skipped_never_an_error(tmp_path, kind, data):
    whole = bytearray(encoded(plain(size=(16, 16)), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    (tmp_path / "broken").write_bytes(whole[:cut])
    picture = open_picture(str(tmp_path / "broken"), "x")
    assert picture.startswith("sample x: ") if isinstance(picture, str) else picture.mode == "RGB"


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collate(tmp_path_factory) -> Collate:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_clip(folder / "clip")
    return load_collate(folder / "clip")


@pytest.fixture
def shards(tmp_path) -> Samples:
    """32 scenes in two shards, their captions with a second sentence."""
    save_scenes(tmp_path, 32, "scenes", 3)
    lines = (tmp_path / "scenes.csv").read_text().splitlines()[1:]
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [
            member for line in lines[shard * 16:shard * 16 + 16] for path, _, caption in [line.partition(",")]
            for member in ((f"{Path(path).stem}.png", (tmp_path / path).read_bytes()),
                           (f"{Path(path).stem}.txt", f"{caption}. on the left".encode()))])
    return index(tmp_path / "{0..1}.tar", target=tmp_path / "i.jsonl", short_captions="first_sentence")


def test_batches_are_the_same_whatever_the_workers_and_ranks(shards, collate):
    batches = cluster_batches(np.arange(32) % 2, 8, seed=0, epoch=0)
    whole = list(loader(Pairs(shards), collate, batches, 0))
    assert len(whole) == 4
    for batch, numbers in zip(whole, batches, strict=True):
        assert torch.equal(batch["input_ids"], collate.captions([shards.caption(n) for n in numbers])[0])
    parts = [list(loader(Pairs(shards), collate, rank_slice(batches, rank, 2), 2)) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for key in ("pixel_values", "input_ids", "short_input_ids", "valid"):
            assert torch.equal(batch[key], torch.cat([half[key] for half in halves]))


def test_short_captions_are_the_first_sentence_as_in_long_clip_or_a_column(shards, collate, folder):
    # The rule of Long-CLIP's train/sharegpt4v.py.
    long = shards.caption(5)
    assert long.endswith(". on the left") and shards.record(5)["short"] == long.replace("\n", " ").split(". ")[0]
    batch = next(loader(Pairs(shards), collate, [[5, 6]], 0))
    assert torch.equal(batch["short_input_ids"], collate.captions([shards.record(n)["short"] for n in (5, 6)])[0])
    assert not torch.equal(batch["short_input_ids"], batch["input_ids"])
    content = "image,caption,title\n1.png,a dog on the left,a dog\n2.png,a cat,\n"
    samples = captions_file(folder / "a.csv", content, short_captions="title")
    assert [row["short"] for row in rows(samples)] == ["a dog"] and "1 without a caption" in samples.found
    plain_pairs = Pairs(index(folder / "a.csv", target=folder / "plain.jsonl"))
    assert "short_input_ids" not in next(loader(plain_pairs, collate, [[0, 1]], 0))
    with pytest.raises(UserError, match=r"there is no column 'brief' .*; set short_captions"):
        index(folder / "a.csv", target=folder / "none.jsonl", short_captions="brief")


def test_captions_of_10000_words_are_truncated_without_a_word(collate, caplog, recwarn):
    tokenizer = clip_tokenizer(248)
    long = Collate(collate.image_processor, tokenizer, 248, 16)
    words = "internationalisation " * 10_000
    ids = long.captions([words, "a dog"])[0]
    expected = tokenizer([words, "a dog"], padding="max_length", truncation=True, max_length=248)["input_ids"]
    assert ids.tolist() == expected and ids[0, -1] == tokenizer.eos_token_id
    assert not recwarn.list and not caplog.records


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_mid_epoch_is_one_sentence(shards, collate, tmp_path, workers):
    batches = loader(Pairs(shards), collate, [[n, 31 - n] for n in range(16)], workers)
    assert next(batches)["valid"].all()
    (tmp_path / "1.tar").unlink()
    with pytest.raises(UserError) as error:
        list(batches)
    assert "1.tar can no longer be read (No such file or directory); bring it back" in str(error.value)
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_a_shard_that_shrinks_is_one_sentence_and_a_missing_picture_is_skipped(shards, collate, folder, tmp_path):
    with open(tmp_path / "0.tar", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(UserError, match=r"0\.tar can no longer be read \(it became shorter\)"):
        next(loader(Pairs(shards), collate, [[0]], 0))
    samples = captions_file(folder / "a.csv", "image,caption\n1.png,cat\n2.png,dog\n")
    (folder / "1.png").unlink()
    batch = next(loader(Pairs(samples), collate, [[0, 1]], 0))
    assert batch["valid"].tolist() == [False, True] and not batch["pixel_values"][0].any()
    assert len(batch["errors"]) == 1 and batch["errors"][0].startswith("sample 1.png: unreadable picture")


# --- whole programs ------------------------------------------------------------------------------------------------


def test_a_run_whose_shard_vanishes_ends_in_one_line(shards, tmp_path):
    save_tiny_clip(tmp_path / "clip")
    config = tiny_config(tmp_path, tmp_path / "out", train_data=str(tmp_path / "{0..1}.tar"), method="direct",
                         workers=1, mcl={"max_steps": 100_000}, validation_data=None, hard_captions=None)
    process = subprocess.Popen(command(config), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    end, metrics = time.monotonic() + 200, tmp_path / "out" / "metrics.jsonl"
    while time.monotonic() < end and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    (tmp_path / "1.tar").unlink()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.count("error: ") == 1 and f"error: {tmp_path}/1.tar can no longer be read" in errors
    assert CLIPMoEModel.from_pretrained(tmp_path / "out" / "base").num_parameters() > 0


def test_the_benchmark_says_which_is_the_bottleneck(shards, tmp_path, capsys):
    save_tiny_clip(tmp_path / "clip")
    config = tiny_config(tmp_path, tmp_path / "out", train_data=str(tmp_path / "{0..1}.tar"), workers=2)
    encoder_data_benchmark.main(load_config(EncoderConfig, [str(config)], "benchmark"))
    *_, sentence, line = capsys.readouterr().out.strip().splitlines()
    result = json.loads(line)
    assert {"1", "2"} <= result["loader"].keys() and min(result["loader"].values()) > 0 and result["model"] > 0
    slower = "data" if result["loader"]["2"] < result["model"] else "model"
    assert sentence.startswith(f"The {slower} is the bottleneck: with workers=2 ") and not (tmp_path / "out").exists()
