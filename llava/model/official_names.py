"""LLaVA's classes by name, for scripts that import them or ask `isinstance`; nothing can be built on them.

The code of many papers replaces methods of these classes or derives from them. The forward here calls none of these
methods, so such a method would change nothing. It is refused, never ignored.

Official code read: haotian-liu/LLaVA@c121f04, llava/model
"""

from typing import Any, NoReturn

from llava.errors import UserError


class NameOnlyError(UserError, AttributeError, TypeError):
    """A class of LLaVA's was used as more than a name."""


class NameOnly(type):
    """The type of these classes. Of their instances are objects that have the class in their attribute `stands_for`."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> "NameOnly":
        for base in bases:
            if isinstance(base, NameOnly):
                raise base._error(f"A class ({name}) cannot derive from it")
        return super().__new__(cls, name, bases, namespace)

    def __instancecheck__(cls, instance: object) -> bool:
        return cls in getattr(instance, "stands_for", ())

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise cls._error(f"Its {name} cannot be replaced")

    def __getattr__(cls, name: str) -> NoReturn:
        raise cls._error(f"It has no {name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise cls._error("It cannot be made")

    def _error(cls, what: str) -> NameOnlyError:
        return NameOnlyError(
            f"LLaVA's {cls.__name__} is a name only in this package, whose forward calls none of its methods. {what}; "
            "load models with llava.model.builder.load_pretrained_model, write a method as CONTRIBUTING.md says, or "
            "run this code with LLaVA's own package."
        )


class LlavaMetaForCausalLM(metaclass=NameOnly):
    """Every model of `load_pretrained_model`."""


class LlavaLlamaForCausalLM(metaclass=NameOnly):
    """Those with a Llama decoder."""


class LlavaMistralForCausalLM(metaclass=NameOnly):
    """Those with a Mistral decoder."""


class CLIPVisionTower(metaclass=NameOnly):
    """What `model.get_vision_tower()` returns."""
