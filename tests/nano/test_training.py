"""Training of small language models: packed questions, initialisation, auxiliary losses."""

import pytest
import torch

import diffa
from diffa.adapters.conv import Conv
from diffa.adapters.numbering import Numbering
from diffa.backbones.transformer import rotary_embedding, rotate
from diffa.canvas.batch import forward_rows
from diffa.canvas.kv_cache import AttentionContext
from diffa.data.collate import Collate
from diffa.data.rows import AnswerTransform
from diffa.data.samples import Sample
from diffa.errors import SpecError
from diffa.nano.alignment import AlignmentLoss
from diffa.nano.answer_learner import NanoAnswerLearner
from diffa.nano.auxiliary import (
    CTCLoss,
    TranscriptEmbedder,
    init_numbering,
    token_ids,
    word_numbers,
)
from diffa.nano.corpus.labels import TokenLabel, label_tokens, transcript_words
from diffa.nano.corpus.vocabulary import BLANK
from diffa.nano.initialization import _offset_vectors, init_for_copying
from diffa.nano.sources import NanoText
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.packing import Packing
from diffa.trainers.trainable import set_trainable
from diffa.types import Embeds, Features, FeatureSpec

CONFIG = {
    "d_model": 64, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 96,
    "embedding_size": 600, "vocab_size": 600, "max_sequence_length": 1024, "mask_token_id": 3,
    "eos_token_id": 0, "pad_token_id": 0, "rope_theta": 1000.0, "weight_tying": False,
}  # fmt: skip


def small(**config: int) -> diffa.Model:
    backbone = {"name": "llada", "config": CONFIG | config, "tokenizer": "package:nano/llada"}
    return diffa.build(diffa.Spec.read("tiny").set("backbone", backbone))


def causal() -> diffa.Model:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 96, "vocab_size": 600, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    backbone = {"name": "llama", "config": config, "tokenizer": "package:nano/llada"}
    kept = {key: diffa.Spec.read("tiny").data[key] for key in ("encoder", "adapters", "prompt")}
    return diffa.build({**kept, "backbone": backbone})


def nano_learner(model: diffa.Model, **options: object) -> NanoAnswerLearner:
    return NanoAnswerLearner(model, StageConfig(), **options)


def with_numbering(numbering: Numbering) -> torch.nn.Module:
    adapter = torch.nn.Module()
    adapter.numbering = numbering
    return adapter


def batch_of(model: diffa.Model, samples: list[Sample]):
    make = AnswerTransform(model.chat_format, model.backbone.vocab, None, answer_lengths=[8, 24])
    collate = Collate(model.backbone.vocab, learn_padding=False)
    return collate([make(sample, seed) for seed, sample in enumerate(samples)])


def test_a_lone_question_in_a_pack_is_read_as_ever_except_by_the_recording() -> None:
    model = small()
    samples = [NanoText(questions_per_sample=3)[0], NanoText(questions_per_sample=1)[1]]
    batch = batch_of(model, samples)
    assert batch.audio_index.tolist() == [0, 0, 0, 1]
    table = model.backbone.embed
    heard = [
        table(batch.audio_text[i, : batch.audio_text_lengths[i]])
        for i in batch.audio_index.tolist()
    ]
    packing = Packing(batch.audio_index)
    with torch.no_grad():
        packed = packing(model.backbone, batch.tokens, batch.row_lengths, heard, batch.audio_at)
        alone = [
            Packing(torch.zeros(1, dtype=torch.long))(
                model.backbone, batch.tokens[i : i + 1], batch.row_lengths[i : i + 1],
                [heard[i]], batch.audio_at[i : i + 1],
            )
            for i in range(4)
        ]  # fmt: skip
    for i, size in enumerate(batch.row_lengths.tolist()):
        torch.testing.assert_close(packed[i, :size], alone[i][0, :size], atol=1e-5, rtol=1e-4)
        # by hand: the prompt's beginning and the recording, then what sees them and itself
        words, at = table(batch.tokens[i, :size]), int(batch.audio_at[i])
        values = torch.cat([words[:at], heard[i], words[at:]])[None]
        slots, shared = torch.arange(values.shape[1])[None], at + len(heard[i])
        with torch.no_grad():
            hidden = model.backbone(
                values, slots, AttentionContext(branch=(slots >= shared).long())
            )[0]
        expected = torch.cat([hidden[:at], hidden[shared:]])
        torch.testing.assert_close(packed[i, :size], expected, atol=1e-5, rtol=1e-4)
    whole = forward_rows(model.backbone, batch.tokens, batch.row_lengths, heard, batch.audio_at)
    assert whole.shape == packed.shape
    assert not torch.allclose(whole[0], packed[0])  # there the recording sees the question
    with torch.no_grad():  # each alone: as whole rows are read
        lone = Packing(None)(model.backbone, batch.tokens, batch.row_lengths, heard, batch.audio_at)
    for i, size in enumerate(batch.row_lengths.tolist()):
        torch.testing.assert_close(lone[i, :size], whole[i, :size], atol=1e-5, rtol=1e-4)


