"""conv, qformer, prompt and linear: lengths, padding, batches, checkpoints, errors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffa.adapters.conv import Conv
from diffa.adapters.linear import Linear
from diffa.adapters.prompt import Prompt
from diffa.adapters.qformer import QFormer, select_encoder_layers
from diffa.errors import CheckpointError, SpecError
from diffa.types import Adapter, Features, FeatureSpec

SOURCE = FeatureSpec(width=12, layers=6, rate=50.0, heads=3)
WIDTH = 10
WINDOW = 40
GOLDEN = Path(__file__).parents[1] / "golden" / "diffa1-tiny" / "diffa"
GOLDEN_SOURCE = FeatureSpec(width=32, layers=12, rate=50.0, heads=4)

MAKERS = {
    "conv": lambda: Conv(SOURCE, WIDTH),
    "conv-1": lambda: Conv(SOURCE, WIDTH, stride=1),
    "conv-3": lambda: Conv(SOURCE, WIDTH, stride=3, final_relu=False),
    "qformer": lambda: QFormer(SOURCE, WIDTH, num_queries=5, intermediate_size=16, dropout=0.0),
    "prompt": lambda: Prompt(WIDTH, num_embeddings=7),
    "linear": lambda: Linear(SOURCE, WIDTH, stride=3, intermediate_size=16),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=MAKERS)
def adapter(request):
    return MAKERS[request.param]().eval()


def features(lengths, windows=None, garbage=0.0, dtype=torch.float32):
    """Random states whose content depends on the row's seed alone; ``garbage`` past the window."""
    windows = windows or [-(-length // WINDOW) or 1 for length in lengths]
    most = max(windows) * WINDOW
    states = torch.full((SOURCE.layers + 1, len(lengths), most, SOURCE.width), garbage)
    for row, (length, count) in enumerate(zip(lengths, windows, strict=True)):
        generator = torch.Generator().manual_seed(length)
        extent = count * WINDOW
        states[:, row, :extent] = torch.randn(
            SOURCE.layers + 1, extent, SOURCE.width, generator=generator
        )
    extents = torch.tensor(windows) * WINDOW
    return Features(tuple(states.to(dtype)), torch.tensor(lengths), extents)


def change(heard, start, end, value=1e4):
    """The same features with frames start to end of every state overwritten."""
    states = tuple(state.clone() for state in heard.states)
    for state in states:
        state[:, start:end] = value
    return heard._replace(states=states)


@torch.no_grad()
def embed(adapter, heard):
    return adapter(heard)


# every adapter


def test_an_adapter_keeps_its_word_on_lengths(adapter):
    assert isinstance(adapter, Adapter)
    heard = features([40, 13, 57])
    embeds = embed(adapter, heard)
    assert embeds.lengths.equal(adapter.out_lengths(heard.lengths))
    assert embeds.values.shape == (3, int(embeds.lengths.max()), WIDTH)
    for row, length in zip(embeds.values, embeds.lengths, strict=True):
        assert row[length:].eq(0).all() and row[:length].ne(0).any()


def test_batch_equals_single(adapter):
    lengths = [40, 13, 97, 41]
    batch = embed(adapter, features(lengths))
    for row, length in enumerate(lengths):
        alone = embed(adapter, features([length]))
        count = int(alone.lengths)
        assert int(batch.lengths[row]) == count
        assert torch.allclose(batch.values[row, :count], alone.values[0, :count], atol=1e-5)


def test_frames_past_the_window_do_not_leak(adapter):
    lengths = [13, 97]
    clean, dirty = (embed(adapter, features(lengths, garbage=g)) for g in (0.0, 1e4))
    assert torch.allclose(clean.values, dirty.values, atol=1e-5)


def test_a_clip_too_short_for_one_embedding_gives_none(adapter):
    heard = features([0, 0])
    embeds = embed(adapter, heard)
    assert embeds.values.shape == (2, int(embeds.lengths.max()), WIDTH)
    assert embeds.lengths.equal(adapter.out_lengths(heard.lengths))


def test_gradients_reach_every_weight(adapter):
    embeds = adapter.train()(features([40, 57]))
    (embeds.values * torch.randn(embeds.values.shape)).sum().backward()
    for name, value in adapter.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), name


def test_half_precision_features_are_welcome(adapter):
    embeds = embed(adapter, features([40, 13], dtype=torch.bfloat16))
    assert embeds.values.dtype == torch.float32 and embeds.values.isfinite().all()


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Conv(SOURCE, WIDTH, stride=0), "stride must be at least 1, got 0"),
        (lambda: QFormer(SOURCE, WIDTH, num_queries=0), "num_queries must be at least 1, got 0"),
        (lambda: QFormer(SOURCE, WIDTH, num_layers=0), "num_layers must be at least 1"),
        (
            lambda: QFormer(SOURCE, WIDTH, intermediate_size=0),
            "intermediate_size must be at least 1",
        ),
        (lambda: QFormer(SOURCE, WIDTH, dropout=1.0), "dropout must lie between 0 and 1"),
        (
            lambda: QFormer(SOURCE, WIDTH, encoder_layers=7),
            "encoder_layers must lie between 1 and .* 6 layers, got 7",
        ),
        (lambda: QFormer(SOURCE, WIDTH, encoder_layers=0), "encoder_layers must lie between 1"),
        (lambda: QFormer(SOURCE, WIDTH, encoder_layers=[]), "encoder_layers must list"),
        (lambda: QFormer(SOURCE, WIDTH, encoder_layers=[1, 7]), r"0 to 6, got \[1, 7\]"),
        (lambda: QFormer(SOURCE, WIDTH, encoder_layers=[-1]), "0 to 6"),
        (lambda: QFormer(SOURCE._replace(heads=5), WIDTH), "multiple of its heads, got 12 and 5"),
        (lambda: Prompt(WIDTH, num_embeddings=0), "num_embeddings must be at least 1, got 0"),
        (lambda: Linear(SOURCE, WIDTH, stride=0), "stride must be at least 1, got 0"),
        (
            lambda: Linear(SOURCE, WIDTH, intermediate_size=-2),
            "intermediate_size must be at least 1, got -2",
        ),
    ],
)
def test_options_out_of_range_say_the_range(make, told):
    with pytest.raises(SpecError, match=told):
        make()


