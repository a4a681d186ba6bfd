"""Check block-causal backbones against the reference numbers of a golden folder.

    python benchmarks/golden_block.py FOLDER...

Every tensor of ``expected.safetensors`` that is no input is compared: logits within 2e-3, losses
within 1e-3 relative, sequences exactly, with the stated forward counts. Prints ``FOLDER: N of M``
and what differs first; exits 0 where all hold, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import diffa
from diffa.canvas.training import compute_loss
from diffa.model import Model
from diffa.types import Noised

BACKBONES = {"sdar": "sdar", "llada2_moe": "llada2", "Fast_dLLM_Qwen": "fastdllm2"}
INPUTS = ("tokens", "values", "prompt", "masked", "states")
LOGITS, LOSS = 2e-3, 1e-3
SHOWN = 5  # failures that are printed


class Folder:
    """A golden folder: its models, cases and reference tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.expected = json.loads((path / "expected.json").read_text())
        self.cases: Mapping[str, dict[str, Any]] = self.expected["cases"]
        self.tensors = load_file(path / "expected.safetensors")
        self.config = json.loads((path / "config.json").read_text())
        self.kind = BACKBONES[self.config["model_type"]]

    def model(
        self, block: int, sampler: Mapping[str, Any] | None = None, eos: int | None = None
    ) -> Model:
        """Return the folder's model with blocks of a length."""
        return diffa.build({
            "format": 1,
            "backbone": {
                "name": self.kind, "checkpoint": str(self.path), "block_length": block,
                "mask_token_id": self.expected["mask_token_id"], "eos_token_id": eos,
            },
            "objective": "masked",
            "sampler": sampler or "blockwise",
        })  # fmt: skip

    def owner(self, name: str) -> str:
        """Return the case that a tensor belongs to; raises KeyError if there is none."""
        parts = name.split(".")
        for count in range(len(parts) - 1, 0, -1):
            if (case := ".".join(parts[:count])) in self.cases:
                return case
        return self.cases[parts[0]] and parts[0]

    def input(self, case: str, what: str) -> Tensor:
        """Return an input of a case, which several cases may share (``end0.prompt``)."""
        own = f"{case}.{what}"
        return self.tensors[own if own in self.tensors else f"{case.split('.')[0]}.{what}"]


def check(folder: Folder, name: str) -> str:
    """Compare one reference tensor; return what differs, empty if nothing does."""
    what = name.split(".")[-1] if not name.endswith(".losses.complement") else "complement"
    checks: dict[str, Callable[[Folder, str], str]] = {
        "logits": check_logits, "losses": check_losses, "complement": check_losses,
        "answer": check_answer, "experts": check_router, "weights": check_router,
        "output": check_router,
    }  # fmt: skip
    if what not in checks:
        return "no check is known for this name"
    return checks[what](folder, name)


def check_logits(folder: Folder, name: str) -> str:
    """Compare the logits of one pass."""
    case = folder.owner(name) if name.split(".")[0] in folder.cases else name.split(".")[0]
    model = folder.model(folder.cases[case]["block"])
    with torch.no_grad():
        if f"{case}.values" in folder.tensors:
            embeds = folder.tensors[f"{case}.values"]
        else:
            embeds = model.backbone.embed(folder.tensors[f"{case}.tokens"])
        error = float((model.logits(embeds[None])[0] - folder.tensors[name]).abs().max())
    return "" if error <= LOGITS else f"off by {error:.2e}"


def check_router(folder: Folder, name: str) -> str:
    """Compare the experts of a layer, their weights, and its output."""
    case, what = name.rsplit(".", 1)
    model = folder.model(32)
    layer: Any = model.get_submodule(
        f"backbone.transformer.blocks.{folder.cases[case]['layer']}.experts"
    )
    states, due = folder.tensors[f"{case}.states"], folder.tensors[name]
    with torch.no_grad():
        weights, experts = layer.route(states)
        experts, order = experts.sort(dim=-1)
        if what == "experts":
            return "" if torch.equal(experts, due.long()) else "other experts are chosen"
        ours = weights.gather(1, order) if what == "weights" else layer(states)
    error = float((ours - due).abs().max())
    return "" if error <= LOGITS else f"off by {error:.2e}"


def check_losses(folder: Folder, name: str) -> str:
    """Compare the losses of the masked tokens, and the scalar that the family computes."""
    case = name.split(".")[0]
    settings = folder.cases[case]
    tokens = folder.tensors[f"{case}.tokens"][None]
    masked = folder.tensors[f"{case}.masked"].bool()[None]
    answer = torch.arange(tokens.shape[1])[None] >= settings["prompt_length"]
    model = folder.model(settings["block"])
    views = [masked]
    if "complement" in settings:
        views.append(answer & ~masked)
    losses = [token_losses(model, tokens, answer, view) for view in views]
    own = losses[1] if name.endswith(".complement") else losses[0]
    due = folder.tensors[name]
    if own.shape != due.shape:
        return f"{len(own)} losses instead of {len(due)}"
    error = float(((own - due).abs() / due.abs().clamp(min=1.0)).max())
    if error > LOSS:
        return f"off by {error:.2e} relative"
    if folder.kind == "sdar":
        scalar = losses[0].sum() / settings["level"] / settings["answer_length"]
    else:
        scalar = torch.cat(losses).mean()
    error = abs(float(scalar) / settings["loss"] - 1)
    return "" if error <= LOSS else f"the loss is off by {error:.2e} relative"


