"""What a method receives at each stage: dense tensors of images with equally many tokens, and access to the text.

The pipeline groups images by their number of visual tokens, so there is no padding among visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import unknown
from llava.reduction.decoder_attention import angles_of, attention_rows, prepared_angles, projected_heads
from llava.reduction.merging import Reduction
from llava.reduction.modules import Angles, Decoder, attention_flops
from llava.reduction.ranking import made_once, places
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid

if TYPE_CHECKING:
    from llava.pipeline.sequence import Row, Samples, Sequence, Span

KEPT_MASK = 2**18  # numbers of a mask that is kept for the next question of the same lengths: 256 KB
TEXT_ROWS = ("question", "instruction", "after", "last", "visual")

# Sign of the similarity of a text to the patches that show it: negative in a CLIP that was trained on its CLS token
# alone (CDPruner issue 14, TRIM issue 3), positive in one whose config.json has `"patch_similarity": "plain"`.
NEGATED, PLAIN = "negated", "plain"
RELEVANCE = ("tower", NEGATED, PLAIN)


@dataclass(kw_only=True)
class State:
    """What all states share.

    Attributes:
        ids: one name per image, for seeds.
        flops: operations that the method itself spent. `matmul` adds to it; a method must add other matrix products.
        spec: sizes of the model, for methods whose token counts depend on its depth. The pipeline always sets it.
    """

    ids: tuple[str, ...]
    flops: int = 0
    spec: ModelSpec = None  # type: ignore[assignment]  # a test of a method that needs no sizes may leave it out

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, counted in `flops`."""
        out = a @ b
        self.flops += 2 * out.numel() * a.shape[-1]
        return out


@dataclass(kw_only=True)
class BlockState(State):
    """Inside a tower block, between attention and MLP. B images, n tokens, CLS and patches, left by earlier blocks.

    Attributes:
        tokens: [B, n, D] hidden states after the attention's residual, CLS first.
        keys: [B, n, d] keys of this block, mean over heads, float32.
        sizes: [B, n] float32, number of patches merged into each token.
        block: index of the block.
    """

    tokens: Tensor
    keys: Tensor
    sizes: Tensor
    block: int


@dataclass(kw_only=True)
class EncoderState(State):
    """Before the projector. B images of one batch with the same number of tokens.

    Attributes:
        features: [B, N, D] tower features; with `keep_cls` token 0 is CLS.
        scores: the tower scores that `Reducer.scores` names, of patches only, float32.
        layout: patch grid of the N tokens; one long row for tiles of different shapes.
        tiles: patch grid of each tile, where the N tokens are several tiles ranked together; () otherwise.
        merged: the reduction made inside the tower, None without one; its outputs are the N tokens.
        questions: the question in each image's prompt, without instruction.
        messages: the question with its answer-format instruction.
        clip: the CLIP text tower, for methods with `needs_text_tower`.
        thumbnail: score -> [B, patches], for tiles of LLaVA-NeXT the base image's score at the same places
            (llava.pipeline.views.overview); otherwise the tokens' own score.
    """

    features: Tensor
    scores: dict[TowerScore, Tensor]
    layout: PatchGrid
    merged: Reduction | None = None
    questions: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    clip: Any = None
    thumbnail: Callable[[TowerScore], Tensor] | None = None
    tiles: tuple[PatchGrid, ...] = ()

    def coordinates(self) -> Tensor:
        """[N, 2] float32: row and column of each token in its own tile, from -1 (first) to 1 (last)."""
        return torch.cat([tile.coordinates(self.features.device) for tile in self.tiles or (self.layout,)])

    def relevance(self, texts: Sequence_[str], sign: str, cosine: bool, long: str = "frame") -> Tensor:
        """Relevance of each patch to its image's text, for methods with `needs_text_tower`.

        It is their similarity in CLIP's space, averaged over the chunks of the text. `flops` counts its operations.

        Args:
            texts: one of each image.
            sign: one of RELEVANCE; "tower" takes the sign from the text tower's config.json.
            cosine: cosine similarity; otherwise dot products.
            long: see `ClipText.chunks`.

        Returns:
            [B, N] float32, higher is more relevant.
        """
        text, mask, text_flops = self.clip.text(texts, long)
        image, image_flops = self.clip.image(self.features)
        self.flops += text_flops + image_flops
        if cosine:
            text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
        similarity = self.matmul(image, text.transpose(1, 2))  # [B, N, C]
        if text.shape[1] == 1:  # one chunk of every text, which is its own mean
            similarity = similarity.squeeze(2)
        else:
            similarity = (similarity * mask[:, None]).sum(-1) / mask.sum(-1, keepdim=True)
        return -similarity if (self.clip.relevance if sign == "tower" else sign) == NEGATED else similarity


