"""Times the encoder on this machine: `python -m benchmarks.encoder [docs/performance.md] [key=value ...]`.

(a) CLIP-MoE's vision tower, forward and forward + backward, against the same weights in a masked loop over experts (as
    the method's public code has it), in a loop that runs every expert on every token and masks what it gives, and
    against the dense tower times the ratio of their counted FLOPs;
(b) an MCL step (only the feed-forward layers train) against the same step with everything trainable;
(c) a router-tuning step against the same step with everything trainable.

Within each, the variants take turns in every repeat, each repeat beginning with another one, so that a busy machine
slows all of them alike; a ratio is taken within a repeat, and shown are medians and ranges over the repeats. On a GPU
all runs under bfloat16 autocast, and the peak of memory is shown. Prints one table, writes it into the given
document between its two marks, and all single times as JSON to `json=`.
"""

from __future__ import annotations

import copy
import platform
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.document import around_results, write_results
from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionModel
from clipmoe_vlm.moe import SparseMoE
from clipmoe_vlm.routing import expert_load
from clipmoe_vlm.runs import UserError, fail, write_json
from clipmoe_vlm.upcycling import ffn_parameters, router_parameters
from train_encoder.loss import contrastive_loss

# ViT-B/16: 197 tokens, 12 blocks, 768 wide; text of 248 positions, as recipes have it.
SETTINGS = {"pictures": 8, "pairs": 4, "layers": 12, "experts": 4, "top_k": 2, "repeats": 4}
MARKS = ("<!-- results of benchmarks.encoder -->", "<!-- end of results -->")


class MaskedLoop(nn.Module):
    """The plain way: each expert in turn is masked out, gathers its tokens, and adds its weighted output back."""

    def __init__(self, layer: SparseMoE):
        super().__init__()
        stacked, self.router, self.top_k = layer.experts, layer.router, layer.top_k
        self.activation = stacked.activation
        # Separate parameters, as plain code has them, on the stack's own memory.
        self.experts = nn.ModuleList(nn.ParameterList(weight.data[expert] for weight in stacked.parameters())
                                     for expert in range(len(stacked.fc1_weight)))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.flatten(0, 1)
        logits = self.router(tokens)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        masks = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        output = torch.zeros_like(tokens)
        for mask, (fc1_weight, fc1_bias, fc2_weight, fc2_bias) in zip(masks, self.experts, strict=True):
            slot, token = torch.where(mask)
            hidden = self.activation(F.linear(tokens[token], fc1_weight, fc1_bias))
            hidden = F.linear(hidden, fc2_weight, fc2_bias) * weights[token, slot, None]
            output.index_add_(0, token, hidden.to(output.dtype))
        return output.view_as(hidden_states), logits


