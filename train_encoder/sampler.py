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
    members = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0):]
    _, starts = np.unique(labels[members], return_index=True)
    clusters = [random.permutation(cluster) for cluster in np.split(members, starts[1:])]
    steps = np.array([len(cluster) // batch_size for cluster in clusters])
    batches = np.concatenate([cluster[: count * batch_size].reshape(count, batch_size)
                              for cluster, count in zip(clusters, steps, strict=True)])
    place = np.argsort(random.permutation(len(clusters)))  # of each cluster, in every round
    turn = np.concatenate([np.arange(count) for count in steps])
    return batches[np.lexsort((np.repeat(place, steps), turn))]


def rank_slice(batches: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """[steps, B] global batches -> [steps, B / world_size], this rank's share of each: disjoint, together all."""
    share = batches.shape[1] // world_size
    return batches[:, rank * share:(rank + 1) * share]


def merge_small(labels: np.ndarray, centres: np.ndarray, parents: np.ndarray, batch_size: int) -> np.ndarray:
    """Joins each cluster smaller than a batch with its nearest sibling, smallest first, while it has one.

    Args:
        labels: [N] accumulated clusters; negative: left alone.
        centres: [C, D] mean feature of each of the C clusters, in ascending order of their labels.
        parents: [C] the cluster that each came from at the stage before; siblings share it.

    Returns:
        [N] labels for batching. (The accumulated labels themselves stay as they are: the next stage builds on them.)
    """
    drawn = labels >= 0
    values, cluster, sizes = np.unique(labels[drawn], return_inverse=True, return_counts=True)
    centres, sizes = centres.copy(), sizes.copy()
    joined = np.arange(len(values))  # the cluster that now holds each
    order = np.argsort(parents, kind="stable")
    for family in np.split(order, np.unique(parents[order], return_index=True)[1][1:]):
        while len(family) > 1 and sizes[smallest := family[np.argmin(sizes[family])]] < batch_size:
            family = family[family != smallest]
            nearest = family[np.argmin(np.linalg.norm(centres[family] - centres[smallest], axis=1))]
            pair = [smallest, nearest]
            centres[nearest] = np.average(centres[pair], axis=0, weights=sizes[pair])
            sizes[nearest] += sizes[smallest]
            joined[joined == smallest] = nearest
    merged = labels.copy()
    merged[drawn] = values[joined][cluster]
    return merged


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
