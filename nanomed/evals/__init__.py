"""Evaluation: benchmarks by likelihood and by generation, dialogues and their judging, the page."""
