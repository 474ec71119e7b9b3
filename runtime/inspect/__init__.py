"""`d2m inspect`: what a directory holds.

controlnet     What a ControlNet's bundle holds
directory      What a directory holds: a sparse checkpoint, a dense pipeline
backends_here  What every backend lacks here, how it runs the routed experts
block_table    The block schedule of a generation as a table for people
"""
