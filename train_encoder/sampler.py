"""Which samples make up each global batch: all from one cluster, the same on every rank."""

from __future__ import annotations

import numpy as np

from clipmoe_vlm.runs import UserError


def cluster_batches(labels: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The global batches of one pass: each from a single cluster, clusters taking turns until each is used up.

    A cluster's remainder smaller than a batch is not drawn in this pass (another pass draws another remainder).
    The result depends on the arguments only, so every rank computes the same. Random batches are the case of one
    cluster that holds everything.

    Args:
        labels: [N] cluster of each sample; negative: never drawn.
        batch_size: samples of a global batch.

    Returns:
        [steps, batch_size] sample indices, no sample twice.
    """
    random = np.random.default_rng([seed, epoch])
    clusters = []
    for label in np.unique(labels[labels >= 0]):
        members = random.permutation(np.flatnonzero(labels == label))
        steps = len(members) // batch_size
        clusters.append(members[: steps * batch_size].reshape(steps, batch_size))
    turns = [clusters[c] for c in random.permutation(len(clusters))]
    longest = max((len(cluster) for cluster in turns), default=0)
    batches = [cluster[turn] for turn in range(longest) for cluster in turns if turn < len(cluster)]
    return np.array(batches, dtype=np.int64).reshape(-1, batch_size)


def rank_slice(batches: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """[steps, B] global batches -> [steps, B / world_size], this rank's share of each: disjoint, together all."""
    share = batches.shape[1] // world_size
    return batches[:, rank * share:(rank + 1) * share]


def merge_small(labels: np.ndarray, centres: dict[int, np.ndarray], parents: dict[int, int],
                batch_size: int) -> np.ndarray:
    """Joins each cluster smaller than a batch with its nearest sibling, smallest first, while it has one.

    Args:
        labels: [N] accumulated clusters; negative: left alone.
        centres: mean feature of each cluster.
        parents: the cluster that each came from at the stage before; siblings share it.

    Returns:
        [N] labels for batching. (The accumulated labels themselves stay as they are: the next stage builds on them.)
    """
    merged = labels.copy()
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    sizes = {int(v): int(c) for v, c in zip(values, counts, strict=True)}
    centres = dict(centres)
    while True:
        small = [c for c in sizes if sizes[c] < batch_size and any(parents[o] == parents[c] for o in sizes if o != c)]
        if not small:
            return merged
        cluster = min(small, key=lambda c: (sizes[c], c))
        siblings = [o for o in sizes if o != cluster and parents[o] == parents[cluster]]
        target = min(siblings, key=lambda o: (float(np.linalg.norm(centres[o] - centres[cluster])), o))
        total = sizes[cluster] + sizes[target]
        centres[target] = (centres[cluster] * sizes[cluster] + centres[target] * sizes[target]) / total
        sizes[target] = total
        del sizes[cluster]
        merged[merged == cluster] = target


def batch_report(labels: np.ndarray, batch_size: int) -> dict:
    """What one pass uses and loses: the sizes and labels of the clusters, used and dropped samples.

    Raises:
        UserError: no cluster holds a whole batch.
    """
    values, sizes = np.unique(labels[labels >= 0], return_counts=True)
    used = int((sizes // batch_size * batch_size).sum())
    total = int(sizes.sum())
    if not used:
        raise UserError(
            f"none of the {len(sizes)} clusters of the {total} training samples fills one batch of {batch_size} (the "
            f"largest has {int(sizes.max(initial=0))}); use a smaller batch_size, fewer clusters (num_clusters), "
            "small_clusters: merge, or more data")
    return {"num_clusters": len(sizes), "sizes": sizes.tolist(), "labels": values.tolist(), "used_samples": used,
            "dropped_samples": total - used, "too_small": int((sizes < batch_size).sum())}
