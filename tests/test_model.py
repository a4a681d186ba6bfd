"""Models built from specs: batches, long audio, contexts, dry runs, swaps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from helpers.golden import golden_spec

import diffa
from diffa import audio
from diffa import model as module
from diffa.errors import AudioError, CheckpointError, SpecError

Golden = tuple[diffa.Model, dict[str, torch.Tensor]]
CACHES = ("none", "prefix", "dual")


def clips(expected: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Three recordings of different lengths."""
    jfk, digits = (expected[f"clip{c}.waveform"].float() / 32768 for c in (0, 1))
    return [jfk[:70_000], digits, jfk[30_000:61_234]]


def prompts() -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(0, 290, (n,), generator=drawn) for n in (23, 9, 15)]


SAMPLERS: list[dict[str, Any]] = [
    {"block_length": 8, "steps": 24},
    {"block_length": 8, "threshold": 0.4},
    {"block_length": 12, "factor": 1.0},
    {"block_length": 8, "entropy_bound": 0.5},
    {"block_length": 6, "ranking": "margin", "steps": 10},
    {"block_length": 8, "ranking": "random", "steps": 12, "temperature": 0.8},
    {"block_length": 8, "steps": 12, "cfg_scale": 1.0, "cfg_drop": "both"},
]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", SAMPLERS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_batch_gives_what_its_rows_give_alone(
    golden1: Golden, cache: str, options: dict[str, Any]
) -> None:
    model, expected = golden1
    model = diffa.swap(model, sampler={"name": "blockwise", "cache": cache, **options})
    places, seeds, waves = [4, 0, 15], [3, 1, 2], clips(expected)
    batch = model.generate(prompts(), waves, audio_at=places, max_tokens=24, seeds=seeds)
    num_forwards = []
    for row, (prompt, wave) in enumerate(zip(prompts(), waves, strict=True)):
        alone = model.generate(prompt, wave, audio_at=places[row], max_tokens=24, seeds=seeds[row])
        assert torch.equal(alone.tokens[0], batch.tokens[row])
        num_forwards.append(alone.num_forwards)
    assert batch.num_forwards == max(num_forwards)


def test_embeddings_of_a_batch_are_those_of_its_rows(golden1: Golden) -> None:
    model, expected = golden1
    waves = clips(expected)
    audio, lengths = diffa.audio.pad(waves)
    noisy = audio.clone()
    for row, length in enumerate(lengths.tolist()):
        noisy[row, length:] = 0.7  # padding that must not be heard
    with torch.no_grad():
        together = model.listen(noisy, lengths)
        for row, wave in enumerate(waves):
            alone = model.listen(wave).values[0]
            count = int(together.lengths[row])
            assert len(alone) == count
            torch.testing.assert_close(together.values[row, :count], alone, atol=1e-4, rtol=0)


def test_a_row_without_audio_may_share_a_batch(golden1: Golden) -> None:
    model, expected = golden1
    wave, words = clips(expected)[1], prompts()
    both = model.generate(words[:2], [None, wave], audio_at=[0, 3], max_tokens=8)
    assert torch.equal(both.tokens[0], model.generate(words[0], max_tokens=8).tokens[0])
    alone = model.generate(words[1], wave, audio_at=3, max_tokens=8)
    assert torch.equal(both.tokens[1], alone.tokens[0])


def test_numpys_waveforms_are_heard_alike(golden1: Golden) -> None:
    model, expected = golden1
    wave = clips(expected)[1]
    as_tensor = model.generate(prompts()[1], wave, audio_at=3, max_tokens=8)
    as_array = model.generate(prompts()[1], wave.double().numpy(), audio_at=3, max_tokens=8)
    assert torch.equal(as_tensor.tokens[0], as_array.tokens[0])
    with torch.no_grad():
        heard = [model.listen(w).values for w in (wave, wave.double().numpy())]
    assert torch.equal(*heard)


def test_audio_beyond_the_window_is_read_in_windows(golden1: Golden) -> None:
    model, expected = golden1
    wave = (expected["clip0.waveform"].float() / 32768).repeat(4)  # 44 s
    with torch.no_grad():
        long, short = model.listen(wave), model.listen(wave[: 30 * 16_000])
    assert int(long.lengths[0]) == 64 + 2200 // 4
    assert int(short.lengths[0]) == 64 + 1500 // 4


def test_too_much_audio_for_the_context_is_refused(golden1: Golden) -> None:
    model, _ = golden1
    wave = torch.zeros(16_000 * 331)
    with pytest.raises(AudioError, match=r"331\.0 s.*reads 4096.*shorter pieces"):
        model.generate(prompts()[0], wave, max_tokens=8)


