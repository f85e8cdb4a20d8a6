"""Hashes of the source code that answers depend on: model, method, and every project module that these import.

A stored answer is only valid for the code that made it. `answer_sources` follows import statements from the modules of
model and method, so editing one method leaves the stored answers of all others valid. Files are parsed before they are
hashed: comments, docstrings and formatting do not matter.

A process runs the code that it has imported, even if the file on disk has changed since. `record_imports` therefore
keeps the content of each file as it is imported, and hashes are taken from that. `check_sources` compares them with the
disk before a run writes anything that would pass for the work of the new code.

Modules of `eval` are not followed. They contribute the prompt and the images of an answer, and the answer store
compares both for every question. `differences` says in words which settings and files differ.
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
# Modules that neither model nor method imports: they load a model, run it and cache the vision tower's output.
ENTRIES = ("llava/model/checkpoint/load.py", "llava/pipeline/generate.py", "eval/feature_cache.py")
# Folders of libraries.
LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))
# Settings that are hashes of files, with a description; `listed` names at most NAMED files.
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
# For classes of modules that were imported without being recorded: class -> content of its file at the first look.
FIRST_SEEN: "WeakKeyDictionary[type, bytes]" = WeakKeyDictionary()


class RecordingLoader(SourceFileLoader):
    """Imports a module from its source and keeps the source.

    A .pyc is not used, because Python considers it current if the source has the same size and was changed in the same
    second; code and hash could then differ. Compiling the hundred modules of a run takes 0.2 seconds.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        content = IMPORTED[Path(path).resolve()] = self.get_data(path)
        return self.source_to_code(content, path)


class RecordingFinder:
    """Finds the modules that answers depend on with Python's other finders, and loads them with `RecordingLoader`."""

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
    """Keep the content of every file that answers depend on: as it is now if imported, else when it is imported."""
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
        objects: model and method; for a composition the files of its parts are included.
        root: folder of the project. A file outside it is listed by its bare name, and the project modules that it
            imports are included.
        on_disk: hash the files as they are now, not as this process imported them.
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
    names = {path: path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name for path in found}
    return dict(sorted((names[path], digest) for path, digest in found.items()))


def check_sources(*objects: Any, known: Mapping[str, str] | None = None) -> None:
    """Raise UserError, naming the files, if code was edited after this process imported it.

    Args:
        objects: see `answer_sources`.
        known: an earlier result of `answer_sources`; modules imported since then must match it too.
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
    """The first NAMED names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def combined(files: Mapping[str, str]) -> str:
    """One hash for all files."""
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names of files whose code differs, marked "new" or "gone" if only one side has the file."""
    return [
        name if name in old and name in new else f"{name} ({'new' if name in new else 'gone'})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def class_files(cls: type, root: Path, on_disk: bool) -> Iterator[tuple[Path, bytes]]:
    """Path and content of the source files of a class and its bases, except bases that come from libraries."""
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
    """A file as this process imported it; as it is now with `on_disk` or if not imported; None if there is no file."""
    if path in IMPORTED and not on_disk:
        return IMPORTED[path]
    try:
        return path.read_bytes()
    except OSError:
        return None


@lru_cache(maxsize=4096)
def read_source(path: Path, root: Path, content: bytes) -> tuple[str, tuple[Path, ...]]:
    """Hash of a file's code without comments, docstrings and layout, and the project files that it imports."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # half an edit: hashed as bytes, so that it differs from the code before
        return hashlib.sha256(content).hexdigest()[:12], ()
    imported = tuple(dict.fromkeys(project_files(tree, path, root)))
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    code = ast.dump(tree).encode("utf-8", "surrogatepass")
    return hashlib.sha256(code).hexdigest()[:12], imported


def project_files(tree: ast.Module, path: Path, root: Path) -> Iterator[Path]:
    """Files of the packages in FOLLOWED that a module imports anywhere, also inside functions."""
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
            if parts[0] not in FOLLOWED:
                continue
            # A dotted name is a module, or a name in a module.
            places = [root.joinpath(*parts[:length]) for length in (len(parts), len(parts) - 1) if length]
            files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
            if (file := next((file for file in files if file in IMPORTED or file.is_file()), None)) is not None:
                yield file


def differences(old: Mapping[str, Any], new: Mapping[str, Any], between: str = ", now") -> list[str]:
    """Settings that differ, as "key: old, now new"; for files "code: decoder.py".

    Args:
        between: text between the two values.
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
