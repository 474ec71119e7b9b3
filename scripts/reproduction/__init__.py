"""The rows, the work and the tables of scripts/reproduce.py."""
