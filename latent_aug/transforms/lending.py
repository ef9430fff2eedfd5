"""Lend the user's model to an attack, with the modules that the attack reaches beside it.

All of it is put back afterwards, also after an exception.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from latent_aug.transforms.classifier import unwrap

Restore = Callable[[], object]
PLAIN = (bool, int, float, str, type(None))  # attributes that nothing changes in place
KIND = ("shape", "dtype", "device")  # of a tensor
DEEPEST = 4  # containers in containers that are looked into
LARGEST = 100  # entries of a container that may hold modules: one of more is data
CALLABLES = (functools.partial, types.MethodType, types.FunctionType)
CONTAINERS = (OrderedDict, dict, list, set, deque)  # the first that fits says how one is refilled

_returned = threading.Condition()
_borrowers: dict[int, int] = {}  # the thread that has a module, by the module's id
_still: WeakSet[nn.Module] = WeakSet()  # modules of torch whose buffers an attack left alone


@contextmanager
def lend(model: nn.Module, mode: str, *, beside: Iterable[Any] = ()) -> Iterator[nn.Module]:
    """Lend a model to an attack, and put back what a forward pass may change in it.

    Put back are modes, buffers, flags, and public attributes with the content of the tensors,
    arrays, lists, tuples, dicts, sets and deques in them. Weights that it caches by
    `torch.nn.utils.parametrize.cached` or `functools.cached_property` are forgotten. Not put back
    are parameters that a forward pass writes to, private attributes, and objects of other types.

    A DistributedDataParallel in the model, or that the functions reach, does not talk to other
    processes meanwhile. An attack makes passes of its own number in each of them.

    Weights keep their `requires_grad`, so that whatever else is cached of them can be trained. Only
    those of a compiled model require no gradient meanwhile, as it would compute them all.

    Other threads that attack the same model wait.

    Args:
        model: The user's model, perhaps in DataParallel or DistributedDataParallel.
        mode: "eval" for evaluation mode, anything else for the mode that the model is in.
        beside: Functions that are called beside the model. Modules in them are lent too.

    Raises:
        ValueError: The model is lazy and has not seen a batch.
    """
    modules = list_modules(model, beside)
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    buffers = (b for module in modules for b in module._buffers.values())
    if any(nn.parameter.is_lazy(t) for t in (*parameters, *buffers) if t is not None):
        raise ValueError("the model has uninitialized lazy layers: run one batch through it first")
    with reserve(modules), ExitStack() as stack:  # a stack calls all, even if some of them fail
        for module in modules:
            stack.callback(remember_module(module, mode))
        stack.callback(remember_flags(parameters))
        stack.callback(remember_items(parametrize._cache, depth=0))
        if any(is_compiled(module) for module in modules):
            for parameter in parameters:
                if parameter.is_leaf:
                    parameter.requires_grad_(False)
        for module in modules:
            if isinstance(module, nn.parallel.DistributedDataParallel):
                module.broadcast_buffers = module.require_backward_grad_sync = False
        if mode == "eval":
            # Not by eval(): where it is overridden it may do more, as merging LoRA weights does.
            for module in modules:
                if module.training and not keeps_training(module):
                    module.training = False
        yield unwrap(model)


def list_modules(model: nn.Module, beside: Iterable[Any] = ()) -> list[nn.Module]:
    """List the modules of a model, and those that it and these functions reach otherwise."""
    model = unwrap(model)
    found = [model, *list_hidden(model)]
    found += [module for value in beside for module in find_modules(value)]
    return list(dict.fromkeys(inner for module in found for inner in module.modules()))


@contextmanager
def reserve(modules: list[nn.Module]) -> Iterator[None]:
    """Keep modules from other threads' attacks, and wait for those that have them now."""
    own = threading.get_ident()
    with _returned:
        _returned.wait_for(lambda: all(_borrowers.get(id(m), own) == own for m in modules))
        new = [id(module) for module in modules if id(module) not in _borrowers]
        _borrowers.update(dict.fromkeys(new, own))
    try:
        yield
    finally:
        with _returned:
            for number in new:
                del _borrowers[number]
            _returned.notify_all()


