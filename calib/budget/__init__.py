"""A recipe for a share of the dense model's FLOPs (`d2m convert --budget`).

Measured damages and counted costs enter, an ordinary recipe leaves.

    recipe    `d2m convert --budget`
    costs     What the parts of a model cost under a recipe: FLOPs of its pieces
    knapsack  The cheapest damage within a budget: which blocks share a group
"""
