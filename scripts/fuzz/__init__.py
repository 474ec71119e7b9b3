"""Fuzzing of what reads foreign bytes: `python -m scripts.fuzz`.

targets   The targets of scripts.fuzz: bytes that came from outside
"""
