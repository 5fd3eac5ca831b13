"""How a function of a host's is changed: ours stands around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def around(theirs: Callable, ours: Callable) -> Callable:
    """`ours(theirs, *args, **kwargs)` under their name and signature; where it stands already, nothing changes."""
    inner = theirs
    while inner is not None:
        if vars(inner).get("ours") is ours:
            return theirs
        inner = getattr(inner, "__wrapped__", None)

    @functools.wraps(theirs)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    wrapped.ours = ours
    return wrapped
