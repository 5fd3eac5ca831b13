"""Attention of the language model when the samples of a micro-batch share one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from clipmoe_vlm.runs import UserError

NAME = "sdpa_per_sample"


def attention_per_sample(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                         sample_lengths: list[int] | None = None, sliding_window: int | None = None,
                         **options: Any) -> tuple[Tensor, None]:
    """transformers' "sdpa", called for one sample after the other if `sample_lengths` are given.

    So a sample cannot see another, nothing is computed for pairs of them, and no mask is made: on a GPU in half
    precision each call is torch's flash attention.

    Args:
        query, key, value: `[R, heads, T, D]`; with `sample_lengths` (they sum to T) R is 1 and the mask is not read.

    Returns:
        `[R, T, heads, D]`; None, for attention weights.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, sliding_window=sliding_window,
                                      **options)
    parts = zip(*(states.split(sample_lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, *part, _window(part[0], sliding_window), **options)[0] for part in parts]
    return torch.cat(attended, dim=1), None


def _window(query: Tensor, width: int | None) -> Tensor | None:
    """`[T, T]`, true where a token sees another one, if the sample is longer than the layer's sliding window."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < width)


AttentionInterface.register(NAME, attention_per_sample)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls without `sample_lengths`, such as generate's


def row_arguments(sample_lengths: list[int], like: Tensor) -> dict[str, Any]:
    """What the language model is called with for one row of samples, besides `position_ids`."""
    # Masks of four dimensions are handed down as they are: none is made from the positions.
    return {"sample_lengths": sample_lengths, "attention_mask": like.new_zeros(1, 1, 1, 1)}


def attend_per_sample(language_model: PreTrainedModel) -> None:
    """Makes samples in one row invisible to each other, and tries it out.

    Raises:
        UserError: the model can't be given an attention, or has other ways for a sample to reach the next one (states,
            convolutions).
    """
    name = type(language_model).__name__
    try:
        language_model.set_attn_implementation(NAME)
        influence = _influence_on_the_next(language_model)
    except (TypeError, ValueError) as error:
        raise UserError(f"packing: {name} does not take an attention from outside: {str(error)[:120]}; set "
                        "packing: false") from error
    if influence > (1e-4 if language_model.dtype == torch.float32 else 1e-2):  # experts may round in another way
        raise UserError(f"packing: {name} lets samples in one row see each other; set packing: false")


@torch.no_grad()
def _influence_on_the_next(language_model: PreTrainedModel) -> float:
    """How much the hidden states of a row's second sample move when its first one changes, relative to their norm."""
    position_ids = torch.tensor([[0, 1, 0, 1, 2, 3]])
    row = row_arguments([2, 4], language_model.get_input_embeddings().weight)
    one, other = (language_model(input_ids=torch.tensor([[*first, 9, 10, 11, 12]]), position_ids=position_ids,
                                 use_cache=False, **row).last_hidden_state[:, 2:] for first in ([5, 6], [7, 8]))
    return float((one - other).norm() / one.norm())
