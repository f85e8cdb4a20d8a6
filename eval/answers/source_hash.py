"""Hashes of the source that answers depend on: the model, the method, and every project module that they import.

A stored answer is only valid for the code that made it. `answer_sources` follows the import statements of the modules
of model and method, so that editing one method leaves the stored answers of all others valid. Files are parsed before
they are hashed: comments, docstrings and formatting do not matter.

The code that makes an answer is the code that this process has imported, whatever is on the disk by then. So the
content of a file is kept when it is imported (`record_imports`), hashes are of that, and `check_sources` compares them
with the disk before a run writes anything that would be taken for the work of the new code.

Modules of `eval` are not followed. What they contribute to an answer is its prompt and its images, and the answer
store compares both for every question. `differences` says in words which settings and files differ.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from llava.errors import UserError
from llava.places import PACKAGES

# Packages whose imports are followed: the model and the pipeline, and the methods (llava.reduction.registry.PACKAGES).
FOLLOWED = ("llava", "baselines", "consensusdrop", "visiondrop", "attnmix")
# What loads a model, runs it under a method, and remembers the output of its tower; model and method import none of it.
ENTRIES = ("llava/model/checkpoint/load.py", "llava/pipeline/generate.py", "eval/feature_cache.py")
# Folders of libraries.
LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))
# Settings that are hashes of files, and what these are in words; of so many files the names are said.
HASHED = {
    "code": "code",
    "method_code": "code of the method",
    "model_files": "files of the model",
    "text_tower": "files of the text tower",
}
NAMED = 5
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# -- what this process runs ------------------------------------------------------------------------------------------

# File -> its content when it was imported.
IMPORTED: dict[Path, bytes] = {}
# Class of a module that was imported in another way -> content of its file when it was first asked for.
FIRST_SEEN: "WeakKeyDictionary[type, bytes]" = WeakKeyDictionary()


class RecordingLoader(SourceFileLoader):
    """Imports a module from its source, and keeps that.

    A .pyc is not used: Python takes one for current if the source has the same size and was changed in the same second,
    so code and hash could be of different contents. Compiling the hundred modules of a run takes 0.2 seconds.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        content = IMPORTED[Path(path).resolve()] = self.get_data(path)
        return self.source_to_code(content, path)


