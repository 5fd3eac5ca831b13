"""Clusters, batches, loss, data and scores of train_encoder, against hand computations and plain oracles."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from clipmoe_vlm.runs import UserError
from train_encoder.clusters import accumulate, stage_labels
from train_encoder.data import Samples, build_index
from train_encoder.loss import contrastive_loss
from train_encoder.sampler import batch_report, cluster_batches, merge_small, rank_slice
from train_encoder.train import learning_rate
from train_encoder.zero_shot import hard_accuracy, retrieval


def blobs(places: list[int], seed: int) -> np.ndarray:
    """[N, 4] features, tightly around the axis that each place names."""
    noise = np.random.default_rng(seed).normal(scale=0.01, size=(len(places), 4))
    return (np.eye(4)[places] + noise).astype(np.float32)


def test_stage_labels_combine_modalities_and_accumulate_by_hand():
    image_blobs, text_blobs = [0, 0, 1, 1, 2, 2] * 4, [0, 1, 2] * 8
    labels = stage_labels(blobs(image_blobs, 0), blobs(text_blobs, 1), 3, seed=0)
    pairs = list(zip(text_blobs, image_blobs, strict=True))
    # Cluster numbers are arbitrary, so: same label exactly where both blobs are the same; text is label // 3.
    for a in range(24):
        for b in range(24):
            assert (labels[a] == labels[b]) == (pairs[a] == pairs[b])
            assert (labels[a] // 3 == labels[b] // 3) == (text_blobs[a] == text_blobs[b])
            assert (labels[a] % 3 == labels[b] % 3) == (image_blobs[a] == image_blobs[b])
    assert labels.min() >= 0 and labels.max() <= 8
    assert np.array_equal(labels, stage_labels(blobs(image_blobs, 0), blobs(text_blobs, 1), 3, seed=0))

    first, second = np.array([0, 5, 8, -1]), np.array([2, 7, 0, 1])
    assert accumulate(None, first, 3) is first
    accumulated = accumulate(first, second, 3)
    assert accumulated.tolist() == [2, 5 * 9 + 7, 8 * 9, -1]
    assert accumulate(accumulated, np.array([1, 1, 1, 1]), 3).tolist() == [19, 52 * 9 + 1, 72 * 9 + 1, -1]


def test_unreadable_samples_get_no_label():
    image, text = blobs([0, 1, 2] * 4, 0), blobs([0, 1, 2] * 4, 1)
    image[5] = np.nan
    labels = stage_labels(image, text, 3, seed=0)
    assert labels[5] == -1 and (np.delete(labels, 5) >= 0).all()


def test_fewer_samples_than_clusters_is_refused():
    with pytest.raises(UserError, match="2 readable training samples cannot make 3 clusters"):
        stage_labels(blobs([0, 1], 0), blobs([0, 1], 0), 3, seed=0)


@given(labels=st.lists(st.integers(-1, 6), max_size=120), size=st.sampled_from([2, 4, 6]), seed=st.integers(0, 99),
       epoch=st.integers(0, 3))
def test_batches_are_pure_disjoint_and_use_each_cluster_up(labels, size, seed, epoch):
    labels = np.array(labels, np.int64)
    batches = cluster_batches(labels, size, seed=seed, epoch=epoch)
    assert np.array_equal(batches, cluster_batches(labels, size, seed=seed, epoch=epoch))
    drawn = batches.flatten()
    assert len(set(drawn)) == len(drawn)
    for batch in batches:
        assert len(set(labels[batch])) == 1 and labels[batch[0]] >= 0
    turns = labels[batches[:, 0]].tolist() if len(batches) else []
    for label in set(labels[labels >= 0]):
        assert turns.count(label) == (labels == label).sum() // size
    # Round robin: between two turns of a cluster every cluster that still has a batch left has one.
    left = {label: turns.count(label) for label in set(turns)}
    while turns:
        round_size = len([label for label in left if left[label]])
        assert sorted(turns[:round_size]) == sorted(label for label in left if left[label])
        turns, left = turns[round_size:], {label: max(0, n - 1) for label, n in left.items()}
    halves = [rank_slice(batches, rank, 2) for rank in range(2)]
    assert np.array_equal(np.concatenate(halves, axis=1), batches)


def test_passes_and_seeds_differ():
    labels = np.repeat([0, 1], 20)
    first = cluster_batches(labels, 4, seed=0, epoch=0)
    assert not np.array_equal(first, cluster_batches(labels, 4, seed=0, epoch=1))
    assert not np.array_equal(first, cluster_batches(labels, 4, seed=1, epoch=0))


def test_small_clusters_are_merged_with_the_nearest_sibling_only():
    # Clusters 0, 1, 2 share a parent, 9 is alone under another one; 1 lies next to 2.
    labels = np.array([0] * 6 + [1] * 2 + [2] * 5 + [9] * 3 + [-1])
    centres = {0: np.array([0.0]), 1: np.array([4.0]), 2: np.array([5.0]), 9: np.array([4.1])}
    merged = merge_small(labels, centres, {0: 0, 1: 0, 2: 0, 9: 1}, 4)
    assert merged.tolist() == [0] * 6 + [2] * 7 + [9] * 3 + [-1]
    report = batch_report(merged, 4)
    assert report["sizes"] == [6, 7, 3]
    assert (report["used_samples"], report["dropped_samples"], report["too_small"]) == (8, 8, 1)


def test_no_cluster_of_a_whole_batch_is_refused():
    message = r"none of the 2 clusters of the 6 training samples fills one batch of 4 .* has 3\)"
    with pytest.raises(UserError, match=message):
        batch_report(np.array([0, 0, 0, 1, 1, 1, -1]), 4)


def features(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(rows, 8, generator=generator), dim=-1) for _ in range(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_cross_entropy_and_leaves_invalid_rows_out(smoothing):
    image, text = features(6, 0)
    logits = 100 * image @ text.T
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target, label_smoothing=smoothing)
                + F.cross_entropy(logits.T, target, label_smoothing=smoothing)) / 2
    everything = torch.ones(6, dtype=torch.bool)
    loss = contrastive_loss(image, text, everything, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    cooler = (F.cross_entropy(logits / 5, target) + F.cross_entropy(logits.T / 5, target)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, everything, logit_scale=20.0), cooler)

    valid = torch.tensor([True, False, True, True, False, True])
    image.requires_grad_()
    masked = contrastive_loss(image, text, valid, label_smoothing=smoothing)
    torch.testing.assert_close(masked, contrastive_loss(image[valid], text[valid], everything[:4],
                                                        label_smoothing=smoothing))
    gradient, = torch.autograd.grad(masked, image)
    assert gradient.isfinite().all() and not gradient[~valid].any() and gradient[valid].any()


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 10, 2.0, 4) for step in range(1, 11)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.2


def test_retrieval_with_several_captions_against_sorting():
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(12), 3)[:-1]  # the last picture has two captions
    image, text = generator.normal(size=(12, 5)), generator.normal(size=(35, 5))
    result = retrieval(image, text, owners)
    scores = text @ image.T
    for k in (1, 5, 10):
        found = [any(owners[c] == i for c in np.argsort(-scores[:, i])[:k]) for i in range(12)]
        assert result["image_to_text"][f"R@{k}"] == pytest.approx(np.mean(found))
        found = [owners[c] in np.argsort(-scores[c])[:k] for c in range(35)]
        assert result["text_to_image"][f"R@{k}"] == pytest.approx(np.mean(found))
    assert np.mean(result["image_to_text_hits"]) == pytest.approx(result["image_to_text"]["R@1"])


def test_a_model_that_sees_no_difference_scores_nothing():
    result = retrieval(np.ones((20, 4)), np.ones((20, 4)), np.arange(20))
    assert result["image_to_text"]["R@10"] == result["text_to_image"]["R@10"] == 0


def test_hard_accuracy_intervals_count_pictures_not_pairs():
    items = [{"image": str(n // 4), "kind": "color", "correct": int(n // 4 % 2)} for n in range(40)]
    result = hard_accuracy(items + [{"image": "a", "kind": "place", "correct": 1}])
    assert result["color"]["accuracy"] == 0.5 and result["color"]["n"] == 40
    assert result["color"]["high"] - result["color"]["low"] > 0.6  # 10 pictures: 2 * 2.26 * 0.167
    assert result["place"] == {"accuracy": 1.0, "low": None, "high": None, "n": 1}


# --- data ----------------------------------------------------------------------------------------------------------


def index(tmp_path, name: str, content: str, **columns) -> list[dict]:
    """The indexed rows of a captions file with this content."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    values = {"image_column": "image", "caption_column": "caption", "image_root": None, **columns}
    target = tmp_path / "index" / f"{name}.jsonl"
    count = build_index(str(tmp_path / name), target, **values)
    samples = Samples(target)
    assert len(samples) == count
    return [samples.record(number) for number in range(count)]


