"""What a method receives at each stage: tensors for images with the same number of tokens, and access to the text.

The pipeline groups images by their number of visual tokens, so there is no padding among visual tokens. The attention
of a decoder layer is computed only for the few query rows that a method asks for, in float32.

Shapes: B images, N visual tokens, T rows, L tokens of a prompt, H heads, d channels per head, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import AttentionInterface

from llava.errors import UserError, unknown
from llava.reduction.merging import Reduction
from llava.reduction.modules import Decoder, DecoderLayer
from llava.reduction.ranking import in_float32
from llava.reduction.scores import BY_HEADS, BlockAttention, TowerScore, cls_attention
from llava.reduction.token_layout import Canvas, ModelSpec, PatchGrid, TokenLayout
from llava.transformers_names import KERNEL

if TYPE_CHECKING:
    from llava.pipeline.positions import Span
    from llava.pipeline.sequence import ImageKey, PromptBatch

TEXT_ROWS = ("question", "instruction", "after", "last", "visual")

# Sign of the similarity between a text and the patches that show it. It is negative in a CLIP that was trained with its
# CLS token only (CDPruner issue 14, TRIM issue 3), and positive if config.json has `"patch_similarity": "plain"`.
NEGATED, PLAIN = "negated", "plain"
RELEVANCE = ("tower", NEGATED, PLAIN)


@dataclass(kw_only=True)
class State:
    """The fields that all states share.

    Attributes:
        ids: one name per image, for seeds.
        flops: operations of the method itself. `matmul` adds to it; a method must add its other matrix products.
        spec: sizes of the model, for methods whose token counts depend on its depth. The pipeline always sets it.
    """

    ids: tuple[str, ...]
    flops: int = 0
    spec: ModelSpec = None  # type: ignore[assignment]  # a test of a method that needs no sizes may leave it out

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, counted in `flops`."""
        # What `@` comes to here, without its views of both.
        out = torch.bmm(a, b) if a.dim() == b.dim() == 3 and len(a) == len(b) else a @ b
        self.flops += 2 * out.numel() * a.shape[-1]
        return out


@dataclass(kw_only=True)
class BlockState(State):
    """Inside a tower block, between attention and MLP: B tiles with n tokens each (CLS and remaining patches).

    A method may leave tiles different numbers of tokens. It then writes these into `leaves`. Each row of its reduction
    has the tokens that are left first, and after them any others, which fill it up to the longest row.

    Attributes:
        tokens: [B, n, D] hidden states after the attention's residual, CLS first.
        keys: [B, n, d] keys of this block, mean over heads, float32.
        sizes: [B, n] float32, number of patches merged into each token.
        block: index of the block.
        last: index of the last block in which the method is called.
        attended: what the block's attention compared.
        memory: what the method wrote into it in earlier blocks, for the same images.
        tiles: for each image its number of tiles; the tiles of an image follow each other.
        left: for each tile the number of its tokens, CLS too; any others in its row only fill it up.
        leaves: what the method writes, as `left`; None if every tile is left all outputs of the reduction.
    """

    tokens: Tensor
    keys: Tensor
    sizes: Tensor
    block: int
    last: int = 0
    attended: BlockAttention = None  # type: ignore[assignment]  # a test of a method that reads keys may leave it out
    memory: dict[str, Tensor] = field(default_factory=dict)
    tiles: tuple[int, ...] = ()
    left: Sequence[int] = ()
    leaves: list[int] | None = None

    @property
    def filling(self) -> Tensor | None:
        """[B, n] bool, True for tokens that only fill up a row; None if there are none."""
        return self.attended.filling

    def cls_attention(self) -> Tensor:
        """[B, n - 1] attention of the CLS token to the other tokens in this block, mean over heads."""
        images, tokens, width = self.attended.keys.shape
        self.flops += 2 * images * width * (self.tokens.shape[2] + tokens)
        return cls_attention(self.attended)

    def values(self) -> Tensor:
        """[B, H, n, d] float32, values of this block."""
        assert self.attended.values is not None  # CLIP's towers have them
        values = self.attended.values()
        self.flops += 2 * values.numel() * self.tokens.shape[2]
        return rearrange(values, BY_HEADS, h=self.attended.heads)


