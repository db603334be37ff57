"""How much a model depends on the top of its matrices' spectra, and what it costs to keep it in the vault.

May import `report` and what is below it, never `attacks`.  Begin with `run`, then `study`.
"""
