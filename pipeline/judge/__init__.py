"""Judging a file against its reference: corpus, runtime, metrics, gates and the report.

Nothing here imports torch or transformers: a file is judged without the framework that made it.
"""