def test_questions_that_differ_before_the_audio_are_not_packed() -> None:
    model = small()
    other = diffa.build(model.spec.set("prompt.user", "{question} <audio>"))
    batch = batch_of(other, [NanoText(questions_per_sample=3)[0]])
    with pytest.raises(SpecError, match="put <audio> before"):
        Packing(batch.audio_index)(
            other.backbone, batch.tokens, batch.row_lengths, None, batch.audio_at
        )


def test_several_questions_share_one_pass_of_the_adapters() -> None:
    model = small()
    batch = batch_of(model, [NanoText(questions_per_sample=3)[0]])
    learner = nano_learner(model)
    calls = []
    learner.transcripts.register_forward_hook(lambda *_: calls.append(1))
    loss = learner(batch)
    assert len(calls) == 1 and len(batch.tokens) == 3
    assert torch.isfinite(loss.sum)
    # in whole rows the recording attends to the question: other states
    packed = nano_learner(model, question_packing=1.0)(batch)
    assert abs(float(packed.sum.detach() - loss.sum.detach())) > 1e-5


def test_a_share_of_the_batches_is_packed_and_the_same_ones_again() -> None:
    model = small()
    source = NanoText(questions_per_sample=2)
    make = AnswerTransform(model.chat_format, model.backbone.vocab, None, answer_lengths=[8])
    collate = Collate(model.backbone.vocab, learn_padding=False)
    batches = [collate([make(source[0], seed)]) for seed in range(60)]
    learner = nano_learner(model, question_packing=0.3)

    def packed() -> list[bool]:
        return [learner.packing(batch) is not None for batch in batches]

    assert 8 <= sum(packed()) <= 28  # .3 of 60 is 18, give or take 2.8 standard deviations
    assert packed() == packed()
    learner.alignment = AlignmentLoss(model.backbone, layer=3, weight=0.3)
    owners = [learner.packing(batch).owner is not None for batch in batches]
    learner.alignment = None
    assert owners == packed()  # labels need slots: the other batches are packed alone
    learner.eval()
    assert not any(packed())  # evaluation measures whole rows, as answers are generated


@pytest.mark.parametrize("offset", [1, -1, 2, -2])
def test_offset_heads_attend_at_their_offset(offset: int) -> None:
    frequencies = 500_000.0 ** (-torch.arange(0, 32, 2) / 32)
    offsets = torch.arange(-40, 41).float()
    query, key = _offset_vectors(offset, frequencies)
    angles = offsets[:, None] * frequencies
    even, odd = query[:16] * key[:16], query[:16] * key[16:]
    scores = (even * angles.cos() + odd * angles.sin()).sum(1) / 32**0.5
    best = scores.argsort(descending=True)
    assert int(offsets[best[0]]) == offset
    assert scores[best[0]] - scores[best[1]] > 2  # the head looks there and hardly anywhere else


