"""The CLIP text tower that belongs to LLaVA's vision tower, to compare questions and patches in CLIP's common space.

A LLaVA checkpoint lacks CLIP's text tower and both projections. They are read when a method first needs them, from the
folder or hub repository that `llava.model.checkpoint.load` names, and kept in float32.

Official code read: Theia-4869/CDPruner@9541616 and FreedomIntelligence/TRIM@f5a232d, both
llava/model/multimodal_encoder/clip_encoder.py
Differs from it: long texts, see `ClipText.chunks`.

Shapes: B images with one text each, C chunks or tokens of a text, N patches, D tower channels, P channels of the common
space.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from llava.errors import UserError
from llava.file_state import FileState
from llava.model.checkpoint.config import library_config
from llava.model.checkpoint.files import files_of, listed, locate, read_weights
from llava.processing.json_files import read_json
from llava.reduction.modules import linear_flops
from llava.reduction.states import NEGATED
from llava.transformers_names import set_kernel

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PARTS = ("text_model.", "text_projection.", "visual_projection.")
# Configurations older than transformers PR 24773 have 2, whatever the tokenizer's end token is.
OLD_END_ID = 2


class ClipText(nn.Module):
    """Text tower and projections of a CLIP.

    Args:
        config: of the text tower.
        channels: D, of the vision tower.
        post_layernorm: the vision tower's own, which LLaVA never runs.
        words: text -> token ids without the ids that begin and end a text.
        begin, end: those ids.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        channels: int,
        post_layernorm: nn.LayerNorm,
        words: Callable[[str], list[int]],
        begin: int,
        end: int,
    ):
        super().__init__()
        set_kernel(config, "sdpa")
        self.text_model = CLIPTextModel(config)
        common: Any = config.projection_dim
        self.text_projection = nn.Linear(config.hidden_size, common, bias=False)
        self.visual_projection = nn.Linear(channels, common, bias=False)
        self._post_layernorm = (post_layernorm,)  # in a tuple: its weights are not part of this module
        self.words, self.begin, self.end = words, begin, end
        self.relevance = NEGATED
        self.files: dict[str, FileState] = {}
        self.length: int = config.max_position_embeddings

    def chunks(self, text: str, long: str = "frame") -> list[list[int]]:
        """Split a text into chunks of token ids that the tower can read.

        Args:
            long: treatment of longer texts. "frame" puts the begin and end tokens around each chunk. "truncate" returns
                the first of these chunks only, as CLIP's tokenizers do. "cut" adds the two tokens to the whole text and
                then splits it, as CDPruner does: only the first chunk has a begin token, only the last an end token.
        """
        ids = self.words(text)
        if long == "cut":
            ids = [self.begin, *ids, self.end]
            return [ids[start : start + self.length] for start in range(0, len(ids), self.length)]
        room = self.length - 2
        chunks = [[self.begin, *ids[start : start + room], self.end] for start in range(0, max(1, len(ids)), room)]
        return chunks[:1] if long == "truncate" else chunks

    def _pooled(self, chunk: list[int]) -> int:
        """Return the index of the token whose hidden state represents a chunk: its end token, which is last."""
        if chunk[-1] == self.end:
            return len(chunk) - 1
        # transformers' rule, meant for texts with an end token; without one it selects the begin token or any word.
        configured = self.text_model.config.eos_token_id
        mark = max(chunk) if configured == OLD_END_ID else configured
        return chunk.index(mark) if mark in chunk else 0

    def text(self, texts: Sequence[str], long: str = "frame", every_token: bool = False) -> tuple[Tensor, Tensor, int]:
        """Embed texts; `long` as in `chunks`.

        Args:
            every_token: embed all tokens of the chunks, those that begin and end a text included; C is then the number
                of tokens.

        Returns:
            [B, C, P] float32; a mask [B, C] of the chunks that exist; and the operations spent.
        """
        chunks = [self.chunks(text, long) for text in texts]
        rows = [chunk for own in chunks for chunk in own]
        longest = max(map(len, rows))
        # Padding comes after a chunk; attention is causal, so it does not change the tokens before it.
        ids = [row + [0] * (longest - len(row)) for row in rows]
        read = [range(len(row)) if every_token else [self._pooled(row)] for row in rows]
        pooled = [start * longest + at for start, own in enumerate(read) for at in own]
        counts = [sum(map(len, own)) if every_token else len(own) for own in chunks]
        most = max(counts)
        slots = [text * most + number for text, count in enumerate(counts) for number in range(count)]
        # All whole numbers in one copy to the device, which the host does not wait for.
        numbers = torch.from_numpy(np.concatenate([*ids, pooled, slots]))
        numbers = numbers.to(self.text_projection.weight.device, non_blocking=True)
        tokens, pooled_at, slot = numbers.split([len(rows) * longest, len(pooled), len(pooled)])
        # All layers, in half of the operations of the tower's own forward.
        tower, embeddings = self.text_model, self.text_model.embeddings
        hidden: Tensor = embeddings.token_embedding(tokens.view(len(rows), longest))
        hidden = hidden + embeddings.position_embedding.weight[:longest]
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None, is_causal=True)
        ends = hidden.flatten(0, 1).index_select(0, pooled_at)
        embedded = self.text_projection(tower.final_layer_norm(ends))
        linears = [layer for layer in tower.modules() if isinstance(layer, nn.Linear)]
        attention = len(tower.encoder.layers) * 4 * longest * longest * tower.config.hidden_size
        row = sum(linear_flops(layer, longest) for layer in linears) + attention
        flops = len(rows) * row + linear_flops(self.text_projection, len(pooled))
        mask = torch.ones(len(chunks), most, dtype=torch.bool, device=embedded.device)
        if len(pooled) < mask.numel():
            mask = torch.zeros_like(mask).flatten().index_fill_(0, slot, True).view_as(mask)
            embedded = embedded.new_zeros(mask.numel(), embedded.shape[-1]).index_copy_(0, slot, embedded)
        return embedded.unflatten(0, mask.shape), mask, flops

    def image(self, features: Tensor, normed: bool = True) -> tuple[Tensor, int]:
        """Patch features [B, N, D] -> [B, N, P] float32, through the tower's last norm and CLIP's projection.

        CLIP was trained this way for the CLS token of the last block only; patches need not be similar to their text.

        Args:
            normed: False leaves out the norm.
        """
        flops = linear_flops(self.visual_projection, features[..., 0].numel())
        if not normed:
            return self.visual_projection(features.float()), flops
        (norm,) = self._post_layernorm
        with align_module_device(norm):  # weights that accelerate has offloaded
            weight, bias = (part.to(features.device, torch.float32) for part in (norm.weight, norm.bias))
        features = F.layer_norm(features.float(), norm.normalized_shape, weight, bias, norm.eps)
        return self.visual_projection(features), flops


