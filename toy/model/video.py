"""The toy Video-LLaVA: the toy LLaVA with towers for 128 x 128 pixels and words for what happens in a video.

Both towers are the toy model's: none of their weights is trained. They keep the middle 16 x 16 of its table of 24 x 24
positions, as if a frame were the middle of a picture, so that patches keep their size and their distances.
"""

import torch
from torch import nn
from transformers import CLIPVisionModel, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from toy.data.scenes import GRID, PATCH
from toy.data.video_corpus import FRAME_TOKENS, PATCHES
from toy.data.video_scenes import SEEN, SIDE
from toy.data.vocabulary import EOS, IMAGE, LONG, SYSTEM, VIDEO, VIDEO_SYSTEM, VIDEO_WORDS
from toy.model.llava import grown_table

# New word -> the old one that it starts from.
ALIKE = {VIDEO_SYSTEM: SYSTEM, VIDEO: IMAGE, "video": "image", "up": "above", "down": "below", "where": "which"}


def crop_tower(tower: nn.Module) -> CLIPVisionModel:
    """The tower of 24 x 24 patches cut to the middle 16 x 16; float32, its own copy."""
    grid = SIDE // PATCH
    config = type(tower.config).from_dict(tower.config.to_dict() | {"image_size": SIDE})
    small = CLIPVisionModel(config)
    weights = {name: tensor.detach().clone().float() for name, tensor in tower.state_dict().items()}
    name = "embeddings.position_embedding.weight"
    margin = (GRID - grid) // 2
    table = weights[name][1:].unflatten(0, (GRID, GRID))
    middle = table[margin : margin + grid, margin : margin + grid].flatten(0, 1)
    weights[name] = torch.cat([weights[name][:1], middle])
    small.load_state_dict(weights, strict=True)
    return small.eval()


@torch.no_grad()
def build_video_llava(llava: nn.Module, seed: int = 0) -> VideoLlavaForConditionalGeneration:
    """The toy LLaVA's weights in a Video-LLaVA. New words start near a word of like use."""
    tower = crop_tower(llava.model.vision_tower)
    text = type(llava.config.text_config).from_dict(
        llava.config.text_config.to_dict()
        | {
            "vocab_size": len(VIDEO_WORDS),
            "max_position_embeddings": LONG,
            "eos_token_id": VIDEO_WORDS.ids[EOS],
        }
    )
    config = VideoLlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=VIDEO_WORDS.ids[IMAGE],
        video_token_index=VIDEO_WORDS.ids[VIDEO],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=PATCHES,
        video_seq_length=SEEN * FRAME_TOKENS,
        tie_word_embeddings=True,
    )
    model = VideoLlavaForConditionalGeneration(config).float()
    for part in (model.model.image_tower, model.model.video_tower):
        part.load_state_dict(tower.state_dict(), strict=True)
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict(), strict=True)
    weights = {n: w.float() for n, w in llava.model.language_model.state_dict().items()}
    weights["embed_tokens.weight"] = grown_table(weights["embed_tokens.weight"], VIDEO_WORDS, ALIKE, seed=seed)
    model.model.language_model.load_state_dict(weights, strict=True)
    model.tie_weights()
    return model.eval()
