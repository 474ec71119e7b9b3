"""What is learnt by running the dense model, and the shapes world it is learnt and judged on."""
