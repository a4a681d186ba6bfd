"""Plant faults in the mathematics and see that a test fails: python benchmarks/mutants.py.

Every line of the functions in ``TARGETS`` is changed by rule, one change at a time: comparisons
are flipped, numbers shifted by one, signs and operators exchanged, clauses dropped, arguments
swapped, orders reversed. Each mutant runs in a forked process against the slow references of its
module, which repeat it with plain loops; it is killed when one of these tests fails. ``EQUIVALENT``
lists the mutants that change nothing, with the reason. The mutants planted by hand in
tests/properties/test_remasking_mutations.py and tests/testing/test_planted_faults.py are counted
too: those tests pass when their mutant is killed. Writes benchmarks/results/mutants.json and exits
with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
TIMEOUT = 60  # seconds; a mutant that never ends is killed
SAMPLERS = "tests/samplers/test_sampler_reference.py"
OBJECTIVES = "tests/objectives/test_objective_reference.py"


class Target(NamedTuple):
    """Functions of a module, the test file that guards them, and name parts of the first tests."""

    module: str
    functions: tuple[str, ...]
    tests: str
    first: tuple[str, ...] = ()


TARGETS = {
    "schedule": [
        Target(
            "diffa.samplers.transfer_schedule", ("num_transfer_tokens", "steps_per_block"),
            SAMPLERS, ("steps_are", "evenly"),
        ),
        Target(
            "diffa.objectives.schedules",
            ("_linear", "_cosine", "_polynomial", "_geometric", "floor_level"),
            OBJECTIVES, ("schedules", "floor"),
        ),
    ],
    "objective": [
        Target(
            "diffa.objectives.masking",
            ("answer_blocks", "mask_bernoulli", "mask_count", "mask_complementary",
             "rank_in_block"),
            OBJECTIVES, ("divided", "masks_and"),
        ),
        Target(
            "diffa.objectives.masked", ("Masked._draw", "Masked._noised", "Masked.measure"),
            OBJECTIVES, ("corruption", "certainty"),
        ),
        Target("diffa.objectives.measure", ("reduce_losses",), OBJECTIVES, ("reduced",)),
        Target("diffa.objectives.time_sampling", ("sample_times",), OBJECTIVES, ("time",)),
        Target("diffa.objectives.cart", ("cart_weights",), OBJECTIVES, ("cart",)),
    ],
    "prediction": [
        Target(
            "diffa.samplers.predictions",
            ("exclude_mask", "predict", "entropy_of", "token_probability"),
            SAMPLERS, ("predictions", "mask_is", "entropy"),
        ),
        Target("diffa.samplers.rng", ("sample_categorical",), SAMPLERS, ("sampling",)),
    ],
    "selection": [
        Target(
            "diffa.samplers.selection",
            ("select_top_k", "select_threshold", "select_factor", "select_entropy_bound",
             "select_klass", "select_local_leap", "select_runs", "select_capped", "_best",
             "_sort_descending", "_unsort"),
            SAMPLERS, ("rules", "together"),
        ),
    ],
    "slots": [
        Target(
            "diffa.samplers.blocks",
            ("BlockTracker.current", "block_slots", "drop_padding", "fill_after_eos",
             "make_step"),
            SAMPLERS, ("rows_follow", "padding", "eos", "final"),
        ),
    ],
    "guidance": [
        Target("diffa.samplers.predictions", ("apply_cfg",), SAMPLERS, ("guidance",)),
        Target("diffa.canvas.canvas", ("Canvas.add_unconditional",), SAMPLERS, ("twin",)),
    ],
    "caches": [
        Target(
            "diffa.samplers.recompute",
            ("BlockCache.__call__", "SuffixWindow.__call__", "AudioRefresh.__call__",
             "DriftRefresh.__init__", "DriftRefresh.__call__", "RecomputeSlots.__call__"),
            SAMPLERS, ("caches", "suffix", "audio", "drift", "pass"),
        ),
    ],
}  # fmt: skip

# "function: line of the source -> line of the mutant": why no test can tell them apart.
EQUIVALENT: dict[str, str] = {
    "predict: best = logits.gather(-1, tokens[..., None])[..., 0] -> "
    "best = logits.gather(-1, tokens[..., None])[..., -1]":
        "The dimension has one entry.",
    "token_probability: own = logits.gather(-1, tokens[..., None])[..., 0] -> "
    "own = logits.gather(-1, tokens[..., None])[..., -1]":
        "The dimension has one entry.",
    "predict: top = (logits.topk(2, dim=-1).values - log_total[..., None]).exp() -> "
    "top = (logits.topk(3, dim=-1).values - log_total[..., None]).exp()":
        "Only the first two are read.",
    "predict: top = (logits.topk(2, dim=-1).values - log_total[..., None]).exp() -> "
    "top = (logits.topk(2, dim=-1).values - log_total[..., None]).expm1()":
        "The difference of two probabilities is that of both minus 1.",
    "entropy_of: return -(log_probs.exp() * log_probs.clamp(min=-10000.0)).sum(dim=-1) -> "
    "return -(log_probs.exp() * log_probs.clamp(min=-10001.0)).sum(dim=-1)":
        "exp() is 0 at both bounds.",
    "entropy_of: return -(log_probs.exp() * log_probs.clamp(min=-10000.0)).sum(dim=-1) -> "
    "return -(log_probs.exp() * log_probs.clamp(min=-9999.0)).sum(dim=-1)":
        "exp() is 0 at both bounds.",
    "_sort_descending: return scores.masked_fill(~masked, -torch.inf).sort("
    "dim=1, descending=True, stable=True) -> return scores.masked_fill(~masked, -torch.inf).sort("
    "dim=1, descending=True, stable=False)":
        "torch sorts stably on a CPU. On a GPU, ties would have no fixed order.",
    "drop_padding: order = (slots < 0).sort(dim=1, stable=True).indices[:, :longest] -> "
    "order = (slots < 0).sort(dim=1, stable=False).indices[:, :longest]":
        "torch sorts stably on a CPU, and on a GPU the function returns before.",
    "drop_padding: if slots.is_cuda: -> if False:": "The tests run on a CPU.",
    "RecomputeSlots.__call__: "
    "slots = (~recompute).sort(dim=1, stable=True).indices[:, :longest] -> "
    "slots = (~recompute).sort(dim=1, stable=False).indices[:, :longest]":
        "torch sorts stably on a CPU. On a GPU, slots would have no fixed order.",
    "rank_in_block: return keys.argsort(stable=True, dim=1).argsort(dim=1) - blocks.first -> "
    "return keys.argsort(stable=False, dim=1).argsort(dim=1) - blocks.first":
        "torch sorts stably on a CPU. On a GPU, ties would have no fixed order.",
    "Masked._draw: masked, weight = mask_bernoulli(floor_level(level, self.eps), draws, answer) -> "
    "masked, weight = mask_bernoulli(floor_level(self.eps, level), draws, answer)":
        "level + eps - level eps is symmetric; only the rounding differs.",
    "Masked._noised: if self.eos_weight != 1.0: -> if self.eos_weight != 0.0:":
        "Weights times 1 are the weights.",
    "Masked.measure: if not self.certainty_weight: -> if False:":
        "Adds 0 times the entropy.",
    "reduce_losses: shares = noised.answer / lengths.clamp(min=1) -> "
    "shares = noised.answer / lengths.clamp(min=0)":
        "Rows without an answer have no masked token that would read the NaN.",
    "sample_times: bits = shift_right(seeds.to(torch.int64) * GOLDEN_GAMMA + _HALF, 41) -> "
    "bits = shift_right(seeds.to(torch.int64) * GOLDEN_GAMMA - _HALF, 41)":
        "2^63 is its own negative in 64 bits.",
    "cart_weights: size = max(int(answer.sum(dim=1).max()), 1) -> "
    "size = max(int(answer.sum(dim=1).max()), 2)":
        "Another column that no token reads.",
}  # fmt: skip

BY_HAND = ("tests/properties/test_remasking_mutations.py", "tests/testing/test_planted_faults.py")

FLIPS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
NAMES = {
    "argmax": "argmin", "amax": "amin", "max": "min", "min": "max", "amin": "amax", "any": "all",
    "all": "any", "ones_like": "zeros_like", "zeros_like": "ones_like", "ceil": "floor",
    "floor": "ceil", "cumsum": "cumprod", "exp": "expm1", "sin": "cos", "cos": "sin",
}  # fmt: skip


class Mutant(NamedTuple):
    """One change of one function."""

    group: str
    target: Target
    function: str
    key: str
    code: Any


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield replacements of one node of a function."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in FLIPS:
            yield ast.Compare(node.left, [FLIPS[type(op)]()], node.comparators)
        case ast.Constant(value=bool() as flag):
            yield ast.Constant(not flag)
        case ast.Constant(value=int() | float() as number):
            yield ast.Constant(number + 1)
            yield ast.Constant(number - 1)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            yield node.left
            yield node.right
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(op)](), node.right)
        case ast.BoolOp():
            yield from node.values
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield node.operand
        case ast.IfExp():
            yield ast.IfExp(node.test, node.orelse, node.body)
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in NAMES:
            yield ast.Call(ast.Attribute(value, NAMES[name], ast.Load()), node.args, node.keywords)
        case ast.Call(
            func=ast.Name(id="min" | "max") | ast.Attribute(attr="promote_types" | "equal")
        ):
            return  # their arguments have no order
        case ast.Call(args=[first, second, *rest]):
            if not rest or not isinstance(node.func, ast.Attribute) or node.func.attr != "where":
                yield ast.Call(node.func, [second, first, *rest], node.keywords)
            else:  # torch.where(condition, a, b)
                yield ast.Call(node.func, [first, rest[0], second], node.keywords)
        case ast.AugAssign(op=ast.BitAnd() | ast.BitOr()):
            yield ast.Assign([node.target], node.value, lineno=node.lineno)
            yield ast.Pass()
        case ast.If(orelse=[]):
            yield ast.If(ast.Constant(False), node.body, [])


class _Replace(ast.NodeTransformer):
    """Replace one node of a tree."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        """Return the replacement, or the node with its children visited."""
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def mutants_of(group: str, target: Target, name: str) -> Iterator[Mutant]:
    """Yield every mutant of a function by rule."""
    function = resolve(target, name)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for argument in [*definition.args.args, *definition.args.kwonlyargs]:
        argument.annotation = None
    body = [part for part in definition.body if not _is_docstring(part)]
    original = ast.unparse(tree).splitlines()
    for index, node in enumerate(ast.walk(ast.Module(body, []))):
        if _annotation(node):
            continue
        for number, _ in enumerate(changes(node)):
            copied = copy.deepcopy(tree)
            parts = [p for p in copied.body[0].body if not _is_docstring(p)]  # type: ignore[attr-defined]
            same = list(ast.walk(ast.Module(parts, [])))[index]
            new = list(changes(same))[number]
            changed = ast.fix_missing_locations(_Replace(same, new).visit(copied))
            lines = ast.unparse(changed).splitlines()
            before, after = _difference(original, lines)
            if before == after:
                continue
            key = f"{name}: {before} -> {after}"
            yield Mutant(group, target, name, key, _code(changed, function))


def resolve(target: Target, name: str) -> Any:
    """Return a function of a module, or a method of one of its classes."""
    found: Any = importlib.import_module(target.module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _annotation(node: ast.AST) -> bool:
    """Messages of errors are no mathematics."""
    return isinstance(node, ast.JoinedStr | ast.FormattedValue | ast.Raise)


def _difference(before: list[str], after: list[str]) -> tuple[str, str]:
    """Return the lines that differ, joined, without common lines at the start and the end."""
    first = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    last = next(
        (i for i, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b), 0
    )
    old = before[first : len(before) - last]
    new = after[first : len(after) - last]
    return " ".join(map(str.strip, old)), " ".join(map(str.strip, new))


def _code(tree: ast.AST, function: Any) -> Any:
    """Compile the changed definition and return its code object."""
    module = compile(tree, f"<mutant of {function.__name__}>", "exec", dont_inherit=True)
    return next(c for c in module.co_consts if inspect.iscode(c))


@functools.cache
def load_tests(path: str) -> dict[str, Any]:
    """Import a test file by its path; return its members."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def tests_of(target: Target) -> list[Any]:
    """Return the tests that guard a target; they take no arguments."""
    members = load_tests(target.tests)
    names = [name for name in members if name.startswith("test_")]
    late = [name for name in names if not any(part in name for part in target.first)]
    return [members[name] for name in [*(n for n in names if n not in late), *late]]


