"""Hashes of the source that answers depend on: the model, the method, and every project module that they import.

A stored answer is only valid for the code that made it. `answer_sources` follows the import statements of the modules
of model and method, so that editing one method leaves the stored answers of all others valid. Files are parsed before
they are hashed: comments, docstrings and formatting do not matter.

Modules of `eval` are not followed. What they contribute to an answer is its prompt and its images, and the answer
store compares both for every question. `differences` says in words which settings and files differ.
"""

import ast
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

# The project.
ROOT = Path(__file__).resolve().parents[2]
# Imports from this package are not followed, see above.
NOT_FOLLOWED = "eval"
# What loads a model, runs it under a method, and remembers the output of its tower; model and method import none of it.
ENTRIES = ("llava/model/checkpoint/load.py", "llava/pipeline/generate.py", "eval/feature_cache.py")
# Settings that are hashes of files, and what these are in words; of so many files the names are said.
HASHED = {
    "code": "code",
    "method_code": "code of the method",
    "model_files": "files of the model",
    "text_tower": "files of the text tower",
}
NAMED = 5
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def answer_sources(*objects: Any, root: Path = ROOT) -> dict[str, str]:
    """File -> hash of its code, for the classes of `objects` and all project modules that they import.

    Args:
        objects: model and method; a composition has the files of its parts, too.
        root: folder of the project. Files outside of it are hashed under their name, and their imports are followed
            into the project.
    """
    found: dict[Path, str] = {}
    classes = [cls for thing in objects for cls in (type(thing), *getattr(thing, "parts", ()))]
    waiting = [path for cls in classes for path in class_files(cls, root)]
    waiting += [path for name in ENTRIES if (path := root / name).is_file()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        state = path.stat()
        found[path], imported = read_source(path, root, state.st_mtime_ns, state.st_size)
        waiting += imported
    return dict(sorted((file_name(path, root), digest) for path, digest in found.items()))


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


def class_files(cls: type, root: Path) -> Iterator[Path]:
    """Source files of a class and its bases, as far as they belong to the project or to the user's own code."""
    for base in cls.__mro__:
        try:
            source = inspect.getsourcefile(base)
        except (TypeError, OSError):  # built in, or typed at a prompt
            continue
        path = Path(source or "").resolve()
        if path.is_file() and (base is cls or path.is_relative_to(root)):
            yield path


def file_name(path: Path, root: Path) -> str:
    """The path below the project's root, or the bare name of a file elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


@lru_cache(maxsize=4096)
def read_source(path: Path, root: Path, modified: int, size: int) -> tuple[str, tuple[Path, ...]]:
    """Hash of a file's code, and the project files that it imports.

    Args:
        modified, size: of the file; the result is remembered until one of them changes.
    """
    tree = ast.parse(path.read_bytes())
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
    """Project files that are imported anywhere in a module, inside functions as well; `eval` is left out."""
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
            file = module_file(parts, root)
            if file is not None and parts[0] != NOT_FOLLOWED:
                yield file


def module_file(parts: tuple[str, ...], root: Path) -> Path | None:
    """The file of a dotted name: a module, or for a name in a module that module; None outside the project."""
    for length in (len(parts), len(parts) - 1):
        if length < 1:
            break
        place = root.joinpath(*parts[:length])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
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
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            found.append(f"{HASHED[key]}: {', '.join(names[:NAMED])}{more}")
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
