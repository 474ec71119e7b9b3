"""What is learnt by running the dense model.

Calibration and training data, importance, routing statistics, the shapes world. torch and numpy;
may import d2m. `shapes/` a world with an exact verifier; `data/` training data of other kinds;
`measure/` importance, sensitivity, routing; `budget/` a recipe for a share of the FLOPs.
"""
