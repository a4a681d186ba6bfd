"""Finding, reading and filling published weights."""

import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffa.checkpoints import hub
from diffa.checkpoints import read as checkpoint
from diffa.errors import CheckpointError


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hub cache and no network, the offline switch being off."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    return tmp_path / "cache"


def _no_network(*_, **__):
    raise socket.gaierror("Name or service not known")


def put_in_cache(cache: Path, repository: str, files: dict[str, bytes]) -> Path:
    home = cache / ("models--" + repository.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    for file, content in files.items():
        path = home / "snapshots" / "abc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return home / "snapshots" / "abc"


def shard(folder: Path, suffix: str, save) -> None:
    whole = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    stem = whole.rsplit(".", 1)[0]
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    save({"a.weight": torch.ones(2)}, folder / files[0])
    save({"b.weight": torch.zeros(3)}, folder / files[1])
    table = {"weight_map": {"a.weight": files[0], "b.weight": files[1]}}
    (folder / f"{whole}.index.json").write_text(json.dumps(table))


# find


def test_a_folder_is_its_own_checkpoint(tmp_path):
    assert checkpoint.find_checkpoint(str(tmp_path)) == tmp_path


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        checkpoint.find_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["absent", "/no/such/folder", "./a/b", "a//b", "a/b/../c", ""])
def test_what_is_neither_folder_nor_hub_id_says_so(name, cache):
    with pytest.raises(CheckpointError, match="neither a folder here"):
        checkpoint.find_checkpoint(name)


def test_an_absent_hub_id_fails_fast_and_says_what_to_do(cache):
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.find_checkpoint("some-one/some-thing")
    assert time.perf_counter() - start < 10
    for part in ("not on this machine", "hf download some-one/some-thing", "path of a folder"):
        assert part in str(caught.value)


def test_the_offline_switch_is_respected(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_download", lambda *_, **__: pytest.fail("reached for the network"))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        checkpoint.find_checkpoint("some-one/some-thing")


def test_the_cache_is_used_without_a_network(cache):
    folder = put_in_cache(cache, "a/b", {"config.json": b"{}", "model.safetensors": b"x"})
    assert checkpoint.find_checkpoint("a/b") == folder


def test_a_folder_inside_a_repository_is_found(cache):
    files = {"config.json": b"{}", "stage1/config.json": b"{}", "stage1/pytorch_model.bin": b"x"}
    folder = put_in_cache(cache, "a/b", files)
    assert checkpoint.find_checkpoint("a/b/stage1") == folder / "stage1"


def test_a_cached_configuration_does_not_stand_for_weights(cache):
    folder = put_in_cache(cache, "a/b", {"config.json": b"{}"})
    assert checkpoint.find_checkpoint("a/b", weights=False) == folder
    with pytest.raises(CheckpointError, match="cannot be reached"):
        checkpoint.find_checkpoint("a/b")


def test_a_half_downloaded_checkpoint_does_not_count(cache):
    files = {"config.json": b"{}", "model.safetensors.index.json": b"{}"}
    put_in_cache(cache, "a/b", files | {"model-00001-of-00002.safetensors": b"x"})
    with pytest.raises(CheckpointError, match="cannot be reached"):
        checkpoint.find_checkpoint("a/b")


def test_only_what_is_read_is_downloaded(cache, monkeypatch):
    import huggingface_hub

    names = ["config.json", "tokenizer.json", "code.py", "model.safetensors", "pytorch_model.bin"]
    names += ["model.fp32-00001-of-00002.safetensors", "data/train.json", "stage1/config.json"]
    asked = {}
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(repository, **options):
        asked.update(options)
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint.find_checkpoint("a/b", "v1")
    assert asked["allow_patterns"] == ["config.json", "tokenizer.json", "model.safetensors"]
    assert asked["revision"] == "v1"
    checkpoint.find_checkpoint("a/b", weights=False)
    assert asked["allow_patterns"] == ["config.json", "tokenizer.json"]


def test_weights_inside_the_package_stay_inside_it():
    with pytest.raises(CheckpointError, match="ships no such weights"):
        checkpoint.find_checkpoint("package:../../tests")


# read


def test_a_dry_run_is_noticed():
    assert not checkpoint.is_meta()
    with torch.device("meta"):
        assert checkpoint.is_meta()


@pytest.mark.parametrize(
    "content, told",
    [(None, "has no config.json"), ("{", "cannot be read as JSON"), ("[]", "a JSON object")],
)
def test_a_bad_configuration_says_what_is_wrong(tmp_path, content, told):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=told):
        checkpoint.load_config(tmp_path, "config.json")


