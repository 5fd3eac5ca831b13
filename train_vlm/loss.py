"""The loss that a VLM is trained with.

Shapes: R rows, T tokens of a row (picture tokens included), N pictures, D hidden size, L labelled positions, M MoE
layers of the tower, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaNextForConditionalGeneration

from clipmoe_vlm.encoder import CLIPMoETowerOutput
from clipmoe_vlm.moe import router_z_loss, routers_train
from clipmoe_vlm.routing import expert_load, router_entropy
from train_vlm.anyres import JoinTiles
from train_vlm.attention import row_arguments
from train_vlm.chat import IGNORE_INDEX
from train_vlm.model import VLM


def labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[R, T]` -> positions in the R * T tokens whose next token has a label `[L]`, and these labels `[L]`."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, following[positions]


class LabelLoss(nn.Module):
    """Cross-entropy of the language model's head, at labelled positions only and in chunks.

    A module of its own so that ZeRO-3 gathers the head's weight once for all chunks.
    Logits are made float32, as LLaVA's: in bfloat16 the sum would be off by up to a hundredth.

    Args:
        vocabulary: the first rows of `lm_head` that take part in the softmax (all but an appended `<image>`).
    """

    CHUNK = 1024  # positions whose logits exist at a time

    def __init__(self, lm_head: nn.Linear, vocabulary: int):
        super().__init__()
        self.lm_head = lm_head
        self.vocabulary = vocabulary

    def forward(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """`[L, D]`, `[L]` -> sum of the cross-entropies, float32."""
        weight = self.lm_head.weight[: self.vocabulary]
        if len(targets) <= self.CHUNK:
            return _cross_entropy(hidden_states, weight, targets)
        chunks = zip(hidden_states.split(self.CHUNK), targets.split(self.CHUNK), strict=True)
        return torch.stack([checkpoint(_cross_entropy, states, weight, chunk, use_reentrant=False)
                            for states, chunk in chunks]).sum()


def _cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_states, weight).float(), targets, reduction="sum")


def tower_features(model: VLM, pixel_values: Tensor) -> tuple[Tensor, CLIPMoETowerOutput]:
    """`[N, C, H, W]` -> the features that the projector reads `[N, P, tower width]`, and all that the tower gave."""
    config = model.config
    output = model.model.vision_tower(pixel_values, output_hidden_states=config.vision_feature_layer)
    features = output.hidden_states[config.vision_feature_layer]
    return features[:, 1:] if config.vision_feature_select_strategy == "default" else features, output


class VLMLoss(nn.Module):
    """What the engine trains: pixels and tokens to the sum of label losses and the routers' losses."""

    def __init__(self, model: VLM):
        super().__init__()
        self.model = model
        self.join_tiles = JoinTiles(model.model) if isinstance(model, LlavaNextForConditionalGeneration) else None
        image_token_id, rows = model.config.image_token_id, model.config.text_config.vocab_size
        self.label_loss = LabelLoss(model.lm_head, image_token_id if image_token_id == rows - 1 else rows)

    def forward(self, input_ids: Tensor, label_positions: Tensor, targets: Tensor, pixel_values: Tensor | None,
                pictures: int, image_features: Tensor | None = None, image_sizes: Sequence[Sequence[int]] = (),
                position_ids: Tensor | None = None,
                sample_lengths: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes a micro-batch. Waits for nothing on the device: all sizes are known before.

        Args:
            input_ids: `[R, T]`, padded on the right (so that causal attention never looks at padding and needs no
                mask); one `<image>` id per picture token.
            label_positions, targets: `[L]`, see `labelled`; L may be 0.
            pixel_values: `[N, C, H, W]`, in the order of the marks, with anyres all tiles of all pictures; one dummy if
                there is no picture. None with `image_features`.
            pictures: how many real pictures there are.
            image_features: `[N, P, tower width]`, what a tower that is not asked again has made of them.
            image_sizes: with anyres, each picture's (height, width) in pixels.
            position_ids: `[R, T]`; None: 0 to T - 1.
            sample_lengths: of the samples that are put together in the one row there is, and do not see each other.
                None: one sample a row.

        Returns:
            sum of the cross-entropies at labelled positions; balance loss and z-loss of the tower, `[2]`; what its
            routers did, `[M, E + 1]` (see `_routing`), or None. The latter two say nothing if `pictures` is 0.
        """
        model, config = self.model.model, self.model.config
        router_losses, routing = input_ids.new_zeros(2, dtype=torch.float32), None
        if image_features is None:
            image_features, tower = tower_features(self.model, pixel_values)
            if routers_train(model.vision_tower):
                router_losses = torch.stack([tower.balance_loss, router_z_loss(tower.router_logits)])
            routing = self._routing(tower)
        projected = model.multi_modal_projector(image_features)
        if self.join_tiles is not None:
            projected = self.join_tiles(projected, image_sizes)
        is_picture = input_ids == config.image_token_id
        embeds = model.language_model.get_input_embeddings()(input_ids.masked_fill(is_picture, 0))
        if pictures:
            embeds = embeds.masked_scatter(is_picture.unsqueeze(-1), projected.to(embeds.dtype))
        else:
            # Zero gradients, not none: every process then reduces the same gradients.
            embeds = embeds + 0 * projected.sum()
        arguments = row_arguments(sample_lengths, embeds) if sample_lengths else {}
        output = model.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False, **arguments)
        hidden_states = output.last_hidden_state.flatten(0, 1)
        if not len(targets):  # a dummy sample: its one position, times 0
            return 0 * self.label_loss(hidden_states[:1], input_ids.new_zeros(1)), router_losses, routing
        return self.label_loss(hidden_states.index_select(0, label_positions), targets), router_losses, routing

    @torch.no_grad()
    def _routing(self, tower: CLIPMoETowerOutput) -> Tensor | None:
        """`[M, E + 1]`: each expert's load, then the mean entropy; None without a mixture of experts."""
        if not tower.router_logits:
            return None
        load = expert_load(tower.router_logits, self.model.config.vision_config.num_experts_per_tok)
        return torch.cat([load, router_entropy(tower.router_logits)[:, None]], 1)
