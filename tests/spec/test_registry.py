"""Parts are found without being imported, and a bad one harms only those who ask for it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.fakes import POOL, install, site_packages

from diffa.errors import PluginError, SpecError
from diffa.spec import registry

ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
OWN = [
    (group[6:-1], name)
    for group, points in DECLARED.items()
    if group.startswith("diffa.")
    for name in points
]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path in which packages can be installed, and nothing of them stays."""
    yield from site_packages(tmp_path, monkeypatch)


def adapter(site: Path, code: str, target: str = "acme:Pool") -> None:
    install(site, "acme-diffa", {"adapter": {"puddle": target}}, {"acme": code})
    registry.clear_scan()


@pytest.mark.parametrize(("kind", "name"), OWN)
def test_every_part_that_pyproject_declares_loads(kind, name):
    assert isinstance(registry.load_part(kind, name), type)
    assert registry.find_part(kind, name).is_builtin
    assert name in registry.available(kind)


def test_a_third_party_part_just_appears(site):
    adapter(site, POOL)
    assert "puddle" in registry.available("adapter")
    assert registry.load_part("adapter", "puddle").__name__ == "Pool"
    assert registry.find_part("adapter", "puddle")[2:5] == ("acme-diffa", "1.0", "acme:Pool")


def test_listing_and_finding_import_nothing(site):
    adapter(site, "raise RuntimeError('imported')")
    registry.find_part("adapter", "puddle")
    assert "acme" not in sys.modules
    code = (
        "import sys; from diffa.spec import registry; registry.available('encoder'); "
        "registry.find_part('encoder', 'whisper'); "
        "assert not {'torch', 'transformers', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_name_brings_a_suggestion():
    with pytest.raises(SpecError, match=r"no adapter 'cnov', did you mean 'conv'\?"):
        registry.find_part("adapter", "cnov")
    with pytest.raises(SpecError, match=r"known: .*blockwise.*greedy"):
        registry.find_part("sampler", "zzz")
    with pytest.raises(SpecError, match="did you mean 'adapter'"):
        registry.available("adaptor")


def test_an_empty_registry_says_to_install_diffa(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(()))
    registry.clear_scan()
    with pytest.raises(SpecError, match=r"pip install -e \."):
        registry.find_part("adapter", "conv")
    registry.clear_scan()


def test_a_name_that_diffa_ships_means_diffas(site):
    install(site, "acme-diffa", {"adapter": {"conv": "acme:Pool"}}, {"acme": POOL})
    registry.clear_scan()
    assert registry.find_part("adapter", "conv").is_builtin
    assert registry.find_part("adapter", "acme-diffa:conv").target == "acme:Pool"
    assert registry.find_part("adapter", "diffa-audio:conv").is_builtin
    assert {"conv", "acme-diffa:conv"} <= set(registry.available("adapter"))


def test_two_packages_with_one_name_ask_for_the_package(site):
    adapter(site, POOL)
    install(site, "beta-diffa", {"adapter": {"puddle": "acme:Pool"}})
    registry.clear_scan()
    expected = "adapter 'puddle' is ambiguous: write 'acme-diffa:puddle' or 'beta-diffa:puddle'"
    with pytest.raises(SpecError) as caught:
        registry.find_part("adapter", "puddle")
    assert str(caught.value) == expected
    assert registry.find_part("adapter", "Beta_Diffa:puddle").dist == "beta-diffa"
    assert {"acme-diffa:puddle", "beta-diffa:puddle"} <= set(registry.available("adapter"))
    assert "puddle" not in registry.available("adapter")


def test_a_name_declared_twice_by_one_package_is_refused(site):
    info = install(site, "acme-diffa", {"adapter": {"puddle": "acme:Pool"}}, {"acme": POOL})
    with (info / "entry_points.txt").open("a") as file:
        file.write("puddle = acme:Other\n")
    registry.clear_scan()
    with pytest.raises(PluginError, match="declared twice by acme-diffa"):
        registry.find_part("adapter", "puddle")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("raise OSError('libc10_cuda.so')", "OSError: libc10_cuda.so"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_part_that_fails_to_import_names_its_package_and_the_reason(site, code, reason):
    adapter(site, code)
    with pytest.raises(PluginError) as caught:
        registry.load_part("adapter", "puddle")
    start = "adapter 'puddle' from acme-diffa (acme:Pool) failed to import: "
    assert str(caught.value).startswith(start + reason)
    assert caught.value.__cause__ is not None
    assert "pip install --force-reinstall acme-diffa" in str(caught.value)


def test_a_missing_extra_is_named(site):
    adapter(site, "import nowhere_to_be_found", "acme:Pool [fast]")
    assert registry.find_part("adapter", "puddle").extras == ("fast",)
    with pytest.raises(PluginError, match=r"pip install 'acme-diffa\[fast\]'"):
        registry.load_part("adapter", "puddle")


def test_a_broken_part_disturbs_no_other(site):
    adapter(site, "import nowhere_to_be_found")
    install(site, "good", {"adapter": {"good": "good:Pool"}}, {"good": POOL})
    registry.clear_scan()
    assert registry.load_part("adapter", "good").__name__ == "Pool"
    assert registry.load_part("sampler", "greedy").__name__ == "Greedy"


def test_a_target_that_is_not_there_is_named(site):
    adapter(site, POOL, "acme:Poll")
    with pytest.raises(PluginError, match=r"acme-diffa .* does not exist: acme has no 'Poll'"):
        registry.load_part("adapter", "puddle")
    adapter(site, "def Pool(source): ...")
    sys.modules.pop("acme", None)
    with pytest.raises(PluginError, match="is not a class"):
        registry.load_part("adapter", "puddle")


def part(*members: str, init: str = "") -> type:
    """A class with empty methods, attributes 'name = value', and a constructor."""
    lines = [f"    {m}" if "=" in m or ":" in m else f"    def {m}(self): ..." for m in members]
    lines += [f"    def __init__(self{init}): ..."] if init else []
    space: dict[str, type] = {}
    exec("class Pool:\n" + "\n".join(lines or ["    pass"]), space)
    return space["Pool"]


@pytest.mark.parametrize(
    ("kind", "members", "lacks"),
    [
        ("encoder", [], "__call__"),
        ("adapter", ["forward"], "out_lengths"),
        ("adapter", ["out_lengths"], "__call__"),
        ("backbone", ["forward", "embed"], "head"),
        ("backbone", ["forward", "head"], "embed"),
        ("objective", ["corrupt", "decoding = 'masked'"], "loss"),
        ("objective", ["loss", "decoding = 'masked'"], "corrupt"),
        ("objective", ["corrupt", "loss"], "decoding"),
        ("sampler", ["decoding = 'masked'"], "__call__"),
        ("sampler", ["__call__"], "decoding"),
    ],
)
def test_a_missing_member_is_named(kind, members, lacks):
    with pytest.raises(PluginError, match=rf"^{kind} Pool lacks {lacks}$"):
        registry.validate_part(kind, part(*members))


def test_an_attribute_may_be_declared_and_set_in_the_constructor():
    registry.validate_part("sampler", part("__call__", "decoding: str"))


def test_torchs_own_forward_is_no_forward():
    from torch import nn

    with pytest.raises(PluginError, match="lacks __call__"):
        registry.validate_part("encoder", type("Silent", (nn.Module,), {}))


def test_a_module_without_a_constructor_has_no_options():
    from torch import nn

    from diffa.spec.schema import read_schema

    plain = type("Plain", (nn.Module,), {"forward": lambda self, audio, lengths: audio})
    registry.validate_part("encoder", plain)
    assert read_schema(plain) == ((), {})


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (", source, *args", r"Pool takes \*args; name every parameter"),
        (", source, **kwargs", r"Pool takes \*\*kwargs"),
        (", source, widht", "asks for the wire 'widht', did you mean 'width'"),
        (", stride: int = 4", "options are keyword-only"),
        (", *, stride=4", "'stride' of Pool has no type"),
        (", *, stride: int", "'stride' of Pool has no default"),
        (", *, stride: int = 'four'", "default of .*'stride'.* expected int, got 'four'"),
        (", *, eps: float = float('inf')", "must be finite"),
        (", *, act: object = print", "default of .*'act'.* does not fit"),
        (", *, act: type = int", "has the type type, which JSON cannot hold"),
        (", *, act: 'Nowhere' = 1", "type of .*'act'.* cannot be read: name 'Nowhere'"),
        (", *, table: dict[int, str] = {}", "keys are not str"),
        (", *, name: str = 'x'", "a spec's 'name' names the part"),
    ],
)
def test_a_constructor_that_is_no_schema_is_refused(init, message):
    with pytest.raises(PluginError, match=message):
        registry.validate_part("adapter", part("forward", "out_lengths", init=init))


