"""Benchmarks: questions, prompts, scorers and upload files, and what a scoring run writes."""
