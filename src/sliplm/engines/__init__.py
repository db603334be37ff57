"""Where split models run: one subpackage per model library.

May import `planning` and what is below it.  Begin with `groups`, `modules`; `writing` makes the folders.
"""
