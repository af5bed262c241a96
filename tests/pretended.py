"""A device "cuda" that a processor pretends to be: real numbers, and the rules of a GPU.

A `Gpu` tensor holds a tensor of the CPU, and says that it lies on `cuda:0`. All that PyTorch runs on
it goes through `Gpu.__torch_dispatch__`, where the rules are checked: tensors of two devices are an
error, and what a GPU would have to be waited for is counted, or refused. `Pretend` makes the names
work: `x.to("cuda")`, `device=x.device`, `torch.autocast("cuda")`. So whole training loops run as they
would on a GPU, without a driver, and their numbers can be compared with those of a CPU.
"""
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
WAITS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2",
         "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "allclose")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class WrongDevice(RuntimeError): "Tensors of two devices in one operation."
class Waited(RuntimeError): "The processor waits for the device."


class Notes:
    "Record of the calls on the pretended device."

    def __init__(self):
        self.refuse = False  # Waiting is an error
        self.inside = False  # PyTorch itself runs, on tensors of the device
        self.clear()

    def clear(self):
        self.waits, self.copies, self.ops = [], [], 0

    def wait(self, name: str):
        self.waits.append(name)
        if self.refuse: raise Waited(f"{name} waits for the device")


NOTES = Notes()


class Gpu(Tensor):
    "A tensor of the pretended device."

    @staticmethod
    def __new__(cls, real: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, layout=real.layout, device=real.device)

    def __init__(self, real: Tensor): self.held = real
    def __repr__(self): return f"Gpu({tuple(self.shape)}, {self.dtype})"
    def __deepcopy__(self, memo):
        copy = Gpu(self.held.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False): copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    def get_device(self): return 0

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        NOTES.ops += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        check(name, args, given)
        def bare(t): return t.held if isinstance(t, Gpu) else t
        out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name == "copy_" and not isinstance(args[0], Gpu): return args[0]
        out = tree_map(lambda t: Gpu(t) if isinstance(t, Tensor) else t, out)
        if name == "_local_scalar_dense": return out
        return return_and_correct_aliasing(func, args, kwargs, out)


def check(name: str, args: tuple, given: list):
    "The rules of a GPU for one operation."
    others = [t for t in given if not isinstance(t, Gpu) and t.ndim]
    if name == "copy_":
        if others and others[0] is args[0]: NOTES.wait("copy_ to the CPU")
        elif others: NOTES.copies.append("copy_")
        return
    if name in INDEXING:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            is_fill = name != "index" and args[2].numel() == 1
            if not is_fill: NOTES.wait(f"{name} by a mask")
        for t in others:
            if all(t is not i for i in indices): raise WrongDevice(f"{name}: values of the CPU")
            NOTES.copies.append(f"{name} by indices of the CPU")
        return
    if others: raise WrongDevice(f"{name}: {[tuple(t.shape) for t in others]} of the CPU among "
                                 f"{len(given)} tensors")
    if name in WAITS: NOTES.wait(name)


class Inherit(TorchDispatchMode):
    "Tensors that PyTorch itself makes while it works on tensors of the device are on the device too."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not NOTES.inside: return out
        if any(isinstance(t, Tensor) for t in tree_leaves((args, kwargs))): return out
        return tree_map(lambda t: Gpu(t) if type(t) is Tensor else t, out)


def is_cuda(device) -> bool:
    return device is not None and not isinstance(device, (int, Tensor)) \
        and torch.device(device).type == "cuda"


def target(args: tuple, kwargs: dict) -> tuple:
    "Device that `to` was asked for, and what else it was asked for."
    wanted = dict(kwargs)
    other = wanted.pop("other", None)
    if args and isinstance(args[0], Tensor): other, *args = args
    if other is not None: wanted |= dict(device=other.device, dtype=other.dtype)
    for value in args:
        if isinstance(value, torch.dtype): wanted["dtype"] = value
        elif isinstance(value, (str, torch.device)): wanted["device"] = value
    kept = {k: v for k, v in wanted.items() if k in ("dtype", "memory_format", "copy") and v is not None}
    return wanted.get("device"), kept


