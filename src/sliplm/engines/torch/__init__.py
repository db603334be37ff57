"""Any PyTorch module with linear layers or convolutions, split and loaded again.

May import `engines` and what is below it.  Begin with `convert`, then `load`; `trace` finds the layers.
"""
