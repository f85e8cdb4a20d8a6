"""The exception that means "the user can fix this", errors that mean that memory ran out, and missing packages."""

import errno
import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message says what was expected, what came and what to do.

    Command lines print it alone, without a traceback, and exit with code 2.
    """


class MethodError(UserError):
    """A method broke its contract. Not the question is at fault, so this ends a run at once."""


# How errors other than torch's OutOfMemoryError say that memory ran out: those of the CPU's allocator, the libraries of
# CUDA and ROCm (cuBLAS and cuDNN allocate without torch), their runtimes, oneAPI and C++. Statuses that can also mean
# wrong shapes or failed assertions are left out: CUBLAS_STATUS_NOT_INITIALIZED and CUDNN_STATUS_NOT_SUPPORTED.
_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot) allocate memory|not enough memory|_ALLOC(ATION)?_FAILED\b|"
    r"Error(MemoryAllocation|OutOfMemory)\b|_OUT_OF_(DEVICE|HOST)_MEMORY\b|std::bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that something did not fit into the memory of the CPU or of an accelerator."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def release_memory(error: BaseException) -> None:
    """Free what a call that ran out of memory still holds: tensors in the frames of its errors, and cached blocks.

    The errors lose their tracebacks.
    """
    import torch  # not needed for any other error

    current: BaseException | None = error
    while current is not None:
        current.__traceback__ = None
        current = current.__cause__ or current.__context__
    gc.collect()  # an autograd graph or an unfinished cache may be part of a reference cycle
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def how_to_get(name: str, offline: bool, data: bool = False) -> str:
    """What to do about a repository of the hub that is not in the hub's cache and cannot be fetched.

    Args:
        name: owner/name.
        offline: whether the libraries were told to download nothing.
        data: True for a data set, False for a model.

    Returns:
        The end of a sentence, without its full stop.
    """
    from huggingface_hub import constants

    command = f"hf download {name}" + (" --repo-type dataset" if data else "")
    cache = f"the cache {constants.HF_HUB_CACHE} (which HF_HOME chooses)"
    if offline:
        return (
            f"nothing is downloaded, because HF_HUB_OFFLINE or a variable like it is set, and {cache} lacks it: "
            f"run {command} where there is a network, or set HF_HOME to the folder that has it"
        )
    return (
        f"check the name and the network. Without a network, run {command} elsewhere, copy {cache}, and set HF_HOME to "
        "the copy and HF_HUB_OFFLINE=1"
    )


# Extra of pyproject.toml, for what only a part of the project needs -> the modules that its packages install.
EXTRAS = {
    "eval": (
        *("av", "datasets", "filelock", "openai", "openpyxl", "pandas", "pyarrow", "pycocoevalcap", "scipy"),
        *("sentencepiece", "yaml"),
    ),
    "pages": ("gradio", "jinja2", "matplotlib", "plotly"),
    "cluster": ("deepspeed", "wandb", "wandb_workspaces"),
    "train": ("sklearn",),
}
# Module -> its package, where the names differ.
PACKAGES = {
    "pyarrow": "datasets",
    "sklearn": "scikit-learn",
    "wandb_workspaces": "wandb-workspaces",
    "yaml": "pyyaml",
}


@contextmanager
def optional_imports(module: str | None = None) -> Iterator[None]:
    """Context for code that may import packages of EXTRAS, or decorator of a function that does.

    Args:
        module: the module that is imported; None for the one that the ImportError names.

    Raises:
        UserError: instead of an ImportError. It names the package and the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        name = (module or error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
        if extra is None:
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        problem = "is not installed" if missing else f"cannot be imported ({' '.join(str(error).split())})"
        raise UserError(
            f"This needs the package {PACKAGES.get(name, name)}, which {problem}; {how_to_install(extra)} brings it."
        ) from error


def how_to_install(extra: str) -> str:
    """The command that installs the packages of an extra."""
    return f'pip install "visual-token-reduction[{extra}]"'


def suggestion(name: str, known: Iterable[str]) -> str:
    """The sentence " Did you mean ...?" with the nearest known name; "" if none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest name that does."""
    known = sorted(known)
    return UserError(f"Unknown {kind} {name!r}.{suggestion(name, known)} Available: {', '.join(known)}.")
