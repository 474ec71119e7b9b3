"""What is learnt by running the dense model.

Calibration and training data, importance, routing statistics, two worlds. torch and numpy; may
import d2m. `shapes/` a world with an exact verifier; `emoji/` one with a thousand pictures to
remember; `score/` what their suites share, suites.py both by name; `data/` training data of other
kinds; `measure/` importance, sensitivity, routing; `budget/` a recipe for a share of the FLOPs.
"""
