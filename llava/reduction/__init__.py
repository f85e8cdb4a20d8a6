"""What a method imports: base class, states, reductions, scores, rankings and the registry."""

from llava.errors import UserError
from llava.reduction.clip_similarity import RELEVANCE, signed, text_similarity
from llava.reduction.crop_budget import covered, deal, over_crops, planned
from llava.reduction.decoder_attention import (
    Angles,
    angles_of,
    attention_rows,
    layer_keys,
    prepared_angles,
    text_to_visual_attention,
)
from llava.reduction.flops import linear_flops
from llava.reduction.greedy import cover_greedily, distinct, farthest_apart, farthest_from, largest_determinant
from llava.reduction.layer_schedule import (
    largest_within,
    proportional,
    refuse_budget,
    scaled_layers,
    tokens_by_layer,
)
from llava.reduction.merging import (
    ANCHORS,
    WEIGHTS,
    assign,
    choose_anchors,
    member_weights,
    merge_flops,
    merge_plan,
    unit_length,
    with_cls,
)
from llava.reduction.model_spec import ModelSpec, spec_of
from llava.reduction.modules import DecoderLayer
from llava.reduction.options import option, options_of
from llava.reduction.ranking import descending_order, gather_tokens, keep_top, others, places, ranks, split
from llava.reduction.reducer import NEWLINES, SPLITS, MethodMetadata, Reducer, Reductions, Scorer, seed_of
from llava.reduction.reduction import Reduction, Step, Trace
from llava.reduction.registry import register
from llava.reduction.scores import TowerScore
from llava.reduction.states import (
    BlockState,
    DecoderState,
    EncoderState,
    PromptState,
    State,
    angles_at,
    at_spans,
    row_index,
    text_spans,
    unseen,
)
from llava.reduction.token_layout import PatchGrid, TokenLayout

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
    "Trace",
    "UserError",
    "angles_at",
    "angles_of",
    "assign",
    "at_spans",
    "attention_rows",
    "choose_anchors",
    "cover_greedily",
    "covered",
    "deal",
    "descending_order",
    "distinct",
    "farthest_apart",
    "farthest_from",
    "gather_tokens",
    "keep_top",
    "largest_determinant",
    "largest_within",
    "layer_keys",
    "linear_flops",
    "member_weights",
    "merge_flops",
    "merge_plan",
    "option",
    "options_of",
    "others",
    "over_crops",
    "places",
    "planned",
    "prepared_angles",
    "proportional",
    "ranks",
    "refuse_budget",
    "register",
    "row_index",
    "scaled_layers",
    "seed_of",
    "signed",
    "spec_of",
    "split",
    "text_similarity",
    "text_spans",
    "text_to_visual_attention",
    "tokens_by_layer",
    "unit_length",
    "unseen",
    "with_cls",
]
