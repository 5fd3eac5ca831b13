"""How much each size of the demo does. Two cores take about half an hour for `default`, four minutes for `tiny`."""

from __future__ import annotations

from dataclasses import dataclass

from demo.data import Sizes


@dataclass(frozen=True)
class Plan:
    """Steps are optimizer updates.

    Args:
        base_epochs: of the base CLIP on short captions, 128 pictures a step.
        mcl_steps, router_steps: of each MCL stage and of router tuning; the baselines get as many as all of them.
        llm_steps: of the little language model on text.
        projector_steps, vlm_steps: of the VLM's stages 1 and 2.
    """

    data: Sizes
    base_epochs: int
    mcl_steps: int
    router_steps: int
    llm_steps: int
    projector_steps: int
    vlm_steps: int


PLANS = {
    "default": Plan(Sizes(), base_epochs=5, mcl_steps=60, router_steps=45, llm_steps=2000, projector_steps=400,
                    vlm_steps=700),
    "tiny": Plan(Sizes(train=1500, test=100, pope=20, mme=5, signs=20, llm_texts=3000), base_epochs=1, mcl_steps=3,
                 router_steps=3, llm_steps=40, projector_steps=5, vlm_steps=15),
    "full": Plan(Sizes(train=40000, test=1000, pope=500, mme=120, signs=1500, llm_texts=100000), base_epochs=10,
                 mcl_steps=300, router_steps=300, llm_steps=12000, projector_steps=3000, vlm_steps=16000),
}