def test_weights_below_a_prefix_lose_it(tmp_path):
    save_file({"a.x": torch.ones(2), "b.x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert set(checkpoint.read_weights(tmp_path)) == {"a.x", "b.x"}
    state = checkpoint.read_weights(tmp_path, "b.")
    assert set(state) == {"x"} and state["x"].shape == (3,)


@pytest.mark.parametrize("suffix, save", [("safetensors", save_file), ("bin", torch.save)])
def test_shards_are_read_together(tmp_path, suffix, save):
    shard(tmp_path, suffix, save)
    assert set(checkpoint.read_weights(tmp_path)) == {"a.weight", "b.weight"}
    assert set(checkpoint.read_weights(tmp_path, "a.")) == {"weight"}


def test_only_the_shards_that_are_needed_are_opened(tmp_path):
    shard(tmp_path, "safetensors", save_file)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    assert set(checkpoint.read_weights(tmp_path, "a.")) == {"weight"}


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path, "safetensors", save_file)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors', which is not in"):
        checkpoint.read_weights(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    table = {"weight_map": {"a": "../other.safetensors"}}
    (inner / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="which is not in"):
        checkpoint.read_weights(inner)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_says_so(tmp_path, file, keep):
    save = torch.save if file.endswith(".bin") else save_file
    save({"a": torch.arange(4096.0)}, tmp_path / file)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.read_weights(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        checkpoint.read_weights(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_pickle_from_before_zip_archives_is_read(tmp_path):
    state = {"a": torch.arange(4.0)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert checkpoint.read_weights(tmp_path)["a"].equal(state["a"])


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="names to tensors"):
        checkpoint.read_weights(tmp_path)


def test_an_empty_folder_holds_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoint.read_weights(tmp_path)


def test_training_does_not_write_into_the_file(tmp_path):
    for file, save in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        save({"a": torch.ones(5000)}, tmp_path / file)
        checkpoint.read_weights(tmp_path)["a"].zero_()
        assert checkpoint.read_weights(tmp_path)["a"].eq(1).all()
        (tmp_path / file).unlink()


# fill


def test_a_module_on_meta_takes_the_tensors_themselves():
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3, dtype=torch.bfloat16), "bias": torch.zeros(2)}
    checkpoint.load_state(layer, state, source="here")
    assert layer.weight.data_ptr() == state["weight"].data_ptr()
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.requires_grad


def test_a_real_module_keeps_its_dtype(layer):
    state = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    checkpoint.load_state(layer, state, source="here")
    assert layer.weight.dtype == torch.float32 and layer.weight.eq(1).all()


def test_every_fault_is_told_at_once_and_nothing_is_changed(layer):
    before = layer.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_state(
            layer, {"weight": torch.ones(3, 3), "more": torch.ones(1)}, source="here"
        )
    for part in (
        "here",
        "Linear",
        "missing: bias",
        "unexpected: more",
        "weight has shape (3, 3) where (2, 3)",
    ):
        assert part in str(caught.value)
    assert layer.weight.equal(before)


def test_long_lists_are_shortened(layer):
    state = {f"key{i}": torch.ones(1) for i in range(50)}
    with pytest.raises(CheckpointError, match=r"key0, key1.* and 44 more"):
        checkpoint.load_state(layer, state, source="here")
