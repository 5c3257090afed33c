"""Kernels in Triton for single steps of the model, each a custom operator with the same step in
plain PyTorch beside it.

An operator computes in Triton on cuda and in plain PyTorch elsewhere, so that models with it run
and are tested anywhere; files named `*_triton.py` are imported at the first call on cuda. Whether a
run uses an operator is a switch (`runtime.mlp_kernel`, `runtime.loss_kernel`), and the plain,
compiled code is the default: published measurements found block-level fusion to tie with it
(benchmarks/kernels.py measures).
"""