def test_a_backbone_initialised_for_copying_predicts_what_it_attends_to() -> None:
    model = small()
    inner = model.backbone.transformer
    init_for_copying(inner, seed=0)
    block = inner.blocks[0]
    product = block.attn_out.weight @ block.v_proj.weight
    torch.testing.assert_close(product, 0.5 * torch.eye(64), atol=1e-5, rtol=0)
    assert torch.equal(inner.ff_out.weight, 0.15 * inner.wte.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_init_for_copying_draws_the_same_weights_on_every_device() -> None:
    here, there = (small().backbone.transformer.to(place) for place in ("cpu", "cuda"))
    for inner in (here, there):
        init_for_copying(inner, seed=0)
    pairs = zip(here.parameters(), there.parameters(), strict=True)
    assert all(torch.equal(one, other.cpu()) for one, other in pairs)


def test_init_for_copying_needs_a_key_head_for_every_query_head() -> None:
    made = {"name": "llada", "config": CONFIG | {"n_kv_heads": 1}}
    inner = diffa.build(diffa.Spec.read("tiny").set("backbone", made)).backbone.transformer
    with pytest.raises(TrainingError, match="a key head per query head, got 1 for 2"):
        init_for_copying(inner, seed=0)


def test_alignment_labels_number_the_copied_words() -> None:
    head = ["<|start_header_id|>", "assistant", "<|end_header_id|>", ""]
    said = transcript_words(["british", "man", BLANK, "four", "four", BLANK, "nine"], 2)
    assert said == ["four", "nine"]
    assert transcript_words(["four", "four", BLANK], 1) == [
        "four"
    ]  # what is before it is not spoken
    told = label_tokens(["Write", *head, "four", "nine", "<|eot_id|>"], said)
    assert told == [
        TokenLabel(5, "number", "first"), TokenLabel(6, "number", "second"),
        TokenLabel(7, "number", BLANK),
    ]  # fmt: skip
    second = label_tokens(["the", "second", "?", *head, "nine", "<|eot_id|>"], said)
    assert second == [TokenLabel(7, "number", "second")]
    # two words are said: "nine" is no copy
    assert not label_tokens(["How", "many", "?", *head, "nine", "<|eot_id|>"], said)
    caption = ["a", "man", "says", "four", "nine", "over", "nine", "."]
    words = [label.word for label in label_tokens([*head, *caption], said)]
    assert words == [BLANK, BLANK, BLANK, "first", "second", BLANK, BLANK, BLANK]


def test_alignment_labels_link_choices_and_letters() -> None:
    head = ["<|start_header_id|>", "assistant", "<|end_header_id|>", ""]
    asked = ["Which", "?", "A", ".", "four", "B", ".", "twenty", "nine", "<|eot_id|>", *head]
    found = label_tokens([*asked, "B", ".", "twenty", "nine", "<|eot_id|>"], ["four"])
    assert found == [
        TokenLabel(4, "letter", "A"), TokenLabel(7, "letter", "B"), TokenLabel(8, "letter", "B"),
        TokenLabel(14, "word", "twenty", source=7),
    ]  # fmt: skip


def attention(
    block: torch.nn.Module, states: torch.Tensor, config: object, head: int
) -> torch.Tensor:
    """What a head of a layer would see of states (S, W) everywhere, before the softmax, (S, S)."""
    turn = rotary_embedding(torch.arange(len(states))[None], config)
    normal = block.attn_norm(states[None])
    query, key = (
        rotate(proj(normal).unflatten(-1, block.split), turn)[0, :, head]
        for proj in (block.q_proj, block.k_proj)
    )
    return query @ key.T / config.head_dim**0.5


def test_first_heads_attend_to_neighbours_after_init_for_copying() -> None:
    model = small(d_model=256, n_heads=8, n_kv_heads=8)
    inner = model.backbone.transformer
    init_for_copying(inner, seed=0)
    drawn = torch.Generator().manual_seed(0)
    states = inner.wte(torch.randperm(600, generator=drawn)[:24]).detach()
    places = torch.arange(2, 22)
    for head, back in enumerate((1, -1, 2, -2)):
        best = attention(inner.blocks[0], states, inner.config, head).argmax(1)[2:22]
        assert torch.equal(best, places - back)


def test_init_for_copying_lets_the_second_layer_find_the_letter_of_a_choice() -> None:
    model = small(d_model=256, n_heads=8, n_kv_heads=8)
    inner = model.backbone.transformer
    init_for_copying(inner, seed=0)
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randperm(600, generator=drawn)[:24]
    tokens[19] = tokens[8]  # a word of the answer is one of the choices'
    found = []
    handle = inner.blocks[1].register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        inner(inner.wte(tokens)[None], torch.arange(24)[None], AttentionContext())
    handle.remove()
    scores = attention(inner.blocks[1], found[0][0], inner.config, head=2)[17]
    best = scores.argsort(descending=True)[:2].tolist()
    assert sorted(best) == [6, 17]  # both stand two tokens before the word
    assert not inner.wte.weight[:, -32:].any()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["llada", "llama"])
