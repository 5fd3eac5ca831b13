"""What a run will need: `python -m train_encoder.plan CONFIG.yaml [key=value ...] [--gpus N] [--samples N] ...`.

Prints parameters, FLOPs per pair, memory per GPU and hours per stage of the method `dmu`. Only the model's shape is
needed: `architecture=NAME`, a name of open_clip's, saves fetching the model for it. Nothing is measured: the model's
own code runs on the meta device, which has shapes and no numbers. FLOPs are those that torch counts; activations are
what autograd keeps there, in the types that bfloat16 autocast and flash attention give on a GPU. Time is FLOPs over
what the GPUs can do times an assumed utilisation. Options that compute more than the paper's recipe (distillation,
short captions, a base gate) are not counted.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.convert import config_of
from clipmoe_vlm.modeling_clipmoe import CLIPMoEMLP
from clipmoe_vlm.planning import GPU_OVERHEAD, hours, plan_parser, read_options
from clipmoe_vlm.runs import Distributed, UserError, fail, load_config
from clipmoe_vlm.upcycling import expert_parameters, ffn_parameters, router_parameters

from .config import EncoderConfig, MCLConfig, RouterConfig, check

# The paper's own: 8 A100 take half an hour for an MCL stage of ViT-L/14 on 1.2 M pairs (tests/test_plan.py).
UTILISATION = 0.15


@dataclass
class Cost:
    """Of one kind of training step. FLOPs and activations are per pair."""

    trainable: int  # parameters
    forward: float  # FLOPs
    backward: float
    copies: float  # bytes of the weights' bfloat16 copies
    kept: float  # bytes that autograd keeps for the backward
    kept_checkpointing: float  # the same with gradient checkpointing: what enters the blocks, and one block's inside
    working: float  # bytes of gradients in the widest layer's backward


class GPUTypes(TorchFunctionMode):
    """Gives meta tensors the types of CUDA's bfloat16 autocast, and attention that keeps no matrix of scores."""

    HALF = (F.linear, F.conv2d)

    def __init__(self):
        super().__init__()
        self.copies: dict[int, torch.UntypedStorage] = {}  # of parameters; held, so that no other takes their identity

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, 0.0, kwargs.get("is_causal", False))[0]
        if function in self.HALF or function is F.layer_norm:
            dtype = torch.bfloat16 if function in self.HALF else torch.float32
            args = [self._cast(value, dtype) if isinstance(value, Tensor) else value for value in args]
        return function(*args, **kwargs)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        cast = tensor.to(dtype)
        if isinstance(tensor, nn.Parameter) and cast is not tensor:
            self.copies[cast.untyped_storage()._cdata] = cast.untyped_storage()
        return cast


class KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """The storages of the tensors that autograd keeps, by an identity of theirs."""

    def __init__(self):
        self.storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def sizes(self, without: set[int]) -> dict[int, int]:
        """Bytes of each storage that is not one of `without`."""
        return {number: storage.nbytes() for number, storage in self.storages.items() if number not in without}


def storages_of(model: nn.Module) -> set[int]:
    return {parameter.untyped_storage()._cdata for parameter in model.parameters()}


def shape_of(config: EncoderConfig) -> CLIPMoEConfig:
    """The dense base's configuration, with the text positions that it is stretched to.

    Raises:
        UserError: the model is not found, or not supported.
    """
    try:
        base = config_of(config.model, config.architecture)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"model: {error} (for its shape alone, add architecture=NAME, one of open_clip's)") from error
    if not isinstance(base, CLIPMoEConfig):
        raise UserError(f"model: {config.model} is a vision tower alone")
    if config.text_length is not None:
        base.text_config.max_position_embeddings = config.text_length
    return base


def mixture_of(base: CLIPMoEConfig, config: EncoderConfig) -> CLIPMoEConfig:
    """The configuration of the run's CLIP-MoE."""
    mixture = copy.deepcopy(base)
    for tower in (mixture.vision_config, mixture.text_config):
        tower.num_experts, tower.num_experts_per_tok = config.num_experts, config.top_k
        tower.expert_dropout = config.router.expert_dropout
    mixture.vision_config.first_moe_layer = config.first_moe_layer
    return mixture


