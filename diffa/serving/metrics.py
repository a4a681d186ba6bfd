"""Prometheus metrics of a server (``GET /metrics``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from diffa.serving.engine import EngineLoad

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Metrics of one server, in a registry of their own: a process may run several servers.

    Args:
        load: returns how busy the engine is.
    """

    def __init__(self, load: Callable[[], EngineLoad]) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        timed = {**own, "buckets": _SECONDS}
        self.http_requests = Counter(
            "diffa_http_requests", "HTTP requests by path and status.", ["path", "status"], **own
        )
        self.http_seconds = Histogram(
            "diffa_http_request_duration_seconds", "Seconds from a request to the end of its "
            "response.", ["path"], **timed,
        )  # fmt: skip
        self.time_to_first_text = Histogram(
            "diffa_time_to_first_text_seconds",
            "Seconds from the queue to the first final text of a stream.",
            **timed,
        )
        self.tokens = Counter("diffa_generation_tokens", "Tokens of finished answers.", **own)
        self.audio_seconds = Counter("diffa_audio_seconds", "Seconds of decoded recordings.", **own)
        self.finished = Counter(
            "diffa_requests_finished", "Requests by how they ended.", ["reason"], **own
        )
        self.batch_size = Histogram(
            "diffa_forward_batch_size", "Rows per forward pass.", buckets=_ROWS, **own
        )
        waiting = Gauge("diffa_num_requests_waiting", "Requests in the queue.", **own)
        waiting.set_function(lambda: float(load().num_waiting))
        running = Gauge("diffa_num_requests_running", "Requests being decoded.", **own)
        running.set_function(lambda: float(load().num_running))

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text
