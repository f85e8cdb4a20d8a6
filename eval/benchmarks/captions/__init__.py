"""Captions: NoCaps and Flickr30k."""

from eval.benchmarks.captions import flickr30k, nocaps

BENCHMARKS = (
    nocaps.BENCHMARK,
    flickr30k.BENCHMARK,
)
