"""config.json: what its fields may be, which model they describe, and what they and weights are called in transformers.

A config.json is checked once, where it is read: types and ranges of every field that this code relies on. Unknown
fields are allowed, since config.json files hold many; absent and null fields take the library's defaults.

The fields of config.json decide on family, layout, decoder and prompt template. model_type alone is ambiguous: "llava"
stands for LLaVA-1.5, LLaVA-NeXT and Video-LLaVA in the original layout and for LLaVA-1.5 in the transformers layout.
The original layout (flat decoder config, mm_* fields, LLaVA's own weight names) is translated to transformers'.

Pure functions on names and dictionaries; llava/model/checkpoint/load.py reads the files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py, llava_arch.py, multimodal_projector/builder.py;
PKU-YuanGroup/Video-LLaVA@984e65b, videollava/model/llava_arch.py and multimodal_encoder
Differs from it: a vision tower in the shards is used. The official code ignores it for LLaVA-1.5 and Video-LLaVA and
loads mm_vision_tower instead (LLaVA issues 382 and 1694); the weights are the same if the tower was frozen.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from huggingface_hub.errors import StrictDataclassError
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava.errors import UserError, unknown
from llava.processing.image import MERGES, Side, parse_pinpoints
from llava.processing.json_files import Schema
from llava.processing.video import FRAMES

Family = Literal["llava", "llava_next", "video_llava", "qwen2_5_vl", "qwen2_vl"]
CheckpointLayout = Literal["transformers", "original"]
Decoder = Literal["llama", "mistral", "qwen2"]

NAMES: dict[Family, str] = {
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "video_llava": "Video-LLaVA",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
}
SUPPORTED = (
    "this version reads LLaVA-1.5, LLaVA-NeXT and Video-LLaVA (CLIP towers, an mlp2x_gelu projector, a Llama or "
    "Mistral decoder) in the transformers and the original layout, and Qwen2-VL and Qwen2.5-VL in the transformers "
    "layout"
)
QWEN: tuple[Family, ...] = ("qwen2_5_vl", "qwen2_vl")

PARTS = ("text_config", "vision_config")
# Fields that say what becomes of a tower's class token -> the only value that is supported.
CLASS_TOKEN = {"vision_feature_select_strategy": "default", "mm_vision_select_feature": "patch"}
# Fields of vision_config that only one of the two Qwens has.
QWEN_FIELDS = {"qwen2_5_vl": ("fullatt_block_indexes", "window_size"), "qwen2_vl": ("embed_dim", "mlp_ratio")}

# Of the original layout, by the class in `architectures` or else by model_type.
DECODERS: dict[str, Decoder] = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

NEEDED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# The towers of the official checkpoints: shards that contain their weights need no second download.
CLIP_L_336_NAME = "openai/clip-vit-large-patch14-336"
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LANGUAGEBIND_NAMES = ("LanguageBind/LanguageBind_Image", "LanguageBind/LanguageBind_Video_merge")
# Trained from OpenCLIP's ViT-L/14, which has the exact GELU, unlike OpenAI's.
LANGUAGEBIND = {**CLIP_L_336, "image_size": 224, "hidden_act": "gelu"}

# Field of config.json -> module of the HF model. The shards repeat the module's name: model.<module>.<module>.
TOWER_MODULES = {
    "mm_vision_tower": "vision_tower",
    "mm_image_tower": "image_tower",
    "mm_video_tower": "video_tower",
}
# Names of weights -> names in the HF model of transformers 5, for the original layout, the files of the hub and Qwen's.
_TOWER = r"(vision_tower|image_tower|video_tower)"
ORIGINAL_KEYS = (
    (re.compile(r"^model\.(vision|image|video)_tower\.\1_tower\.(?:vision_model\.)?"), r"model.\1_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
HUB_KEYS = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(rf"^(?:model\.)?{_TOWER}\.(?:vision_model\.)?"), r"model.\1."),
    (re.compile(r"^(?=multi_modal_projector\.|image_newline$)"), "model."),
)
QWEN_KEYS = (
    (re.compile(r"^(?=visual\.)"), "model."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
ORIGINAL_NAMES = re.compile(r"^model\.(?:mm_projector|(vision|image|video)_tower\.\1_tower)\.")
HUB_NAMES = re.compile(rf"^(?:(?:model\.)?(?:language_model|multi_modal_projector)|{_TOWER})\.")
CLIP_VISION_KEY = re.compile(r"^(?:vision_model\.)?(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)")


# What the fields may be

# "default" is computed by the models themselves; "mrope" is Qwen's old name for it.
ROPE_TYPES = ("default", "mrope", *ROPE_INIT_FUNCTIONS)


def _one_of(what: str, known: Collection[str]) -> AfterValidator:
    """A check that a text is one of the known names."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(str(unknown(what, name, known)))
        return name

    return AfterValidator(check)


