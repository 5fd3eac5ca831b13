"""The loss that a VLM is trained with.

Shapes: R rows, T tokens of a row (picture tokens included), N pictures, D hidden size, L labelled positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from train_vlm.chat import IGNORE_INDEX


class LabelLoss(nn.Module):
    """Cross-entropy of the language model's head, at labelled positions only and in chunks.

    A module of its own so that ZeRO-3 gathers the head's weight once for all chunks (it is set as a leaf module).

    Args:
        vocabulary: the first rows of `lm_head` that take part in the softmax (all but an appended `<image>`).
    """

    CHUNK = 1024  # rows whose logits exist at a time

    def __init__(self, lm_head: nn.Linear, vocabulary: int):
        super().__init__()
        self.lm_head = lm_head
        self.vocabulary = vocabulary

    def forward(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """`[L, D]`, `[L]` -> sum of the cross-entropies, float32."""
        weight = self.lm_head.weight[: self.vocabulary]
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.CHUNK, chunking_method=None)
        return F.linear_cross_entropy(
            hidden_states, weight, targets, reduction="sum", options=options if len(targets) > self.CHUNK else None
        ).float()


class VLMLoss(nn.Module):
    """What the engine trains: pixels and tokens to the sum of label losses and the routers' auxiliary loss."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model = model
        image_token_id, rows = model.config.image_token_id, model.config.text_config.vocab_size
        self.label_loss = LabelLoss(model.lm_head, image_token_id if image_token_id == rows - 1 else rows)

    def forward(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor, pictures: int,
                position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes a micro-batch.

        Args:
            input_ids, labels: `[R, T]`, padded on the right (so that causal attention never looks at padding and
                needs no mask); one `<image>` id per picture token.
            pixel_values: `[N, C, H, W]`, in the order of the marks; one dummy if there is no picture.
            pictures: how many of `pixel_values` are real (N or 0).
            position_ids: `[R, T]`; where they start anew, another sample begins that does not see the one before
                (transformers masks it if there is neither an attention mask nor a cache). None: one sample a row.

        Returns:
            sum of the cross-entropies at labelled positions; aux loss of the tower (0 for a dummy).
        """
        model, config = self.model.model, self.model.config
        tower = model.vision_tower(pixel_values, output_hidden_states=config.vision_feature_layer)
        features = tower.hidden_states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        projected = model.multi_modal_projector(features)
        is_picture = input_ids == config.image_token_id
        embeds = model.language_model.get_input_embeddings()(input_ids.masked_fill(is_picture, 0))
        if pictures:
            embeds = embeds.masked_scatter(is_picture.unsqueeze(-1), projected.to(embeds.dtype))
            aux_loss = tower.aux_loss
        else:
            # Zero gradients, not none: every process then reduces the same gradients.
            embeds = embeds + 0 * projected.sum()
            aux_loss = 0 * tower.aux_loss
        output = model.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
        hidden_states = output.last_hidden_state
        targets = labels[:, 1:]
        labelled = targets != IGNORE_INDEX
        if not labelled.any():  # a dummy sample: its one position, times 0
            return 0 * self.label_loss(hidden_states[:1, 0], input_ids.new_zeros(1)), aux_loss
        return self.label_loss(hidden_states[:, :-1][labelled], targets[labelled]), aux_loss
