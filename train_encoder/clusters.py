"""Pseudo-labels of multistage contrastive learning: k-means per modality, accumulated over the stages."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from clipmoe_vlm.runs import UserError

from .config import AUTO_CLUSTERS
from .features import Features

BATCH, BATCHES = 4096, 100  # samples of a mini-batch, and how many of them
STARTS = 3  # initialisations, of which the best is kept
JUDGED = 4096  # samples that judge initialisations and numbers of clusters
BLOCK = 16_384  # samples in memory at once


def draw(features: Features, readable: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, D] features of readable samples drawn without replacement (all of them, if they are not as many)."""
    chosen = random.choice(len(readable), min(count, len(readable)), replace=False, shuffle=False)
    return features[readable[np.sort(chosen)]]  # in the order of the disk


def kmeans(features: Features, readable: np.ndarray, k: int, *, seed: int) -> np.ndarray:
    """Seeded mini-batch k-means, never with more than a few blocks in memory.

    One thread, since the order of a threaded sum would make a borderline label depend on the machine.

    Args:
        readable: [n] numbers of the samples to cluster, ascending.

    Returns:
        [n] int64 cluster numbers in 0..k-1.
    """
    random = np.random.default_rng(seed)
    # Without reassignment: it would move the centre of a small but real cluster to a random sample at every batch.
    models = [MiniBatchKMeans(k, random_state=int(random.integers(2**31)), n_init=1, reassignment_ratio=0)
              for _ in range(STARTS)]
    with threadpool_limits(1):
        for _ in range(BATCHES):
            batch = draw(features, readable, BATCH, random)
            for model in models:
                model.partial_fit(batch)
        judged = draw(features, readable, JUDGED, random)
        best = max(models, key=lambda model: model.score(judged))
        return np.concatenate([best.predict(features[readable[start:start + BLOCK]]).astype(np.int64)
                               for start in range(0, len(readable), BLOCK)])


def silhouettes(features: Features, readable: np.ndarray, *, seed: int) -> dict[int, float]:
    """Mean silhouette (Rousseeuw 1987; -1 to 1) of each number of clusters in AUTO_CLUSTERS on some of the samples.

    Samples that make fewer than two clusters have no silhouette: they score -1.
    """
    scores = {}
    with threadpool_limits(1):
        judged = draw(features, readable, JUDGED, np.random.default_rng(seed))
        for k in AUTO_CLUSTERS:
            labels = KMeans(k, random_state=seed, n_init=STARTS).fit_predict(judged)
            apart = 2 <= len(np.unique(labels)) < len(judged)
            scores[k] = round(float(silhouette_score(judged, labels)), 4) if apart else -1.0
    return scores


def stage_labels(image: Features, text: Features, num_clusters: int | str, *, seed: int) -> tuple[np.ndarray, dict]:
    """One stage's labels, `text cluster * image clusters + image cluster`; an unreadable sample gets -1.

    Args:
        image, text: L2-normalised features of N samples.
        num_clusters: per modality; "auto": for each the one of AUTO_CLUSTERS with the best silhouette.

    Returns:
        [N] int64 labels, and what was chosen: {"text_clusters", "image_clusters"} and for "auto" the "silhouettes".

    Raises:
        UserError: fewer readable samples than clusters.
    """
    readable = np.flatnonzero(image.readable() & text.readable())
    needed = max(AUTO_CLUSTERS) if num_clusters == "auto" else num_clusters
    if len(readable) == 0:
        raise UserError(f"none of the {len(image)} training samples is readable; check image_root and train_data")
    if len(readable) < needed:
        raise UserError(f"num_clusters: {len(readable)} readable training samples (of {len(image)}) cannot make "
                        f"{needed} clusters; lower num_clusters, or add data")
    chosen, parts = {}, []
    for name, features in (("text", text), ("image", image)):
        k = num_clusters
        if k == "auto":
            scores = silhouettes(features, readable, seed=seed)
            k = max(scores, key=scores.__getitem__)
            chosen.setdefault("silhouettes", {})[name] = scores
        chosen[f"{name}_clusters"] = k
        parts.append(kmeans(features, readable, k, seed=seed))
    labels = np.full(len(image), -1, np.int64)
    labels[readable] = parts[0] * chosen["image_clusters"] + parts[1]
    return labels, chosen


def accumulate(previous: np.ndarray | None, labels: np.ndarray, count: int) -> np.ndarray:
    """`previous * count + label`: samples share the result only if they were clustered together at every stage so far.

    Args:
        count: what `labels` are below: text clusters times image clusters of this stage.
    """
    if previous is None:
        return labels
    return np.where((labels < 0) | (previous < 0), -1, previous * count + labels)


def centres(image: Features, text: Features, labels: np.ndarray) -> np.ndarray:
    """[C, D] mean of the [image, text] features of each of the C clusters, in ascending order of their labels.

    Args:
        labels: [N] clusters; negative: left out.
    """
    drawn = np.flatnonzero(labels >= 0)
    _, cluster, sizes = np.unique(labels[drawn], return_inverse=True, return_counts=True)
    sums = 0.0
    for start in range(0, len(drawn), BLOCK):
        numbers, of = drawn[start:start + BLOCK], cluster[start:start + BLOCK]
        member = csr_matrix((np.ones(len(of)), (of, np.arange(len(of)))), (len(sizes), len(of)))
        sums = sums + np.concatenate([member @ image[numbers], member @ text[numbers]], axis=1)
    return sums / sizes[:, None]