def token_losses(model: Model, tokens: Tensor, answer: Tensor, masked: Tensor) -> Tensor:
    """Return the loss of each masked token, by ``Model.loss`` with given masks."""
    nll: list[Tensor] = []
    mask = model.backbone.vocab.mask

    class Given:
        """The objective that masks what the case masks, and keeps each token's loss."""

        decoding = "masked"

        def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
            noisy = torch.where(masked, mask, tokens)
            return Noised(noisy, masked, masked.float(), answer)

        def loss(
            self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
        ) -> tuple[Tensor, Tensor]:
            logits = head(hidden[noised.masked])
            own = logits.gather(1, tokens[noised.masked][:, None])[:, 0]
            nll.append(logits.logsumexp(dim=1) - own)
            return nll[0].sum(), noised.masked.sum()

    with torch.no_grad():
        objective: Any = Given()
        lengths = torch.tensor([tokens.shape[1]])
        compute_loss(model.backbone, objective, tokens, answer, lengths, lengths=lengths)
    return nll[0]


def check_answer(folder: Folder, name: str) -> str:
    """Compare a decoded sequence, and how many forward passes decided it."""
    case = name.removesuffix(".answer")
    if ".row" in case:
        return check_batch(folder, case)
    settings, due = folder.cases[case], folder.tensors[name].tolist()
    sampler, eos = sampler_of(folder.kind, case, settings)
    model = folder.model(settings["block"], sampler, eos)
    prompt = folder.input(case, "prompt")
    given: dict[str, Any] = {}
    if "audio" in settings:
        values = folder.input(case, "values")
        given = {"embeds": values, "audio_at": settings["audio_at"]}
    generation = model.generate(prompt, max_tokens=length_of(folder.kind, settings), **given)
    fault = compare(generation.tokens[0].tolist(), due, model)
    if fault:
        return fault
    if generation.num_forwards != settings["forwards"]:
        return f"{generation.num_forwards} forward passes instead of {settings['forwards']}"
    return ""


def check_batch(folder: Folder, case: str) -> str:
    """Compare one row of a batch that is decoded as a whole."""
    batch, row = case.split(".row")
    settings = folder.cases[batch]
    sampler, eos = sampler_of(folder.kind, case, settings)
    model = folder.model(settings["block"], sampler, eos)
    count = len(settings["prompt_lengths"])
    prompts = [folder.tensors[f"{batch}.row{i}.prompt"] for i in range(count)]
    generation = model.generate(prompts, max_tokens=max(settings["answers"]))
    due = folder.tensors[f"{case}.answer"].tolist()
    return compare(generation.tokens[int(row)].tolist()[: len(due)], due, model)


def compare(ours: list[int], due: list[int], model: Model) -> str:
    """Compare tokens as far as the original decides them.

    It leaves masks, or padding, behind the end of an answer, where diffa writes EOS.
    """
    vocab = model.backbone.vocab
    end = due.index(vocab.eos) + 1 if vocab.eos in due else len(due)
    decided = [i for i, token in enumerate(due) if i < end or token not in (vocab.mask, vocab.pad)]
    for place in decided:
        if place >= len(ours) or ours[place] != due[place]:
            found = ours[place] if place < len(ours) else None
            return f"token {place} is {found} instead of {due[place]}"
    return ""


def length_of(kind: str, settings: Mapping[str, Any]) -> int:
    """Return the tokens to ask for: up to the end of the last block that the original decodes."""
    prompt, block, length = (settings[k] for k in ("prompt_length", "block", "length"))
    if kind == "fastdllm2":
        return length // block * block - prompt % block + 1
    return -(-(prompt + length) // block) * block - prompt


def sampler_of(
    kind: str, case: str, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """Return the sampler that runs a case's loop, and the token that ends answers."""
    block, threshold = settings["block"], settings.get("threshold")
    if kind == "fastdllm2":
        small = settings["small_block"]
        return {
            "name": "blockwise", "block_length": small, "steps_per_block": small,
            "threshold": min(threshold, 1.0), "merge_commit": False,
            "cache": "dual" if settings["block_cache"] else "prefix",
            "eos_check": "block" if case.endswith(".sample") else "pass",
        }, settings.get("stop")  # fmt: skip
    if "editing_threshold" in settings:
        return {
            "name": "edit", "block_length": block, "threshold": threshold,
            "edit_threshold": settings["editing_threshold"],
            "max_post_steps": settings["max_post_steps"],
            "num_to_transfer": settings["num_to_transfer"],
            "stop_at_eos": settings.get("eos_early_stop", False),
        }, settings.get("eos")  # fmt: skip
    steps = settings["steps"]
    if kind == "llada2":
        steps = min(steps, settings["length"] // settings["minimal_topk"])
    rule = {"name": "blockwise", "block_length": block, "steps_per_block": steps, "cache": "prefix"}
    if settings.get("loop") == "sequential":
        rule["ranking"] = "left_to_right"
    elif settings.get("loop") != "static":
        rule["threshold"] = threshold
    rule["confidence_temperature"] = settings.get("temperature", 1.0)
    rule["eos_check"] = "written" if settings.get("eos_early_stop") else "block"
    return rule, settings.get("stop", settings.get("eos"))


def run(path: Path) -> tuple[int, list[str]]:
    """Return how many reference tensors a folder has, and what differs in those that fail."""
    folder = Folder(path)
    names = [n for n in sorted(folder.tensors) if n.split(".")[-1] not in INPUTS]
    faults = []
    for name in names:
        try:
            fault = check(folder, name)
        except Exception as error:  # a fault in one case must not hide the others
            fault = f"{type(error).__name__}: {error}"
        if fault:
            faults.append(f"{name}: {fault}")
    return len(names), faults


def main() -> int:
    """Check the folders of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    failed = False
    for path in parser.parse_args().folders:
        total, faults = run(path)
        print(f"{path}: {total - len(faults)} of {total}")
        for fault in faults[:SHOWN]:
            print(f"  {fault}")
        failed = failed or bool(faults) or not total
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
