"""Those who take part: the vault, its workforce and dealers, the worker; `codec` is the vault's arithmetic.

May import `network` and what is below it.  Begin with `vault` and `exchange`, then `worker`.
"""
