"""The toy LLaVA-NeXT: the toy LLaVA with tiles."""

from torch import nn
from transformers import LlavaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from toy.data.tiles import PINPOINTS
from toy.data.vocabulary import LONG


def next_config(config: LlavaConfig) -> LlavaNextConfig:
    """The toy model's configuration, with tiles."""
    text = type(config.text_config).from_dict(config.text_config.to_dict() | {"max_position_embeddings": LONG})
    return LlavaNextConfig(
        vision_config=config.vision_config,
        text_config=text,
        image_token_index=config.image_token_index,
        image_seq_length=config.image_seq_length,
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        projector_hidden_act=config.projector_hidden_act,
        tie_word_embeddings=True,
    )


def build_next(llava: nn.Module) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT in float32 with the tower of the toy LLaVA; the other weights are new."""
    model = LlavaNextForConditionalGeneration(next_config(llava.config)).float()
    model.model.vision_tower.load_state_dict(llava.model.vision_tower.state_dict(), strict=True)
    return model
