"""A server of the tiny model in a thread, and recordings for it."""

import base64
import contextlib
import io
import threading
import time

import numpy as np
import soundfile

from diffa.serving.limits import Limits
from diffa.serving.run import create_server
from diffa.serving.service import Service


@contextlib.contextmanager
def serving(model, *, limits=None, **options):
    """Yield the service and its address; stop it afterwards."""
    service = Service(model, "tiny", limits=limits or Limits(), **options)
    server = create_server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield service, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"


def recording(seconds=0.4, form="WAV", seed=0, rate=16000):
    """Bytes of a noise."""
    noise = np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype("float32")
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format=form)
    return file.getvalue()


def text64(data):
    """Base64 text."""
    return base64.b64encode(data).decode()


def question(data=None, words="What is heard?", form="wav", system=None):
    """Messages of one question."""
    parts = [{"type": "text", "text": words}]
    if data is not None:
        parts.insert(
            0, {"type": "input_audio", "input_audio": {"data": text64(data), "format": form}}
        )
    user = {"role": "user", "content": parts}
    return [user] if system is None else [{"role": "system", "content": system}, user]
