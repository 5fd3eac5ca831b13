"""Multistage contrastive learning: encoded features, their clusters, and the batches, against plain oracles."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_data import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from benchmarks import clusters_at_scale
from clipmoe_vlm.runs import Distributed, UserError, load_config
from train_encoder import features as features_module
from train_encoder.clusters import accumulate, centres, kmeans, stage_labels
from train_encoder.config import EncoderConfig
from train_encoder.features import Features, Items, encode
from train_encoder.run import main
from train_encoder.sampler import batch_report, cluster_batches, merge_small, rank_slice

# --- features ------------------------------------------------------------------------------------------------------


def collate(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Item n -> the inputs [n, 1, ..., 1]; every seventh is unreadable."""
    valid = [number % 7 != 3 for number in numbers]
    inputs = torch.ones(len(numbers), 6)
    inputs[:, 0] = torch.tensor(numbers)
    return inputs, torch.tensor(valid), [f"no {n}" for n, good in zip(numbers, valid, strict=True) if not good]


def encode_items(folder: Path, count: int, feature=lambda inputs: inputs, **changes) -> list[str]:
    values = {"dim": 6, "distributed": Distributed(0, 1, torch.device("cpu")), "workers": 0, "precision": "fp32",
              "description": "encoding", **changes}
    return encode(feature, Items(count, int), collate, folder, **values)


def expected_rows(count: int) -> np.ndarray:
    rows = np.ones((count, 6))
    rows[:, 0] = np.arange(count)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[3::7] = np.nan
    return rows


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK", 4)
    monkeypatch.setattr(features_module, "SHARD", 16)


def test_shards_hold_every_sample_and_are_read_in_any_order(tmp_path, small_shards):
    assert encode_items(tmp_path / "a", 43) == [f"no {n}" for n in range(3, 43, 7)]
    encode_items(tmp_path / "b", 43, feature=lambda inputs: -inputs, dtype=np.float16)
    names = [f"0000{n}" for n in range(3)]
    assert sorted(os.listdir(tmp_path / "a")) == [f"{name}.{end}" for name in names for end in ("json", "npy")]
    assert [np.load(tmp_path / "b" / f"{name}.npy").shape for name in names] == [(16, 6), (16, 6), (11, 6)]
    one, both = Features([tmp_path / "a"]), Features([tmp_path / "a", tmp_path / "b"])
    assert len(one) == len(both) == 43
    numbers = np.random.default_rng(0).permutation(43)
    expected = expected_rows(43)
    np.testing.assert_allclose(one[numbers], expected[numbers], rtol=1e-6)
    np.testing.assert_allclose(both[numbers], np.concatenate([expected, -expected], 1)[numbers], rtol=1e-3)
    assert np.array_equal(np.flatnonzero(~both.readable()), np.arange(3, 43, 7))
    assert np.load(tmp_path / "b" / "00000.npy").dtype == np.float16 and both[numbers].dtype == np.float32
    with pytest.raises(UserError, match="nothing holds no features"):
        Features([tmp_path / "nothing"])


def test_a_killed_encoding_goes_on_with_its_first_missing_shard(tmp_path, small_shards):
    encoded = []

    def feature(inputs):
        encoded.append(inputs[0, 0].item())
        if len(encoded) == 7:  # in the second shard
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        encode_items(tmp_path / "a", 43, feature)
    assert [file.name for file in (tmp_path / "a").glob("*.npy")] == ["00000.npy"]
    (tmp_path / "a" / ".00001.5").write_bytes(b"of a run with more ranks")
    encoded.clear()
    sentences = encode_items(tmp_path / "a", 43, lambda inputs: (encoded.append(inputs[0, 0].item()), inputs)[1])
    assert encoded == list(range(16, 43, 4))
    assert sentences == encode_items(tmp_path / "whole", 43)
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "whole"))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
    encode_items(tmp_path / "a", 43, feature=None)  # nothing to do


def test_features_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"encoding: features of the samples 0 to 9 are not finite"):
        encode_items(tmp_path, 10, lambda inputs: inputs / 0)
    assert not list(tmp_path.glob("*.npy"))


# --- clusters ------------------------------------------------------------------------------------------------------