@pytest.mark.parametrize(
    ("wave", "told"),
    [
        (torch.zeros(0), "empty"),
        (torch.full((800,), torch.nan), "NaN"),
        (torch.zeros(2, 800), "one dimension"),
        (torch.zeros(800, dtype=torch.int16), "int16"),
    ],
)
def test_unusable_waveforms_are_refused(golden1: Golden, wave: torch.Tensor, told: str) -> None:
    model, _ = golden1
    with pytest.raises(AudioError, match=told):
        model.generate(prompts()[0], [wave], max_tokens=4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"audio_at": 99}, "audio_at is 99"),
        ({"audio_at": [1, 2]}, "audio_at has 2 values"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seeds": [1, 2, 3]}, "seeds has 3 values"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    golden1: Golden, arguments: dict[str, Any], told: str
) -> None:
    model, expected = golden1
    with pytest.raises(SpecError, match=told):
        model.generate(prompts()[0], clips(expected)[1], **arguments)


def test_token_ids_outside_the_vocabulary_are_refused(golden1: Golden) -> None:
    model, _ = golden1
    with pytest.raises(SpecError, match="outside the vocabulary of 320"):
        model.generate(torch.tensor([1, 320]))


def test_a_stopped_answer_is_filled_with_eos(golden1: Golden) -> None:
    model, _ = golden1
    free = diffa.swap(model, sampler={"name": "blockwise", "block_length": 8, "stop_at_eos": False})
    tokens = free.generate(prompts()[1], max_tokens=24).tokens[0]
    early = int(tokens[5])
    vocab = model.backbone.vocab
    try:
        model.backbone.vocab = vocab._replace(eos=early)
        stop = diffa.swap(model, sampler={"name": "blockwise", "block_length": 8})
        made = stop.generate(prompts()[1], max_tokens=24)
    finally:
        model.backbone.vocab = vocab
    first = tokens.tolist().index(early)
    assert made.tokens[0][: first + 1].tolist() == tokens[: first + 1].tolist()
    assert (made.tokens[0][first:] == early).all()
    assert made.num_forwards < 24


def test_swap_shares_everything_else(golden1: Golden) -> None:
    model, _ = golden1
    other = diffa.swap(model, sampler={"name": "blockwise", "threshold": 0.9})
    assert other.backbone is model.backbone
    assert other.adapters["semantic"] is model.adapters["semantic"]
    assert model.spec.data["sampler"]["threshold"] is None
    assert other.spec.data["sampler"]["threshold"] == 0.9


def test_swap_names_a_part_that_does_not_exist(golden1: Golden) -> None:
    with pytest.raises(SpecError, match="unknown part 'decoder'"):
        diffa.swap(golden1[0], decoder="greedy")


def test_only_the_parts_in_train_learn(golden1: Golden) -> None:
    model, _ = golden1
    assert all(p.requires_grad for p in model.adapters.parameters())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not any(p.requires_grad for p in model.encoder.parameters())


def test_a_diffusion_sampler_on_a_causal_backbone_is_refused() -> None:
    spec = {
        "encoder": "tiny",
        "adapters": {"semantic": "conv"},
        "backbone": {"name": "llama", "config": TINY_LLAMA},
        "sampler": "blockwise",
    }
    told = "'blockwise' is for masked backbones, but 'llama' is causal"
    with pytest.raises(SpecError, match=told):
        diffa.build(spec)


TINY_LLAMA = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "eos_token_id": 98,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def test_greedy_batches_equal_rows_and_full_passes() -> None:
    spec = {
        "encoder": {"name": "tiny", "width": 32, "heads": 2},
        "adapters": {"semantic": "conv"},
        "backbone": {"name": "llama", "config": TINY_LLAMA},
    }
    model = diffa.build(spec)
    drawn = torch.Generator().manual_seed(1)
    words = [torch.randint(0, 90, (n,), generator=drawn) for n in (7, 12)]
    waves = [torch.randn(n, generator=drawn) * 0.1 for n in (9000, 20_000)]
    batch = model.generate(words, waves, audio_at=[2, 5], max_tokens=10)
    for row in range(2):
        alone = model.generate(words[row], waves[row], audio_at=[2, 5][row], max_tokens=10)
        assert torch.equal(alone.tokens[0], batch.tokens[row])
    plain = model.generate(words[0], max_tokens=6).tokens[0]
    sequence = words[0]
    for token in plain:  # no memory: every pass from the start
        with torch.no_grad():
            logits = model.logits(model.backbone.embed(sequence[None]))[0, -1]
        assert int(logits.argmax()) == int(token)
        sequence = torch.cat([sequence, token[None]])


def test_eight_billion_parameters_are_wired_in_seconds() -> None:
    begin = time.perf_counter()
    model = diffa.build("diffa-1", device="meta")
    seconds = time.perf_counter() - begin
    count = sum(p.numel() for p in model.backbone.parameters())
    assert count == 8_015_581_184
    adapters = {k: sum(p.numel() for p in a.parameters()) for k, a in model.adapters.items()}
    assert adapters == {"acoustic": 22_251_776, "semantic": 14_369_280}
    assert seconds < 10


