"""A stand-in for LLaVA-NeXT, which is on no package index: its modules, names and order of calls, little else.

Written for these tests. What differs from LLaVA 1.5: towers are built with `delay_load` as the configuration says, the
builder has more branches, the projector is handed the tower's configuration, pictures come as lists of tiles,
`mm_tunable_parts` and `unfreeze_mm_vision_tower` decide what trains, the tower has a learning rate of its own, and the
trainer looks at what trains before it starts.
"""

from .model import LlavaLlamaForCausalLM  # noqa: F401
