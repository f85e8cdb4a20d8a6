"""A checkpoint is read once and never held twice."""

from collections import Counter

import pytest
import torch
from safetensors import safe_open

import llava.model.checkpoint.files
import llava.model.checkpoint.load
from llava.model.checkpoint.load import load_checkpoint
from tests.tiny_checkpoints import save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import save_next_original, save_qwen_transformers, save_video_original

SAVERS = {
    "llava": save_transformers_layout,
    "llava bin": lambda path: save_transformers_layout(path, safetensors=False),
    "original": save_original_layout,
    "next": save_next_original,
    "video": save_video_original,
    "video, towers apart": lambda path: save_video_original(path, towers_in_shards=False),
    "qwen": save_qwen_transformers,
}


@pytest.mark.parametrize("name", SAVERS)
def test_every_weight_is_read_once(tmp_path, monkeypatch, name):
    SAVERS[name](tmp_path)
    reads = Counter()

    class Counting:
        def __init__(self, path, *args):
            self.path, self.file = path, safe_open(path, *args)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, key):
            reads[str(self.path), key] += 1
            return self.file.get_tensor(key)

    original = torch.load

    def load(path, **options):
        assert options == {"map_location": "cpu", "weights_only": True, "mmap": True}
        reads[str(path)] += 1
        return original(path, **options)

    monkeypatch.setattr(llava.model.checkpoint.files, "safe_open", Counting)
    monkeypatch.setattr(torch, "load", load)
    load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert reads
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("name", SAVERS)
def test_weights_in_the_right_dtype_stay_where_they_are_mapped(tmp_path, monkeypatch, name):
    SAVERS[name](tmp_path)
    mapped = set()

    def read(directory):
        weights = llava.model.checkpoint.files.read_weights(directory)
        mapped.update(tensor.data_ptr() for tensor in weights.values())
        return weights

    monkeypatch.setattr(llava.model.checkpoint.load, "read_weights", read)
    model = load_checkpoint(tmp_path).model
    assert {weight.data_ptr() for weight in model.parameters()} <= mapped


@pytest.mark.parametrize("name", SAVERS)
def test_converted_weights_own_exactly_their_bytes(tmp_path, name):
    """No weight is a view into something larger that would be kept alive with it."""
    SAVERS[name](tmp_path)
    for key, weight in load_checkpoint(tmp_path, dtype=torch.bfloat16).model.state_dict().items():
        assert weight.untyped_storage().nbytes() == weight.nbytes, key