class Pretend(TorchFunctionMode):
    "Within it `cuda` is the pretended device."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        special = getattr(self, f"do_{name}", None)
        if special and args and isinstance(args[0], Tensor): return special(func, *args, **kwargs)
        if name == "_parse_to": return func(*args, **kwargs)
        if is_cuda(kwargs.get("device")): return self.make(func, args, kwargs)
        mine = any(isinstance(t, Gpu) for t in tree_leaves((args, kwargs)))
        before, NOTES.inside = NOTES.inside, mine
        try: return func(*args, **kwargs)
        finally: NOTES.inside = before

    def make(self, func, args, kwargs):
        "A new tensor on the device."
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Gpu):
            NOTES.copies.append(func.__name__)
        elif any(isinstance(t, Gpu) for t in tree_leaves(args)):
            return self.__torch_function__(func, (), args, kwargs | dict(device=None))
        needs_grad = kwargs.pop("requires_grad", False)
        before, NOTES.inside = NOTES.inside, False
        try: return Gpu(func(*args, **kwargs | dict(device="cpu"))).requires_grad_(needs_grad)
        finally: NOTES.inside = before

    def do_to(self, func, x, *args, **kwargs):
        device, wanted = target(args, kwargs)
        if isinstance(x, Gpu):
            if device is None or is_cuda(device): return self.changed(func, x, wanted)
            NOTES.wait("to the CPU")
            return self.changed(func, x.held, wanted)
        if not is_cuda(device): return func(x, *args, **kwargs)
        assert not (x.requires_grad and torch.is_grad_enabled()), "a gradient through a copy"
        NOTES.copies.append("to")
        return Gpu(self.changed(func, x.detach(), wanted).clone())

    def changed(self, func, x, wanted):
        "Another type or layout on the same device."
        if not wanted: return x
        before, NOTES.inside = NOTES.inside, isinstance(x, Gpu)
        try: return func(x, **wanted)
        finally: NOTES.inside = before

    def do_cuda(self, func, x, *args, **kwargs): return self.do_to(Tensor.to, x, "cuda")
    def do_cpu(self, func, x, *args, **kwargs): return self.do_to(Tensor.to, x, "cpu")
    def do_new_tensor(self, func, x, data, **kwargs):
        if not isinstance(x, Gpu): return func(x, data, **kwargs)
        return self.make(torch.tensor, (data,), dict(dtype=x.dtype) | kwargs)

    def do_pin_memory(self, func, x, *args, **kwargs): return x
    def do_is_pinned(self, func, x, *args, **kwargs): return False

    def do_tolist(self, func, x): return self.read(func, x)
    def do_numpy(self, func, x, **kwargs): return self.read(func, x)
    def do___array__(self, func, x, *args): return self.read(func, x)

    def read(self, func, x):
        if isinstance(x, Gpu): NOTES.wait(func.__name__)
        return func(x.held if isinstance(x, Gpu) else x)

    def do_as_subclass(self, func, x, cls):
        return x if isinstance(x, Gpu) else func(x, cls)

    def do_backward(self, func, x, gradient=None, retain_graph=None, create_graph=False, inputs=()):
        "The engine, with this mode on, for backward passes that are written in Python."
        if gradient is None: gradient = torch.ones_like(x)
        options = dict(allow_unreachable=True, accumulate_grad=True)
        before, NOTES.inside = NOTES.inside, isinstance(x, Gpu)
        try:
            with self: torch.autograd.Variable._execution_engine.run_backward(
                (x,), (gradient,), bool(retain_graph or create_graph), create_graph, tuple(inputs or ()),
                **options)
        finally: NOTES.inside = before


_compatible = torch._has_compatible_shallow_copy_type


def compatible(old: Tensor, new: Tensor) -> bool:
    "Whether a module may keep its parameter when it is moved; a `Gpu` takes what the new one holds."
    if not isinstance(old, Gpu) or not isinstance(new, Gpu):
        return not isinstance(new, Gpu) and not isinstance(old, Gpu) and _compatible(old, new)
    old.held = new.held
    return True


class Autocast(torch.autocast):
    "Autocast of the pretended device is that of the CPU."

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class Scaler(torch.amp.GradScaler):
    "Scales gradients there."

    def __init__(self, device="cuda", *args, **kwargs):
        super().__init__("cpu" if device == "cuda" else device, *args, **kwargs)
        self._device = device