def load_clip_text(
    source: str | Path, tower: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> ClipText:
    """Load the text tower of a CLIP.

    Args:
        source: folder or hub id; it may contain a whole CLIP or only the parts that a LLaVA checkpoint lacks.
        tower: LLaVA's vision tower.
        tokenizer: LLaVA's tokenizer, used if the folder has none and the text tower was trained with it.
    """
    folder = locate(source, "CLIP text tower")
    files = files_of(folder, weights=False)
    raw = read_json(folder / "config.json")
    if "text_config" not in raw:
        raise UserError(f"{folder}/config.json describes no text tower (no text_config); give a whole CLIP model.")
    config: Any = library_config(CLIPConfig, raw, folder, "CLIP").text_config
    channels = tower.config.hidden_size
    words, begin, end = _tokens(folder, config, tokenizer)
    clip = ClipText(config, channels, tower.post_layernorm, words, begin, end)
    clip.files = files_of(folder) | files  # the configuration and the tokenizer were read already
    clip.relevance = raw.get("patch_similarity", NEGATED)
    weights = {key: value for key, value in read_weights(folder).items() if key.startswith(PARTS)}
    expected = {key: value.shape for key, value in clip.state_dict().items()}
    wrong = [key for key in {*expected, *weights} if key not in weights or expected.get(key) != weights[key].shape]
    if wrong:
        raise UserError(
            f"The CLIP in {folder} does not fit this vision tower ({channels} channels); {len(wrong)} weights are "
            f"missing, unexpected or of another shape: {listed(wrong)}. Use the CLIP that the tower comes from."
        )
    clip.load_state_dict(weights)
    return clip.float().to(device).eval().requires_grad_(False)


def _tokens(
    folder: Path, config: CLIPTextConfig, shared: PreTrainedTokenizerBase
) -> tuple[Callable[[str], list[int]], int, int]:
    """Return a function from text to ids, and the begin and end ids: the folder's own or, if they fit, LLaVA's."""
    own = shared
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exceptions for files it cannot read
            raise UserError(f"Cannot read the tokenizer of the CLIP in {folder}; fetch its files again.") from error
    elif (shared.bos_token_id, shared.eos_token_id) != (config.bos_token_id, config.eos_token_id):
        raise UserError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}), and the text tower was not trained with "
            "LLaVA's; copy the tokenizer files of its CLIP there."
        )
    if len(own) > config.vocab_size:
        raise UserError(
            f"The tokenizer of the text tower in {folder} has {len(own)} tokens, but the tower has "
            f"{config.vocab_size}; take both from one CLIP."
        )
    return (
        lambda text: own(text, add_special_tokens=False, verbose=False).input_ids,
        own.bos_token_id,
        own.eos_token_id,
    )
