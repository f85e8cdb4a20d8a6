"""All that a method imports: base class, states, reductions, scores, rankings and the registry."""

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
from llava.reduction.merging import ANCHORS, WEIGHTS, Reduction, Step, merge_plan
from llava.reduction.modules import DecoderLayer, linear_flops
from llava.reduction.ranking import (
    cached_by_sizes,
    cover_greedily,
    distinct,
    farthest_apart,
    gather_tokens,
    in_float32,
    keep_top,
    largest_determinant,
    others,
    places,
    ranks,
    split,
)
from llava.reduction.reducer import (
    NEWLINES,
    SPLITS,
    MethodMetadata,
    Reducer,
    Reductions,
    Release,
    Scorer,
    option,
    options_of,
    seed_of,
)
from llava.reduction.registry import compose, register
from llava.reduction.scores import TowerScore
from llava.reduction.states import (
    RELEVANCE,
    AttentionInputs,
    BlockState,
    DecoderState,
    EncoderState,
    PromptState,
    State,
    angles_of,
    attention_flops,
    attention_rows,
    heads_of,
    seeing_spans,
)
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout
