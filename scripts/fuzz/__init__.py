"""Fuzzing of what reads foreign bytes: `python -m scripts.fuzz`.

targets   The targets of scripts/fuzz/__main__.py: bytes that came from outside, and the
          function that reads them
"""
