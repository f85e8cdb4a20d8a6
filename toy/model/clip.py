"""The CLIP model of the toy LLaVA, and a forward pass that can skip patches."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from toy.data.scenes import GRID, PATCH, SIDE
from toy.data.vocabulary import BOS, EOS, PAD, TOY_WORDS

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(width: int = 128, layers: int = 6, text_layers: int = 2) -> CLIPModel:
    """A CLIP ViT with CLS token, 24 x 24 patches, and its text tower; initialised for Muon."""
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    shared = {**tower, "hidden_act": "quick_gelu", "projection_dim": width}
    config = CLIPConfig(
        vision_config={**shared, "num_hidden_layers": layers, "image_size": SIDE, "patch_size": PATCH},
        text_config={
            **shared,
            "num_hidden_layers": text_layers,
            "vocab_size": len(TOY_WORDS),
            "max_position_embeddings": 32,
            "pad_token_id": TOY_WORDS.ids[PAD],
            "bos_token_id": TOY_WORDS.ids[BOS],
            "eos_token_id": TOY_WORDS.ids[EOS],
        },
        projection_dim=width,
    )
    model = CLIPModel(config)
    for name, p in model.named_parameters():
        if p.dim() >= 2 and "embedding" not in name:
            nn.init.normal_(p, std=0.7 / math.sqrt(p.shape[1]))
        if name.endswith(("out_proj.weight", "fc2.weight")):
            p.data *= 0.4
    embeddings = model.vision_model.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * PATCH * PATCH))
    nn.init.normal_(embeddings.class_embedding, std=0.5)
    embeddings.position_embedding.weight.data[1:] = _sines(width) * 0.5
    model.logit_scale.data.fill_(math.log(10.0))
    return model


def load_clip(folder: Path) -> CLIPModel:
    """The CLIP model that the vision stage left in `folder`, in float32."""
    clip = build_clip()
    saved = torch.load(folder / "vision.pt", weights_only=True)
    weights = {name.removeprefix("clip."): tensor for name, tensor in saved.items() if name.startswith("clip.")}
    clip.load_state_dict({**clip.state_dict(), **weights}, strict=True)
    return clip.eval()


def _sines(width: int) -> Tensor:
    """[576, width] two-dimensional sine positions, a start for the learned table."""
    place = torch.arange(GRID).float()
    frequency = 1.5 / 200 ** (torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(place, place, indexing="ij")
    row, column = row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1)


def patchify(images: np.ndarray) -> Tensor:
    """[B, S, S, 3] uint8 -> [B, P, 192] float32, normalised as CLIP, in the order of the convolution's weight."""
    grid = images.shape[1] // PATCH
    pixels = torch.from_numpy(np.array(images)).float() / 255
    pixels = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    tiles = pixels.view(len(images), grid, PATCH, grid, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return tiles.reshape(len(images), grid * grid, 3 * PATCH * PATCH)


def vision_states(
    vision: nn.Module, patches: Tensor, keep: Tensor | None = None, last: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Penultimate and final hidden states of a CLIP vision tower, CLS first.

    Args:
        patches: [B, K, 192] as from `patchify`.
        keep: [B, K] positions of these patches in the picture; None for all patches.
        last: whether to run the last block; without it the second result is None.
    """
    embeddings = vision.embeddings
    kernel = embeddings.patch_embedding.weight
    positions = embeddings.position_embedding.weight
    hidden = F.linear(patches.to(kernel.dtype), kernel.flatten(1))
    hidden = hidden + (positions[1:] if keep is None else positions[1:][keep])
    cls = (embeddings.class_embedding + positions[0]).expand(len(hidden), 1, -1)
    hidden = vision.pre_layrnorm(torch.cat([cls, hidden], 1))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden, vision.encoder.layers[-1](hidden, None) if last else None
