"""What a method really reads and does, beside what its metadata says of it, for tests/test_every_method.py.

A method's stage functions are called in the pipeline and then again, on states in which one thing was changed. What
changes the reduction is what the method reads. Vectors are planted in groups that differ between keys, features and
tokens, so that similarity in one of these spaces says nothing about another.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Record
from llava.processing.prompt import Sample
from llava.reduction.merging import Reduction
from llava.reduction.reducer import Reducer, check_reductions
from llava.reduction.scores import BlockAttention, TowerScore
from llava.reduction.states import BlockState, DecoderState, EncoderState, PromptState, State
from llava.reduction.token_layout import Canvas, PatchGrid, single
from tests.conftest import samples
from tests.contract import accepted, label, run, standing

VECTORS = ("features", "tokens", "keys")  # what tokens are compared by, as `MethodMetadata.similarity` names it
HALF = (torch.float16, torch.bfloat16)
DRAWS = 4  # of planted vectors
GROUPS = 32  # pairs of vectors that are alike, of 64 tokens
FRAMES = 4  # of a video of 64 tokens
BUDGETS = (24, 20, 12, 40)  # of 64 tokens; every merging method has several targets then
# HiPrune has no anchors below 25 tokens, so it does not read their block; AutoPrune has a single cluster of all tokens.
LARGER = {"hiprune": (40,), "autoprune": (30,)}
PROSE = {  # kind of a tower score -> what metadata.score or metadata.rest call it
    "cls_attention": "CLS attention",
    "fused_cls_attention": "CLS attention",
    "cls_logits": "CLS logits",
    "received_attention": "attention",
    "received_from_all": "attention",
    "received_from_others": "attention",
    "keys": "key",
    "whole_keys": "key",
}


@dataclass
class Call:
    """One call of a stage function.

    Attributes:
        method: at the budget of the images.
        state: what it was given.
        attended: it asked for attention of the decoder.
    """

    stage: str
    method: Reducer
    state: State
    attended: bool = False

    @torch.inference_mode()
    def reductions(self, **changes: object) -> list[Reduction]:
        """One per image, of the stage function on the state with these changes."""
        state = frozen(self.method, replace(self.state, **changes))  # a call may write into its memory
        count = (state.tokens if isinstance(state, BlockState | DecoderState) else state.features).shape[1]
        returned = getattr(self.method, self.stage)(state)
        if returned is None:
            return [Reduction(torch.arange(count)[None], count)] * len(state.ids)
        parts = check_reductions(self.method, self.stage, returned, state.ids, count)
        return [part.only(row, on_cpu=True) for part, rows in parts for row in range(len(rows))]

    def vectors(self, space: str) -> Tensor | None:
        """[B, N, D] float32, one of VECTORS at every token that the stage was given; None where it has no such."""
        state = self.state
        if isinstance(state, DecoderState) and space == "keys":
            seen = state.attention_inputs("visual")
            return seen.at_visual(seen.keys, -2).mean(1)
        if isinstance(state, EncoderState) and space == "keys":
            found = [value for score, value in state.scores.items() if score.kind in ("keys", "whole_keys")]
            return self.with_cls(found[0]) if found else None
        found = getattr(state, space, None)
        return None if found is None else found.float()

    def with_cls(self, values: Tensor) -> Tensor:
        """Values of patches, with zeros in front where the stage was given a CLS token, too."""
        lacking = self.state.features.shape[1] - values.shape[1]
        return F.pad(values, (0, 0) * (values.dim() - 2) + (lacking, 0))


def drawn(like: Tensor, seed: int, close: bool = False) -> Tensor:
    """Scores [B, N] or vectors [B, N, D] in groups, positive; `close` ones are a tie in half precision."""
    generator = torch.Generator().manual_seed(seed)
    if like.dim() == 2:
        values = torch.rand(like.shape, generator=generator)
        return 0.1 + 2e-5 * values if close else 0.05 + values
    batch, count, size = like.shape
    centres = torch.randn(batch, GROUPS, size, generator=generator)
    group = torch.rand(batch, count, generator=generator).argsort(1) % GROUPS
    values = centres.gather(1, group[..., None].expand(-1, -1, size))
    values = values + 0.3 * torch.randn(like.shape, generator=generator)
    # What a half-precision model could have given.
    return (1 + 0.02 * values if close else values).to(torch.float16).float()


def inputs(state: State, seed: int, close: bool = False) -> dict[str, object]:
    """Other values for all scores and vectors that a state holds."""
    changes: dict[str, object] = {
        name: drawn(getattr(state, name), seed + number, close)
        for number, name in enumerate(VECTORS)
        if isinstance(getattr(state, name, None), Tensor) and not isinstance(state, DecoderState)
    }
    if isinstance(state, BlockState):
        changes["sizes"] = torch.randint(1, 5, state.sizes.shape).float()
    if isinstance(state, EncoderState):
        scores = {s: drawn(value, seed + 10 + n, close) for n, (s, value) in enumerate(state.scores.items())}
        changes |= {"scores": scores, "thumbnail": scores.__getitem__}
    return changes


def frozen(reducer: Reducer, state: State) -> State:
    """The state with what the pipeline computes when it is asked, which later steps would change."""
    if isinstance(state, BlockState):
        return replace(state, memory=dict(state.memory))
    if not isinstance(state, DecoderState):
        return state
    members, values = state.members(), state.values()
    tower = {score: state.tower(score) for score in reducer.scores()}
    memory = tuple(map(dict, state.memory))
    return replace(state, members=lambda: members, values=lambda: values, tower=tower.__getitem__, memory=memory)


def calls(reducer: Reducer, model: Llava, batch: list[Sample]) -> tuple[list[Call], Record]:
    """All calls of the method's stage functions on a batch, with planted inputs."""
    found: list[Call] = []
    cls = type(reducer)
    with pytest.MonkeyPatch.context() as patch:
        for stage in reducer.acts_in - {"input_grid"}:
            original = getattr(cls, stage)

            def called(self, state, _stage=stage, _original=original):
                found.append(Call(_stage, self, frozen(self, state)))
                return _original(self, state)

            patch.setattr(cls, stage, called)
        for state, name in ((PromptState, "text_attention"), (DecoderState, "attention_inputs")):
            original = getattr(state, name)

            def attended(state, *arguments, _original=original, **options):
                found[-1].attended = True
                return _original(state, *arguments, **options)

            patch.setattr(state, name, attended)
        _, _, record = run(model, batch, reducer)
    for number, call in enumerate(found):
        call.state = replace(call.state, **inputs(call.state, 100 * number))
    return found, record


