"""What of a vision tower trains, by one word."""

from __future__ import annotations

from collections.abc import Sequence

from .encoder import wanted_hidden_states
from .modeling_clipmoe import CLIPMoEVisionModel
from .moe import Experts, Router

TOWER_TUNING = ("frozen", "routers", "experts", "last_n", "full")


def set_tower_trainable(tower: CLIPMoEVisionModel, tuning: str, select_layer: int | Sequence[int],
                        last_n: int = 1) -> None:
    """Sets `requires_grad` of every parameter, and training mode unless frozen.

    What stands behind the selected hidden states (blocks, final norm, pooling) is not computed, so it never trains.

    Args:
        tuning: `frozen`; `routers`; `experts` (and routers); `last_n`, the last blocks that are used; `full`.
        select_layer: index or indices into the hidden states, as in LLaVA's `mm_vision_select_layer`.

    Raises:
        ValueError: another word, routers or experts where the used blocks have none, or more blocks than are used.
    """
    layers = tower.vision_model.encoder.layers
    used = layers[: max(wanted_hidden_states(select_layer, len(layers)))]
    tower.requires_grad_(False)
    if tuning == "full":
        tower.requires_grad_(True)
        for unused in (*layers[len(used):], tower.vision_model.post_layernorm, tower.vision_model.head):
            if unused is not None:
                unused.requires_grad_(False)
    elif tuning == "last_n":
        if not 1 <= last_n <= len(used):
            raise ValueError(f"tower_last_n: {last_n}, but {len(used)} blocks of the tower are used")
        used[len(used) - last_n:].requires_grad_(True)
    elif tuning in ("routers", "experts"):
        kinds = (Router,) if tuning == "routers" else (Router, Experts)
        parts = [module for module in used.modules() if isinstance(module, kinds)]
        if not parts:
            is_moe = any(isinstance(module, Router) for module in tower.modules())
            which = "the blocks that are used have" if is_moe else "the vision tower is dense: it has"
            raise ValueError(f"tower: {tuning}, but {which} no {tuning}; use a CLIP-MoE tower or tower: frozen, "
                             "last_n or full")
        for part in parts:
            part.requires_grad_(True)
    elif tuning != "frozen":
        raise ValueError(f"tower: {tuning!r} is none of {', '.join(TOWER_TUNING)}")
    tower.train(tuning != "frozen")
