"""How the bundled toy models and toy benchmarks are made: drawn data, training from nothing, export, reports."""
