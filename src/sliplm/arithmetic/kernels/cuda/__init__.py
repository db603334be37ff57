"""Exact products on NVIDIA's cards, and the vault's steps there.

    tiles, layout    what may be tried; how a matrix lies in a card's memory
    programs         what runs on the card, in Triton
    compiling        from there to the card's own code, without a card and without a C compiler
    driver           NVIDIA's driver, through ctypes
    card, matrix     one card; a matrix on it, as a `kernels.Matrix`
    lent             memory of a card that two processes share
    tuning           which tile is fastest, tested first and kept
    placing          which matrix goes where
    vault_programs   the vault's steps for activations on a card, in Triton
    aes_programs     masks from their keys, in Triton
    vault_layout     a group's secrets in a card's memory
    vault_steps      who asks for its steps in their order

No driver is loaded unless it is asked for a card, and Triton only to compile.
"""