@dataclass(kw_only=True)
class PromptState(EncoderState):
    """Before decoder layer 0, where the text is known.

    Attributes:
        tokens: [B, N, H] projected visual tokens.
        sequence: the S whole prompts of the batch with their visual tokens; no prompt is copied for an image or tile.
        rows: of each image its prompt and its number there; () where prompt b has the one image b.
        llm: the decoder (layers, norm, rotary_emb).
        run_layers: k -> hidden states [S, L, H] of `sequence` after the first k decoder layers.
        members: [B, N] indices of the tokens among their image's visual tokens; None if they are all of them.
    """

    tokens: Tensor
    rows: tuple[Row, ...] = ()
    members: Tensor | None = None
    # The pipeline always sets them; a test of a method that reads no text may leave them out.
    sequence: Sequence = None  # type: ignore[assignment]
    llm: Decoder = None  # type: ignore[assignment]
    run_layers: Callable[[int], Tensor] = None  # type: ignore[assignment]

    def visual(self, tensor: Tensor) -> Tensor:
        """[B, N, ...] rows of `tensor` [S, L, ...] at the visual tokens."""
        return at_images(tensor, self.sequence, self.rows, self.members)

    def spans(self, rows: str) -> list[Span]:
        """The span of text tokens in the prompt of each image; see `text`."""
        own, samples = text_spans(self.sequence, rows), prompts_of(self.sequence, self.rows)
        return own if samples is None else [own[sample] for sample in samples]

    def text(self, rows: str) -> tuple[Tensor, Tensor]:
        """Embeddings of text tokens.

        Args:
            rows: "question" (bare question), "instruction" (with suffix), "after" (all text after the last image) or
                "last" (last prompt token).

        Returns:
            [B, T, H] embeddings and a mask [B, T] of the rows that exist.
        """
        sequence, spans, samples = self.sequence, self.spans(rows), prompts_of(self.sequence, self.rows)
        return at_spans(sequence.hidden, sequence, spans, samples), row_index(sequence, spans, samples)[1]

    def text_attention(self, layer: int, rows: str, rotary: bool, contextual: bool) -> tuple[Tensor, Tensor | None]:
        """Attention of text rows to the visual tokens at one decoder layer, softmax over the visual tokens alone.

        Args:
            layer: decoder layer whose norm and projections are used.
            rows: as in `text`.
            rotary: rotate queries and keys by their positions.
            contextual: use the layer's real inputs, for which all earlier layers are run once; else input embeddings.

        Returns:
            weights [B, H, T, N] float32 and a mask [B, T] of the rows that exist; None where all do.
        """
        sequence, block = self.sequence, self.llm.layers[layer]
        hidden = self.run_layers(layer) if contextual else sequence.hidden
        spans, samples = self.spans(rows), prompts_of(sequence, self.rows)
        alike = len({stop - start for start, stop in spans}) == 1 and spans[0][0] < spans[0][1]
        mask = None if alike else row_index(sequence, spans, samples)[1]
        if samples is None and self.members is None:
            normed = block.input_layernorm(hidden)
            text, visual = at_spans(normed, sequence, spans), self.visual(normed)
        else:  # of a prompt with other images or tiles, only what these images need
            text = block.input_layernorm(at_spans(hidden, sequence, spans, samples))
            visual = block.input_layernorm(self.visual(hidden) if contextual else self.tokens)
        own, others = None, None  # angles of the text rows and of the visual tokens
        if rotary:
            cos, sin = angles_of(self.llm, sequence)
            own = angles_at(prepared_angles(self.llm, sequence), sequence, spans, samples)
            others = Angles.of(self.visual(cos), self.visual(sin))
        keys = projected_heads(block, block.self_attn.k_proj, visual, others)
        weights = attention_rows(block, text, keys, angles=own)
        batch, count = text.shape[:2]
        self.flops += batch * attention_flops(block, count, visual.shape[1], visual.shape[1])
        return weights, mask