def test_alignment_loss_equals_a_computation_without_packing(name: str, shared: bool) -> None:
    torch.manual_seed(0)
    model = small() if name == "llada" else causal()
    causally = int(name == "llama")
    inner, table = model.backbone.transformer, model.backbone.embed
    block = inner.blocks[3]
    with torch.no_grad():
        for proj in (block.q_proj, block.k_proj):
            proj.weight.mul_(5)  # else every head looks everywhere alike
    source = NanoText(questions_per_sample=3, tasks=["gender", "count", "place", "transcribe"])
    batch = batch_of(model, [source[i] for i in range(3)])
    heard = [
        table(batch.audio_text[i, : batch.audio_text_lengths[i]])
        for i in batch.audio_index.tolist()
    ]
    alignment = AlignmentLoss(model.backbone, layer=3, weight=0.5)
    packing = Packing(batch.audio_index if shared else None, layer=3)
    with torch.no_grad():
        packing(model.backbone, batch.tokens, batch.row_lengths, heard, batch.audio_at)
        found = alignment(batch, packing)

    def words(tokens: torch.Tensor) -> list[str]:
        return [model.backbone.tokenizer.decode([token]).strip() for token in tokens.tolist()]

    given: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0]))
    labels: dict[str, list[tuple[torch.Tensor, str]]] = {}
    looks = []
    for i, owner in enumerate(batch.audio_index.tolist()):
        tokens, at, more = (
            batch.tokens[i, : batch.row_lengths[i]],
            int(batch.audio_at[i]),
            len(heard[i]),
        )
        values = torch.cat([table(tokens[:at]), heard[i], table(tokens[at:])])[None]
        slots = torch.arange(values.shape[1])[None]
        with torch.no_grad():
            apart = (
                AttentionContext(branch=(slots >= at + more).long())
                if shared
                else AttentionContext()
            )
            model.backbone(values, slots, apart)
        states, scores = given[-1], attention(block, given[-1], inner.config, head=-1)
        script = words(batch.audio_text[owner, : batch.audio_text_lengths[owner]])
        for label in label_tokens(
            words(tokens), transcript_words(script, int(batch.speech_start[owner]))
        ):
            place = label.place - (causally if label.field != "letter" else 0)
            slot = place + more  # all labels stand behind the audio
            labels.setdefault(label.field, []).append((states[slot], label.word))
            if label.source is not None:
                seen = scores[slot, : slot + 1] if causally else scores[slot]
                looks.append(-seen.log_softmax(0)[label.source + more])
    handle.remove()
    due = 2 * torch.stack(looks).mean()
    for field in labels.values():
        ids = torch.tensor(token_ids([word for _, word in field], model.backbone.tokenizer))
        competing, index = ids.unique(return_inverse=True)
        normal = torch.stack([torch.nn.functional.rms_norm(state, (64,)) for state, _ in field])
        losses = -(0.3 * normal @ table(competing).T).log_softmax(1)[range(len(ids)), index]
        weights = torch.tensor([0.2 if word == BLANK else 1.0 for _, word in field])
        due = due + (losses * weights).sum() / weights.sum()
    assert set(labels) == {"number", "letter", "word"} and len(looks) > 1
    assert any(word == BLANK for _, word in labels["number"])
    torch.testing.assert_close(found, 0.5 * due, atol=1e-4, rtol=1e-4)


