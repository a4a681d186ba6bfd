"""Start the page; nothing is asked of other hosts."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from diffa.errors import DiffaError, PluginError

if TYPE_CHECKING:
    from diffa.model import Model

UPLOAD = "64mb"
_READABLE: dict[str, Any] = {  # Gradio's own greys are too pale to read
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_500",
    "block_label_text_color": "*neutral_700",
}


def require() -> None:
    """Import Gradio, without its reports home; PluginError names what to install."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise PluginError("the page needs Gradio: pip install 'diffa-audio[ui]'") from error


def check_address(host: str, port: int) -> None:
    """Raise DiffaError unless the page can listen there: before a model is loaded in vain."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise DiffaError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; end what does, or choose "
            "another --port"
        ) from error


def launch(
    model: Model,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    browser: bool = False,
    block: bool = True,
) -> str:
    """Serve the page of a model and return its address.

    Args:
        model: with a tokenizer.
        name: that the model goes by.
        host: 127.0.0.1 for this machine alone, 0.0.0.0 for every network it is in.
        port: a free one from 7860 on where None.
        browser: open the page in a browser.
        block: stay until interrupted.

    Raises:
        PluginError: Gradio is not installed.
        DiffaError: the port cannot be listened on.
    """
    require()
    if port is not None:
        check_address(host, port)
    import gradio as gr

    from diffa.nano.demo import recordings
    from diffa.ui.page import page
    from diffa.ui.style import CSS

    _ = model.chat_format  # a model without a tokenizer says so now
    theme = gr.themes.Base(
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(**_READABLE)
    blocks = page(model, name)
    try:
        _, address, _ = blocks.queue(default_concurrency_limit=1, max_size=32).launch(
            server_name=host, server_port=port, inbrowser=browser, quiet=True, share=False,
            prevent_thread_lock=True, allowed_paths=[str(recordings())], max_file_size=UPLOAD,
            css=CSS, theme=theme, footer_links=[], run_history=False,
            enable_monitoring=False, ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        place = host if port is None else f"{host}:{port}"
        raise DiffaError(f"cannot listen on {place}: {error}") from error
    if block:
        print(f"{name} answers on {address} (Ctrl+C ends it)", flush=True)
        blocks.block_thread()
    return str(address)
