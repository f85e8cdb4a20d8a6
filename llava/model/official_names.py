"""The names of LLaVA's classes, for scripts that import them or use them with `isinstance`; they do nothing else.

The code of many papers replaces methods of these classes or derives from the classes. This package calls none of these
methods, so that would have no effect. It is therefore refused with an error.

Official code read: haotian-liu/LLaVA@c121f04, llava/model
"""

from typing import Any, NoReturn

from llava.errors import UserError


class NameOnlyError(UserError, AttributeError, TypeError):
    """One of LLaVA's classes was used for more than its name."""


class NameOnly(type):
    """The type of these classes. An object is an instance of one if its attribute `stands_for` holds the class."""

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
    """Any model of `load_pretrained_model`."""


class LlavaLlamaForCausalLM(metaclass=NameOnly):
    """A model of `load_pretrained_model` with a Llama decoder."""


class LlavaMistralForCausalLM(metaclass=NameOnly):
    """A model of `load_pretrained_model` with a Mistral decoder."""


class CLIPVisionTower(metaclass=NameOnly):
    """The result of `model.get_vision_tower()`."""
