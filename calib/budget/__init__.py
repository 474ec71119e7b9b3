"""A recipe for a share of the dense model's FLOPs (`d2m convert --budget`).

Measured damages and counted costs enter, an ordinary recipe leaves.

    recipe    `d2m convert --budget`: groups of blocks and sizes of shared experts for a share of
              dense FLOPs
    costs     What the parts of a model cost under a recipe: FLOPs of its pieces, as `d2m plan`
              counts them
    knapsack  The cheapest damage within a budget: which blocks share a group, how large each
              shared expert is
"""
