"""The modules that LLaVA's evaluation scripts start, by LLaVA's names and with its flags.

LLaVA's gqa.sh and its like run as they are from the root of this project: see docs/harnesses.md. Unlike the rest of
`llava`, these modules import `eval`.
"""