Layers = Annotated[int, Field(ge=1, le=256)]  # of a model that can be built within seconds
Width = Annotated[int, Field(ge=1, le=2**20)]
Rows = Annotated[int, Field(ge=1, le=2**24)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
RopeTheta = Annotated[float, Field(ge=1)]
Colours = Annotated[int, Field(ge=3, le=3)]
Activation = Annotated[str, _one_of("activation", ACT2FN)]
RopeType = Annotated[str, _one_of("rope_type", ROPE_TYPES)]


class Rope(Schema):
    """rope_parameters, or rope_scaling of older files, of a decoder; the library says which of them a type needs."""

    # May be absent but not null, which the library takes for a value.
    rope_type: RopeType = "default"
    type: RopeType = "default"
    rope_theta: RopeTheta = 10_000.0
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: Rows | None = None
    attention_factor: PositiveFloat | None = None
    mrope_section: list[NonNegativeInt] | None = None


class Transformer(Schema):
    """What decoders and CLIP's towers share."""

    hidden_size: Width | None = None
    intermediate_size: Rows | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Width | None = None
    num_key_value_heads: Width | None = None
    hidden_act: Activation | None = None
    attention_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    head_dim: Width | None = None

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads and self.hidden_size and not self.head_dim and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if heads and groups and heads % groups:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
        return self


class DecoderConfig(Transformer):
    """A Llama, Mistral or Qwen2 decoder."""

    vocab_size: Rows | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**31)] | None = None
    rms_norm_eps: Epsilon | None = None
    rope_theta: RopeTheta | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    initializer_range: Annotated[float, Field(ge=0)] | None = None
    sliding_window: PositiveInt | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: NonNegativeInt | None = None
    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = None
    # Files of the hub write -1 for "none".
    pad_token_id: Annotated[int, Field(ge=-1)] | None = None

    @model_validator(mode="after")
    def _known_tokens(self) -> Self:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            highest = max(value, default=0) if isinstance(value, list) else value or 0
            if self.vocab_size is not None and highest >= self.vocab_size:
                raise ValueError(f"{name} {value} is outside the vocabulary of {self.vocab_size}")
        return self


class VisionConfig(Transformer):
    """A CLIP vision tower, or that of Qwen2-VL or Qwen2.5-VL."""

    image_size: Side = 224  # may be absent but not null, which the library takes for a value
    patch_size: Side = 32
    layer_norm_eps: Epsilon | None = None
    projection_dim: Width | None = None
    num_channels: Colours | None = None
    # Qwen's own
    depth: Layers | None = None
    embed_dim: Width | None = None
    out_hidden_size: Width | None = None
    mlp_ratio: PositiveFloat | None = None
    num_heads: Width | None = None
    in_channels: Colours | None = None
    spatial_merge_size: Side | None = None
    temporal_patch_size: Side | None = None
    window_size: Side | None = None
    fullatt_block_indexes: list[NonNegativeInt] | None = None

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        return self


class ClipTextConfig(Transformer):
    """A CLIP text tower."""

    max_position_embeddings: Annotated[int, Field(ge=3, le=2**16)] | None = None
    layer_norm_eps: Epsilon | None = None
    projection_dim: Width | None = None
    vocab_size: Rows | None = None


class _Part(Schema):
    model_type: str | None = None
    quantization_config: dict[str, Any] | None = None


class Identity(_Part):
    """The fields of any config.json that tell the family, the layout and the dtype."""

    dtype: str | None = None
    torch_dtype: str | None = None
    architectures: list[str | None] | None = None
    text_config: _Part | None = None
    vision_config: _Part | None = None


class ClipConfig(Schema):
    """config.json of a CLIP folder: a whole CLIP or, with the fields at the top, its vision tower."""

    text_config: ClipTextConfig | None = None
    vision_config: VisionConfig | None = None
    projection_dim: Width | None = None
    patch_similarity: str | None = None


class NestedConfig(Schema):
    """config.json of the transformers layout."""

    text_config: DecoderConfig
    vision_config: VisionConfig
    image_token_index: NonNegativeInt | None = None
    video_token_index: NonNegativeInt | None = None
    image_seq_length: PositiveInt | None = None
    video_seq_length: PositiveInt | None = None
    projector_hidden_act: Activation | None = None
    multimodal_projector_bias: bool | None = None


class QwenFlatConfig(DecoderConfig):
    """config.json of Qwen2-VL or Qwen2.5-VL on the hub: the decoder's fields are not nested."""

    vision_config: VisionConfig


