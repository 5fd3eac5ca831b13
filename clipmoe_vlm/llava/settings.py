"""What LLaVA's own arguments have no place for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    """How the tower trains inside LLaVA; `clipmoe_vlm.llava.settings` is the one that counts.

    Attributes:
        tower: what of it trains (see `clipmoe_vlm.tuning.set_tower_trainable`). Default: what LLaVA's own arguments
            say, which is nothing in LLaVA 1.5 and all of it under LLaVA-NeXT's `unfreeze_mm_vision_tower` or
            `mm_tunable_parts`.
        tower_last_n: blocks, for `tower: last_n`.
        tower_learning_rate: default: the one that LLaVA's arguments give.
        router_aux_loss_coef: weight of the routers' auxiliary loss in the loss that LLaVA trains.
    """

    tower: str | None = None
    tower_last_n: int = 1
    tower_learning_rate: float | None = None
    router_aux_loss_coef: float = 0.01


settings = Settings()