def on_meta(config: CLIPMoEConfig) -> CLIPMoEModel:
    with torch.device("meta"):
        return CLIPMoEModel(config).train().requires_grad_(False)


def mcl_cost(base: CLIPMoEConfig, first_moe_layer: int) -> Cost:
    """An MCL step: the dense model, of which the feed-forward layers train."""
    model = on_meta(base)
    trainable = [parameter for _, parameter in ffn_parameters(model, first_moe_layer)]
    for parameter in trainable:
        parameter.requires_grad_(True)
    return _cost(model, sum(parameter.numel() for parameter in trainable))


def router_cost(mixture: CLIPMoEConfig) -> Cost:
    """A router-tuning step.

    Routing depends on numbers, which the meta device has not. So the top k experts of a token are one feed-forward
    layer k times as wide, which has their very products; the router's own, and what a mixture keeps in addition, are
    added by formula.
    """
    dense = copy.deepcopy(mixture)
    dense.vision_config.num_experts = dense.text_config.num_experts = 1
    dense.vision_config.num_experts_per_tok = dense.text_config.num_experts_per_tok = 1
    model = on_meta(dense)
    for name, tower in (("vision", mixture.vision_config), ("text", mixture.text_config)):
        wide = copy.deepcopy(tower)
        wide.intermediate_size *= tower.num_experts_per_tok
        layers = getattr(model, f"{name}_model").encoder.layers[tower.first_moe_layer:]
        for layer in layers:
            with torch.device("meta"):
                layer.mlp = CLIPMoEMLP(wide).requires_grad_(False)
        # The gradient goes back to the first router, for which this bias stands: it takes no product.
        layers[0].mlp.fc2.bias.requires_grad_(True)
    with torch.device("meta"):
        trainable = sum(parameter.numel() for _, parameter in router_parameters(CLIPMoEModel(mixture)))
    cost = _cost(model, trainable)
    for tower in (mixture.vision_config, mixture.text_config):
        tokens, layers = _tokens(tower), tower.num_hidden_layers - tower.first_moe_layer
        product = 2 * tokens * tower.hidden_size * tower.num_experts
        cost.forward += layers * product
        cost.backward += (2 * layers - 1) * product  # the first router's input needs no gradient
        unchosen = tower.num_experts - tower.num_experts_per_tok  # their weights are cast with the others
        cost.copies += layers * unchosen * 2 * (2 * tower.hidden_size * tower.intermediate_size)
        # Router input (float32), each expert's output, and the dropout's mask (a byte).
        kept = tokens * (4 * tower.hidden_size + tower.num_experts_per_tok * (
            2 * tower.hidden_size + bool(tower.expert_dropout) * tower.intermediate_size))
        cost.kept += layers * kept
        cost.kept_checkpointing += kept
    return cost


def _cost(model: CLIPMoEModel, trainable: int) -> Cost:
    """Forward and backward of both towers on one pair."""
    vision, text = model.config.vision_config, model.config.text_config
    picture = (vision.num_channels, vision.image_size, vision.image_size)
    cost, inside = Cost(trainable, 0, 0, 0, 0, 0, 0), []
    for tower, encode, shape, dtype in ((vision, model.get_image_features, picture, torch.float32),
                                        (text, model.get_text_features, (_tokens(text),), torch.long)):
        with GPUTypes() as types, (kept := KeptForBackward()):
            with FlopCounterMode(display=False) as forward:
                features = encode(torch.empty(1, *shape, dtype=dtype, device="meta"))
            with FlopCounterMode(display=False) as backward:
                features.backward(torch.empty_like(features))
        sizes = kept.sizes(storages_of(model))
        activations = [size for number, size in sizes.items() if number not in types.copies]
        cost.forward += forward.get_total_flops()
        cost.backward += backward.get_total_flops()
        cost.copies += sum(sizes.values()) - sum(activations)
        cost.kept += sum(activations)
        cost.kept_checkpointing += 4 * _tokens(tower) * tower.hidden_size * tower.num_hidden_layers
        inside.append(sum(activations) / tower.num_hidden_layers)
        cost.working = max(cost.working, 3 * max(activations))
    cost.kept_checkpointing += max(inside)
    return cost


