"""The messages of vault and worker: `frames` their bytes, `vault_side` and `worker_side` the state machines.

May import `masks` and what is below; knows no socket and no thread.  Begin with `side`, which both share.
"""
