"""The messages of vault and worker: `frames` are their bytes, `sides` the two state machines.

May import `masks` and what is below; knows no socket and no thread.  Begin with `sides`.
"""
