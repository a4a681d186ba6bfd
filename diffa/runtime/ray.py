"""Connect to a Ray cluster."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from diffa.errors import SpecError


def connect(address: str, command: str, **options: Any) -> Any:
    """Connect to a Ray cluster unless this process is connected, and return the module ``ray``.

    Ray's usage report is off unless the environment asks for it.

    Args:
        address: Address of the cluster; ``local`` starts one.
        command: Command that needs it, for errors.
        options: Further options of ``ray.init``.

    Raises:
        SpecError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise SpecError(f"{command} --ray needs Ray: pip install 'diffa-audio[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, **options)
        except Exception as error:  # of any type, if a node takes too long to start
            raise SpecError(f"--ray {address}: {error}") from error
    return ray
