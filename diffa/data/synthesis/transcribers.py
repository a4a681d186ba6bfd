"""Models that transcribe recordings of corpora without transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffa.data.samples import DataError
from diffa.data.synthesis.models import model_name
from diffa.spec.validation import TRANSCRIBE

if TYPE_CHECKING:
    from diffa.model import Model

_RATE = 16_000


class Transcriber(Protocol):
    """Writes down what is said in recordings; ``name`` says in the data who did."""

    name: str

    def transcribe(self, paths: Sequence[Path]) -> list[str]:
        """Return a transcript for every file, "" where nothing is said; raises AudioError."""
        ...


class DiffusionTranscriber:
    """A model of diffa that is asked for transcripts.

    Args:
        model: A model of ``diffa.build`` or ``diffa.load``, trained to transcribe.
        max_tokens: Length of a transcript, in tokens. Default: the spec's ``prompt.max_tokens``.
    """

    def __init__(self, model: Model, *, max_tokens: int | None = None) -> None:
        self.model, self.max_tokens = model, max_tokens
        self.name = model_name(model)

    def transcribe(self, paths: Sequence[Path]) -> list[str]:
        """Return the model's answers to "Please transcribe the audio to text."."""
        questions = [TRANSCRIBE] * len(paths)
        answer = self.model.answer(list(paths), questions, max_tokens=self.max_tokens)
        return [text.strip() for text in answer.text]


class SpeechRecognizer:
    """A speech recogniser of transformers, such as Whisper or wav2vec 2.0.

    Args:
        checkpoint: A folder, or an id on the Hub.
        device: Device that runs it, such as cpu or cuda.

    Raises:
        DataError: The checkpoint is no speech recogniser.
    """

    def __init__(self, checkpoint: str, *, device: str = "cpu") -> None:
        from transformers import pipeline

        try:
            self._pipeline = pipeline(
                "automatic-speech-recognition",
                model=checkpoint,
                device=device,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{checkpoint} is no speech recogniser that loads: {error}") from error
        self.name = checkpoint

    def transcribe(self, paths: Sequence[Path]) -> list[str]:
        """Return the recogniser's transcripts."""
        from diffa.audio import prepare

        waves = [{"raw": prepare(p, _RATE).numpy(), "sampling_rate": _RATE} for p in paths]
        return [output["text"].strip() for output in self._pipeline(waves)]