# conv


def test_conv_is_what_the_paper_says():
    conv = Conv(SOURCE, WIDTH).eval()
    heard = features([38])
    frames = heard.states[-1][:, :36].mT  # whole strides of the true frames
    hidden = conv.conv(frames).mT
    expected = conv.layernorm(F.relu(conv.linear_connector(hidden)))
    assert torch.allclose(embed(conv, heard).values, expected, atol=1e-6)


def test_conv_hears_nothing_past_the_true_frames():
    for stride in (1, 2, 3, 4):
        conv = Conv(SOURCE, WIDTH, stride=stride).eval()
        heard = features([14, 37])
        changed = change(heard, 37 // stride * stride, WINDOW)
        assert torch.allclose(embed(conv, heard).values, embed(conv, changed).values, atol=1e-5)
        alone = embed(conv, features([14])).values[0]
        assert torch.allclose(embed(conv, changed).values[0, : len(alone)], alone, atol=1e-5)


def test_conv_hears_true_frames_from_the_first_to_the_last_but_one():
    # the last kernel, of stride 4 and width 3, ends one frame before its stride does
    conv = Conv(SOURCE, WIDTH).eval()
    heard = features([36])
    for frame in (0, 17, 18, 19, 20, 34):
        changed = change(heard, frame, frame + 1, value=3.0)
        assert not torch.allclose(embed(conv, heard).values, embed(conv, changed).values)


def test_the_last_relu_can_be_left_out():
    with_relu = Conv(SOURCE, WIDTH).eval()
    without = Conv(SOURCE, WIDTH, final_relu=False).eval()
    without.load_state_dict(with_relu.state_dict())
    heard = features([36])
    assert not torch.allclose(embed(with_relu, heard).values, embed(without, heard).values)


# qformer


@pytest.mark.parametrize(
    "layers, expected",
    [
        (4, [0, 1, 2, 3]),
        (12, [2, 5, 8, 11]),
        (24, [5, 11, 17, 23]),
        (32, [3, 7, 11, 15, 19, 23, 27, 31]),
        (6, [0, 2, 3, 5]),
        (2, [0, 1]),
    ],
)
def test_taps_follow_the_published_table(layers, expected):
    assert select_encoder_layers(layers, None) == expected


def test_taps_can_be_counted_or_listed():
    assert select_encoder_layers(12, 3) == [3, 7, 11]
    assert select_encoder_layers(12, [0, 12]) == [0, 12]


def test_the_qformer_reads_its_taps_and_nothing_else():
    adapter = QFormer(
        SOURCE, WIDTH, num_queries=3, intermediate_size=16, encoder_layers=[1, 4]
    ).eval()
    heard = features([40])
    before = embed(adapter, heard).values
    for entry in range(SOURCE.layers + 1):
        states = list(heard.states)
        states[entry] = states[entry] + 1.0
        after = embed(adapter, heard._replace(states=tuple(states))).values
        assert torch.allclose(before, after) == (entry not in (1, 4))


def test_the_qformer_reads_the_windows_padding_as_published_weights_expect():
    adapter = QFormer(SOURCE, WIDTH, num_queries=3, intermediate_size=16).eval()
    heard = features([13])
    changed = change(heard, 13, WINDOW, value=2.0)
    assert not torch.allclose(embed(adapter, heard).values, embed(adapter, changed).values)


def test_layers_are_mixed_by_a_softmax_for_every_query():
    adapter = QFormer(
        SOURCE, WIDTH, num_queries=2, intermediate_size=16, encoder_layers=[1, 4]
    ).eval()
    with torch.no_grad():
        adapter.layer_weights.copy_(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))
    heard = features([40])
    before = embed(adapter, heard).values[0]
    states = list(heard.states)
    states[1] = states[1] + 1.0
    after = embed(adapter, heard._replace(states=tuple(states))).values[0]
    assert not torch.allclose(before[0], after[0]) and torch.allclose(before[1], after[1])


