"""A loaded LLaVA: its modules, its preprocessing, and the encoding of images by its vision tower.

`llava.pipeline.generate.generate` uses it to answer questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava.conversation import stop_string
from llava.model.checkpoint.files import check_same, hashes_of
from llava.model.multimodal_encoder.clip_encoder import Encoded, TowerMerger, encode
from llava.model.multimodal_encoder.clip_text_encoder import load_clip_text
from llava.model.official_names import LlavaMetaForCausalLM as LlavaMetaForCausalLM  # scripts import it from here
from llava.processing.prompt import Prompt, Sample, build_prompt
from llava.reduction.budget import in_tower
from llava.reduction.merging import Reduction, ViewReduction, join
from llava.reduction.modules import tower_flops
from llava.reduction.reducer import Reducer
from llava.reduction.scores import TowerScore, score_flops
from llava.reduction.token_layout import Canvas, ModelSpec, PatchGrid, TokenLayout, single


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image or video after the tower.

    Attributes:
        encoded: the tower's output for its C crops: features [C, n, D], scores [C, P, ...].
        layout: layout of the tokens in `encoded`, with class tokens if the method keeps them.
        full: layout of the tokens that the model takes without any reduction.
        inputs: number of tokens that the method starts from, before it reduces any inside the tower.
        step: the stage and the reduction that was made up to here, if there was one.
    """

    encoded: Encoded
    layout: TokenLayout
    full: TokenLayout
    inputs: int
    step: tuple[str, Reduction] | None = None

    def crop_features(self, number: int, with_cls: bool) -> Tensor:
        """[n, D] features of a crop's patches; `with_cls` puts its class token, if it has one, before them."""
        crop, features = self.layout.crops[number], self.encoded.features[number]
        cls = int(crop.cls is not None)
        patches = features[cls:]
        if len(patches) != len(crop.patches):
            patches = patches[crop.patches.to(features.device, non_blocking=True)]
        return torch.cat([features[:cls], patches]) if with_cls and cls else patches

    def tile_score(self, score: TowerScore, number: int) -> Tensor:
        """[n, ...] values of a score at a crop's patches."""
        values, patches = self.encoded.scores[score][number], self.layout.crops[number].patches
        return values if len(values) == len(patches) else values[patches.to(values.device, non_blocking=True)]


def encoded_image_of(
    encoded: Encoded, full: TokenLayout, keep_cls: bool, grid: tuple[int, int] | None = None
) -> EncodedImage:
    """The image made of the tower's output for its crops.

    Args:
        full: layout of the tokens that the model takes without any reduction.
        keep_cls: True if class tokens come before the features of their crops.
        grid: the coarser patch grid that every crop was shrunk to; None if it was not.
    """
    start = full.with_cls if keep_cls else full
    if grid is not None and grid != full.grid:
        pieces = [ViewReduction(crop.indices, coarse(crop.patch_grid, grid)) for crop in full.crops]
        whole = len(pieces) == 1
        step = ("input", pieces[0].reduction if whole else join(pieces, full.tokens)[0])
        return EncodedImage(encoded, full.shrunk(grid), full, start.tokens, step)
    merged = encoded.merged
    if merged is None:
        return EncodedImage(encoded, start, full, start.tokens)
    if len(full.crops) == 1:
        left = single(1, merged.kept.shape[1])
        return EncodedImage(encoded, left, full, start.tokens, ("tower", merged))
    pieces = [
        ViewReduction(crop.indices.to(merged.kept.device, non_blocking=True), merged.only(number))
        for number, crop in enumerate(full.crops)
    ]
    reduction, order = join(pieces, full.tokens)
    return EncodedImage(encoded, full.left(merged.kept.shape[1], order.cpu()), full, start.tokens, ("tower", reduction))


def coarse(layout: PatchGrid, grid: tuple[int, int]) -> Reduction:
    """Shrinking an image, as a reduction: every original patch is averaged into the coarse patch that covers it."""
    rows, columns = grid
    row = torch.arange(layout.rows) * rows // layout.rows
    column = torch.arange(layout.columns) * columns // layout.columns
    owner = (row[:, None] * columns + column).flatten()
    centre_row = ((torch.arange(rows) * 2 + 1) * layout.rows) // (2 * rows)
    centre_column = ((torch.arange(columns) * 2 + 1) * layout.columns) // (2 * columns)
    anchor = (centre_row[:, None] * layout.columns + centre_column).flatten()
    share = 1.0 / torch.bincount(owner, minlength=rows * columns).float()
    return Reduction(anchor[None], layout.tokens, owner[None], share[owner][None])


if TYPE_CHECKING:
    from llava.pipeline.accounting import Batch, Operations, Timer