class EveryExpert(MaskedLoop):
    """The plainest way: every expert on every token, and a weight of zero where it was not chosen."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.flatten(0, 1)
        logits = self.router(tokens)
        best, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter(1, chosen, best / best.sum(-1, keepdim=True))
        output = torch.zeros_like(tokens)
        for expert, (fc1_weight, fc1_bias, fc2_weight, fc2_bias) in enumerate(self.experts):
            hidden = self.activation(F.linear(tokens, fc1_weight, fc1_bias))
            output = output + F.linear(hidden, fc2_weight, fc2_bias) * weights[:, expert, None]
        return output.view_as(hidden_states), logits


def with_loops(model: CLIPMoEVisionModel, loop: type[MaskedLoop]) -> CLIPMoEVisionModel:
    """The same model on the same memory, with plain loops for its MoE layers."""
    plain = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    for layer in plain.vision_model.encoder.layers:
        layer.mlp = loop(layer.mlp)
    return plain


class Bench:
    """Device, settings and everything measured so far."""

    def __init__(self, settings: dict[str, int]):
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def pair(self, variants: dict[str, Callable[[], None]]) -> None:
        """Times the variants in turns; the first round only warms up."""
        names = list(variants)
        self.seconds |= {name: [] for name in names}
        for repeat in range(self.settings["repeats"] + 1):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                self._wait()
                start = time.perf_counter()
                variants[name]()
                self._wait()
                if repeat:
                    self.seconds[name].append(time.perf_counter() - start)
                if self.device.type == "cuda":
                    self.memory[name] = torch.cuda.max_memory_allocated(self.device)
                print(".", end="", file=sys.stderr, flush=True)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def ratio(self, name: str, other: str, factor: float = 1.0) -> list[float]:
        """Time of `name` over `factor` times that of `other`, in each repeat."""
        return [a / (factor * b) for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]


def tower_config(bench: Bench, experts: int) -> dict:
    layers = bench.settings["layers"]
    moe = {"num_experts": experts, "num_experts_per_tok": min(bench.settings["top_k"], experts)}
    return {"vision_config": {"num_hidden_layers": layers, "patch_size": 16, **moe},
            "text_config": {"num_hidden_layers": layers, "max_position_embeddings": 248, **moe}}


def pictures_of(count: int) -> Tensor:
    """Smooth random pictures `[count, 3, 224, 224]`: noise alone would give all patches one look, and one expert."""
    return F.interpolate(torch.randn(count, 3, 14, 14), (224, 224), mode="bicubic")


def flops(run: Callable[[], None]) -> int:
    # The math backend, because the counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def time_towers(bench: Bench) -> dict:
    """(a); returns the FLOP ratios, the experts' shares of the tokens, and the largest difference of the outputs."""
    experts = bench.settings["experts"]
    dense, ours = (CLIPMoEVisionModel(CLIPMoEConfig(**tower_config(bench, count)).vision_config).to(bench.device)
                   for count in (1, experts))
    # Tokens of trained towers have much in common, which favours some experts: 5% to 45% of a layer's tokens each.
    for layer in ours.vision_model.encoder.layers:
        nn.init.normal_(layer.layer_norm2.bias)
    models = {"dense tower": dense, "masked loop": with_loops(ours, MaskedLoop),
              "every expert": with_loops(ours, EveryExpert), "CLIP-MoE tower": ours}
    pixels = pictures_of(bench.settings["pictures"]).to(bench.device)

    def forward(model: nn.Module, pixels: Tensor = pixels) -> None:
        with torch.no_grad(), bench.autocast():
            model(pixels)

    def both(model: nn.Module, pixels: Tensor = pixels) -> None:
        with bench.autocast():
            features = model(pixels).pooler_output
        features.backward(torch.ones_like(features))
        model.zero_grad(set_to_none=True)

    ways = {"forward": forward, "forward + backward": both}
    facts = {"flop_ratio": {}}
    for way, run in ways.items():
        moe, base = (flops(lambda run=run, name=name: run(models[name], pixels[:1]))
                     for name in ("masked loop", "dense tower"))
        facts["flop_ratio"][way] = moe / base
    with torch.no_grad():
        output = ours(pixels)
        facts["largest_difference"] = max((models[name](pixels).pooler_output - output.pooler_output).abs().max().item()
                                          for name in ("masked loop", "every expert"))
    facts["expert_load"] = expert_load(output.router_logits, bench.settings["top_k"]).tolist()
    for way, run in ways.items():
        bench.pair({f"{way}: {name}": lambda run=run, model=model: run(model) for name, model in models.items()})
    return facts


