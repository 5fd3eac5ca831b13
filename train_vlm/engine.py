"""The processes of a run and their DeepSpeed engine."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from clipmoe_vlm.runs import Distributed, UserError, init_distributed
from train_vlm.build_ops import prepare_deepspeed
from train_vlm.config import VLMConfig
from train_vlm.loss import LabelLoss, VLMLoss


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

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return init_distributed()


def start_engine(module: VLMLoss, groups: list[dict[str, Any]], config: VLMConfig, accumulation_steps: int) -> Any:
    """Hands module and AdamW to DeepSpeed."""
    import deepspeed

    from clipmoe_vlm.moe import SparseMoE

    if config.zero_stage == 3:
        # Gathered as a whole: which experts get tokens must not decide which collectives a process takes part in.
        kinds = {type(m) for m in module.modules() if isinstance(m, (SparseMoE, LabelLoss))}
        deepspeed.utils.set_z3_leaf_modules(module, list(kinds))
    trained = sum(p.numel() for group in groups for p in group["params"])
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": min(trained, 500_000_000)}
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
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]


def summed(values: torch.Tensor, processes: Distributed) -> list[float]:
    """Sums a small vector over the processes."""
    if processes.world_size > 1:
        values = values.to(processes.device)
        torch.distributed.all_reduce(values)
    return values.tolist()


@contextlib.contextmanager
def told_once(processes: Distributed) -> Iterator[None]:
    """For what goes wrong on every process alike: only the main one speaks."""
    try:
        yield
    except UserError:
        if not processes.is_main:
            _wait_and_exit()
        raise


def _wait_and_exit() -> NoReturn:
    time.sleep(3)  # the launcher ends all processes when the first one ends: let the main process speak
    os._exit(2)


def stop(processes: Distributed, message: str, samples: list[list[str]] | None = None) -> NoReturn:
    """Ends all processes with one sentence, which names the samples of all of them."""
    ids = [sample for batch in samples or [] for sample in batch]
    if processes.world_size > 1:
        gathered: list[Any] = [None] * processes.world_size
        torch.distributed.all_gather_object(gathered, ids)
        ids = [sample for part in gathered for sample in part]
    if not processes.is_main:
        _wait_and_exit()
    raise UserError(message + ", ".join(ids[:16]) + (" ..." if len(ids) > 16 else ""))
