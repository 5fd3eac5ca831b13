"""A training step without numbers: the run's own code on the meta device, for its FLOPs and its memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import LlavaConfig, LlavaNextConfig

from clipmoe_vlm.moe import Experts, Router
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm import attention
from train_vlm.anyres import tiles_per_picture
from train_vlm.config import VLMConfig
from train_vlm.loss import VLMLoss
from train_vlm.model import model_class
from train_vlm.tuning import set_trainable


def on_meta(model_config: LlavaConfig | LlavaNextConfig, config: VLMConfig) -> VLMLoss:
    """The run's module with the run's settings, in the run's dtype, whose weights are only shapes.

    A base in 4 bits (qlora) has its shapes and types without them (lora): the products and activations are the same.
    Liger's kernels, which need a GPU and take less memory, are not used.

    Raises:
        UserError: as `set_trainable`.
    """
    if config.llm_tuning == "qlora":
        config = replace(config, llm_tuning="lora")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if config.precision == "fp32" else torch.bfloat16)
    try:
        with torch.device("meta"):
            model = model_class(model_config)(model_config)
            set_trainable(model, config)
            if config.packing:
                model.model.language_model.set_attn_implementation(attention.NAME)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        if isinstance(module, Router):  # torch.autocast, which its own forward turns off, has no meta device
            module.forward = MethodType(lambda router, tokens: F.linear(tokens.float(), router.weight.float()), module)
        elif isinstance(module, Experts):
            module.register_forward_pre_hook(_route_evenly)
    return VLMLoss(model)


def _route_evenly(experts: Experts, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Where there are no numbers to route by, experts take turns; sizes that depend on the routing are then known."""
    hidden_states, chosen, weights = inputs
    return hidden_states, (torch.arange(chosen.numel()) % len(experts.fc1_weight)).view(chosen.shape), weights


def micro_batch(module: VLMLoss, config: VLMConfig, length: int, labelled: int,
                image_sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Inputs of `VLMLoss.forward`: as many samples as the run has at once, all alike.

    What decides sizes (ids, positions) has numbers; pixels, or a cache's features, are on the meta device.

    Args:
        length: tokens of a sample, `labelled` of them with a label.
        image_sizes: (height, width) of a sample's pictures, in pixels.
    """
    model_config, samples = module.model.config, config.micro_batch_size
    vision = model_config.vision_config
    tiles = samples * sum(tiles_per_picture(model_config, size) for size in image_sizes) or 1
    ids = torch.zeros(samples, length, dtype=torch.long)
    positions = torch.arange(ids.numel()).view_as(ids)[:, length - labelled - 1 : -1].flatten()
    inputs = {"input_ids": ids, "label_positions": positions, "targets": torch.zeros_like(positions),
              "pixel_values": None, "pictures": samples * len(image_sizes), "image_sizes": [*image_sizes] * samples,
              "position_ids": torch.arange(length).expand(samples, length)}
    if config.feature_cache:
        inputs["image_features"] = torch.empty(tiles, tokens_per_picture(model_config), vision.hidden_size,
                                               device="meta", dtype=module.model.dtype)
    else:
        inputs["pixel_values"] = torch.empty(tiles, vision.num_channels, *[vision.image_size] * 2, device="meta")
    if config.packing:
        inputs |= {name: inputs[name].reshape(1, -1) for name in ("input_ids", "position_ids")}
        inputs["sample_lengths"] = [length] * samples
    return inputs


class MetaRun(TorchDispatchMode):
    """Runs operations on meta tensors and follows the bytes of what they make, other than the module's own tensors.

    Tensors with numbers may take part: as indices they tell the size of the outcome, else they stand for their shapes.

    Gradients of weights go as soon as they are there, as to ZeRO's buckets.

    Attributes:
        peak: the most bytes held at once.
        peak_with_gradients: the same if the weights' gradients stayed.
    """

    INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)

    def __init__(self, module: nn.Module):
        super().__init__()
        self.peak = self.peak_with_gradients = 0
        self._live = self._gradients = 0
        self._weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._known = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}

    def __enter__(self) -> MetaRun:
        self._exits = contextlib.ExitStack()
        self._exits.enter_context(_flash_attention())
        for weight in self._weights:
            self._exits.callback(weight.register_post_accumulate_grad_hook(self._let_go).remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._exits.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in self.INDEXING and any(isinstance(v, Tensor) and v.is_meta for v in tree_leaves(args)):
            args = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, args)
        output = function(*args, **kwargs)
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.is_meta:
                self._follow(value.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        self.peak_with_gradients = max(self.peak_with_gradients, self._live + self._gradients)
        weakref.finalize(storage, self._forget, key, size)

    def _let_go(self, weight: Tensor) -> None:
        self._gradients += weight.grad.nbytes
        weight.grad = None

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """Attention that keeps no matrix of scores, as on every other device; meta tensors get the plain formula."""
    plain = F.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal,
                                                                  scale=scale)[0]

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
