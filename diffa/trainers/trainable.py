"""Which parts of a model learn in a stage, and how they behave while they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffa.assembly import make_part
from diffa.backbones.lora import enable_lora, lora_layers
from diffa.errors import SpecError
from diffa.model import Model
from diffa.spec.spec import Spec
from diffa.trainers.config_sections import Stage
from diffa.trainers.distributed import whole

# what says that a module recomputes activations: diffa's Transformer, transformers' layers
_CHECKPOINTING = ("checkpointing", "gradient_checkpointing")


def release(model: Any, names: Sequence[str]) -> None:
    """Let the named parts learn (``adapters``, ``adapters.KEY``, ``backbone``, ``encoder``)."""
    model.requires_grad_(False)
    for name in names:
        part = model.get_submodule(name)
        if not any(True for _ in part.parameters()):
            raise SpecError(f"train: {name} has no weights that could learn")
        part.requires_grad_(True)
    enable_lora(model.backbone, True if "backbone.lora" in names else None)


def quieten(model: Any) -> None:
    """Put parts that do not learn in evaluation mode: no dropout, no running statistics."""
    for part in (model.encoder, model.backbone, *model.adapters.values()):
        learns = [name for name, p in part.named_parameters() if p.requires_grad]
        if any(".lora_" not in name for name in learns):
            continue
        still(part)
        for _, layer in lora_layers(part):
            layer.lora_dropout.train(bool(learns))


def still(part: nn.Module) -> None:
    """Put a part in evaluation mode, but let it recompute activations in the backward pass."""
    part.eval()
    for module in part.modules():
        if any(getattr(module, name, False) for name in _CHECKPOINTING):  # which asks the mode
            module.training = True


def learned(module: nn.Module, *, gather: bool = True) -> dict[str, Tensor]:
    """Return what learns by name, buffers of the same modules included.

    Weights that are split over processes are gathered, which all of them do together, unless
    ``gather`` says not to.
    """
    state = module.state_dict()
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    owners = {name.rpartition(".")[0] for name in names}
    buffers = {name for name, _ in module.named_buffers() if name.rpartition(".")[0] in owners}
    kept = {key: value for key, value in state.items() if key in names | buffers}
    return whole(kept) if gather else kept


def staged(model: Model, stage: Stage) -> Model:
    """Return the model as a stage sees it: its adapters, its objective, what learns; all shared."""
    data = model.spec.data
    if stage.adapters is not None:
        data["adapters"] = {key: data["adapters"][key] for key in stage.adapters}
    if stage.objective is not None:
        data["objective"] = stage.objective
    spec = Spec.read(data | {"train": list(stage.train)}).resolve()
    seen = Model(
        encoder=model.encoder,
        adapters={key: model.adapters[key] for key in spec.data["adapters"]},
        backbone=model.backbone,
        sampler=model.sampler,
        objective=make_part(spec.parts()["objective"], vocab=model.backbone.vocab),
        spec=spec,
    )
    release(seen, stage.train)
    return seen


def count(module: nn.Module, *, learning: bool = False) -> int:
    """Return how many parameters there are, or how many learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)
