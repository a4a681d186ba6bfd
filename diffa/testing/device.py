"""A stand-in for a GPU: CPU data in tensors that report ``cuda:0``, for tests without one.

    with StandInDevice() as device:
        model = diffa.build(spec, device="cuda:0")
        model.generate(prompt)
    print(device.launches, device.syncs)

It refuses what a GPU refuses (operands on two devices, numpy arrays, random generators of the
CPU), and counts what takes time there: launches of kernels, and host syncs, which wait until the
queue of kernels is empty. Numbers are computed on the CPU by the same operators.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return,arg-type,override,assignment,attr-defined"
# mypy: warn-unused-ignores=False
from __future__ import annotations

import contextlib
import copy
import functools
import traceback
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_flatten, tree_map_only

# They give a new view or an allocation: no kernel runs.
_FREE = {
    "_unsafe_view", "alias", "detach", "lift_fresh", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "_reshape_alias", "set_",
}  # fmt: skip
# Their result's value or shape is known to the host alone when the device is done.
_WAITING = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique_dim",
    "_unique2", "unique_consecutive", "bincount", "item",
}  # fmt: skip
# One kernel on a GPU; the CPU's own implementations consist of several operators.
_FUSED: set[Any] = {F.scaled_dot_product_attention, F.rms_norm}


class StandIn(Tensor):
    """CPU data that reports another device; only result by a ``StandInDevice``.

    To torch's own C++ code it is on the device ``meta``, which needs no driver; what that code
    allocates there becomes a stand-in too.
    """

    elem: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor, place: torch.device) -> StandIn:
        """Wrap a CPU tensor."""
        own: StandIn = Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(),
            dtype=elem.dtype, layout=elem.layout, device="meta",
        )  # fmt: skip
        own.elem, own.place = elem, place
        return own

    @property
    def device(self) -> torch.device:
        """The device it claims to be on."""
        return self.place

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return True

    @property
    def is_cpu(self) -> bool:
        """Whether that is the CPU."""
        return False

    @property
    def is_meta(self) -> bool:
        """Whether it has no data."""
        return False

    def get_device(self) -> int:
        """Return the index of the device."""
        return self.place.index or 0

    @property
    def data(self) -> Tensor:
        """The tensor without its gradient."""
        return self.detach()

    @data.setter
    def data(self, value: StandIn) -> None:
        self.elem = value.elem

    def data_ptr(self) -> int:
        """Return the address of the CPU data."""
        return self.elem.data_ptr()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Show what is inside."""
        return f"StandIn({self.elem!r}, device={self.place})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the CPU data."""
        return self.elem.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy data and gradient."""
        if id(self) not in memo:
            new: Any = StandIn(self.elem.detach().clone(), self.place)
            if isinstance(self, nn.Parameter):
                new = nn.Parameter(new, self.requires_grad)
            new.requires_grad_(self.requires_grad)
            new.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = new
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator on the CPU data, and count it."""
        return StandInDevice.current._run(func, args, dict(kwargs or {}))


