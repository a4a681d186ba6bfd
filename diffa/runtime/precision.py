"""Parts of a mixed-precision step that keep no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_grad() -> Iterator[None]:
    """Compute without gradients, also inside autocast.

    Autocast keeps the low-precision copy of each weight until the step ends. A copy made under
    ``torch.no_grad`` has no gradient, and the rest of the step would use it: nothing is learned
    from that weight. Inside this block no copy is kept and none is reused.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
