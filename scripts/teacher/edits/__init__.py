"""A dense teacher that edits shapes images: `python -m scripts.teacher.edits`.

subject  What it learns: instructions, the images before and after
words    The text encoders of models/shapes-dense learn the words of instructions
flow     Flow matching of the image after, beside the tokens of the image before
calibrate   What the judge of edits says where the answer is known
difference  The teacher as it is kept: its difference from models/shapes-dense
"""
