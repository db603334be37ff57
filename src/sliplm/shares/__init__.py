"""What an owner chooses, a matrix cut in two, and both halves on disk: sealed, digested, in a ledger.

May import `arithmetic` and the ground below.  Begin with `recipe`, then `splitting`, then `share`.
"""
