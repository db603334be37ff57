"""How bytes get there, and from whom: sockets, TLS, certificates, evidence, one link to one worker.

May import `protocol` and what is below it.  Begin with `link`, then `transport`; `keys` says who may speak.
"""