class RecordingFinder:
    """Finds modules that answers depend on as the other finders do, and has them loaded by `RecordingLoader`."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in FOLLOWED and f"{name.replace('.', '/')}.py" not in ENTRIES:
            return None
        finders = (finder for finder in sys.meta_path if finder is not cls)
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = RecordingLoader(spec.loader.name, spec.loader.path)
        return spec


def record_imports() -> None:
    """Keep the content of every file that answers depend on when it is imported; of those that are already, now."""
    if RecordingFinder in sys.meta_path:
        return
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in FOLLOWED and (file := getattr(module, "__file__", None)):
            IMPORTED[Path(file).resolve()] = Path(file).read_bytes()
    sys.meta_path.insert(0, RecordingFinder)


# -- hashes of it ----------------------------------------------------------------------------------------------------


def answer_sources(*objects: Any, root: Path = PACKAGES, on_disk: bool = False) -> dict[str, str]:
    """File -> hash of its code, for the classes of `objects` and all project modules that they import.

    Args:
        objects: model and method; a composition has the files of its parts, too.
        root: folder of the project. Files outside of it are hashed under their name, and their imports are followed
            into the project.
        on_disk: of the files as they are now, not of what this process imported.
    """
    found: dict[Path, str] = {}
    waiting = [root / name for name in ENTRIES]
    classes = [cls for thing in objects for cls in (type(thing), *getattr(thing, "parts", ()))]
    for path, source in (file for cls in classes for file in class_files(cls, root, on_disk)):
        found[path], imported = read_source(path, root, source)
        waiting += imported
    while waiting:
        path = waiting.pop()
        if path not in found and (content := content_of(path, on_disk)) is not None:
            found[path], imported = read_source(path, root, content)
            waiting += imported
    return dict(sorted((file_name(path, root), digest) for path, digest in found.items()))


def check_sources(*objects: Any, known: Mapping[str, str] | None = None) -> None:
    """Raise UserError if code was edited after this process imported it; the error names the files.

    Args:
        objects: see `answer_sources`.
        known: what `answer_sources` gave before; modules that were imported since then must not differ from it either.
    """
    imported, now = (answer_sources(*objects, on_disk=on_disk) for on_disk in (False, True))
    changed = [name for other in (imported, now) for name in changed_files(known or imported, other)]
    if changed:
        raise UserError(
            f"Code was edited while this was running: {listed(list(dict.fromkeys(changed)))}. This process still has "
            "the code from before, so it stops. Nothing is lost: answers that are stored belong to the old code. Undo "
            "the edit and run the same command to go on; to ask those questions again with the new code, move them "
            "aside (--restart) or delete their folder."
        )


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def combined(files: Mapping[str, str]) -> str:
    """One hash for all files."""
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Files whose code differs, each with what happened to it."""
    return [
        name if name in old and name in new else f"{name} ({'new' if name in new else 'gone'})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def class_files(cls: type, root: Path, on_disk: bool) -> Iterator[tuple[Path, bytes]]:
    """Source files of a class and its bases, as far as they belong to the project or to the user's own code."""
    for base in cls.__mro__:
        try:
            path = Path(inspect.getsourcefile(base) or "").resolve()
        except (TypeError, OSError):  # built in, or typed at a prompt
            continue
        is_ours = path.is_relative_to(root) and path.relative_to(root).parts[0] in FOLLOWED
        is_library = any(path.is_relative_to(folder) for folder in LIBRARIES)
        if base is not cls and is_library and not is_ours:
            continue
        if (content := content_of(path, on_disk)) is not None:
            of_class = on_disk or path in IMPORTED
            yield path, content if of_class else FIRST_SEEN.setdefault(base, content)


def content_of(path: Path, on_disk: bool) -> bytes | None:
    """A file as this process imported it; as it is now if it has not, or `on_disk`; None if there is none."""
    if path in IMPORTED and not on_disk:
        return IMPORTED[path]
    try:
        return path.read_bytes()
    except OSError:
        return None


def file_name(path: Path, root: Path) -> str:
    """The path below the project's root, or the bare name of a file elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


@lru_cache(maxsize=4096)
def read_source(path: Path, root: Path, content: bytes) -> tuple[str, tuple[Path, ...]]:
    """Hash of a file's code, and the project files that it imports; of a file that is no Python, of its bytes."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # half an edit: it cannot be imported, and must not look like the code before
        return hashlib.sha256(content).hexdigest()[:12], ()
    imported = tuple(dict.fromkeys(project_files(tree, path, root)))
    digest = hashlib.sha256(canonical(tree).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return digest, imported


def canonical(tree: ast.Module) -> str:
    """The code as a text, without comments, docstrings and positions; the tree loses its docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def project_files(tree: ast.Module, path: Path, root: Path) -> Iterator[Path]:
    """Files of the packages in FOLLOWED that are imported anywhere in a module, inside functions as well."""
    package = path.relative_to(root).parent.parts if path.is_relative_to(root) else ()
    for node in ast.walk(tree):
        names: Iterable[tuple[str, ...]] = ()
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            names = [(*base, alias.name) for alias in node.names]
        for parts in names:
            if parts[0] in FOLLOWED and (file := module_file(parts, root)) is not None:
                yield file


def module_file(parts: tuple[str, ...], root: Path) -> Path | None:
    """The file of a dotted name: a module, or for a name in a module that module; None outside the project."""
    for length in (len(parts), len(parts) - 1):
        if length < 1:
            break
        place = root.joinpath(*parts[:length])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file in IMPORTED or file.is_file():
                return file
    return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], between: str = ", now") -> list[str]:
    """Settings that differ, as 'key: old, now new', and 'code: decoder.py' for files.

    Args:
        between: what stands between two values.
    """
    hashed = {key for key in HASHED if isinstance(old.get(key), dict) and isinstance(new.get(key), dict)}
    before, after = (flatten({key: value for key, value in one.items() if key not in hashed}) for one in (old, new))
    absent = "absent"
    found = [
        f"{key}: {before.get(key, absent)}{between} {after.get(key, absent)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]
    for key in sorted(hashed):
        if names := changed_files(old[key], new[key]):
            found.append(f"{HASHED[key]}: {listed(names)}")
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
