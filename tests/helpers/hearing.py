"""Waves of noise, and encoders that hear several of them at once."""

import torch


def noise(samples, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


@torch.no_grad()
def hear(encoder, *waves, garbage=0.0):
    """Features of a batch in which ``garbage`` stands behind each shorter wave."""
    lengths = torch.tensor([len(wave) for wave in waves])
    audio = torch.full((len(waves), int(lengths.max())), garbage)
    for row, wave in enumerate(waves):
        audio[row, : len(wave)] = wave
    return encoder(audio, lengths)
