"""The commands of `vtr` that this project needs for its own pages, models and measurements; `eval/cli.py` adds them."""

TABLE = "eval.papers.table"
# Heading of `vtr --help` -> the words after `vtr` -> the fields of `eval.cli.Command`.
LAB: dict[str, dict[str, tuple[str, str] | tuple[str, str, tuple[str, ...]]]] = {
    "Lab: analyses, measurements and pages of this project, in a checkout": {
        "findings": ("lab.findings.command", "analyses of attnmix, visiondrop or consensusdrop on toy scenes"),
        "bench serving": ("lab.bench.serving", "vLLM under load: methods beside full"),
        "bench growth": ("lab.bench.growth", "how time and memory grow with visual tokens"),
        "bench peers": ("lab.bench.peers", "this repository and another code in turns, and ratios"),
        "bench stability": ("lab.bench.stability", "tokens on padding; choices under batch, precision and noise"),
        "bench selfcheck": ("lab.bench.selfcheck", "compare a device with the CPU before it is timed"),
        "bench claims": ("lab.bench.claims", "published claims of speed compared with ours"),
        "bench recommend": ("lab.bench.recommend", "how often vtr recommend finds a sweep's choice, and errs"),
        "tables embedded": (TABLE, "all methods on toys (docs/toy_results.md)", ("tables/embedded_main", "--page")),
        "tables consensusdrop": (TABLE, "claims (docs/consensusdrop.md)", ("consensusdrop/claims", "--page")),
        "tables benchmarks": ("lab.pages.benchmarks", "benchmarks, and the toy models' scores on them"),
        "tables methods": ("lab.pages.methods", "what the methods say of themselves (docs/methods.md)"),
        "tables memory": ("lab.pages.memory", "expected memory of the official models (docs/cluster.md)"),
        "tables reproduce": ("lab.pages.reproduce", "how to reproduce the tables (docs/paper_tables.md)"),
        "figures kept": ("lab.pages.kept", "draw the kept tokens (README, docs/methods.md)"),
    },
}
