"""The stand-in for a GPU refuses and counts what a GPU does."""

import pytest
import torch
from torch.nn import functional as F

from diffa.testing.device import StandInDevice


@pytest.fixture
def device():
    with StandInDevice() as made:
        yield made


def test_operands_of_two_devices_are_refused(device):
    x = torch.ones(3, device="cuda:0")
    assert x.is_cuda and x.device == torch.device("cuda:0")
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number of the CPU is taken
    for mixed in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3)[x.long()],
        lambda: torch.cat([x, torch.ones(3)]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.Linear(3, 3)(x)


def test_launches_are_operators_that_are_no_views(device):
    x = torch.ones(2, 3, device="cuda:0")
    device.reset()
    x.view(6)[1:].unsqueeze(0).expand(4, -1).transpose(0, 1)
    assert device.launches == 0
    F.scaled_dot_product_attention(x[None], x[None], x[None])
    (x * 2).add_(1)
    assert device.launches == 3 and device.syncs == 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(), lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: x.nonzero(),
        lambda x: x.cpu(), lambda x: x[x > 0], lambda x: int(x.max()), lambda x: x[[0, 1]],
        lambda x: torch.equal(x, x), lambda x: torch.tensor([1], device=x.device),
        lambda x: torch.ones(3).to(x.device),
    ],
)  # fmt: skip
def test_what_needs_the_value_on_the_host_waits(device, wait):
    x = torch.ones(3, device="cuda:0")
    device.reset()
    wait(x)
    assert device.syncs == 1
    x.to("cpu", non_blocking=True)
    assert device.syncs == 1


def test_a_model_moves_learns_and_keeps_its_ties(device):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.to("cuda")
    assert model[1].weight is model[0].weight and model[0].weight.is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = (model(torch.ones(2, 3, device="cuda")) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    back = model[0].weight.cpu()
    assert back.device.type == "cpu" and back.sum().item() == pytest.approx(back.sum().item())