def test_alignment_and_ctc_losses_add_up() -> None:
    model = small()
    batch = batch_of(model, [NanoText(questions_per_sample=3)[0]])
    batch = batch._replace(ctc_targets=({"*": batch.audio_text[0, :2]},))

    def auxiliary(**options: object) -> float:
        learner = nano_learner(model, question_packing=1.0, blank_token=BLANK, **options)
        return float(learner(batch).auxiliary.detach())

    ctc, alignment = {"transcript": 1.0}, {"layer": 3, "weight": 0.3}
    alone = [auxiliary(ctc=ctc), auxiliary(alignment=alignment)]
    assert min(alone) > 0
    assert auxiliary(ctc=ctc, alignment=alignment) == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize("name", ["llada", "llama"])
def test_alignment_trains_the_middle_of_a_packed_backbone(name: str) -> None:
    torch.manual_seed(0)
    model = small() if name == "llada" else causal()
    model.backbone.requires_grad_(True)
    batch = batch_of(model, [NanoText(questions_per_sample=6)[i] for i in range(4)])
    learner = nano_learner(model, question_packing=1.0, alignment={"layer": 3, "weight": 0.3})
    optimizer = torch.optim.AdamW(learner.parameters(), 3e-3)
    seen = []
    for _ in range(25):
        measured = learner(batch)
        loss = measured.auxiliary / measured.weight
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < 0.6 * seen[0]
    last = model.backbone.transformer.blocks[3]
    size = model.backbone.transformer.config.head_dim
    grad = last.q_proj.weight.grad
    assert grad[-size:].any() and not grad[:-size].any()  # the head that is taught to look
    assert not any(p.grad is not None and p.grad.any() for p in model.backbone.head.parameters())


def test_embedding_match_pulls_slots_to_their_nearest_embedding() -> None:
    table = torch.eye(6) * 2

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return table[ids]

    values = torch.stack([table[4] * 0.2, table[0] * 3, table[5] * 0.5])[None].requires_grad_()
    words = [{"semantic": torch.tensor([4, 5])}]
    said = {"semantic": Embeds(values, torch.tensor([3]))}
    plain = CTCLoss(embed, {"semantic": 1.0}, blank=0)(said, words)
    pulled = CTCLoss(embed, {"semantic": 1.0}, blank=0, embedding_match=1.0)(said, words)
    step = (
        values
        - 5
        * torch.autograd.grad(
            CTCLoss(embed, {"semantic": 1.0}, blank=0, embedding_match=1.0)(said, words), values
        )[0]
    )
    targets = torch.stack([table[4], table[0], table[5]])
    assert (step[0] - targets).norm() < (values[0] - targets).norm()
    assert float(pulled) > float(plain)
    closer = {"semantic": Embeds(targets[None], torch.tensor([3]))}
    gone = CTCLoss(embed, {"semantic": 1.0}, blank=0, embedding_match=1.0)(closer, words)
    kept = CTCLoss(embed, {"semantic": 1.0}, blank=0)(closer, words)
    torch.testing.assert_close(gone, kept)  # nothing is left to pull


