"""The stages in which the toy models are trained."""

from toy.stages.base import Stage
from toy.stages.instruct import Instruct
from toy.stages.language import Language
from toy.stages.next import Next
from toy.stages.video import Video
from toy.stages.vision import Vision

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Vision, Language, Next, Video, Instruct)}