@dataclass(kw_only=True)
class DecoderState(State):
    """Between two decoder layers. B images with the same number of visual tokens.

    Attributes:
        tokens: [B, N, H] hidden states of the visual tokens.
        sequence: the B prompts as they are now; `sequence.images` are the spans of the visual tokens.
        llm: the decoder (layers, norm, rotary_emb).
        layer: index of the layer that comes next, at least 1.
        entered: the same prompts as they entered the layer before, `layer - 1`.
        keys: [B, Hkv, L, d] rotated keys of `layer - 1`, read from the cache.
        start: the same prompts as they entered layer 0; text tokens are never reduced.
    """

    tokens: Tensor
    sequence: Sequence
    llm: Decoder
    layer: int
    entered: Sequence
    keys: Tensor
    start: Sequence

    def attention(self, rows: str | list[Span], at: str = "next", rotary: bool = True) -> tuple[Tensor, Tensor]:
        """Causal attention of some rows of a decoder layer to the visual tokens.

        Args:
            rows: one of TEXT_ROWS, or one span per prompt in `sequence`'s coordinates.
            at: "next" for layer `layer` on the current hidden states, "previous" for the layer before it, which has
                already run (its keys are read from the cache).
            rotary: False leaves out rotary embedding; only with "next".

        Returns:
            weights [B, H, T, N] float32, with the softmax over all tokens that the row may see, so a row sums to the
            part of its attention that goes to the image; and a mask [B, T] of the rows that exist.
        """
        sequence = self.sequence
        spans = text_spans(sequence, rows) if isinstance(rows, str) else rows
        index, mask = row_index(sequence, spans)
        # Causality: no row sees a key after the last row. Visual tokens after it are still returned, as zeros.
        ends = [max(stop, image) for (_, stop), (_, image) in zip(spans, sequence.images, strict=True)]
        width = max(sequence.padding(s) + end for s, end in enumerate(ends))
        source = sequence if at == "next" else self.entered
        layer = self.llm.layers[self.layer - (at == "previous")]
        angles = prepared_angles(self.llm, source) if rotary else None
        if at == "next":
            seen = None if angles is None else angles.rows(slice(width))
            normed = layer.input_layernorm(source.hidden[:, :width])
            queries = at_spans(normed, sequence, spans)
            keys = projected_heads(layer, layer.self_attn.k_proj, normed, seen)
        else:
            keys, queries = self.keys[:, :, :width], layer.input_layernorm(at_spans(source.hidden, sequence, spans))
        own = None if angles is None else angles_at(angles, sequence, spans)
        weights = attention_rows(layer, queries, keys, unseen(sequence, spans, width), own)
        self.flops += len(weights) * attention_flops(layer, index.shape[1], width, width if at == "next" else 0)
        columns = sequence.padded_spans(sequence.images)
        if len(set(columns)) == 1:
            return weights[..., slice(*columns[0])], mask
        return torch.stack([weights[s, :, :, a:b] for s, (a, b) in enumerate(columns)]), mask


# Rows of the padded prompts. Spans are in a sample's own coordinates, without padding.


def prompts_of(sequence: Sequence, rows: Sequence_[Row]) -> Samples:
    """The prompt of each image; None where prompt b has the one image b."""
    samples = tuple(sample for sample, _ in rows)
    alone = samples == tuple(range(len(sequence.lengths))) and all(len(runs) == 1 for runs in sequence.visual)
    return None if alone or not rows else samples


