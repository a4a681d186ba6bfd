"""Pre-training of a Whisper-shaped encoder on composed speech: targets, heads, loss, start."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

from diffa.nano.corpus.scenes import LEVELS, SPEEDS, Labels
from diffa.nano.corpus.sounds import DIRECTIONS, NOTES, SOUNDS

FRAME_RATE = 50  # encoder frames per second
ACCENTS = ("american", "british", "scottish", "caribbean", "french", "german", "greek")
GENDERS = ("man", "woman")
SOUND_CLASSES = (*(name for name in SOUNDS if name != "silence"), "melody")
IGNORE = -100
_LABELED_PADDING = 10  # frames behind a clip that are trained as "none"

# Classes of every head. Frames: 0 is "none"; a digit has two classes, its first and second half.
FRAME_CLASSES = {"digits": 21, "gender": 3, "accent": 8, "sound": len(SOUND_CLASSES) + 1}
CLIP_CLASSES = {
    "speed": 3,
    "loudness": 3,
    "melody": len(DIRECTIONS),
    "notes": len(NOTES),
    "voices": 3,
}


class Targets(NamedTuple):
    """Labels of a batch.

    Attributes:
        frames: Class of each frame by head, (B, T); IGNORE where there is none.
        clips: Class of each clip by head, (B,); IGNORE where there is none.
        words: Digits of each clip in order, for CTC.
    """

    frames: dict[str, Tensor]
    clips: dict[str, Tensor]
    words: list[tuple[int, ...]]


def targets(labels: list[Labels], frames: int, speakers: list[str]) -> Targets:
    """Return the targets of clips in a window of ``frames`` frames."""
    rows = [_frame_classes(one, frames, speakers) for one in labels]
    clips = [_clip_classes(one) for one in labels]
    return Targets(
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
    if labels.sound in SOUND_CLASSES:
        rows["sound"][: round(labels.duration * FRAME_RATE)] = SOUND_CLASSES.index(labels.sound) + 1
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


class EncoderHeads(nn.Module):
    """Linear heads that are trained with the encoder and then dropped.

    Words are read from the last state, all else from the one before: as in Whisper, the middle
    of the encoder keeps the acoustic properties, which the acoustic adapter needs.

    Args:
        width: Width of the encoder's states.
        speakers: Number of speakers.
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
        """Return the logits of every head for states (B, T, W) of ``lengths`` (B,) frames."""
        last, middle = states[-1], self.norm(states[-2])
        valid = torch.arange(last.shape[1], device=last.device)[None] < lengths[:, None]
        pooled = (middle * valid[..., None]).sum(1) / lengths[:, None]
        logits = {
            name: head(last if name == "digits" else middle) for name, head in self.frames.items()
        }
        logits |= {name: head(pooled) for name, head in self.clips.items()}
        return logits | {"ctc": self.ctc(last)}


def encoder_loss(
    logits: dict[str, Tensor], labels: Targets, lengths: Tensor, ctc_weight: float = 0.2
) -> dict[str, Tensor]:
    """Return the weighted cross-entropy of every head, and CTC on the digits.

    Args:
        logits: Logits of every head.
        labels: Targets of the batch.
        lengths: Frames of each clip, (B,).
        ctc_weight: Weight of CTC.
    """
    losses = {}
    for name, target in labels.frames.items():
        frames = torch.arange(target.shape[1], device=target.device)
        padding = frames[None] >= (lengths + _LABELED_PADDING)[:, None]
        target = target.masked_fill(padding, IGNORE)
        weight = 1.0 if name == "digits" else 0.2
        losses[name] = weight * F.cross_entropy(logits[name].flatten(0, 1), target.flatten())
    for name, target in labels.clips.items():
        if (target != IGNORE).any():
            losses[name] = 0.1 * F.cross_entropy(logits[name], target)
    if ctc_weight:
        losses["ctc"] = ctc_weight * _ctc(logits["ctc"], labels.words, lengths)
    return losses


def _ctc(logits: Tensor, words: list[tuple[int, ...]], lengths: Tensor) -> Tensor:
    """Return CTC per word of the batch."""
    device = logits.device
    counts = torch.tensor([len(row) for row in words], device=device)
    flat = torch.tensor([digit + 1 for row in words for digit in row], device=device)
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
def init_local(encoder: WhisperEncoder, sharpness: float = 2.0) -> None:
    """Initialise an encoder so that every head but the last attends at a small offset in time.

    With sinusoidal positions p, q = R(offset) p and k = p give sum_f cos((i + offset - j) w_f),
    which peaks at j = i + offset. Small encoders otherwise train long until they attend locally.

    Args:
        encoder: transformers' ``WhisperEncoder``.
        sharpness: Scale of the attention scores.
    """
    width, heads = encoder.config.d_model, encoder.config.encoder_attention_heads
    size, half = width // heads, width // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    for conv in (encoder.conv1, encoder.conv2):
        nn.init.normal_(conv.weight, std=1.5 / math.sqrt(conv.in_channels * 3))
    for depth, layer in enumerate(encoder.layers):
        _init_weights(layer, 1 / math.sqrt(2 * len(encoder.layers)))
        offsets = torch.linspace(-1, 1, heads - 1) * (3 + 2 * depth)
        for head, offset in enumerate(offsets.tolist()):
            angles = frequencies[:size:2] * offset  # every other of the highest frequencies
            attention = layer.self_attn
            _add_rotation(attention.q_proj.weight, head * size, half, angles, sharpness**0.5)
            _add_rotation(attention.k_proj.weight, head * size, half, 0 * angles, sharpness**0.5)


def _init_weights(layer: WhisperEncoderLayer, residual_scale: float) -> None:
    """Draw weights of unit gain; what writes to the residual stream is scaled down."""
    attention = layer.self_attn
    for linear, scale in (
        (layer.fc1, 1.0),
        (layer.fc2, residual_scale),
        (attention.v_proj, 1.0),
        (attention.out_proj, residual_scale),
        (attention.q_proj, 0.3),
        (attention.k_proj, 0.3),
    ):
        nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))


def _add_rotation(weight: Tensor, row: int, half: int, angles: Tensor, scale: float) -> None:
    """Add to a head's projection the rotation of positions by ``angles``, one per frequency."""
    sines, inputs = row + torch.arange(len(angles)), torch.arange(len(angles)) * 2
    cosines = sines + len(angles)
    weight[sines, inputs] += scale * angles.cos()
    weight[sines, inputs + half] += scale * angles.sin()
    weight[cosines, inputs] -= scale * angles.sin()
    weight[cosines, inputs + half] += scale * angles.cos()