def differ(one: Iterable[Reduction], other: Iterable[Reduction]) -> bool:
    """Whether other tokens are kept, or merged otherwise."""
    return any(
        not torch.equal(a.kept, b.kept) or not torch.allclose(a.matrix(), b.matrix(), atol=1e-6)
        for a, b in zip(one, other, strict=True)
    )


def made_of(reduction: Reduction, order: Tensor) -> list[tuple[int, ...]]:
    """The tokens that each output is made of, where token i is the original token order[i].

    The place of a token that is appended says nothing, so it is left out.
    """
    outputs = zip(reduction.kept[0].tolist(), reduction.matrix().tolist(), strict=True)
    own = [
        -1 if number >= len(reduction.kept[0]) - reduction.appended else int(order[token])
        for number, token in enumerate(reduction.kept[0])
    ]
    members = [sorted(int(order[token]) for token, share in enumerate(row) if share) for _, row in outputs]
    return sorted((first, *rest) for first, rest in zip(own, members, strict=True))


def reordered(seen: BlockAttention, whole: Tensor) -> BlockAttention:
    """The attention of a block whose tokens come in another order; CLS, whose query is read, stays first."""
    values = seen.values
    return replace(
        seen,
        keys=seen.keys[:, whole],
        projected_keys=seen.projected_keys[:, whole],
        values=values and (lambda: values()[:, whole]),
    )