def list_hidden(model: nn.Module) -> Iterator[nn.Module]:
    """List modules that a model keeps as plain attributes, where it does not know them.

    They are there themselves, in containers, or in functions.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if isinstance(value, (nn.Module, list, tuple, dict)):
                yield from find_modules(value, depth=1)
            elif isinstance(value, CALLABLES):
                yield from find_modules(value, depth=2)


def find_modules(value: Any, depth: int = DEEPEST) -> Iterator[nn.Module]:
    """Find the modules that a callable reaches by its closure, globals, arguments or attributes."""
    if isinstance(value, nn.Module):
        yield value
        return
    inside: Collection[Any] = ()
    if isinstance(value, functools.partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        inside = (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        names = (value.__globals__.get(name) for name in list_names(value.__code__))
        inside = (*names, *read_cells(value), *(value.__defaults__ or ()))
        inside = (*inside, *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, Tensor)):
        inside = vars(value).values()
    is_data = isinstance(value, (dict, list, tuple)) and len(value) > LARGEST
    for entry in () if is_data or not depth else tuple(inside):
        yield from find_modules(entry, depth - 1)


def list_names(code: types.CodeType) -> Iterator[str]:
    """List the global names in a function's code, and in that of functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from list_names(constant)


def read_cells(function: types.FunctionType) -> Iterator[Any]:
    """Read the variables that a function has of the functions around it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it has no value yet
            continue


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has a part in a module's forward pass."""
    return (
        "_orig_mod" in module._modules
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def keeps_training(module: nn.Module) -> bool:
    """Whether a module stays in training mode: a recurrent one without dropout.

    The mode changes nothing in it, but cuDNN has a backward pass in training mode only.
    """
    return isinstance(module, nn.RNNBase) and not module.dropout


def remember_flags(parameters: Iterable[Tensor]) -> Restore:
    """Remember which parameters require a gradient."""
    flags = [(p, p.requires_grad) for p in parameters if p.is_leaf]

    def restore() -> None:
        for parameter, wanted in flags:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)

    return restore


def remember_module(module: nn.Module, mode: str) -> Restore:
    """Remember what of a module itself, without its submodules, an attack may change."""
    training, before = module.training, dict(vars(module))
    attributes = {name: value for name, value in before.items() if not name.startswith("_")}
    contents = [remember(v) for v in attributes.values() if not isinstance(v, PLAIN)]
    restore_buffers = remember_buffers(module, mode, before) if module._buffers else None

    def restore() -> None:
        if restore_buffers is not None:
            restore_buffers()
        restore_attributes(module, attributes)
        forget_properties(module, vars(module).keys() - before.keys())
        for restore_content in contents:
            if restore_content is not None:
                restore_content()
        if module.training != training:
            module.training = training

    return restore


def restore_attributes(module: nn.Module, before: dict[str, Any]) -> None:
    """Put public attributes of a module back.

    All of them, because a cache and its key belong together. An attribute that has become a
    submodule, a parameter or a buffer stays one. New attributes stay too, because a private one may
    say that they are there.
    """
    tables = (module._modules, module._parameters, module._buffers)
    own = vars(module)
    for name, value in before.items():
        if own.get(name) is value or any(name in table for table in tables):
            continue
        own[name] = value


def forget_properties(module: nn.Module, names: Iterable[str]) -> None:
    """Delete those of these attributes that the module's class computes when somebody asks."""
    for name in names:
        prop = inspect.getattr_static(type(module), name, None)
        if isinstance(prop, functools.cached_property):
            del vars(module)[name]


def remember_buffers(module: nn.Module, mode: str, attributes: dict[str, Any]) -> Restore:
    """Remember the buffers of a module, and their content if a forward pass may write to it.

    A new buffer goes, unless a private one of the module's attributes has changed, too. It may say
    that the buffer is there.
    """
    table, non_persistent = dict(module._buffers), set(module._non_persistent_buffers_set)
    settled = is_settled(module, mode)
    copied = not (settled and module in _still)
    versions = [(b, b._version) for b in table.values() if b is not None and not b.is_inference()]
    contents = [remember_tensor(buffer) for buffer, _ in versions] if copied else []

    def restore() -> None:
        same = all(buffer._version == version for buffer, version in versions)
        # All of them, and a write through .data leaves the version as it was.
        wrote = [restore_content() for restore_content in contents if restore_content is not None]
        if settled and same and not any(wrote):
            _still.add(module)
        else:
            _still.discard(module)
        now = dict(module._buffers)
        new = {name: buffer for name, buffer in now.items() if name not in table}
        if new and not has_changed_privately(module, attributes):
            new = {}
        if not holds_same(now, table | new):
            module._buffers.clear()
            module._buffers.update(table | new)
            kept_out = {name for name in module._non_persistent_buffers_set if name in new}
            module._non_persistent_buffers_set = non_persistent | kept_out

    return restore


