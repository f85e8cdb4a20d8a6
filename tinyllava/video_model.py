"""The embedded Video-LLaVA: the embedded LLaVA with towers for 128 x 128 pixels and words for what happens.

Both towers are the embedded model's: no weight is trained. Of its table of 24 x 24 positions they keep the middle
16 x 16, as if a frame were the middle of a picture, so that patches keep their size and their distances.
"""

import torch
from torch import nn
from transformers import CLIPVisionModel, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from tinyllava import video_vocabulary, vocabulary
from tinyllava.scenes import GRID, PATCH
from tinyllava.video_corpus import FRAME_TOKENS, PATCHES
from tinyllava.video_scenes import SEEN, SIDE


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
    """The embedded LLaVA's weights in a Video-LLaVA. New words start as a word of like use, a little apart from it."""
    tower = crop_tower(llava.model.vision_tower)
    text = type(llava.config.text_config).from_dict(
        llava.config.text_config.to_dict()
        | {
            "vocab_size": len(video_vocabulary.words()),
            "max_position_embeddings": 4096,
            "eos_token_id": video_vocabulary.ids()[vocabulary.EOS],
        }
    )
    config = VideoLlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=video_vocabulary.ids()[vocabulary.IMAGE],
        video_token_index=video_vocabulary.ids()[video_vocabulary.VIDEO],
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
    weights["embed_tokens.weight"] = grown_table(weights["embed_tokens.weight"], seed)
    model.model.language_model.load_state_dict(weights, strict=True)
    model.tie_weights()
    return model.eval()


ALIKE = {
    video_vocabulary.SYSTEM: vocabulary.SYSTEM,
    video_vocabulary.VIDEO: vocabulary.IMAGE,
    "video": "image",
    "up": "above",
    "down": "below",
    "where": "which",
}


def grown_table(table: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows of the new vocabulary from those of the old one; words without a like one start at the mean, apart."""
    noise = torch.Generator().manual_seed(seed)
    old, rows = vocabulary.ids(), []
    for word in video_vocabulary.words():
        if word in old:
            rows.append(table[old[word]])
            continue
        apart = torch.randn(table.shape[1], generator=noise) * table.std()
        rows.append(table[old[ALIKE[word]]] + 0.1 * apart if word in ALIKE else table.mean(0) + apart)
    return torch.stack(rows)
