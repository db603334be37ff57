"""The mathematics: Z_p, fixed point, secret rotations, exact products; pure functions on arrays.

May import `errors` alone.  Begin with `field`, then `rotation`; `kernels` has the products, fastest last.
"""
