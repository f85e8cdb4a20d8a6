"""What the toy models see and are asked: scenes, videos, questions, vocabularies, corpora."""
