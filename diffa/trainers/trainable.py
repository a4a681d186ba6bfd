"""Which parts of a model a stage trains, and which of them are in training mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from diffa.assembly import make_part
from diffa.backbones.lora import enable_lora, lora_layers
from diffa.errors import SpecError
from diffa.model import Model
from diffa.spec.spec import Spec
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.distributed import full_tensors


def set_trainable(model: Model, names: Sequence[str]) -> None:
    """Let only the named parts require gradients.

    Args:
        model: The model.
        names: ``encoder``, ``adapters``, ``adapters.KEY``, ``backbone``, ``backbone.lora``.

    Raises:
        SpecError: A part has no weights.
    """
    model.requires_grad_(False)
    for name in names:
        part = model.get_submodule(name)
        if not any(True for _ in part.parameters()):
            raise SpecError(f"train: {name} has no weights to train")
        part.requires_grad_(True)
    enable_lora(model.backbone, True if "backbone.lora" in names else None)


def eval_frozen_parts(model: Model) -> None:
    """Set frozen parts to evaluation mode: no dropout, no running statistics.

    Of a part in which only LoRA is trained, the LoRA dropout alone is active.
    """
    for part in (model.encoder, model.backbone, *model.adapters.values()):
        trained = [name for name, p in part.named_parameters() if p.requires_grad]
        if any(".lora_" not in name for name in trained):
            continue
        set_eval_mode(part)
        for _, layer in lora_layers(part):
            layer.lora_dropout.train(bool(trained))


def set_eval_mode(part: nn.Module) -> None:
    """Set a part to evaluation mode; modules with gradient checkpointing keep it."""
    part.eval()
    for module in part.modules():
        if getattr(module, "gradient_checkpointing", False):  # they check ``training`` for it
            module.training = True


def trained_state(module: nn.Module, *, gather: bool = True) -> dict[str, Tensor]:
    """Return the trained parameters by name, and the buffers of the same modules.

    Args:
        module: The module.
        gather: Gather weights that are sharded over processes; all processes must call this.
    """
    state = module.state_dict()
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    owners = {name.rpartition(".")[0] for name in names}
    buffers = {name for name, _ in module.named_buffers() if name.rpartition(".")[0] in owners}
    trained = {key: value for key, value in state.items() if key in names | buffers}
    return full_tensors(trained) if gather else trained


def stage_model(model: Model, stage: StageConfig) -> Model:
    """Return a model with a stage's adapters, objective and trained parts; parts are shared."""
    data = model.spec.data
    if stage.adapters is not None:
        data["adapters"] = {key: data["adapters"][key] for key in stage.adapters}
    if stage.objective is not None:
        data["objective"] = stage.objective
    spec = Spec.read(data | {"train": list(stage.train)}).resolve()
    view = Model(
        encoder=model.encoder,
        adapters={key: model.adapters[key] for key in spec.data["adapters"]},
        backbone=model.backbone,
        sampler=model.sampler,
        objective=make_part(spec.parts()["objective"], vocab=model.backbone.vocab),
        spec=spec,
    )
    set_trainable(view, stage.train)
    return view


def num_trained(module: nn.Module) -> int:
    """Return the number of parameters that require gradients."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
