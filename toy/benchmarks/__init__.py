"""Writers of the toy benchmarks, one module per group of sets."""