def order_matters(call: Call, before: list[Reduction], order: Tensor, layout: PatchGrid | None = None) -> bool:
    """Whether the method keeps other tokens of every image if they come in another order.

    Of one image it may: equal ranks go to the lower index.

    Args:
        before: of the order as it is.
        order: [N] the places of the patches; the CLS token stays in front.
        layout: of the image in that order.
    """
    state, cls = call.state, before[0].inputs - len(order)
    whole = torch.cat([torch.arange(cls), order + cls])
    changes: dict[str, object] = {} if layout is None else {"layout": layout}
    if layout is not None and getattr(state, "canvases", ()):  # rows become columns on the canvas, too
        turned = [one and Canvas(one.size[::-1], (*one.box[1::-1], *one.box[:1:-1])) for one in state.canvases]
        changes["canvases"] = tuple(turned)
    for name in (*VECTORS, "sizes"):
        if isinstance(value := getattr(state, name, None), Tensor):
            changes[name] = value[:, whole]
    if isinstance(state, BlockState):
        changes |= {"attended": reordered(state.attended, whole)}
        changes |= {"memory": {name: value[:, order] for name, value in state.memory.items()}}
    if isinstance(state, EncoderState):
        scores = {score: value[:, order] for score, value in state.scores.items()}
        changes |= {"scores": scores, "thumbnail": scores.__getitem__}
    original = PromptState.text_attention

    def text_attention(state, *arguments, **options):
        weights, mask = original(state, *arguments, **options)
        return weights[..., whole], mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptState, "text_attention", text_attention)
        after = call.reductions(**changes)
    same = torch.arange(len(whole))
    return all(made_of(a, whole) != made_of(b, same) for a, b in zip(after, before, strict=True))


def named(score: TowerScore) -> str:
    """A tower score as `MethodMetadata.reads` names it: "cls_attention -2", "cls_attention 5/24" for a depth of 24."""
    return f"{score.kind} {score.block}" + f"/{score.depth}" * bool(score.depth)


