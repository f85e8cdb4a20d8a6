"""Leaves out of the toy's wheel what would make it four times as large.

The toy sets share GQA's images by links to their folder, and a wheel holds no links: of those images it has
copies of the ones that a set's questions name.
"""

import re
from functools import cache
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Videos, which the toy model does not take, and sets whose questions name hundreds of GQA's images again.
SETS = ("GPT_Zero_Shot_QA", "seed_bench", "vizwiz", "vqav2", "refcoco", "refcoco+", "refcocog", "coco")
LEFT_OUT = (*(Path("eval", name) for name in SETS), Path("eval/hub/lmms-lab-encoder/RefCOCO"))
QUESTIONS = (".json", ".jsonl", ".tsv", ".txt")


class ToyFiles(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        return [name for name in super().find_data_files(package, src_dir) if wanted(Path(name))]


def wanted(path: Path) -> bool:
    """Whether a data file belongs into the wheel."""
    if not path.is_file() or any(path.is_relative_to(folder) for folder in LEFT_OUT):
        return False
    shared = any(folder.is_symlink() for folder in path.parents)
    return not shared or path.stem in named(Path(*path.parts[:2]))


@cache
def named(folder: Path) -> frozenset[str]:
    """The images that the question files of a set name."""
    texts = (path.read_text() for path in folder.rglob("*") if path.suffix in QUESTIONS)
    return frozenset(name for text in texts for name in re.findall(r"(?:test|val)\d{5}[dn]", text))


setup(cmdclass={"build_py": ToyFiles})