def time_steps(bench: Bench, kind: str, experts: int, some_parameters: Callable) -> None:
    """(b) and (c): one model, and two optimizers that take turns with it."""
    model = CLIPMoEModel(CLIPMoEConfig(**tower_config(bench, experts))).to(bench.device).train()
    pairs = bench.settings["pairs"]
    pixels = pictures_of(pairs).to(bench.device)
    ids = torch.randint(1, 40000, (pairs, 248), device=bench.device)
    valid = torch.ones(pairs, dtype=torch.bool, device=bench.device)
    model.config.text_config.eos_token_id = 2  # the text's feature is that of its largest id

    def step(trainable: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        with bench.autocast():
            output = model(input_ids=ids, pixel_values=pixels)
        loss = contrastive_loss(output.image_embeds, output.text_embeds, valid, label_smoothing=0.1)
        loss = loss + 0.01 * (output.vision_model_output.aux_loss + output.text_model_output.aux_loss / 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    variants = {}
    for name, trainable in (("everything trains", list(model.parameters())),
                            (f"{kind} step", [parameter for _, parameter in some_parameters(model)])):
        optimizer = torch.optim.AdamW(trainable, 1e-6)
        variants[f"{kind}: {name}"] = lambda t=trainable, o=optimizer: step(t, o)
    bench.pair(variants)


def table(bench: Bench, facts: dict) -> list[str]:
    """Lines of a Markdown table: times, and ratios with their targets."""
    def spread(values: list[float], digits: int) -> str:
        return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    def met(values: list[float], target: float, at_most: bool) -> str:
        good = median(values) <= target if at_most else median(values) >= target
        return f"{'at most' if at_most else 'at least'} {target:.2f}: {'met' if good else 'missed'}"

    gpu = bench.device.type == "cuda"
    lines = [f"| | milliseconds |{' peak memory |' if gpu else ''}", f"|---|---:|{'---:|' if gpu else ''}"]
    for name, seconds in bench.seconds.items():
        memory = f" {bench.memory[name] / 2**30:.2f} GiB |" if gpu else ""
        lines.append(f"| {name} | {spread([1000 * value for value in seconds], 0)} |{memory}")
    lines += ["", "| ratio | median (range) | target |", "|---|---:|---|"]
    for way, factor in facts["flop_ratio"].items():
        ours, loop, every, dense = (f"{way}: {name}" for name in (
            "CLIP-MoE tower", "masked loop", "every expert", "dense tower"))
        over_dense, faster = bench.ratio(ours, dense, factor), bench.ratio(loop, ours)
        ideal = f"({factor:.3f} x dense)"
        lines += [f"| {way}: CLIP-MoE / {ideal} | {spread(over_dense, 2)} | {met(over_dense, 1.1, True)} |",
                  f"| {way}: masked loop / {ideal} | {spread(bench.ratio(loop, dense, factor), 2)} | |",
                  f"| {way}: masked loop / CLIP-MoE | {spread(faster, 2)} | {met(faster, 1.5, False)} |",
                  f"| {way}: every expert on every token / CLIP-MoE | {spread(bench.ratio(every, ours), 2)} | |"]
    for kind in ("MCL", "router tuning"):
        faster = bench.ratio(f"{kind}: everything trains", f"{kind}: {kind} step")
        lines.append(f"| {kind}: everything trains / {kind} step | {spread(faster, 2)} | |")
    return lines


def report(bench: Bench, facts: dict) -> str:
    values = bench.settings
    if bench.device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(bench.device)}, bfloat16 autocast"
    else:
        machine = f"{processor_name()}, {torch.get_num_threads()} threads, float32"
    busiest, idlest = (pick(share for layer in facts["expert_load"] for share in layer) for pick in (max, min))
    about = (
        f"{machine}, torch {torch.__version__}. ViT-B/16 with {values['layers']} blocks, {values['experts']} experts, "
        f"top-{values['top_k']}; (a) {values['pictures']} pictures, (b) and (c) {values['pairs']} pairs with texts of "
        f"248 tokens; {values['repeats']} repeats. An expert has {idlest:.0%} to {busiest:.0%} of its layer's tokens. "
        f"The features of CLIP-MoE and of the loops differ by at most {facts['largest_difference']:.1e}.")
    return "\n".join([textwrap.fill(about, 120), "", *table(bench, facts)])


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: list[str]) -> None:
    values, document, file = dict(SETTINGS), None, Path("runs/benchmark.json")
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "json" and value:
            file = Path(value)
        elif key in values and value.isdecimal() and int(value):
            values[key] = int(value)
        elif argument.endswith(".md"):
            document = Path(argument)
        else:
            raise UserError(f"'{argument}' is not a document (.md), json=FILE, or one of "
                            f"{', '.join(f'{name}=NUMBER' for name in values)}")
    if document:
        around_results(document, MARKS)  # told before the work
    torch.manual_seed(0)
    bench = Bench(values)
    facts = time_towers(bench)
    time_steps(bench, "MCL", 1, ffn_parameters)
    time_steps(bench, "router tuning", values["experts"], router_parameters)
    text = report(bench, facts)
    print(f"\n{text}")
    write_json(file, {**values, "torch": torch.__version__, "threads": torch.get_num_threads(), **facts,
                      "seconds": bench.seconds, "memory": bench.memory})
    if document:
        write_results(document, MARKS, text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