class LoadedModel:
    """What a run knows about a model that was loaded from files, whichever code answers its questions.

    Attributes:
        hf_model: the model of transformers.
        device: where prompts are assembled.
        name: hub id or folder name.
        notes: sentences about what was assumed or left out when the model was loaded.
        conversation: name of the prompt template.
        stop: the text that ends an answer. None if it is the end token, so that decoded text need not be searched.
        vocabulary: number of rows of the head that stand for a token.
        spread: True if the decoder is spread over the ranks of a process group, which all answer the same questions.
        loaded_with: keyword arguments of `llava.model.builder.load` with which another process can load the model.
        answers: a function that answers a batch instead of the code in llava/pipeline/generate.py; None for that code.
        engine: the engine that `answers` uses (llava/serving/engine_model.py).
        takes_videos: True if a sample may hold a llava.processing.video.Video in place of an image.
    """

    hf_model: Any
    device: torch.device
    tokenizer: Any
    name: str
    notes: tuple[str, ...]
    conversation: str
    stop: str | None
    vocabulary: int
    spread: bool
    loaded_with: dict[str, Any]
    answers: Callable[..., "Batch"] | None = None
    engine: Any = None
    takes_videos: bool = False
    _files: Any

    @property
    def conventions(self) -> dict[str, Any]:
        """Choices of how images are read. Answers depend on them, so they are part of every result."""
        return {}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end an answer: the tokenizer's, and those of the generation config if it has any."""
        ids = {self.tokenizer.eos_token_id}
        configured = getattr(self.hf_model.generation_config, "eos_token_id", None)
        ids |= set(configured) if isinstance(configured, list) else {configured}
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """File of the checkpoint -> hash of its content: weights, configuration, tokenizer, preprocessing."""
        if not self._files:
            raise AssertionError(
                f"{self.name} was not read from files, so nobody could say later what gave its answers"
            )
        return hashes_of(self._files)

    def check_files(self) -> None:
        """Raise UserError if a file of the checkpoint has changed since it was read.

        Weights that need no conversion stay mapped, so writing to their file changes them in the running model.
        """
        check_same(self._files, self.fingerprint)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text


