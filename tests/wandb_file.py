"""Reads Weights & Biases' own file of an offline run."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def wandb_records(file: Path) -> Iterator[Record]:
    """The records of W&B's own file: those of LevelDB's log format after a header of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4:at + 7])
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_rows(file: Path) -> list[dict]:
    """What was logged, step by step."""
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in wandb_records(file) if record.WhichOneof("record_type") == "history"]