class OriginalConfig(DecoderConfig):
    """config.json of the original layout: a flat decoder config and mm_* fields."""

    mm_vision_tower: str | None = None
    mm_image_tower: str | None = None
    mm_video_tower: str | None = None
    mm_projector_type: str | None = None
    mm_patch_merge_type: str | None = None
    mm_use_im_start_end: bool | None = None
    image_aspect_ratio: str | None = None


# Which model they describe


class Kind(NamedTuple):
    """Family, layout and decoder of a config.json."""

    family: Family
    layout: CheckpointLayout
    decoder: Decoder


LLAVA = Kind("llava", "original", "llama")


def identify(config: Mapping[str, Any], where: Path) -> Kind:
    """Return family, layout and decoder.

    Args:
        config: config.json.
        where: its folder, for the error.

    Raises:
        UserError: the family is not supported, or the fields contradict one another.
    """
    original = [field for field in TOWER_MODULES if config.get(field) is not None]
    nested = [field for field in PARTS if isinstance(config.get(field), dict)]
    if original and nested:
        raise _contradiction(
            where, f"{original[0]}, a field of the original layout, and {nested[0]}, one of transformers'"
        )
    if not original and "vision_config" not in nested:  # on the hub it is the only nested part of a Qwen-VL
        raise _unsupported(where, config.get("model_type", "unknown"))
    kind = _original(config, original, where) if original else _transformers(config, where)
    for field, only in CLASS_TOKEN.items():
        if config.get(field) not in (None, only):
            raise UserError(
                f"{where}: {field} is {config[field]!r}; only {only!r} is supported, which drops the class token."
            )
    return kind


def default_mode(kind: Kind, vocabulary: Mapping[str, int]) -> str:
    """Return the prompt template that benchmark scripts use for a checkpoint's images.

    Args:
        vocabulary: of the tokenizer. ChatML's tokens are in the one of LLaVA-1.6-34B (Nous-Hermes-2-Yi), Llama-3's in
            those of LLaVA-NeXT with a Llama-3 decoder; Vicuna's and Mistral's have neither.
    """
    if kind.family in QWEN:
        return "qwen2_vl"
    if all(token in vocabulary for token in CHATML_TOKENS):
        return "chatml_direct"
    if all(token in vocabulary for token in LLAMA_3_TOKENS):
        return "llava_llama_3"
    return "mistral_instruct" if kind.decoder == "mistral" else "vicuna_v1"


def _original(config: Mapping[str, Any], towers: list[str], where: Path) -> Kind:
    names = [name for name in config.get("architectures") or () if name] or [config.get("model_type", "unknown")]
    if len(names) != 1 or names[0] not in DECODERS:
        raise _unsupported(where, ", ".join(names))
    decoder = DECODERS[names[0]]
    if towers != ["mm_vision_tower"]:
        if "mm_vision_tower" in towers:
            raise _contradiction(where, f"mm_vision_tower and {towers[1]}, which are of different families")
        if len(towers) == 1:
            other = next(field for field in TOWER_MODULES if field != "mm_vision_tower" and field not in towers)
            raise UserError(
                f"{where} names only one tower ({towers[0]}); Video-LLaVA needs two, add {other} to config.json."
            )
        return Kind("video_llava", "original", decoder)
    tiled = "anyres" in str(config.get("image_aspect_ratio")) or (config.get("mm_patch_merge_type") or "flat") != "flat"
    return Kind("llava_next" if tiled else "llava", "original", decoder)


def _transformers(config: Mapping[str, Any], where: Path) -> Kind:
    family, vision = config.get("model_type", "unknown"), config["vision_config"]
    if family in QWEN:
        owners = [owner for owner, fields in QWEN_FIELDS.items() if any(field in vision for field in fields)]
        if owners not in ([], [family]):
            raise _contradiction(where, f"model_type {family} and a vision_config of {' and '.join(owners)}")
        return Kind(family, "transformers", "qwen2")
    if family not in ("llava", "llava_next", "video_llava") or not isinstance(config.get("text_config"), dict):
        raise _unsupported(where, family)
    text = config["text_config"].get("model_type", "llama")
    tower = vision.get("model_type", "clip_vision_model")
    if text not in ("llama", "mistral") or tower != "clip_vision_model":
        raise _unsupported(where, f"{family} ({tower} tower, {text} decoder)")
    tiled = config.get("image_grid_pinpoints") is not None
    filmed = config.get("video_token_index") is not None or config.get("video_seq_length") is not None
    for seen, owner, field in ((tiled, "llava_next", "image_grid_pinpoints"), (filmed, "video_llava", "video tokens")):
        if seen and family != owner:
            raise _contradiction(where, f"model_type {family} and {field}, which only {owner} has")
    return Kind(family, "transformers", text)