class Llava(LoadedModel):
    """Modules and preprocessing of a checkpoint, for the code in llava/pipeline/generate.py.

    Args:
        checkpoint: the result of `llava.model.checkpoint.load.load_checkpoint`.
        device: where the modules are.

    Attributes:
        llm, head, tower, projector: the modules of the model.
        layout: patch grid of one tile.
        axes: True if positions have three axes (frame, row and column).
        newline: the learned vector after every row of stitched tiles; None if the model stitches none.
        text_tower: folder or hub id of the CLIP whose text tower methods may read; None for none.
    """

    axes: bool = False
    newline: Tensor | None = None

    def __init__(self, checkpoint: Any, device: torch.device):
        container = checkpoint.model
        self.hf_model = container
        self.device = device
        self.tokenizer = checkpoint.tokenizer
        self.image_processor = checkpoint.image_processor
        if checkpoint.conversation:  # the prompts of a stock model are written by its caller
            self.use_template(checkpoint.conversation)
        self.name = checkpoint.name
        self.notes = checkpoint.notes
        self.vocabulary = checkpoint.vocabulary
        self._files = checkpoint.files
        self.spread = checkpoint.spread
        self.text_tower = checkpoint.text_tower
        self.llm: Any = container.model.language_model
        self.head: Any = container.lm_head
        self._read_tower()

    def _read_tower(self) -> None:
        """Find the vision tower and the projector in the HF model, and the patch grid of one tile."""
        inner = self.hf_model.model
        self.tower: Any = inner.image_tower if hasattr(inner, "image_tower") else inner.vision_tower
        self.projector: nn.Module = inner.multi_modal_projector
        self.select_layer: int = self.hf_model.config.vision_feature_layer
        side = self.tower.config.image_size // self.tower.config.patch_size
        self.layout = PatchGrid(side, side)

    def use_template(self, conversation: str) -> None:
        """Write prompts with a template, a key of `llava.conversation.MODES`."""
        stop = stop_string(conversation)
        self.conversation = conversation
        self.stop = None if stop == getattr(self.tokenizer, "eos_token", None) else stop

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image before any reduction."""
        return self.layout.tokens

    @cached_property
    def text_tower_fingerprint(self) -> dict[str, str]:
        """The `fingerprint` of the CLIP text tower; part of a result only if the method reads that tower."""
        return hashes_of(self.clip.files)

    def check_files(self) -> None:
        super().check_files()
        if "clip" in vars(self):
            check_same(self.clip.files, self.text_tower_fingerprint)

    @cached_property
    def spec(self) -> ModelSpec:
        """What methods may know about the model; with its largest image if images differ in size."""
        return ModelSpec(
            self.layout.rows * self.layout.columns,
            len(self.llm.layers),
            self.layout,
            len(self.tower.encoder.layers),
            has_text_tower=self.text_tower is not None,
        )

    @cached_property
    def clip(self) -> Any:
        """The CLIP text tower, loaded when a method first asks for it."""
        return load_clip_text(self.text_tower, self.tower, self.tokenizer, self.device)

    def prompt(self, sample: Sample) -> Prompt:
        return build_prompt(sample, self.tokenizer, self.conversation, self.longest_text)

    @cached_property
    def longest_text(self) -> int | None:
        """How many text tokens the decoder has positions for, besides the visual tokens of one tile; None if none."""
        room = self.hf_model.config.get_text_config().max_position_embeddings - self.layout.tokens
        return room if room > 0 else None

    def views(self, image: Any) -> tuple[Tensor, TokenLayout]:
        """The crops of an image for the tower, pixels [C, 3, S, S], and the layout of the tokens they become."""
        return self.image_processor(image)[None], single(self.layout.rows, self.layout.columns)

    def layout_of(self, image: Any) -> TokenLayout:
        """The layout of an image's visual tokens without any reduction, which needs no tower."""
        return self.views(image)[1]

    def canvas(self, image: Any) -> Canvas | None:
        """Which part of the area that an image's patches cover is the image, not padding.

        None for prepared pixels, because only the caller knows.
        """
        return self.image_processor.canvas(image.size) if isinstance(image, Image.Image) else None

    def encode_images(
        self, images: Sequence[Any], keys: Sequence[object], reducer: Reducer, timer: "Timer"
    ) -> list[EncodedImage]:
        """Preprocess images and run the tower on them, all tiles together.

        Args:
            images: PIL images, or videos if the model takes them.
            keys: one hashable name per image. Unused here; a sweep over methods caches images by these names.
            timer: gets the time of preprocessing.
        """
        views = [self.views(image) for image in images]
        timer.mark("preprocess")
        encoded_images: dict[int, EncodedImage] = {}
        groups: dict[tuple[Reducer, bool, bool, int], list[int]] = {}
        inside, keep_cls = not reducer.acts_in.isdisjoint(("tower", "input_grid")), reducer.keep_cls
        for index, (_, full) in enumerate(views):
            sized = in_tower(reducer, full) if inside else reducer
            alone = index if sized.tower_by_image else -1
            groups.setdefault((sized, full.temporal, full.tiles is not None, alone), []).append(index)
        for (sized, temporal, tiled, _), rows in groups.items():
            pixels, done = torch.cat([views[index][0] for index in rows]).to(self.device, non_blocking=True), 0
            tower, grid, merger = self.tower_of(temporal), None, None
            if inside:
                grid = sized.input_grid(self.layout)
                if "tower" in sized.acts_in:
                    blocks = sized.merging_blocks(self.select_layer % (len(tower.encoder.layers) + 1))
                    merger = TowerMerger(sized, self.spec, tower, blocks, len(pixels)) if blocks else None
            # The class tokens of a video's frames are visual tokens.
            scores, with_cls = sized.tower_scores(tiled), keep_cls or temporal
            encoded = encode(tower, pixels, self.select_layer, scores, grid, with_cls, merger)
            for index in rows:
                crops, full = views[index]
                own = encoded if len(crops) == len(pixels) else encoded.rows(slice(done, done + len(crops)))
                encoded_images[index] = encoded_image_of(own, full, keep_cls, grid)
                done += len(crops)
        return [encoded_images[index] for index in range(len(views))]

    def tower_of(self, temporal: bool) -> Any:
        """The vision tower for images, or for the frames of videos."""
        return self.tower

    def count_tower(self, operations: "Operations", image: EncodedImage, images: int) -> None:
        """Count the operations of the tower on all tiles of one image, with those of scores and merging.

        Args:
            images: number of images of the batch that share this pass of the tower.
        """
        encoded, tower = image.encoded, self.tower_of(image.full.temporal)
        tiles, patches = len(encoded.features), encoded.grid[0] * encoded.grid[1]
        operations.add("tower", tiles_flops, tiles, tower_flops, tower, patches, encoded.tokens, images=images)
        if encoded.spent:
            operations.add("selection", int, tiles * encoded.spent, images=images)
        if encoded.scores:
            blocks, scores = tower.encoder.layers, tuple(encoded.scores)
            operations.add("selection", tiles_flops, tiles, score_flops, scores, blocks, patches, images=images)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, vocabulary] float32 of hidden states [B, 1, D] before the final norm, without unused head rows."""
        # The input of the head keeps three axes, because tensor-parallel heads index the third one.
        logits: Tensor = self.head(self.llm.norm(hidden))[:, -1, : self.vocabulary].float()
        return logits


def tiles_flops(tiles: int, function: Callable[..., int], *arguments: Any) -> int:
    """Operations of all tiles of an image."""
    return tiles * function(*arguments)
