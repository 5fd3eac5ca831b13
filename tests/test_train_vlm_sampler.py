"""Order of samples: LLaVA's own for the same random numbers; every sample once; the same on every process count."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_vlm.sampler import BatchPlan, modality_length_order

SAMPLER = json.loads((Path(__file__).parent / "reference/llava_train/sampler.json").read_text())


@pytest.mark.parametrize("case", SAMPLER["cases"])
def test_order_equals_llava(case):
    generator = torch.Generator().manual_seed(case["seed"])
    order = modality_length_order(SAMPLER["lengths"], case["batch"], case["world"], generator)
    assert order == case["indices"]


@given(lengths=st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=60), micro=st.integers(1, 4),
       accumulation=st.integers(1, 3), world=st.integers(1, 3), grouped=st.booleans(), epochs=st.integers(1, 2))
def test_every_sample_once_an_epoch(lengths, micro, accumulation, world, grouped, epochs):
    plan = BatchPlan(lengths, micro, accumulation, world, grouped, seed=7)
    ranks = [list(plan.micro_batches(rank, 0, epochs * plan.steps_per_epoch)) for rank in range(world)]
    assert all(len(batches) == accumulation * plan.steps_per_epoch * epochs for batches in ranks)
    taken = sorted(index for batches in ranks for batch in batches for index in batch)
    assert taken == sorted(list(range(len(lengths))) * epochs)


@given(first=st.integers(0, 19), grouped=st.booleans())
def test_going_on_from_any_step_takes_the_same_batches(first, grouped):
    plan = BatchPlan(SAMPLER["lengths"], 2, 2, 1, grouped, seed=3)
    assert list(plan.micro_batches(0, 0, 20))[2 * first:] == list(plan.micro_batches(0, first, 20))


def test_processes_share_the_batches_of_one():
    """Two processes take together what one takes with twice the accumulation."""
    one, two = (BatchPlan(SAMPLER["lengths"], 2, 4 // world, world, True, seed=3) for world in (1, 2))
    ranks = [list(two.micro_batches(rank, 0, 10)) for rank in (0, 1)]
    together = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert together == list(one.micro_batches(0, 0, 10))


def test_modalities_do_not_mix_but_in_the_last_batches():
    plan = BatchPlan(SAMPLER["lengths"], 4, 1, 1, True, seed=0)
    batches = list(plan.micro_batches(0, 0, plan.steps_per_epoch))
    mixed = [len({SAMPLER["lengths"][index] > 0 for index in batch}) > 1 for batch in batches]
    assert not any(mixed[:-2])
