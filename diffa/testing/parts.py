"""What every kind of part must keep to: its schema, its weights, its determinism."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn

from diffa.errors import suggest
from diffa.spec import registry
from diffa.spec.schema import coerce, read_schema

HEAVY = ("transformers", "torchaudio", "timm", "xformers", "peft", "accelerate", "datasets")
"""Packages that are slow or fragile to import: a part imports them inside its constructor."""


class PartSuite:
    """Checks of any kind of part.

    Attributes:
        name: the part's entry point; or
        part: its class.
        options: what a spec would set.
    """

    kind: ClassVar[str]
    name: ClassVar[str | None] = None
    part: ClassVar[type[Any] | None] = None
    options: ClassVar[Mapping[str, Any]] = {}

    @property
    def cls(self) -> type[Any]:
        """The part's class."""
        if self.part is not None:
            return self.part
        if self.name is None:
            raise AssertionError(f"{type(self).__name__} sets neither `name` nor `part`")
        return registry.load_part(self.kind, self.name)

    def make(self, options: Mapping[str, Any] | None = None, **wires: Any) -> Any:
        """Construct the part with the suite's options, ``options`` on top, and its wires."""
        cls = self.cls
        wanted = {wire: wires[wire] for wire in read_schema(cls).wires}
        with seeded(0):
            return cls(**wanted, **{**self.options, **(options or {})})

    def test_the_constructor_is_a_schema(self) -> None:
        """Wires by position, options by keyword with types and JSON defaults, every member."""
        registry.validate_part(self.kind, self.cls)
        defaults = {name: option.default for name, option in read_schema(self.cls).options.items()}
        json.dumps(defaults, allow_nan=False)

    def test_the_given_options_are_declared(self) -> None:
        """Nothing is set that the constructor does not declare, and every value has its type."""
        known, faults = read_schema(self.cls).options, []
        for name, value in self.options.items():
            if name not in known:
                faults.append(f"{name}: undeclared option{suggest(name, known)}")
            else:
                coerce(value, known[name].hint, name, lambda at, why: faults.append(f"{at}: {why}"))
        ensure(not faults, "; ".join(faults))

    def test_importing_it_is_light(self) -> None:
        """Its module imports no heavy package at the top."""
        heavy = sorted(set(_imported(self.cls.__module__)) & set(HEAVY))
        ensure(not heavy, f"{self.cls.__module__} imports {heavy} at the top: import it inside")


class ModuleSuite(PartSuite):
    """Checks of a part that is an ``nn.Module``; a kind says how to build and how to run one.

    Attributes:
        idle: patterns of weights that rightly get no gradient, such as ``*.key.bias`` under a
            softmax.
        rounding: largest relative error of bfloat16 against float32; infinite where rounding may
            change a choice, so that the numbers cannot be compared.
    """

    idle: ClassVar[Sequence[str]] = ()
    rounding: ClassVar[float] = 0.1

    def new(self) -> Any:
        """Build the part with the wires of its kind."""
        raise NotImplementedError

    def run(self, part: Any) -> Tensor:
        """Everything the part says about a fixed input, as one flat tensor."""
        raise NotImplementedError

    def test_weights_survive_saving(self) -> None:
        """Another copy that loads the saved weights says exactly the same."""
        first = stirred(self.new()).eval()
        state = {key: value.detach().clone() for key, value in first.state_dict().items()}
        second = self.new()
        second.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))
        with torch.no_grad():
            same = torch.equal(self.run(first), self.run(second.eval()))
        ensure(same, "a copy with the same saved weights says something else: is anything random "
               "or learned kept outside of the parameters and buffers?")  # fmt: skip

    def test_eval_is_deterministic(self) -> None:
        """In ``eval`` nothing is drawn: not from torch's global generator, not anywhere else."""
        part = self.new().eval()
        with torch.no_grad(), seeded(1):
            first = self.run(part)
            state = torch.get_rng_state()
            again = self.run(part)
            ensure(torch.equal(state, torch.get_rng_state()), "eval draws random numbers")
        ensure(torch.equal(first, again), "two passes in eval differ")

    def test_bfloat16_agrees_with_float32(self) -> None:
        """A copy in bfloat16 runs and differs by its rounding only."""
        exact, rounded = self.new().eval(), self.new().eval().to(torch.bfloat16)
        with torch.no_grad():
            expected, found = self.run(exact).float(), self.run(rounded).float()
        ensure(found.isfinite().all(), "bfloat16 gives numbers that are not finite")
        if self.rounding == float("inf"):
            return
        ensure(found.shape == expected.shape, "bfloat16 gives another number of values")
        error = float((found - expected).norm() / expected.norm().clamp(min=1e-9))
        ensure(error < self.rounding, f"bfloat16 is {error:.2g} of the norm off")

    def test_gradient_reaches_every_trainable_weight(self) -> None:
        """Every weight that asks for a gradient gets one that is finite and not all zero."""
        part = stirred(self.new()).train()
        said = self.run(part)
        mix = torch.randn(said.shape, generator=torch.Generator().manual_seed(3))
        torch.autograd.backward((said.float() * mix).sum())
        dead = []
        for name, weight in part.named_parameters():
            if not weight.requires_grad or any(fnmatch.fnmatch(name, p) for p in self.idle):
                continue
            if weight.grad is None or not weight.grad.isfinite().all() or not weight.grad.any():
                dead.append(name)
        ensure(not dead, f"no usable gradient reaches {', '.join(dead)}")

    def test_a_dry_run_takes_no_memory(self) -> None:
        """Under ``torch.device("meta")`` every weight stays on meta, and none is missing."""
        with torch.device("meta"):
            part = self.new()
        real = [name for name, value in part.state_dict().items() if not value.is_meta]
        ensure(not real, f"a dry run allocates {', '.join(real)}")
        shapes = {name: tuple(value.shape) for name, value in self.new().state_dict().items()}
        dry = {name: tuple(value.shape) for name, value in part.state_dict().items()}
        ensure(shapes == dry, "a dry run has other weights than a real one")


def failures(suite: type[PartSuite]) -> dict[str, str]:
    """Run a suite without pytest; return which checks failed and why."""
    found = {}
    for name in [name for name in dir(suite) if name.startswith("test_")]:
        try:
            getattr(suite(), name)()
        except Exception as error:  # a fault of any kind is what is looked for
            found[name] = f"{type(error).__name__}: {error}"
    return found


def ensure(condition: bool | Tensor, message: str) -> None:
    """Raise AssertionError with a message unless the condition holds, also under ``python -O``."""
    if not bool(condition):
        raise AssertionError(message)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors agree to a share of the larger one's size."""
    if found.shape != expected.shape:
        return False
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return torch.allclose(found.float(), expected.float(), rtol=0, atol=tolerance * scale)


class seeded:
    """A block in which torch's global generator starts from ``seed``; it is put back after."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._before)


def noise(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def stirred(part: nn.Module) -> nn.Module:
    """Move every weight a little, so that what begins at zero or one hides nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in part.state_dict().values():
            if value.is_floating_point():  # upwards alone: a variance has to stay positive
                value += 0.02 * torch.rand(value.shape, generator=generator)
    return part


def _imported(module: str) -> Iterator[str]:
    """Names of the packages that a module imports at its top."""
    spec = importlib.util.find_spec(module) if module not in sys.modules else None
    path = spec.origin if spec else getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
