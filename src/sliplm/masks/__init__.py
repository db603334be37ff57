"""One-time masks: dealt, kept in memory or in a pool on disk, and burnt, so that none serves twice.

May import `shares` and what is below.  Begin with `masks`; `pool` has those on disk, `anchor` knows copies.
"""