def test_embedding_match_weighs_blanks_as_much_as_words_and_ignores_padding() -> None:
    table = torch.eye(6) * 2
    slots = [(4, 0.2), (0, 3), (0, 2), (0, 1), (4, 7), (0, 7)]  # the last two are padding
    values = torch.stack([table[word] * size for word, size in slots])
    said = {"semantic": Embeds(values[None], torch.tensor([4]))}
    pulled, plain = (
        CTCLoss(lambda ids: table[ids], {"semantic": 1.0}, blank=0, embedding_match=pull)(
            said, [{"semantic": torch.tensor([4])}]
        )
        for pull in (3.0, 0.0)
    )
    # of squares of 2 against a mean of 4 / 6 in the table: the word's, and that of three blanks
    words, blanks = 0.8**2, (2**2 + 1**2 + 0) / 3
    assert float(pulled - plain) == pytest.approx(3 * (words + blanks) / 2)


def test_a_repeated_word_keeps_its_best_slot() -> None:
    from diffa.nano.auxiliary import _best_slots

    said = torch.tensor([[0, 2, 2, 2, 0, 2, 1]])
    sure = torch.tensor([[0.9, 0.6, 0.8, 0.7, 0.9, 0.5, 0.5]])
    cosines = torch.zeros(1, 7, 3).scatter(2, said[:, :, None], sure[:, :, None])
    assert _best_slots(cosines).tolist() == [[0, 0, 2, 0, 0, 2, 1]]


def test_transcripts_and_adapters_number_the_same_words() -> None:
    numbering = Numbering(5, 3)
    word, none = torch.eye(5)[0], 0.2 * torch.eye(5)[4]  # embeddings are of any size
    init_numbering(with_numbering(numbering), 10 * torch.eye(5)[1:4], none)
    values = torch.stack([none, word, none, word, word, none, word, word])[None]
    inside = torch.arange(8)[None] < 7
    found = (numbering(values, inside) - values)[0]
    places = [0, 1, 0, 2, 2, 0, 3, 0]  # the last slot is none of the recording's
    wanted = torch.stack([10 * torch.eye(5)[place] * (place > 0) for place in places])
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)
    script = torch.tensor([[9, 0, 7, 0, 5, 5, 0, 7]])
    assert word_numbers(script, torch.tensor([1]), 0).tolist() == [[0, 0, 1, 0, 2, 2, 0, 3]]
    assert word_numbers(script[:, 4:], torch.tensor([1]), 0).tolist() == [[0, 1, 0, 2]]


def test_a_numbering_stops_counting_at_its_last_number() -> None:
    numbering = Numbering(2, 2)
    with torch.no_grad():
        numbering.gate.weight.zero_()
        numbering.gate.bias.fill_(50.0)
        numbering.table.copy_(torch.tensor([[1.0, 0], [0, 1.0]]))
    apart = torch.tensor([[True, False] * 4])
    found = numbering(torch.zeros(1, 8, 2), apart)
    assert found[0, ::2].tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    assert not found[0, 1::2].any()


def test_transcripts_add_ordinals_and_ctc_reads_adapters_without_them() -> None:
    model = small()
    numbers = token_ids(["first", "second"], model.backbone.tokenizer)
    embedder = TranscriptEmbedder(model.backbone.embed, ordinals=numbers).eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    said = embedder(ids, torch.tensor([4]), torch.tensor([[0, 1, 2, 3]])).values[0]
    bare = model.backbone.embed(ids)[0]
    torch.testing.assert_close(said[0], bare[0])
    added = model.backbone.embed(torch.tensor([*numbers, numbers[-1]]))
    torch.testing.assert_close(said[1:] - bare[1:], added)

    adapter = Conv(FeatureSpec(8, 1, 50.0, 2), 64, word_numbers=2)
    ctc = CTCLoss(model.backbone.embed, {"semantic": 1.0}, blank=6, embedding_match=1.0)
    features = Features((torch.randn(1, 40, 8),), torch.tensor([40]), torch.tensor([40]))
    out = adapter(features)
    assert not torch.allclose(out.content, out.values)
    gates = {"semantic": adapter.numbering.gate}
    loss = ctc({"semantic": out}, [{"semantic": torch.tensor([7, 8])}], gates)
    loss.backward()
    assert adapter.numbering.gate.weight.grad.any()  # taught where words are
    assert adapter.numbering.table.grad is None  # CTC does not read the numbers


