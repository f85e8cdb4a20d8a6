"""Questions about videos: Video-LLaVA's zero-shot sets, and a set of short answers."""

from eval.benchmarks.video import activitynet_qa, msrvtt_qa, msvd_qa, tgif_qa, video_qa

BENCHMARKS = (
    video_qa.BENCHMARK,
    msvd_qa.BENCHMARK,
    msrvtt_qa.BENCHMARK,
    tgif_qa.BENCHMARK,
    activitynet_qa.BENCHMARK,
)
