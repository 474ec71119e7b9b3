"""The paper's comparisons, on the shapes teacher: `python -m scripts.reproduce`.

rows       The rows of the table: models made from the dense teacher, each by a recipe, and
           knobs of them
baselines  What the method is compared with, as recipes made from a recipe: same code, steps
           and batches
work       One row with one seed: convert, judge, and write a JSON file that holds all that was
           done
summary    All results that are there, as one dict: rows pooled over their seeds, and what was
           expected
tables     The summary as Markdown: table.md, and the section of docs/results.md between two
           comments
page       The summary as a page that loads nothing, and as a drawing: report.html and
           pareto.svg
"""