@dataclass(kw_only=True)
class EncoderState(State):
    """Before the projector: B images of one batch with the same number of tokens.

    Attributes:
        features: [B, N, D] tower features; with `keep_cls` token 0 is CLS, if the tower has one.
        scores: the tower scores that `Reducer.scores` names, float32, of patches only.
        layout: patch grid of the N tokens; one long row if they are tiles of different shapes.
        tiles: patch grid of each tile if the N tokens are several tiles that are ranked together; otherwise ().
        merged: the reduction made inside the tower, whose outputs are the N tokens; None without one.
        questions: the question in each image's prompt, without instruction.
        messages: the question with its answer-format instruction.
        clip: the CLIP text tower, for methods with `needs_text_tower`.
        thumbnail: score -> [B, patches]: for tiles of LLaVA-NeXT the base image's score at the same places
            (llava.pipeline.views.overview); otherwise the tokens' own score.
        canvases: for images of one tile, what their patch grid covers and where the image lies on it; None for an image
            where that is not known, () for tiles.
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
    canvases: tuple[Canvas | None, ...] = ()

    def coordinates(self) -> Tensor:
        """Row and column of each token in its own tile, [N, 2] float32, from -1 (first) to 1 (last)."""
        return torch.cat([tile.coordinates(self.features.device) for tile in self.tiles or (self.layout,)])

    def relevance(self, texts: Sequence[str], sign: str, cosine: bool, long: str = "frame") -> Tensor:
        """Relevance of each patch to its image's text, for methods with `needs_text_tower`.

        It is the similarity of patch and text in CLIP's space, averaged over the chunks of the text. `flops` counts its
        operations.

        Args:
            texts: one text per image.
            sign: one of RELEVANCE; "tower" takes the sign from the text tower's config.json.
            cosine: True for cosine similarity, False for dot products.
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
        if text.shape[1] == 1:  # every text is one chunk, so there is nothing to average
            similarity = similarity.squeeze(2)
        else:
            similarity = (similarity * mask[:, None]).sum(-1) / mask.sum(-1, keepdim=True)
        return -similarity if (self.clip.relevance if sign == "tower" else sign) == NEGATED else similarity


