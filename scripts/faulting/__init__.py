"""The parts of scripts/faults.py: forked tries, the tools, kills, and places that fail."""