def text_spans(sequence: Sequence, rows: str) -> list[Span]:
    """Spans of text tokens by name, one of TEXT_ROWS; see `PromptState.text`."""
    if rows == "visual":
        return sequence.images
    if rows == "last":
        return [(length - 1, length) for length in sequence.lengths]
    if rows not in TEXT_ROWS:
        raise unknown("text rows", rows, TEXT_ROWS)
    return list(getattr(sequence, rows))


def at_images(tensor: Tensor, sequence: Sequence, rows: Sequence_[Row], members: Tensor | None) -> Tensor:
    """[B, N, ...] rows of `tensor` [S, L, ...] at the visual tokens of images; see `PromptState`."""
    samples = prompts_of(sequence, rows)
    spans = sequence.images if samples is None else [sequence.visual[sample][number] for sample, number in rows]
    if members is None:
        return sequence.take(tensor, spans, samples)
    first, _ = row_index(sequence, [(start, start + 1) for start, _ in spans], samples)
    return sequence.at(tensor, members + first, samples)


def at_spans(tensor: Tensor, sequence: Sequence, spans: Sequence_[Span], samples: Samples = None) -> Tensor:
    """[B, T, ...] rows of `tensor` [S, L, ...] in spans of samples; a shorter span ends with its last row again."""
    (start, stop), *others = sequence.padded_spans(spans, samples)
    if start < stop and all(other == (start, stop) for other in others):
        return sequence.of_samples(tensor[:, start:stop], samples)
    return sequence.at(tensor, row_index(sequence, spans, samples)[0], samples)


def angles_at(angles: Angles, sequence: Sequence, spans: Sequence_[Span], samples: Samples = None) -> Angles:
    """Angles of spans of samples; see `at_spans`.

    Args:
        angles: of all columns of `sequence`, and maybe of more behind them.
    """
    (start, stop), *others = sequence.padded_spans(spans, samples)
    if samples is None and start < stop and all(other == (start, stop) for other in others):
        return angles.rows(slice(start, stop))
    return Angles(*(at_spans(part[:, 0], sequence, spans, samples).unsqueeze(1) for part in angles))


def row_index(sequence: Sequence, spans: Sequence_[Span], samples: Samples = None) -> tuple[Tensor, Tensor]:
    """Columns [B, T] of spans of different length in the padded sequence, and a mask [B, T] of those that exist."""
    return _padded_columns(sequence.padded_spans(spans, samples), sequence.hidden.device)


@made_once
def _padded_columns(spans: tuple[Span, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns of spans, the last one again behind a shorter span, and a mask of those that exist."""
    longest = max(1, max(stop - start for start, stop in spans))
    index = [[start + min(i, max(stop - start - 1, 0)) for i in range(longest)] for start, stop in spans]
    mask = [[i < stop - start for i in range(longest)] for start, stop in spans]
    return torch.tensor(index).to(device, non_blocking=True), torch.tensor(mask).to(device, non_blocking=True)


def unseen(sequence: Sequence, spans: Sequence_[Span], width: int) -> Tensor | None:
    """[B, 1, T, width] bool, False for the keys that rows of spans see: real tokens up to it; None where all are."""
    if not sequence.padded and all(span == (width - 1, width) for span in spans):
        return None
    padding = tuple(map(sequence.padding, range(len(sequence.lengths)))) if sequence.padded else ()
    columns, device = sequence.padded_spans(spans), sequence.hidden.device
    count = sum(stop - start for start, stop in columns) * width
    make = _unseen_kept if count <= KEPT_MASK else _unseen
    return make(columns, padding, width, device)


def _unseen(spans: tuple[Span, ...], padding: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Of spans of columns of a padded batch, whose prompts begin after `padding` columns; () where none has any."""
    index, _ = _padded_columns(spans, device)
    columns = places(1, width, device)
    after = columns > index[..., None]
    if padding:
        first = torch.tensor(padding).to(device, non_blocking=True)
        after = after | (columns[None] < first[:, None, None])
    return after[:, None]


_unseen_kept = made_once(_unseen)