@dataclass(kw_only=True)
class PromptState(EncoderState):
    """Before decoder layer 0, where the text is known.

    Attributes:
        tokens: [B, N, H] projected visual tokens.
        sequence: the S whole prompts of the batch with their visual tokens. A prompt with several images is there once.
        rows: for each image, its prompt and its number in that prompt; () if every prompt b has only image b.
        llm: the decoder (layers, norm, rotary_emb).
        run_layers: k -> hidden states [S, L, H] of `sequence` after the first k decoder layers.
        members: [B, N] indices of the tokens among their image's visual tokens; None if they are all of them.
        embed_words: words -> [T, H] embeddings of their tokens, without a begin token, for methods with `needs_words`.
    """

    tokens: Tensor
    rows: tuple[ImageKey, ...] = ()
    members: Tensor | None = None
    # The pipeline always sets them; a test of a method that reads no text may leave them out.
    sequence: PromptBatch = None  # type: ignore[assignment]
    llm: Decoder = None  # type: ignore[assignment]
    run_layers: Callable[[int], Tensor] = None  # type: ignore[assignment]
    embed_words: Callable[[Sequence[str]], Tensor] = None  # type: ignore[assignment]

    def spans(self, rows: str) -> list[Span]:
        """For each image, the span of text tokens in its prompt; see `text`.

        Raises:
            UserError: a prompt has no such tokens, for example because it has no text.
        """
        spans = text_spans(self.sequence, rows, self.rows)
        for name, (start, stop) in zip(self.ids, spans, strict=True):
            if start == stop:
                raise UserError(
                    f"This method compares images with text, and the {rows} of sample {name!r} is empty; give the "
                    "prompt a question, choose other text by an option of the method, or take a method that reads none."
                )
        return spans

    def text(self, rows: str) -> tuple[Tensor, Tensor]:
        """Embeddings of text tokens.

        Args:
            rows: "question" (without suffix), "instruction" (with suffix), "after" (all text after the last image) or
                "last" (last prompt token).

        Returns:
            Embeddings [B, T, H] and a mask [B, T] of the rows that exist.
        """
        sequence, spans = self.sequence, self.spans(rows)
        samples = tuple(sample for sample, _ in self.rows) or None
        return sequence.take(sequence.hidden, spans, samples), sequence.row_index(spans, samples)[1]

    def text_attention(self, layer: int, rows: str, rotary: bool, contextual: bool) -> tuple[Tensor, Tensor | None]:
        """Attention of text rows to the visual tokens at one decoder layer, with the softmax over visual tokens alone.

        Args:
            layer: decoder layer whose norm and projections are used.
            rows: as in `text`.
            rotary: rotate queries and keys by their positions.
            contextual: use the layer's real inputs, for which all earlier layers run once; False uses the embeddings.

        Returns:
            Weights [B, H, T, N] float32 and a mask [B, T] of the rows that exist; None if all do.
        """
        sequence, block = self.sequence, self.llm.layers[layer]
        hidden = self.run_layers(layer) if contextual else sequence.hidden
        spans, samples = self.spans(rows), tuple(sample for sample, _ in self.rows) or None
        alike = len({stop - start for start, stop in spans}) == 1 and spans[0][0] < spans[0][1]
        mask = None if alike else sequence.row_index(spans, samples)[1]
        if not self.rows:
            normed = block.input_layernorm(hidden)
            text, visual = sequence.take(normed, spans), at_images(normed, sequence, (), None)
        else:  # prompts may have other images or tiles too, so only the tokens of these images are normed
            text = block.input_layernorm(sequence.take(hidden, spans, samples))
            visual = block.input_layernorm(
                at_images(hidden, sequence, self.rows, self.members) if contextual else self.tokens
            )
        own, others = None, None  # cosines and sines of the text rows and of the visual tokens
        if rotary:
            cos, sin = angles_of(self.llm, sequence, layer)
            own = sequence.take(cos, spans, samples), sequence.take(sin, spans, samples)
            others = tuple(at_images(part, sequence, self.rows, self.members) for part in (cos, sin))
        weights = attention_rows(block, text, heads_of(block, "key", visual, others), angles=own)
        self.flops += len(text) * attention_flops(block, text.shape[1], visual.shape[1], visual.shape[1])
        return weights, mask


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs from which the attention of some rows of a decoder layer to all tokens they see is computed.

    Attributes:
        rows: [B, T, D] inputs of the layer at the rows, after its norm; a shorter span repeats its last row.
        angles: cosines and sines of the rows, see `angles_of`; None for no rotation.
        keys: [B, Hkv, W, d] float32 keys of the layer, rotated if the rows are.
        unseen: [B, 1, T, W] bool, True for the keys that a row may not see; None if all rows see all keys.
        visual: for each image, the span [start, stop) of its visual tokens among the keys.
    """

    rows: Tensor
    angles: Angles | None
    keys: Tensor
    unseen: Tensor | None
    visual: tuple[Span, ...]

    def at_visual(self, values: Tensor, dim: int = -1) -> Tensor:
        """The part of `values` [B, ..., W] that belongs to the keys of visual tokens.

        Args:
            dim: the dimension of the keys, counted from the last one.
        """
        start, stop = self.visual[0]
        if all(span == (start, stop) for span in self.visual):
            return values.narrow(dim, start, stop - start)
        return torch.stack([own.narrow(dim, a, b - a) for own, (a, b) in zip(values, self.visual, strict=True)])


@dataclass(kw_only=True)
class DecoderState(State):
    """Between two decoder layers: B images with the same number of visual tokens.

    Attributes:
        tokens: [B, N, H] hidden states of the visual tokens.
        sequence: the B prompts as they are now; `sequence.images` are the spans of the visual tokens.
        llm: the decoder (layers, norm, rotary_emb).
        layer: index of the layer that comes next, at least 1.
        entered: the same prompts as they entered the layer before, `layer - 1`.
        keys: [B, Hkv, L, d] rotated keys of `layer - 1`, read from the cache.
        start: the same prompts as they entered layer 0; text tokens are never reduced.
        masks: layer -> [B, 1, L, L] bool, True for the keys that a row of the layer sees (with a sliding window, or
            images that are seen whole); None if every row of every layer sees all real tokens up to itself.
        values: returns the values [B, Hkv, L, d] of `layer - 1`, read from the cache.
        members: returns [B, N] int64, for each visual token its index among the image's unreduced tokens.
        layouts: for each image, where its unreduced tokens come from.
        tower: score -> [B, N, ...], a tower score at the patches of the visual tokens; 0 at newline and class tokens.
            Only for the scores that `Reducer.scores` names.
        memory: for each image, what the method wrote into it before earlier layers.
    """

    tokens: Tensor
    sequence: PromptBatch
    llm: Decoder
    layer: int
    entered: PromptBatch
    keys: Tensor
    start: PromptBatch
    masks: Callable[[int], Tensor] | None = None
    # The pipeline always sets them; a test of a method that does not read them may leave them out.
    values: Callable[[], Tensor] = None  # type: ignore[assignment]
    members: Callable[[], Tensor] = None  # type: ignore[assignment]
    layouts: tuple[TokenLayout, ...] = ()
    tower: Callable[[TowerScore], Tensor] = None  # type: ignore[assignment]
    memory: tuple[dict[str, Any], ...] = ()

    def attention(self, rows: str | list[Span], at: str = "next", rotary: bool = True) -> tuple[Tensor, Tensor]:
        """Causal attention of some rows of a decoder layer to the visual tokens.

        Args:
            rows: one of TEXT_ROWS as `seeing_spans` finds them, or one span per prompt in `sequence`'s coordinates.
            at: "next" for layer `layer` on the current hidden states, "previous" for the layer before it, which has
                already run (its keys are read from the cache).
            rotary: False leaves out rotary embedding. The keys are then computed from the inputs of the layer.

        Returns:
            Weights [B, H, T, N] float32, with the softmax over all tokens that the row may see, so that a row sums to
            the part of its attention that goes to the image; and a mask [B, T] of the rows that exist.
        """
        seen = self.attention_inputs(rows, at, rotary)
        layer = self.llm.layers[self.layer - (at == "previous")]
        weights = attention_rows(layer, seen.rows, seen.keys, seen.unseen, seen.angles)
        spans = seeing_spans(self.sequence, rows) if isinstance(rows, str) else rows
        return seen.at_visual(weights), self.sequence.row_index(spans)[1]

    def attention_inputs(self, rows: str | list[Span], at: str = "next", rotary: bool = True) -> AttentionInputs:
        """The inputs of `attention`, with the same arguments; `flops` counts the operations of both here."""
        sequence, source = self.sequence, self.sequence if at == "next" else self.entered
        spans = seeing_spans(sequence, rows) if isinstance(rows, str) else rows
        index = self.layer - (at == "previous")
        layer, columns = self.llm.layers[index], sequence.padded_spans(spans)
        visual = columns if rows == "visual" else sequence.padded_spans(text_spans(sequence, "visual"))
        # No row sees a key after the last row. Visual tokens after it are still returned, as zeros.
        width = max(stop for _, stop in columns + visual)
        angles = angles_of(self.llm, source, index) if rotary else None
        if projects := at == "next" or not rotary:
            normed = layer.input_layernorm(source.hidden[:, :width])
            inputs = sequence.take(normed, spans)
            turned = None if angles is None else (angles[0][:, :width], angles[1][:, :width])
            keys = heads_of(layer, "key", normed, turned)
        else:
            inputs = layer.input_layernorm(sequence.take(source.hidden, spans))
            keys = in_float32(self.keys[:, :, :width])
        own = None if angles is None else (sequence.take(angles[0], spans), sequence.take(angles[1], spans))
        if self.masks is None:
            unseen = sequence.unseen(spans, width)
        else:
            unseen = ~sequence.take(self.masks(index)[:, 0, :, :width], spans)[:, None]
        self.flops += len(inputs) * attention_flops(layer, inputs.shape[1], width, width if projects else 0)
        return AttentionInputs(inputs, own, keys, unseen, visual)


# Rows of the prompts. Spans are in a sample's own coordinates, without padding.


def text_spans(sequence: PromptBatch, name: str, images: Sequence[ImageKey] = ()) -> list[Span]:
    """The spans of tokens by name, one of TEXT_ROWS; see `PromptState.text`.

    Args:
        images: returns one span for each of these images, in its prompt; () returns one span for each prompt.
    """
    if name not in TEXT_ROWS:
        raise unknown("text rows", name, TEXT_ROWS)
    if name == "visual":
        spans = [image for (image,) in sequence.visual]
    elif name == "last":
        spans = [(length - 1, length) for length in sequence.lengths]
    else:
        spans = list(getattr(sequence, name))
    return [spans[sample] for sample, _ in images] if images else spans


def seeing_spans(sequence: PromptBatch, name: str) -> list[Span]:
    """The spans of `text_spans`, changed so that their rows see the image; for prompts with one image each.

    Text before an image does not attend to it. In a prompt whose text is all before its image, the last token replaces
    the text, because it sees the whole image.
    """
    spans = zip(text_spans(sequence, name), sequence.images, sequence.lengths, strict=True)
    return [(start, stop) if stop > image else (length - 1, length) for (start, stop), (image, _), length in spans]


def at_images(tensor: Tensor, sequence: PromptBatch, rows: Sequence[ImageKey], members: Tensor | None) -> Tensor:
    """The rows [B, N, ...] of `tensor` [S, L, ...] at the visual tokens of images; see `PromptState`."""
    if not rows:
        return sequence.take(tensor, [image for (image,) in sequence.visual])
    samples = tuple(sample for sample, _ in rows)
    spans = [sequence.visual[sample][number] for sample, number in rows]
    if members is None:
        return sequence.take(tensor, spans, samples)
    first, _ = sequence.row_index([(start, start + 1) for start, _ in spans], samples)
    return sequence.at(tensor, members + first, samples)


# Attention of a decoder layer. Its queries and keys are those that the layer's own forward passes to its attention
# kernel, so norms of heads and rotations are those of the model's family.

Angles = tuple[Tensor, ...]  # cosines and sines of tokens, [B, T, d] each, as a layer takes them
PROBE = "queries_and_keys"  # name of our kernel among transformers' attention kernels
# Part of an attention -> the projection that computes it.
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
# Our kernel returns the queries and keys that it received in place of attention weights.
AttentionInterface.register(PROBE, lambda module, query, key, value, *_, **options: (value, (query, key)))


@dataclass
class _Configuration:
    """A layer's configuration, with PROBE as its kernel."""

    own: Any

    def __getattr__(self, name: str) -> Any:
        return PROBE if name == KERNEL else getattr(self.own, name)


