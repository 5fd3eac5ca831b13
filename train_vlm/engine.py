"""The processes of a run and their DeepSpeed engine."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from clipmoe_vlm.runs import PATIENCE, Distributed, UserError, init_distributed, leave_word_to_main
from train_vlm.build_ops import prepare_deepspeed
from train_vlm.config import VLMConfig
from train_vlm.loss import VLMLoss


def start_processes() -> Distributed:
    """Joins the launcher's processes through DeepSpeed; without a launcher this is one process of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
    prepare_deepspeed()
    import deepspeed

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE, verbose=False)
    return init_distributed()


def start_engine(module: VLMLoss, groups: list[dict[str, Any]], config: VLMConfig, accumulation_steps: int) -> Any:
    """Hands module and AdamW to DeepSpeed."""
    import deepspeed

    from clipmoe_vlm.moe import SparseMoE

    if config.zero_stage == 3:
        # Gathered as a whole: which experts get tokens must not decide which collectives a process takes part in.
        mixtures = [m for m in module.modules() if isinstance(m, SparseMoE)]
        if mixtures:
            deepspeed.utils.set_z3_leaf_modules(module, [SparseMoE])
        for mixture in mixtures:
            if any(parameter.requires_grad for parameter in mixture.parameters()):
                mixture.register_forward_pre_hook(_with_gradient)
        # Not as a part of it: where embeddings are tied, the head's gradient is not complete until theirs is.
        deepspeed.zero.register_external_parameter(module.label_loss, module.label_loss.lm_head.weight)
    trained = sum(p.numel() for group in groups for p in group["params"])
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket_size(trained)}
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": min(trained, 50_000_000), "stage3_param_persistence_threshold": 10_000}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.max_grad_norm if config.zero_stage or config.precision != "fp32" else 0.0,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
    optimizer.state.clear()  # bf16 without ZeRO has made an update with zeros, which AdamW would count
    return engine


def bucket_size(trained: int) -> int:
    """Gradients that ZeRO hands on at a time, of `trained` ones."""
    return min(trained // 4 + 1, 500_000_000)


def _with_gradient(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """ZeRO-3 reduces a leaf module's gradients when that of its input is there, and too early if it has none."""
    return tuple(value if value.requires_grad else value.detach().requires_grad_() for value in inputs)


def summed(values: torch.Tensor, processes: Distributed) -> list[float]:
    """Sums a small vector over the processes."""
    if processes.world_size > 1:
        values = values.to(processes.device)
        torch.distributed.all_reduce(values)
    return values.tolist()


def gathered(items: list[Any], processes: Distributed) -> list[Any]:
    """The (small) lists of all processes, one after the other."""
    parts: list[Any] = [items]
    if processes.world_size > 1:
        parts = [None] * processes.world_size
        torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()}


@contextlib.contextmanager
def told_once(processes: Distributed) -> Iterator[None]:
    """Ends all processes if the block fails with a UserError on any of them; only the main one speaks."""
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    messages = gathered([str(error)] if error else [], processes)
    if messages and not processes.is_main:
        leave_word_to_main()
    if messages:
        raise error or UserError(messages[0])


def stop(processes: Distributed, message: str, samples: list[list[str]] | None = None) -> NoReturn:
    """Ends all processes with one sentence, which names the samples of all of them."""
    ids = gathered([sample for batch in samples or [] for sample in batch], processes)
    if not processes.is_main:
        leave_word_to_main()
    raise UserError(message + ", ".join(ids[:16]) + (" ..." if len(ids) > 16 else ""))
