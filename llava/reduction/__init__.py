"""What a method imports: base class, states, reductions, scores, rankings and the registry."""

from llava.errors import UserError
from llava.reduction.budget import (
    covered,
    over_crops,
    planned,
    refuse_budget,
    scaled_layers,
    split_evenly,
    tokens_by_layer,
)
from llava.reduction.decoder_attention import angles_of, attention_rows, prepared_angles, projected_heads
from llava.reduction.greedy import cover_greedily, distinct, farthest_apart, largest_determinant
from llava.reduction.merging import ANCHORS, WEIGHTS, Reduction, Step, merge_plan
from llava.reduction.modules import Angles, DecoderLayer, linear_flops
from llava.reduction.ranking import gather_tokens, keep_top, others, places, ranks, split
from llava.reduction.reducer import (
    NEWLINES,
    SPLITS,
    MethodMetadata,
    Reducer,
    Reductions,
    Scorer,
    option,
    options_of,
    seed_of,
)
from llava.reduction.registry import register
from llava.reduction.scores import TowerScore
from llava.reduction.states import (
    RELEVANCE,
    BlockState,
    DecoderState,
    EncoderState,
    PromptState,
    State,
    angles_at,
    at_spans,
    row_index,
    unseen,
)
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout

__all__ = [
    "ANCHORS",
    "NEWLINES",
    "RELEVANCE",
    "SPLITS",
    "WEIGHTS",
    "Angles",
    "BlockState",
    "DecoderLayer",
    "DecoderState",
    "EncoderState",
    "MethodMetadata",
    "ModelSpec",
    "PatchGrid",
    "PromptState",
    "Reducer",
    "Reduction",
    "Reductions",
    "Scorer",
    "State",
    "Step",
    "TokenLayout",
    "TowerScore",
    "UserError",
    "angles_at",
    "angles_of",
    "at_spans",
    "attention_rows",
    "cover_greedily",
    "covered",
    "distinct",
    "farthest_apart",
    "gather_tokens",
    "keep_top",
    "largest_determinant",
    "linear_flops",
    "merge_plan",
    "option",
    "options_of",
    "others",
    "over_crops",
    "places",
    "planned",
    "prepared_angles",
    "projected_heads",
    "ranks",
    "refuse_budget",
    "register",
    "row_index",
    "scaled_layers",
    "seed_of",
    "split",
    "split_evenly",
    "tokens_by_layer",
    "unseen",
]