def test_every_captions_format_gives_the_same_samples(tmp_path):
    expected = [{"id": "1.png", "image": str(tmp_path / "1.png"), "caption": "a cat, \"grey\""},
                {"id": "2.png", "image": str(tmp_path / "2.png"), "caption": "ein Hündchen"}]
    rows = [{"image": row["id"], "caption": row["caption"]} for row in expected]
    assert index(tmp_path, "a.csv", 'image,caption\n1.png,"a cat, ""grey"""\n2.png,ein Hündchen\n') == expected
    assert index(tmp_path, "b.tsv", 'image\tcaption\n1.png\t"a cat, ""grey"""\n2.png\tein Hündchen\n') == expected
    assert index(tmp_path, "open_clip.csv", 'filepath\ttitle\n1.png\t"a cat, ""grey"""\n2.png\tein Hündchen\n',
                 image_column="filepath", caption_column="title") == expected
    assert index(tmp_path, "c.jsonl", "\n".join(map(json.dumps, rows))) == expected
    turns = [{"image": row["image"], "conversations": [{"from": "human", "value": "<image>\nDescribe."},
                                                       {"from": "gpt", "value": row["caption"]}]} for row in rows]
    assert index(tmp_path, "d.json", json.dumps(turns), caption_column="conversations") == expected
    two = index(tmp_path, "e.jsonl", json.dumps({"image": "x/1.png", "caption": ["one", "two"], "id": 7}),
                image_root="/pictures")
    assert two == [{"id": "7", "image": "/pictures/x/1.png", "caption": caption} for caption in ("one", "two")]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", "picture,text\n1.png,cat\n",
     r"a\.csv, sample 1: there is no column 'image' \(found: picture, text\); set image_column"),
    ("a.jsonl", '{"image": "1.png", "title": "cat"}\n', r"a\.jsonl, sample 1: .*'caption' \(found: image, title\)"),
    ("b.jsonl", '{"image": "1.png", "caption": "cat"}\n{"image": "2.png"}\n', "sample 2: there is no column 'caption'"),
    ("a.csv", "image,caption\n", r"a\.csv holds no samples"),
    ("a.json", "{", r"a\.json: not valid JSON"),
    ("a.txt", "cat", r"ends in \.csv, \.tsv, \.jsonl or \.json"),
    ("a.tar", "no tar" * 200, r"a\.tar is no plain tar file"),
])
def test_a_wrong_source_is_one_sentence(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        index(tmp_path, name, content)


def test_a_missing_or_changed_source_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv: no such file"):
        build_index(str(tmp_path / "nothing.csv"), tmp_path / "i.jsonl", "image", "caption", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"needs \.tar files"):
        build_index(str(tmp_path / "empty"), tmp_path / "i.jsonl", "image", "caption", None)
    index(tmp_path, "a.csv", "image,caption\n1.png,cat\n")
    with pytest.raises(UserError, match=r"a\.csv changed since"):
        index(tmp_path, "a.csv", "image,caption\n1.png,cat\n2.png,dog\n")


def test_shards_read_any_sample_in_any_order(tmp_path):
    picture = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(picture, "PNG")
    members = [("x/a.png", picture.getvalue()), ("x/a.txt", b"first \n"), ("b.json", b'{"caption": "second"}'),
               ("b.png", b"no picture"), ("c.png", picture.getvalue()), ("c.json", b'{"title": "third"}'),
               ("d.cls", b"0")]
    for part in ("0", "1"):
        with tarfile.open(tmp_path / f"s-{part}.tar", "w") as archive:
            for name, data in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    braces = str(tmp_path / "s-{0..1}.tar")
    assert build_index(braces, tmp_path / "braces.jsonl", "image", "caption", None) == 6
    assert build_index(str(tmp_path), tmp_path / "folder.jsonl", "image", "caption", None) == 6
    for name in ("braces", "folder"):
        samples = Samples(tmp_path / f"{name}.jsonl")
        assert [samples.caption(number) for number in (5, 4, 3)] == [None, "second", "first"]
        assert samples.picture(3).mode == "RGB" and samples.picture(3).getpixel((0, 0)) == (255, 0, 0)
        assert samples.picture(1).startswith("sample s-0/b: unreadable picture")
        assert samples.record(3)["id"] == "s-1/x/a"
    with tarfile.open(tmp_path / "bare.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match=r"bare\.tar: no sample with a picture and a .*endings found: png"):
        build_index(str(tmp_path / "bare.tar"), tmp_path / "bare.jsonl", "image", "caption", None)
