"""Schemas of the configuration files of a checkpoint: types and ranges of every field that this code relies on.

A config.json is checked once, where it is read. Unknown fields are allowed, since config.json files hold many; absent
and null fields take the library's defaults. The classes are pydantic models in strict mode: no text counts as a number.
"""

from collections.abc import Collection, Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava.errors import UserError, unknown

# "default" is computed by the models themselves; "mrope" is Qwen's old name for it.
ROPE_TYPES = ("default", "mrope", *ROPE_INIT_FUNCTIONS)
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

LAYERS = 256  # of a model that can be built within seconds
WIDTH = 2**20
ROWS = 2**24
LARGEST_SIDE = 2**14
BICUBIC = 3  # of PIL.Image.Resampling


def _one_of(what: str, known: Collection[str]) -> AfterValidator:
    """A check that a text is one of the known names."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(str(unknown(what, name, known)))
        return name

    return AfterValidator(check)


Layers = Annotated[int, Field(ge=1, le=LAYERS)]
Width = Annotated[int, Field(ge=1, le=WIDTH)]
Rows = Annotated[int, Field(ge=1, le=ROWS)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Token = Annotated[int, Field(ge=0)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Activation = Annotated[str, _one_of("activation", ACT2FN)]
RopeType = Annotated[str, _one_of("rope_type", ROPE_TYPES)]
Mean = Annotated[tuple[float, float, float] | None, Field(strict=False)]
Deviation = Annotated[tuple[Positive, Positive, Positive] | None, Field(strict=False)]


class Schema(BaseModel):
    """Strict about types, finite numbers only, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Rope(Schema):
    """rope_parameters, or rope_scaling of older files, of a decoder."""

    # May be absent but not null, which the library takes for a value.
    rope_type: RopeType = "default"
    type: RopeType = "default"
    rope_theta: Annotated[float, Field(ge=1)] = 10_000.0
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Rows | None = None
    attention_factor: Positive | None = None
    mrope_section: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        kind = self.rope_type if "rope_type" in self.model_fields_set else self.type
        missing = [name for name in ROPE_NEEDS.get(kind, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)}")
        return self


class Transformer(Schema):
    """What decoders and CLIP's towers share."""

    hidden_size: Width | None = None
    intermediate_size: Rows | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Width | None = None
    hidden_act: Activation | None = None
    attention_dropout: Probability | None = None
    head_dim: Width | None = None

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        heads = self.num_attention_heads
        if heads and self.hidden_size and not self.head_dim and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        return self


class DecoderConfig(Transformer):
    """A Llama, Mistral or Qwen2 decoder."""

    num_key_value_heads: Width | None = None
    vocab_size: Rows | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**31)] | None = None
    rms_norm_eps: Epsilon | None = None
    rope_theta: Annotated[float, Field(ge=1)] | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    initializer_range: Annotated[float, Field(ge=0)] | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | list[Token] | None = None
    # Files of the hub write -1 for "none".
    pad_token_id: Annotated[int, Field(ge=-1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads and groups and heads % groups:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
        ids = {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}
        for name, value in ids.items():
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
    num_channels: Annotated[int, Field(ge=3, le=3)] | None = None
    # Qwen's own
    depth: Layers | None = None
    embed_dim: Width | None = None
    out_hidden_size: Width | None = None
    mlp_ratio: Positive | None = None
    num_heads: Width | None = None
    in_channels: Annotated[int, Field(ge=3, le=3)] | None = None
    spatial_merge_size: Side | None = None
    temporal_patch_size: Side | None = None
    window_size: Side | None = None
    fullatt_block_indexes: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
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
    image_token_index: Token | None = None
    video_token_index: Token | None = None
    image_seq_length: Annotated[int, Field(ge=1)] | None = None
    video_seq_length: Annotated[int, Field(ge=1)] | None = None
    projector_hidden_act: Activation | None = None
    multimodal_projector_bias: bool | None = None
    vision_feature_layer: int | None = None
    vision_feature_select_strategy: str | None = None

    @model_validator(mode="after")
    def _no_class_token(self) -> Self:
        if self.vision_feature_select_strategy not in (None, "default"):
            raise ValueError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}; only 'default' is "
                "supported, which drops the class token"
            )
        return self


