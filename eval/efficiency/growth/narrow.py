"""Shapes at a fraction of their width: as many tokens and layers as wanted, few weights.

What grows with the number of tokens grows the same way, and a CPU needs seconds in place of minutes.
"""

from typing import Any

from eval.efficiency.shapes import SHAPES
from llava.model.checkpoint.original_layout import CLIP_L_336

HEAD = 64  # channels of an attention head


def narrow(shape: str, width: int, layers: int, blocks: int = 3, side: int = 336) -> dict[str, Any]:
    """An entry for SHAPES: a shape of LLaVA with `width` channels in decoder and tower.

    Args:
        width: channels, a multiple of 64; the MLPs keep their proportion to it.
        layers: of the decoder.
        blocks: of the tower.
        side: of an image or tile in pixels, a multiple of 14.
    """
    text, heads = SHAPES[shape]["text"], width // HEAD
    vision = SHAPES[shape].get("vision", CLIP_L_336)
    return {
        "family": SHAPES[shape]["family"],
        "text": {
            **text,
            "hidden_size": width,
            "intermediate_size": width * text["intermediate_size"] // text["hidden_size"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            # Tokens beyond the position ids of the official model are computed alike.
            "max_position_embeddings": 1 << 15,
        },
        "vision": {
            **vision,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": blocks,
            "image_size": side,
        },
    }
