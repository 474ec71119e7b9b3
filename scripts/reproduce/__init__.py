"""The paper's comparisons, on the teachers of both worlds: `python -m scripts.reproduce`.

rows       The rows of the table: models made from the dense teacher, each by a recipe
baselines  What the method is compared with, as recipes made from a recipe: same code
probe      Which runs of blocks a linear map replaces best
ffn_alone  One FFN, sparse and pruned, learning alone: error against steps
work       One row with one seed: convert, judge
summary    All results that are there, as one dict: rows pooled over their seeds
tables     The summary as Markdown: table.md
page       The summary as a page that loads nothing, and as a drawing
"""
