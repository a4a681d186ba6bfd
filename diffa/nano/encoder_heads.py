"""Pre-training of a Whisper-shaped encoder on composed speech: targets, heads, loss, start."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffa.nano.corpus.scenes import LEVELS, SPEEDS, Labels
from diffa.nano.corpus.sounds import DIRECTIONS, NOTES, SOUNDS

FRAME_RATE = 50  # encoder frames per second
ACCENTS = ("american", "british", "scottish", "caribbean", "french", "german", "greek")
GENDERS = ("man", "woman")
HEARD = (*(name for name in SOUNDS if name != "silence"), "melody")
IGNORE = -100


class Heard(NamedTuple):
    """Targets: classes per frame (B, T) and per clip (B,), IGNORE where nothing is asked."""

    frames: dict[str, Tensor]
    clips: dict[str, Tensor]
    words: list[tuple[int, ...]]  # the digits in order, for CTC


# Classes of every head. Frames: 0 is "none"; a digit has two classes, its first and second half.
FRAME_CLASSES = {"digits": 21, "gender": 3, "accent": 8, "sound": len(HEARD) + 1}
CLIP_CLASSES = {
    "speed": 3,
    "loudness": 3,
    "melody": len(DIRECTIONS),
    "notes": len(NOTES),
    "voices": 3,
}


def targets(labels: list[Labels], frames: int, speakers: list[str]) -> Heard:
    """Targets for a batch of clips under a window of `frames`."""
    rows = [_frame_classes(one, frames, speakers) for one in labels]
    clips = [_clip_classes(one) for one in labels]
    return Heard(
        {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        {name: torch.tensor([clip[name] for clip in clips]) for name in CLIP_CLASSES},
        [one.digits for one in labels],
    )


def _frame_classes(labels: Labels, frames: int, speakers: list[str]) -> dict[str, Tensor]:
    rows = {name: torch.zeros(frames, dtype=torch.long) for name in (*FRAME_CLASSES, "speaker")}
    for i, (start, stop) in enumerate(labels.spans):
        first, last = round(start * FRAME_RATE), round(stop * FRAME_RATE)
        middle, accent = (first + last) // 2, labels.accents[i]
        rows["digits"][first:middle] = 2 * labels.digits[i] + 1
        rows["digits"][middle:last] = 2 * labels.digits[i] + 2
        rows["gender"][first:last] = GENDERS.index(labels.genders[i]) + 1
        rows["accent"][first:last] = ACCENTS.index(accent) + 1 if accent else IGNORE
        rows["speaker"][first:last] = (
            speakers.index(labels.speakers[i]) + 1 if labels.speakers[i] in speakers else IGNORE
        )
    if labels.sound in HEARD:
        rows["sound"][: round(labels.duration * FRAME_RATE)] = HEARD.index(labels.sound) + 1
    return rows


def _clip_classes(labels: Labels) -> dict[str, int]:
    melody = labels.melody
    return {
        "speed": list(SPEEDS).index(labels.speed) if labels.speed else IGNORE,
        "loudness": list(LEVELS).index(labels.loudness) if labels.loudness else IGNORE,
        "melody": DIRECTIONS.index(melody.direction) if melody else IGNORE,
        "notes": NOTES.index(melody.notes) if melody else IGNORE,
        "voices": labels.voices,
    }


class ListeningHeads(nn.Module):
    """Linear probes learnt with the encoder and then dropped.

    Words are read from the last state, everything else from the one before: as in Whisper, the
    middle of the encoder keeps what the acoustic adapter is to find.
    """

    def __init__(self, width: int, speakers: int) -> None:
        super().__init__()
        classes = {**FRAME_CLASSES, "speaker": speakers + 1}
        self.norm = nn.LayerNorm(width)
        self.frames = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in classes.items()}
        )
        self.clips = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in CLIP_CLASSES.items()}
        )
        self.ctc = nn.Linear(width, 11)  # 0 is the blank

    def forward(self, states: tuple[Tensor, ...], lengths: Tensor) -> dict[str, Tensor]:
        """Logits of every head; states (B, T, W), lengths (B,) in frames."""
        last, middle = states[-1], self.norm(states[-2])
        valid = torch.arange(last.shape[1])[None] < lengths[:, None]
        pooled = (middle * valid[..., None]).sum(1) / lengths[:, None]
        logits = {
            name: head(last if name == "digits" else middle) for name, head in self.frames.items()
        }
        logits |= {name: head(pooled) for name, head in self.clips.items()}
        return logits | {"ctc": self.ctc(last)}


def listening_loss(
    logits: dict[str, Tensor], heard: Heard, lengths: Tensor, ctc: float = 0.2
) -> dict[str, Tensor]:
    """Cross-entropy of every head, weighted, and CTC on the digits: parts to be added up."""
    losses = {}
    for name, wanted in heard.frames.items():
        beyond = (
            torch.arange(wanted.shape[1])[None] >= (lengths + 10)[:, None]
        )  # a little padding is taught
        wanted = wanted.masked_fill(beyond, IGNORE)
        weight = 1.0 if name == "digits" else 0.2
        losses[name] = weight * F.cross_entropy(logits[name].flatten(0, 1), wanted.flatten())
    for name, wanted in heard.clips.items():
        if (wanted != IGNORE).any():
            losses[name] = 0.1 * F.cross_entropy(logits[name], wanted)
    if ctc:
        losses["ctc"] = ctc * _ctc(logits["ctc"], heard.words, lengths)
    return losses


def _ctc(logits: Tensor, words: list[tuple[int, ...]], lengths: Tensor) -> Tensor:
    """CTC per word of the batch."""
    counts = torch.tensor([len(row) for row in words])
    flat = torch.tensor([digit + 1 for row in words for digit in row])
    frames = logits.log_softmax(-1).transpose(0, 1)
    total = F.ctc_loss(
        frames,
        flat,
        lengths.clamp(max=logits.shape[1]),
        counts,
        reduction="sum",
        zero_infinity=True,
    )
    return total / max(int(counts.sum()), 1)


@torch.no_grad()
def start_local(encoder: Any, sharpness: float = 2.0) -> None:
    """Start a WhisperEncoder so that every head but the last looks at a fixed small offset in time.

    With sinusoidal positions p, q = R(offset) p and k = p give sum_f cos((i + offset - j) w_f),
    a bump at j = i + offset. Small encoders otherwise spend long on finding where to look.
    """
    width, heads = encoder.config.d_model, encoder.config.encoder_attention_heads
    size, half = width // heads, width // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    for conv in (encoder.conv1, encoder.conv2):
        nn.init.normal_(conv.weight, std=1.5 / math.sqrt(conv.in_channels * 3))
    for depth, layer in enumerate(encoder.layers):
        _start_weights(layer, 1 / math.sqrt(2 * len(encoder.layers)))
        steps = torch.linspace(-1, 1, heads - 1) * (3 + 2 * depth)
        for head, step in enumerate(steps.tolist()):
            turn = rates[:size:2] * step  # every other of the fastest rates
            _look(layer.self_attn.q_proj.weight, head * size, half, turn, sharpness**0.5)
            _look(layer.self_attn.k_proj.weight, head * size, half, 0 * turn, sharpness**0.5)


def _start_weights(layer: Any, shrink: float) -> None:
    """Independent weights of unit gain; what writes to the residual stream starts smaller."""
    attention = layer.self_attn
    for linear, scale in (
        (layer.fc1, 1.0),
        (layer.fc2, shrink),
        (attention.v_proj, 1.0),
        (attention.out_proj, shrink),
        (attention.q_proj, 0.3),
        (attention.k_proj, 0.3),
    ):
        nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))


def _look(weight: Tensor, row: int, half: int, turn: Tensor, scale: float) -> None:
    """Add to a head's projection the rotation of positions by `turn` (one angle per rate)."""
    sines, picked = row + torch.arange(len(turn)), torch.arange(len(turn)) * 2
    cosines = sines + len(turn)
    weight[sines, picked] += scale * turn.cos()
    weight[sines, picked + half] += scale * turn.sin()
    weight[cosines, picked] -= scale * turn.sin()
    weight[cosines, picked + half] += scale * turn.cos()