def _unsupported(where: Path, family: str) -> UserError:
    return UserError(f"{where} is a checkpoint of the family {family}, which is not supported: {SUPPORTED}.")


def _contradiction(where: Path, what: str) -> UserError:
    return UserError(f"{where}/config.json contradicts itself: it has {what}; take the config of one checkpoint.")


def library_config(build: Any, fields: Mapping[str, Any], directory: Path, what: str) -> Any:
    """The library's configuration from the fields of a config.json, which its schema has checked.

    Args:
        build: a configuration class of transformers.
        directory: of the config.json.
        what: the fields describe, in words.

    Raises:
        UserError: transformers refuses the fields.
    """
    try:
        return build.from_dict(dict(fields))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{directory}/config.json describes no {what}: {' '.join(str(error).split())}") from error


# Names of weights


def hf_key(key: str, kind: Kind = LLAVA) -> str:
    """Return the name in the HF model of a weight. One that no rule matches is kept, and `fill` finds it unexpected."""
    rules = ORIGINAL_KEYS if kind.layout == "original" else QWEN_KEYS if kind.family in QWEN else HUB_KEYS
    for pattern, replacement in rules:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def hf_tower_key(key: str, module: str = "vision_tower") -> str | None:
    """Return the name in the HF model of a weight of a stand-alone CLIP; None for weights of its text tower."""
    return CLIP_VISION_KEY.sub(f"model.{module}.", key) if CLIP_VISION_KEY.match(key) else None


def refuse_other_names(keys: Mapping[str, Any], kind: Kind, directory: Path) -> None:
    """Raise UserError if weights are named as in the other layout than config.json."""
    other, foreign = ("transformers", HUB_NAMES) if kind.layout == "original" else ("original", ORIGINAL_NAMES)
    misnamed = next((key for key in keys if foreign.match(key)), None)
    if misnamed is not None:
        raise UserError(
            f"{directory} mixes two layouts: config.json is of the {kind.layout} layout, but the weight {misnamed} has "
            f"a name of the {other} one; take both from one checkpoint."
        )


# Fields


def to_transformers_config(
    config: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    kind: Kind = LLAVA,
    frames: int = FRAMES,
) -> dict[str, Any]:
    """Return the fields of a LlavaConfig, LlavaNextConfig or VideoLlavaConfig.

    Args:
        vision_config: a CLIPVisionConfig as a dictionary, for one or both towers.
        frames: of a video.
    """
    missing = [field for field in NEEDED_FIELDS if config.get(field) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}; an original LLaVA config is a flat decoder config.")
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise UserError(
            f"The projector type {projector!r} is not supported: the transformers LLaVA class has exactly two linear "
            "layers with a GELU in between, which is 'mlp2x_gelu'."
        )
    if config.get("mm_use_im_start_end", False):
        raise UserError("mm_use_im_start_end is set; image start and end tokens are not supported.")
    layer = config.get("mm_vision_select_layer")
    patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    copied = [field for field in DecoderConfig.model_fields if field != "sliding_window"]
    text_config = {field: config[field] for field in copied if config.get(field) is not None}
    if kind.decoder == "mistral" and "sliding_window" in config:
        text_config["sliding_window"] = config["sliding_window"]  # null is no window; the library's default is 4096
    fields: dict[str, Any] = {
        "text_config": {"model_type": kind.decoder, **text_config},
        "vision_config": {**vision_config, "model_type": "clip_vision_model"},
        # The first id after the vocabulary, as in the checkpoints of the hub; the embedding has no row for it here.
        "image_token_index": config["vocab_size"],
        "image_seq_length": patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2 if layer is None else layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if kind.family == "llava_next":
        points = parse_pinpoints(config.get("image_grid_pinpoints"), vision_config["image_size"])
        fields["image_grid_pinpoints"] = [list(pair) for pair in points]
    elif kind.family == "video_llava":
        fields["video_token_index"] = config["vocab_size"] + 1
        fields["video_seq_length"] = (patches + 1) * frames
    return fields


def merge_type(config: Mapping[str, Any]) -> str:
    """Return how an original LLaVA-NeXT checkpoint merges the tiles of an image.

    Raises:
        UserError: its tiling or merging is not supported.
    """
    aspect = config.get("image_aspect_ratio")
    merge = config.get("mm_patch_merge_type") or "flat"
    if aspect != "anyres" or merge not in MERGES:
        raise UserError(
            f"image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r} is not supported; expected "
            f"'anyres' with {' or '.join(map(repr, MERGES))}, as in the LLaVA-1.6 checkpoints."
        )
    return merge
