"""Order of samples: LLaVA's own for the same random numbers; every sample once; the same on every process count."""

import json
from collections import Counter
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


# The sources of a mixture: number of samples and weight of each.
SOURCES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 4)), min_size=1, max_size=4)


def lengths_of(sources) -> list[int]:
    return SAMPLER["lengths"] * (1 + sum(count for count, _ in sources) // len(SAMPLER["lengths"]))


@given(sources=SOURCES, grouped=st.booleans(), world=st.integers(1, 3), seed=st.integers(0, 9))
def test_weights_say_how_often_samples_come(sources, grouped, world, seed):
    """Every epoch takes a source's samples n * weight times in all, each as often as the others or once more."""
    plan = BatchPlan(lengths_of(sources)[:sum(count for count, _ in sources)], 2, 1, world, grouped, seed, sources)
    for epoch in range(2):
        if not plan.samples_per_epoch:
            assert plan.order(epoch) == []
            continue
        steps = plan.steps_per_epoch
        taken = Counter(index for rank in range(world) for batch in
                        plan.micro_batches(rank, epoch * steps, (epoch + 1) * steps) for index in batch)
        first = 0
        for count, weight in sources:
            often = [taken.pop(index, 0) for index in range(first, first + count)]
            assert sum(often) == round(count * weight)
            assert set(often) <= {sum(often) // count, -(-sum(often) // count)}
            first += count
        assert not taken


def test_a_part_of_a_source_is_drawn_anew_by_each_epoch_and_seed():
    def halves(seed):
        plan = BatchPlan([5] * 200, 4, 1, 1, True, seed, [(100, 0.5), (100, 0.5)])
        return [frozenset(plan.order(epoch)) for epoch in range(20)]

    drawn = halves(0) + halves(1)
    assert drawn[:20] == halves(0) and len(set(drawn)) == 40
    assert all({index - 100 for index in half if index >= 100} != {index for index in half if index < 100}
               for half in drawn)  # nor do two sources share their draws
    often = Counter(index for half in drawn for index in half)
    assert len(often) == 200 and 6 < min(often.values()) and max(often.values()) < 34  # of 40; binomial: 20 +- 3.2


def test_one_source_of_weight_1_is_taken_in_the_order_of_llava():
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 1)
    expected = modality_length_order(SAMPLER["lengths"], 2, 2, generator)
    count = len(SAMPLER["lengths"])
    for weights in ((), [(count, 1)], [(count, 1.0)], [(20, 1), (count - 20, 1)]):
        assert BatchPlan(SAMPLER["lengths"], 2, 2, 1, True, 3, weights).order(1) == expected


@given(sources=SOURCES, first=st.integers(0, 19), grouped=st.booleans())
def test_going_on_from_any_step_takes_the_same_batches(sources, first, grouped):
    lengths = lengths_of(sources)
    sources = [*sources, (len(lengths) - sum(count for count, _ in sources), 1)]
    plan = BatchPlan(lengths, 2, 2, 1, grouped, 3, sources)
    assert list(plan.micro_batches(0, 0, 20))[2 * first:] == list(plan.micro_batches(0, first, 20))


@given(sources=SOURCES, grouped=st.booleans())
def test_processes_share_the_batches_of_one(sources, grouped):
    """Two processes, or four, take together what one takes with as much more accumulation."""
    lengths = lengths_of(sources)
    sources = [*sources, (len(lengths) - sum(count for count, _ in sources), 1)]
    expected = list(BatchPlan(lengths, 2, 4, 1, grouped, 3, sources).micro_batches(0, 0, 10))
    for world in (2, 4):
        plan = BatchPlan(lengths, 2, 4 // world, world, grouped, 3, sources)
        ranks = [list(plan.micro_batches(rank, 0, 10)) for rank in range(world)]
        assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == expected


def test_modalities_do_not_mix_but_in_the_last_batches():
    plan = BatchPlan(SAMPLER["lengths"], 4, 1, 1, True, seed=0)
    batches = list(plan.micro_batches(0, 0, plan.steps_per_epoch))
    mixed = [len({SAMPLER["lengths"][index] > 0 for index in batch}) > 1 for batch in batches]
    assert not any(mixed[:-2])