def on_disk(folder: Path, rows: np.ndarray, shard: int = 10) -> Features:
    folder.mkdir(parents=True)
    for start in range(0, len(rows), shard):
        np.save(folder / f"{start // shard:05}.npy", rows[start:start + shard])
    return Features([folder])


def blobs(places: list[int], seed: int) -> np.ndarray:
    """[N, 8] features, tightly around the axis that each place names."""
    noise = np.random.default_rng(seed).normal(scale=0.01, size=(len(places), 8))
    return (np.eye(8)[places] + noise).astype(np.float16)


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two labelings put the same samples together, whatever they call the clusters."""
    return np.array_equal(one[:, None] == one, other[:, None] == other)


def test_stage_labels_combine_modalities(tmp_path):
    image_blobs, text_blobs = np.array([0, 0, 1, 1, 2, 2] * 4), np.array([0, 1, 2] * 8)
    image, text = on_disk(tmp_path / "image", blobs(image_blobs, 0)), on_disk(tmp_path / "text", blobs(text_blobs, 1))
    labels, chosen = stage_labels(image, text, 3, seed=0)
    assert chosen == {"text_clusters": 3, "image_clusters": 3}
    assert same_partition(labels // 3, text_blobs) and same_partition(labels % 3, image_blobs)
    assert labels.min() >= 0 and labels.max() <= 8
    assert np.array_equal(labels, stage_labels(image, text, 3, seed=0)[0])


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_auto_finds_each_modalitys_number_of_clusters(tmp_path):
    image_blobs, text_blobs = np.arange(60) % 2, np.arange(60) // 3 % 5
    image, text = on_disk(tmp_path / "image", blobs(image_blobs, 0)), on_disk(tmp_path / "text", blobs(text_blobs, 1))
    labels, chosen = stage_labels(image, text, "auto", seed=0)
    assert (chosen["text_clusters"], chosen["image_clusters"]) == (5, 2)
    assert max(chosen["silhouettes"]["text"].values()) == chosen["silhouettes"]["text"][5] > 0.9
    assert same_partition(labels // 2, text_blobs) and same_partition(labels % 2, image_blobs)
    alike = on_disk(tmp_path / "alike", np.ones((60, 8), np.float16))  # no clusters at all
    labels, chosen = stage_labels(alike, text, "auto", seed=0)
    assert set(chosen["silhouettes"]["image"].values()) == {-1.0} and same_partition(labels, text_blobs)


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_accumulated_labels_join_what_every_stage_joined(counts, seed):
    random = np.random.default_rng(seed)
    stages = [np.where(random.random(40) < 0.1, -1, random.integers(count, size=40)) for count in counts]
    accumulated = None
    for labels, count in zip(stages, counts, strict=True):
        previous, accumulated = accumulated, accumulate(accumulated, labels, count)
    lost = np.any(np.array(stages) < 0, axis=0)
    assert np.array_equal(accumulated < 0, lost)
    for a in np.flatnonzero(~lost):
        for b in np.flatnonzero(~lost):
            assert (accumulated[a] == accumulated[b]) == all(labels[a] == labels[b] for labels in stages)
    if previous is not None:  # the parent can be read off
        assert np.array_equal(accumulated[~lost] // counts[-1], previous[~lost])


def test_accumulated_labels_by_hand():
    first, second = np.array([0, 5, 8, -1]), np.array([2, 7, 0, 1])
    accumulated = accumulate(accumulate(None, first, 9), second, 9)
    assert accumulated.tolist() == [2, 5 * 9 + 7, 8 * 9, -1]
    assert accumulate(accumulated, np.array([1, 1, 1, 1]), 9).tolist() == [19, 52 * 9 + 1, 72 * 9 + 1, -1]


def test_unreadable_samples_get_no_label(tmp_path):
    image, text = blobs([0, 1, 2] * 4, 0), blobs([0, 1, 2] * 4, 1)
    image[5], text[7] = np.nan, np.nan
    labels, _ = stage_labels(on_disk(tmp_path / "image", image), on_disk(tmp_path / "text", text), 3, seed=0)
    assert np.array_equal(np.flatnonzero(labels < 0), [5, 7])


def test_too_few_samples_are_refused(tmp_path):
    two, none = on_disk(tmp_path / "two", blobs([0, 1], 0)), on_disk(tmp_path / "none", np.full((2, 8), np.nan))
    with pytest.raises(UserError, match=r"num_clusters: 2 readable training samples \(of 2\) cannot make 3 clusters"):
        stage_labels(two, two, 3, seed=0)
    with pytest.raises(UserError, match="cannot make 6 clusters; lower num_clusters"):
        stage_labels(two, two, "auto", seed=0)
    with pytest.raises(UserError, match="none of the 2 training samples is readable; check image_root"):
        stage_labels(none, two, 3, seed=0)


@pytest.mark.parametrize(("sizes", "k"), [((700, 700, 700), 3), ((3000, 400, 20), 3), ((5000, 4000, 150), 5)])
def test_mini_batches_lose_little_to_full_kmeans(tmp_path, sizes, k):
    random = np.random.default_rng(1)
    rows = np.concatenate([random.normal(size=16) / 2 + 0.4 * random.normal(size=(size, 16)) for size in sizes])
    rows = random.permutation(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    features, everything = on_disk(tmp_path / "f", rows, shard=4000), np.arange(len(rows))
    with threadpool_limits(2):
        labels = kmeans(features, everything, k, seed=0)
    inertia = sum(np.square(rows[labels == c] - rows[labels == c].mean(0)).sum() for c in range(k))
    assert inertia < 1.02 * KMeans(k, n_init=3, random_state=0).fit(rows).inertia_
    with threadpool_limits(1):
        assert np.array_equal(labels, kmeans(features, everything, k, seed=0))


def test_centres_are_the_means(tmp_path):
    random = np.random.default_rng(0)
    rows = random.normal(size=(2, 50, 8)).astype(np.float32)
    labels = random.choice([-1, 4, 7, 30], size=50)
    rows[0, labels < 0] = np.nan
    found = centres(on_disk(tmp_path / "image", rows[0]), on_disk(tmp_path / "text", rows[1]), labels)
    expected = [np.concatenate([rows[0][labels == c].mean(0), rows[1][labels == c].mean(0)]) for c in (4, 7, 30)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_features_larger_than_the_memory_limit_are_clustered(tmp_path, capsys):
    arguments = ["pairs=600000", "dim=64", "batch_size=100", f"folder={tmp_path}"]
    clusters_at_scale.main([*arguments, "limit_mib=120"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["accumulated_clusters"] == 729 and figures["batches"] * 100 + figures["dropped_samples"] == 600_000
    assert figures["features_mib"] > 120  # as half floats; twice as much as k-means takes them
    with pytest.raises(UserError, match="8 MiB were not enough"):  # the limit is one
        clusters_at_scale.main([*arguments, "limit_mib=8"])
    assert not list(tmp_path.iterdir())


# --- batches -------------------------------------------------------------------------------------------------------

LABELS = st.lists(st.integers(-1, 6), max_size=120).map(lambda labels: np.array(labels, np.int64))


@given(labels=LABELS, share=st.integers(1, 3), world_size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99),
       epoch=st.integers(0, 3))
def test_batches_are_pure_disjoint_and_use_each_cluster_up(labels, share, world_size, seed, epoch):
    size = share * world_size
    batches = cluster_batches(labels, size, seed=seed, epoch=epoch)
    np.random.default_rng().random()  # whatever else is random in the process has no say
    np.random.seed(None)
    assert np.array_equal(batches, cluster_batches(labels.copy(), size, seed=seed, epoch=epoch))
    drawn = batches.flatten()
    assert batches.shape[1] == size and len(set(drawn)) == len(drawn)
    for batch in batches:
        assert len(set(labels[batch])) == 1 and labels[batch[0]] >= 0
    turns = labels[batches[:, 0]].tolist()
    for label in set(labels[labels >= 0]):
        assert turns.count(label) == (labels == label).sum() // size
    # Round robin: between two turns of a cluster every cluster that still has a batch left has one.
    left = {label: turns.count(label) for label in set(turns)}
    while turns:
        round_size = len([label for label in left if left[label]])
        assert sorted(turns[:round_size]) == sorted(label for label in left if left[label])
        turns, left = turns[round_size:], {label: max(0, n - 1) for label, n in left.items()}
    ranks = [rank_slice(batches, rank, world_size) for rank in range(world_size)]
    assert all(rank.shape == (len(batches), share) for rank in ranks)
    assert np.array_equal(np.concatenate(ranks, axis=1), batches)


@given(labels=LABELS, size=st.sampled_from([1, 2, 4, 6]))
def test_the_reported_remainder_is_what_a_pass_leaves(labels, size):
    batches = cluster_batches(labels, size, seed=0, epoch=0)
    if not len(batches):
        with pytest.raises(UserError, match=f"fills one batch of {size} "):
            batch_report(labels, size)
        return
    report = batch_report(labels, size)
    assert report["used_samples"] == batches.size
    assert report["dropped_samples"] == (labels >= 0).sum() - batches.size
    assert report["num_clusters"] == len(set(labels[labels >= 0]))
    assert dict(zip(report["labels"], report["sizes"], strict=True)) == {
        label: (labels == label).sum() for label in set(labels[labels >= 0])}
    assert report["too_small"] == sum(n < size for n in report["sizes"])


def test_passes_and_seeds_differ():
    labels = np.repeat([0, 1], 22)
    first = cluster_batches(labels, 4, seed=0, epoch=0)
    assert not np.array_equal(first, cluster_batches(labels, 4, seed=0, epoch=1))
    assert not np.array_equal(first, cluster_batches(labels, 4, seed=1, epoch=0))
    # What one pass leaves out comes in another.
    assert len(set(np.concatenate([cluster_batches(labels, 4, seed=0, epoch=e) for e in range(20)]).flat)) == 44


def merged_plainly(labels: np.ndarray, centres: dict, parents: dict, batch_size: int) -> np.ndarray:
    """The smallest of all clusters that are too small and have a sibling joins the nearest one; again, and again."""
    merged, centres = labels.copy(), dict(centres)
    while True:
        sizes = {c: int((merged == c).sum()) for c in sorted(set(merged[merged >= 0].tolist()))}
        small = [c for c in sizes if sizes[c] < batch_size and any(parents[o] == parents[c] for o in sizes if o != c)]
        if not small:
            return merged
        cluster = min(small, key=lambda c: (sizes[c], c))
        target = min((o for o in sizes if o != cluster and parents[o] == parents[cluster]),
                     key=lambda o: (float(np.linalg.norm(centres[o] - centres[cluster])), o))
        centres[target] = ((centres[cluster] * sizes[cluster] + centres[target] * sizes[target])
                           / (sizes[cluster] + sizes[target]))
        merged[merged == cluster] = target


@given(labels=st.lists(st.integers(-1, 15), max_size=150), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_merging_equals_the_plain_way(labels, size, seed):
    labels = np.array(labels, np.int64)
    values = np.unique(labels[labels >= 0])
    places = np.random.default_rng(seed).normal(size=(len(values), 3))
    merged = merge_small(labels, places, values // 4, size)
    plain = merged_plainly(labels, dict(zip(values.tolist(), places, strict=True)),
                           {int(value): int(value) // 4 for value in values}, size)
    assert np.array_equal(merged, plain)


def test_small_clusters_are_merged_with_the_nearest_sibling_only():
    # Clusters 0, 1, 2 share a parent, 9 is alone under another one; 1 lies next to 2.
    labels = np.array([0] * 6 + [1] * 2 + [2] * 5 + [9] * 3 + [-1])
    merged = merge_small(labels, np.array([[0.0], [4.0], [5.0], [4.1]]), np.array([0, 0, 0, 1]), 4)
    assert merged.tolist() == [0] * 6 + [2] * 7 + [9] * 3 + [-1]


def test_no_cluster_of_a_whole_batch_is_refused():
    message = r"none of the 2 clusters of the 6 training samples fills one batch of 4 .* has 3\)"
    with pytest.raises(UserError, match=message):
        batch_report(np.array([0, 0, 0, 1, 1, 1, -1]), 4)


# --- stages of a run -----------------------------------------------------------------------------------------------


def run_here(world: Path, name: str, **changes) -> Path:
    torch.set_num_threads(1)
    values = {"mcl": {"max_steps": 1}, "router": {"max_steps": 1}, "validation_data": None, "hard_captions": None,
              **changes}
    main(load_config(EncoderConfig, [str(tiny_config(world, world / name, **values))], "train_encoder"))
    return world / name


def test_a_stage_on_all_features_so_far_uses_those_of_earlier_stages(world, monkeypatch):
    values = {"stage_features": "all", "num_clusters": "auto", "small_clusters": "merge", "init_from": "previous"}
    output = run_here(world, "all", **values)
    counts = [json.loads((output / f"stage_{stage}" / "clusters.json").read_text()) for stage in (1, 2)]
    for stage, count in enumerate(counts, 1):
        for key in ("image", "text"):
            scores = count["silhouettes"][key]
            assert scores.keys() == {"2", "3", "4", "5", "6"}
            assert scores[str(count[f"{key}_clusters"])] == max(scores.values())
        labels = np.load(output / f"stage_{stage}" / "labels.npy")
        products = [c["image_clusters"] * c["text_clusters"] for c in counts[:stage]]
        assert 0 <= labels.min() and labels.max() < np.prod(products)
        if stage == 2:  # every cluster came from one of the stage before
            assert np.array_equal(labels // products[1], np.load(output / "stage_1" / "labels.npy"))
    both = {key: Features([output / f"stage_{stage}" / "features" / key for stage in (1, 2)])
            for key in ("image", "text")}
    assert both["image"][np.arange(1)].shape == (1, 32)
    clustered = []
    monkeypatch.setattr("train_encoder.run.stage_labels", lambda image, text, *rest, **more: (
        clustered.append((image[np.arange(64)], text[np.arange(64)])), stage_labels(image, text, *rest, **more))[1])

    # Killed after the encoding of stage 2: nothing is encoded again, and the same comes out.
    before = {file: file.stat().st_mtime_ns for file in output.glob("stage_*/features/*/*")}
    kept = {name: (output / "stage_2" / name).read_bytes()
            for name in ("labels.npy", "batch_labels.npy", "clusters.json", "model/model.safetensors")}
    for path in ("stage_2/clusters.json", "stage_2/labels.npy", "stage_2/done.json", "router/done.json"):
        (output / path).unlink()
    for path in ("stage_2/model", "model"):
        shutil.rmtree(output / path)
    run_here(world, "all", **values)
    assert before == {file: file.stat().st_mtime_ns for file in output.glob("stage_*/features/*/*")}
    assert kept == {name: (output / "stage_2" / name).read_bytes() for name in kept}
    (image, text), = clustered
    assert np.array_equal(image, both["image"][np.arange(64)]) and np.array_equal(text, both["text"][np.arange(64)])


def test_what_a_stage_loses_is_said(world, capsys):
    output = run_here(world, "lost", mcl={"max_steps": 1, "batch_size": 12})
    printed = capsys.readouterr().out
    assert "note: the 16 clusters of stage_2 can hold 4 samples each on average, fewer than a batch of 12" in printed
    for stage in (1, 2):
        counts = json.loads((output / f"stage_{stage}" / "clusters.json").read_text())
        lost = counts["dropped_samples"] / 64
        assert counts["used_samples"] + counts["dropped_samples"] == 64 and lost > 0.1
        assert f"stage_{stage}: note: {lost:.0%} of the samples are lost to a pass" in printed
        assert f"{counts['dropped_samples']} samples ({lost:.1%}) not drawn in a pass" in printed


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_clusters": "automatic"}, "num_clusters: 'automatic' must be a number of at least 1, or auto"),
    ({"num_clusters": 0}, "num_clusters: 0 must be a number"),
    ({"num_clusters": 2.5}, "num_clusters: Value '2.5'"),
    ({"num_clusters": 60_000}, "num_clusters: 60000 per modality in 2 stages is more clusters than any data"),
    ({"num_clusters": 65}, r"num_clusters: 64 readable training samples \(of 64\) cannot make 65 clusters"),
    ({"stage_features": "first"}, "stage_features: 'first' is not one of last, all"),
])
def test_a_wrong_setting_is_one_sentence(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_here(world, str(tmp_path / re.sub(r"\W", "", message)), **changes)
