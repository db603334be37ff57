"""What a split costs, counted, and from a budget to a choice.

May import `parties` and what is below it.  Begin with `counts`.
"""