def has_changed_privately(module: nn.Module, before: dict[str, Any]) -> bool:
    """Whether a private attribute of a module is new or another object than before."""
    names = (name for name in vars(module) if name.startswith("_"))
    return any(name not in before or vars(module)[name] is not before[name] for name in names)


def is_settled(module: nn.Module, mode: str) -> bool:
    """Whether a module is torch's own and writes to no buffer in the mode that it is attacked in.

    A hook may write to them, and the module around it. The first attack sees whether that happens.
    """
    writes = module.training and mode != "eval"
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module).__module__.startswith("torch.nn.modules.") and not (writes or hooked)


def remember(value: Any, depth: int = DEEPEST) -> Restore | None:
    """Remember the content of a tensor, an array or a container. None for anything else."""
    if isinstance(value, Tensor):
        return None if value.requires_grad else remember_tensor(value)
    if isinstance(value, np.ndarray):
        return remember_array(value)
    if isinstance(value, CONTAINERS):
        return remember_items(value, depth)
    if isinstance(value, tuple):
        return remember_entries(value, depth)
    return None


def remember_tensor(tensor: Tensor) -> Callable[[], bool] | None:
    """Remember the content of a tensor. None if nothing can write to it in place.

    Putting it back says whether another content was seen in it.
    """
    simple = tensor.layout is torch.strided and not tensor.is_nested
    if tensor.is_meta or tensor.is_inference() or (simple and is_expanded(tensor)):
        return None
    content, version = tensor.detach().clone(), tensor._version

    def restore() -> bool:
        same_kind = all(getattr(tensor, k) == getattr(content, k) for k in KIND)
        if same_kind and (is_equal(tensor, content) if simple else tensor._version == version):
            return False
        if not same_kind or tensor.layout is torch.sparse_coo:  # whose .data is another tensor
            tensor.data = content
        else:
            # .data leaves the version counter alone: a forward pass of the user's that waits for
            # its backward pass may have saved this tensor.
            tensor.data.copy_(content)
        return tensor.is_cpu  # elsewhere nobody looked

    return restore


def is_equal(tensor: Tensor, content: Tensor) -> bool:
    """Whether a tensor has this content. False on an accelerator, where a look would wait.

    What is equal is not written to: the memory may be a file's that is open for reading only.
    """
    if not tensor.is_cpu:
        return False
    if torch.equal(tensor, content):
        return True
    return bool(((tensor == content) | (tensor.isnan() & content.isnan())).all())


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory, so that the tensor cannot be written to in place."""
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def remember_array(array: np.ndarray[Any, Any]) -> Restore | None:
    """Remember the content of an array. None if it is read-only, or a file's."""
    if isinstance(array, np.memmap) or not array.flags.writeable:
        return None
    content = array.copy()

    def restore() -> None:
        if array.shape != content.shape:
            array.resize(content.shape, refcheck=False)
        array[...] = content

    return restore


def remember_entries(values: Iterable[Any], depth: int) -> Restore | None:
    """Remember the content of what is in a container. None where nothing can change in place."""
    inner = [remember(v, depth - 1) for v in values if not isinstance(v, PLAIN)] if depth else []
    changeable = [restore_content for restore_content in inner if restore_content is not None]
    if not changeable:
        return None

    def restore() -> None:
        for restore_content in changeable:
            restore_content()

    return restore


def remember_items(container: Any, depth: int = DEEPEST) -> Restore:
    """Remember what is in a dict, list, set or deque, and the content of that."""
    items = container.copy()
    restore_entries = remember_entries(items.values() if isinstance(items, dict) else items, depth)

    def restore() -> None:
        if restore_entries is not None:
            restore_entries()
        if holds_same(container, items):
            return
        kind: Any = next(kind for kind in CONTAINERS if isinstance(container, kind))
        kind.clear(container)  # not as a subclass may do it, which may refuse
        (kind.extend if hasattr(kind, "extend") else kind.update)(container, items)

    return restore


def holds_same(one: Any, other: Any) -> bool:
    """Whether two containers of one type hold the very same objects in the same order."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(one[name] is other[name] for name in one)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


@contextmanager
def keep_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let BatchNorm use the statistics of a batch, and leave its running ones alone.

    It writes to copies of these. So its pass stays an ordinary one, which activation checkpointing
    can repeat in the backward pass. The repetition writes to the running ones.
    """
    training = [m for m in modules if isinstance(m, _BatchNorm) and m.training]
    kept = [(module, dict(module._buffers)) for module in training]
    for module, buffers in kept:
        module._buffers.update({k: b if b is None else b.clone() for k, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