def read_by(call: Call) -> set[str]:
    """What one call of a stage function depends on, the question excepted."""
    state, before, found = call.state, call.reductions(), set[str]()
    others = inputs(state, 50)
    if isinstance(state, DecoderState):
        others = {"tokens": drawn(state.tokens, 50)} | ({} if call.attended else {"keys": -state.keys.roll(1, 2)})
    if call.attended:
        found.add("attention")
    if isinstance(state, DecoderState) and (count := state.tokens.shape[1]) == state.layouts[0].tokens:
        high, wide = (call.reductions(layouts=(single(rows, count // rows),) * len(state.ids)) for rows in (8, 4))
        found |= {"grid"} if differ(high, wide) else set()
    if isinstance(state, DecoderState) and not call.attended:
        if differ(before, call.reductions(values=lambda: state.values().roll(1, 2))):
            found.add("values")
        turned = replace(state.sequence, position=state.sequence.position.flip(1), rotary=None)
        found |= {"order"} if differ(before, call.reductions(sequence=turned)) else set()
    for name in set(VECTORS) & set(others):
        if differ(before, call.reductions(**{name: others[name]})):
            found.add(name)
    if isinstance(state, DecoderState):
        wide = tuple(single(4, layout.tokens // 4) for layout in state.layouts)
        found |= {"grid"} if differ(before, call.reductions(layouts=wide)) else set()
        for score in call.method.scores():
            other = drawn(state.tower(score), 70)
            changed = {"tower": lambda asked, score=score, other=other: other if asked == score else state.tower(asked)}
            found |= {named(score)} if differ(before, call.reductions(**changed)) else set()
    if isinstance(state, EncoderState):
        for score in state.scores:
            changed = state.scores | {score: others["scores"][score]}
            if differ(before, call.reductions(scores=changed, thumbnail=changed.__getitem__)):
                found.add(named(score))
        high, wide = (
            replace(state.layout, rows=rows, columns=state.layout.rows * state.layout.columns // rows)
            for rows in (16, 4)
        )
        count = wide.rows * wide.columns
        order, layout = torch.randperm(count, generator=torch.Generator().manual_seed(0)), None
        order = (order + count * torch.arange(state.spec.frames)[:, None]).flatten()  # alike in all frames of a video
        if differ(turned := call.reductions(layout=wide), call.reductions(layout=high)):
            found.add("grid")
            # Rows become columns: what a method decides by rows and columns alike does not change.
            before, layout = turned, high
            order = torch.arange(count).view(wide.rows, wide.columns).T.flatten()
        if order_matters(call, before, order, layout):
            found.add("order")
    if isinstance(state, BlockState):
        seen = state.attended
        found |= {"attention"} if differ(before, call.reductions(attended=replace(seen, keys=-seen.keys))) else set()
        others = drawn(seen.keys, 60)
        found |= {"values"} if differ(before, call.reductions(attended=replace(seen, values=lambda: others))) else set()
        order = torch.randperm(before[0].inputs - 1, generator=torch.Generator().manual_seed(0))
        found |= {"order"} if order_matters(call, before, order) else set()
    return found


def filmed(call: Call) -> list[Call]:
    """The same call on a video, whose frames have the image's rows in turn; [] where the method reads no frames."""
    state = call.state
    if not isinstance(state, EncoderState):
        return []
    spec = replace(state.spec, frames=FRAMES)
    if not differ(call.reductions(), call.reductions(spec=spec)):
        return []
    tile = replace(state.layout, rows=state.layout.rows // FRAMES)
    changed = replace(state, spec=spec, tiles=(tile,) * FRAMES, layout=replace(tile, crops=FRAMES))
    return [replace(call, state=changed)]


def check_reads(reducer: Reducer, found: list[Call], model: Llava, batch: list[Sample]) -> None:
    """`MethodMetadata.reads` names what the kept tokens depend on, and nothing else."""
    stated = set(reducer.metadata.reads)
    asked = {named(score) for score in reducer.scores()}
    scores = {word for word in stated if " " in word}  # kind and block
    assert scores == asked, (
        f"{label(reducer)}: scores() asks for {sorted(asked)}, and metadata.reads states {sorted(scores)}"
    )
    seen = set().union(*map(read_by, [*found, *(video for call in found for video in filmed(call))]))
    other = [replace(sample, question="where is the red star of the dog", suffix="") for sample in batch]
    texts = [replace(sample, question="how many table do you see in it", suffix="") for sample in batch]
    pairs = zip(run(model, other, reducer)[2].steps, run(model, texts, reducer)[2].steps, strict=True)
    if any(differ([a.reduction], [b.reduction]) for one, two in pairs for a, b in zip(one, two, strict=True)):
        seen.add("question")
    assert seen - stated == set(), (
        f"{label(reducer)}: what is kept or merged depends on {', '.join(sorted(seen - stated))}, which metadata.reads "
        f"does not name: {', '.join(sorted(stated)) or 'nothing'}"
    )
    assert stated - seen == set(), (
        f"{label(reducer)}: metadata.reads names {', '.join(sorted(stated - seen))}, and nothing that is kept or "
        "merged depends on it"
    )


def check_acts(reducer: Reducer, record: Record) -> None:
    """The method reduces in the stages that it overrides and that its metadata states, and nowhere else."""
    text, said = reducer.metadata.acts, label(reducer)
    each = re.sub(r"(\d+) to (\d+)", lambda ends: ", ".join(map(str, range(int(ends[1]), int(ends[2]) + 1))), text)
    numbers = [int(n) for part in re.findall(r"decoder layers? (\d[\d, and]*)", each) for n in re.findall(r"\d+", part)]
    words = {"before the tower": "input_grid", "inside the tower": "tower", "after the tower": "encoder"}
    stated = {stage for word, stage in words.items() if word in text}
    stated |= {"decoder" if number else "prompt" for number in numbers}
    assert stated or text == "nowhere", f"{said}: metadata.acts should say where as other methods do, got {text!r}"
    layers = [layer for layer in numbers if layer]
    depth = int(next(iter(re.findall(r" of (\d+)", text)), 32))
    assert not layers or tuple(layers) == reducer.decoder_layers(depth), (
        f"{said}: metadata.acts states the decoder layers {layers} of {depth}, but it acts before "
        f"{list(reducer.decoder_layers(depth))}"
    )
    steps = [step for own in record.steps for step in own]
    stages = {"input": "input_grid", "tower": "tower", "encoder": "encoder", "prompt": "prompt"}
    done = {stages.get(step.place, "decoder") for step in steps}
    shorter = {
        stages.get(step.place, "decoder") for step in steps if step.reduction.kept.shape[1] < step.reduction.inputs
    }
    assert stated == shorter, f"{said}: metadata.acts says {text!r}, but tokens are reduced in {sorted(shorter)}"
    assert done == reducer.acts_in, (
        f"{said}: overrides {sorted(reducer.acts_in)}, but returns reductions in {sorted(done)}"
    )


def check_rest(reducer: Reducer, record: Record) -> None:
    """`rest`, `order`, `similarity` and `weights` of the metadata agree with the reductions."""
    about, said = reducer.metadata, label(reducer)
    steps = [step for own in record.steps for step in own]
    merges = any(step.reduction.merged_count().any() for step in steps)
    dropped = about.rest == "dropped"
    assert merges != dropped, (
        f"{said}: metadata.rest says {about.rest!r}, but tokens are {'merged' if merges else 'dropped'}"
    )
    appended = any(step.reduction.appended for step in steps)
    # A later step may restore the order, as ToMe's does.
    unsorted = reducer.deviates("unsorted") and any((standing(own)[0].diff() < 0).any() for own in record.steps if own)
    done = "merged tokens are appended" if appended else f"tokens are {'not ' if unsorted else ''}in raster order"
    assert bool(appended or unsorted) != (about.order == "raster"), (
        f"{said}: metadata.order says {about.order!r}, but {done}"
    )
    assert about.similarity in ("", "none", *VECTORS), said
    assert about.weights in ("", "mean", "score", "size", "similarity", "rounds"), said
    merges = merges and reducer.acts_in != {"input_grid"}  # resizing an image weighs its patches itself
    assert bool(about.weights) == merges and (not merges or about.similarity), (
        f"{said}: a method that merges states metadata.similarity and metadata.weights, and another states no weights; "
        f"got {about.similarity!r} and {about.weights!r}"
    )


def check_blocks(reducer: Reducer) -> None:
    """The blocks and kinds of tower scores in the prose of the metadata are those of `scores()`."""
    about, depth = reducer.metadata, 24
    prose = f"{about.score}; {about.rest}"
    asked = {score.index(depth) % depth for score in (*reducer.scores(), *reducer.split_scores())}
    blocks = {int(number.replace("−", "-")) % depth for number in re.findall(r"block ([−-]?\d+)", prose)}
    assert blocks <= asked, (
        f"{label(reducer)}: metadata.score names blocks {sorted(blocks)} of {depth}, but asked for are {sorted(asked)}"
    )
    for score in reducer.scores():
        assert PROSE[score.kind].lower() in prose.lower(), (
            f"{label(reducer)}: scores() asks for {score.kind}, and metadata.score does not say {PROSE[score.kind]!r}"
        )


@torch.inference_mode()
def check_similarity(reducer: Reducer, found: list[Call]) -> None:
    """Merged tokens are more like their own target than others are; kept ones are less alike than tokens at large."""
    space, merges, gaps = reducer.metadata.similarity, bool(reducer.metadata.weights), dict[str, float]()
    for call in found if space in VECTORS else ():
        far = []  # of each image, in standard deviations
        for seed in range(DRAWS):
            again = replace(call, state=replace(call.state, **inputs(call.state, 1000 * seed)))
            if (vectors := again.vectors(space)) is not None:
                unit = F.normalize(vectors, dim=-1)
                rule = nearer_to_target if merges else more_alike_than_random
                far += [rule(own @ own.T, part) for own, part in zip(unit, again.reductions(), strict=True)]
        if known := [one for one in far if one is not None]:
            gaps[call.stage] = sum(known) / len(known)
    said = f"{label(reducer)}, by the stated {space}:"
    assert gaps or space not in VECTORS, f"{said} no stage that could decide by it was given any"
    for stage, gap in gaps.items():
        how = "less like" if gap < -0.5 else "no more like"
        assert not merges or gap > 0.5, f"{said} {stage} merges tokens into a target that is {how} them than the others"
        how = "more" if gap > 0.6 else "as much"
        assert merges or gap < -0.6, f"{said} tokens that {stage} keeps are {how} alike as tokens drawn at random"


def nearer_to_target(cosine: Tensor, reduction: Reduction) -> float | None:
    """How much higher the cosine of merged tokens is to their own target than to others; None without others."""
    member, kept = reduction.matrix() > 0, reduction.kept[0]  # [K, N]
    member[:, kept] = False
    targets, joined = member.any(1), member.any(0)
    near, member = cosine[kept[targets]][:, joined], member[targets][:, joined]
    enough = member.sum() >= 4 and (~member).sum() >= 4
    return ((near[member].mean() - near[~member].mean()) / near.std()).item() if enough else None


def more_alike_than_random(cosine: Tensor, reduction: Reduction) -> float:
    """How much higher the mean cosine between kept tokens is than between as many that are drawn."""
    kept = reduction.kept[0]
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randperm(len(cosine), generator=generator)[: len(kept)] for _ in range(100)]
    means = torch.stack([cosine[one][:, one].mean() for one in sets])
    return ((cosine[kept][:, kept].mean() - means.mean()) / means.std()).item()


@torch.inference_mode()
def check_weights(reducer: Reducer, found: list[Call]) -> None:
    """Each output holds its own token, and the others with the weights that the metadata states."""
    rule, said, checked = reducer.metadata.weights, label(reducer), 0
    for call in found if rule else ():
        for image, reduction in enumerate(call.reductions()):
            if not reduction.merges:
                continue
            for own, row in zip(reduction.kept[0].tolist(), reduction.matrix(), strict=True):
                members = row.nonzero().flatten()
                where = f"{said}, {call.stage}: the output at token {own} is made of {members.tolist()}"
                assert row[own] > 0, f"{where}, and not of that token"
                if rule in ("score", "similarity"):  # some give the target a weight of its own
                    members = members[members != own]
                if len(members) < 2:
                    continue
                checked += 1
                weights = row[members]
                if rule == "rounds":  # each mean adds 1, and the target itself is there once
                    assert row[own] == 1 and (total := row.sum().item()) > 1.5, where
                    assert abs(total - round(total)) < 1e-4, f"{where}, with weights that add up to {total}"
                    continue
                if rule == "score":
                    values = call.with_cls(call.state.scores[reducer.scores()[0]])[image, members]
                elif rule == "similarity":
                    vectors = call.vectors(reducer.metadata.similarity)[image]
                    values = F.cosine_similarity(vectors[members], vectors[own], dim=-1)
                else:
                    values = call.state.sizes[image, members] if rule == "size" else torch.ones(len(members))
                ratio = weights / values
                assert (ratio / ratio.mean() - 1).abs().max() < 1e-3, (
                    f"{where} with the weights {[round(w, 3) for w in weights.tolist()]}, but metadata.weights says "
                    f"{rule!r}: {[round(v, 3) for v in values.tolist()]}, times one factor"
                )
    assert checked or not rule, f"{said}: metadata.weights says {rule!r}, and no three tokens were merged"


class HalfPrecision(TorchDispatchMode):
    """Notes the operations that return half-precision numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if any(isinstance(one, Tensor) and one.dtype in HALF for one in tree_leaves(out)):
            self.seen.append(func.name())
        return out


def check_precision(reducer: Reducer, found: list[Call]) -> None:
    """Scores are computed in float32, whatever precision the model has: values that differ would tie."""
    for call in found:
        changes = inputs(call.state, 0, close=True)
        with HalfPrecision() as half:
            whole = call.reductions(**changes)
        assert not half.seen, (
            f"{label(reducer)}, {call.stage}: computes in half precision ({half.seen[0]}) in a float32 model"
        )
        if isinstance(call.state, EncoderState):
            halved = {name: changes[name].half() for name in ("features", "tokens") if name in changes}
            assert not differ(whole, call.reductions(**changes | halved)), (
                f"{label(reducer)}, {call.stage}: keeps other tokens where the model's features are float16 than where "
                "the same numbers are float32; cast them with .float() before they are compared"
            )


def check(method: type[Reducer], model: Llava) -> None:
    """All that a method does, beside what its metadata says.

    Args:
        model: with 64 visual tokens.
    """
    batch = samples(4, text_only=())
    (reducer,) = accepted(method, {}, model, budgets=LARGER.get(method.name, BUDGETS))
    check_blocks(reducer)
    found, record = calls(reducer, model, batch)
    check_acts(reducer, record)
    check_rest(reducer, record)
    check_reads(reducer, found, model, batch)
    check_similarity(reducer, found)
    check_weights(reducer, found)
    check_precision(reducer, found)
