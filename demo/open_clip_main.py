"""open_clip's own training program, with the demo's small CLIP (configs/clip_64.json) among its models.

Takes exactly the options of `python -m open_clip_train.main`; its log lines get the time left.
"""

import logging
import re
import sys
import time
from pathlib import Path

import open_clip
from open_clip_train.main import main


class TimeLeft(logging.Filter):
    """Appends the time left to open_clip's `Train Epoch: 1 [2560/12032 (21%)]` lines."""

    def __init__(self, epochs: int):
        super().__init__()
        self.epochs, self.first = epochs, None

    def filter(self, record: logging.LogRecord) -> bool:
        found = re.search(r"Train Epoch: (\d+) \[ *(\d+)/(\d+)", record.getMessage())
        if found:
            epoch, seen, size = (int(group) for group in found.groups())
            done, now = epoch + seen / size, time.monotonic()
            self.first = self.first or (done, now)
            share = done - self.first[0]
            left = f"{(self.epochs - done) * (now - self.first[1]) / share:.0f} s" if share > 0 else "?"
            record.msg, record.args = f"{record.getMessage()} time left: {left}", ()
        return True


if __name__ == "__main__":
    open_clip.add_model_config(Path(__file__).parent / "configs" / "clip_64.json")
    arguments = sys.argv[1:]
    logging.getLogger().addFilter(TimeLeft(int(arguments[arguments.index("--epochs") + 1])))
    main(arguments)
