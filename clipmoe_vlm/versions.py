"""The versions of other people's packages that the tests run with."""

from __future__ import annotations

import functools
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

# First and last; what lies between is taken to work. LLaVA is llava-torch on PyPI and llava in its repository.
TESTED = {"torch": ("2.0", "2.14"), "transformers": ("4.36", "5.24"), "llava": ("1.2", "1.2"),
          "llava-torch": ("1.2", "1.2")}


@functools.cache
def warn_if_untested() -> None:
    """Warns, once per process, of each installed package that is older or newer than what the tests run with."""
    for package, (first, last) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not _numbers(first) <= _numbers(installed) <= _numbers(last):
            tested = first if first == last else f"{first} to {last}"
            warnings.warn(f"clipmoe_vlm is not tested with {package} {installed}, but with {tested}; going on",
                          stacklevel=2)


def _numbers(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
