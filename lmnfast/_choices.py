"""The words that arguments may be. The command line's help reads them, so this module does not import torch."""

METHODS = ("path", "hermite", "hermite-midpoint", "jacobian")
RULES = ("uniform", "lobatto")
NEGATIVE = ("absolute", "clip")
SOLVERS = ("dense", "estimate")  # of the entropy of a matrix
DEVICES = ("auto", "cpu", "cuda")
# The observables of the package, in the order of `lmnfast.observables()`.
OBSERVABLES = (
    *("lmn", "complexity_bits", "curvature", "pooled_curvature", "participation_ratio", "negative_share"),
    *("jacobian_rank", "local_complexity", "representation_rank", "l2_norm"),
)
# What a `Penalty` may be of.
PENALTIES = ("pooled_curvature", "curvature", "lmn", "complexity_bits")
