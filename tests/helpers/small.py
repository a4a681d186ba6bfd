"""A small random LLaDA with an opinion, and canvases of rows of different lengths for it."""

import torch

from diffa.backbones.llada import LLaDA
from diffa.canvas.canvas import Canvas, insert_audio
from diffa.canvas.denoiser import Denoiser
from diffa.types import block_attention

VOCAB, EOS, MASK = 40, 38, 39
CONFIG = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 64,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "max_sequence_length": 256,
    "rope_theta": 10000.0,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def backbone(**options):
    """Weights of unit scale, so that attention and the head tell slots apart."""
    model = LLaDA(config=CONFIG, **options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            scale = 1.0 if "wte" in name else weight.shape[1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    model.transformer.ff_out.weight.mul_(2.5)
    return model


def questions(count=3):
    """Prompts with audio embeddings of different lengths, the second without audio."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for row, (tokens, audio) in enumerate([(5, 9), (3, 0), (8, 4)][:count]):
        prompt = torch.randint(0, 30, (tokens,), generator=generator)
        heard = torch.randn(audio, 32, generator=generator) if audio else None
        made.append((prompt, heard, min(2, tokens), row + 21))
    return made


def canvas(model, asked, length=12, draft=None):
    """Lay out questions, and the call that drives the model over them, on its device."""
    device = next(model.parameters()).device
    prompts, heard, places, seeds = map(list, zip(*asked, strict=True))
    prompts = [tokens.to(device) for tokens in prompts]
    heard = [None if embeds is None else embeds.to(device) for embeds in heard]
    embeds, text = insert_audio(prompts, heard, places, model.embed)
    answer = torch.full((len(asked), length), MASK) if draft is None else draft.clone()
    made = Canvas(
        embeds, text, answer.to(device), embed=model.embed, vocab=model.vocab,
        seeds=torch.tensor(seeds, device=device), attention=block_attention(model),
    )  # fmt: skip
    return made, Denoiser(model, made)


def decode(model, sampler, asked, length=12, draft=None):
    """Tokens (B, A) and forwards."""
    board, denoise = canvas(model, asked, length, draft)
    with torch.no_grad():
        for _ in sampler(board, denoise):
            pass
    return board.answer[:, : board.requested], denoise.num_forwards
