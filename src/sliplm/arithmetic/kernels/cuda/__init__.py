"""Exact products on NVIDIA's cards.

    tiles, layout    what may be tried; how a matrix lies in a card's memory
    programs         what runs on the card, in Triton
    compiling        from there to the card's own code, without a card and without a C compiler
    driver           NVIDIA's driver, through ctypes
    card, matrix     one card; a matrix on it, as a `kernels.Matrix`
    tuning           which tile is fastest, tested first and kept
    placing          which matrix goes where

Nothing here is imported unless a card is there or asked for, and Triton only to compile.
"""
