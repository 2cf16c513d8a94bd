"""How the directions ``u`` are kept in memory, and their two products, ``project`` and ``expand``,
with tensors in the model's own shapes.
"""
