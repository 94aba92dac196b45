"""The parts of benchmarks/paper.py, the paper in miniature."""
