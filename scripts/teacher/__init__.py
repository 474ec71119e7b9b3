"""The stages that make the dense shapes teacher; scripts/train_teacher.py strings them together."""