@dataclass
class _Constant:
    """Zeros or ones that replace a tensor that is not needed, so that no operation runs on it.

    A product with ones and a sum with zeros return the other tensor. Every other function returns the constant itself,
    also when it replaces a module and is called.
    """

    ones: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    __call__ = __getattr__ = __getitem__ = __neg__ = lambda self, *_, **__: self
    __mul__ = __rmul__ = lambda self, other: other if self.ones else self
    __add__ = __radd__ = lambda self, other: self if self.ones or not isinstance(other, Tensor) else other

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of a torch function that has a constant among its arguments."""
        given = args[0] if isinstance(args[0], tuple | list) else args
        known = next(one for one in given if isinstance(one, cls))
        if func.__name__ in ("mul", "add"):
            other = args[known is args[0]]
            return known * other if func.__name__ == "mul" else known + other
        return (known,) * args[1] if func.__name__ == "chunk" else known


def angles_of(llm: Decoder, sequence: PromptBatch, layer: int) -> Angles:
    """Cosines and sines of a layer at the positions of prompts, [B, L, d] each; from `sequence` if it has them."""
    known, position = sequence.rotary, sequence.position
    if known is not None:
        return known.cos, known.sin
    axes = position if position.dim() == 2 else position.permute(2, 0, 1)
    # Gemma 3 rotates by other angles in layers with a sliding window.
    kinds = llm.config.layer_types if hasattr(llm.rotary_emb, "layer_types") else None
    angles: Angles = llm.rotary_emb(sequence.hidden, axes, *(() if kinds is None else (kinds[layer],)))
    return angles


def heads_of(layer: DecoderLayer, part: str, normed: Tensor, angles: Angles | None = None) -> Tensor:
    """Queries or keys [B, H, L, d] float32 of a decoder layer, with the heads of all ranks.

    The layer's own forward runs with only the projection that is asked for, and without a kernel.

    Args:
        part: "query" or "key".
        normed: [B, L, D] inputs of the layer after its norm, which queries and keys share.
        angles: of the L tokens; None for no rotation.

    Raises:
        UserError: the layer does not call a kernel through transformers' attention interface.
    """
    attention = layer.self_attn
    zeros, ones = (_Constant(one, (1, 1, attention.head_dim), normed.dtype, normed.device) for one in (False, True))
    modules: dict[str, Any] = dict(attention._modules)
    names = [name for name in PROJECTIONS.values() if name != PROJECTIONS[part]]
    left_out = {name: zeros for name in names if modules.pop(name, None) is not None}
    # Another module with the same weights, so that the model itself is not changed.
    probe = object.__new__(type(attention))
    vars(probe).update(vars(attention), config=_Configuration(attention.config), _modules=modules, **left_out)
    # Calls forward itself, without the module's hooks, which would expect an output.
    _, seen = type(attention).forward(probe, normed, position_embeddings=angles or (ones, zeros), attention_mask=None)
    heads = seen[part == "key"] if isinstance(seen, tuple) else None
    if not isinstance(heads, Tensor):
        raise UserError(
            f"{type(attention).__name__} does not call its kernel through transformers' attention interface, so its "
            "queries and keys cannot be read. Choose a method that reads no attention of the decoder."
        )
    gather = getattr(attention, "gather", None)
    whole: Tensor = heads if gather is None else gather(heads, 1)
    return whole if whole.dtype == torch.float32 else whole.float()


def attention_rows(
    layer: DecoderLayer, rows: Tensor, keys: Tensor, unseen: Tensor | None = None, angles: Angles | None = None
) -> Tensor:
    """Rows of a decoder layer's attention. Given all keys that a row sees, they are exactly what the layer computes.

    Given only the keys of visual tokens, the softmax runs over these. At layer 0, with its input embeddings and angles,
    the result then equals the layer's real attention up to the softmax denominator. Without angles it does not depend
    on distances between tokens.

    Args:
        layer: a decoder layer.
        rows: [B, T, D] inputs of the layer at the query rows, after its norm.
        keys: [B, Hkv, L, d] float32 keys of that layer, rotated if the rows are; grouped-query heads are repeated.
        unseen: [B, 1, T, L] bool, True for the keys that a row may not see; None if it sees all.
        angles: of the T rows; None for no rotation.

    Returns:
        [B, H, T, L] float32; rows sum to 1 over the keys that they see.
    """
    query = heads_of(layer, "query", rows, angles)
    if keys.shape[1] != query.shape[1]:
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = query @ keys.transpose(-1, -2) * layer.self_attn.scaling
    cap = getattr(layer.self_attn, "attn_logit_softcapping", None)  # of Gemma 2
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    if unseen is not None:
        scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def attention_flops(layer: DecoderLayer, rows: int, keys: int, projected: int) -> int:
    """Operations of the attention of `rows` queries to `keys` keys, of which `projected` still have to be projected."""
    query, key = layer.self_attn.q_proj, layer.self_attn.k_proj
    queries = 2 * rows * query.out_features * (query.in_features + keys)
    return queries + 2 * projected * key.in_features * key.out_features
