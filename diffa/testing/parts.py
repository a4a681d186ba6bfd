"""Checks for every kind of part: schema, weights, determinism."""

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
from diffa.runtime.imports import imports_on_cpu
from diffa.spec import registry
from diffa.spec.schema import coerce, read_schema

HEAVY = ("transformers", "torchaudio", "timm", "xformers", "peft", "accelerate", "datasets")
"""Packages that are slow or fragile to import: import them inside the constructor."""


class PartSuite:
    """Checks of any kind of part.

    Attributes:
        name: The part's entry point, or
        part: its class.
        options: Options that a spec would set.
    """

    kind: ClassVar[str]
    name: ClassVar[str | None] = None
    part: ClassVar[type[Any] | None] = None
    options: ClassVar[Mapping[str, Any]] = {}

    @property
    def cls(self) -> type[Any]:
        """Return the part's class."""
        if self.part is not None:
            return self.part
        if self.name is None:
            raise AssertionError(f"{type(self).__name__} sets neither `name` nor `part`")
        return registry.load_part(self.kind, self.name)

    def make(self, options: Mapping[str, Any] | None = None, **wires: Any) -> Any:
        """Build the part from the suite's options, overridden by ``options``, and its wires."""
        cls = self.cls
        needed = {wire: wires[wire] for wire in read_schema(cls).wires}
        with seeded(0):
            return cls(**needed, **{**self.options, **(options or {})})

    def test_the_constructor_is_a_schema(self) -> None:
        """Wires are positional, options are typed keywords with JSON defaults, members exist."""
        registry.validate_part(self.kind, self.cls)
        defaults = {name: option.default for name, option in read_schema(self.cls).options.items()}
        json.dumps(defaults, allow_nan=False)

    def test_the_given_options_are_declared(self) -> None:
        """The constructor declares every option that the suite sets, with its type."""
        known, faults = read_schema(self.cls).options, []
        for name, value in self.options.items():
            if name not in known:
                faults.append(f"{name}: undeclared option{suggest(name, known)}")
            else:
                coerce(value, known[name].hint, name, lambda at, why: faults.append(f"{at}: {why}"))
        ensure(not faults, "; ".join(faults))

    def test_importing_it_is_light(self) -> None:
        """The part's module imports no heavy package at its top level."""
        heavy = sorted(set(_imported(self.cls.__module__)) & set(HEAVY))
        ensure(
            not heavy,
            f"{self.cls.__module__} imports {heavy} at its top level: import it in the constructor",
        )


class ModuleSuite(PartSuite):
    """Checks of a part that is an ``nn.Module``; subclasses define ``new`` and ``run``.

    Attributes:
        idle: Patterns of weights that get no gradient by design, such as ``*.key.bias`` under a
            softmax.
        rounding: Largest relative error of bfloat16 against float32. Infinite where rounding may
            change a discrete choice.
    """

    idle: ClassVar[Sequence[str]] = ()
    rounding: ClassVar[float] = 0.1

    def new(self) -> Any:
        """Build the part with the wires of its kind."""
        raise NotImplementedError

    def run(self, part: Any) -> Tensor:
        """Return all outputs for a fixed input as one flat tensor."""
        raise NotImplementedError

    def test_weights_survive_saving(self) -> None:
        """A copy that loads the saved weights has exactly the same output."""
        first = perturbed(self.new()).eval()
        state = {key: value.detach().clone() for key, value in first.state_dict().items()}
        second = self.new()
        second.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))
        with torch.no_grad():
            same = torch.equal(self.run(first), self.run(second.eval()))
        ensure(same, "a copy with the same saved weights has another output: is anything random "
               "or learned kept outside the parameters and buffers?")  # fmt: skip

    def test_eval_is_deterministic(self) -> None:
        """In eval mode the output is the same every time and uses no random numbers."""
        part = self.new().eval()
        with torch.no_grad(), seeded(1):
            first = self.run(part)
            state = torch.get_rng_state()
            again = self.run(part)
            ensure(
                torch.equal(state, torch.get_rng_state()), "eval mode uses torch's global generator"
            )
        ensure(torch.equal(first, again), "two passes in eval mode differ")

    def test_bfloat16_agrees_with_float32(self) -> None:
        """A bfloat16 copy runs and differs by rounding only."""
        exact, rounded = self.new().eval(), self.new().eval().to(torch.bfloat16)
        with torch.no_grad():
            expected, values = self.run(exact).float(), self.run(rounded).float()
        ensure(values.isfinite().all(), "bfloat16 gives values that are not finite")
        if self.rounding == float("inf"):
            return
        ensure(values.shape == expected.shape, "bfloat16 gives another number of values")
        error = float((values - expected).norm() / expected.norm().clamp(min=1e-9))
        ensure(error < self.rounding, f"bfloat16 differs by {error:.2g} of the norm")

    def test_gradient_reaches_every_trainable_weight(self) -> None:
        """Every trainable weight gets a finite gradient that is not all zero."""
        part = perturbed(self.new()).train()
        output = self.run(part)
        mix = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        torch.autograd.backward((output.float() * mix).sum())
        dead = []
        for name, weight in part.named_parameters():
            if not weight.requires_grad or any(fnmatch.fnmatch(name, p) for p in self.idle):
                continue
            if weight.grad is None or not weight.grad.isfinite().all() or not weight.grad.any():
                dead.append(name)
        ensure(not dead, f"no usable gradient reaches {', '.join(dead)}")

    def test_a_dry_run_takes_no_memory(self) -> None:
        """Under ``torch.device("meta")`` all weights exist and stay on meta."""
        with torch.device("meta"), imports_on_cpu():
            part = self.new()
        real = [name for name, value in part.state_dict().items() if not value.is_meta]
        ensure(not real, f"a dry run allocates {', '.join(real)}")
        shapes = {name: tuple(value.shape) for name, value in self.new().state_dict().items()}
        dry = {name: tuple(value.shape) for name, value in part.state_dict().items()}
        ensure(shapes == dry, "weights on the meta device differ from real ones")


def failures(suite: type[PartSuite]) -> dict[str, str]:
    """Run a suite without pytest; return the failed checks and their errors."""
    errors = {}
    for name in [name for name in dir(suite) if name.startswith("test_")]:
        try:
            getattr(suite(), name)()
        except Exception as error:  # any exception is a failed check
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def ensure(condition: bool | Tensor, message: str) -> None:
    """Raise AssertionError unless the condition holds, also under ``python -O``."""
    if not bool(condition):
        raise AssertionError(message)


def close(values: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Return whether two tensors agree to a tolerance relative to the largest expected value."""
    if values.shape != expected.shape:
        return False
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return torch.allclose(values.float(), expected.float(), rtol=0, atol=tolerance * scale)


class seeded:
    """Context manager: seed torch's global generator, and restore it afterwards."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._before)


def noise(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers that depend on shape and seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def perturbed(part: nn.Module) -> nn.Module:
    """Change every weight a little: weights initialised to 0 or 1 would hide faults."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in part.state_dict().values():
            if value.is_floating_point():  # only upwards: variances stay positive
                value += 0.02 * torch.rand(value.shape, generator=generator)
    return part


def _imported(module: str) -> Iterator[str]:
    """Yield the packages that a module imports at its top level."""
    spec = importlib.util.find_spec(module) if module not in sys.modules else None
    path = spec.origin if spec else getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
