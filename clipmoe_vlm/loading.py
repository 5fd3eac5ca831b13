"""Samples through the workers of a DataLoader: in the order asked for, with errors that stay sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .runs import UserError
from .sigterm import leave_sigterm_to_parent


class _Batches(Dataset):
    """Item n -> the n-th batch. A UserError is an item, too: as an exception it would leave a worker as a traceback."""

    def __init__(self, dataset: Dataset, collate: Callable[[list], Any], batches: Sequence[Sequence[int]]):
        self.dataset, self.collate, self.batches = dataset, collate, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.collate([self.dataset[int(item)] for item in self.batches[number]])
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def loader(dataset: Dataset, collate: Callable[[list], Any], batches: Sequence[Sequence[int]],
           workers: int) -> Iterator[Any]:
    """The given batches of sample numbers, collated, in that order whatever the number of workers.

    Raises:
        UserError: one that a worker met, in this process.
    """
    for batch in DataLoader(_Batches(dataset, collate, batches), batch_size=None, collate_fn=_as_it_is,
                            num_workers=workers, pin_memory=torch.cuda.is_available(),
                            worker_init_fn=leave_sigterm_to_parent):
        if isinstance(batch, UserError):
            raise batch
        yield batch
