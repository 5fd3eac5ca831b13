"""Two options for routers that the paper does not have: a start from cluster centroids, and balance without a loss."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, nn
from torch.nn import functional as F

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.loading import loader
from clipmoe_vlm.moe import SparseMoE
from clipmoe_vlm.runs import atomic_write

from .data import Pairs

if TYPE_CHECKING:
    from .train import Run

SAMPLES, TOKENS = 512, 16  # 8,192 tokens a layer: plenty for a handful of clusters
BATCH = 32


def start_from_centroids(model: CLIPMoEModel, run: Run) -> None:
    """Fills the routers of `model` with cluster centroids of what its feed-forward layers see in the base.

    As in Cluster-Aware Upcycling (arXiv 2604.13508) a router's rows are the centroids of spherical k-means over the
    inputs of the dense layer: the router then sends a token to the cluster that is nearest by angle. Two things are
    ours. The rows are centred, which no softmax sees, and scaled so that a token's logits have a standard deviation of
    1 on average. Since our experts do not come from these clusters, which cluster is whose is a matter of convention:
    clusters go to experts by size, and the base gets the largest.

    The main process makes the rows, once, and all processes read them from the run's folder.
    """
    file = run.folder / "router_centroids.safetensors"

    def make() -> None:
        if file.is_file():
            return
        print("router centroids: clustering what the base's feed-forward layers see", flush=True)
        rows = {}
        for name, inputs in base_inputs(model, run).items():
            centroids = spherical_kmeans(inputs, model.config.vision_config.num_experts, seed=run.config.seed)
            centred = centroids - centroids.mean(0)
            rows[name] = centred / (inputs @ centred.T).square().mean().sqrt()
        with atomic_write(file, "wb") as stream:
            stream.write(safetensors.torch.save(rows))

    run.distributed.main_first(make)
    model.load_state_dict(safetensors.torch.load_file(file), strict=False)


@torch.no_grad()
def base_inputs(model: CLIPMoEModel, run: Run) -> dict[str, Tensor]:
    """Name of each router's weight in `model` -> `[n, D]`, inputs of the base's feed-forward layer in its place.

    They are those of `TOKENS` random tokens (padding excepted) of each of `SAMPLES` random training samples.
    """
    base = CLIPMoEModel.from_pretrained(run.folder / "base").to(run.distributed.device).eval()
    kept: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters() if name.endswith("router.weight")}
    positions: dict[str, Tensor] = {}  # of the current batch, per tower

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor]) -> None:
        chosen = positions[name.split(".")[0]].to(arguments[0].device)
        kept[name].append(arguments[0].float().take_along_dim(chosen[..., None], 1).flatten(0, 1).cpu())

    for name in kept:
        base.get_submodule(name.removesuffix(".router.weight")).register_forward_pre_hook(partial(keep, name))
    tokens = base.vision_model.embeddings.position_embedding.num_embeddings
    order = np.random.default_rng(run.config.seed).permutation(len(run.samples))[:SAMPLES]
    batches = [order[start:start + BATCH] for start in range(0, len(order), BATCH)]
    generator = torch.Generator().manual_seed(run.config.seed)
    for batch in loader(Pairs(run.samples), run.collate, batches, run.config.workers):
        pixels, ids = batch["pixel_values"][batch["valid"]], batch["input_ids"][batch["valid"]]
        if len(ids) == 0:
            continue
        lengths = base.text_model.token_mask(ids).sum(-1, keepdim=True)
        # In double precision, in which no share rounds up to 1.
        share = torch.rand(2, len(ids), TOKENS, generator=generator, dtype=torch.float64)
        positions["vision_model"] = (share[0] * tokens).long()
        positions["text_model"] = (share[1] * lengths).long()
        base(input_ids=ids.to(base.device), pixel_values=pixels.to(base.device))
    return {name: torch.cat(parts) for name, parts in kept.items()}


def spherical_kmeans(points: Tensor, k: int, *, seed: int, iterations: int = 100) -> Tensor:
    """Centroids `[k, D]` of unit length, the largest cluster first, that maximise the points' cosines with their own.

    Args:
        points: `[n, D]`, of any length.
    """
    points = F.normalize(points, dim=-1)
    start = kmeans_plusplus(points.numpy(), k, random_state=seed)[0]
    centroids = F.normalize(torch.from_numpy(start), dim=-1)
    nearest = torch.full((len(points),), -1)
    for _ in range(iterations):
        before, nearest = nearest, (points @ centroids.T).argmax(-1)
        if torch.equal(before, nearest):
            break
        sums = torch.zeros_like(centroids).index_add(0, nearest, points)
        used = nearest.bincount(minlength=k) > 0  # a cluster that lost all its points stays where it is
        centroids = torch.where(used[:, None], F.normalize(sums, dim=-1), centroids)
    return centroids[nearest.bincount(minlength=k).argsort(descending=True, stable=True)]


class BiasBalancing:
    """Moves the routers' balance biases after each update by `rate * sign(mean load - load)`: arXiv 2408.15664.

    The load of an expert is how many tokens of the global batch chose it, counted in every forward of the training
    model; that gradient checkpointing and caching run some of them twice changes no sign. Nothing happens in a model
    whose routers have no such bias.
    """

    def __init__(self, model: CLIPMoEModel, rate: float):
        self.rate = rate
        layers = [layer for layer in model.modules() if isinstance(layer, SparseMoE)
                  and layer.router.balance_bias is not None]
        self.biases = [layer.router.balance_bias for layer in layers]
        self.loads = [torch.zeros_like(bias) for bias in self.biases]
        for layer, load in zip(layers, self.loads, strict=True):
            layer.register_forward_hook(partial(self._count, load))

    @staticmethod
    def _count(load: Tensor, layer: SparseMoE, arguments: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        if layer.training:
            chosen = output[1].detach().topk(layer.top_k, dim=-1).indices
            load += F.one_hot(chosen, len(load)).sum((0, 1))

    def update(self, world_size: int) -> None:
        """To be called after each update of the weights, on all ranks."""
        if not self.biases:
            return
        loads = torch.stack(self.loads)
        if world_size > 1:
            dist.all_reduce(loads)
        move = self.rate * torch.sign(loads.mean(-1, keepdim=True) - loads)
        for bias, load, step in zip(self.biases, self.loads, move - move.mean(-1, keepdim=True), strict=True):
            bias += step  # of mean zero: what all biases have in common chooses nothing and would drift
            load.zero_()

    def state(self) -> str:
        """The biases as text, exactly."""
        return json.dumps([bias.tolist() for bias in self.biases])

    def restore(self, state: str) -> None:
        for bias, values in zip(self.biases, json.loads(state), strict=True):
            bias.copy_(torch.tensor(values))
