"""Times one MoE layer against a dense one and against the plain loop: `python -m benchmarks.moe [tokens=3152] ...`.

Three layers of the same width: our `SparseMoE`; a loop over experts that masks out each one's tokens, as public code
has it; a dense feed-forward layer with the expert's sizes (a top-k MoE does k times its work). They take turns within
each repeat, so that a busy machine slows all of them alike. Prints medians and writes nothing but one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch
from torch import Tensor, nn

from clipmoe_vlm.moe import SparseMoE
from clipmoe_vlm.runs import UserError, fail

# 16 pictures of 197 tokens through ViT-B's width.
SETTINGS = {"tokens": 3152, "hidden": 768, "intermediate": 3072, "experts": 4, "top_k": 2, "repeats": 7}


def plain_loop(layer: SparseMoE, hidden_states: Tensor) -> Tensor:
    """`[1, N, D]` -> `[1, N, D]`: each expert in turn on the tokens that chose it."""
    tokens = hidden_states.flatten(0, 1)
    weights, chosen = layer.router(tokens).softmax(-1).topk(layer.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    experts, output = layer.experts, torch.zeros_like(tokens)
    for expert in range(experts.fc1_weight.shape[0]):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        hidden = nn.functional.linear(tokens[token], experts.fc1_weight[expert], experts.fc1_bias[expert])
        hidden = nn.functional.linear(experts.activation(hidden), experts.fc2_weight[expert], experts.fc2_bias[expert])
        output = output.index_add(0, token, hidden * weights[token, slot, None])
    return output.view_as(hidden_states)


def seconds(run, inputs: Tensor, backward: bool) -> float:
    """Time of one call, with a dense gradient sent back if `backward`."""
    if inputs.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if backward:
        output = run(inputs)
        output.backward(torch.ones_like(output))
    else:
        with torch.no_grad():
            run(inputs)
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    values = dict(SETTINGS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in values or not value.isdecimal():
            raise UserError(f"'{argument}' is not one of {', '.join(f'{name}=NUMBER' for name in values)}")
        values[key] = int(value)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, inner = values["hidden"], values["intermediate"]
    layer = SparseMoE(values["experts"], values["top_k"], size, inner, nn.functional.gelu, dropout=0.0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    layer = layer.to(device, dtype)
    dense = nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size)).to(device, dtype)
    inputs = torch.randn(1, values["tokens"], size, device=device, dtype=dtype).requires_grad_()
    with torch.no_grad():
        gap = (layer(inputs)[0] - plain_loop(layer, inputs)).abs().max().item()
    runs = {"ours": lambda x: layer(x)[0], "plain loop": lambda x: plain_loop(layer, x), "dense": dense}
    times: dict[str, list[float]] = {f"{name}, {way}": [] for name in runs for way in ("forward", "forward+backward")}
    for repeat in range(values["repeats"] + 1):
        for name, run in runs.items():
            for way in ("forward", "forward+backward"):
                took = seconds(run, inputs, backward=way != "forward")
                if repeat:  # the first round warms up
                    times[f"{name}, {way}"].append(took)
    medians = {name: round(1000 * median(some), 2) for name, some in times.items()}
    for name, milliseconds in medians.items():
        print(f"{name:30} {milliseconds:9.2f} ms")
    print(json.dumps({**values, "device": str(device), "dtype": str(dtype), "torch": torch.__version__,
                      "threads": torch.get_num_threads(), "largest_difference": gap, "milliseconds": medians}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
