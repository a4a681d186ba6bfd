"""The plugin template: it conforms from the first minute, installs, and works in a spec."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffa.cli import scaffold
from diffa.errors import SpecError
from diffa.spec import registry
from diffa.testing import AdapterSuite, BackboneSuite, EncoderSuite, ObjectiveSuite, SamplerSuite


def template(kind):
    import importlib

    return importlib.import_module(f"diffa.assets.templates.{kind}").Part


class TestAdapterTemplate(AdapterSuite):
    part = template("adapter")


class TestEncoderTemplate(EncoderSuite):
    part = template("encoder")


class TestBackboneTemplate(BackboneSuite):
    part = template("backbone")


class TestSamplerTemplate(SamplerSuite):
    part = template("sampler")


class TestObjectiveTemplate(ObjectiveSuite):
    part = template("objective")
    unbiased = True


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_new_plugin_has_its_own_names_in_every_file(kind, tmp_path):
    plugin = scaffold.write_plugin(f"acme-{kind}", kind, tmp_path)
    assert plugin.folder == tmp_path / f"acme-{kind}"
    for file in plugin.files:
        text = file.read_text()
        assert "Part" not in text.replace("Part of", "") or file.suffix == ".md"
        if file.suffix == ".py":
            compile(text, str(file), "exec")
    project = (plugin.folder / "pyproject.toml").read_text()
    assert 'dependencies = ["diffa-audio"]' in project
    assert f'acme-{kind} = "acme_{kind}:Acme{kind.capitalize()}"' in project


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("my-pool", "adaptor", "did you mean 'adapter'"),
        ("My Pool", "adapter", "lower-case letters"),
        ("../up", "adapter", "lower-case letters"),
        ("pool", "adapter", "takes precedence"),
        ("torch", "adapter", "is installed"),
    ],
)
def test_names_that_cannot_be_used_are_refused(name, kind, message, tmp_path):
    with pytest.raises(SpecError, match=message):
        scaffold.write_plugin(name, kind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_never_overwritten(tmp_path):
    scaffold.write_plugin("acme-pool", "adapter", tmp_path)
    with pytest.raises(SpecError, match="exists"):
        scaffold.write_plugin("acme-pool", "adapter", tmp_path)


USE = """
import torch, diffa
from diffa.spec import registry
assert "acme-pool" in registry.available("adapter"), registry.available("adapter")
config = dict(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16, vocab_size=40,
              mask_token_id=39, eos_token_id=0, max_sequence_length=512)
spec = dict(encoder=dict(name="tiny", width=16, layers=1, heads=2, window_seconds=1.0),
            adapters=dict(audio=dict(name="acme-pool", stride=5)),
            backbone=dict(name="llada", config=config))
model = diffa.build(spec)
embeds = model.listen(torch.zeros(16000))
assert embeds.values.shape == (1, 10, 16), embeds.values.shape
print("embedded")
"""


def test_a_new_plugin_installs_passes_its_tests_and_works_in_a_spec(tmp_path):
    """Written, built and installed without network or diffa's own tree, tested, used."""
    plugin, target = scaffold.write_plugin("acme-pool", "adapter", tmp_path), tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--disable-pip-version-check"]
    run(*install, "--target", str(target), str(plugin.folder))
    site = {"PYTHONPATH": str(target)}
    report = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests",
        cwd=plugin.folder, **site,
    )  # fmt: skip
    assert " passed" in report and "failed" not in report
    assert "embedded" in run(sys.executable, "-c", USE, cwd=tmp_path, **site)


def run(*command, cwd=None, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        command, cwd=cwd or Path.cwd(), env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
