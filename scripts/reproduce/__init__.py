"""The paper's comparisons, on the shapes teacher: `python -m scripts.reproduce`.

rows       The rows of the table: models made from the dense teacher, each by a recipe
baselines  What the method is compared with, as recipes made from a recipe: same code
work       One row with one seed: convert, judge
summary    All results that are there, as one dict: rows pooled over their seeds
tables     The summary as Markdown: table.md
page       The summary as a page that loads nothing, and as a drawing
"""
