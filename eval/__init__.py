"""Benchmarks, official metrics, the resumable answer store and the run that joins them."""