def test_a_contract_fault_names_package_and_target(site):
    adapter(site, POOL.replace("out_lengths", "lengths_out"))
    with pytest.raises(PluginError) as caught:
        registry.load_part("adapter", "puddle")
    assert str(caught.value) == (
        "adapter Pool lacks out_lengths; it is adapter 'puddle' from acme-diffa (acme:Pool)"
    )


def test_unreadable_metadata_hides_no_other_package_and_is_not_remembered(site):
    adapter(site, POOL)
    info = install(site, "torn", {"adapter": {"torn": "acme:Pool"}})
    good = (info / "METADATA").read_text()
    (info / "METADATA").write_text("Metadata-Version: 2.1\n")
    registry.clear_scan()
    assert "puddle" in registry.available("adapter")
    assert "torn-1.0.dist-info cannot be read" in registry.scan_faults()[0]
    (info / "METADATA").write_text(good)  # mended: found without a refresh
    assert "torn" in registry.available("adapter")
    assert registry.scan_faults() == ()


def test_a_failed_import_is_not_remembered(site):
    adapter(site, "raise OSError('disk')")
    with pytest.raises(PluginError):
        registry.load_part("adapter", "puddle")
    (site / "acme.py").write_text(POOL + "\n# mended\n")
    importlib.invalidate_caches()
    assert registry.load_part("adapter", "puddle").__name__ == "Pool"


def test_refresh_finds_what_was_installed_since(site):
    assert "puddle" not in registry.available("adapter")
    install(site, "acme-diffa", {"adapter": {"puddle": "acme:Pool"}}, {"acme": POOL})
    assert "puddle" not in registry.available("adapter")
    registry.clear_scan()
    assert "puddle" in registry.available("adapter")


def test_a_package_that_shows_twice_counts_once(site, tmp_path_factory, monkeypatch):
    second = tmp_path_factory.mktemp("editable")
    monkeypatch.syspath_prepend(str(second))
    for folder in (site, second):
        install(folder, "acme-diffa", {"adapter": {"puddle": "acme:Pool"}}, {"acme": POOL})
    registry.clear_scan()
    assert registry.find_part("adapter", "puddle").dist == "acme-diffa"


def test_groups_of_other_projects_are_left_alone(site):
    install(site, "other", {}, {})
    info = site / "other-1.0.dist-info"
    (info / "entry_points.txt").write_text("[diffa.widgets]\nx = y:Z\n[console_scripts]\na = b:c\n")
    registry.clear_scan()
    assert all("other" not in str(registry.list_parts(kind)) for kind in registry.KINDS)