def _tokens(tower) -> int:
    if hasattr(tower, "image_size"):
        return tower.num_patches + tower.class_token
    return tower.max_position_embeddings


def plan(config: EncoderConfig, *, gpus: int, samples: int, tflops: float, utilisation: float) -> list[str]:
    """The lines to print.

    Args:
        samples: training pairs.
        tflops: what one GPU can do in bfloat16, in 10^12 FLOPs per second.
        utilisation: the share of that which training reaches.

    Raises:
        UserError: values that cannot work, a model that is not found, or a method without a plan.
    """
    check(config, Distributed(0, gpus, torch.device("cuda")))
    if config.method != "dmu":
        raise UserError(f"method: {config.method} has no plan; plan the method dmu, whose budget the others are given")
    base = shape_of(config)
    if config.first_moe_layer >= base.vision_config.num_hidden_layers:
        raise UserError(f"first_moe_layer: {config.first_moe_layer} leaves no MoE layer in the vision tower")
    mixture = mixture_of(base, config)
    with torch.device("meta"):
        moe = CLIPMoEModel(mixture)
    dense, total = (sum(parameter.numel() for parameter in model.parameters()) for model in (on_meta(base), moe))
    experts = sum(parameter.numel() for _, parameter in expert_parameters(moe))
    active = total - experts * (config.num_experts - config.top_k) // config.num_experts
    mcl, router = mcl_cost(base, config.first_moe_layer), router_cost(mixture)

    def memory(name: str, cost: Cost, parameters: int, batch_size: int) -> str:
        share = batch_size // gpus
        pairs = min(share, config.micro_batch_size or share)
        fixed = 4 * parameters + 12 * cost.trainable + cost.copies + GPU_OVERHEAD  # weights; gradients, two moments
        per_pair = cost.working + (cost.kept_checkpointing if config.gradient_checkpointing else cost.kept)
        return (f"memory per GPU, {name}: {fixed / 2**30:.1f} GiB + {per_pair / 2**20:.0f} MiB for each pair at once; "
                f"{(fixed + pairs * per_pair) / 2**30:.0f} GiB with {pairs} of them")

    def step(cost: Cost, batch_size: int) -> float:
        cached = config.micro_batch_size is not None and config.micro_batch_size < batch_size // gpus
        return cost.forward * (1 + cached + config.gradient_checkpointing) + cost.backward

    def pairs_of(settings: MCLConfig | RouterConfig) -> int:
        return settings.max_steps * settings.batch_size if settings.max_steps else settings.epochs * samples

    mcl_step, router_step = step(mcl, config.mcl.batch_size), step(router, config.router.batch_size)
    encoding, stage, tuning = (
        hours(flops, gpus, tflops, utilisation)
        for flops in (mcl.forward * samples, mcl.forward * samples + mcl_step * pairs_of(config.mcl),
                      router_step * pairs_of(config.router)))
    return [
        f"parameters: {_millions(dense)} dense, {_millions(total)} as CLIP-MoE, of which {_millions(active)} work on a "
        "token",
        f"training: {_millions(mcl.trainable)} in an MCL stage, {_millions(router.trainable)} in router tuning",
        f"GFLOP per pair: {mcl.forward / 1e9:.0f} encoding, {mcl_step / 1e9:.0f} MCL, {router_step / 1e9:.0f} router "
        "tuning",
        memory("MCL", mcl, dense, config.mcl.batch_size),
        memory("router tuning", router, total, config.router.batch_size),
        f"time on {gpus} x {tflops:g} TFLOP/s at {utilisation:.0%}: {stage:.1f} h an MCL stage ({encoding:.1f} h of it "
        f"encoding), {tuning:.1f} h router tuning, {(config.num_experts - 1) * stage + tuning:.1f} h in all",
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count < 10e6 else f"{count / 1e6:,.0f} M"


def main(arguments: list[str]) -> None:
    parser = plan_parser("train_encoder.plan", __doc__.split(":")[0], UTILISATION, "as in the paper's runs")
    parser.add_argument("--samples", type=int, default=1_000_000, help="training pairs (default: 1,000,000)")
    options, others = read_options(parser, arguments)
    config = load_config(EncoderConfig, others, "python -m train_encoder.plan")
    print("\n".join(plan(config, **vars(options))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