def test_dropout_acts_in_training_only():
    adapter = QFormer(SOURCE, WIDTH, num_queries=3, intermediate_size=16, dropout=0.5)
    heard = features([40])
    adapter.train()
    assert not embed(adapter, heard).values.equal(embed(adapter, heard).values)
    adapter.eval()
    assert embed(adapter, heard).values.equal(embed(adapter, heard).values)


# linear and prompt


def test_linear_stacks_frames_in_order():
    adapter = Linear(SOURCE, WIDTH, stride=3, intermediate_size=16).eval()
    heard = features([8])
    expected = adapter.layers(heard.states[-1][0, :6].reshape(2, 36))
    assert torch.allclose(embed(adapter, heard).values[0], expected, atol=1e-6)


def test_the_prompt_is_the_same_for_every_recording():
    adapter = Prompt(WIDTH, num_embeddings=4)
    embeds = embed(adapter, features([3, 40]))
    assert embeds.lengths.tolist() == [4, 4]
    assert all(row.equal(adapter.prompts.weight) for row in embeds.values)


# checkpoints


def test_published_weights_of_another_width_are_refused():
    makers = [
        (lambda: Conv(GOLDEN_SOURCE, 64, checkpoint=str(GOLDEN)), "layernorm.weight"),
        (
            lambda: QFormer(GOLDEN_SOURCE, 64, checkpoint=str(GOLDEN)),
            r"proj\.1\.weight has shape \(48, 32\)",
        ),
        (
            lambda: Prompt(64, checkpoint=str(GOLDEN)),
            r"weight has shape \(20, 48\) where \(20, 64\)",
        ),
        (
            lambda: Conv(SOURCE, 48, checkpoint=str(GOLDEN)),
            r"conv\.0\.weight has shape \(32, 32, 3\)",
        ),
        (
            lambda: Prompt(48, num_embeddings=10, checkpoint=str(GOLDEN)),
            r"\(20, 48\) where \(10, 48\)",
        ),
        (lambda: QFormer(GOLDEN_SOURCE, 48, num_queries=32, checkpoint=str(GOLDEN)), "has shape"),
    ]
    for make, told in makers:
        with pytest.raises(CheckpointError, match=told) as caught:
            make()
        assert str(GOLDEN) in str(caught.value)


def test_published_weights_of_another_number_of_taps_are_refused():
    with pytest.raises(
        CheckpointError, match="trained on 4 encoder layers, but this qformer reads 6"
    ):
        QFormer(GOLDEN_SOURCE, 48, encoder_layers=6, checkpoint=str(GOLDEN))


def test_a_checkpoint_without_the_adapter_is_refused(tmp_path):
    save_file({"something.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    for make in (
        lambda: Conv(SOURCE, WIDTH, checkpoint=str(tmp_path)),
        lambda: QFormer(SOURCE, WIDTH, checkpoint=str(tmp_path)),
        lambda: Prompt(WIDTH, checkpoint=str(tmp_path)),
    ):
        with pytest.raises(CheckpointError, match="missing: "):
            make()


def test_published_layouts_of_other_sizes_load(tmp_path):
    parts = {
        "semantic_connector.": Conv(SOURCE, WIDTH, stride=2),
        "acoustic_connector.": QFormer(
            SOURCE, WIDTH, num_queries=3, num_layers=1, encoder_layers=5, intermediate_size=8
        ),
        "trainable_prompts.": Prompt(WIDTH, num_embeddings=3).prompts,
    }
    state = {
        p + key: v.clone() for p, part in parts.items() for key, v in part.state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    folder = str(tmp_path)
    conv = Conv(SOURCE, WIDTH, stride=2, checkpoint=folder)
    qformer = QFormer(
        SOURCE,
        WIDTH,
        num_queries=3,
        num_layers=1,
        encoder_layers=5,
        intermediate_size=8,
        checkpoint=folder,
    )
    prompt = Prompt(WIDTH, num_embeddings=3, checkpoint=folder)
    for part, prefix in zip((conv, qformer, prompt.prompts), parts, strict=True):
        for key, value in part.state_dict().items():
            assert value.equal(state[prefix + key])


def test_a_dry_run_reads_no_weights():
    with torch.device("meta"):
        parts = [
            Conv(SOURCE, WIDTH, checkpoint="no/such"),
            QFormer(SOURCE, WIDTH, checkpoint="no/such"),
            Prompt(WIDTH, checkpoint="no/such"),
            Linear(SOURCE, WIDTH),
        ]
    assert all(value.is_meta for part in parts for value in part.parameters())


def test_parameter_counts_are_the_published_ones():
    small = FeatureSpec(768, 12, 50.0, 12)
    large = FeatureSpec(1280, 32, 50.0, 20)
    with torch.device("meta"):
        counts = [
            sum(value.numel() for value in part.parameters())
            for source in (small, large)
            for part in (Conv(source, 4096), QFormer(source, 4096))
        ]
    assert counts == [14_369_280, 22_251_776, 36_392_448, 47_892_992]
