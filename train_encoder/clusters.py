"""Pseudo-labels of multistage contrastive learning: k-means per modality, accumulated over the stages."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from clipmoe_vlm.runs import UserError


def kmeans(features: np.ndarray, k: int, *, seed: int) -> np.ndarray:
    """Seeded mini-batch k-means: [N, D] features -> [N] int64 cluster numbers in 0..k-1.

    One thread, since the order of a threaded sum would make a borderline label depend on the machine.

    Raises:
        UserError: fewer samples than clusters.
    """
    if len(features) < k:
        raise UserError(f"num_clusters: {len(features)} readable training samples cannot make {k} clusters; "
                        "lower num_clusters or add data")
    with threadpool_limits(1):
        model = MiniBatchKMeans(k, random_state=seed, batch_size=4096, n_init=3)
        return model.fit_predict(features).astype(np.int64)


def stage_labels(image: np.ndarray, text: np.ndarray, k: int, *, seed: int) -> np.ndarray:
    """One stage's labels, `text cluster * k + image cluster`; a sample with a NaN feature (unreadable) gets -1.

    Args:
        image, text: [N, D] L2-normalised features.
    """
    readable = ~(np.isnan(image[:, 0]) | np.isnan(text[:, 0]))
    labels = np.full(len(image), -1, np.int64)
    if not readable.all():  # the copy is only made when it must be: the features may be larger than the memory
        image, text = image[readable], text[readable]
    labels[readable] = kmeans(text, k, seed=seed) * k + kmeans(image, k, seed=seed)
    return labels


def accumulate(previous: np.ndarray | None, labels: np.ndarray, k: int) -> np.ndarray:
    """`previous * k^2 + label`: samples share the result only if they were clustered together at every stage so far."""
    if previous is None:
        return labels
    return np.where((labels < 0) | (previous < 0), -1, previous * k * k + labels)


def centres(image: np.ndarray, text: np.ndarray, accumulated: np.ndarray) -> dict[int, np.ndarray]:
    """Mean of [image, text] features of each accumulated cluster, for merging small ones."""
    return {int(c): np.concatenate([image[accumulated == c].mean(0), text[accumulated == c].mean(0)])
            for c in np.unique(accumulated[accumulated >= 0])}