class _Allocations(TorchDispatchMode):
    """Turns what torch's C++ code allocates beside stand-ins into stand-ins."""

    def __init__(self, device: StandInDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run operators with stand-ins, or for their device, on CPU data."""
        options = dict(kwargs or {})
        place = options.get("device")
        allocates = place is not None and torch.device(place).type == "meta"
        if any(issubclass(kind, StandIn) for kind in types):
            return self._device._run(func, args, options)
        if allocates and not self._device.real_meta:
            return self._device._run(func, args, options)
        return func(*args, **options)


class StandInDevice(TorchFunctionMode):
    """While it is entered, ``cuda:0`` (and ``cuda:1``) exist.

    Args:
        capability: Compute capability that kernels are chosen for.

    Attributes:
        launches: Kernels launched: operators that are neither views nor allocations.
        syncs: Host syncs.
        kernels: How often each operator was launched.
        sync_places: Where in the code the host waited, and how often.
    """

    current: ClassVar[StandInDevice]

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        super().__init__()
        self.capability = capability
        self._fused = 0
        self.real_meta = 0  # calls in progress that ask for the device ``meta`` themselves
        self._stack = contextlib.ExitStack()
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.launches = self.syncs = 0
        self.kernels: Counter[str] = Counter()
        self.sync_places: Counter[str] = Counter()

    def __enter__(self) -> StandInDevice:
        """Make the device exist."""
        StandInDevice.current = self
        self._stack.enter_context(_cuda_exists(self))
        self._stack.enter_context(_Allocations(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove it; tensors on it stay, but cannot be used."""
        super().__exit__(*error)
        self._stack.close()

    def wrap(self, value: Tensor, place: torch.device | None = None) -> Tensor:
        """Return a tensor on the device with the data of a CPU tensor."""
        device = place or torch.device("cuda", 0)
        return StandIn(value, torch.device("cuda", device.index or 0))

    def note_sync(self, name: str) -> None:
        """Count a host sync, and where it came from."""
        self.syncs += 1
        frames = [f for f in traceback.extract_stack() if "/testing/device.py" not in f.filename]
        own = [f for f in frames if "/torch/" not in f.filename] or frames
        frame = own[-1]
        self.sync_places[f"{name} {'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"] += 1

    # Python's functions: factories, moves, and what only the host can do.

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Intercept what names a device or reads data."""
        kwargs = dict(kwargs or {})
        if func in _MOVES:
            return _MOVES[func](self, *args, **kwargs)
        if func in _HOST:
            return _HOST[func](self, *args, **kwargs)
        if func in _FUSED and _any_stand_in(args, kwargs):
            self._count(func.__name__)
            self._fused += 1
            try:
                out = func(*args, **kwargs)
                # A GPU's attention lays its output out as its queries are.
                return out if out.dim() != 4 else out.transpose(1, 2).contiguous().transpose(1, 2)
            finally:
                self._fused -= 1
        device = kwargs.get("device")
        if device is None or not isinstance(device, str | int | torch.device):
            return func(*args, **kwargs)
        device = torch.device(device)
        if _any_stand_in(args, kwargs):
            del kwargs["device"]
            result = func(*args, **kwargs)
            if device.type != "cuda":
                return result.cpu()
            return result if isinstance(result, StandIn) else self.wrap(result, device)
        if device.type != "cuda":
            self.real_meta += device.type == "meta"
            try:
                return func(*args, **kwargs)
            finally:
                self.real_meta -= device.type == "meta"
        generator = kwargs.get("generator")
        if generator is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.note_sync("copy to device")
        elif func.__name__ not in _FREE:
            self._count(func.__name__)
        return self.wrap(result, device).requires_grad_(requires_grad)

    # ATen's operators on data of the device.

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        place = self._check_devices(func, name, args, kwargs)
        leaves_device = False
        if kwargs.get("device") is not None:
            leaves_device = torch.device(kwargs["device"]).type == "cpu"
            kwargs["device"] = torch.device("cpu")
        inner, inner_kwargs = tree_map_only(StandIn, lambda t: t.elem, (tuple(args), kwargs))
        if name == "copy_" and isinstance(args[0], StandIn) != isinstance(args[1], StandIn):
            if not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                self.note_sync("copy_")
            func(*inner, **inner_kwargs)
            return args[0]
        if not self._fused:
            self._note(func, name, args, kwargs)
        out = func(*inner, **inner_kwargs)
        if leaves_device:
            self.note_sync("copy to cpu")
            return out
        out = tree_map_only(Tensor, lambda t: self.wrap(t, place), out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _note(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        views = [
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        ]
        if name in _FREE or any(views):
            return
        self._count(name)
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _WAITING or masks or sized:
            self.note_sync(name)

    def _count(self, name: str) -> None:
        if not self._fused:
            self.launches += 1
            self.kernels[name] += 1

    def _check_devices(
        self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> torch.device:
        leaves = list(tree_flatten((args, kwargs))[0])
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        places = {t.place for t in tensors if isinstance(t, StandIn)}
        if any(isinstance(x, torch.Generator) for x in leaves):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        others = [t for t in tensors if not isinstance(t, StandIn) and (t.dim() or name in _STRICT)]
        if name in ("index", "index_put", "index_put_") and isinstance(args[0], StandIn):
            # Indices of the CPU are copied to the device.
            values = [args[2]] if len(args) > 2 else []
            if others:
                self.note_sync("index from the host")
            others = [t for t in values if not isinstance(t, StandIn) and t.dim()]
        if name in ("copy_", "_to_copy", "lift_fresh"):
            others = []
        elif len(places) > 1 or others:
            names = ", ".join(sorted({str(p) for p in places} | {str(t.device) for t in others}))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {names} in {func}"
            )
        first = args[0] if args and isinstance(args[0], StandIn) else None
        default = torch.device("cuda", 0)
        return first.place if first is not None else next(iter(places), default)


# Operators that take no operand of the CPU, not even a number in a tensor.
_STRICT = {
    "mm",
    "addmm",
    "bmm",
    "gather",
    "scatter",
    "scatter_",
    "index_select",
    "embedding",
    "cat",
}


class _Move(torch.autograd.Function):
    """A copy from one device to another, through which gradients flow back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: torch.device | None) -> Tensor:
        """Copy x to a stand-in (None: to the CPU)."""
        ctx.place = x.place if isinstance(x, StandIn) else None
        elem = x.elem if isinstance(x, StandIn) else x
        elem = elem.detach().clone()
        return elem if place is None else StandInDevice.current.wrap(elem, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Copy the gradient back."""
        return _Move.apply(grad, ctx.place), None


def _any_stand_in(args: Any, kwargs: Any) -> bool:
    return any(isinstance(x, StandIn) for x in tree_flatten((args, kwargs))[0])


def _to(device: StandInDevice, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for ``Tensor.to``."""
    kwargs.pop("copy", None) if isinstance(x, StandIn) else None
    if (args and isinstance(args[0], Tensor)) or "other" in kwargs:
        other = kwargs.pop("other", None) if not args else args[0]
        kwargs = {"device": other.device, "dtype": other.dtype, **kwargs}
        args = args[1:]
    copies = kwargs.pop("copy", False)
    place, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    own = x.device
    if place is not None and place.type == "cuda":
        place = torch.device("cuda", place.index or 0)
    elif place is not None and place.type == "meta":
        return Tensor.to(x, *args, **kwargs) if not isinstance(x, StandIn) else x.elem.to("meta")
    if place is not None and place != own:
        if not non_blocking:
            device.note_sync(f"copy to {place.type}")
        x = _Move.apply(x, None if place.type == "cpu" else place)
    elif copies:
        x = x.clone()
    return x if dtype is None or dtype == x.dtype else x.type(dtype)


def _new_tensor(device: StandInDevice, x: Tensor, values: Any, /, **kwargs: Any) -> Tensor:
    if isinstance(x, StandIn):
        device.note_sync("copy to device")
        return device.wrap(torch.tensor(values, dtype=kwargs.get("dtype", x.dtype)), x.place)
    return x.new_tensor(values, **kwargs)


def _tolist(device: StandInDevice, x: Tensor) -> Any:
    if isinstance(x, StandIn):
        device.note_sync("tolist")
        return x.elem.tolist()
    return x.tolist()


def _reads(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a stand-in for a conversion to a Python number."""

    def read(device: StandInDevice, x: Any) -> Any:
        if isinstance(x, StandIn):
            device.note_sync("item")
            return kind(x.elem)
        return kind(x)

    return read


def _numpy(device: StandInDevice, x: Tensor, *args: Any) -> Any:
    if isinstance(x, StandIn):
        raise TypeError(f"can't convert {x.place} device type tensor to numpy")
    return x.numpy() if not args else x.__array__(*args)


def _ctc_loss(device: StandInDevice, log_probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for ``ctc_loss``, which reads its lengths on the host."""
    if not isinstance(log_probs, StandIn):
        return F.ctc_loss(log_probs, *args, **kwargs)
    device.note_sync("ctc_loss")
    rest = [x.elem if isinstance(x, StandIn) else x for x in args]
    own = _Move.apply(log_probs, None)
    with _disable_current_modes():
        loss = F.ctc_loss(own, *rest, **kwargs)
    return _Move.apply(loss, log_probs.place)


def _indexed(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for an indexing method: lists are copied to the device."""

    def index(device: StandInDevice, x: Tensor, where: Any, *rest: Any) -> Any:
        if isinstance(x, StandIn):
            parts = where if isinstance(where, tuple) else (where,)
            moved = tuple(_index_tensor(device, x, part) for part in parts)
            where = moved if isinstance(where, tuple) else moved[0]
        return call(x, where, *rest)

    return index


def _index_tensor(device: StandInDevice, x: StandIn, part: Any) -> Any:
    if not isinstance(part, list):
        return part
    device.note_sync("copy to device")
    return device.wrap(torch.tensor(part), x.place)


def _pin(device: StandInDevice, x: Tensor, *args: Any) -> Tensor:
    return x


_MOVES: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.new_tensor: _new_tensor,
    Tensor.cuda: lambda own, x, place=None, **kw: _to(own, x, place or "cuda:0", **kw),
    Tensor.cpu: lambda own, x, **kw: _to(own, x, "cpu"),
}
_HOST: dict[Any, Callable[..., Any]] = {
    Tensor.tolist: _tolist,
    Tensor.item: _reads(Tensor.item),
    Tensor.__bool__: _reads(bool),
    Tensor.__int__: _reads(int),
    Tensor.__float__: _reads(float),
    Tensor.__index__: _reads(int),
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.pin_memory: _pin,
    F.ctc_loss: _ctc_loss,
    Tensor.__getitem__: _indexed(Tensor.__getitem__),
    Tensor.__setitem__: _indexed(Tensor.__setitem__),
}


class _Event:
    """Stand in for ``torch.cuda.Event``: everything before it is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Return: what was before the event is done, and later kernels still run."""

    def query(self) -> bool:
        """Return True."""
        return True


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stand in for ``nn.Module._apply``: other data cannot be put under a tensor of a subclass."""
    memo: dict[int, nn.Parameter] = {}
    for part in module.modules() if recurse else [module]:
        for key, old in part._parameters.items():
            if old is None:
                continue
            if id(old) not in memo:
                with torch.no_grad():
                    new = fn(old)
                memo[id(old)] = old if new is old else nn.Parameter(new, old.requires_grad)
                if new is not old and old.grad is not None:
                    memo[id(old)].grad = fn(old.grad)
            part._parameters[key] = memo[id(old)]
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = fn(buffer)
    return module


def _load(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for ``torch.load``: what was saved is on the CPU."""
    return load(*args, **{**kwargs, "map_location": "cpu"})


@contextlib.contextmanager
def _cuda_exists(device: StandInDevice) -> Iterator[None]:
    """Let torch.cuda describe the device."""
    import torch._dynamo  # it registers torch's functions by identity, before they are replaced

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *a, **k: device.capability >= (8, 0),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *a: device.capability,
        "get_device_name": lambda *a: "stand-in",
        "mem_get_info": lambda *a: (64 << 30, 64 << 30),
        "max_memory_allocated": lambda *a: 0,
        "memory_allocated": lambda *a: 0,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
        "Event": _Event,
        **dict.fromkeys(
            [
                "set_device",
                "empty_cache",
                "reset_peak_memory_stats",
                "manual_seed_all",
                "manual_seed",
                "set_rng_state",
                "set_rng_state_all",
            ],
            nothing,
        ),
        "synchronize": lambda *a: device.note_sync("synchronize"),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(unittest.mock.patch.object(torch.cuda, name, answer))
        for name in ("get_rng_state", "set_rng_state", "set_rng_state_all"):
            stack.enter_context(unittest.mock.patch.object(torch.cuda.random, name, answers[name]))
        stack.enter_context(unittest.mock.patch.object(nn.Module, "_apply", _apply))
        load = functools.partial(_load, torch.load)
        stack.enter_context(unittest.mock.patch.object(torch, "load", load))
        yield