def test_a_backbone_that_memory_cannot_hold_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffa.assembly._free", lambda device: 1000)
    with pytest.raises(CheckpointError, match=r"needs .* GiB .*bfloat16"):
        diffa.build(golden_spec("diffa1-tiny"))
    with pytest.raises(CheckpointError, match=r"needs .* GiB in torch.bfloat16 .*try another dev"):
        diffa.build(golden_spec("diffa1-tiny"), dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bf16", "tensor"])
def test_a_precision_that_nothing_computes_in_is_refused(dtype: str) -> None:
    with pytest.raises(SpecError, match=r"dtype must be float32, bfloat16, .*got"):
        diffa.build("tiny", dtype=dtype)


def test_a_spec_of_golden_folders_resolves_and_digests() -> None:
    spec = diffa.Spec.read(golden_spec("diffa1-tiny"))
    assert spec.digest() == spec.resolve().digest()


def test_an_hour_is_refused_before_it_is_decoded_or_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffa.build("nano")
    path = tmp_path / "hour.flac"
    soundfile.write(path, torch.zeros(3600 * 8000).numpy(), 8000)
    monkeypatch.setattr(type(model.encoder), "forward", lambda *_: pytest.fail("encoded"))
    with pytest.raises(AudioError, match=r"\(3600\.0 s\).*cut the recording"):
        model.generate(torch.tensor([1]), torch.zeros(3600 * 16_000), max_tokens=8)
    monkeypatch.setattr("diffa.model.prepare", lambda *_: pytest.fail("decoded"))
    with pytest.raises(AudioError, match=r"\(3600\.0 s\).*cut the recording"):
        model.answer(path, "What can you hear?", max_tokens=8)


# --- everyday use -------------------------------------------------------------------------------

DIGITS = Path(diffa.__file__).parent / "assets" / "recordings" / "digits.flac"
TRANSCRIBE = "Please transcribe the audio to text."


@pytest.fixture(scope="module")
def nano() -> diffa.Model:
    return diffa.build("nano")


def test_audio_is_taken_in_every_form_that_people_have(nano: diffa.Model) -> None:
    wave, rate = soundfile.read(DIGITS, dtype="float32")
    slow = torch.from_numpy(wave)
    expected = nano.answer(DIGITS, TRANSCRIBE).text
    with DIGITS.open("rb") as file:
        forms: list[Any] = [
            str(DIGITS), DIGITS.read_bytes(), file, (wave, rate), (slow, rate),
            {"array": wave, "sampling_rate": rate}, {"bytes": DIGITS.read_bytes()},
            {"path": str(DIGITS)},
        ]  # fmt: skip
        for form in forms:
            assert nano.answer(form, TRANSCRIBE).text == expected, form
    assert nano.answer(wave, TRANSCRIBE, sample_rate=rate).text == expected
    double = audio.resample(slow, rate, 2 * rate)
    assert nano.answer((double, 2 * rate), TRANSCRIBE).text == expected
    assert nano.answer(double, TRANSCRIBE, sample_rate=2 * rate).text == expected
    with pytest.raises(AudioError, match="samples per second"):
        nano.answer((wave, "fast"), TRANSCRIBE)


def test_a_waveform_without_a_rate_warns_once(
    nano: diffa.Model, caplog: pytest.LogCaptureFixture
) -> None:
    module._warn_of_rate.cache_clear()
    for _ in range(2):
        nano.answer(torch.zeros(8000), "What can you hear?")
    assert caplog.text.count("give sample_rate=") == 1
    caplog.clear()
    module._warn_of_rate.cache_clear()
    nano.answer(DIGITS, TRANSCRIBE)
    nano.answer(torch.zeros(8000), TRANSCRIBE, sample_rate=16_000)
    assert not caplog.records


def test_one_recording_answers_several_questions(nano: diffa.Model) -> None:
    questions = ["How many digits are spoken?", TRANSCRIBE]
    together = nano.answer(DIGITS, questions)
    apart = [nano.answer(DIGITS, question) for question in questions]
    assert together.text == [one.text for one in apart]
    assert together.confidence == pytest.approx([one.confidence for one in apart], abs=1e-4)


def test_an_answer_prints_as_its_text_and_knows_its_confidence(nano: diffa.Model) -> None:
    answer = nano.answer(DIGITS, TRANSCRIBE)
    assert str(answer) == answer.text and -1.0 < answer.confidence <= 0.0
    noise = nano.answer(
        torch.randn(16_000) * 0.01, "Which digit is the largest?", sample_rate=16_000
    )
    assert noise.confidence < answer.confidence
    pair = nano.answer(DIGITS, [TRANSCRIBE, TRANSCRIBE])
    assert str(pair) == f"{answer.text}\n{answer.text}"


def test_a_model_and_a_spec_are_shown_shortly(nano: diffa.Model) -> None:
    lines = repr(nano).splitlines()
    assert len(lines) == 7 and lines[0].startswith("Model (cpu, spec ")
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["encoder", "whisper"],
        ["backbone", "llada"],
    ]
    assert "0.00 M trained" in lines[2]
    shown = repr(nano.spec)
    assert "block_length=24" in shown and "temperature" not in shown
    changed = repr(nano.spec.set("sampler.temperature", 0.5))
    assert "temperature=0.5" in changed


def test_dir_is_the_public_api() -> None:
    assert {"build", "load", "save", "swap", "Model", "Spec", "errors"} < set(dir(diffa))
    assert not [name for name in dir(diffa) if name.startswith("_") and name != "__version__"]
    assert "importlib" not in dir(diffa)
