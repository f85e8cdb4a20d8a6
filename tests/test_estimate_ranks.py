"""Expected weights of a rank, against two real ranks that hold one model."""

import pytest
import torch

from eval.efficiency.estimate import Estimate, Workload
from llava.model.builder import runtime
from llava.model.checkpoint.load import outline_checkpoint
from llava.reduction import registry
from tests import rank_weights, two_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    rank_weights.save(path)
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    return two_ranks.run("tests.rank_weights:session", folder)


@pytest.mark.parametrize("spread", rank_weights.SPREADS)
@pytest.mark.parametrize("family", ["llava", "next", "qwen"])
def test_weights_of_a_rank_are_as_expected(folder, ranks, family, spread):
    model = runtime(outline_checkpoint(folder / family), torch.device("meta"), {})
    full, work = registry.build("full", model.visual_tokens), Workload((), 0.0, 1, 1)
    expected = Estimate(model, full, work, 1, 1, torch.float32, spread=rank_weights.SPREADS[spread]).weights
    found = [rank[family, spread] for rank in ranks]
    held, partitions = (sum(rank[kind] for rank in found) / 2 for kind in ("held", "partitions"))
    if spread == "tensor parallel":
        # DeepSpeed cuts MLPs as narrow as these into 64 and 32 columns: the mean of the ranks is what is expected.
        assert (held, partitions) == (expected.total, 0)
    else:
        layers = model.llm.layers.parameters()
        vectors = sum(weight.nbytes for weight in layers if weight.dim() == 1)
        # Norms and biases are partitioned too until the first pass gathers them; the estimate is of what comes then.
        kept = expected.total - expected.device["gathered"] + sum(expected.host.values())
        assert held + partitions == kept - vectors / 2