def test_a_transcript_has_one_token_per_word_and_blank() -> None:
    model = small()
    sample = NanoText()[0]
    batch = batch_of(model, [sample])
    words = sample.audio_text.split(" ")
    said = [
        model.backbone.tokenizer.decode([token]).strip() for token in batch.audio_text[0].tolist()
    ]
    assert said == words
    assert batch.speech_start.tolist() == [sample.speech_start]


def test_a_gate_learns_where_words_are_however_few_there_are() -> None:
    torch.manual_seed(0)
    table = torch.eye(8)
    values = torch.cat([table[:1].repeat(38, 1), table[[4, 5]]])[None] + 0.05 * torch.randn(
        1, 40, 8
    )
    numbering = Numbering(8, 2)
    ctc = CTCLoss(lambda ids: table[ids], {"semantic": 1.0}, blank=0)
    optimizer = torch.optim.AdamW(numbering.gate.parameters(), 0.05)
    for _ in range(60):
        output = numbering(values, torch.ones(1, 40).bool())
        said = {"semantic": Embeds(output, torch.tensor([40]), values)}
        optimizer.zero_grad()
        words = [{"semantic": torch.tensor([4, 5])}]
        ctc(said, words, {"semantic": numbering.gate}).backward()
        optimizer.step()
    opened = numbering.gate(values)[0, :, 0] > 0
    assert opened.tolist() == [False] * 38 + [True] * 2


def test_a_gate_is_taught_by_what_is_said_and_teaches_nothing_back() -> None:
    from diffa.nano.auxiliary import _gate_loss

    says = torch.tensor([[1, 0, 0, 1, 0]])  # the last two are none of the recording's
    cosines = torch.nn.functional.one_hot(says, 2).float()
    scores, inside = torch.tensor([[3.0, -2.0, 0.0, -9.0, 9.0]]), torch.arange(5)[None] < 3
    costs = torch.nn.functional.softplus(torch.tensor([-3.0, -2.0, 0.0]))
    due = (costs[0] + costs[1:].mean()) / 2
    torch.testing.assert_close(_gate_loss(scores, cosines, inside), due)

    table, gate = torch.eye(4), torch.nn.Linear(4, 1)
    values = torch.randn(1, 6, 4, requires_grad=True)
    said, words = {"semantic": Embeds(values, torch.tensor([6]))}, [{"*": torch.tensor([2])}]
    ctc = CTCLoss(lambda ids: table[ids], {"semantic": 1.0}, blank=0)
    (plain,) = torch.autograd.grad(ctc(said, words), values)
    (taught,) = torch.autograd.grad(ctc(said, words, {"semantic": gate}), values)
    assert torch.equal(plain, taught)


def test_only_adapters_that_learn_are_given_their_numbers() -> None:
    conv = {"name": "conv", "word_numbers": 2}
    model = diffa.build(small().spec.set("adapters", {"semantic": conv, "other": conv}))
    set_trainable(model, ["adapters.semantic"])
    before = {key: part.numbering.table.clone() for key, part in model.adapters.items()}
    nano_learner(model, ordinals=["first", "second"], blank_token=BLANK).prepare([], seed=0)
    after = {key: part.numbering.table for key, part in model.adapters.items()}
    assert not torch.equal(after["semantic"], before["semantic"])
    assert torch.equal(after["other"], before["other"])


def test_no_words_need_no_tokenizer() -> None:
    assert token_ids([], None) == []
