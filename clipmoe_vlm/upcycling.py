"""Turns dense CLIPs into the experts of a CLIP-MoE (sparse upcycling), and a CLIP-MoE back into its parts.

Every function returns a new model and leaves its arguments alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .configuration_clipmoe import CLIPMoEConfig
from .modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel, interpolate_positions
from .moe import Experts, Router, SparseMoE

Model = TypeVar("Model", CLIPMoEModel, CLIPMoEVisionModel)
TOWERS = ("vision", "text")
STACKED = {"fc1.weight": "fc1_weight", "fc1.bias": "fc1_bias", "fc2.weight": "fc2_weight", "fc2.bias": "fc2_bias"}


def upcycle(dense_models: Sequence[CLIPMoEModel], *, num_experts_per_tok: int = 2, vision_first_moe_layer: int = 0,
            text_first_moe_layer: int = 0, expert_dropout: float = 0.1, balance_bias: bool = False,
            base_gate: float | None = None, seed: int = 0) -> CLIPMoEModel:
    """A CLIP-MoE whose expert e of layer l is the feed-forward layer l of dense model e.

    Everything outside the MoE layers is taken from the first model (the base). Routers get torch's default Linear
    initialisation, seeded.

    Args:
        balance_bias: give the routers a balance bias (see `moe.Router`), at zero.
        base_gate: give the layers a base gate (see `moe.SparseMoE`) with this share, between 0 and 1, for the base in
            every token and dimension.

    Raises:
        ValueError: fewer than two models, a model that is not dense, models of different shapes, or too large a top_k.
    """
    if len(dense_models) < 2:
        raise ValueError(f"upcycling needs at least two dense models, got {len(dense_models)}")
    states = [model.state_dict() for model in dense_models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    for index, model in enumerate(dense_models):
        if model.config.vision_config.num_experts > 1 or model.config.text_config.num_experts > 1:
            raise ValueError(f"model {index} is a mixture of experts already; upcycling takes dense models")
        if shapes[index] != shapes[0]:
            differing = sorted(name for name in {*shapes[0], *shapes[index]}
                               if shapes[0].get(name) != shapes[index].get(name))
            raise ValueError(f"model {index} has another architecture than model 0: {differing[0]} is "
                             f"{shapes[index].get(differing[0])} and {shapes[0].get(differing[0])}")
    config = _moe_config(dense_models[0].config, vision_first_moe_layer, text_first_moe_layer,
                         num_experts=len(dense_models), num_experts_per_tok=num_experts_per_tok,
                         expert_dropout=expert_dropout, balance_bias=balance_bias, base_gate=base_gate is not None)
    moe = CLIPMoEModel(config).to(dense_models[0].dtype)
    with torch.no_grad():
        for name, target in moe.state_dict().items():
            if ".mlp.experts." in name:
                dense_name = _dense_name(name)
                target.copy_(torch.stack([state[dense_name] for state in states]))
            elif ".mlp.router." not in name:
                target.copy_(states[0][name])
        for router in _routers(moe):
            if router.base_gate is not None:
                nn.init.zeros_(router.base_gate.weight)
                nn.init.constant_(router.base_gate.bias, math.log(base_gate / (1 - base_gate)))
    return randomize_routers(moe, seed)


def _moe_config(base: CLIPMoEConfig, vision_first: int, text_first: int, **fields: Any) -> CLIPMoEConfig:
    values = base.to_dict()
    for tower, first in (("vision_config", vision_first), ("text_config", text_first)):
        values[tower].update(fields, first_moe_layer=first)
    return CLIPMoEConfig(**values)


def _dense_name(stacked_name: str) -> str:
    prefix, stacked = stacked_name.split(".mlp.experts.")
    return f"{prefix}.mlp." + next(dense for dense, ours in STACKED.items() if ours == stacked)


def dense_expert(model: CLIPMoEModel, expert: int) -> CLIPMoEModel:
    """The dense CLIP that uses `expert` alone in every MoE layer.

    Raises:
        ValueError: the model has no such expert.
    """
    num_experts = model.config.vision_config.num_experts
    if not 0 <= expert < num_experts:
        raise ValueError(f"there is no expert {expert}: the model has the experts 0..{num_experts - 1}")
    config = _moe_config(model.config, 0, 0, num_experts=1, num_experts_per_tok=1, expert_dropout=0.0,
                         balance_bias=False, base_gate=False)
    dense = CLIPMoEModel(config).to(model.dtype)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp.router." not in name}
    dense.load_state_dict({
        _dense_name(name) if ".mlp.experts." in name else name: tensor[expert] if ".mlp.experts." in name else tensor
        for name, tensor in state.items()
    })
    return dense.eval()


def uniform_average(model: CLIPMoEModel) -> CLIPMoEModel:
    """Every expert on every token with equal weight (dense compute): zero routers and top_k = the number of experts.

    A base gate or balance bias is left out.
    """
    values = model.config.to_dict()
    for tower in ("vision_config", "text_config"):
        values[tower].update(num_experts_per_tok=values[tower]["num_experts"], balance_bias=False, base_gate=False)
    average = CLIPMoEModel(CLIPMoEConfig(**values)).to(model.dtype)
    names = average.state_dict().keys()
    average.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    for router in _routers(average):
        nn.init.zeros_(router.weight)
    return average.eval()


def randomize_routers(model: CLIPMoEModel, seed: int) -> CLIPMoEModel:
    """The same model with freshly initialised routers (torch's default for Linear), a function of `seed` alone."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for router in _routers(model):
        bound = router.weight.shape[1] ** -0.5
        weight = torch.empty(router.weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            router.weight.copy_(weight)
    return model


def stretch_text_positions(model: CLIPMoEModel, length: int = 248) -> CLIPMoEModel:
    """More text positions, as Long-CLIP (arXiv 2403.15378) makes them: the first 20 are kept, the rest interpolated.

    77 positions give 248 by a factor of 4: `new[20+4i+j] = ((4-j) old[20+i] + j old[21+i]) / 4`; the last position is
    continued by the last difference, `old[76] + j (old[76]-old[75]) / 4`.

    The features of captions that end within the first 20 positions stay as they were, which holds only for a causal
    tower that reads a text at its end. SigLIP's attends to all its padding and reads the last position.

    Raises:
        ValueError: the tower is not like that, or `length` is not `20 + factor * (old - 20)` for a whole factor of at
            least 1.
    """
    text = model.config.text_config
    if not text.is_causal or text.pooling == "last":
        why = "reads its last position" if text.pooling == "last" else "attends to its padding"
        raise ValueError(f"this text tower {why}, so more positions would change the features of every caption: keep "
                         f"its {text.max_position_embeddings} positions (text_length: null)")
    old = model.text_model.embeddings.position_embedding.weight.detach()
    kept, rest = 20, len(old) - 20
    if rest < 2 or length < len(old) or (length - kept) % rest:
        possible = f"20 + k * {rest}" if rest >= 2 else "none: it has too few positions"
        raise ValueError(f"{len(old)} text positions cannot be stretched to {length}; possible lengths: {possible}")
    factor = (length - kept) // rest
    tail = old[kept:].double()
    difference = torch.cat([tail[1:] - tail[:-1], (tail[-1] - tail[-2])[None]])
    steps = torch.arange(factor, dtype=torch.float64) / factor
    stretched = (tail[:, None] + steps[:, None] * difference[:, None]).flatten(0, 1)
    values = model.config.to_dict()
    values["text_config"]["max_position_embeddings"] = length
    longer = CLIPMoEModel(CLIPMoEConfig(**values)).to(model.dtype)
    name = "text_model.embeddings.position_embedding.weight"
    longer.load_state_dict({**model.state_dict(), name: torch.cat([old[:kept], stretched.to(old.dtype)])})
    return longer.eval()


def resize_pictures(model: Model, image_size: int) -> Model:
    """The same model for pictures of `image_size` pixels: the patches' positions are interpolated, the rest stays.

    Interpolated as transformers does at run time for `interpolate_pos_encoding=True`, whatever library the weights come
    from, so that the order of conversions does not matter. open_clip and timm use another bicubic filter for theirs
    (antialiased, with PIL's coefficient). Positions made of sines are interpolated too, as open_clip does with them:
    the formula continued beyond the trained grid would be new to the blocks.

    Raises:
        ValueError: `image_size` is no multiple of the patch size.
    """
    whole = isinstance(model, CLIPMoEModel)
    vision = model.config.vision_config if whole else model.config
    if image_size < vision.patch_size or image_size % vision.patch_size:
        raise ValueError(f"a picture size of {image_size} px is no multiple of this tower's patch size of "
                         f"{vision.patch_size} px; the nearest are {_multiples_around(image_size, vision.patch_size)}")
    values = model.config.to_dict()
    (values["vision_config"] if whole else values)["image_size"] = image_size
    name = "vision_model.embeddings.position_embedding.weight"
    state = model.state_dict()
    old, new = vision.image_size // vision.patch_size, image_size // vision.patch_size
    state[name] = interpolate_positions(state[name], int(vision.class_token), (old, old), (new, new))
    resized = type(model)(type(model.config)(**values)).to(model.dtype)
    resized.load_state_dict(state)
    return resized.eval()


def _multiples_around(size: int, patch: int) -> str:
    below = size // patch * patch
    return f"{below} and {below + patch}" if below >= patch else str(patch)


def _routers(model: nn.Module) -> Iterator[Router]:
    return (module for module in model.modules() if isinstance(module, Router))


def router_parameters(model: CLIPMoEModel | CLIPMoEVisionModel) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of the routers: their weights and, where they have them, base gates."""
    return _parameters_of(model, Router)


def expert_parameters(model: CLIPMoEModel | CLIPMoEVisionModel) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of the experts of the MoE layers."""
    return _parameters_of(model, Experts)


def _parameters_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        if isinstance(module, kind):
            yield from ((f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters())


def ffn_parameters(model: CLIPMoEModel, vision_first_layer: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of the feed-forward layers: the text tower's all, the vision tower's from one block on."""
    for tower, first in (("vision", vision_first_layer), ("text", 0)):
        layers = getattr(model, f"{tower}_model").encoder.layers
        for index in range(first, len(layers)):
            prefix = f"{tower}_model.encoder.layers.{index}.mlp"
            yield from ((f"{prefix}.{name}", parameter) for name, parameter in layers[index].mlp.named_parameters())


def is_moe(model: nn.Module) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(isinstance(module, SparseMoE) for module in model.modules())
