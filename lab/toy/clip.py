"""The CLIP model of the toy LLaVA, a forward pass that can skip patches, and the losses that train it.

What each loss favours:
    dense     per-patch shape, colour, size, digit and centre, predicted from the features that LLaVA takes (the
              penultimate block). Makes the features useful; favours no reduction method.
    caption   sigmoid loss between phrases and the final CLS embedding. Phrases that are true only of small things get
              a small weight, as web captions name what stands out: CLS attention becomes a saliency for big things.
    patch     the same phrases against the final patch embeddings, lightly: real CLIP has some such alignment. Favours
              methods that compare patches with the text tower.
"""

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from lab.toy.data.scenes import FIELDS, GRID, PATCH, SIDE
from lab.toy.data.vocabulary import BOS, COLOR_NAMES, EOS, PAD, PATTERNS, SHAPES, SIZES, TOY_WORDS

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


COLUMN = {name: index for index, name in enumerate(FIELDS)}
PANEL, SHAPE, FRAME = 1, 2, 3
# Per-patch classes: 7 shapes, frame, 3 patterns, background.
PATCH_CLASSES = len(SHAPES) + 1 + len(PATTERNS) + 1
SMALL_THING_WEIGHT = 0.15


class DenseHeads(nn.Module):
    """Linear probes of the penultimate features, discarded after training."""

    SIZES = (PATCH_CLASSES, len(COLOR_NAMES), len(SIZES), 10, 2)

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.read = nn.LayerNorm(width), nn.Linear(width, sum(self.SIZES))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.read(self.norm(features)).float().split(self.SIZES, -1)


def dense_loss(heads: DenseHeads, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """features [B, K, D], labels [B, K, 9] as `Corpus.patch_labels` -> loss and accuracies."""
    kind, shape, digit, pattern = (labels[..., COLUMN[name]].long() for name in ("kind", "shape", "digit", "pattern"))
    color, big = labels[..., COLUMN["color"]].long(), labels[..., COLUMN["big"]].long()
    target = torch.full_like(kind, PATCH_CLASSES - 1)
    target = torch.where(kind == SHAPE, shape, target)
    target = torch.where(kind == FRAME, len(SHAPES), target)
    target = torch.where(kind == PANEL, len(SHAPES) + 1 + pattern, target)
    centre = labels[..., [COLUMN["x"], COLUMN["y"]]] / (SIDE / 2) - 1
    classes, colors, sizes, digits, centres = heads(features)
    shapes, frames = kind == SHAPE, kind == FRAME
    askable = shapes | frames
    loss = (
        2 * F.cross_entropy(classes.flatten(0, 1), target.flatten())
        + F.cross_entropy(colors[askable], color[askable])
        + 0.3 * F.cross_entropy(sizes[shapes], big[shapes])
        + F.cross_entropy(digits[frames], digit[frames])
        + 4 * F.mse_loss(centres[askable], centre[askable])
    )
    small = shapes & (big == 0)
    with torch.no_grad():
        numbers = {
            "shape_small": (classes.argmax(-1) == target)[small].float().mean().item(),
            "shape_big": (classes.argmax(-1) == target)[shapes & (big == 1)].float().mean().item(),
            "color": (colors.argmax(-1) == color)[askable].float().mean().item(),
            "digit": (digits.argmax(-1) == digit)[frames].float().mean().item(),
            "centre_px": (centres - centre)[askable].abs().mean().item() * SIDE / 2,
        }
    return loss, numbers


@cache
def phrases() -> dict[tuple, str]:
    """The phrases of captions by key."""
    said: dict[tuple, str] = {}
    for shape, shape_name in enumerate(SHAPES):
        said["shape", shape] = f"a {shape_name}"
        said |= {("color shape", c, shape): f"a {name} {shape_name}" for c, name in enumerate(COLOR_NAMES)}
        said |= {("size shape", z, shape): f"a {name} {shape_name}" for z, name in enumerate(SIZES)}
    said |= {("color", c): f"a {name} object" for c, name in enumerate(COLOR_NAMES)}
    said |= {("frame", c): f"a {name} frame" for c, name in enumerate(COLOR_NAMES)}
    said |= {("pattern", p): f"a {name} panel" for p, name in enumerate(PATTERNS)}
    said |= {("digit", d): f"number {d}" for d in range(10)}
    return said


def phrase_targets(things: np.ndarray) -> tuple[Tensor, Tensor]:
    """things [B, 20, 9] -> (targets, weights), both [B, phrases] float32."""
    index = {key: column for column, key in enumerate(phrases())}
    targets = torch.zeros(len(things), len(index))
    weights = torch.ones(len(things), len(index))
    for row, scene in enumerate(things.astype(np.int64)):
        salient: dict[tuple, bool] = {}
        for kind, _, _, _, shape, color, big, digit, pattern in scene[scene[:, 0] > 0]:
            if kind == PANEL:
                keys, loud = [("pattern", pattern)], True
            elif kind == FRAME:
                keys, loud = [("digit", digit), ("frame", color)], False
            else:
                keys = [("color shape", color, shape), ("shape", shape), ("color", color), ("size shape", big, shape)]
                loud = big == 1
            for key in keys:
                salient[key] = salient.get(key, False) or loud
        for key, loud in salient.items():
            targets[row, index[key]] = 1
            weights[row, index[key]] = 1.0 if loud else SMALL_THING_WEIGHT
    return targets, weights


@cache
def phrase_ids() -> Tensor:
    """[phrases, T] token ids, BOS and EOS around each phrase, padded."""
    ids = TOY_WORDS.ids
    rows = [[ids[BOS], *TOY_WORDS.encode(text), ids[EOS]] for text in phrases().values()]
    longest = max(map(len, rows))
    return torch.tensor([row + [ids[PAD]] * (longest - len(row)) for row in rows])


def caption_losses(clip: CLIPModel, bias: Tensor, final: Tensor, targets: Tensor, weights: Tensor):
    """Sigmoid losses of phrases against CLS and against the best-matching patches; final [B, 1+K, D]."""
    text = clip.text_projection(clip.text_model(phrase_ids()).pooler_output)
    text = F.normalize(text.float(), dim=-1)
    image = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(final)).float(), dim=-1)
    similarity, scale = image @ text.T, clip.logit_scale.float().exp()
    whole = 1.5 * scale * similarity[:, 0] + bias.float()[0]
    patch = scale * torch.logsumexp(similarity[:, 1:] * 20, 1) / 20 + bias.float()[1]

    def loss(logits: Tensor) -> Tensor:
        return 8 * (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights).mean()

    return loss(whole), loss(patch)