def survives(mutant: Mutant) -> bool:
    """Run the mutant's tests in a forked process; return whether all of them pass."""
    child = os.fork()
    if not child:
        os.nice(10)
        signal.alarm(TIMEOUT)
        # Code objects are exchanged in place: names imported elsewhere see the mutant as well.
        resolve(mutant.target, mutant.function).__code__ = mutant.code
        try:
            for test in tests_of(mutant.target):
                test()
        except BaseException:  # whatever a mutant raises, it is noticed
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


class _Count:
    """A pytest plugin that counts the tests that passed and failed."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, list[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count one test."""
        if report.when == "call" and report.passed:
            self.passed += 1
        elif report.failed:
            self.failed.append(report.nodeid)


def main() -> None:
    """Plant every mutant, print the survivors, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=TARGETS, help="Only this group; writes no file.")
    parser.add_argument("--list", action="store_true", help="Print the mutants, run nothing.")
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.set_num_threads(1)  # a fork must not inherit threads
    sys.path.insert(0, str(ROOT / "tests"))
    mutants = [
        mutant
        for group, targets in TARGETS.items()
        if options.group in (None, group)
        for target in targets
        for name in target.functions
        for mutant in mutants_of(group, target, name)
    ]
    if options.list:
        print("\n".join(f"{mutant.group}  {mutant.key}" for mutant in mutants))
        print(len(mutants))
        return
    for path in (SAMPLERS, OBJECTIVES):  # before any fork: the code as it is passes
        for name, test in load_tests(path).items():
            if name.startswith("test_"):
                test()
    groups: dict[str, dict[str, int]] = {}
    survivors, equivalent = [], {}
    for mutant in mutants:
        counts = groups.setdefault(mutant.group, {"killed": 0, "equivalent": 0, "survived": 0})
        if mutant.key in EQUIVALENT:
            counts["equivalent"] += 1
            equivalent[mutant.key] = EQUIVALENT[mutant.key]
        elif survives(mutant):
            counts["survived"] += 1
            survivors.append(mutant.key)
            print(f"SURVIVED  {mutant.group}  {mutant.key}", flush=True)
        else:
            counts["killed"] += 1
    if options.group is None:
        by_hand = _Count()
        pytest.main(["-q", "--tb=no", *(str(ROOT / t) for t in BY_HAND)], plugins=[by_hand])
        survivors += by_hand.failed
        groups["by hand"] = {
            "killed": by_hand.passed, "equivalent": 0, "survived": len(by_hand.failed),
        }  # fmt: skip
        report = {
            "command": "python benchmarks/mutants.py",
            "seconds": round(time.perf_counter() - begin),
            "mutants": sum(sum(counts.values()) for counts in groups.values()),
            "rows": [{"module": name, **counts} for name, counts in groups.items()],
            "survivors": survivors,
            "equivalent": equivalent,
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    for name, counts in groups.items():
        print(f"{name:12s} {counts}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
