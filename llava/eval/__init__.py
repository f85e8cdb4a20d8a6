"""The modules that LLaVA's evaluation scripts start, by LLaVA's names and with its flags.

`bash scripts/v1_5/eval/gqa.sh` of LLaVA runs as it is from the root of this project: see docs/llava_scripts.md. Unlike
the rest of `llava`, these modules import `eval`.
"""
