"""Override methods of one module for a while, and check that forward hooks run.

An override is an attribute of the object; its class and all other objects of the class stay as they are.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from llava.errors import UserError

MISSING = object()
# transformers leaves its own hooks on a model after a call with output_hidden_states; they do nothing in other calls.
HARMLESS_HOOKS = "transformers.utils.output_capturing"


class Override:
    """A function that replaces one method of one module until `restore` is called.

    A deep copy or a pickle of the module is refused meanwhile: the copy would keep the override, which runs the weights
    of the original. A shallow copy shares the modules; what it keeps of the override has no effect after `restore`.

    Args:
        owner: the module.
        name: of the method.
        function: is called with the original method, then with the arguments of the call.
        signature: what `inspect.signature` shows; None for that of the original.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        function: Callable[..., Any],
        signature: inspect.Signature | None = None,
    ):
        original = getattr(owner, name)
        functools.update_wrapper(self, original)
        self.__signature__ = signature or inspect.signature(original)
        self.original, self.active = original, True
        self._owner, self._name, self._function = owner, name, function
        self._attribute = vars(owner).get(name, MISSING)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        return self._function(self.original, *args, **kwargs)

    def restore(self) -> None:
        self.active = False
        if self._attribute is MISSING:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._attribute)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UserError("Copy or pickle the model before or after the `with reduce(...)` block, not inside it.")


@contextmanager
def hooks_must_run(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Raise UserError at the end of the context if a module that has forward hooks was not called in it.

    A module counts as hooked as well if its `forward` was replaced, as accelerate does.

    Args:
        model: gives the modules their names in the error.
        modules: to check.
    """
    found = {id(module) for module in modules if _hooked(module)}
    hooked = {name: module for name, module in model.named_modules() if id(module) in found} if found else {}
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
        for name, module in hooked.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    skipped = sorted(set(hooked) - called)
    if skipped:
        raise UserError(
            f"The forward hook (or replaced forward) of {', '.join(skipped)} has no effect in reduce(), which does not "
            "call this module as a whole; remove it, or hook the decoder layers or the model itself."
        )


def _hooked(module: nn.Module) -> bool:
    replaced = vars(module).get("forward")
    if replaced is not None and not isinstance(replaced, Override):
        return True
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) != HARMLESS_HOOKS for hook in hooks)