class QwenFlatConfig(DecoderConfig):
    """config.json of Qwen2-VL or Qwen2.5-VL on the hub: the decoder's fields are not nested."""

    vision_config: VisionConfig


class OriginalConfig(DecoderConfig):
    """config.json of the original layout: a flat decoder config and mm_* fields."""

    mm_vision_tower: str | None = None
    mm_image_tower: str | None = None
    mm_video_tower: str | None = None
    mm_projector_type: str | None = None
    mm_vision_select_layer: int | None = None
    mm_vision_select_feature: str | None = None
    mm_patch_merge_type: str | None = None
    mm_use_im_start_end: bool | None = None
    image_aspect_ratio: str | None = None

    @model_validator(mode="after")
    def _no_class_token(self) -> Self:
        if self.mm_vision_select_feature not in (None, "patch"):
            raise ValueError(
                f"mm_vision_select_feature is {self.mm_vision_select_feature!r}; only 'patch' is supported, which "
                "drops the class token"
            )
        return self


class PreprocessorConfig(Schema):
    """preprocessor_config.json of a CLIP or Qwen image processor, as far as it is common to both."""

    image_mean: Mean = None
    image_std: Deviation = None
    do_resize: bool | None = None
    do_center_crop: bool | None = None
    do_rescale: bool | None = None
    do_normalize: bool | None = None
    rescale_factor: Positive | None = None
    resample: int | None = None
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    patch_size: Side | None = None
    merge_size: Side | None = None
    temporal_patch_size: Side | None = None


def checked_preprocessor(config: Mapping[str, Any], steps: Sequence[str], name: str) -> PreprocessorConfig:
    """Validate an image preprocessor's configuration.

    Args:
        steps: that the tower needs, as "do_resize".
        name: of the preprocessing, for errors.

    Raises:
        UserError: a value is impossible, or asks for what would not be done.
    """
    values = checked(PreprocessorConfig, config, "The image preprocessor's configuration")
    off = [step for step in steps if not config.get(step, True)]
    if off:
        raise UserError(
            f"The image preprocessor switches off {', '.join(off)}; only full {name} preprocessing is supported."
        )
    if values.resample not in (None, BICUBIC):
        raise UserError(
            f"The image preprocessor asks for resample={values.resample}; images are resized with {BICUBIC}, bicubic."
        )
    if values.rescale_factor is not None and not isclose(values.rescale_factor, 1 / 255, rel_tol=1e-6):
        raise UserError(
            f"The image preprocessor asks for rescale_factor={values.rescale_factor:g}; pixels are divided by 255 here."
        )
    return values


class PixelBounds(Schema):
    """size of a Qwen preprocessor_config.json: numbers of pixels, although newer files call them edges."""

    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    shortest_edge: Annotated[int, Field(ge=1)] | None = None
    longest_edge: Annotated[int, Field(ge=1)] | None = None


class WeightIndex(Schema):
    """model.safetensors.index.json or pytorch_model.bin.index.json: tensor name -> file name."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]] = Field(min_length=1)


S = TypeVar("S", bound=Schema)


def checked(schema: type[S], content: Mapping[str, Any], where: str | Path) -> S:
    """Validate a configuration against its schema.

    Args:
        where: names the configuration in the error, such as the path of its file.

    Raises:
        UserError: names up to three fields that have the wrong type or an impossible value.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = [_problem(one) for one in error.errors()]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{where} has impossible values: {'; '.join(problems[:3])}{more}. Correct them or fetch the file again."
        ) from error


def _problem(error: Mapping[str, Any]) -> str:
    # pydantic adds the branch of a union to the path, which says nothing to a reader.
    path = [str(step) for step in error["loc"] if step not in ("int", "float", "str") and "[" not in str(step)]
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if error["type"] == "value_error":
        return f"{'.'.join(path)}: {message}" if path else message
    got = repr(error["input"])
    got = got if len(got) <= 60 else f"{got[:57]}..."
    return f"{'.'.join(path) or 'it'} is {got} ({message[0].lower()}{message[1:]})"
