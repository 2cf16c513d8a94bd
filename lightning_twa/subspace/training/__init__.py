"""How the averaging coefficients are trained: what the solver steps, how far, and how several
processes take a step together.
"""
