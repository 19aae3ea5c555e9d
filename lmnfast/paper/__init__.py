"""The reproduction of the paper (arXiv 2310.05918): every task over many seeds, figures, claims, one report."""
